"""The AR model as a cached decoder: one new position per row and step, against the keys and values of earlier ones.

The same function as models/unified_voice.py (tests hold the two together), laid out for a few rows: activations are
(features, rows), weights (out, in), and the layers stand apart.

Axis letters beside those of layers.py: r prompts, c candidates of a prompt, b = r * c rows, p prompt positions,
s codes the cache has room for, n codes of one call of `decode`, v code table, o outputs of a product, i its inputs.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from tortoise_jax import parallel
from tortoise_jax.models.layers import LAYER_NORM_EPSILON, Array
from tortoise_jax.models.unified_voice import UnifiedVoiceConfig
from tortoise_jax.synthesis.logits import draw, penalise

Tree = Any
Leaf = Any  # an array: numpy on the host, jax's on the devices

TABLES = ("text_embedding", "text_pos_embedding", "mel_embedding", "mel_pos_embedding")
PROMPT_CODE = 1  # tortoise fills the prompt of its sampler with it, so the repetition penalty covers it


# --- weights ----------------------------------------------------------------------------------------------------------


@flax.struct.dataclass
class Linear:
    """weight (o, i) and bias (o, 1), in the dtype of the computation."""

    weight: Array
    bias: Array


@flax.struct.dataclass
class Norm:
    """A layer norm's scale (i, 1) and bias (i, 1), float32."""

    scale: Array
    bias: Array


@flax.struct.dataclass
class BlockWeights:
    """One GPT-2 block, named after its torch keys.

    o and i: 3 d and d of c_attn, d and d of attn_proj, 4 d and d of c_fc, d and 4 d of mlp_proj.
    """

    ln_1: Norm
    c_attn: Linear
    attn_proj: Linear
    ln_2: Norm
    c_fc: Linear
    mlp_proj: Linear


@flax.struct.dataclass
class DecoderWeights:
    """All that synthesis reads of an AR model once it has a voice: neither conditioning encoder nor the text's head.

    Tables (rows, d); the blocks, the last norms, the head of codes.
    """

    text_embedding: Array
    text_pos_embedding: Array
    mel_embedding: Array
    mel_pos_embedding: Array
    blocks: list[BlockWeights]
    ln_f: Norm
    final_norm: Norm
    mel_head: Linear

    @property
    def dtype(self) -> str:
        """Of the computation."""
        return str(self.mel_embedding.dtype)

    @classmethod
    def of(cls, params: Tree, config: UnifiedVoiceConfig, dtype: str = "auto") -> DecoderWeights:
        """The AR model's parameter tree, layers stacked -> the same for the decoder, on every local device.

        Weights become (out, in), to be multiplied by activations (in, rows) from the right: on CPU that is twice to
        three times as fast for a few rows as any other order, elsewhere no order matters. Layers come apart, because a
        loop over stacked layers copies each layer's weights before it uses them. One product comes after another, so
        that the devices never hold two copies of the model.
        """
        dtype = parallel.best_dtype() if dtype == "auto" else dtype
        put = parallel.on_every_device
        gpt = params["gpt"]["h"]
        of_layers = {
            "ln_1": _norms(put(gpt["ln_1"])),
            "c_attn": _linears(put(gpt["attn"]["c_attn"]), dtype),
            "attn_proj": _linears(put(gpt["attn"]["c_proj"]), dtype),
            "ln_2": _norms(put(gpt["ln_2"])),
            "c_fc": _linears(put(gpt["mlp"]["c_fc"]), dtype),
            "mlp_proj": _linears(put(gpt["mlp"]["c_proj"]), dtype),
        }
        return cls(
            **{name: _table(put(params[name]["embedding"]), dtype) for name in TABLES},
            blocks=[BlockWeights(**{name: each[i] for name, each in of_layers.items()}) for i in range(config.layers)],
            ln_f=_norm(put(params["gpt"]["ln_f"])),
            final_norm=_norm(put(params["final_norm"])),
            mel_head=_linear(put(params["mel_head"]), dtype),
        )


# Compiled, they leave their results where their arguments are: on every device.


@functools.partial(jax.jit, static_argnums=1)
def _linear(product: Tree, dtype: str) -> Linear:
    """kernel (i, o), bias (o,)."""
    return Linear(product["kernel"].T.astype(dtype), product["bias"][:, None].astype(dtype))


@functools.partial(jax.jit, static_argnums=1)
def _linears(products: Tree, dtype: str) -> list[Linear]:
    """kernel (l, i, o), bias (l, o)."""
    return [_linear(jax.tree.map(lambda leaf, i=i: leaf[i], products), dtype) for i in range(len(products["bias"]))]


@jax.jit
def _norm(norm: Tree) -> Norm:
    """scale and bias (i,)."""
    return Norm(norm["scale"][:, None], norm["bias"][:, None])


@jax.jit
def _norms(norms: Tree) -> list[Norm]:
    """scale and bias (l, i)."""
    return [_norm(jax.tree.map(lambda leaf, i=i: leaf[i], norms)) for i in range(len(norms["bias"]))]


@functools.partial(jax.jit, static_argnums=1)
def _table(table: Array, dtype: str) -> Array:
    return table.astype(dtype)


# --- the cache, the state, the controls -------------------------------------------------------------------------------


@flax.struct.dataclass
class KeysAndValues:
    """Of one layer, for some rows and positions: keys and values (rows, h, positions, k)."""

    keys: Array
    values: Array

    @property
    def positions(self) -> int:
        return self.keys.shape[2]

    def write(self, new: KeysAndValues, index: Array) -> KeysAndValues:
        """The same with `new` in place of what stands from position `index` on."""
        zero = jnp.zeros_like(index)
        put = lambda old, new: jax.lax.dynamic_update_slice(old, new, (zero, zero, index, zero))
        return KeysAndValues(put(self.keys, new.keys), put(self.values, new.values))


Cache = list[KeysAndValues]  # one per layer


def empty_cache(config: UnifiedVoiceConfig, rows: int, positions: int, dtype: str) -> Cache:
    """Zeros: keys and values (rows, h, positions, k) of every layer."""
    shape = (rows, config.heads, positions, config.width // config.heads)
    return [KeysAndValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.layers)]


def write_cache(index: Array, cache: Cache, new: Cache) -> Cache:
    """The cache with the keys and values of a finished call, of prompts, or of a shorter cache, from `index` on."""
    return [old.write(layer, index) for old, layer in zip(cache, new, strict=True)]


@flax.struct.dataclass
class State:
    """Where each of b rows is.

    keys (b, 2) uint32: the row's PRNG key. token (b,) int32: the code to be read next. codes (b, max_codes) int32: what
    was drawn, then stop tokens. seen (b, v) bool: what the repetition penalty covers. stopped (b,) bool: whether the
    stop was drawn. log_likelihood (b,) float32: the sum over codes and stop, of the model's own distribution.
    """

    keys: Leaf
    token: Leaf
    codes: Leaf
    seen: Leaf
    stopped: Leaf
    log_likelihood: Leaf

    @classmethod
    def start(cls, config: UnifiedVoiceConfig, keys: np.ndarray, max_codes: int) -> State:
        """Nothing drawn yet: the start token is to be read; it and code 1 count as seen. keys (b, 2) uint32."""
        b = len(keys)
        seen = np.zeros((b, config.mel_tokens), bool)
        seen[:, [PROMPT_CODE, config.start_mel]] = True
        return cls(
            keys=keys,
            token=np.full(b, config.start_mel, np.int32),
            codes=np.full((b, max_codes), config.stop_mel, np.int32),
            seen=seen,
            stopped=np.zeros(b, bool),
            log_likelihood=np.zeros(b, np.float32),
        )


@flax.struct.dataclass
class Controls:
    """What changes between calls without compiling anew, all scalars.

    first, end: int32, which codes to draw. temperature, repetition_penalty, tail (1 - top_p): float32.
    start_inside: bool, whether the start token may be drawn.
    """

    first: Leaf
    end: Leaf
    temperature: Leaf
    tail: Leaf
    repetition_penalty: Leaf
    start_inside: Leaf


# --- one step ---------------------------------------------------------------------------------------------------------


def normalise(x: Array, norm: Norm) -> Array:
    """Layer norm over the features of x (d, b), in float32."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(axis=0, keepdims=True)
    variance = jnp.square(centred).mean(axis=0, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + LAYER_NORM_EPSILON) * norm.scale + norm.bias).astype(x.dtype)


def product(linear: Linear, x: Array) -> Array:
    """x (i, b) -> (o, b)."""
    return linear.weight @ x + linear.bias


def attend_cached(
    q: Array, prompt: KeysAndValues | None, cache: KeysAndValues, recent: KeysAndValues, allowed: Array
) -> Array:
    """q (b, h, k) over r prompts of p positions, and b rows' s earlier and n recent codes -> (b, h, k).

    allowed (b, p + s + n) bool: which of these positions count. Candidates of a prompt read its keys once, as one
    product. Without a prompt p is 0.
    """
    b, h, k = q.shape
    s = cache.positions
    r, p = (len(prompt.keys), prompt.positions) if prompt else (0, 0)
    by_prompt = lambda x: x.reshape(r, -1, h, x.shape[-1])
    scores = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    q = q * k**-0.5
    found = [scores("bhk,bhsk->bhs", q, codes.keys) for codes in (cache, recent)]
    if prompt:
        found.insert(0, scores("rchk,rhpk->rchp", by_prompt(q), prompt.keys).reshape(b, h, p))
    lowest = jnp.finfo(jnp.float32).min
    weights = jax.nn.softmax(jnp.where(allowed[:, None], jnp.concatenate(found, axis=-1), lowest)).astype(q.dtype)
    shares = ((weights[..., p : p + s], cache), (weights[..., p + s :], recent))
    mixed = [jnp.einsum("bhs,bhsk->bhk", share, codes.values) for share, codes in shares]
    if prompt:
        of_prompt = jnp.einsum("rchp,rhpk->rchk", by_prompt(weights[..., :p]), prompt.values)
        mixed.insert(0, of_prompt.reshape(b, h, k))
    return sum(mixed[1:], mixed[0])


def block(
    weights: BlockWeights,
    x: Array,
    prompt: KeysAndValues | None,
    cache: KeysAndValues,
    recent: KeysAndValues,
    allowed: Array,
    index: Array,
    heads: int,
) -> tuple[Array, KeysAndValues]:
    """One GPT-2 block for one new position per row, the index-th of `recent`, to which its key and value are added.

    x (d, b) -> (d, b); the rest as in `attend_cached`.
    """
    d, b = x.shape
    qkv = product(weights.c_attn, normalise(x, weights.ln_1))
    q, k, v = qkv.reshape(3, heads, d // heads, b).transpose(0, 3, 1, 2)  # three of (b, h, k)
    recent = recent.write(KeysAndValues(k[:, :, None], v[:, :, None]), index)
    mixed = attend_cached(q, prompt, cache, recent, allowed)
    x = x + product(weights.attn_proj, mixed.reshape(b, d).T)
    wide = nn.gelu(product(weights.c_fc, normalise(x, weights.ln_2)), approximate=True)
    return x + product(weights.mlp_proj, wide), recent


# --- the loop ---------------------------------------------------------------------------------------------------------


def decode(
    weights: DecoderWeights,
    controls: Controls,
    prompts: Cache,
    cache: Cache,
    readable: Array,
    state: State,
    *,
    config: UnifiedVoiceConfig,
    top_k: int,
    greedy: bool,
    longest: int,
) -> tuple[State, Cache]:
    """Draws codes number controls.first up to controls.end, at most `longest`, or until all rows have stopped.

    prompts: keys and values (r, h, p, k) of each layer, none where the cache has them; cache: of the codes before
    `first` (b, h, s, k); readable (b, p + s) bool: which positions of the two are filled. greedy: the likeliest code,
    nothing is drawn.

    Returns the state, and the keys and values (b, h, longest, k) of these codes for `write_cache`. They are apart from
    the cache because a compiled loop may copy at every step what it changes; the cache it only reads.
    """
    keys = jax.random.wrap_key_data(state.keys.reshape(-1, state.keys.shape[-1]))
    first, absent = controls.first, [None] * len(weights.blocks)
    blank = jax.tree.map(lambda x: jnp.zeros((*x.shape[:2], longest, x.shape[3]), x.dtype), cache)

    def unfinished(carry: tuple[Array, State, Cache]) -> Array:
        step, state, _ = carry
        return (step < controls.end) & ~jnp.all(state.stopped)

    def one_code(carry: tuple[Array, State, Cache]) -> tuple[Array, State, Cache]:
        step, state, recent = carry
        x = (weights.mel_embedding[state.token] + weights.mel_pos_embedding[step][None]).T
        so_far = jnp.broadcast_to(jnp.arange(longest) <= step - first, (len(readable), longest))
        allowed = jnp.concatenate([readable, so_far], axis=1)
        grown = []
        for layer, prompt, old, new in zip(weights.blocks, prompts or absent, cache, recent, strict=True):
            x, new = block(layer, x, prompt, old, new, allowed, step - first, config.heads)
            grown.append(new)
        hidden = normalise(normalise(x, weights.ln_f), weights.final_norm)
        logits = product(weights.mel_head, hidden).astype(jnp.float32).T
        penalised = penalise(logits, state.seen, controls.repetition_penalty)
        start = jnp.where(controls.start_inside, penalised[:, config.start_mel], -jnp.inf)
        penalised = penalised.at[:, config.start_mel].set(start)
        if greedy:
            drawn = jnp.argmax(penalised, axis=-1).astype(jnp.int32)
        else:
            step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
            drawn = draw(step_keys, penalised, controls.temperature, top_k, controls.tail)
        drawn = jnp.where(state.stopped, config.stop_mel, drawn)
        likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits), drawn[:, None], axis=1)[:, 0]
        rows = jnp.arange(len(drawn))
        state = dataclasses.replace(
            state,
            token=drawn,
            codes=jax.lax.dynamic_update_slice(state.codes, drawn[:, None], (jnp.zeros_like(step), step)),
            seen=state.seen.at[rows, drawn].set(True),
            stopped=state.stopped | (drawn == config.stop_mel),
            log_likelihood=state.log_likelihood + jnp.where(state.stopped, 0.0, likelihood),
        )
        return step + 1, state, grown

    _, state, recent = jax.lax.while_loop(unfinished, one_code, (first, state, blank))
    return state, recent
