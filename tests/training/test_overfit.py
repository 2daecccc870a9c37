"""The last word on loss, gradients and optimiser together: eight clips can be learnt by heart."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from tests.support import small
from tortoise_jax.models.layers import Compute
from tortoise_jax.training.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer
from tortoise_jax.training.step import initial_state, train_step

STEPS, LEARNT = 300, 0.05


def test_eight_clips_are_learnt_by_heart() -> None:
    config = OptimizerConfig(learning_rate=3e-3, milestones=(200,))
    step_config = dataclasses.replace(
        small.step_config(Compute(), axis=None),
        optimizer=make_optimizer(config, small.params()),
        schedule=learning_rate_schedule(config),
    )
    batch = {name: value[None] for name, value in small.clips(0).items()}
    step = jax.jit(functools.partial(train_step, step_config), donate_argnums=0)
    state = initial_state(jax.tree.map(jnp.array, small.params()), step_config.optimizer)
    losses = []
    for _ in range(STEPS):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss/mel"]))
    assert losses[0] > 2
    assert losses[-1] < LEARNT
