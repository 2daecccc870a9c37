"""The only module that names devices, hosts and pmap. Everything is data parallel: each device has a copy of the state.

Works unchanged from one CPU to a TPU pod: each host feeds its own devices its own rows, `psum` over AXIS joins them.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import gc
import hashlib
import importlib.metadata
import itertools
import json
import os
import re
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax import monitoring
from jax._src import distributed as jax_distributed  # its client: messages between hosts without a computation
from jax._src import xla_bridge  # whether it has started
from jax._src.clusters import GceTpuCluster
from jax.experimental import multihost_utils, topologies

from tortoise_jax.errors import UserError, first_line, report
from tortoise_jax.files import locked
from tortoise_jax.launchers import ALONE, BY_HAND, TPU_WORKERS, Announced, alone_on_its_machine, announced, whole
from tortoise_jax.native_errors import NativeErrors

AXIS = "data"
COMPILED, COMPILED_LONG = "/jax/core/compile/backend_compile_duration", 1.0  # JAX's event, and seconds
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")  # what hosts must have alike
OBJECTS = 50_000  # made between two looks for garbage: looking takes a twentieth of the time to trace programs
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


def prepare_process(deterministic: bool = True) -> list[str]:
    """Before JAX starts: keep compiled programs for the next run, use little memory on CPU, and, on NVIDIA, compute the
    same bits every time. Returns this platform's flags that come too late, where JAX has started already."""
    given, wanted = os.environ.get("XLA_FLAGS", ""), LITTLE_MEMORY + (DETERMINISTIC if deterministic else ())
    missing = [flag for flag in wanted if flag.partition("=")[0] not in given]
    os.environ["XLA_FLAGS"] = " ".join([*given.split(), *missing])
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "tortoise_jax" / "compiled"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # many small programs take long together
    give_back_after_compiling()
    if 0 < gc.get_threshold()[0] < OBJECTS:
        gc.set_threshold(OBJECTS)
    if not xla_bridge.backends_are_initialized():
        return []
    return [flag for flag in missing if flag.startswith(f"--xla_{jax.default_backend()}_")]


@functools.cache
def give_back_after_compiling() -> None:
    """From now on gives the memory that compiling leaves with glibc, over a gigabyte at the released size, back."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if trim and event == COMPILED and duration_secs > COMPILED_LONG:
            trim(0)

    monitoring.register_event_duration_secs_listener(listen)


def initialize(coordinator: str = "", num_processes: int = 0, process_id: int = -1) -> None:
    """Joins the hosts of a run, before any other use of JAX; ends within JOIN_SECONDS, one way or the other.

    With a coordinator ("host:port") all three are needed. Without, the environment says whether this process is one of
    several (a TPU pod, SLURM, Open MPI, Kubernetes): then it joins them or is refused. `num_processes` 1, given alone,
    means a process alone whatever the environment says.
    """
    given = [bool(coordinator), num_processes > 0, process_id >= 0]
    if given == [False, True, False] and num_processes == 1:
        return
    if any(given):
        if not all(given):
            raise UserError(
                "--coordinator HOST:PORT, --num_processes N and --process_id I must be given together "
                "(or --num_processes 1 alone)"
            )
        if process_id >= num_processes:
            raise UserError(f"--process_id {process_id} must be below --num_processes {num_processes}")
        join(f"--coordinator {coordinator}", coordinator, num_processes, process_id)
    elif found := announced(os.environ) or tpu_machine():
        try:
            join(found.by)
        except UserError as error:
            raise UserError(f"{error}; {found.remedy}; {ALONE}") from None
        joined = jax_distributed.global_state.num_processes
        if found.count not in (0, joined):
            shutdown()
            raise UserError(
                f"{found.by}: {found.count} processes are announced, but JAX joined {joined}; {found.remedy}; {ALONE}"
            )


def tpu_machine() -> Announced | None:
    """What a Cloud TPU machine's metadata server says of the other workers; the environment may say nothing there."""
    if any(name in os.environ for name in TPU_WORKERS):
        return None
    try:
        count = GceTpuCluster.get_process_count() if GceTpuCluster.is_env_present() else 1
    except Exception as error:  # of an HTTP client, or of reading the answer
        raise UserError(
            f"the TPU machine's metadata server does not say how many workers there are ({first_line(error)}); "
            f"{BY_HAND}; {ALONE}"
        ) from None
    return Announced(f"the TPU machine's metadata ({count} workers)", count, BY_HAND) if count > 1 else None


# The start, the end and the faults of several hosts. JAX's coordination service aborts the process where a host never
# comes or is lost; `native_errors` makes that one line. Nothing here waits without a limit.

JOIN_SECONDS = 300  # for all hosts to come
LOST_SECONDS = 100  # without a sign of life, before a host counts as lost
WAIT_SECONDS = 3600  # at one point of the program, for the slowest host
END_SECONDS = 60  # from the last point to the end of all processes
ERROR_SECONDS = 5  # for the other hosts to fail too, before a failed one leaves
LOST_HOST = 3  # exit code: another host was lost or ended


def seconds(name: str, default: int) -> int:
    """A limit, which the environment may change: TORTOISE_JAX_JOIN_SECONDS and TORTOISE_JAX_LOST_SECONDS."""
    return whole(os.environ, f"TORTOISE_JAX_{name}") or default


@dataclasses.dataclass
class Hosts:
    """What this process knows of the run of several hosts that it is part of."""

    native: NativeErrors
    phase: str = "joining"  # then "running", "ending"; "leaving" with `code`
    code: int = 0
    told: bool = False  # that this host was asked to stop
    points: Iterator[int] = dataclasses.field(default_factory=itertools.count)


_hosts: Hosts | None = None


def join(by: str, coordinator: str | None = None, count: int | None = None, index: int | None = None) -> None:
    """jax.distributed.initialize, with every failure as a UserError, or as one line and exit code 2."""
    global _hosts
    limit = seconds("JOIN_SECONDS", JOIN_SECONDS)
    _hosts = hosts = Hosts(NativeErrors(explain))
    state = jax_distributed.global_state
    nobody = (
        f"{by}: not all hosts came together within {limit} s; start the same command on all hosts, with the same "
        "number of processes, each with its own index, and let all of them reach the coordinator's address"
    )
    try:
        with within(limit, nobody, 2):
            jax.distributed.initialize(
                coordinator,
                count,
                index,
                initialization_timeout=limit + END_SECONDS,  # ours comes first
                heartbeat_timeout_seconds=seconds("LOST_SECONDS", LOST_SECONDS),
                shutdown_timeout_seconds=END_SECONDS,
            )
            if alone_on_its_machine(os.environ):  # JAX expects a process per card there, and gives each the one
                jax.config.update("jax_cuda_visible_devices", "all")
                jax.config.update("jax_rocm_visible_devices", "all")
            counts = exchange(str(state.num_processes))
    except Exception as error:  # whatever a launcher's detection raises
        hosts.native.stop()
        _hosts = None
        raise UserError(f"{by}: could not join the other hosts: {first_line(error)}") from None
    hosts.phase = "running"
    if len(set(counts)) > 1:
        shutdown()
        raise UserError(f"{by}: the hosts were started with different numbers of processes: {', '.join(counts)}")


def explain(messages: str) -> tuple[str, int]:
    """The line and the exit code for an abort by JAX's coordination service, from what it wrote to stderr."""
    assert _hosts is not None
    if _hosts.phase == "leaving":  # the line was printed
        return "", _hosts.code
    if _hosts.phase == "joining":
        status = re.search(r"absl::Status: (.*)", messages)
        return f"could not join the other hosts: {status[1] if status else messages}", 2
    silent = re.search(r"stopped sending heartbeats\):\n((?:\d+\n)+)", messages)
    if silent:
        return lost(f"host {', '.join(silent[1].split())} was lost"), LOST_HOST
    return lost("host 0 was lost or ended" if jax_distributed.global_state.process_id else "a host was lost"), LOST_HOST


def lost(what: str) -> str:
    return f"{what}; run the same command again on all hosts: training goes on from the last checkpoint"


@contextlib.contextmanager
def within(limit: float, line: str, code: int) -> Iterator[None]:
    """Ends the process with a line if the body takes longer."""
    assert _hosts is not None
    timer = threading.Timer(limit, _hosts.native.end, (line, code))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Around everything after `initialize`: whatever ends one host ends all, with a line and never by waiting for ever.

    An error here ends the process at once, for JAX's own end would wait for hosts that wait for this one.
    """
    try:
        yield
        wait_for_all("the end")
        shutdown()
    except BaseException as error:
        if _hosts is None:
            raise
        leave(error)


def end_for_all(error: UserError) -> None:
    """Ends this process with the error's line, from whichever thread, where other hosts would wait for it."""
    if _hosts is not None:
        leave(error)


def leave(error: BaseException) -> NoReturn:
    assert _hosts is not None
    if broken := by_lost_host(error):
        line = lost(f"another host was lost or ended ({first_line(broken)}); its own output says more")
        time.sleep(ERROR_SECONDS if jax_distributed.global_state.process_id == 0 else 0)  # others fail by this too
        _hosts.native.end(line, LOST_HOST)
    _hosts.phase, _hosts.code = "leaving", report(error)
    with contextlib.suppress(Exception):  # an error of all hosts: each prints its own line before the first one leaves
        client().wait_at_barrier("tortoise_jax/failed", ERROR_SECONDS * 1000)
    _hosts.native.end("", _hosts.code)


def by_lost_host(error: BaseException | None) -> BaseException | None:
    """The error, or a cause of it, that shows that another host is gone: a computation or a wait broke off."""
    signs = ("Gloo", "NCCL", "closed by peer", "reset by peer", "coordination service", "heartbeat", "Barrier")
    while error is not None:
        # JAX raises either type; a save, for one, makes its own error of it.
        if isinstance(error, jax.errors.JaxRuntimeError | ValueError) and any(sign in str(error) for sign in signs):
            return error
        error = error.__cause__ or error.__context__
    return None


def shutdown() -> None:
    """The ordered end: all hosts come here, all leave JAX's coordination service, host 0 ends it last.

    Without it hosts meet only while Python exits, after the first of them closed the connections that another one's
    last computation may still use.
    """
    global _hosts
    if _hosts is None:
        return
    _hosts.phase = "ending"
    with within(END_SECONDS, lost(f"a host did not come to the end within {END_SECONDS} s"), LOST_HOST):
        client().wait_at_barrier("tortoise_jax/end", 2 * END_SECONDS * 1000)  # the limit above comes first
        jax.distributed.shutdown()
    _hosts.native.stop()
    _hosts = None


def exchange(text: str) -> list[str]:
    """Every host's text, in their order; every host must come to the same point, within WAIT_SECONDS."""
    assert _hosts is not None
    key = f"tortoise_jax/{next(_hosts.points)}"
    client().key_value_set(f"{key}/{jax_distributed.global_state.process_id:06d}", text)
    client().wait_at_barrier(key, WAIT_SECONDS * 1000)
    return [text for _, text in sorted(client().key_value_dir_get(f"{key}/"))]


def client() -> Any:
    """JAX's own, for messages between hosts."""
    return jax_distributed.global_state.client


def stop_requested(step: int, here: bool = False) -> bool:
    """Whether to stop after this step, the same one on all hosts; every host asks after every step.

    `here`: whether this process was asked to stop, as far as Python knows. With several hosts SIGTERM is JAX's, which
    tells the others; asking costs microseconds, since nothing is sent before that.
    """
    if _hosts is None:
        return here
    if here and not _hosts.told:
        _hosts.told = True
        signal.raise_signal(signal.SIGTERM)
    return multihost_utils.reached_preemption_sync_point(step)


def signals_for_python() -> tuple[signal.Signals, ...]:
    """Those that mean "stop" and that JAX does not take itself: a handler for SIGTERM would take it from JAX."""
    return (signal.SIGINT,) if _hosts else (signal.SIGINT, signal.SIGTERM)


def end_at_sigterm() -> None:
    """For programs that never ask `stop_requested`: JAX takes SIGTERM when hosts join, and it would end nothing."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


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


def check_same_everywhere(what: str, value: Any) -> None:
    """Raises where hosts of a run were started with different settings, and names the first difference."""
    if _hosts is None:
        return
    mine = json.dumps(value, sort_keys=True, default=str)
    digests = exchange(hashlib.sha256(mine.encode()).hexdigest())
    different = [i for i, other in enumerate(digests) if other != digests[0]]
    if not different:
        return
    values = [json.loads(text) for text in exchange(mine)]
    name, here, there = first_difference(values[0], values[different[0]])
    raise UserError(
        f"{what} differs between hosts: {different} do not have what host 0 has; the first difference is {name}"
        f"{here} on host 0, {there} on host {different[0]}; start all alike"
    )


def check_same_code() -> None:
    """Raises where hosts run different code: this package's files, or versions of what it computes and saves with."""
    if _hosts is None:
        return
    package = Path(__file__).parent
    sources = {str(path.relative_to(package)): path.read_bytes() for path in sorted(package.rglob("*.py"))}
    digests = {name: hashlib.sha256(content).hexdigest()[:16] for name, content in sources.items()}
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    check_same_everywhere("the code", {"tortoise_jax": digests, "version of": versions})


def check_shared(folder: Path) -> None:
    """Raises where the hosts do not see one and the same folder under this name; it must exist on the main one."""
    if _hosts is None:
        return
    mark = folder / f".seen-by-all-{exchange(uuid.uuid4().hex)[0]}"
    if is_main():
        mark.touch()
    wait_for_all(f"marking {folder.name}")
    without = [host for host, seen in enumerate(exchange(str(mark.exists()))) if seen == "False"]
    if is_main():
        mark.unlink()
    if without:
        raise UserError(f"{folder} must be on storage that all hosts share; hosts {without} do not see host 0's folder")


def first_difference(one: Any, other: Any, name: str = "") -> tuple[str, str, str]:
    """("path.to.field: ", one's value, the other's) for the first field in which two JSON values differ."""
    if isinstance(one, list) and isinstance(other, list):
        one, other = dict(enumerate(one)), dict(enumerate(other))
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted(one.keys() | other.keys()):
            if key not in one or key not in other or one[key] != other[key]:
                inner = f"{name}[{key}]" if isinstance(key, int) else f"{name}.{key}".lstrip(".")
                return first_difference(one.get(key), other.get(key), inner)
    return f"{name}: " if name else "", json.dumps(one), json.dumps(other)


def wait_for_all(name: str) -> None:
    """Returns when every host has come here."""
    if _hosts is None:
        return
    names = exchange(name)
    if len(set(names)) > 1:
        raise RuntimeError(f"hosts wait for each other at different points: {', '.join(names)}")


def on_main(work: Callable[[], Any]) -> None:
    """Does something on the main host; a UserError of it is raised on all, which must come to the same point."""
    failed = ""
    if is_main():
        try:
            work()
        except UserError as error:
            failed = str(error)
    if _hosts is not None:
        failed = json.loads(exchange(json.dumps(failed))[0])
    if failed:
        raise UserError(failed)


@contextlib.contextmanager
def alone_in(folder: Path, flag: str) -> Iterator[None]:
    """`files.locked` for all hosts together: the main one holds the lock."""
    with contextlib.ExitStack() as held:
        on_main(lambda: held.enter_context(locked(folder, flag)))
        check_shared(folder)
        yield


def any_host(flag: bool) -> bool:
    """Whether the flag is set on any host; every host must ask at the same point."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


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
    devices = min(local_device_count(), len(rows[0]))
    everywhere = on_every_device(alike, devices)
    program = functools.partial(_by_rows(function, len(alike), len(rows), devices), *everywhere)
    return run_in_batches(program, rows, at_once, progress, devices)


def run_in_batches(
    program: Callable[..., jax.Array],
    rows: tuple[Any, ...],
    at_once: int,
    progress: Callable[[int], None] = lambda done: None,
    devices: int | None = None,
) -> np.ndarray:
    """The same by a program that takes rows shared out over the local devices, all of them or the first so many."""
    count, devices = len(rows[0]), devices or local_device_count()
    each = min(at_once, 1 << (-(-count // devices) - 1).bit_length())
    done = []
    for first in range(0, count, each * devices):
        index = np.minimum(np.arange(first, first + each * devices), count - 1)
        made = program(*rows_on_devices(tuple(np.asarray(array)[index] for array in rows), devices))
        done.append(np.asarray(made)[: count - first])
        progress(len(done[-1]))
    return np.concatenate(done)


@functools.cache
def _by_rows(function: Callable[..., jax.Array], alike: int, rows: int, devices: int) -> Callable[..., Any]:
    return by_rows(function, alike, rows, devices=devices)
