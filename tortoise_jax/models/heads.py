"""The AR model's heads: logits over a table, and cross-entropies without keeping the logits of all rows.

Axis letters as in layers.py, and: n rows of hidden states   v size of a table
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tortoise_jax.models.layers import Array

ROWS = 1024  # whose logits exist at a time


def logits_of(hidden: Array, kernel: Array, bias: Array, dtype: Any) -> Array:
    """hidden (n, d), kernel (d, v), bias (v,) -> logits (n, v), added up in float32 whatever `dtype` they come from."""
    products = jnp.matmul(hidden.astype(dtype), kernel.astype(dtype), preferred_element_type=jnp.float32)
    return products + bias[None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropies(hidden: Array, kernel: Array, bias: Array, targets: Array, dtype: Any) -> Array:
    """hidden (n, d), targets (n,) in [0, v) -> negative log-likelihoods (n,) float32 under `logits_of`.

    The logits of at most ROWS rows exist at a time; the backward pass computes them again.
    """
    return _cross_entropies(hidden, kernel, bias, targets, dtype)[0]


def _cross_entropies(hidden: Array, kernel: Array, bias: Array, targets: Array, dtype: Any) -> tuple[Array, Any]:
    def some(rows: tuple[Array, Array]) -> tuple[Array, Array]:
        logits = logits_of(rows[0], kernel, bias, dtype)
        total = jax.nn.logsumexp(logits, axis=-1)
        return total - jnp.take_along_axis(logits, rows[1][:, None], axis=-1)[:, 0], total

    losses, totals = jax.lax.map(some, in_portions((hidden, targets)))
    return losses.reshape(-1)[: len(hidden)], (hidden, kernel, bias, targets, totals)


def _cross_entropies_backward(dtype: Any, kept: Any, gradient: Array) -> tuple[Array, Array, Array, None]:
    hidden, kernel, bias, targets, totals = kept

    def some(sums: tuple[Array, Array], rows: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
        x, target, total, weight = rows
        likelihoods = jnp.exp(logits_of(x, kernel, bias, dtype) - total[:, None])
        of_logits = (likelihoods - jax.nn.one_hot(target, kernel.shape[1])) * weight[:, None]
        narrow = of_logits.astype(dtype)
        of_kernel = jnp.matmul(x.astype(dtype).T, narrow, preferred_element_type=jnp.float32)
        of_hidden = jnp.matmul(narrow, kernel.astype(dtype).T, preferred_element_type=jnp.float32)
        return (sums[0] + of_kernel, sums[1] + of_logits.sum(axis=0)), of_hidden.astype(x.dtype)

    hidden_rows, target_rows, weights = in_portions((hidden, targets, gradient))
    start = jnp.zeros_like(kernel), jnp.zeros_like(bias)
    (of_kernel, of_bias), of_hidden = jax.lax.scan(some, start, (hidden_rows, target_rows, totals, weights))
    return of_hidden.reshape(-1, hidden.shape[1])[: len(hidden)], of_kernel, of_bias, None


cross_entropies.defvjp(_cross_entropies, _cross_entropies_backward)


def in_portions(arrays: Any) -> Any:
    """Arrays (n, …) as (portions, rows, …) of at most ROWS rows, filled up with zeros."""
    n = len(jax.tree.leaves(arrays)[0])
    portions = -(-n // ROWS)
    rows = -(-n // portions)
    fill = lambda leaf: jnp.pad(leaf, [(0, portions * rows - n)] + [(0, 0)] * (leaf.ndim - 1))
    return jax.tree.map(lambda leaf: fill(leaf).reshape(portions, rows, *leaf.shape[1:]), arrays)


class Head(nn.Module):
    """A table of v outputs over hidden states of width d: nn.Dense, whose logits are float32 throughout."""

    width: int
    size: int
    dtype: Any

    def setup(self) -> None:
        self.kernel = self.param("kernel", nn.initializers.lecun_normal(), (self.width, self.size))
        self.bias = self.param("bias", nn.initializers.zeros, (self.size,))

    def __call__(self, hidden: Array) -> Array:  # (b, s, d) -> (b, s, v)
        flat = hidden.reshape(-1, self.width)
        return logits_of(flat, self.kernel, self.bias, self.dtype).reshape(*hidden.shape[:-1], self.size)

    def losses(self, hidden: Array, targets: Array) -> Array:
        """hidden (b, s, d), targets (b, s) in [0, v) -> their negative log-likelihoods (b, s) float32."""
        flat = hidden.reshape(-1, self.width), targets.reshape(-1)
        return cross_entropies(flat[0], self.kernel, self.bias, flat[1], self.dtype).reshape(targets.shape)
