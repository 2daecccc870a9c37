"""One training step and one evaluation step, written per device: pure functions of (state, batch).

A device's batch has a leading axis of micro-batches, so that the gradient of a large batch fits into little memory:
  tokens, token_types, positions, targets (a, b, s) int32, weights (a, b, s) float32, example (a, b) int32,
  conditioning_wav (a, b, u, samples) int16, or conditioning_mel (a, b, u, t, m) float32.
a: gradient_accumulation_steps, b: rows of a micro-batch, s: positions of a row, u: conditioning clips per row.
Sums over the devices of `axis` are taken once, in float32, after the micro-batches and the layers.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from tortoise_jax.audio import CONDITIONING_SAMPLES, SAMPLE_RATE, SAMPLES_PER_CODE
from tortoise_jax.models.layers import Array
from tortoise_jax.models.lora import NO_LORA, LoraConfig, inserted, with_adapters
from tortoise_jax.models.unified_voice import CONDITIONING, CONDITIONING_VECTORS, UnifiedVoice
from tortoise_jax.training.forward import Batch, dropout_keys, forward_sums, has_dropout
from tortoise_jax.training.losses import CODES_PER_BUCKET, Sums, counts, means, total_loss
from tortoise_jax.training.optimizer import Tree, applied_steps, group_norms, merge, part_norms, split

LARGE = 2**16  # numbers of a parameter: a quarter of a megabyte
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


class Objective(Protocol):
    """What a kind of run trains, as pure functions of arrays; `StepConfig` is the AR model's.

    optimizer, schedule, freeze and axis are as in StepConfig. curves: what is evaluated and drawn, by name, the one to
    look at first; unit: of a row's length.
    """

    @property
    def optimizer(self) -> optax.GradientTransformation: ...
    @property
    def schedule(self) -> optax.Schedule: ...
    @property
    def freeze(self) -> str: ...
    @property
    def axis(self) -> str | None: ...
    @property
    def curves(self) -> tuple[str, ...]: ...
    @property
    def unit(self) -> str: ...

    def begun(self, params: Tree) -> Tree:
        """What a run trains that begins with these weights of a checkpoint: them, or more."""

    def counts(self, batch: Batch) -> Sums:
        """What the loss sums of this device's micro-batches (a, b, …) are divided by, known before any forward."""

    def sums(self, params: Tree, batch: Batch, step: Array | np.ndarray | None) -> Sums:
        """Loss sums of one micro-batch (b, …), and whatever else is summed; step: None in an evaluation."""

    def loss(self, sums: Sums, counts: Sums) -> Array:
        """What is minimised, from the sums and counts of all devices, or of a device's own sums its share."""

    def moved(self, params: Tree, sums: Sums) -> Tree:
        """The parameters after whatever a step changes without a gradient."""

    def metrics(self, sums: Sums, counts: Sums, batch: Batch | None = None) -> Sums:
        """What is logged: losses as "loss/NAME". batch: None in an evaluation."""

    def scalars(self, metrics: dict[str, np.ndarray]) -> dict[str, float]:
        """Metrics on the host as plain numbers."""

    def speech_seconds(self, metrics: dict[str, np.ndarray]) -> float:
        """How much speech a step was trained on."""

    def batch_shapes(self, length: int, rows: int, accumulation: int) -> dict[str, Any]:
        """A device's batch of that length as shapes."""


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """What a step needs besides state and batch; all of it is constant during a run.

    schedule: applied steps -> learning rate, the one that `optimizer` uses; here for the metrics. mel_norms (m,)
    float32: None where batches carry mels. seed: of dropout. text_weight: of the mean text loss, where the mean mel
    loss has 1. freeze: a regular expression of the paths that are not trained, as `make_optimizer` got it.
    axis: the name of the mapped devices, None for one device. conditioning_clips: of a row, for `batch_shapes`.
    lora: of the adapters, which a run's parameters then have.
    """

    model: UnifiedVoice
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    mel_norms: Any
    seed: int = 0
    text_weight: float = 0.01
    freeze: str = ""
    axis: str | None = "data"
    conditioning_clips: int = 1
    lora: LoraConfig = NO_LORA

    curves = ("mel", "text", "stop")
    unit = "positions"

    def begun(self, params: Tree) -> Tree:
        return with_adapters(params, self.lora, self.seed)

    def counts(self, batch: Batch) -> Sums:
        joined = {name: value.reshape(-1, value.shape[-1]) for name, value in batch.items() if name in ROW_ARRAYS}
        return counts(joined, self.model.config.stop_mel)

    def sums(self, params: Tree, batch: Batch, step: Array | np.ndarray | None) -> Sums:
        """With dropout where a step is given."""
        drop = step is not None and has_dropout(self.model)
        keys = dropout_keys(self.seed, step, batch["example"]) if step is not None and drop else None
        return forward_sums(self.model, self.mel_norms, inserted(params, self.lora), batch, keys)

    def loss(self, sums: Sums, counts: Sums) -> Array:
        return total_loss(sums, counts, self.text_weight)

    def moved(self, params: Tree, sums: Sums) -> Tree:
        return params

    def metrics(self, sums: Sums, counts: Sums, batch: Batch | None = None) -> Sums:
        """Mean losses, those of the codes by position too, and which share of the positions is padding."""
        found = {f"loss/{name}": value for name, value in means(sums, counts).items()}
        if batch is not None:
            found["padding_share"] = padding_share(batch["token_types"], self.axis)
        return found

    def scalars(self, metrics: dict[str, np.ndarray]) -> dict[str, float]:
        values = {name: float(value) for name, value in metrics.items() if value.ndim == 0}
        for index, loss in enumerate(metrics["loss/position"]):
            if metrics["position_count"][index]:
                values[f"loss/codes_from_{index * CODES_PER_BUCKET}"] = float(loss)
        return values

    def speech_seconds(self, metrics: dict[str, np.ndarray]) -> float:
        return float(metrics["mel_count"]) * SAMPLES_PER_CODE / SAMPLE_RATE

    def batch_shapes(self, length: int, rows: int, accumulation: int) -> dict[str, Any]:
        row = lambda dtype: jax.ShapeDtypeStruct((accumulation, rows, length), dtype)
        names = ("tokens", "token_types", "positions", "targets")
        crops = (accumulation, rows, self.conditioning_clips, CONDITIONING_SAMPLES)
        return {
            **{name: row(np.int32) for name in names},
            "weights": row(np.float32),
            "example": jax.ShapeDtypeStruct((accumulation, rows), np.int32),
            "conditioning_wav": jax.ShapeDtypeStruct(crops, np.int16),
        }


def initial_state(params: Tree, optimizer: optax.GradientTransformation) -> TrainState:
    zero = lambda: jnp.zeros((), jnp.int32)  # one each: a buffer cannot be donated twice
    return TrainState(step=zero(), params=params, opt_state=optimizer.init(params), skipped=zero())


def first_state(params: Tree, config: Objective) -> TrainState:
    """Of a run that begins with these weights of a checkpoint."""
    return initial_state(config.begun(params), config.optimizer)


def sum_over_devices(tree: Tree, axis: str | None) -> Tree:
    alone = axis is None or jax.lax.axis_size(axis) == 1  # then XLA would copy the tree
    return tree if alone else jax.lax.psum(tree, axis)


def global_counts(config: Objective, batch: Batch) -> Sums:
    """The counts of all micro-batches of all devices."""
    return sum_over_devices(config.counts(batch), config.axis)


def over_micro_batches(sums: Sums) -> Sums:
    """The sums of the micro-batches (a, …) -> of the batch (…)."""
    return jax.tree.map(lambda leaf: leaf.sum(axis=0), sums)


def gradients(config: Objective, params: Tree, batch: Batch, step: Array | np.ndarray) -> tuple[Tree, Sums, Sums]:
    """Gradient of the global loss, global sums and counts; the devices' shares are summed at the end.

    The gradient is a tree like the trained half of `split`: for frozen parameters none is computed, kept or summed.
    """
    total = global_counts(config, batch)
    trained, frozen = split(params, config.freeze)

    def share(trained: Tree, micro: Batch) -> tuple[Array, Sums]:
        sums = config.sums(merge(trained, frozen), micro, step)
        return config.loss(sums, total), sums

    def accumulate(before: Tree, micro: Batch) -> tuple[Tree, Sums]:
        (_, sums), gradient = jax.value_and_grad(share, has_aux=True)(trained, micro)
        return jax.tree.map(jnp.add, before, gradient), sums

    gradient, sums = jax.lax.scan(accumulate, jax.tree.map(jnp.zeros_like, trained), batch)
    return *sum_over_devices((gradient, over_micro_batches(sums)), config.axis), total


def train_step(config: Objective, state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
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
    loss = config.loss(sums, total)
    finite = jnp.isfinite(loss) & jnp.all(jnp.isfinite(jnp.stack(list(norms.values()))))
    params = keep(finite, config.moved(merge(updated, frozen), sums), state.params)
    new_state = TrainState(
        step=state.step + 1,
        params=params,
        opt_state=kept_in_turn(finite, params, opt_state, state.opt_state),
        skipped=jnp.where(finite, 0, state.skipped + 1),
    )
    metrics = config.metrics(sums, total, batch) | norms | part_norms(gradient)
    metrics |= {"loss/total": loss, "learning_rate": learning_rate, "finite": finite}
    return new_state, metrics | total


def kept_in_turn(finite: Array, params: Tree, new: Tree, old: Tree) -> Tree:
    """`keep` for the optimiser's state: on CPU what belongs to a parameter only when the parameter (new) is written.

    XLA on CPU orders only what depends on each other. A parameter is computed from its old moments: unless the new ones
    wait for it, they are kept beside the old ones until all parameters are done. Of small ones nobody would notice.
    """
    on_cpu = lambda leaf: wait_for(finite, leaf)
    flag = lambda leaf: jax.lax.platform_dependent(leaf, cpu=on_cpu, default=lambda _: finite)
    large = [(path, leaf) for path, leaf in jax.tree.leaves_with_path(params) if leaf.size >= LARGE]
    flags = {parameter_of(path): flag(leaf) for path, leaf in large}
    choose = lambda path, new, old: jnp.where(flags.get(parameter_of(path), finite), new, old)
    return jax.tree_util.tree_map_with_path(choose, new, old)


def parameter_of(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """The path within the parameters that a path in the optimiser's state ends with; () if it belongs to none."""
    names = itertools.takewhile(lambda key: isinstance(key, jax.tree_util.DictKey), reversed(path))
    return tuple(reversed([*names]))


def wait_for(finite: Array, leaf: Array) -> Array:
    """`finite` (), known once the array is written, as what a branch reads is before it."""
    return jax.lax.cond(finite, lambda leaf: ~jnp.isnan(leaf[(0,) * leaf.ndim]), lambda _: finite, leaf)


def keep(condition: Array, new: Tree, old: Tree) -> Tree:
    """The new tree where the condition () is true, else the old one."""
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)


def padding_share(token_types: Array, axis: str | None) -> Array:
    """Which share of the positions (a, b, s) on all devices is padding; conditioning vectors are not counted."""
    real = sum_over_devices(jnp.sum(token_types != CONDITIONING), axis)
    return 1 - real / sum_over_devices(jnp.asarray(token_types[..., CONDITIONING_VECTORS:].size), axis)


def eval_step(config: Objective, params: Tree, batch: Batch) -> Sums:
    """Global sums and counts of one batch, without dropout; add them up over the batches, then divide once."""

    sums = over_micro_batches(jax.lax.map(lambda micro: config.sums(params, micro, None), batch))
    return sum_over_devices(sums, config.axis) | global_counts(config, batch)


def evaluation(config: Objective, totals: Any) -> dict[str, float]:
    """The curves by name and the total loss, from what `eval_step` gave for all batches, added up, on the host."""
    metrics = {name.rpartition("/")[2]: value for name, value in config.metrics(totals, totals).items()}
    return {name: float(metrics[name]) for name in config.curves} | {"total": float(config.loss(totals, totals))}
