"""CLVP, which scores candidates: how well codes fit a text, as the angle between the latents of two encoders.

Follows tortoise's CLVP as released: transformer encoders without position tables, rotary angles on queries, keys and
values, no causal mask. `Compute.dtype` is that of the layers' products; all else is float32.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from tortoise_jax.models.layers import Array, Compute, attend, layer_norm

HEAD_WIDTH = 64  # k, whatever the width
ROTARY_WIDTH = 32  # dimensions of a head that turn
SMALLEST_NORM = 1e-8
SMALLEST_LENGTH = 1e-12


@dataclasses.dataclass(frozen=True)
class CLVPConfig:
    """Dimensions of a CLVP, read from its tensors: a text encoder, an encoder of codes, the latent they share.

    inner: of the feed-forward. A head is 64 wide, whatever the width.
    """

    text_tokens: int
    text_width: int
    text_layers: int
    text_heads: int
    text_inner: int
    speech_tokens: int
    speech_width: int
    speech_layers: int
    speech_heads: int
    speech_inner: int
    latent: int


RELEASED = CLVPConfig(
    text_tokens=256, text_width=768, text_layers=20, text_heads=12, text_inner=1536,
    speech_tokens=8192, speech_width=768, speech_layers=20, speech_heads=12, speech_inner=1536,
    latent=768,
)  # fmt: skip


class RMSNorm(nn.Module):
    """x / max(|x| / sqrt(d), 1e-8) * g: a floor below the norm, not an epsilon added to the mean of squares."""

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b, s, d) -> (b, s, d)
        g = self.param("g", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        norm = jnp.linalg.norm(wide, axis=-1, keepdims=True) * x.shape[-1] ** -0.5
        return (wide / jnp.maximum(norm, SMALLEST_NORM) * g[None, None]).astype(x.dtype)


def rotary_frequencies() -> Array:
    """The frequencies (16,) that every released encoder has."""
    half = ROTARY_WIDTH // 2
    return 10000.0 ** -(jnp.arange(half, dtype=jnp.float32) / half)


def rotary_angles(frequencies: Array, positions: int) -> Array:
    """frequencies (16,) -> angles (s, 32) of positions 0, 1, …: the same frequencies twice, not interleaved."""
    angles = jnp.arange(positions, dtype=jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([angles, angles], axis=-1)


def rotated(x: Array, angles: Array) -> Array:
    """x (b, s, h, 64): its first 32 dimensions turned by angles (s, 32), the others as they are."""
    turning, fixed = x[..., :ROTARY_WIDTH], x[..., ROTARY_WIDTH:]
    first, second = jnp.split(turning, 2, axis=-1)
    cos, sin = (part[None, :, None] for part in (jnp.cos(angles), jnp.sin(angles)))
    wide = lambda part: part.astype(jnp.float32)
    turned = wide(turning) * cos + wide(jnp.concatenate([-second, first], axis=-1)) * sin
    return jnp.concatenate([turned.astype(x.dtype), fixed], axis=-1)


class Attention(nn.Module):
    heads: int
    compute: Compute

    @nn.compact
    def __call__(self, x: Array, angles: Array, mask: Array | None) -> Array:  # (b, s, d) -> (b, s, d)
        b, s, d = x.shape
        dtype, inner = jnp.dtype(self.compute.dtype), self.heads * HEAD_WIDTH
        flat = x.reshape(b * s, d)
        dense = lambda name: nn.Dense(inner, use_bias=False, dtype=dtype, name=name)(flat)
        # Values turn too, as upstream has it, so that the result is not invariant to shifts.
        q, k, v = (rotated(dense(n).reshape(b, s, self.heads, HEAD_WIDTH), angles) for n in ("to_q", "to_k", "to_v"))
        mixed = attend(q, k, v, causal=False, implementation=self.compute.attention, mask=mask)
        return nn.Dense(d, dtype=dtype, name="to_out")(mixed.reshape(b * s, inner)).reshape(b, s, d)


class FeedForward(nn.Module):
    """A gated one: value * gelu(gate), in this order, with the exact GELU."""

    inner: int
    compute: Compute

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b, s, d) -> (b, s, d)
        b, s, d = x.shape
        dtype = jnp.dtype(self.compute.dtype)
        wide = nn.Dense(2 * self.inner, dtype=dtype, name="proj")(x.reshape(b * s, d))
        value, gate = jnp.split(wide.astype(jnp.float32), 2, axis=-1)
        return nn.Dense(d, dtype=dtype, name="out")(value * nn.gelu(gate, approximate=False)).reshape(b, s, d)


class EncoderLayer(nn.Module):
    heads: int
    inner: int
    compute: Compute

    @nn.compact
    def __call__(self, x: Array, angles: Array, mask: Array | None) -> tuple[Array, Array]:
        normed = RMSNorm(name="attention_norm")(x)
        attended = x + Attention(self.heads, self.compute, name="attention")(normed, angles, mask).astype(x.dtype)
        normed = RMSNorm(name="feed_forward_norm")(attended)
        x = attended + FeedForward(self.inner, self.compute, name="feed_forward")(normed).astype(x.dtype)
        return x, jnp.stack([attended, x])


class Encoder(nn.Module):
    layers: int
    heads: int
    inner: int
    compute: Compute

    @nn.compact
    def __call__(self, x: Array, frequencies: Array, mask: Array | None) -> dict[str, Array]:
        """x (b, s, d), mask (b, s) or None -> blocks (layers, 2, b, s, d), encoded (b, s, d)."""
        layers = nn.scan(
            EncoderLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=self.layers,
        )(self.heads, self.inner, self.compute, name="layers")
        x, blocks = layers(x, rotary_angles(frequencies, x.shape[1]), mask)
        encoded = layer_norm("norm", jnp.float32)(x)
        if mask is not None:
            encoded = jnp.where(mask[..., None], encoded, jnp.zeros_like(encoded))
        return {"blocks": blocks, "encoded": encoded}


class CLVP(nn.Module):
    """Text ids (b, s) and codes (b, c) to latents (b, l) of length 1 and scores (b,).

    Positions that a mask leaves out change nothing. Upstream masks nothing: its score is of codes with all their
    padding, and of the text with an extra 0 at its end.
    """

    config: CLVPConfig
    compute: Compute = Compute()

    def setup(self) -> None:
        c = self.config
        self.temperature = self.param("temperature", nn.initializers.ones, ())
        self.text_emb = nn.Embed(c.text_tokens, c.text_width)
        self.speech_emb = nn.Embed(c.speech_tokens, c.speech_width)
        self.text_transformer = Encoder(c.text_layers, c.text_heads, c.text_inner, self.compute)
        self.speech_transformer = Encoder(c.speech_layers, c.speech_heads, c.speech_inner, self.compute)
        self.to_text_latent = nn.Dense(c.latent, use_bias=False)
        self.to_speech_latent = nn.Dense(c.latent, use_bias=False)
        self.text_frequencies = self.variable("buffers", "text_frequencies", rotary_frequencies).value
        self.speech_frequencies = self.variable("buffers", "speech_frequencies", rotary_frequencies).value

    def text(self, ids: Array, mask: Array | None = None) -> dict[str, Array]:
        """ids (b, s) int32, mask (b, s) bool -> blocks, encoded (b, s, d), latent (b, l) float32."""
        encoded = self.text_transformer(self.text_emb(ids), self.text_frequencies, mask)
        return encoded | {"latent": latent(encoded["encoded"], mask, self.to_text_latent)}

    def speech(self, codes: Array, mask: Array | None = None) -> dict[str, Array]:
        """codes (b, c) int32, each below the table's rows, mask (b, c) bool -> the same of the codes."""
        encoded = self.speech_transformer(self.speech_emb(codes), self.speech_frequencies, mask)
        return encoded | {"latent": latent(encoded["encoded"], mask, self.to_speech_latent)}

    def text_latent(self, ids: Array, mask: Array | None = None) -> Array:
        """ids (b, s) int32, mask (b, s) bool -> (b, l) float32."""
        return self.text(ids, mask)["latent"]

    def score(self, text_latent: Array, codes: Array) -> Array:
        """text_latent (l,), codes (b, c) int32 -> how well each row fits the text, (b,) float32, higher is better."""
        return self.similarity(text_latent[None], self.speech(codes)["latent"])

    def similarity(self, text: Array, speech: Array) -> Array:
        """Latents (b, l) of texts and of codes, row by row -> (b,)."""
        return jnp.exp(self.temperature) * jnp.sum(text * speech, axis=-1)

    def __call__(
        self, ids: Array, codes: Array, text_mask: Array | None = None, code_mask: Array | None = None
    ) -> dict[str, Any]:
        """ids (b, s), codes (b, c) int32, masks bool -> text, speech (dicts), similarity (b,)."""
        text, speech = self.text(ids, text_mask), self.speech(codes, code_mask)
        return {"text": text, "speech": speech, "similarity": self.similarity(text["latent"], speech["latent"])}


def latent(encoded: Array, mask: Array | None, project: nn.Dense) -> Array:
    """encoded (b, s, d), zero where masked -> (b, l) float32 of length 1, from the mean over what is not masked."""
    if mask is None:
        mean = encoded.mean(axis=1)
    else:
        mean = encoded.sum(axis=1) / mask.sum(axis=1, keepdims=True).astype(encoded.dtype)
    projected = project(mean)
    length = jnp.linalg.norm(projected, axis=-1, keepdims=True)
    return projected / jnp.maximum(length, SMALLEST_LENGTH)
