"""Devices and hosts: who is who, what is summed, copied and compared. test_train_hosts.py runs train.py on several."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.host_processes import free_port
from tests.support.programs import compiled_meanwhile
from tortoise_jax import parallel
from tortoise_jax.errors import UserError

ROOT = Path(__file__).parent.parent
SECONDS = 300
MEMORY = "--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"


def start_host(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.support.one_host", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def results(*hosts: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """What the hosts printed; all are ended if one fails."""
    try:
        outputs = [host.communicate(timeout=SECONDS) for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    for host, (_, errors) in zip(hosts, outputs, strict=True):
        assert host.returncode == 0, errors
    return [json.loads(printed.splitlines()[-1]) for printed, _ in outputs]


@pytest.fixture(scope="module")
def seen() -> list[dict[str, Any]]:
    """[one process of four devices, two hosts of two devices]"""
    coordinator = f"localhost:{free_port()}"
    hosts = [start_host(2, coordinator, 2, i) for i in range(2)]
    return [*results(start_host(4)), *results(*hosts)]


def test_hosts_know_where_they_are(seen: list[dict[str, Any]]) -> None:
    names = ("processes", "devices", "local", "main")
    assert [[host[name] for name in names] for host in seen] == [
        [1, 4, 4, True],
        [2, 4, 2, True],
        [2, 4, 2, False],
    ]
    assert [host["describe"] for host in seen] == ["4 x cpu", "4 x cpu on 2 hosts", "4 x cpu on 2 hosts"]


def test_a_flag_of_one_host_reaches_all(seen: list[dict[str, Any]]) -> None:
    assert [host["any"] for host in seen] == [[False, False], [True, False], [True, False]]


def test_hosts_started_differently_are_refused(seen: list[dict[str, Any]]) -> None:
    assert [host["alike"] for host in seen] == ["", "", ""]
    assert seen[0]["unlike"] == ""
    for host in seen[1:]:
        assert "the configuration differs between hosts: [1] do not have what host 0 has" in host["unlike"]
        assert "the first difference is optimizer.rate: 0 on host 0, 1 on host 1" in host["unlike"]


def test_hosts_with_other_versions_are_refused(seen: list[dict[str, Any]]) -> None:
    assert [host["same code"] for host in seen] == ["", "", ""]
    assert seen[0]["other code"] == ""
    for host in seen[1:]:
        assert "the code differs between hosts: [1] do not have what host 0 has" in host["other code"]
        assert re.search(r"version of\.flax: \"[\d.]+\" on host 0, \"0\.1\" on host 1", host["other code"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("localhost:1", 0, -1), "must be given together"),
        (("", 2, -1), "must be given together"),
        (("", 0, 0), "must be given together"),
        (("localhost:1", 2, -1), "must be given together"),
        (("localhost:1", 2, 2), "--process_id 2 must be below --num_processes 2"),
    ],
)
def test_half_given_coordinates_are_refused(arguments: tuple[str, int, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parallel.initialize(*arguments)


def test_a_coordinator_that_cannot_be_is_one_line() -> None:
    """JAX is running in this process already, which is one of the reasons it gives."""
    jax.local_devices()
    with pytest.raises(UserError, match=r"--coordinator nowhere:1: could not join the other hosts: .+") as error:
        parallel.initialize("nowhere:1", 2, 1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("one", "other", "found"),
    [
        (1, 2, ("", "1", "2")),
        ({"a": 1, "b": 2}, {"a": 1, "b": 3}, ("b: ", "2", "3")),
        ({"a": {"b": [1, 2]}}, {"a": {"b": [1, 3]}}, ("a.b[1]: ", "2", "3")),
        ({"a": [1]}, {"a": [1, "x"]}, ("a[1]: ", "null", '"x"')),
        ({"a": None}, {}, ("a: ", "null", "null")),
        ({"a": {"b": 1}}, {"a": 2}, ("a: ", '{"b": 1}', "2")),
    ],
)
def test_the_first_difference_is_named(one: Any, other: Any, found: tuple[str, str, str]) -> None:
    assert parallel.first_difference(one, other) == found


@pytest.mark.parametrize(
    ("message", "kind", "lost"),
    [
        ("UNKNOWN: Gloo AllGather failed: Connection closed by peer [127.0.0.1]:43143", ValueError, True),
        ("Gloo all-reduce failed: Connection reset by peer", jax.errors.JaxRuntimeError, True),
        ("DEADLINE_EXCEEDED: Barrier timed out. Id: x", jax.errors.JaxRuntimeError, True),
        ("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes", jax.errors.JaxRuntimeError, False),
        ("shapes (1,) and (2,) do not fit", ValueError, False),
        ("Gloo", OSError, False),
    ],
)
def test_a_lost_host_is_told_from_other_errors(message: str, kind: type[Exception], lost: bool) -> None:
    broken = kind(message)
    assert parallel.by_lost_host(broken) is (broken if lost else None)
    wrapped = UserError("a checkpoint could not be written")
    wrapped.__context__ = broken
    assert parallel.by_lost_host(wrapped) is (broken if lost else None)


def test_replicated_trees_come_back_as_they_were() -> None:
    tree = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": {"step": np.int32(7)}}
    replicated = parallel.replicate(tree)
    assert replicated["a"].shape == (jax.local_device_count(), 2, 3)
    assert {shard.device for shard in replicated["a"].addressable_shards} == set(jax.local_devices())
    back = parallel.first_copy(replicated)
    assert back["b"]["step"] == 7
    assert back["b"]["step"].dtype == np.int32
    assert np.array_equal(back["a"], tree["a"])


def test_replicated_arrays_are_memory_that_results_can_be_written_to() -> None:
    """On CPU a device would read numpy's own, and a step that is given it would need as much again."""
    where = lambda array: [shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards]
    given = parallel.replicate(np.ones((64, 64), np.float32))
    before = where(given)
    assert len(set(before)) == jax.local_device_count()
    assert where(parallel.mapped(lambda x: x + 1, donate=True)(given)) == before


def test_mapped_sums_over_all_devices_and_donates_its_first_argument() -> None:
    devices = jax.local_device_count()
    assert devices == 8
    step = lambda state, batch: (state + 1, jax.lax.psum(jnp.sum(batch["x"]), parallel.AXIS))
    batch = parallel.split_rows({"x": np.arange(16.0, dtype=np.float32)}, 2)
    assert batch["x"].shape == (8, 2, 1)
    for donate in (True, False):
        state = parallel.replicate(np.float32(1))
        after, total = parallel.mapped(step, donate=donate)(state, batch)
        assert state.is_deleted() == donate
        assert parallel.first_copy(after) == 2
        assert parallel.first_copy(total) == np.arange(16).sum()


def test_a_mapped_program_is_not_called_with_arrays_that_would_be_copied_silently() -> None:
    program = parallel.mapped(lambda state, batch: state + batch["x"].sum(), donate=False)
    state, batch = parallel.replicate(np.float32(1)), {"x": np.ones((8, 2), np.float32)}
    assert parallel.first_copy(parallel.call(program, state, parallel.rows_on_devices(batch))) == 3
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        parallel.call(program, state, batch)


def test_split_rows_keeps_their_order() -> None:
    rows = np.arange(48).reshape(24, 2)
    split = parallel.split_rows({"x": rows}, 3)["x"]
    assert split.shape == (8, 3, 1, 2)
    assert np.array_equal(split.reshape(24, 2), rows)


def test_hosts_share_rows_without_gap_or_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    taken = []
    for index in range(4):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        taken += list(range(16))[parallel.host_rows(16)]
    assert taken == list(range(16))


def test_one_process_waits_for_nobody() -> None:
    parallel.wait_for_all("nothing")
    parallel.shutdown()
    parallel.check_same_everywhere("the configuration", {"a": object()})
    assert parallel.any_host(True) is True
    assert parallel.any_host(False) is False
    assert parallel.stop_requested(1, True)
    assert not parallel.stop_requested(1, False)
    assert parallel.signals_for_python() == (signal.SIGINT, signal.SIGTERM)


def test_errors_of_one_process_are_its_own() -> None:
    with pytest.raises(ZeroDivisionError), parallel.ending_together():
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("platform", "version", "capability", "dtype", "attention"),
    [
        ("cpu", "cpu", None, "float32", "by_heads"),
        ("tpu", "libtpu", None, "bfloat16", "xla"),
        ("gpu", "PJRT C API\ncuda 12090", "8.6", "bfloat16", "cudnn"),
        ("gpu", "PJRT C API\ncuda 12090", "8.6", "float32", "xla"),
        ("gpu", "PJRT C API\ncuda 12090", "7.5", "bfloat16", "xla"),
        ("gpu", "rocm 60300", "9.4", "bfloat16", "xla"),
    ],
)
def test_attention_by_platform(
    platform: str, version: str, capability: str, dtype: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = SimpleNamespace(platform_version=version)
    device = SimpleNamespace(platform=platform, compute_capability=capability, client=client)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert parallel.best_attention(dtype) == attention


@pytest.mark.parametrize(
    ("given", "deterministic", "flags"),
    [
        ("", True, f"{MEMORY} --xla_gpu_deterministic_ops=true --xla_gpu_enable_triton_gemm=false"),
        (
            "--xla_gpu_deterministic_ops=true --other=1",
            True,
            f"--xla_gpu_deterministic_ops=true --other=1 {MEMORY} --xla_gpu_enable_triton_gemm=false",
        ),
        (
            "--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_DEFAULT",
            False,
            "--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_DEFAULT",
        ),
        ("--other=1", False, f"--other=1 {MEMORY}"),
    ],
)
def test_what_cannot_be_tried_out_is_not_left_to_triton(
    given: str, deterministic: bool, flags: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reruns of the same bits mean that XLA tries no kernels out, and Triton's default tiles do not fit 517 frames."""
    jnp.ones(())  # this process has computed
    monkeypatch.setenv("XLA_FLAGS", given)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    late = parallel.prepare_process(deterministic)
    assert os.environ["XLA_FLAGS"] == flags
    assert late == [flag for flag in flags.split() if "cpu" in flag and flag not in given]
    with monkeypatch.context() as patched:
        patched.setattr(parallel.xla_bridge, "backends_are_initialized", lambda: False)
        patched.setenv("XLA_FLAGS", given)
        assert parallel.prepare_process(deterministic) == []


@pytest.mark.parametrize(("rows", "shapes"), [(1, [1]), (3, [3]), (9, [16]), (16, [16]), (40, [32, 32])])
def test_rows_are_run_in_batches_of_few_sizes(rows: int, shapes: list[int]) -> None:
    """Eight devices at most, four rows each: fewer rows take fewer devices, then powers of two of each."""
    given, seen, done = np.arange(2 * rows, dtype=np.float32).reshape(rows, 2), [], []
    program = lambda alike, one, other: jnp.stack([one.sum(axis=1), other], axis=1) * alike["by"]
    on_devices = parallel.rows_on_devices
    with pytest.MonkeyPatch.context() as patched:
        place = lambda tree, devices: (seen.append(len(tree[0])), on_devices(tree, devices))[1]
        patched.setattr(parallel, "rows_on_devices", place)
        alike = ({"by": np.float32(2)},)
        made = parallel.run_by_rows(program, alike, (given, given[:, 0]), at_once=4, progress=done.append)
    np.testing.assert_array_equal(made, 2 * np.stack([given.sum(axis=1), given[:, 0]], axis=1))
    assert seen == shapes
    assert sum(done) == rows


def test_what_compiling_took_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    given_back: list[int] = []
    monkeypatch.setattr(parallel.ctypes, "CDLL", lambda name: SimpleNamespace(malloc_trim=given_back.append))
    monkeypatch.setattr(parallel.sys, "platform", "linux")
    listeners: list[Any] = []
    monkeypatch.setattr(parallel.monitoring, "register_event_duration_secs_listener", listeners.append)
    parallel.give_back_after_compiling.__wrapped__()
    (listen,) = listeners
    listen(parallel.COMPILED, 0.9)
    listen("another", 2.0)
    assert given_back == []
    listen(parallel.COMPILED, 2.0, fun_name="step")
    assert given_back == [0]


def test_jax_tells_when_it_has_compiled() -> None:
    with compiled_meanwhile() as compiled:
        jax.jit(lambda x: x * 3.25)(jnp.ones(7))
    assert "jit(<lambda>)" in compiled
