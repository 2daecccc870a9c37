"""DLAS's optimiser in optax: AdamW, gradients clipped separately for decayed and undecayed parameters, stepped rate."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tortoise_jax.errors import UserError

Tree = Any
# Decayed: matrices that multiply activations. Not decayed: biases, norms' scales, embedding tables.
UNDECAYED = re.compile(r".*/(bias|scale|embedding)")
SCHEDULES = ("stepped", "cosine", "constant")
OPTIMIZERS = ("adamw", "adafactor")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The recipe of an optimiser; defaults are DLAS's.

    milestones: steps after which the rate is multiplied by gamma ("stepped"). warmup: steps of linear rise from 0.
    total_steps: where "cosine" reaches 0. freeze: a regular expression; parameters whose path it matches stay fixed.
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
    freeze: str = ""


def paths(tree: Tree) -> Tree:
    """The same tree with each leaf's path, "gpt/h/attn/c_attn/kernel"."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "/".join(str(key.key) for key in path), tree)


def group_labels(params: Tree, freeze: str = "") -> Tree:
    """Every parameter's group: "decayed", "undecayed" or "frozen"."""
    try:
        frozen = re.compile(freeze) if freeze else None
    except re.error as error:
        raise UserError(f"optimizer.freeze: {freeze!r} is not a regular expression: {error}") from None

    def label(path: str) -> str:
        if frozen and frozen.fullmatch(path):
            return "frozen"
        return "undecayed" if UNDECAYED.fullmatch("/" + path) else "decayed"

    labels = jax.tree.map(label, paths(params))
    if frozen and "frozen" not in jax.tree.leaves(labels):
        examples = ", ".join(sorted(jax.tree.leaves(paths(params)))[:3])
        raise UserError(f"optimizer.freeze: {freeze!r} matches no parameter; their paths look like {examples}")
    return labels


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
    """The optimiser for these parameters; each group has its own gradient norm, as in DLAS."""
    rate = learning_rate_schedule(config)

    def group(weight_decay: float) -> optax.GradientTransformation:
        if config.name == "adamw":
            scale = optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon)
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

    groups = {"decayed": group(config.weight_decay), "undecayed": group(0.0), "frozen": optax.set_to_zero()}
    return optax.partition(groups, group_labels(params, config.freeze))


def group_norms(gradients: Tree, labels: Tree) -> dict[str, jax.Array]:
    """Gradient norm before clipping of each group that is trained."""
    squares: dict[str, jax.Array] = {"decayed": jnp.zeros(()), "undecayed": jnp.zeros(())}
    for gradient, label in zip(jax.tree.leaves(gradients), jax.tree.leaves(labels), strict=True):
        if label in squares:
            squares[label] += jnp.sum(jnp.square(gradient.astype(jnp.float32)))
    return {f"grad_norm/{label}": jnp.sqrt(value) for label, value in squares.items()}


def part_norms(gradients: Tree) -> dict[str, jax.Array]:
    """Gradient norm of each part of the model (its top-level modules)."""
    return {f"grad_norm/{part}": optax.global_norm(gradient) for part, gradient in gradients.items()}
