"""One training step and one evaluation step, written per device: pure functions of (state, batch).

A device's batch has a leading axis of micro-batches, so that gradients of a large batch fit a small card:
  tokens, token_types, positions, targets (a, b, s) int32, weights (a, b, s) float32, example (a, b) int32,
  conditioning_wav (a, b, u, samples) int16, or conditioning_mel (a, b, u, t, m) float32.
Sums are taken over the `axis` of devices once, in float32, after the micro-batches and the layers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from tortoise_jax.audio import log_mel, waveform_from_int16
from tortoise_jax.models.layers import Array
from tortoise_jax.models.unified_voice import CONDITIONING, CONDITIONING_VECTORS, UnifiedVoice
from tortoise_jax.training.losses import Sums, counts, loss_sums, means, total_loss, zero_sums
from tortoise_jax.training.optimizer import Tree, group_labels, group_norms, part_norms

Batch = dict[str, Array]
ROW_ARRAYS = ("tokens", "token_types", "positions", "targets", "weights")


@flax.struct.dataclass
class TrainState:
    """Everything a step changes: the step to come (int32), parameters, optimiser state, steps skipped in a row."""

    step: Array | np.ndarray
    params: Tree
    opt_state: Tree
    skipped: Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a step needs besides state and data; all of it static."""

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


def conditioning_mel(batch: Batch, mel_norms: Any) -> Array:
    """The clips' mels (b, u, t, m), from waveforms where the batch carries those."""
    if "conditioning_mel" in batch:
        return batch["conditioning_mel"]
    return log_mel(waveform_from_int16(batch["conditioning_wav"]), mel_norms)


def forward_sums(recipe: Recipe, params: Tree, batch: Batch, dropout_keys: Array | None) -> Sums:
    """Loss sums of one micro-batch."""
    mel = jax.lax.stop_gradient(conditioning_mel(batch, recipe.mel_norms))
    outputs: Any = recipe.model.apply(
        {"params": params}, mel, batch["tokens"], batch["token_types"], batch["positions"], dropout_keys
    )
    return loss_sums(outputs, batch, recipe.model.config.stop_mel)


def dropout_keys(seed: int, step: Array | np.ndarray, example: Array) -> Array:
    """One key a row from (seed, step, example): the same wherever and beside whatever the row is computed."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(example)


def has_dropout(model: UnifiedVoice) -> bool:
    compute = model.compute
    return any((compute.embed_dropout, compute.residual_dropout, compute.attention_dropout))


def global_counts(recipe: Recipe, batch: Batch) -> Sums:
    """Target counts of all micro-batches of all devices."""
    joined = {name: value.reshape(-1, value.shape[-1]) for name, value in batch.items() if name in ROW_ARRAYS}
    return sum_over_devices(counts(joined, recipe.model.config.stop_mel), recipe.axis)


def gradients(recipe: Recipe, params: Tree, batch: Batch, step: Array | np.ndarray) -> tuple[Tree, Sums, Sums]:
    """Gradient of the global loss, global loss sums and counts; each device's share is summed at the end."""
    total = global_counts(recipe, batch)

    def share(params: Tree, micro: Batch) -> tuple[Array, Sums]:
        keys = dropout_keys(recipe.seed, step, micro["example"]) if has_dropout(recipe.model) else None
        sums = forward_sums(recipe, params, micro, keys)
        return total_loss(sums, total, recipe.text_weight), sums

    def accumulate(carry: tuple[Tree, Sums], micro: Batch) -> tuple[tuple[Tree, Sums], None]:
        (_, sums), gradient = jax.value_and_grad(share, has_aux=True)(params, micro)
        return jax.tree.map(jnp.add, carry, (gradient, sums)), None

    start = (jax.tree.map(jnp.zeros_like, params), zero_sums())
    (gradient, sums), _ = jax.lax.scan(accumulate, start, batch)
    return *sum_over_devices((gradient, sums), recipe.axis), total


def train_step(recipe: Recipe, state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
    """One optimiser step -> (new state, metrics: losses, norms, rate, `finite`).

    A non-finite loss or gradient leaves parameters and optimiser as they were and counts in `state.skipped`.
    """
    gradient, sums, total = gradients(recipe, state.params, batch, state.step)
    with jax.numpy_dtype_promotion("standard"):  # optax promotes implicitly; everything of ours is held to "strict"
        updates, opt_state = recipe.optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        learning_rate = recipe.schedule(state.step)
    norms = group_norms(gradient, group_labels(gradient, recipe.freeze))
    loss = total_loss(sums, total, recipe.text_weight)
    finite = jnp.isfinite(loss) & jnp.all(jnp.isfinite(jnp.stack(list(norms.values()))))
    keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
    new_state = TrainState(
        step=state.step + 1,
        params=keep(params, state.params),
        opt_state=keep(opt_state, state.opt_state),
        skipped=jnp.where(finite, 0, state.skipped + 1),
    )
    metrics = {f"loss/{name}": value for name, value in means(sums, total).items()}
    metrics |= norms | part_norms(gradient)
    metrics |= {"loss/total": loss, "learning_rate": learning_rate, "finite": finite}
    metrics["padding_share"] = padding_share(batch["token_types"], recipe.axis)
    return new_state, metrics | total


def padding_share(token_types: Array, axis: str | None) -> Array:
    """Which part of the positions (a, b, s) computed on all devices is padding, the conditioning's own apart."""
    real = sum_over_devices(jnp.sum(token_types != CONDITIONING), axis)
    return 1 - real / sum_over_devices(jnp.asarray(token_types[..., CONDITIONING_VECTORS:].size), axis)


def eval_step(recipe: Recipe, params: Tree, batch: Batch) -> Sums:
    """Global loss sums and counts of one batch, without dropout; add them up and divide once."""

    def accumulate(carry: Sums, micro: Batch) -> tuple[Sums, None]:
        return jax.tree.map(jnp.add, carry, forward_sums(recipe, params, micro, None)), None

    sums, _ = jax.lax.scan(accumulate, zero_sums(), batch)
    return sum_over_devices(sums, recipe.axis) | global_counts(recipe, batch)
