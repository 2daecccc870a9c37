"""SIGINT and SIGTERM as a wish to stop after the step that is running; a second one ends at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from tortoise_jax import parallel


@contextlib.contextmanager
def on_signals() -> Iterator[Callable[[], bool]]:
    """Handlers while a run goes on, after `parallel.initialize`; gives a function that says whether a signal has come.

    In another thread than the main one, where Python takes no handlers, none ever comes.
    """
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if came:
            os._exit(128 + number)
        came.append(number)
        print("\nstopping after this step; once more ends at once", file=sys.stderr)

    in_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, note) for number in (parallel.signals_for_python() if in_main else ())}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
