"""What a person watches while training: one progress line, TensorBoard, and lines for what matters."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from tqdm import tqdm

from tortoise_jax.audio import SAMPLE_RATE
from tortoise_jax.errors import UserError, first_line
from tortoise_jax.files import write_atomically

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


WANDB_ID = "wandb.txt"  # of a run's directory: by it a run that goes on is the same one at Weights & Biases


def check_wandb(project: str) -> None:
    """Raises UserError where a project is named and wandb is not installed."""
    if project and importlib.util.find_spec("wandb") is None:
        raise UserError("config.wandb needs wandb: pip install 'tortoise_jax[wandb]'")


class MetricWriter:
    """Writes for the main host; silent on the others.

    wandb: a project of Weights & Biases to write to as well, "" for none; settings: what it shows of the run.
    """

    def __init__(
        self,
        run: Path,
        first_step: int,
        steps: int,
        active: bool,
        wandb: str = "",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.active = active
        self.wandb = begin_wandb(run, wandb, dict(settings or {})) if active and wandb else None
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
        if self.wandb:
            self.wandb.finish(exit_code=0 if error is None else 1)

    def say(self, line: str) -> None:
        if self.active:
            tqdm.write(line)

    @contextlib.contextmanager
    def between_steps(self) -> Iterator[None]:
        """What is done within, such as an evaluation, is no part of the next step's time."""
        began = time.perf_counter()
        yield
        self.clock += time.perf_counter() - began

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
        else:  # the first step compiled: the remaining time is estimated from here
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
        if self.wandb:
            self.wandb.log({name: value for name, value in values.items() if math.isfinite(value)}, step=step)

    def audio(self, step: int, name: str, waveform: np.ndarray, rate: int = SAMPLE_RATE) -> None:
        if self.writer and len(waveform):
            self.writer.add_audio(name, waveform[:, None], step, sample_rate=rate)
        if self.wandb and len(waveform):
            import wandb

            self.wandb.log({name: wandb.Audio(waveform, sample_rate=rate)}, step=step)


def begin_wandb(run: Path, project: str, settings: dict[str, Any]) -> Any:
    """The run at Weights & Biases; the one that this directory has begun there, where it has. Raises UserError."""
    import wandb

    file = run / WANDB_ID
    known = file.read_text().strip() if file.exists() else None
    try:
        begun = wandb.init(project=project, name=run.name, id=known, resume="allow", dir=str(run), config=settings)
    except wandb.Error as error:  # no key, no network
        raise UserError(f"config.wandb={project}: {first_line(error)}") from None
    write_atomically(file, f"{begun.id}\n")
    return begun
