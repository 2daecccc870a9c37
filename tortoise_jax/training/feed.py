"""What a run reads: the batches of a step and of an evaluation, this host's rows laid out for its devices."""

from __future__ import annotations

import dataclasses

from tortoise_jax import parallel
from tortoise_jax.data import batches
from tortoise_jax.data.batches import Batch
from tortoise_jax.data.dataset import Dataset
from tortoise_jax.data.plan import BatchPlan
from tortoise_jax.models.unified_voice import UnifiedVoiceConfig


@dataclasses.dataclass(frozen=True)
class Feed:
    """training, validation: which clips are in which batch. Batches are as training/step.py describes them."""

    dataset: Dataset
    training: BatchPlan
    validation: BatchPlan
    model: UnifiedVoiceConfig
    seed: int
    conditioning_clips: int
    gradient_accumulation_steps: int

    def training_batch(self, step: int) -> Batch:
        return self._batch(self.training, step)

    def validation_batch(self, index: int) -> Batch:
        return self._batch(self.validation, index)

    def clip_ids(self, batch: Batch) -> list[str]:
        """Ids of the clips that this host feeds to a step, sorted."""
        return sorted({self.dataset.clips[i].id for i in batch["example"].reshape(-1) if i >= 0})

    def _batch(self, plan: BatchPlan, step: int) -> Batch:
        length, indices = plan.batch(step)
        batch = batches.make_batch(
            self.dataset,
            indices,
            length,
            rows=plan.rows,
            config=self.model,
            seed=self.seed,
            step=step,
            conditioning_clips=self.conditioning_clips,
            host=parallel.host_rows(plan.rows),
        )
        return parallel.split_rows(batch, self.gradient_accumulation_steps)
