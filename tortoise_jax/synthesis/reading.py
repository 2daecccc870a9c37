"""Whole rows read by the AR model: prompts for the decoder, and finished codes for what makes sound of them.

This is the training forward with the decoder's weights, so that synthesis holds the model once. One program is called
for each layer: a program of all layers would compile for long, and a loop over them within a program would need them
stacked, which is a copy.

Axis letters beside those of layers.py: p positions of a prompt.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tortoise_jax import parallel
from tortoise_jax.models.layers import Array, Compute, GPT2Block, layer_norm
from tortoise_jax.models.unified_voice import UnifiedVoice, UnifiedVoiceConfig
from tortoise_jax.synthesis.decoder import TABLES, BlockWeights, Cache, DecoderWeights, KeysAndValues, Linear, Norm

Tree = Any


def read_prompts(weights: DecoderWeights, config: UnifiedVoiceConfig, *rows: Array) -> Cache:
    """Rows of prompts (see `embed`), shared out over the devices -> keys and values (b, h, p, k) of every layer."""
    x = _embed(config)(tables_of(weights), *rows)
    found = []
    for layer in weights.blocks:
        x, keys_and_values = _read_layer(config)(layer, x)
        found.append(keys_and_values)
    return found


def read_codes(weights: DecoderWeights, config: UnifiedVoiceConfig, *rows: Array) -> Array:
    """Rows of prompts and codes (see `embed`), shared out over the devices -> hidden states (b, s, d) float32."""
    x = _embed(config)(tables_of(weights), *rows)
    for layer in weights.blocks:
        x, _ = _read_layer(config)(layer, x)
    return _normalise()([weights.ln_f, weights.final_norm], x)


def tables_of(weights: DecoderWeights) -> Tree:
    return {name: {"embedding": getattr(weights, name)} for name in TABLES}


# --- the programs -----------------------------------------------------------------------------------------------------


@functools.cache
def _embed(config: UnifiedVoiceConfig) -> Callable[..., Any]:
    return parallel.by_rows(functools.partial(embed, config=config), replicated=1, sharded=4)


@functools.cache
def _read_layer(config: UnifiedVoiceConfig) -> Callable[..., Any]:
    return parallel.by_rows(functools.partial(read_layer, heads=config.heads), replicated=1, sharded=1)


@functools.cache
def _normalise() -> Callable[..., Any]:
    return parallel.by_rows(normalise, replicated=1, sharded=1)


def embed(
    tables: Tree,
    conditioning: Array,
    tokens: Array,
    token_types: Array,
    positions: Array,
    *,
    config: UnifiedVoiceConfig,
) -> Array:
    """conditioning (b, n, d); tokens, token_types, positions (b, s) int32 -> (b, s, d), see `UnifiedVoice.embed`."""
    model = UnifiedVoice(config, Compute(dtype=str(tables["mel_embedding"]["embedding"].dtype)))
    embedded: Any = model.apply({"params": tables}, conditioning, tokens, token_types, positions, method="embed")
    return embedded


def read_layer(weights: BlockWeights, x: Array, *, heads: int) -> tuple[Array, KeysAndValues]:
    """One layer: x (b, s, d) -> (b, s, d), and its keys and values (b, h, s, k)."""
    b, s, d = x.shape
    params = block_params(weights)
    out: Any = GPT2Block(heads, Compute(dtype=str(x.dtype))).apply({"params": params}, x, jnp.int32(0), None)
    # What the block computes within; the compiler computes it once.
    normed: Any = layer_norm("ln_1", x.dtype).apply({"params": params["ln_1"]}, x)
    qkv: Any = nn.Dense(3 * d, dtype=x.dtype).apply({"params": params["attn"]["c_attn"]}, normed.reshape(b * s, d))
    keys, values = qkv[:, d:].reshape(b, s, 2, heads, d // heads).transpose(2, 0, 3, 1, 4)
    return out[0], KeysAndValues(keys, values)


def normalise(norms: list[Norm], x: Array) -> Array:
    """The layer norms after the last block, one after another: x (b, s, d) -> (b, s, d) float32."""
    for norm in norms:
        x = layer_norm("norm", x.dtype).apply({"params": norm_params(norm)}, x)  # type: ignore[assignment]
    return x.astype(jnp.float32)


# --- a block's weights as Flax has them, the inverse of `DecoderWeights.of` -------------------------------------------


def block_params(weights: BlockWeights) -> Tree:
    return {
        "ln_1": norm_params(weights.ln_1),
        "attn": {"c_attn": linear_params(weights.c_attn), "c_proj": linear_params(weights.attn_proj)},
        "ln_2": norm_params(weights.ln_2),
        "mlp": {"c_fc": linear_params(weights.c_fc), "c_proj": linear_params(weights.mlp_proj)},
    }


def linear_params(linear: Linear) -> Tree:
    return {"kernel": linear.weight.T, "bias": linear.bias[:, 0]}


def norm_params(norm: Norm) -> Tree:
    return jax.tree.map(lambda leaf: leaf[:, 0], {"scale": norm.scale, "bias": norm.bias})
