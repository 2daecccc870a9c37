"""A step of a run with adapters: what is trained, what exists of what is frozen, what users may choose."""

from __future__ import annotations

import functools
import re
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from configs import ar
from tests.support import small
from tests.support.parity import assert_close
from tortoise_jax.checkpoints.parts import AR, Part
from tortoise_jax.errors import UserError
from tortoise_jax.models.lora import LORA
from tortoise_jax.parallel import AXIS
from tortoise_jax.training import ar_run, presets
from tortoise_jax.training.optimizer import group_labels, paths, split
from tortoise_jax.training.step import StepConfig, TrainState, first_state, gradients, initial_state, train_step

RANK = 4
Layout = tuple[int, int]  # devices, micro-batches


@functools.cache
def step_config(rank: int = RANK, freeze: str = "", also_train: str = "") -> StepConfig:
    """As train.py makes it of a configuration."""
    settings = ar.get_config()
    settings.lora.rank, settings.lora.also_train, settings.optimizer.freeze = rank, also_train, freeze
    settings.remat, settings.dtype, settings.optimizer.schedule = "none", "float32", "constant"
    presets.fill(settings, 12)
    part = Part(small.CONFIG, {"params": small.params()})
    pretrained: Any = SimpleNamespace(ar=part, mel_norms=None, part={AR: part}.get)
    return ar_run.make_step_config(settings, pretrained, settings.batch_size)


def laid_out(batch: small.Batch, layout: Layout) -> small.Batch:
    return {name: value.reshape(*layout, -1, *value.shape[1:]) for name, value in batch.items()}


def on_devices(function: Any, state: TrainState, layout: Layout) -> Any:
    """What a function of (state, batch) gives on the first of so many devices."""
    devices = jax.local_devices()[: layout[0]]
    spread = jax.tree.map(lambda leaf: np.broadcast_to(leaf, (layout[0], *np.shape(leaf))), state)
    found = jax.pmap(function, axis_name=AXIS, devices=devices)(spread, laid_out(small.clips(0), layout))
    return jax.tree.map(lambda leaf: np.asarray(leaf)[0], found)


def size(tree: Any) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def trained_paths(config: StepConfig) -> set[str]:
    return set(jax.tree.leaves(paths(split(first_state(small.params(), config).params, config.freeze)[0])))


def test_a_step_moves_the_adapters_alone() -> None:
    config = step_config()
    state = first_state(small.params(), config)
    after, metrics = on_devices(functools.partial(train_step, config), state, (1, 2))
    assert metrics["finite"]
    moved = after.params.pop(LORA)
    jax.tree.map(np.testing.assert_array_equal, after.params, small.params())
    for path, value in zip(jax.tree.leaves(paths(moved)), jax.tree.leaves(moved), strict=True):
        assert np.abs(value).max() > 0, path
    assert set(jax.tree.leaves(group_labels(moved))) == {"decayed"}, "towards the model the run began with"


def test_of_what_is_frozen_there_is_no_gradient_sum_or_state() -> None:
    config = step_config()
    state = first_state(small.params(), config)
    adapters = size(state.params[LORA])
    assert 2 * adapters < size(state.opt_state) < 2 * adapters + 10, "Adam's two moments, and counts"
    batch = {name: value[0] for name, value in laid_out(small.clips(0), (1, 4)).items()}
    program = jax.make_jaxpr(functools.partial(train_step, config), axis_env=[(AXIS, 2)])(state, batch).jaxpr
    for primitive in ("psum", "scan"):  # over devices; over micro-batches
        out = [made.aval.size for one in program.eqns if one.primitive.name == primitive for made in one.outvars]
        assert adapters < sum(out) < adapters + 50, primitive  # the rest are losses and counts


def test_devices_and_micro_batches_change_nothing() -> None:
    config = step_config()
    state = first_state(small.params(), config)
    noise = np.random.default_rng(0)
    state.params[LORA] = jax.tree.map(
        lambda leaf: 0.1 * noise.standard_normal(leaf.shape, np.float32), state.params[LORA]
    )
    gradient_of = lambda state, batch: gradients(config, state.params, batch, state.step)[0][LORA]
    want, got = (on_devices(gradient_of, state, layout) for layout in ((1, 1), (4, 2)))
    by_path = zip(jax.tree.leaves(paths(want)), jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    for path, ours, theirs in by_path:
        assert_close(ours, theirs, 1e-5, path)


def test_without_a_rank_a_run_is_as_before() -> None:
    config = step_config(rank=0)
    assert config.freeze == ""
    state, plain = first_state(small.params(), config), initial_state(small.params(), config.optimizer)
    assert jax.tree.structure(state) == jax.tree.structure(plain)
    assert jax.tree.structure(state.params) == jax.tree.structure(small.params())
    batch = {name: value[0] for name, value in laid_out(small.clips(0), (1, 1)).items()}
    program = str(jax.make_jaxpr(functools.partial(train_step, config), axis_env=[(AXIS, 1)])(plain, batch))
    assert "lora" not in program


def test_what_is_trained_beside_the_adapters_and_what_is_not_can_be_chosen() -> None:
    everything = trained_paths(step_config())
    assert len(everything) == 8
    assert all(path.startswith("lora/") for path in everything)
    heads = {"text_embedding/embedding", "text_head/bias", "text_head/kernel"}
    assert trained_paths(step_config(also_train="text_(embedding|head)/.*")) == everything | heads
    attention = {path for path in everything if "/attn/" in path}
    assert trained_paths(step_config(freeze="lora/mlp/.*")) == attention
    both = step_config(freeze="lora/mlp/.*|text_head/bias", also_train="text_(embedding|head)/.*")
    assert trained_paths(both) == attention | heads - {"text_head/bias"}


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        (dict(also_train="nothing"), "lora.also_train: 'nothing' matches no parameter"),
        (dict(also_train="("), "lora.also_train: '(' is not a regular expression"),
        (dict(freeze="("), "optimizer.freeze: '(' is not a regular expression"),
        (dict(freeze="nothing"), "optimizer.freeze: 'nothing' matches no parameter"),
        (dict(freeze="lora/.*"), "matches every parameter: nothing would be trained"),
    ],
    ids=str,
)
def test_expressions_that_mean_nothing_are_named(chosen: dict[str, str], says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        step_config(**chosen)


def test_adapters_get_ten_times_the_rate_where_none_is_given() -> None:
    plain, adapted, given = ar.get_config(), ar.get_config(), ar.get_config()
    adapted.lora.rank = given.lora.rank = 8
    given.optimizer.learning_rate = 3e-6
    for settings in (plain, adapted, given):
        presets.fill(settings, 300)
    assert adapted.optimizer.learning_rate == pytest.approx(10 * plain.optimizer.learning_rate)
    assert given.optimizer.learning_rate == 3e-6
