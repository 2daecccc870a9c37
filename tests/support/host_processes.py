"""Processes of tests/support/hosts.py: the hosts of a tiny run, with what they print and a limit to their lives."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT = 120  # for anything here to end, on a busy machine
JOIN_SECONDS, LOST_SECONDS = 90, 10


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


class Host:
    """A process of tests/support/hosts.py; what it writes, to either stream, arrives in `lines`."""

    def __init__(self, way: str, *coordinates: object, **environment: str) -> None:
        limits = {
            "TORTOISE_JAX_JOIN_SECONDS": str(JOIN_SECONDS),
            "TORTOISE_JAX_LOST_SECONDS": str(LOST_SECONDS),
            "PYTHONUNBUFFERED": "1",
        }
        # Without the compilers that `make test-slow` adds, which write lines of their own.
        own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.hosts", way, *map(str, coordinates)],
            cwd=ROOT,
            env=own | limits | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.limit = threading.Timer(LIMIT, self.process.kill)  # wait_for's reading has no limit of its own
        self.limit.start()

    def wait_for(self, line: str) -> None:
        assert self.process.stdout is not None
        for printed in self.process.stdout:
            self.lines.append(printed.rstrip("\n"))
            if self.lines[-1] == line:
                return
        raise AssertionError(self.lines)

    def end(self) -> int:
        """The exit code; everything printed is in `lines`, apart from what the transport says of its connections."""
        rest, _ = self.process.communicate(timeout=LIMIT)
        self.limit.cancel()
        self.lines = [line for line in [*self.lines, *rest.splitlines()] if not line.startswith("[Gloo]")]
        return self.process.returncode


@contextlib.contextmanager
def hosts(way: str, count: int = 2, **environment: str) -> Iterator[list[Host]]:
    coordinator = f"localhost:{free_port()}"
    started = [Host(way, coordinator, count, i, **environment) for i in range(count)]
    try:
        yield started
    finally:
        for host in started:
            host.process.kill()
            host.end()
