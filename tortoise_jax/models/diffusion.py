"""The diffusion decoder: hidden states of the AR model and a voice to a 24 kHz mel, by one evaluation per step.

Follows tortoise's DiffusionTts as released. Mels are (b, t, 100): to the network normalised to [-1, 1], as conditioning
clips not. Methods that take lengths or a mask give each row what it would give alone: padding changes nothing.

`Compute.dtype` is that of the wide products alone, those of the blocks: in bfloat16 too the first and the last
convolution, what is made of the step, norms and the sums that blocks add to are float32.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tortoise_jax.models.layers import (
    LAYER_NORM_EPSILON,
    Array,
    Compute,
    attend,
    frames_of,
    group_count,
    mask_of,
    zero_padding,
)

EMBEDDER_LAYERS, CONDITIONER_LAYERS, CONVERTER_LAYERS, INTEGRATOR_LAYERS = 5, 4, 3, 3
TAIL_LAYERS = 3  # residual blocks without attention after the others
BUCKETS = 32  # of the relative position of a key to a query
LONGEST_PERIOD = 10000.0  # of the time embedding
FLOAT32 = jnp.dtype("float32")


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """Dimensions of a diffusion decoder, read from its tensors, heads too.

    latent_width: of the AR model's hidden states. codes: rows of the table that stands in for them in training.
    out_channels: the noise estimate, then the variance, each of mel_channels.
    """

    layers: int
    width: int
    heads: int
    latent_width: int
    codes: int
    mel_channels: int = 100
    out_channels: int = 200


RELEASED = DiffusionConfig(layers=10, width=1024, heads=16, latent_width=1024, codes=8193)


def relative_buckets(length: int) -> np.ndarray:
    """Bucket of each relative position key - query from 1 - t to t - 1: (2 t - 1,) int32.

    0 to 7 one by one, then eight of growing width; 16 more where the key comes after the query.
    """
    relative = np.arange(1 - length, length)
    far = np.maximum(np.abs(relative), 1)
    grown = 8 + np.floor(8 * np.log(far / 8) / math.log(8)).astype(int)
    near = np.where(np.abs(relative) < 8, np.abs(relative), np.minimum(15, grown))
    return (near + np.where(relative > 0, BUCKETS // 2, 0)).astype(np.int32)


def position_bias(table: Array, length: int) -> Array:
    """table (32, h) -> what is added to the scores of query i and key j, (1, h, t, t).

    Entry (i, j) depends on j - i only. Repeating the 2 t - 1 values with one more and reading rows that are one shorter
    shifts each row by one against the last: reshapes and slices, no gather of t * t values.
    """
    values = jnp.append(table[jnp.asarray(relative_buckets(length))], table[:1], axis=0).T  # (h, 2 t)
    h, period = values.shape
    rows = jnp.tile(values, (1, length))[:, : length * (period - 1)].reshape(h, length, period - 1)
    return rows[None, :, :, length - 1 :]


class GroupNorm(nn.Module):
    """Upstream's group norm over the real frames, in float32 and to float32 whatever x is.

    The mean is taken twice, the second time of what the first leaves: where a row is nearly constant over time (the
    unconditional pass), the rounding of one long sum would be seen in the result.
    """

    @nn.compact
    def __call__(self, x: Array, mask: Array | None) -> Array:  # (b, t, d) -> (b, t, d)
        b, t, d = x.shape
        scale = self.param("scale", nn.initializers.ones, (d,))
        bias = self.param("bias", nn.initializers.zeros, (d,))
        groups = x.astype(jnp.float32).reshape(b, t, group_count(d), -1)
        real = jnp.ones((b, t), bool) if mask is None else mask
        values = (real.sum(axis=1) * groups.shape[-1]).astype(jnp.float32)[:, None, None, None]
        mean = lambda y: jnp.sum(y, axis=(1, 3), keepdims=True, where=real[:, :, None, None]) / values
        groups = groups - mean(groups)
        groups = groups - mean(groups)
        normed = groups * jax.lax.rsqrt(mean(groups**2) + LAYER_NORM_EPSILON)
        return normed.reshape(b, t, d) * scale[None, None] + bias[None, None]


class Attention(nn.Module):
    """x + proj_out(attention(qkv(norm(x)))) with a learned bias for the relative position of key and query."""

    heads: int
    compute: Compute

    @nn.compact
    def __call__(self, x: Array, mask: Array | None) -> Array:  # (b, t, d) -> (b, t, d)
        b, t, d = x.shape
        dtype, k = jnp.dtype(self.compute.dtype), d // self.heads
        normed = GroupNorm(name="norm")(x, mask)
        qkv = nn.Dense(3 * d, dtype=dtype, name="qkv")(normed.reshape(b * t, d))
        # Interleaved per head: head 0's q, k, v, then head 1's.
        q, key, v = jnp.moveaxis(qkv.reshape(b, t, self.heads, 3, k), 3, 0)
        table = self.param("relative_attention_bias", nn.initializers.normal(1.0), (BUCKETS, self.heads))
        bias = position_bias(table, t) * k**0.5  # upstream scales the bias after the scores are scaled
        mixed = attend(q, key, v, causal=False, implementation=self.compute.attention, bias=bias, mask=mask)
        mixed = nn.Dense(d, dtype=dtype, name="proj_out")(mixed.reshape(b * t, d)).reshape(b, t, d)
        return x + mixed.astype(x.dtype)


class ResidualBlock(nn.Module):
    """x + conv3(silu(norm(conv1(silu(norm(x)))) * (1 + scale) + shift)), scale and shift made of the time vector."""

    compute: Compute

    @nn.compact
    def __call__(self, x: Array, time: Array, mask: Array | None) -> Array:  # (b, t, d), (b, d) -> (b, t, d)
        b, t, d = x.shape
        dtype = jnp.dtype(self.compute.dtype)
        h = nn.silu(GroupNorm(name="in_norm")(x, mask))
        h = nn.Dense(d, dtype=dtype, name="in_conv")(h.reshape(b * t, d)).reshape(b, t, d)
        scale, shift = jnp.split(nn.Dense(2 * d, name="emb")(nn.silu(time)), 2, axis=-1)
        h = GroupNorm(name="out_norm")(h, mask) * (1 + scale[:, None]) + shift[:, None]
        return x + conv(d, "out_conv", dtype)(zero_padding(nn.silu(h), mask)).astype(x.dtype)


def conv(width: int, name: str, dtype: jnp.dtype = FLOAT32, stride: int = 1) -> nn.Conv:
    """A convolution of kernel 3; torch pads both sides also where it strides."""
    return nn.Conv(width, (3,), strides=stride, padding=1, dtype=dtype, name=name)


class Layer(nn.Module):
    """A residual block, then attention."""

    heads: int
    compute: Compute

    @nn.compact
    def __call__(self, x: Array, time: Array, mask: Array | None) -> tuple[Array, Array]:
        residual = ResidualBlock(self.compute, name="resblk")(x, time, mask)
        x = Attention(self.heads, self.compute, name="attn")(residual, mask)
        return x, jnp.stack([residual, x])


class AttentionLayer(nn.Module):
    heads: int
    compute: Compute

    @nn.compact
    def __call__(self, x: Array, mask: Array | None) -> tuple[Array, Array]:
        x = Attention(self.heads, self.compute, name="attn")(x, mask)
        return x, x


def stacked(layer: type[nn.Module], length: int, inputs: int, compute: Compute) -> type[nn.Module]:
    """`length` layers one after another, weights on a new first axis; each is given the same `inputs` beside x."""
    return nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast,) * inputs,
        length=length,
    )


def time_embedding(steps: Array, width: int) -> Array:
    """Trained steps (b,) 0…3999 -> (b, width) float32: cosines, then sines.

    In float32 throughout: near step 4000 a product in bfloat16 would be off by whole periods, and the last bit of a
    frequency is seen. So they are what torch makes of them: float32 exponents, well rounded powers.
    """
    half = width // 2
    exponents = np.float32(-math.log(LONGEST_PERIOD)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = steps.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class DiffusionDecoder(nn.Module):
    """Here s counts codes and t mel frames; conditioning vectors (b, 2 d) are twice as wide as the model."""

    config: DiffusionConfig
    compute: Compute = Compute()

    def setup(self) -> None:
        c, compute, dtype = self.config, self.compute, jnp.dtype(self.compute.dtype)
        attention = lambda length: stacked(AttentionLayer, length, 1, compute)(c.heads, compute)
        self.time_embed_0 = nn.Dense(c.width)
        self.time_embed_2 = nn.Dense(c.width)
        self.contextual_embedder_0 = conv(c.width, "contextual_embedder_0", stride=2)
        self.contextual_embedder_1 = conv(2 * c.width, "contextual_embedder_1", stride=2)
        self.contextual_embedder = attention(EMBEDDER_LAYERS)
        self.latent_conditioner_0 = conv(c.width, "latent_conditioner_0")
        self.latent_conditioner = attention(CONDITIONER_LAYERS)
        self.code_embedding = nn.Embed(c.codes, c.width)
        self.code_converter = attention(CONVERTER_LAYERS)
        self.code_norm = GroupNorm()
        self.unconditioned_embedding = self.param("unconditioned_embedding", nn.initializers.normal(1.0), (c.width,))
        self.conditioning_timestep_integrator = stacked(Layer, INTEGRATOR_LAYERS, 2, compute)(c.heads, compute)
        self.inp_block = conv(c.width, "inp_block")
        self.integrating_conv = nn.Dense(c.width, dtype=dtype)
        self.layers = stacked(Layer, c.layers, 2, compute)(c.heads, compute)
        self.tail = [ResidualBlock(compute, name=f"layers_{c.layers + i}") for i in range(TAIL_LAYERS)]
        self.out_norm = GroupNorm()
        self.out_conv = conv(c.out_channels, "out_conv")
        self.mel_head = conv(c.mel_channels, "mel_head")

    def clip_vectors(self, mel: Array) -> dict[str, Any]:
        """Mels of b clips (b, t, m), not normalised, all real -> stages (list), vector (b, 2 d): the mean over time."""
        first = self.contextual_embedder_0(mel)
        second = self.contextual_embedder_1(first)
        x, blocks = self.contextual_embedder(second, None)
        return {"stages": [first, second, *blocks], "vector": x.mean(axis=1)}

    def condition(self, mel: Array) -> Array:
        """Mels of the u clips of each row (b, u, t, m) -> conditioning (b, 2 d): the mean of the clips' vectors."""
        b, u, t, m = mel.shape
        return self.clip_vectors(mel.reshape(b * u, t, m))["vector"].reshape(b, u, -1).mean(axis=1)

    def align(self, latents: Array, conditioning: Array, frames: int, lengths: Array | None = None) -> dict[str, Any]:
        """What does not depend on the step: latents (b, s, l), conditioning (b, 2 d) -> aligned (b, frames, d).

        lengths (b,): codes of each row, s where None; row r has frames_of(lengths[r]) real frames, the others are 0.
        stages: the conditioner's outputs. normed: before scale and shift.
        """
        codes = mask_of(lengths, latents.shape[1])
        first = self.latent_conditioner_0(zero_padding(latents, codes))
        x, blocks = self.latent_conditioner(first, codes)
        return {"stages": [first, *blocks], **self.aligned(x, codes, conditioning, frames, lengths)}

    def align_codes(self, codes: Array, conditioning: Array, frames: int) -> dict[str, Any]:
        """The same of codes (b, s) in place of latents, as only upstream's training does."""
        x, _ = self.code_converter(self.code_embedding(codes), None)
        return self.aligned(x, None, conditioning, frames, None)

    def aligned(
        self, x: Array, mask: Array | None, conditioning: Array, frames: int, lengths: Array | None
    ) -> dict[str, Any]:
        """x (b, s, d), conditioning (b, 2 d) -> normed (b, s, d); aligned (b, frames, d): styled and stretched."""
        normed = self.code_norm(x, mask)
        scale, shift = (half[:, None] for half in jnp.split(conditioning, 2, axis=-1))
        styled = normed * (1 + scale) + shift
        if lengths is None:
            return {"normed": normed, "aligned": styled[:, np.arange(frames) * x.shape[1] // frames]}
        real = frames_of(lengths)
        source = jnp.arange(frames)[None] * lengths[:, None] // jnp.maximum(real, 1)[:, None]
        stretched = jnp.take_along_axis(styled, jnp.minimum(source, x.shape[1] - 1)[..., None], axis=1)
        return {"normed": normed, "aligned": zero_padding(stretched, mask_of(real, frames))}

    def unconditioned(self, rows: int, frames: int) -> Array:
        """What stands in for `aligned` (b, t, d) where nothing is known of voice and text."""
        return jnp.broadcast_to(self.unconditioned_embedding[None, None], (rows, frames, self.config.width))

    def mel_of_aligned(self, aligned: Array) -> Array:
        """aligned (b, t, d) -> (b, t, m), a loss of upstream's training reads it."""
        return self.mel_head(aligned)

    def evaluate(self, x: Array, steps: Array, aligned: Array, mask: Array | None = None) -> dict[str, Any]:
        """One evaluation: x (b, t, m) in [-1, 1], trained steps (b,) int, aligned (b, t, d), mask (b, t) -> a dict.

        out (b, t, 2 m) float32: noise estimate, then variance value; 0 beyond the mask. And what is on the way: time
        (b, d), integrator and layers (layers, 2, b, t, d) after residual block and attention, inp_block,
        integrating_conv, tail (list).
        """
        b, t, _ = x.shape
        time = self.time_embed_2(nn.silu(self.time_embed_0(time_embedding(steps, self.config.width))))
        c, integrator = self.conditioning_timestep_integrator(aligned, time, mask)
        inp = self.inp_block(zero_padding(x, mask))
        both = jnp.concatenate([inp, c], axis=-1)
        h = integrated = self.integrating_conv(both.reshape(b * t, -1)).reshape(b, t, -1).astype(FLOAT32)
        h, layers = self.layers(h, time, mask)
        tail = []
        for block in self.tail:
            h = block(h, time, mask)
            tail.append(h)
        out = self.out_conv(zero_padding(nn.silu(self.out_norm(h, mask)), mask))
        return {
            "time": time, "integrator": integrator, "inp_block": inp, "integrating_conv": integrated, "layers": layers,
            "tail": tail, "out": zero_padding(out, mask),
        }  # fmt: skip

    def estimate(self, x: Array, steps: Array, aligned: Array, mask: Array | None = None) -> Array:
        """`out` (b, t, 2 m) of `evaluate` alone."""
        return self.evaluate(x, steps, aligned, mask)["out"]

    def __call__(self, x: Array, steps: Array, latents: Array, clips: Array, codes: Array) -> Array:
        """Reads every parameter once, to make them: all but `codes` (b, s) as in the other methods."""
        conditioning = self.condition(clips)
        aligned = self.align(latents, conditioning, x.shape[1])["aligned"]
        also = self.align_codes(codes, conditioning, x.shape[1])["aligned"]
        self.mel_of_aligned(also)
        return self.estimate(x, steps, aligned + self.unconditioned(*x.shape[:2]))
