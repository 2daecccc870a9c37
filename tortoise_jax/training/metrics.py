"""What a person watches while training: one progress line, TensorBoard, and lines for what matters."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from tqdm import tqdm

from tortoise_jax.audio import SAMPLE_RATE

SMOOTHING = 0.9
SECONDS_PER_LINE = 60  # where the progress goes into a file


def summary_writer() -> Any:
    """tensorboardX's SummaryWriter, imported without torch: that would take seconds of each start, for nothing."""
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hide:
            del sys.modules["torch"]
    return SummaryWriter


class MetricWriter:
    """Writes for the main host; silent on the others."""

    def __init__(self, run: Path, first_step: int, steps: int, active: bool) -> None:
        self.active = active
        self.writer = summary_writer()(str(run / "tensorboard"), purge_step=first_step or None) if active else None
        self.bar = tqdm(
            total=steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            disable=None if active else True,  # None: where the output is no terminal, too
            desc="training",
        )
        self.started = False
        self.said = time.perf_counter()
        self.smoothed: float | None = None
        self.clock = time.perf_counter()

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.close()
        if self.writer:
            self.writer.close()

    def say(self, line: str) -> None:
        if self.active:
            tqdm.write(line)

    def step(
        self, step: int, metrics: Mapping[str, float], headline: str, clips: int, speech: float, log: bool
    ) -> None:
        """One finished step: moves the bar; with `log`, writes the metrics to TensorBoard.

        headline: the loss that the bar shows. clips and speech (seconds): what the step was trained on.
        """
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        loss = metrics[f"loss/{headline}"]
        self.smoothed = loss if self.smoothed is None else SMOOTHING * self.smoothed + (1 - SMOOTHING) * loss
        line = f"{headline} loss {loss:.3f} (trend {self.smoothed:.3f}), {clips / seconds:.1f} clips/s"
        self.bar.set_postfix_str(line, refresh=False)
        if self.started:
            self.bar.update(1)
        else:  # the first step compiled: the time that is left is reckoned from here
            self.started = True
            self.bar.reset()
            self.bar.initial = self.bar.n = step
        if self.bar.disable and now - self.said >= SECONDS_PER_LINE:
            self.said = now
            self.say(f"step {step} of {self.bar.total}: {line}")
        if log and self.writer:
            rates = {"rate/clips_per_second": clips / seconds, "rate/speech_per_second": speech / seconds}
            self.scalars(step, dict(metrics) | rates)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if self.writer:
            for name, value in values.items():
                if math.isfinite(value):  # TensorBoard warns of others, in many lines
                    self.writer.add_scalar(name, value, step)

    def audio(self, step: int, name: str, waveform: np.ndarray, rate: int = SAMPLE_RATE) -> None:
        if self.writer and len(waveform):
            self.writer.add_audio(name, waveform[:, None], step, sample_rate=rate)
