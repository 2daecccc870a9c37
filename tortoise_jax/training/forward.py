"""Loss sums of one micro-batch on one device: its conditioning, its dropout, the model, the losses."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from tortoise_jax.audio import log_mel
from tortoise_jax.models.layers import Array
from tortoise_jax.models.unified_voice import UnifiedVoice
from tortoise_jax.training.losses import Sums, stream_targets, weighted_sums

Batch = dict[str, Array]


def conditioning_mel(batch: Batch, mel_norms: Any) -> Array:
    """The mels (b, u, t, m) of the conditioning clips, computed here where the batch carries waveforms."""
    if "conditioning_mel" in batch:
        return batch["conditioning_mel"]
    return log_mel(batch["conditioning_wav"], mel_norms)


def dropout_keys(seed: int, step: Array | np.ndarray, example: Array) -> Array:
    """One key per row, (b,) for example (b,), from (seed, step, example).

    A row's key does not depend on the device that computes it or on the other rows of its batch.
    """
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(example)


def has_dropout(model: UnifiedVoice) -> bool:
    compute = model.compute
    return any((compute.embed_dropout, compute.residual_dropout, compute.attention_dropout))


def forward_sums(
    model: UnifiedVoice, mel_norms: Any, params: Any, batch: Batch, dropout_keys: Array | None = None
) -> Sums:
    """Loss sums of a micro-batch, whose arrays are (b, …); dropout_keys (b,): None for no dropout."""
    mel = jax.lax.stop_gradient(conditioning_mel(batch, mel_norms))
    rows = (batch[name] for name in ("tokens", "token_types", "positions"))
    losses: Any = model.apply(
        {"params": params}, mel, *rows, stream_targets(batch), dropout_keys, method=UnifiedVoice.losses
    )
    return weighted_sums(losses, batch, model.config.stop_mel)
