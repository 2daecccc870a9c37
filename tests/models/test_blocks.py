"""Blocks one by one compute what blocks in a loop do, and their program stays small where XLA's own would not."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.parity import assert_close
from tests.support.programs import CPU_OPTIONS
from tortoise_jax.models.blocks import REMAT, run_blocks, without

ROWS, WIDTH, INNER = 16, 64, 256
SAME = 1e-6


def parameters(blocks: int) -> dict[str, jax.Array]:
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(0.1 * random.standard_normal((blocks, *shape)), jnp.float32)
    return {"scale": 1 + draw(WIDTH), "wide": draw(WIDTH, INNER), "narrow": draw(INNER, WIDTH)}


def block(params: Any, x: jax.Array, number: jax.Array) -> jax.Array:
    """Like GPT-2's, in small: x + tanh(norm(x) wide) narrow."""
    centred = x - x.mean(axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + 1e-5)
    return x + jnp.tanh((normed * params["scale"][None]) @ params["wide"]) @ params["narrow"] * (1 + number)


def inputs(blocks: int) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
    x = jax.random.normal(jax.random.key(1), (ROWS, WIDTH))
    return parameters(blocks), x, jnp.arange(blocks, dtype=jnp.float32)


def loss(params: Any, x: jax.Array, numbers: jax.Array, every: float = 0.0, **how: Any) -> jax.Array:
    """every: the weight of what each block gives."""
    last, all_of_them = run_blocks(block, params, x, numbers, **how)
    return jnp.sum(jnp.sin(last)) + (every * jnp.sum(jnp.square(all_of_them)) if every else 0)


@pytest.mark.parametrize("every", [0.0, 0.5], ids=["of the last block", "of every block"])
@pytest.mark.parametrize("remat", REMAT)
def test_one_by_one_is_the_loop_in_values_and_gradients(remat: str, every: float) -> None:
    given = inputs(4)
    value = lambda **how: jax.jit(jax.value_and_grad(lambda p, x: loss(p, x, given[2], every, **how), (0, 1)))
    got, got_gradients = value(remat=remat, unrolled=True)(*given[:2])
    want, want_gradients = value(remat="none", unrolled=False)(*given[:2])
    assert_close(got, want, SAME, "loss")
    for name, one in got_gradients[0].items():
        assert_close(one, want_gradients[0][name], SAME, name)
    assert_close(got_gradients[1], want_gradients[1], SAME, "x")


def operands(program: Any) -> int:
    """Of the fusion with most of them."""
    heads = re.findall(r"\n%?fused_computation[\w.]* \(([^\n]*)\) -> ", program.as_text())
    return max(head.count(": ") for head in heads)


def compiled(blocks: int, remat: str, gradient: Any = None) -> Any:
    shapes = jax.eval_shape(lambda: inputs(blocks))
    gradient = gradient or jax.grad(lambda *given: loss(*given, remat=remat, unrolled=True), (0, 1))
    return jax.jit(gradient).lower(*shapes).compile(compiler_options=CPU_OPTIONS)


@pytest.mark.parametrize("remat", REMAT)
def test_no_block_adds_up_the_gradients_of_all_later_ones(remat: str) -> None:
    assert operands(compiled(8, remat)) <= operands(compiled(4, remat))


def test_a_loop_that_jax_unrolls_does() -> None:
    """So the test above can fail, and `one_by_one` has a reason."""

    def whole(params: Any, x: jax.Array, numbers: jax.Array) -> jax.Array:
        step = lambda x, own: (block(own[0], x, own[1]), None)
        return jnp.sum(jnp.sin(jax.lax.scan(step, x, (params, numbers), unroll=True)[0]))

    few, many = (operands(compiled(blocks, "none", jax.grad(whole, (0, 1)))) for blocks in (4, 8))
    assert many > few + 8


@pytest.mark.parametrize("remat", ["none", "full"])
def test_neither_weights_nor_their_gradients_are_kept_twice(remat: str) -> None:
    """The gradients are outputs; beside them there is room for a few blocks' activations and a block's weights."""
    needed = compiled(8, remat).memory_analysis()
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(parameters(8)))
    activations = 8 * 4 * ROWS * (4 * WIDTH + 2 * INNER)
    assert needed.temp_size_in_bytes < 0.5 * weights + (activations if remat == "none" else 0)


@pytest.mark.parametrize("remat", REMAT)
def test_a_gradient_that_is_lost_is_lost_for_all_weights(remat: str) -> None:
    params, x, numbers = inputs(3)
    whole = lambda params: jnp.nan * loss(params, x, numbers, remat=remat, unrolled=True)
    for name, gradient in jax.jit(jax.grad(whole))(params).items():
        assert np.isnan(gradient).all(), name


def test_arrays_that_two_trees_share_are_held_once() -> None:
    shared, own = jnp.ones(3), jnp.zeros(2)
    kept = without({"a": shared, "b": own}, [own * 1, shared])
    assert [leaf.shape for leaf in jax.tree.leaves(kept)] == [(2,)]
    again = kept([own, 2 * shared])
    assert again["a"].tolist() == [2, 2, 2]
    assert again["b"].tolist() == [0, 0]
