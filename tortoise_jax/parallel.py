"""Devices, and pmap over them. Everything is data parallel: each device has a copy of the state.

Works unchanged from one CPU to a TPU pod: each host feeds its own devices its own rows, `psum` over AXIS joins them.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

AXIS = "data"
Tree = Any
# XLA may not try kernels out where it computes the same bits every time, and takes a default tile for those of Triton.
# No tile fits the conditioning encoder's 517 frames: the step would not compile. cuBLAS multiplies any shape.
WITHOUT_TRITON = "xla_gpu_enable_triton_gemm"
DETERMINISTIC = ("--xla_gpu_deterministic_ops=true", f"--{WITHOUT_TRITON}=false")
# XLA's default on CPU starts what it can as early as it can: all that `remat` computes again, too. A flag that an XLA
# does not know ends the process, so that this one is for the versions it was seen in.
LITTLE_MEMORY = (
    ("--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",) if jax.__version_info__ < (0, 11) else ()
)


def prepare_process(deterministic: bool = True) -> None:
    """Before JAX starts: keep compiled programs for the next run, use little memory on CPU, and, on NVIDIA, compute the
    same bits every time."""
    given, wanted = os.environ.get("XLA_FLAGS", ""), LITTLE_MEMORY + (DETERMINISTIC if deterministic else ())
    missing = [flag for flag in wanted if flag.partition("=")[0] not in given]
    os.environ["XLA_FLAGS"] = " ".join([*given.split(), *missing])
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "tortoise_jax" / "compiled"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # many small programs take long together


def is_main() -> bool:
    """Whether this is the host that prints and writes what is written once."""
    return jax.process_index() == 0


def say(line: str) -> None:
    """Prints a line on the main host."""
    if is_main():
        print(line, flush=True)


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


def describe_this_host() -> str:
    """ "host 1 of 2: 4 of 8 devices"."""
    devices = f"{jax.local_device_count()} of {jax.device_count()} devices"
    return f"host {jax.process_index()} of {jax.process_count()}: {devices}"


def on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def best_dtype() -> str:
    """bfloat16 where the hardware multiplies it fast (TPU, NVIDIA from Ampere on), else float32."""
    device = jax.devices()[0]
    if device.platform == "tpu":
        return "bfloat16"
    capability = float(getattr(device, "compute_capability", 0) or 0)
    return "bfloat16" if device.platform in ("gpu", "cuda") and capability >= 8.0 else "float32"


def best_attention(dtype: str) -> str:
    """cuDNN's fused kernels where they train: bfloat16 on NVIDIA from Ampere on. Else XLA's; on CPU head by head."""
    if on_cpu():
        return "by_heads"
    nvidia = "cuda" in jax.devices()[0].client.platform_version.lower()
    return "cudnn" if nvidia and dtype == best_dtype() == "bfloat16" else "xla"


def mapped(step: Callable[..., Any], *, donate: bool, devices: list[Any] | None = None) -> Any:
    """A per-device function of (replicated state, device's batch) as one pmapped program; devices: all by default."""
    return jax.pmap(step, axis_name=AXIS, donate_argnums=(0,) if donate else (), devices=devices)


# Devices that are described and not here: programs can be compiled for them.


# libtpu would ask the machine for TPUs and for its place among the workers of a pod, and let one process use it.
COMPILING_AHEAD = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}


def prepare_to_compile_ahead() -> None:
    """Before JAX starts, in a process that compiles for other devices than it has: it computes on the CPU."""
    os.environ |= COMPILING_AHEAD
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # it keeps programs of devices that are here


def described_devices(platform: str, name: str, **options: Any) -> list[Any]:
    """The devices of a machine that is not here, by the name and the options of the compiler of "tpu" or "cuda"."""
    return list(topologies.get_topology_desc(name, platform, **options).devices)


def compile_ahead(step: Callable[..., Any], devices: list[Any], *arguments: Tree, donate: bool = False) -> Any:
    """A per-device function compiled for described devices; arguments: shapes without the device axis."""
    count = len(devices)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype), arguments)
    # Without a card XLA can try no kernels out; see WITHOUT_TRITON.
    options = {WITHOUT_TRITON: False} if devices[0].platform == "gpu" else None
    return mapped(step, donate=donate, devices=devices).lower(*shapes).compile(compiler_options=options)


def call(program: Any, *arguments: Tree) -> Any:
    """Calls a mapped program; a host array among its arguments, which JAX would copy silently, is an error."""
    with jax.transfer_guard_host_to_device("disallow"):
        return program(*arguments)


def replicate(tree: Tree) -> Tree:
    """A copy of every array on each local device, with a leading device axis, sharded as pmap's own outputs are.

    On CPU too: a device there would read numpy's own memory, which no program can be given to write its results to.
    """
    devices = jax.local_devices()
    sharding = jax.sharding.NamedSharding(local_mesh(), jax.sharding.PartitionSpec(AXIS))

    def put(one: np.ndarray, device: Any) -> Any:
        there = jax.device_put(one, device)
        return jax.device_put(there, device, may_alias=False) if on_cpu() else there

    def copy(leaf: Any) -> Any:
        one = np.asarray(leaf)[None]
        shards = [put(one, device) for device in devices]
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


def split_rows(batch: dict[str, np.ndarray], gradient_accumulation_steps: int) -> dict[str, np.ndarray]:
    """This host's rows (r, ...) -> (local devices, micro-batches, rows of a micro-batch, ...)."""
    leading = (jax.local_device_count(), gradient_accumulation_steps, -1)
    return {name: value.reshape(*leading, *value.shape[1:]) for name, value in batch.items()}


def device_memory() -> int | None:
    """Bytes one device may use, None if it does not say; on CPU its share of the machine's memory."""
    if on_cpu():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit")


def peak_memory() -> int | None:
    """Bytes that arrays and programs took on the first device at most, as far as it says so: not on CPU."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


# Rows shared out over this host's devices, each running its own loop: what generation needs.


def local_mesh(devices: int | None = None) -> jax.sharding.Mesh:
    """All local devices, or the first so many."""
    return jax.sharding.Mesh(np.array(jax.local_devices()[:devices]), (AXIS,))


def on_every_device(tree: Tree, devices: int | None = None) -> Tree:
    """One copy of every array on each local device, or on the first so many."""
    return jax.device_put(tree, jax.sharding.NamedSharding(local_mesh(devices), jax.sharding.PartitionSpec()))


def rows_on_devices(tree: Tree, devices: int | None = None) -> Tree:
    """Arrays (rows, ...) shared out over the local devices, or the first so many, which must divide the rows."""
    return jax.device_put(tree, jax.sharding.NamedSharding(local_mesh(devices), jax.sharding.PartitionSpec(AXIS)))


def by_rows(
    function: Callable[..., Any],
    replicated: int,
    sharded: int,
    donate: tuple[int, ...] = (),
    devices: int | None = None,
) -> Callable[..., Any]:
    """One program a device for its own rows: first `replicated` arguments all devices have alike, then `sharded` ones.

    What it returns has rows too. Devices do not wait for each other inside. devices: of the local ones, the first so
    many; all by default.
    """
    every, rows = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec(AXIS)
    specs = (every,) * replicated + (rows,) * sharded
    mapped = jax.shard_map(function, mesh=local_mesh(devices), in_specs=specs, out_specs=rows, check_vma=False)
    return jax.jit(mapped, donate_argnums=donate)


def run_by_rows(
    function: Callable[..., jax.Array],
    alike: tuple[Tree, ...],
    rows: tuple[Any, ...],
    at_once: int,
    progress: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """function(*alike, *rows) of arrays (b, ...) -> (b, ...), numpy: in batches, shared out over the local devices.

    function: the same object for the same program, so that it is compiled once for a shape. at_once: rows a device
    takes at most; fewer are padded to a power of two, so that another number is seldom another program. progress(n): n
    rows more are done.
    """
    count = len(rows[0])
    devices = min(local_device_count(), count)
    each = min(at_once, 1 << (-(-count // devices) - 1).bit_length())
    everywhere = on_every_device(alike, devices)
    program = _by_rows(function, len(alike), len(rows), devices)
    done = []
    for first in range(0, count, each * devices):
        index = np.minimum(np.arange(first, first + each * devices), count - 1)
        made = program(*everywhere, *rows_on_devices(tuple(np.asarray(array)[index] for array in rows), devices))
        done.append(np.asarray(made)[: count - first])
        progress(len(done[-1]))
    return np.concatenate(done)


@functools.cache
def _by_rows(function: Callable[..., jax.Array], alike: int, rows: int, devices: int) -> Callable[..., Any]:
    return by_rows(function, alike, rows, devices=devices)
