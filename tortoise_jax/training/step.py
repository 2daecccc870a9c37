"""One training step and one evaluation step, written per device: pure functions of (state, batch).

A device's batch has a leading axis of micro-batches, so that the gradient of a large batch fits into little memory:
  tokens, token_types, positions, targets (a, b, s) int32, weights (a, b, s) float32, example (a, b) int32,
  conditioning_wav (a, b, u, samples) int16, or conditioning_mel (a, b, u, t, m) float32.
a: gradient_accumulation_steps, b: rows of a micro-batch, s: positions of a row, u: conditioning clips per row.
Sums over the devices of `axis` are taken once, in float32, after the micro-batches and the layers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from tortoise_jax.models.layers import Array
from tortoise_jax.models.unified_voice import CONDITIONING, CONDITIONING_VECTORS, UnifiedVoice
from tortoise_jax.training.forward import Batch, dropout_keys, forward_sums, has_dropout
from tortoise_jax.training.losses import Sums, counts, means, total_loss, zero_sums
from tortoise_jax.training.optimizer import Tree, applied_steps, group_norms, merge, part_norms, split

ROW_ARRAYS = ("tokens", "token_types", "positions", "targets", "weights")


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes.

    step: steps done, int32 (), skipped ones included. params: the whole model's float32 tree, frozen parameters
    included. opt_state: the optimiser's, which holds arrays for trained parameters only. skipped: steps in a row up to
    now that were not finite and so not applied, int32 ().
    """

    step: Array | np.ndarray
    params: Tree
    opt_state: Tree
    skipped: Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """What a step needs besides state and batch; all of it is constant during a run.

    schedule: applied steps -> learning rate, the one that `optimizer` uses; here for the metrics. mel_norms (m,)
    float32: None where batches carry mels. seed: of dropout. text_weight: of the mean text loss, where the mean mel
    loss has 1. freeze: a regular expression of the paths that are not trained, as `make_optimizer` got it.
    axis: the name of the mapped devices, None for one device.
    """

    model: UnifiedVoice
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    mel_norms: Any
    seed: int = 0
    text_weight: float = 0.01
    freeze: str = ""
    axis: str | None = "data"


def initial_state(params: Tree, optimizer: optax.GradientTransformation) -> TrainState:
    zero = lambda: jnp.zeros((), jnp.int32)  # one each: a buffer cannot be donated twice
    return TrainState(step=zero(), params=params, opt_state=optimizer.init(params), skipped=zero())


def sum_over_devices(tree: Tree, axis: str | None) -> Tree:
    return jax.lax.psum(tree, axis) if axis else tree


def global_counts(config: StepConfig, batch: Batch) -> Sums:
    """Target counts of all micro-batches of all devices."""
    joined = {name: value.reshape(-1, value.shape[-1]) for name, value in batch.items() if name in ROW_ARRAYS}
    return sum_over_devices(counts(joined, config.model.config.stop_mel), config.axis)


def gradients(config: StepConfig, params: Tree, batch: Batch, step: Array | np.ndarray) -> tuple[Tree, Sums, Sums]:
    """Gradient of the global loss, global loss sums and counts; the devices' shares are summed at the end.

    The gradient is a tree like the trained half of `split`: for frozen parameters none is computed, kept or summed.
    """
    total = global_counts(config, batch)
    trained, frozen = split(params, config.freeze)

    def share(trained: Tree, micro: Batch) -> tuple[Array, Sums]:
        keys = dropout_keys(config.seed, step, micro["example"]) if has_dropout(config.model) else None
        sums = forward_sums(config.model, config.mel_norms, merge(trained, frozen), micro, keys)
        return total_loss(sums, total, config.text_weight), sums

    def accumulate(carry: tuple[Tree, Sums], micro: Batch) -> tuple[tuple[Tree, Sums], None]:
        (_, sums), gradient = jax.value_and_grad(share, has_aux=True)(trained, micro)
        return jax.tree.map(jnp.add, carry, (gradient, sums)), None

    start = (jax.tree.map(jnp.zeros_like, trained), zero_sums())
    (gradient, sums), _ = jax.lax.scan(accumulate, start, batch)
    return *sum_over_devices((gradient, sums), config.axis), total


def train_step(config: StepConfig, state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
    """One optimiser step -> (new state, metrics: losses, norms, rate, `finite`).

    A non-finite loss or gradient leaves parameters and optimiser as they were and counts in `state.skipped`.
    """
    gradient, sums, total = gradients(config, state.params, batch, state.step)
    trained, frozen = split(state.params, config.freeze)
    with jax.numpy_dtype_promotion("standard"):  # optax promotes implicitly; everything of ours is held to "strict"
        updates, opt_state = config.optimizer.update(gradient, state.opt_state, trained)
        updated = optax.apply_updates(trained, updates)
        learning_rate = config.schedule(applied_steps(state.opt_state))
    norms = group_norms(gradient)
    loss = total_loss(sums, total, config.text_weight)
    finite = jnp.isfinite(loss) & jnp.all(jnp.isfinite(jnp.stack(list(norms.values()))))
    keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
    new_state = TrainState(
        step=state.step + 1,
        params=merge(keep(updated, trained), frozen),
        opt_state=keep(opt_state, state.opt_state),
        skipped=jnp.where(finite, 0, state.skipped + 1),
    )
    metrics = {f"loss/{name}": value for name, value in means(sums, total).items()}
    metrics |= norms | part_norms(gradient)
    metrics |= {"loss/total": loss, "learning_rate": learning_rate, "finite": finite}
    metrics["padding_share"] = padding_share(batch["token_types"], config.axis)
    return new_state, metrics | total


def padding_share(token_types: Array, axis: str | None) -> Array:
    """Which share of the positions (a, b, s) on all devices is padding; conditioning vectors are not counted."""
    real = sum_over_devices(jnp.sum(token_types != CONDITIONING), axis)
    return 1 - real / sum_over_devices(jnp.asarray(token_types[..., CONDITIONING_VECTORS:].size), axis)


def eval_step(config: StepConfig, params: Tree, batch: Batch) -> Sums:
    """Global loss sums and counts of one batch, without dropout; add them up over the batches, then divide once."""

    def accumulate(carry: Sums, micro: Batch) -> tuple[Sums, None]:
        return jax.tree.map(jnp.add, carry, forward_sums(config.model, config.mel_norms, params, micro)), None

    sums, _ = jax.lax.scan(accumulate, zero_sums(), batch)
    return sum_over_devices(sums, config.axis) | global_counts(config, batch)
