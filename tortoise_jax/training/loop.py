"""The training loop: step, log, evaluate, save, stop. It knows batches, steps and files, nothing of the model.

When to evaluate, save and stop depends only on the step and the history on disk, so that a resumed run goes on exactly
as if it had never stopped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
from ml_collections import ConfigDict

from tortoise_jax import parallel
from tortoise_jax.checkpoints.pretrained import DIVERGED
from tortoise_jax.data.batches import Batch, prefetch
from tortoise_jax.training import replay, run_directory
from tortoise_jax.training.drafts import Drafter
from tortoise_jax.training.feed import Feed
from tortoise_jax.training.optimizer import swapped
from tortoise_jax.training.run_directory import Run
from tortoise_jax.training.step import Objective, TrainState, eval_step, evaluation, train_step

FINISHED, STOPPED_EARLY, INTERRUPTED = "finished", "stopped early", "interrupted"
NOT_FINITE = "stopped: not finite"
T = TypeVar("T")


class Loop:
    """One run from its state's step to the end. Every host runs the same; the main one writes and prints."""

    def __init__(self, settings: ConfigDict, config: Objective, run: Run, feed: Feed, drafter: Drafter | None) -> None:
        self.settings, self.config, self.run, self.feed, self.drafter = settings, config, run, feed, drafter
        self.step_fn = parallel.mapped(functools.partial(train_step, config), donate=True)
        self.eval_fn = parallel.mapped(functools.partial(eval_step, config), donate=False)
        self.running: tuple[int, Any, Batch] | None = None  # the step that is not logged yet: number, metrics, batch
        self.skipped = 0  # steps in a row that were not finite, up to the last one logged
        self.failure = ""  # why the run cannot go on, or has come to nothing
        self.remarked = False

    def train(self, state: TrainState, stop_requested: Callable[[int], bool]) -> str:
        """Trains to `settings.steps` unless stopped; returns how it ended, with `failure` where there is no result.

        stop_requested(step): whether to end after this step; the same answer on every host. The last state is saved,
        unless it is not finite.
        """
        ended = self.train_steps(state, stop_requested)
        if ended in (FINISHED, STOPPED_EARLY):
            self.failure = run_directory.failure(*self.curves())
        return DIVERGED if self.failure and ended != NOT_FINITE else ended

    def train_steps(self, state: TrainState, stop_requested: Callable[[int], bool]) -> str:
        first, self.skipped = int(parallel.first_copy(state.step)), int(parallel.first_copy(state.skipped))
        if first == 0:
            self.keep_start(state)
        if self.stops_early():
            return STOPPED_EARLY
        steps = range(first, self.settings.steps)
        for step, (batch, placed) in zip(steps, prefetch(placed_by(self.feed.training_batch), steps), strict=True):
            state, metrics = parallel.call(self.step_fn, state, placed)
            self.log_running(state)  # the step before, while this one runs
            if self.failure:
                return NOT_FINITE
            self.running = (step + 1, metrics, batch)
            ended = self.after(step + 1, state, stop_requested(step + 1))
            if ended:
                return ended
        return FINISHED

    def keep_start(self, state: TrainState) -> None:
        """The start is evaluated and saved like any step: nothing worse is ever taken for the run's best."""
        if not self.run.history.has("validation", 0):
            self.evaluate(0, state)
        loss = dict(self.curves()[0]).get(0)
        if loss is not None:
            self.save(0, state, loss)

    def after(self, step: int, state: TrainState, stop: bool) -> str:
        """Evaluates and saves where it is time to; returns how the run ends here, "" where it goes on."""
        last = step == self.settings.steps
        evaluate = last or self.due(step, self.settings.eval_every)
        if evaluate or stop or self.due(step, self.settings.save_every):
            self.log_running(state)
            if self.failure:
                return NOT_FINITE
            with self.run.writer.between_steps():
                self.save(step, state, self.evaluate(step, state) if evaluate else None)
        if last:
            return FINISHED
        if evaluate and self.stops_early():
            return STOPPED_EARLY
        return INTERRUPTED if stop else ""

    @staticmethod
    def due(step: int, every: int) -> bool:
        return every > 0 and step % every == 0

    def log_running(self, state: TrainState) -> None:
        """Waits for the step that is not logged yet, if there is one, and records it.

        A step that was not finite is kept for replay, with the parameters there are now: those it was computed with,
        unless the step after it, dispatched already, was finite. Too many in a row are a `failure`.
        """
        if self.running is None:
            return
        (step, metrics, batch), self.running = self.running, None
        finite = self.log_step(step, parallel.first_copy(metrics), clips=int((batch["example"] >= 0).sum()))
        self.skipped = 0 if finite else self.skipped + 1
        if finite:
            return
        clips = ", ".join(self.feed.clip_ids(batch))
        line = f"step {step}: the loss or a gradient is not finite; the step was not applied. Clips: {clips}"
        if self.skipped == 1:
            kept = replay.save(self.run.folder, step, batch, parallel.first_copy(state.params))
            line += f". To see where: --replay {kept}"
        self.run.writer.say(line)
        if self.skipped >= self.settings.max_nonfinite:
            self.failure = (
                f"{self.skipped} steps in a row up to step {step} were not finite; lower optimizer.learning_rate, or "
                "look at the clips above"
            )

    def log_step(self, step: int, metrics: dict[str, np.ndarray], clips: int) -> bool:
        """Writes one step's metrics; returns whether it was finite. clips: of this host."""
        values = self.config.scalars(metrics)
        log = self.due(step, self.settings.log_every) or step == self.settings.steps
        headline, everywhere = self.config.curves[0], clips * parallel.process_count()
        speech = self.config.speech_seconds(metrics)
        self.run.writer.step(step, values, headline, clips=everywhere, speech=speech, log=log)
        by_name = {name.rpartition("/")[2]: value for name, value in values.items()}
        self.run.history.add(
            "train", step, {name: by_name[name] for name in (*self.config.curves, "total", run_directory.RATE)}
        )
        return bool(values["finite"])

    def evaluate(self, step: int, state: TrainState) -> float | None:
        """The loss over all held-out clips, the same every time; None where there are none.

        Of the average of the parameters, where the run has one.
        """
        loss, (params, _) = None, swapped(state.params, state.opt_state)
        batches = self.feed.validation.batches_per_epoch
        if batches:
            totals: dict[str, np.ndarray] = {}
            ahead = prefetch(placed_by(self.feed.validation_batch), range(batches))
            for sums in one_behind(parallel.call(self.eval_fn, params, placed) for _, placed in ahead):
                totals = {name: totals.get(name, 0) + value for name, value in parallel.first_copy(sums).items()}
            losses = evaluation(self.config, totals)
            loss = losses["total"]
            self.run.history.add("validation", step, losses)
            self.run.writer.scalars(step, {f"validation/{name}": value for name, value in losses.items()})
            curves = ", ".join(f"{name} {losses[name]:.4f}" for name in self.config.curves)
            self.run.writer.say(f"step {step}: held-out loss: {curves}")
            self.remark()
        if self.drafter and (step in (0, self.settings.steps) or self.due(step, self.settings.sample_every)):
            self.drafter(step, parallel.first_copy(params), self.run)
        return loss

    def remark(self) -> None:
        line = run_directory.remark(*self.curves())
        if line and not self.remarked:
            self.run.writer.say(line)
        self.remarked = bool(line)

    def curves(self) -> tuple[run_directory.Curve, run_directory.Curve]:
        """Total losses of validation and training."""
        return self.run.history.curve("validation", "total"), self.run.history.curve("train", "total")

    def stops_early(self) -> bool:
        """Whether `patience` evaluations in a row brought no better validation loss."""
        patience = self.settings.patience
        losses = [loss for _, loss in self.curves()[0]]
        return 0 < patience <= run_directory.evaluations_without_gain(losses)

    def save(self, step: int, state: TrainState, loss: float | None) -> None:
        host = parallel.first_copy(state)
        progress = {"step": step, "skipped": int(host.skipped)}
        self.run.checkpoints.save(step, *swapped(host.params, host.opt_state), progress, loss)


def placed_by(make: Callable[[int], Batch]) -> Callable[[int], tuple[Batch, Any]]:
    """Makes a batch and puts it on the devices: done ahead, by the threads that read it."""

    def placed(index: int) -> tuple[Batch, Any]:
        batch = make(index)
        return batch, parallel.rows_on_devices(batch)

    return placed


def one_behind(results: Iterable[T]) -> Iterator[T]:
    """Each result after the next one has been started, so that a device never waits for the host to read one."""
    waiting: list[T] = []
    for result in results:
        waiting.append(result)
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting
