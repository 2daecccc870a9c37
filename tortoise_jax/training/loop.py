"""The training loop: step, watch, evaluate, save, stop. It knows batches, steps and files, nothing of the model.

What decides anything (when to evaluate, save, stop) is a function of the step and the history on disk, so that a run
taken up again goes on exactly as if it had never stopped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from tortoise_jax import parallel
from tortoise_jax.checkpoints.pretrained import RunCheckpoints
from tortoise_jax.data import batches
from tortoise_jax.data.batches import Batch
from tortoise_jax.data.dataset import Dataset
from tortoise_jax.data.plan import BatchPlan
from tortoise_jax.errors import UserError
from tortoise_jax.training import replay
from tortoise_jax.training import run_directory as run
from tortoise_jax.training.drafts import Sampler
from tortoise_jax.training.losses import CODES_PER_BUCKET, STREAMS, means, total_loss
from tortoise_jax.training.metrics import Watch
from tortoise_jax.training.run_directory import History
from tortoise_jax.training.step import Recipe, TrainState, eval_step, train_step

FINISHED, STOPPED_EARLY, INTERRUPTED = "finished", "stopped early", "interrupted"


class Loop:
    """One run from its state's step to the end. Every host runs the same; the main one writes and prints."""

    def __init__(
        self,
        settings: ConfigDict,
        folder: Path,
        recipe: Recipe,
        checkpoints: RunCheckpoints,
        dataset: Dataset,
        plan: BatchPlan,
        validation: BatchPlan,
        watch: Watch,
        history: History,
        sampler: Sampler | None = None,
    ) -> None:
        self.settings, self.folder, self.recipe, self.checkpoints = settings, folder, recipe, checkpoints
        self.dataset, self.plan, self.validation = dataset, plan, validation
        self.watch, self.history, self.sampler = watch, history, sampler
        self.step_fn = parallel.mapped(functools.partial(train_step, recipe), donate=True)
        self.eval_fn = parallel.mapped(functools.partial(eval_step, recipe), donate=False)
        self.remarked = False

    def run(self, state: TrainState, interrupted: Callable[[], bool]) -> str:
        """Trains to `settings.steps` unless stopped; returns how it ended. The last state is saved either way."""
        first = int(parallel.first_copy(state.step))
        if first == 0 and not self.history.has("validation", 0):
            self.judge(0, state)
        if self.stops_early():
            return STOPPED_EARLY
        steps = range(first, self.settings.steps)
        for step, batch in zip(steps, batches.prefetch(self.training_batch, steps), strict=True):
            state, metrics = self.step_fn(state, batch)
            done = step + 1
            self.note(done, metrics, batch, state)
            last = done == self.settings.steps
            if self.due(done, self.settings.eval_every) or last:
                self.save(done, state, self.judge(done, state))
                if self.stops_early() and not last:
                    return STOPPED_EARLY
            elif self.due(done, self.settings.save_every):
                self.save(done, state, None)
            if parallel.any_host(interrupted()) and not last:
                self.save(done, state, None)
                return INTERRUPTED
        return FINISHED

    @staticmethod
    def due(step: int, every: int) -> bool:
        return every > 0 and step % every == 0

    def training_batch(self, step: int) -> Batch:
        return self.feed(self.plan, step)

    def feed(self, plan: BatchPlan, step: int) -> Batch:
        """This host's part of a step's batch, laid out for its devices."""
        length, indices = plan.batch(step)
        batch = batches.make_batch(
            self.dataset,
            indices,
            length,
            rows=plan.rows,
            config=self.recipe.model.config,
            seed=self.settings.seed,
            step=step,
            conditioning_clips=self.settings.conditioning_clips,
            host=parallel.host_rows(plan.rows),
        )
        return parallel.split_rows(batch, self.settings.accumulation)

    def note(self, step: int, metrics: Any, batch: Batch, state: TrainState) -> None:
        """Records one step; a step that was not finite is kept for replay, too many in a row end the run."""
        arrays = parallel.first_copy(metrics)
        values = {name: float(value) for name, value in arrays.items() if value.ndim == 0}
        for place, loss in enumerate(arrays["loss/position"]):
            if arrays["position_count"][place]:
                values[f"loss/codes_from_{place * CODES_PER_BUCKET}"] = float(loss)
        log = self.due(step, self.settings.log_every) or step == self.settings.steps
        self.watch.step(step, values, clips=int((batch["example"] >= 0).sum()) * parallel.process_count(), log=log)
        self.history.add("train", step, {name: values[f"loss/{name}"] for name in (*STREAMS, "total")})
        if values["finite"]:
            return
        skipped = int(parallel.first_copy(state.skipped))
        clips = sorted({self.dataset.clips[i].id for i in batch["example"].reshape(-1) if i >= 0})
        line = f"step {step}: the loss or a gradient is not finite; the step was not applied. Clips: {', '.join(clips)}"
        if skipped == 1:
            kept = replay.save(self.folder, step, batch, parallel.first_copy(state.params))
            line += f". To see where: --replay {kept}"
        self.watch.say(line)
        if skipped >= self.settings.max_nonfinite:
            raise UserError(
                f"{skipped} steps in a row up to step {step} were not finite; lower optimizer.learning_rate, or look "
                "at the clips above"
            )

    def judge(self, step: int, state: TrainState) -> float | None:
        """The loss over all held-out clips, without dropout, with fixed conditioning; None where there are none."""
        loss = None
        if self.validation.batches_per_epoch:
            totals: dict[str, np.ndarray] = {}
            for batch in batches.prefetch(self.validation_batch, range(self.validation.batches_per_epoch)):
                sums = parallel.first_copy(self.eval_fn(state.params, batch))
                totals = {name: totals.get(name, 0) + value for name, value in sums.items()}
            losses = {name: float(means(totals, totals)[name]) for name in STREAMS}
            loss = losses["total"] = float(total_loss(totals, totals, self.recipe.text_weight))
            self.history.add("validation", step, losses)
            self.watch.scalars(step, {f"validation/{name}": value for name, value in losses.items()})
            self.watch.say(
                f"step {step}: held-out loss: mel {losses['mel']:.4f}, text {losses['text']:.4f}, "
                f"stop {losses['stop']:.4f}"
            )
            self.remark()
        if self.sampler and (self.due(step, self.settings.sample_every) or step == 0) and self.settings.sample_every:
            self.sampler(step, parallel.first_copy(state.params), self.watch, self.history)
        return loss

    def validation_batch(self, index: int) -> Batch:
        return self.feed(self.validation, index)

    def remark(self) -> None:
        curves = self.history.curve("validation", "total"), self.history.curve("train", "total")
        line = run.overfitting_remark(*curves)
        if line and not self.remarked:
            self.watch.say(line)
        self.remarked = bool(line)

    def stops_early(self) -> bool:
        """Whether `patience` evaluations in a row brought no better validation loss."""
        patience = self.settings.patience
        losses = [loss for _, loss in self.history.curve("validation", "total")]
        return 0 < patience <= run.evaluations_without_gain(losses)

    def save(self, step: int, state: TrainState, loss: float | None) -> None:
        host = parallel.first_copy(state)
        progress = {"step": step, "skipped": int(host.skipped)}
        self.checkpoints.save(step, host.params, host.opt_state, progress, loss)
