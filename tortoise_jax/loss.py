"""Cross-entropy of the two streams as sums with counts, so that padding, batching and devices cannot change a mean."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tortoise_jax.layers import Array
from tortoise_jax.unified_voice import MEL, TEXT

Sums = dict[str, Array]


def cross_entropy(logits: Array, targets: Array) -> Array:
    """logits (b, s, v), targets (b, s) in [0, v) -> negative log-likelihood (b, s)."""
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def stream_weights(kinds: Array, weights: Array, targets: Array, stop_mel: int) -> dict[str, Array]:
    """The weight (b, s) with which each position counts as text, as mel, and as the stop of mel.

    A position is counted by the stream of its *input*: what a text position predicts is text.
    """
    text, mel = (jnp.where(kinds == kind, weights, 0.0) for kind in (TEXT, MEL))
    return {"text": text, "mel": mel, "stop": jnp.where(targets == stop_mel, mel, 0.0)}


def counts(kinds: Array, weights: Array, targets: Array, stop_mel: int) -> Sums:
    """How much weight each stream's targets carry: known before any forward, so gradients can be scaled first."""
    streams = stream_weights(kinds, weights, targets, stop_mel)
    return {f"{name}_count": jnp.sum(weight) for name, weight in streams.items()}


def loss_sums(outputs: dict[str, Array], kinds: Array, weights: Array, targets: Array, stop_mel: int) -> Sums:
    """Summed losses of a batch: text_sum, mel_sum, and stop_sum, the part of mel_sum that is stop targets.

    outputs: the model's dict; kinds, weights, targets (b, s), weight 0 for what is padding.
    """
    streams = stream_weights(kinds, weights, targets, stop_mel)
    text = cross_entropy(outputs["text_logits"], jnp.where(kinds == TEXT, targets, 0))
    mel = cross_entropy(outputs["mel_logits"], jnp.where(kinds == MEL, targets, 0))
    losses = {"text": text, "mel": mel, "stop": mel}
    return {f"{name}_sum": jnp.sum(losses[name] * weight) for name, weight in streams.items()}


def total_loss(sums: Sums, counts: Sums, text_weight: float) -> Array:
    """text_weight x mean text loss + mean mel loss; upstream's text_weight is 0.01."""
    return text_weight * sums["text_sum"] / counts["text_count"] + sums["mel_sum"] / counts["mel_count"]


def means(sums: Sums, counts: Sums) -> Sums:
    """Mean losses per stream: text, mel, stop."""
    return {name: sums[f"{name}_sum"] / jnp.maximum(counts[f"{name}_count"], 1e-9) for name in ("text", "mel", "stop")}
