"""SIGINT and SIGTERM as a wish to stop after the step that is running; a second one ends at once."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

from tortoise_jax import parallel


def on_signals() -> Callable[[], bool]:
    """Installs the handlers, after `parallel.initialize`; returns a function that says whether a signal has come."""
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if came:
            os._exit(128 + number)
        came.append(number)
        print("\nstopping after this step; once more ends at once", file=sys.stderr)

    for number in parallel.signals_for_python():
        signal.signal(number, note)
    return lambda: bool(came)
