"""Softmax attention one head of one row at a time: on CPU a third of the plain one's time or less, and no scores kept.

A head's scores stay in the cache of a core from their product to the mixing. Axis letters as in layers.py, and:
g heads of all rows, one after the other   s queries, which are as many as keys
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def by_heads(q: Array, k: Array, v: Array, causal: bool) -> Array:
    """q, k, v (b, s, h, k) -> (b, s, h, k), as `layers.attend` without anything but `causal`."""
    return _by_heads(q, k, v, causal)[0]


def _by_heads(q: Array, k: Array, v: Array, causal: bool) -> tuple[Array, Any]:
    def one(head: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        scores = scores_of(head[0], head[1], causal)
        total = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
        return jnp.exp(scores - total).astype(v.dtype) @ head[2], total

    mixed, totals = jax.lax.map(one, jax.tree.map(apart, (q, k, v)))
    mixed = together(mixed, len(q))
    return mixed, (q, k, v, mixed, totals)


def _by_heads_backward(causal: bool, kept: tuple[Array, ...], gradient: Array) -> tuple[Array, Array, Array]:
    *arrays, totals = kept

    def one(head: tuple[Array, ...]) -> tuple[Array, Array, Array]:
        q, k, v, mixed, gradient, total = head
        weights = jnp.exp(scores_of(q, k, causal) - total)
        of_weights = jnp.matmul(gradient, v.T, preferred_element_type=jnp.float32)
        mean = jnp.sum((gradient * mixed).astype(jnp.float32), axis=-1, keepdims=True)
        of_scores = (weights * (of_weights - mean) * q.shape[-1] ** -0.5).astype(q.dtype)
        return of_scores @ k, of_scores.T @ q, weights.astype(v.dtype).T @ gradient

    found = jax.lax.map(one, (*map(apart, (*arrays, gradient)), totals))
    of_q, of_k, of_v = (together(one, len(gradient)) for one in found)
    return of_q, of_k, of_v


by_heads.defvjp(_by_heads, _by_heads_backward)


def scores_of(q: Array, k: Array, causal: bool) -> Array:
    """Scaled products of q and k, (s, k) each, in float32 (s, s)."""
    scores = jnp.matmul(q * q.shape[-1] ** -0.5, k.T, preferred_element_type=jnp.float32)
    if not causal:
        return scores
    return jnp.where(jnp.tril(jnp.ones(scores.shape, bool)), scores, jnp.finfo(scores.dtype).min)


def apart(x: Array) -> Array:
    """(b, s, h, k) -> (g, s, k)."""
    b, s, h, k = x.shape
    return x.transpose(0, 2, 1, 3).reshape(b * h, s, k)


def together(x: Array, b: int) -> Array:
    """The inverse of `apart`."""
    g, s, k = x.shape
    return x.reshape(b, g // b, s, k).transpose(0, 2, 1, 3)
