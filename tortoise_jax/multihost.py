"""Several hosts of one run: how they come together, agree, wait for each other, stop and end together.

JAX's coordination service aborts the process where a host never comes or is lost; `native_errors` makes that one line.
Nothing here waits without a limit. A process alone passes through all of it unhindered.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import os
import re
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed as jax_distributed  # its client: messages between hosts without a computation
from jax._src.clusters import GceTpuCluster
from jax.experimental import multihost_utils

from tortoise_jax.errors import UserError, first_line, report
from tortoise_jax.files import locked
from tortoise_jax.launchers import ALONE, BY_HAND, TPU_WORKERS, Announced, alone_on_its_machine, announced, whole
from tortoise_jax.native_errors import NativeErrors
from tortoise_jax.parallel import is_main

JOIN_SECONDS = 300  # for all hosts to come
LOST_SECONDS = 100  # without a sign of life, before a host counts as lost
WAIT_SECONDS = 3600  # at one point of the program, for the slowest host
END_SECONDS = 60  # from the last point to the end of all processes
ERROR_SECONDS = 5  # for the other hosts to fail too, before a failed one leaves
LOST_HOST = 3  # exit code: another host was lost or ended
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")  # what hosts must have alike


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
