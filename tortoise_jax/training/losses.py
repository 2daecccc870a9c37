"""Cross-entropy of the two streams as sums with counts, so that padding, batching and devices cannot change a mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tortoise_jax.models.layers import Array
from tortoise_jax.models.unified_voice import MEL, TEXT

Sums = dict[str, Array]
Arrays = Mapping[str, Any]  # jax or numpy
STREAMS = ("text", "mel", "stop")
POSITION_BUCKETS = 6
CODES_PER_BUCKET = 50  # 2.3 s of speech


def cross_entropy(logits: Array, targets: Array) -> Array:
    """logits (b, s, v), targets (b, s) in [0, v) -> negative log-likelihood (b, s)."""
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def stream_weights(token_types: Array, weights: Array, targets: Array, stop_mel: int) -> dict[str, Array]:
    """The weight (b, s) with which each position counts as text, as mel, and as the stop of mel.

    A position is counted by the stream of its *input*: what a text position predicts is text.
    """
    text, mel = (jnp.where(token_types == stream, weights, 0.0) for stream in (TEXT, MEL))
    return {"text": text, "mel": mel, "stop": jnp.where(targets == stop_mel, mel, 0.0)}


def by_position(values: Array, positions: Array) -> Array:
    """values, positions (b, s) -> sums (POSITION_BUCKETS,) over runs of 50 positions; the last takes the rest."""
    bucket = jnp.minimum(positions // CODES_PER_BUCKET, POSITION_BUCKETS - 1)
    return jnp.sum(jax.nn.one_hot(bucket, POSITION_BUCKETS) * values[..., None], axis=(0, 1))


def counts(batch: Arrays, stop_mel: int) -> Sums:
    """How much weight each stream's targets carry: known before any forward, so gradients can be scaled first.

    batch: token_types, weights, targets, positions, each (b, s).
    """
    streams = stream_weights(batch["token_types"], batch["weights"], batch["targets"], stop_mel)
    total = {f"{name}_count": jnp.sum(weight) for name, weight in streams.items()}
    return total | {"position_count": by_position(streams["mel"], batch["positions"])}


def stream_targets(batch: Arrays) -> dict[str, Array]:
    """What the text and the mel head are to predict at each position (b, s); 0 where the stream is another."""
    token_types, targets = batch["token_types"], batch["targets"]
    return {name: jnp.where(token_types == stream, targets, 0) for name, stream in (("text", TEXT), ("mel", MEL))}


def loss_sums(outputs: Arrays, batch: Arrays, stop_mel: int) -> Sums:
    """`weighted_sums` from the model's dict with its logits."""
    targets = stream_targets(batch)
    losses = {name: cross_entropy(outputs[f"{name}_logits"], targets[name]) for name in targets}
    return weighted_sums(losses, batch, stop_mel)


def weighted_sums(losses: Arrays, batch: Arrays, stop_mel: int) -> Sums:
    """Summed losses of a batch: text_sum, mel_sum, stop_sum (the stop targets' part of mel_sum), and position_sum
    (POSITION_BUCKETS,), mel_sum by where in the codes the target stands.

    losses: of `stream_targets`, "text" and "mel" (b, s); batch: token_types, weights, targets, positions, each (b, s);
    weight 0 for padding.
    """
    streams = stream_weights(batch["token_types"], batch["weights"], batch["targets"], stop_mel)
    of_stream = {"text": losses["text"], "mel": losses["mel"], "stop": losses["mel"]}
    total = {f"{name}_sum": jnp.sum(of_stream[name] * weight) for name, weight in streams.items()}
    return total | {"position_sum": by_position(losses["mel"] * streams["mel"], batch["positions"])}


def total_loss(sums: Arrays, counts: Arrays, text_weight: float) -> Array:
    """text_weight x mean text loss + mean mel loss; upstream's text_weight is 0.01."""
    return text_weight * sums["text_sum"] / counts["text_count"] + sums["mel_sum"] / counts["mel_count"]


def means(sums: Arrays, counts: Arrays) -> Sums:
    """Mean losses: text, mel, stop, and position (POSITION_BUCKETS,); 0 where nothing was counted."""
    names = (*STREAMS, "position")
    return {name: sums[f"{name}_sum"] / jnp.maximum(counts[f"{name}_count"], 1.0) for name in names}
