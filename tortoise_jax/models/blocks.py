"""Blocks of a stack, run one after the other: as one compiled loop, or each by itself in one long program.

The loop compiles fastest, the long program runs fastest on CPU; what each keeps for the backward pass is chosen by name
(REMAT). Axis letters as in layers.py, and l blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

Array = jax.Array
Tree = Any
Run = Callable[..., Array]  # a block: (its parameters, x (b, s, d), whatever else it reads) -> x (b, s, d)
REMAT = ("none", "dots", "full")


def stacked(block: Any, layers: int, **axes: Any) -> Any:
    """The class of so many blocks with their parameters stacked, which makes them; `run_blocks` runs them."""
    return nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=layers, **axes)


def run_blocks(run: Run, params: Tree, x: Array, *rest: Tree, remat: str, unrolled: bool) -> tuple[Array, Array]:
    """x (b, s, d) -> (x, every block's output (l, b, s, d)).

    params: of l blocks, stacked; rest: what each block reads of its own (l, …), or None; no gradient of it is computed.
    remat: what the backward pass computes again: "none" of a block, all but its products with weights ("dots"), or all
    but its input ("full").
    """
    if unrolled:
        return one_by_one(run, remat)(params, x, *rest)
    run = recomputed(run, remat, prevent_cse=False)

    def one(x: Array, own: Tree) -> tuple[Array, Array]:
        x = run(own[0], x, *own[1])
        return x, x

    return jax.lax.scan(one, x, (params, rest))


def recomputed(run: Run, remat: str, prevent_cse: bool) -> Run:
    """prevent_cse: where XLA would merge what is computed again with its first computation, in one program."""
    if remat == "none":
        return run
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
    return jax.checkpoint(run, prevent_cse=prevent_cse, policy=policy)


def one_by_one(run: Run, remat: str) -> Callable[..., tuple[Array, Array]]:
    """The blocks in one program, in an order that keeps little memory.

    XLA on CPU orders only what depends on each other. By itself it computes all again at once, leaves the gradients of
    all weights to the end, and then stacks them in a copy; and of the gradient that runs back through the blocks, a sum
    of what each adds, it writes nothing down but adds all later blocks' shares up in each block anew. So here each
    block waits for the gradients of the one after it, which are written into their place at once.
    """
    block = run if remat == "full" else recomputed(run, remat, prevent_cse=True)

    def pull_of(own: tuple[Tree, Tree], x: Array, rest: Tree) -> tuple[Array, Callable[[Array], Any]]:
        """A block's output, and what takes its gradient to those of its (trained parameters, x)."""
        trained, frozen = own
        return jax.vjp(lambda trained, x: block(merged(trained, frozen), x, *rest), trained, x)

    # Compiled functions, so that one block is traced and not all.

    ahead = jax.jit(run)

    @jax.jit
    def ahead_and_kept(own: tuple[Tree, Tree], x: Array, rest: Tree) -> tuple[Array, Any]:
        """A block's output, and what its backward pass needs besides its weights."""
        if remat == "full":
            return run(merged(*own), x, *rest), x
        x, pull = pull_of(own, x, rest)
        return x, without(pull, own)

    @jax.jit
    def back(kept: Any, own: tuple[Tree, Tree], gradient: Array, rest: Tree) -> tuple[Tree, Array]:
        """The gradients of a block's (trained parameters, x)."""
        pull = pull_of(own, once_computed(gradient, kept), rest)[1] if remat == "full" else kept(own)
        return pull(gradient)

    @jax.custom_vjp
    def blocks(params: Tree, x: Array, *rest: Tree) -> tuple[Array, Array]:
        every = []
        for index in range(count(params)):
            x = ahead(block_of(params, index), x, *block_of(rest, index))
            every.append(x)
        return x, jnp.stack(every)

    def forward(params: Tree, *given: Tree) -> tuple[tuple[Array, Array], Any]:
        """Each array comes with whether a gradient of it is asked for, which frozen parameters' is not."""
        trained = jax.tree.map(lambda leaf: leaf.value if leaf.perturbed else None, params)
        frozen = jax.tree.map(lambda leaf: None if leaf.perturbed else leaf.value, params)
        x, *rest = jax.tree.map(lambda leaf: leaf.value, given)
        every, kept = [], []
        for index in range(count(merged(trained, frozen))):
            x, of_block = ahead_and_kept(block_of((trained, frozen), index), x, block_of(rest, index))
            every.append(x)
            kept.append(of_block)
        return (x, jnp.stack(every)), (trained, frozen, rest, kept)

    def backward(residual: Any, gradients: tuple[Any, Any]) -> tuple[Any, ...]:
        trained, frozen, rest, kept = residual
        gradient, of_every = (dense(one) for one in gradients)
        # Were the zeros known beforehand, XLA would pad the first gradient that is written with them, which is slow.
        filled = lambda value: jax.tree.map(lambda leaf: jnp.full_like(leaf, value), trained)
        found = jax.lax.cond(is_lost(gradient), lambda: filled(jnp.nan), lambda: filled(0))
        written: Tree = ()
        for index in reversed(range(len(kept))):
            gradient = gradient + of_every[index]
            gradient = once_computed((gradient, written), gradient)
            # A place known only now: else XLA would keep the weights that it has read for the forward pass.
            own = block_of((trained, frozen), jnp.where(is_lost(gradient), 0, index))
            of_own, gradient = back(kept[index], own, gradient, block_of(rest, index))
            found = jax.tree.map(lambda every, one, index=index: every.at[index].set(one), found, of_own)
            written = block_of(found, index)
        return found, gradient, *[None] * len(rest)

    blocks.defvjp(forward, backward, symbolic_zeros=True)
    return blocks


def dense(gradient: Any) -> Array:
    """The gradient, or zeros where none is asked for."""
    if not isinstance(gradient, SymbolicZero):
        return gradient
    aval: Any = gradient.aval
    return jnp.zeros(aval.shape, aval.dtype)


def count(params: Tree) -> int:
    return len(jax.tree.leaves(params)[0])


def block_of(tree: Tree, index: int | Array) -> Tree:
    """Of stacked arrays (l, …) a block's."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def merged(trained: Tree, frozen: Tree) -> Tree:
    """One tree of two, each of which has None where the other has an array."""
    none = lambda leaf: leaf is None
    return jax.tree.map(lambda ours, other: other if ours is None else ours, trained, frozen, is_leaf=none)


def without(tree: Tree, held: Tree) -> Callable[[Tree], Tree]:
    """The tree without the arrays that `held` has too: a function (and a tree) that takes them to the whole of it."""
    places = {id(leaf): place for place, leaf in enumerate(jax.tree.leaves(held))}
    leaves, form = jax.tree.flatten(tree)
    found = [places.get(id(leaf)) for leaf in leaves]
    rest = [leaf for leaf, place in zip(leaves, found, strict=True) if place is None]

    def whole(rest: list[Array], held: Tree) -> Tree:
        others, again = iter(rest), jax.tree.leaves(held)
        return jax.tree.unflatten(form, [next(others) if place is None else again[place] for place in found])

    return jax.tree_util.Partial(whole, rest)


def is_lost(tree: Tree) -> Array:
    """Whether an array of the tree begins with NaN, as diverged gradients do: known only once they are computed."""
    first = [leaf[(0,) * leaf.ndim].astype(jnp.float32) for leaf in jax.tree.leaves(tree)]
    return jnp.any(jnp.isnan(jnp.stack(first)))


def once_computed(tree: Tree, x: Array) -> Array:
    """x, written to memory, but only after the tree's arrays are; NaN if one of these begins with it."""
    nan = lambda x: jnp.full_like(x, jnp.nan)
    return jax.lax.cond(is_lost(tree), nan, lambda x: x, x)  # what a branch reads is written before it
