"""From logits to the next code: repetition penalty, temperature, top-k, top-p, in that order, as Hugging Face does.

Axis letters: b rows, v entries of the code table, c entries looked at, likeliest first.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tortoise_jax.models.layers import Array

# How many entries beyond top_k are ranked, so that ties with the last of them are kept, as Hugging Face keeps them. Of
# more ties than that (half precision could make them) those that stand last in the table are kept: ranking all of it
# would take 25 ms per code for 16 rows on two CPU cores, where the first 64 take 0.5 ms.
TIES = 14


def penalise(logits: Array, seen: Array, penalty: Array | float) -> Array:
    """Logits (b, v) of entries that were seen (b, v) bool: divided by the penalty where positive, else multiplied."""
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def rank(logits: Array, count: int) -> tuple[Array, Array]:
    """The `count` largest of logits (b, v), largest first, and their indices, (b, c) each.

    Of equal logits the one that stands later comes first: the reverse of the stable ascending sort of Hugging Face's
    top-p, which drops the earlier of two equals first.
    """
    values, reversed_indices = jax.lax.top_k(logits[:, ::-1], count)
    return values, logits.shape[1] - 1 - reversed_indices


def keep(ranked: Array, top_k: int, tail: Array | float) -> Array:
    """Ranked logits (b, c) with -inf for what top-k and then top-p remove; tail is 1 - top_p.

    Top-k keeps all that equal the k-th. Top-p removes the least likely whose probabilities add up to no more than the
    tail; the likeliest always stays. A top_k of 0 and a tail of 0 remove nothing.
    """
    if 0 < top_k < ranked.shape[1]:
        ranked = jnp.where(ranked < ranked[:, top_k - 1, None], -jnp.inf, ranked)
    mass = jnp.cumsum(jax.nn.softmax(ranked)[:, ::-1], axis=1)[:, ::-1]
    tail = jnp.asarray(tail, jnp.float32)
    removed = ((mass <= tail) & (tail > 0)).at[:, 0].set(False)
    return jnp.where(removed, -jnp.inf, ranked)


def draw(keys: Array, logits: Array, temperature: Array | float, top_k: int, tail: Array | float) -> Array:
    """One code per row (b,) int32 of penalised logits (b, v), drawn with its own key (b,); tail is 1 - top_p."""
    scaled = logits / temperature
    table = logits.shape[1]
    ranked, codes = rank(scaled, min(top_k + TIES, table) if top_k else table)
    # The barrier keeps XLA from merging the slice in `keep` into the top-k, which it would then no longer recognise and
    # replace by a sort of the whole table.
    ranked, codes = jax.lax.optimization_barrier((ranked, codes))
    drawn = jax.vmap(jax.random.categorical)(keys, keep(ranked, top_k, tail))
    return jnp.take_along_axis(codes, drawn[:, None], axis=1)[:, 0].astype(jnp.int32)
