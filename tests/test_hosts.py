"""The start, the end and the faults of several hosts, in real processes: always one line and an exit code, in time."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.support.host_processes import LOST_SECONDS, Host, free_port, hosts

AGAIN = "run the same command again on all hosts: training goes on from the last checkpoint"


def test_hosts_start_and_end() -> None:
    with hosts("nothing") as both:
        assert [host.end() for host in both] == [0, 0]
        assert [host.lines for host in both] == [["joined 2", "ended"]] * 2


@pytest.mark.slow
def test_hosts_start_and_end_fifty_times_under_load() -> None:
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        for _ in range(50):
            with hosts("total") as both:
                assert [host.end() for host in both] == [0, 0]
                assert [host.lines for host in both] == [["joined 2", "ended"]] * 2
    finally:
        for process in busy:
            process.kill()
            process.wait()


@pytest.mark.parametrize("index", [0, 1])
def test_a_host_alone_ends_in_time(index: int) -> None:
    coordinator = f"localhost:{free_port()}"
    host = Host("nothing", coordinator, 2, index, TORTOISE_JAX_JOIN_SECONDS="2")
    assert host.end() == 2
    [line] = host.lines
    assert line.startswith(
        f"error: --coordinator {coordinator}: not all hosts came together within 2 s; start the same"
    )


def test_hosts_that_were_told_different_numbers_end_in_time() -> None:
    """The second believes in three hosts, the first in two: all that were told two have come."""
    coordinator = f"localhost:{free_port()}"
    both = [Host("nothing", coordinator, count, i) for i, count in enumerate((2, 3))]
    assert [host.end() for host in both] == [2, 2]
    line = f"error: --coordinator {coordinator}: the hosts were started with different numbers of processes: 2, 3"
    assert [host.lines for host in both] == [[line], [line]]


def test_an_index_beyond_the_number_of_hosts_ends_in_time() -> None:
    """The first runs alone, as told; the second is no part of its run."""
    coordinator = f"localhost:{free_port()}"
    first = Host("idle", coordinator, 1, 0)
    first.wait_for("joined 1")
    second = Host("nothing", coordinator, 2, 1)
    try:
        assert second.end() == 2
        [line] = second.lines
        assert line.startswith("error: could not join the other hosts: INVALID_ARGUMENT")
    finally:
        first.process.kill()
        first.end()


@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize("way", ["steps", "idle"])
def test_the_loss_of_a_host_ends_the_others(way: str, killed: int) -> None:
    with hosts(way) as both:
        for host in both:
            host.wait_for("stepping" if way == "steps" else "joined 2")
        other = both[1 - killed]
        both[killed].process.send_signal(signal.SIGKILL)
        lost = time.monotonic()
        assert other.end() == 3
        assert time.monotonic() - lost < 3 * LOST_SECONDS
        line = other.lines[-1]
        assert line.startswith("error: ")
        assert line.endswith(AGAIN)
        assert ("another host was lost or ended (" if way == "steps" else f"host {killed} was lost") in line
        assert len(other.lines) == (3 if way == "steps" else 2)


def test_the_error_of_a_host_ends_the_others() -> None:
    with hosts("fail") as both:
        assert [host.end() for host in both] == [3, 2]
        assert both[1].lines[-1] == "error: the disk is full"
        assert both[0].lines[-1].endswith(AGAIN)


def test_an_error_of_all_hosts_is_every_hosts_own() -> None:
    with hosts("fail_alike") as both:
        assert [host.end() for host in both] == [2, 2]
        assert [host.lines for host in both] == [["joined 2", "error: no such data set"]] * 2


def test_other_aborts_and_other_lines_pass_as_they_are() -> None:
    with hosts("abort", count=1) as [host]:
        assert host.end() == -signal.SIGABRT
        assert "a native line" in host.lines


@pytest.mark.parametrize(
    ("number", "asked"),
    [(signal.SIGTERM, 0), pytest.param(signal.SIGTERM, 1, marks=pytest.mark.slow), (signal.SIGINT, 1)],
)
def test_hosts_stop_after_the_same_step_when_one_is_asked(number: signal.Signals, asked: int) -> None:
    with hosts("stop") as both:
        for host in both:
            host.wait_for("stepping")
        both[asked].process.send_signal(number)
        assert [host.end() for host in both] == [0, 0]
        stopped = [[line for line in host.lines if line.startswith("stopped after")] for host in both]
        assert stopped[0] == stopped[1]
        assert re.fullmatch(r"stopped after step \d+", *stopped[0])


def test_a_process_alone_stops_when_asked() -> None:
    host = Host("stop")
    host.wait_for("stepping")
    host.process.send_signal(signal.SIGTERM)
    assert host.end() == 0
    assert host.lines[-1] == "ended"
