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
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tortoise_jax.models.attention import by_heads
from tortoise_jax.models.blocks import REMAT, run_blocks, stacked

Array = jax.Array
LAYER_NORM_EPSILON = 1e-5
HIGHEST = jax.lax.Precision.HIGHEST  # float32 products as they are: by default TPUs take bf16 and NVIDIA cards TF32
HIGH = "high"  # between the two: TF32 on NVIDIA cards, as torch convolves there, three bf16 products on TPUs
FRAMES_PER_CODE = 4
ATTENTION_IMPLEMENTATIONS = ("plain", "by_heads", "xla", "cudnn")
TABLE_GRADIENTS = ("scatter", "products")
ADAPTERS = ("lora_a", "lora_b")  # of a product with weights, where there are some beside its kernel


@dataclasses.dataclass(frozen=True)
class Compute:
    """How the AR model is computed: speed and memory, not the function (dropout aside).

    dtype: activations and matrix products ("float32" or "bfloat16"); parameters and losses stay float32.
    remat: what the backward pass computes again: "none" of a block, all but its products with weights ("dots"), or all
    but its input ("full"); False and True mean the first and the last.
    unrolled: blocks follow each other in the program, which is fastest on CPU, or are a loop, which compiles fastest.
    attention: "plain" (einsum), "by_heads" (models/attention.py), or "xla" / "cudnn" of `jax.nn.dot_product_attention`;
    plain wherever attention drops, for the others know no dropout. "cudnn" is for the GPT blocks alone.
    table_gradient: of the embeddings' tables: "scatter" adds up rows, "products" multiplies with one-hot rows.
    """

    dtype: str = "float32"
    remat: str | bool = "none"
    unrolled: bool = False
    embed_dropout: float = 0.0
    residual_dropout: float = 0.0
    attention_dropout: float = 0.0
    attention: str = "plain"
    table_gradient: str = "scatter"

    def __post_init__(self) -> None:
        if isinstance(self.remat, bool):
            object.__setattr__(self, "remat", "full" if self.remat else "none")
        if self.remat not in REMAT:
            raise ValueError(f"remat is {self.remat!r}, expected one of {REMAT}")
        if self.attention not in ATTENTION_IMPLEMENTATIONS:
            raise ValueError(f"attention is {self.attention!r}, expected one of {ATTENTION_IMPLEMENTATIONS}")
        if self.table_gradient not in TABLE_GRADIENTS:
            raise ValueError(f"table_gradient is {self.table_gradient!r}, expected one of {TABLE_GRADIENTS}")

    @property
    def of_blocks(self) -> dict[str, Any]:
        """What `run_blocks` is told."""
        return {"remat": self.remat, "unrolled": self.unrolled}


class Embedding(nn.Embed):
    """Flax's, whose gradient can be had by products: summed in float32, and with no scatter.

    XLA's deterministic scatter sorts all numbers of the gradient on NVIDIA cards (2.4 million for 8 rows of 288
    positions), and adds bfloat16 up in bfloat16.
    """

    compute: Compute = Compute()

    def __call__(self, inputs: Array) -> Array:
        """indices (...) int32 -> their rows of the table (..., d)."""
        if self.compute.table_gradient == "scatter":
            return super().__call__(inputs)
        return rows_of(self.embedding, inputs, self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rows_of(table: Array, indices: Array, dtype: Any) -> Array:
    """table (n, d) float32, indices (...) -> (..., d)."""
    return jnp.take(table, indices, axis=0).astype(dtype)


def _rows_forward(table: Array, indices: Array, dtype: Any) -> tuple[Array, tuple[Array, int]]:
    return rows_of(table, indices, dtype), (indices, table.shape[0])


def _rows_backward(dtype: Any, kept: tuple[Array, int], gradient: Array) -> tuple[Array, None]:
    indices, size = kept
    picked = jax.nn.one_hot(indices, size, dtype=gradient.dtype)
    products = {"precision": HIGHEST, "preferred_element_type": jnp.float32}  # one-hot rows are exact in any precision
    return jnp.einsum("...n,...d->nd", picked, gradient, **products), None


rows_of.defvjp(_rows_forward, _rows_backward)


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
    if implementation == "by_heads" and drop is None and bias is None and mask is None:
        return by_heads(q, k, v, causal)
    if implementation in ("xla", "cudnn") and drop is None:
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


class Product(nn.Dense):
    """A dense layer, and (x a) b added where its parameters have a low-rank adapter: see lora.py."""

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (n, i) -> (n, o)
        out = super().__call__(x)
        if not self.has_variable("params", ADAPTERS[0]):
            return out
        a, b = (jnp.asarray(self.get_variable("params", name), self.dtype) for name in ADAPTERS)
        return out + x @ a @ b


class GPT2Attention(nn.Module):
    """Hugging Face's GPT2Attention: fused c_attn is [q | k | v] blocks, causal, no mask but that."""

    heads: int
    compute: Compute

    @nn.compact
    def __call__(self, x: Array, keys: Array | None, site: Array | int) -> Array:  # (b, s, d) -> (b, s, d)
        b, s, d = x.shape
        dtype = jnp.dtype(self.compute.dtype)
        qkv = Product(3 * d, dtype=dtype, name="c_attn")(x.reshape(b * s, d))
        q, k, v = (part.reshape(b, s, self.heads, d // self.heads) for part in jnp.split(qkv, 3, axis=-1))
        rate = self.compute.attention_dropout
        drop = None if keys is None or rate == 0.0 else lambda weights: dropout(weights, rate, keys, site)
        mixed = attend(q, k, v, causal=True, drop=drop, implementation=self.compute.attention)
        return Product(d, dtype=dtype, name="c_proj")(mixed.reshape(b * s, d)).reshape(b, s, d)


class GPT2MLP(nn.Module):
    compute: Compute

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b, s, d) -> (b, s, d)
        b, s, d = x.shape
        dtype = jnp.dtype(self.compute.dtype)
        wide = Product(4 * d, dtype=dtype, name="c_fc")(x.reshape(b * s, d))
        return Product(d, dtype=dtype, name="c_proj")(nn.gelu(wide, approximate=True)).reshape(b, s, d)


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
        if self.is_initializing():
            stack = stacked(GPT2Block, self.layers, in_axes=(0, nn.broadcast))
            x, every = stack(self.heads, self.compute, name="h")(x, jnp.arange(self.layers, dtype=jnp.int32), keys)
        else:
            block = GPT2Block(self.heads, self.compute, parent=None)
            run = lambda params, x, layer, keys: block.apply({"params": params}, x, layer, keys)[0]
            numbers = jnp.arange(self.layers, dtype=jnp.int32)
            of_rows = None if keys is None else jnp.broadcast_to(keys[None], (self.layers, *keys.shape))
            params: Any = self.get_variable("params", "h")
            x, every = run_blocks(run, params, x, numbers, of_rows, **self.compute.of_blocks)
        return layer_norm("ln_f", jnp.dtype(self.compute.dtype))(x), every


def group_count(channels: int) -> int:
    """Groups of upstream's group norm: 8 up to width 16, 16 up to 64, else 32; halved until they divide the width."""
    groups = 8 if channels <= 16 else 16 if channels <= 64 else 32
    while channels % groups:
        groups //= 2
    return groups


def group_norm(width: int, dtype: Any, name: str | None = None) -> nn.GroupNorm:
    return nn.GroupNorm(group_count(width), epsilon=LAYER_NORM_EPSILON, use_fast_variance=False, dtype=dtype, name=name)


class ConditioningAttention(nn.Module):
    """One block of the conditioning encoder: x + proj_out(attention(qkv(norm(x)))), over all frames, unmasked."""

    heads: int
    compute: Compute

    @nn.compact
    def __call__(self, x: Array, _: None) -> tuple[Array, None]:  # (b, t, d)
        b, t, d = x.shape
        dtype = jnp.dtype(self.compute.dtype)
        qkv = nn.Dense(3 * d, dtype=dtype, name="qkv")(group_norm(d, dtype, "norm")(x).reshape(b * t, d))
        # Interleaved per head: head 0's q, k, v, then head 1's.
        q, k, v = jnp.moveaxis(qkv.reshape(b, t, self.heads, 3, d // self.heads), 3, 0)
        # cuDNN trains on even lengths only, and six seconds are 517 frames.
        implementation = "xla" if self.compute.attention == "cudnn" else self.compute.attention
        mixed = attend(q, k, v, causal=False, implementation=implementation).reshape(b * t, d)
        return x + nn.Dense(d, dtype=dtype, name="proj_out")(mixed).reshape(b, t, d), None


def first_frame(params: Any, x: Array, heads: int, dtype: Any) -> Array:
    """What `ConditioningAttention` with these parameters gives for the first frame of x (b, t, d): (b, d).

    One query needs no key or value of any frame: a score is the frame times the query taken back through the keys'
    weights, and what is mixed are the frames, which then go through the values' weights. The keys' bias adds the same
    to all scores, and so nothing.
    """
    b, _, d = x.shape
    normed: Any = group_norm(d, dtype).apply({"params": params["norm"]}, x)
    of_queries, of_keys, of_values = jnp.moveaxis(params["qkv"]["kernel"].astype(dtype).reshape(d, heads, 3, -1), 2, 0)
    query_bias, _, value_bias = jnp.moveaxis(params["qkv"]["bias"].astype(dtype).reshape(heads, 3, -1), 1, 0)
    query = jnp.einsum("bd,dhk->bhk", normed[:, 0], of_queries) + query_bias[None]
    taken_back = jnp.einsum("bhk,dhk->bhd", query * query.shape[-1] ** -0.5, of_keys)
    scores = jnp.einsum("bhd,btd->bht", taken_back, normed, preferred_element_type=jnp.float32)
    mixed = jnp.einsum("bht,btd->bhd", jax.nn.softmax(scores, axis=-1).astype(dtype), normed)
    values = jnp.einsum("bhd,dhk->bhk", mixed, of_values) + value_bias[None]
    projected: Any = nn.Dense(d, dtype=dtype).apply({"params": params["proj_out"]}, values.reshape(b, d))
    return x[:, 0] + projected


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
        if self.is_initializing():
            stack = stacked(ConditioningAttention, self.layers)
            return stack(self.heads, self.compute, name="attn")(x, None)[0][:, 0]
        block = ConditioningAttention(self.heads, self.compute, parent=None)
        run = lambda params, x: block.apply({"params": params}, x, None)[0]
        params: Any = self.get_variable("params", "attn")
        whole, last = jax.tree.map(lambda leaf: leaf[:-1], params), jax.tree.map(lambda leaf: leaf[-1], params)
        x, _ = run_blocks(run, whole, x, **self.compute.of_blocks)
        return first_frame(last, x, self.heads, dtype)


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
