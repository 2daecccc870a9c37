"""DLAS's optimiser in optax: AdamW, gradients clipped separately for decayed and undecayed parameters, stepped rate."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import MaskedNode

from tortoise_jax.errors import UserError
from tortoise_jax.models.lora import LORA

Tree = Any
# Decayed: matrices that multiply activations. Not decayed: biases, norms' scales, embedding tables.
UNDECAYED = re.compile(r".*/(bias|scale|embedding)")
SCHEDULES = ("stepped", "cosine", "constant")
OPTIMIZERS = ("adamw", "adafactor")
MOMENTS = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The numbers of an optimiser; defaults are DLAS's.

    milestones: steps after which the rate is multiplied by gamma ("stepped"). warmup: steps of linear rise from 0.
    total_steps: where "cosine" reaches 0. clip_norm: the largest gradient norm of each group. moments: how AdamW's two
    are kept between steps. freeze: a regular expression; parameters whose whole path it matches are not trained.
    ema: how much of their mean is kept per step, see `averaging`; 0 for none.
    """

    name: str = "adamw"
    learning_rate: float = 1e-5
    schedule: str = "stepped"
    milestones: tuple[int, ...] = (500, 1000, 1400, 1800)
    gamma: float = 0.5
    warmup: int = 0
    total_steps: int = 0
    beta1: float = 0.9
    beta2: float = 0.96
    epsilon: float = 1e-8
    weight_decay: float = 1e-2
    clip_norm: float = 4.0
    moments: str = "float32"
    freeze: str = ""
    ema: float = 0.0


def paths(tree: Tree) -> Tree:
    """The same tree with each leaf's path, "gpt/h/attn/c_attn/kernel"."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "/".join(str(key.key) for key in path), tree)


def marks_of(params: Tree, expression: str, field: str) -> Tree:
    """For each parameter whether an expression matches its whole path: some of them, or it is "". field: its name."""
    if not expression:
        return jax.tree.map(lambda _: False, params)
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise UserError(f"{field}: {expression!r} is not a regular expression: {error}") from None
    marks = jax.tree.map(lambda path: bool(pattern.fullmatch(path)), paths(params))
    if not any(jax.tree.leaves(marks)):
        examples = ", ".join(sorted(jax.tree.leaves(paths(params)))[:3])
        raise UserError(f"{field}: {expression!r} matches no parameter; their paths look like {examples}")
    return marks


def frozen_marks(params: Tree, freeze: str) -> Tree:
    """For each parameter whether `freeze` matches its whole path; an expression must match some, not all."""
    marks = marks_of(params, freeze, "optimizer.freeze")
    if all(jax.tree.leaves(marks)):
        raise UserError(f"optimizer.freeze: {freeze!r} matches every parameter: nothing would be trained")
    return marks


def frozen_beside_adapters(params: Tree, freeze: str, also_train: str) -> str:
    """An expression of what is frozen where adapters are trained: all but them and `also_train`, and all of `freeze`.

    params: with adapters. Raises UserError for an expression that is none or matches nothing.
    """
    frozen_marks(params, freeze)
    marks_of(params, also_train, "lora.also_train")
    trained = "|".join(f"(?:{expression})" for expression in (f"{LORA}/.*", also_train) if expression)
    others = rf"(?!(?:{trained})\Z).*"
    return f"(?:{freeze})|{others}" if freeze else others


def split(params: Tree, freeze: str) -> tuple[Tree, Tree]:
    """(trained, frozen): two trees of the form of `params`.

    Each has optax.MaskedNode, which holds no array, where the other has a leaf: the form optax's states have too.
    """
    marks = frozen_marks(params, freeze)
    pick = lambda wanted: jax.tree.map(lambda leaf, mark: leaf if mark == wanted else MaskedNode(), params, marks)
    return pick(False), pick(True)


def merge(trained: Tree, frozen: Tree) -> Tree:
    """The inverse of `split`."""
    absent = lambda leaf: isinstance(leaf, MaskedNode)
    return jax.tree.map(lambda ours, other: other if absent(ours) else ours, trained, frozen, is_leaf=absent)


def group_labels(params: Tree, freeze: str = "") -> Tree:
    """Every parameter's group: "decayed", "undecayed" or "frozen"."""
    group = lambda path: "undecayed" if UNDECAYED.fullmatch("/" + path) else "decayed"
    label = lambda path, frozen: "frozen" if frozen else group(path)
    return jax.tree.map(label, paths(params), frozen_marks(params, freeze))


def learning_rate_schedule(config: OptimizerConfig) -> optax.Schedule:
    """Step -> learning rate. A milestone's step itself already takes the lower rate, as torch's MultiStepLR has it."""
    rate = config.learning_rate
    if config.schedule == "stepped":
        main = optax.piecewise_constant_schedule(rate, dict.fromkeys(config.milestones, config.gamma))
    elif config.schedule == "cosine":
        main = optax.cosine_decay_schedule(rate, max(config.total_steps - config.warmup, 1))
    elif config.schedule == "constant":
        main = optax.constant_schedule(rate)
    else:
        raise UserError(f"optimizer.schedule is {config.schedule!r}; expected one of {', '.join(SCHEDULES)}")
    if not config.warmup:
        return main
    # "stepped" counts its milestones from the run's first step, warm-up included.
    start = config.warmup if config.schedule == "stepped" else 0
    rise = optax.linear_schedule(rate / config.warmup, rate, config.warmup - 1)
    return optax.join_schedules([rise, lambda step: main(step + start)], [config.warmup])


def make_optimizer(config: OptimizerConfig, params: Tree) -> optax.GradientTransformation:
    """The optimiser for these parameters; each group has its own gradient norm, as in DLAS.

    Its `init` takes all parameters or the trained ones of `split`, with the same state; its `update` the trained ones.
    """
    rate = learning_rate_schedule(config)

    def group(weight_decay: float) -> optax.GradientTransformation:
        if config.name == "adamw":
            scale = kept_as(config.moments, optax.scale_by_adam(config.beta1, config.beta2, config.epsilon))
        elif config.name == "adafactor":
            scale = optax.scale_by_factored_rms(decay_rate=0.8)
        else:
            raise UserError(f"optimizer.name is {config.name!r}; expected one of {', '.join(OPTIMIZERS)}")
        return optax.chain(
            optax.clip_by_global_norm(config.clip_norm),
            scale,
            optax.add_decayed_weights(weight_decay),
            optax.scale_by_learning_rate(rate),
        )

    # "frozen" has no state, but its name is in the states on disk.
    groups = {"decayed": group(config.weight_decay), "undecayed": group(0.0), "frozen": optax.set_to_zero()}
    optimizer = optax.partition(groups, group_labels(params, config.freeze))
    return averaging(optimizer, config.ema, frozen_marks(params, config.freeze)) if config.ema else optimizer


def kept_as(dtype: str, scale: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same, computed in float32, whose state keeps its float32 arrays as `dtype` between steps."""
    if dtype == "float32":
        return scale
    is_float = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)
    to = lambda tree, dtype: jax.tree.map(lambda leaf: leaf.astype(dtype) if is_float(leaf) else leaf, tree)

    def update(gradient: Tree, state: Tree, params: Tree) -> tuple[Tree, Tree]:
        updates, new = scale.update(gradient, to(state, jnp.float32), params)
        return updates, to(new, dtype)

    return optax.GradientTransformation(lambda params: to(scale.init(params), dtype), update)


class Averaged(NamedTuple):
    """The state of `averaging`. average: a tree like the trained parameters."""

    inner: Tree
    average: Tree


def averaging(optimizer: optax.GradientTransformation, decay: float, frozen: Tree) -> optax.GradientTransformation:
    """The optimiser, and beside it the exponential moving average of the trained parameters.

    The decay rises to `decay` as (1 + n) / (10 + n) over n steps, so that the start is soon forgotten in a short run.
    """
    absent = lambda leaf: isinstance(leaf, MaskedNode)
    copy = lambda leaf, mark: MaskedNode() if mark or absent(leaf) else jnp.array(leaf)

    def init(params: Tree) -> Averaged:
        return Averaged(optimizer.init(params), jax.tree.map(copy, params, frozen, is_leaf=absent))

    def update(gradient: Tree, state: Averaged, params: Tree) -> tuple[Tree, Averaged]:
        updates, inner = optimizer.update(gradient, state.inner, params)
        steps = applied_steps(inner).astype(jnp.float32)
        kept = jnp.minimum(decay, (1 + steps) / (10 + steps))
        mean = lambda average, new: kept * average + (1 - kept) * new
        return updates, Averaged(inner, jax.tree.map(mean, state.average, optax.apply_updates(params, updates)))

    return optax.GradientTransformation(init, update)


def swapped(params: Tree, opt_state: Tree) -> tuple[Tree, Tree]:
    """Swaps the parameters with the average of them in the optimiser state; done twice it changes nothing.

    Without an average both are as they were. What a run evaluates, saves for others and exports is the average.
    """
    if not isinstance(opt_state, Averaged):
        return params, opt_state
    absent = lambda leaf: isinstance(leaf, MaskedNode)
    own = jax.tree.map(lambda a, p: a if absent(a) else p, opt_state.average, params, is_leaf=absent)
    return merge(opt_state.average, params), opt_state._replace(average=own)


def applied_steps(opt_state: Tree) -> jax.Array:
    """How many steps the optimiser has applied, int32 (): where it stands in its schedule. Skipped steps are not in."""
    of_schedule = lambda path, _: getattr(path[-1], "tuple_name", "") == "ScaleByScheduleState"
    # Every group has a count of its own, and all are equal.
    return optax.tree_utils.tree_get_all_with_path(opt_state, "count", of_schedule)[0][1]


def group_norms(gradients: Tree) -> dict[str, jax.Array]:
    """Gradient norm () before clipping of each group; gradients: of the trained parameters."""
    squares: dict[str, jax.Array] = {"decayed": jnp.zeros(()), "undecayed": jnp.zeros(())}
    for gradient, label in zip(jax.tree.leaves(gradients), jax.tree.leaves(group_labels(gradients)), strict=True):
        squares[label] += jnp.sum(jnp.square(gradient.astype(jnp.float32)))
    return {f"grad_norm/{label}": jnp.sqrt(value) for label, value in squares.items()}


def part_norms(gradients: Tree) -> dict[str, jax.Array]:
    """Gradient norm () of each part of the model (its top-level modules) that is trained."""
    trained = {part: gradient for part, gradient in gradients.items() if jax.tree.leaves(gradient)}
    return {f"grad_norm/{part}": optax.global_norm(gradient) for part, gradient in trained.items()}
