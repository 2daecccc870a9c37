"""The building blocks that models share: attention, GPT-2 blocks, residual convolutions, norms, dropout.

Axis letters, everywhere in this package:
  b rows of a batch   s positions of the joined sequence   t mel frames   m mel bands
  d model width       h heads   k width of a head
  n vectors of the conditioning prefix                      u clips that a row's conditioning is the mean of
Matrix products run on (rows, features): a 3-D product makes XLA transpose its output gradient on CPU, a reshape costs
nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array
LAYER_NORM_EPSILON = 1e-5
HIGHEST = jax.lax.Precision.HIGHEST  # float32 products as they are: by default TPUs take bf16 and NVIDIA cards TF32
HIGH = "high"  # between the two: TF32 on NVIDIA cards, as torch convolves there, three bf16 products on TPUs
FRAMES_PER_CODE = 4
ATTENTION_IMPLEMENTATIONS = ("plain", "xla", "cudnn")


@dataclasses.dataclass(frozen=True)
class Compute:
    """How the AR model is computed: speed and memory, not the function (dropout aside).

    dtype: activations and matrix products ("float32" or "bfloat16"); parameters and losses stay float32.
    remat: recompute each block in the backward pass instead of keeping its activations.
    unroll: layers a compiled loop step holds; 1 compiles fastest, the number of layers runs fastest on CPU.
    attention: "plain" (einsum), or "xla" / "cudnn" of `jax.nn.dot_product_attention`, which know no dropout; "cudnn" is
    for the GPT blocks alone.
    """

    dtype: str = "float32"
    remat: bool = False
    unroll: int = 1
    embed_dropout: float = 0.0
    residual_dropout: float = 0.0
    attention_dropout: float = 0.0
    attention: str = "plain"

    def __post_init__(self) -> None:
        if self.attention not in ATTENTION_IMPLEMENTATIONS:
            raise ValueError(f"attention is {self.attention!r}, expected one of {ATTENTION_IMPLEMENTATIONS}")


def dropout(x: Array, rate: float, keys: Array | None, site: Array | int) -> Array:
    """Drops elements of x (b, ...) with one key per row, so that a row's draw does not depend on where it is computed.

    keys (b,) typed PRNG keys, or None for no dropout; site: which dropout of the network this is.
    """
    if keys is None or rate == 0.0:
        return x
    keep = 1.0 - rate
    draw = lambda key: jax.random.bernoulli(jax.random.fold_in(key, site), keep, x.shape[1:])
    return jnp.where(jax.vmap(draw)(keys), x / keep, jnp.zeros_like(x))


def attend(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool,
    drop: Any = None,
    implementation: str = "plain",
    bias: Array | None = None,
    mask: Array | None = None,
) -> Array:
    """Softmax attention of q, k, v (b, s, h, k) -> (b, s, h, k); drop(weights (b, h, s, s)) -> weights.

    bias: added to the scaled scores, (b or 1, h, s, s). mask (b, s): the keys that may be read.
    """
    if implementation != "plain" and drop is None:
        kernel: Any = implementation
        keys = None if mask is None else mask[:, None, None]
        added = None if bias is None else bias.astype(q.dtype)
        return jax.nn.dot_product_attention(q, k, v, added, keys, is_causal=causal, implementation=kernel)
    scores = jnp.einsum("bqhk,bshk->bhqs", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    if bias is not None:
        scores = scores + bias
    if causal:
        allowed = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        scores = jnp.where(allowed, scores, jnp.finfo(scores.dtype).min)
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    if drop is not None:
        weights = drop(weights)
    return jnp.einsum("bhqs,bshk->bqhk", weights, v)


def layer_norm(name: str, dtype: Any) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=LAYER_NORM_EPSILON, use_fast_variance=False, dtype=dtype, name=name)


class GPT2Attention(nn.Module):
    """Hugging Face's GPT2Attention: fused c_attn is [q | k | v] blocks, causal, no mask but that."""

    heads: int
    compute: Compute

    @nn.compact
    def __call__(self, x: Array, keys: Array | None, site: Array | int) -> Array:  # (b, s, d) -> (b, s, d)
        b, s, d = x.shape
        dtype = jnp.dtype(self.compute.dtype)
        qkv = nn.Dense(3 * d, dtype=dtype, name="c_attn")(x.reshape(b * s, d))
        q, k, v = (part.reshape(b, s, self.heads, d // self.heads) for part in jnp.split(qkv, 3, axis=-1))
        rate = self.compute.attention_dropout
        drop = None if keys is None or rate == 0.0 else lambda weights: dropout(weights, rate, keys, site)
        mixed = attend(q, k, v, causal=True, drop=drop, implementation=self.compute.attention)
        return nn.Dense(d, dtype=dtype, name="c_proj")(mixed.reshape(b * s, d)).reshape(b, s, d)


class GPT2MLP(nn.Module):
    compute: Compute

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b, s, d) -> (b, s, d)
        b, s, d = x.shape
        dtype = jnp.dtype(self.compute.dtype)
        wide = nn.Dense(4 * d, dtype=dtype, name="c_fc")(x.reshape(b * s, d))
        return nn.Dense(d, dtype=dtype, name="c_proj")(nn.gelu(wide, approximate=True)).reshape(b, s, d)


DROPOUT_SITES_PER_BLOCK = 3


class GPT2Block(nn.Module):
    """Pre-norm block: x + attention(ln_1(x)), then x + mlp(ln_2(x)). `layer` numbers the dropout draws."""

    heads: int
    compute: Compute

    @nn.compact
    def __call__(self, x: Array, layer: Array, keys: Array | None) -> tuple[Array, Array]:
        dtype = jnp.dtype(self.compute.dtype)
        rate = self.compute.residual_dropout
        site = 1 + DROPOUT_SITES_PER_BLOCK * layer  # site 0 is the embedding's
        attention = GPT2Attention(self.heads, self.compute, name="attn")
        x = x + dropout(attention(layer_norm("ln_1", dtype)(x), keys, site), rate, keys, site + 1)
        x = x + dropout(GPT2MLP(self.compute, name="mlp")(layer_norm("ln_2", dtype)(x)), rate, keys, site + 2)
        return x, x


class GPT2(nn.Module):
    """Hugging Face's GPT2Model without token and position tables: the blocks, then its own `ln_f`."""

    layers: int
    heads: int
    compute: Compute

    @nn.compact
    def __call__(self, x: Array, keys: Array | None) -> tuple[Array, Array]:
        """x (b, s, d) -> (normed x (b, s, d), the output of every block (layers, b, s, d))."""
        x = dropout(x, self.compute.embed_dropout, keys, 0)
        block = nn.remat(GPT2Block, prevent_cse=False) if self.compute.remat else GPT2Block
        blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=self.layers,
            unroll=min(self.compute.unroll, self.layers),
        )(self.heads, self.compute, name="h")
        x, every = blocks(x, jnp.arange(self.layers, dtype=jnp.int32), keys)
        return layer_norm("ln_f", jnp.dtype(self.compute.dtype))(x), every


def group_count(channels: int) -> int:
    """Groups of upstream's group norm: 8 up to width 16, 16 up to 64, else 32; halved until they divide the width."""
    groups = 8 if channels <= 16 else 16 if channels <= 64 else 32
    while channels % groups:
        groups //= 2
    return groups


class ConditioningAttention(nn.Module):
    """One block of the conditioning encoder: x + proj_out(attention(qkv(norm(x)))), over all frames, unmasked."""

    heads: int
    compute: Compute

    @nn.compact
    def __call__(self, x: Array, _: None) -> tuple[Array, None]:  # (b, t, d)
        b, t, d = x.shape
        dtype = jnp.dtype(self.compute.dtype)
        norm = nn.GroupNorm(
            group_count(d), epsilon=LAYER_NORM_EPSILON, use_fast_variance=False, dtype=dtype, name="norm"
        )
        qkv = nn.Dense(3 * d, dtype=dtype, name="qkv")(norm(x).reshape(b * t, d))
        # Interleaved per head: head 0's q, k, v, then head 1's.
        q, k, v = jnp.moveaxis(qkv.reshape(b, t, self.heads, 3, d // self.heads), 3, 0)
        # cuDNN trains on even lengths only, and six seconds are 517 frames.
        implementation = "plain" if self.compute.attention == "cudnn" else self.compute.attention
        mixed = attend(q, k, v, causal=False, implementation=implementation).reshape(b * t, d)
        return x + nn.Dense(d, dtype=dtype, name="proj_out")(mixed).reshape(b, t, d), None


class ConditioningEncoder(nn.Module):
    """Mel of a clip -> one vector: the first frame after six attention blocks (upstream reads no other)."""

    width: int
    layers: int
    heads: int
    compute: Compute

    @nn.compact
    def __call__(self, mel: Array) -> Array:  # (b, t, m) -> (b, d)
        b, t, m = mel.shape
        dtype = jnp.dtype(self.compute.dtype)
        x = nn.Dense(self.width, dtype=dtype, name="init")(mel.reshape(b * t, m)).reshape(b, t, self.width)
        block = nn.remat(ConditioningAttention, prevent_cse=False) if self.compute.remat else ConditioningAttention
        blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.layers,
            unroll=min(self.compute.unroll, self.layers),
        )(self.heads, self.compute, name="attn")
        x, _ = blocks(x, None)
        return x[:, 0]


class ResidualBlock(nn.Module):
    """The dVAE's block: x + conv1(relu(conv3(relu(conv3(x))))), named after the torch keys net.0, net.2, net.4."""

    width: int
    precision: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b, t, c) -> (b, t, c)
        hidden = nn.relu(nn.Conv(self.width, (3,), padding=1, precision=self.precision, name="net_0")(x))
        hidden = nn.relu(nn.Conv(self.width, (3,), padding=1, precision=self.precision, name="net_2")(hidden))
        return x + nn.Conv(self.width, (1,), precision=self.precision, name="net_4")(hidden)


def frames_of(codes: Any) -> Any:
    """Mel frames at 24 kHz that so many codes (a number or an array of them) become: four a code at 22.05 kHz."""
    return codes * FRAMES_PER_CODE * 24000 // 22050


def codes_of(frames: int) -> int:
    """The fewest codes that become so many frames."""
    return -(-frames * 22050 // (FRAMES_PER_CODE * 24000))


def zero_padding(x: Array, mask: Array | None) -> Array:
    """x (b, t, c) with zeros where the mask (b, t) is False, as a convolution must see it; x itself without a mask."""
    return x if mask is None else jnp.where(mask[..., None], x, jnp.zeros_like(x))


def mask_of(lengths: Array | None, length: int) -> Array | None:
    """lengths (b,) of what is real -> mask (b, length); None where all is."""
    return None if lengths is None else jnp.arange(length)[None] < lengths[:, None]
