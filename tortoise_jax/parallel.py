"""The only module that names devices, hosts and pmap. Everything is data parallel: a state copy a device.

Works unchanged from one CPU to a TPU pod: each host feeds its own devices its own rows, `psum` over AXIS joins them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from tortoise_jax.errors import UserError, first_line

AXIS = "data"
Tree = Any


def prepare_process(deterministic: bool = True) -> None:
    """Before JAX starts: keep compiled programs for the next run, and, on NVIDIA, compute the same bits every time."""
    flag = "--xla_gpu_deterministic_ops=true"
    if deterministic and flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "tortoise_jax" / "compiled"))


def initialize(coordinator: str = "", num_processes: int = 0, process_id: int = -1) -> None:
    """Joins the hosts of a run, before any other use of JAX.

    With a coordinator ("host:port") all three are needed. Without, JAX looks for a TPU pod, SLURM, Open MPI or
    Kubernetes; finding none it stays a single process.
    """
    given = [bool(coordinator), num_processes > 0, process_id >= 0]
    if any(given):
        if not all(given):
            raise UserError("--coordinator HOST:PORT, --num_processes N and --process_id I must be given together")
        if process_id >= num_processes:
            raise UserError(f"--process_id {process_id} must be below --num_processes {num_processes}")
        with unreachable_as_one_line(coordinator):
            jax.distributed.initialize(coordinator, num_processes, process_id, heartbeat_timeout_seconds=100)
        return
    with contextlib.suppress(ValueError):  # what JAX raises where it finds no cluster
        jax.distributed.initialize()


@contextlib.contextmanager
def unreachable_as_one_line(coordinator: str) -> Any:
    try:
        yield
    except (RuntimeError, ValueError) as error:
        reason = first_line(error)
        raise UserError(f"--coordinator {coordinator}: could not join the other hosts: {reason}") from None


def is_main() -> bool:
    """Whether this is the host that prints and writes what is written once."""
    return jax.process_index() == 0


def process_index() -> int:
    return jax.process_index()


def process_count() -> int:
    return jax.process_count()


def device_count() -> int:
    """Devices of all hosts."""
    return jax.device_count()


def local_device_count() -> int:
    return jax.local_device_count()


def describe() -> str:
    """ "8 x TPU v5 lite on 2 hosts"."""
    hosts = f" on {jax.process_count()} hosts" if jax.process_count() > 1 else ""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}{hosts}"


def on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def best_dtype() -> str:
    """bfloat16 where the hardware multiplies it fast (TPU, NVIDIA from Ampere on), else float32."""
    device = jax.devices()[0]
    if device.platform == "tpu":
        return "bfloat16"
    capability = float(getattr(device, "compute_capability", 0) or 0)
    return "bfloat16" if device.platform in ("gpu", "cuda") and capability >= 8.0 else "float32"


def mapped(step: Callable[..., Any], *, donate: bool) -> Any:
    """A per-device function of (replicated state, device's batch) as one pmapped program."""
    return jax.pmap(step, axis_name=AXIS, donate_argnums=(0,) if donate else ())


def replicate(tree: Tree) -> Tree:
    """A copy of every array on each local device, behind a leading device axis, sharded as pmap's own outputs are."""
    devices = jax.local_devices()
    mesh = jax.sharding.Mesh(np.array(devices), (AXIS,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(AXIS))

    def copy(leaf: Any) -> Any:
        one = np.asarray(leaf)[None]
        shards = [jax.device_put(one, device) for device in devices]
        return jax.make_array_from_single_device_arrays((len(devices), *one.shape[1:]), sharding, shards)

    return jax.tree.map(copy, tree)


def first_copy(tree: Tree) -> Tree:
    """The first device's copy of replicated arrays, on the host (numpy). `x[0]` would gather from all devices."""
    shards = jax.tree.map(lambda leaf: leaf.addressable_shards[0].data, tree)
    return jax.tree.map(lambda leaf: np.asarray(leaf)[0], jax.device_get(shards))  # all copies start at once


def host_rows(rows: int) -> slice:
    """Which of a global batch's rows this host feeds."""
    share = rows // jax.process_count()
    return slice(jax.process_index() * share, (jax.process_index() + 1) * share)


def split_rows(batch: dict[str, np.ndarray], accumulation: int) -> dict[str, np.ndarray]:
    """This host's rows (r, ...) -> (local devices, accumulation, rows of a micro-batch, ...)."""
    devices = jax.local_device_count()
    return {name: value.reshape(devices, accumulation, -1, *value.shape[1:]) for name, value in batch.items()}


def check_same_everywhere(what: str, value: Any) -> None:
    """Raises where hosts of a run were started with different settings: they would wait for each other for ever."""
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).digest()
    mine = np.frombuffer(digest, np.uint8).astype(np.int32)
    everyone = multihost_utils.process_allgather(mine)
    different = [i for i, other in enumerate(everyone) if not np.array_equal(other, everyone[0])]
    if different:
        raise UserError(f"{what} differs between hosts: {different} do not have what host 0 has; start all alike")


def wait_for_all(name: str) -> None:
    """Returns when every host has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def any_host(flag: bool) -> bool:
    """Whether the flag is set on any host; every host must ask at the same point."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def device_memory() -> int | None:
    """Bytes one device may use, as far as it says so; the machine's memory shared by its devices on CPU."""
    if on_cpu():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit")


# Rows shared out over this host's devices, each running its own loop: what generation needs.


def local_mesh() -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array(jax.local_devices()), (AXIS,))


def on_every_device(tree: Tree) -> Tree:
    """One copy of every array on each local device."""
    return jax.device_put(tree, jax.sharding.NamedSharding(local_mesh(), jax.sharding.PartitionSpec()))


def rows_on_devices(tree: Tree) -> Tree:
    """Arrays (rows, ...) shared out over the local devices, which must divide the rows."""
    return jax.device_put(tree, jax.sharding.NamedSharding(local_mesh(), jax.sharding.PartitionSpec(AXIS)))


def by_rows(
    function: Callable[..., Any], replicated: int, sharded: int, donate: tuple[int, ...] = ()
) -> Callable[..., Any]:
    """One program a device for its own rows: first `replicated` arguments all devices have alike, then `sharded` ones.

    What it returns has rows too. Devices do not wait for each other inside.
    """
    every, rows = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec(AXIS)
    specs = (every,) * replicated + (rows,) * sharded
    mapped = jax.shard_map(function, mesh=local_mesh(), in_specs=specs, out_specs=rows, check_vma=False)
    return jax.jit(mapped, donate_argnums=donate)
