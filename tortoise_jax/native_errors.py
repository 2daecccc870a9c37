"""Turns what C++ code writes to stderr when it aborts the process into one line and an exit code.

JAX's coordination service aborts a process when another host is lost or never came: a C++ stack, SIGABRT and a core
dump, no Python exception. (Its callback for Python cannot be called in jaxlib 0.10.2: "std::bad_cast".) So the
process's stderr goes through a pipe, on which messages about the hosts are kept back, and an abort after such a message
calls `explain`, which gives the line and the exit code. Everything else passes as it is, other aborts too.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

# "E1125 04:32:15.157932    6584 coordination_service.cc:1549] ..."
HEADER = re.compile(r"[IWEF]\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ ([\w.]+):\d+\] ")
ABOUT_HOSTS = (
    *("coordination_service.cc", "coordination_service_agent.cc", "coordination_service_rpc_handler.cc"),
    *("preemption_sync_manager.cc", "preemption_notifier.cc"),
)
FATAL = "JAX distributed service detected fatal errors"
END = b"\0"  # the line that is written last, to know that all before it was read
DRAIN_SECONDS = 5
Explain = Callable[[str], tuple[str, int]]


class NativeErrors:
    """From construction to `stop`; `explain` gets the messages kept back: (the line to print or "", exit code)."""

    def __init__(self, explain: Explain) -> None:
        self._explain = explain
        self._kept: list[str] = []
        self._fatal = False
        self._drained = threading.Event()
        sys.stderr.flush()
        self._stderr = os.dup(2)
        reading, writing = os.pipe()
        os.dup2(writing, 2)
        os.close(writing)
        self._python_stderr = sys.stderr
        with contextlib.suppress(OSError, ValueError):  # a stderr without a file, or another file, is left alone
            if sys.stderr.fileno() == 2:  # Python's own lines do not take the pipe
                sys.stderr = open(  # noqa: PTH123, SIM115
                    os.dup(self._stderr), "w", encoding=sys.stderr.encoding, errors=sys.stderr.errors, buffering=1
                )
        threading.Thread(target=self._read, args=(reading,), name="native stderr", daemon=True).start()
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborting)
        self._signal = ctypes.CDLL(None).signal  # not Python's: that one runs its handlers later, when all is over
        self._signal(signal.SIGABRT, self._handler)

    def _read(self, pipe: int) -> None:
        rest = b""
        while chunk := os.read(pipe, 1 << 16):
            *lines, rest = (rest + chunk).split(b"\n")
            with contextlib.suppress(OSError):  # nobody reads it any more
                os.write(self._stderr, b"".join(self._passed(lines)))
            if END in lines:
                self._drained.set()
        os.close(pipe)

    def _passed(self, lines: list[bytes]) -> list[bytes]:
        """The lines to show. A message is written in one piece: what comes later does not belong to it."""
        passed, keep = [], self._fatal
        for line in lines:
            if line == END:
                continue
            text = line.decode(errors="replace")
            if header := HEADER.match(text):
                self._fatal = self._fatal or FATAL in text
                keep = self._fatal or header[1] in ABOUT_HOSTS
            if keep:
                self._kept.append(text)
            else:
                passed.append(line + b"\n")
        return passed

    def _drain(self) -> None:
        """Waits until all that was written has been read."""
        self._drained.clear()
        os.write(2, END + b"\n")
        self._drained.wait(DRAIN_SECONDS)

    def _aborting(self, number: int) -> None:
        """In the thread that aborts; an abort for another reason goes on when this returns."""
        self._drain()
        if self._fatal:
            self.end(*self._explain("\n".join(self._kept)))

    def end(self, line: str, code: int) -> NoReturn:
        """Ends the process at once, without waiting for other hosts or threads."""
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        if line:
            with contextlib.suppress(OSError):
                os.write(self._stderr, f"error: {' '.join(line.split())}\n".encode())
        os._exit(code)

    def stop(self) -> None:
        """Puts everything back as it was."""
        self._drain()
        self._signal(signal.SIGABRT, None)  # the default
        os.dup2(self._stderr, 2)
        if sys.stderr is not self._python_stderr:
            sys.stderr.close()
            sys.stderr = self._python_stderr
