"""Cross-entropies without the logits of all rows: the plain ones in value and gradient, and float32 throughout."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from tests.support.parity import MODULE, assert_close, with_gradients
from tortoise_jax.models import heads
from tortoise_jax.models.heads import Head, cross_entropies
from tortoise_jax.training.losses import cross_entropy

WIDTH, SIZE = 24, 50
LOSS = 1e-6  # of the largest loss
Rows = tuple[jax.Array, jax.Array, jax.Array, jax.Array]  # hidden (n, d), kernel (d, v), bias (v,), targets (n,)


def rows(n: int, dtype: str = "float32") -> Rows:
    random = np.random.default_rng(n)
    draw = lambda *shape: jnp.asarray(random.standard_normal(shape, np.float32))
    return draw(n, WIDTH).astype(dtype), draw(WIDTH, SIZE), draw(SIZE), jnp.asarray(random.integers(0, SIZE, n))


def plain(hidden: jax.Array, kernel: jax.Array, bias: jax.Array, targets: jax.Array) -> jax.Array:
    return cross_entropy((hidden @ kernel + bias[None])[None], targets[None])[0]


def compare(n: int, ours: Any = lambda *given: cross_entropies(*given, jnp.float32)) -> None:
    """Values, and the gradients of a random weighting of them, some of whose weights are zero as padding's are."""
    hidden, kernel, bias, targets = rows(n)
    weights = np.random.default_rng(1).standard_normal(n, np.float32)
    weights[-1] = 0
    found = lambda losses: with_gradients(lambda *given: losses(*given, targets), weights, hidden, kernel, bias)
    (want, wanted), (got, ours_of) = found(plain), found(ours)
    assert_close(got, want, LOSS, "losses")
    for name, a, b in zip(("hidden", "kernel", "bias"), ours_of, wanted, strict=True):
        assert_close(a, b, MODULE, name)


@pytest.mark.parametrize("n", [7, 8, 9, 30])
def test_in_portions_as_all_at_once(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "ROWS", 8)
    compare(n)


def test_the_comparison_fires() -> None:
    with pytest.raises(AssertionError, match="losses"):
        compare(9, lambda hidden, kernel, bias, targets: plain(hidden, kernel, bias, (targets + 1) % SIZE))
    frozen = lambda hidden, kernel, bias, targets: plain(hidden, jax.lax.stop_gradient(kernel), bias, targets)
    with pytest.raises(AssertionError, match="kernel"):
        compare(9, frozen)


def test_no_more_logits_than_those_of_a_portion_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "ROWS", 8)
    given = rows(64)

    def largest(losses: Any) -> int:
        gradient = jax.grad(lambda hidden: losses(hidden, *given[1:]).sum())
        return largest_array(jax.make_jaxpr(gradient)(given[0]).jaxpr)

    assert largest(plain) == 64 * SIZE
    assert largest(lambda *arrays: cross_entropies(*arrays, jnp.float32)) == 64 * WIDTH


def largest_array(jaxpr: Any) -> int:
    inner = (one for equation in jaxpr.eqns for one in jaxprs_in_params(equation.params))
    own = (variable.aval.size for equation in jaxpr.eqns for variable in equation.outvars)
    return max([*own, *map(largest_array, inner)])


def test_half_precision_is_added_up_and_kept_in_float32() -> None:
    """Of products of bfloat16 numbers, exactly: the logits that float32 gives for the same numbers."""
    hidden, kernel, bias, targets = rows(30, "bfloat16")
    rounded = hidden.astype(jnp.float32), kernel.astype(jnp.bfloat16).astype(jnp.float32)
    logits = Head(WIDTH, SIZE, jnp.bfloat16).apply({"params": {"kernel": kernel, "bias": bias}}, hidden[None])[0]
    assert logits.dtype == jnp.float32
    assert_close(logits, rounded[0] @ rounded[1] + bias[None], LOSS, "logits")
    with pytest.raises(AssertionError):
        assert_close(logits.astype(jnp.bfloat16), logits, 1e-3, "rounded")
    losses = cross_entropies(hidden, kernel, bias, targets, jnp.bfloat16)
    assert_close(losses, plain(*rounded, bias, targets), LOSS, "losses")
