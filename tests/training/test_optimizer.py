"""The optimiser: twelve steps beside torch's, the groups, the schedules, freezing."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax.traverse_util import flatten_dict
from optax import MaskedNode

from tests.support import small, torch_reference
from tests.support.parity import STACK, Tree, Twin, absolute_error, apart, assert_close, voice_tree, voice_twin
from tests.support.torch_reference import SAMPLES_PER_CODE, Trainer, random_batch, tiny_unified_voice
from tests.support.upstream_layout import upstream_batch
from tortoise_jax.errors import UserError
from tortoise_jax.models.unified_voice import UnifiedVoice
from tortoise_jax.training.optimizer import (
    OptimizerConfig,
    applied_steps,
    group_labels,
    group_norms,
    learning_rate_schedule,
    make_optimizer,
    merge,
    paths,
    split,
    swapped,
)
from tortoise_jax.training.step import StepConfig, initial_state, train_step

# Twelve steps of DLAS's recipe, beside torch

STEPS = 12
EACH_STEP = 1e-5  # relative, of losses, norms and rates
RECIPE = torch_reference.Recipe(lr=2e-3, clip_per_group=0.5, milestones=(4, 8))
OURS = OptimizerConfig(learning_rate=2e-3, clip_norm=0.5, milestones=(4, 8))
COLUMNS = ("loss/text", "loss/mel", "loss/total", "grad_norm/decayed", "grad_norm/undecayed", "learning_rate")


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """Torch in float64, and the final weights of the same run in float32, to see how far rounding alone goes.

    first_gradient: of the first step, as the optimizer got it.
    """

    start: Twin
    batches: list[dict[str, np.ndarray]]
    history: np.ndarray  # (steps, 6)
    first_gradient: Tree
    final: Tree
    final_float32: Tree

    def key_bias_drift(self) -> float:
        """How far torch's own float32 run ends from float64 in the key biases.

        They have no true gradient, so Adam follows rounding: how far is chance, of the order of the rates' sum.
        """
        ours, exact = (apart(tree, self.start.heads)[1] for tree in (self.final_float32, self.final))
        return max(absolute_error(ours[path], value) for path, value in exact.items())


@pytest.fixture(scope="module")
def reference() -> Trajectory:
    single, double = tiny_unified_voice(seed=5), tiny_unified_voice(seed=5).double()
    twin = voice_twin(single)
    trainer, plain = Trainer(double, RECIPE), Trainer(single, RECIPE)
    batches: list[dict[str, np.ndarray]] = []
    first_gradient: dict[str, torch.Tensor] = {}
    for step in range(STEPS):
        batch = random_batch(single, seed=100 + step)
        trainer.step(batch | {"cond_mel": batch["cond_mel"].double()})
        if step == 0:
            first_gradient = {name: value.grad.clone() for name, value in double.named_parameters()}
        plain.step(batch)
        arrays = {name: value.numpy() for name, value in batch.items()}
        lengths = arrays["code_lengths"] * SAMPLES_PER_CODE
        names = ("cond_mel", "text", "text_lengths", "codes")
        batches.append(upstream_batch(twin.config, *(arrays[name] for name in names), lengths))
    trees = [voice_tree(twin.config, arrays) for arrays in (first_gradient, double.state_dict(), single.state_dict())]
    return Trajectory(twin, batches, np.array(trainer.history), *trees)


def train(reference: Trajectory, config: OptimizerConfig) -> tuple[np.ndarray, Tree]:
    params = reference.start.params
    step_config = StepConfig(
        model=UnifiedVoice(reference.start.config),
        optimizer=make_optimizer(config, params),
        schedule=learning_rate_schedule(config),
        mel_norms=None,
        axis=None,
    )
    step = jax.jit(functools.partial(train_step, step_config))
    state, history = initial_state(params, step_config.optimizer), []
    for batch in reference.batches:
        state, metrics = step(state, {name: value[None] for name, value in batch.items()})
        history.append([float(metrics[name]) for name in COLUMNS])
    return np.array(history), state.params


def by_chance(gradient: np.ndarray) -> np.ndarray:
    """Where a gradient is lost in the rounding of float32.

    Adam's first step is the rate times its sign, however small it is: torch's own float32 run ends there anywhere.
    """
    size = np.abs(gradient)
    return (size > 0) & (size < 1e-5 * size.max())


def check_trajectory(reference: Trajectory, config: OptimizerConfig) -> None:
    history, final = train(reference, config)
    off = np.abs(history / reference.history - 1)
    for column, name in enumerate(COLUMNS):
        assert off[:, column].max() <= EACH_STEP, f"{name}: {off[:, column].max():.1e}"
    check_weights(reference, final)


def check_weights(reference: Trajectory, final: Tree) -> None:
    heads = reference.start.heads
    (got, got_keys), (want, want_keys) = apart(final, heads), apart(reference.final, heads)
    first, _ = apart(reference.first_gradient, heads)
    assert got.keys() == want.keys()
    chance = {path: by_chance(gradient) for path, gradient in first.items()}
    assert sum(map(np.sum, chance.values())) < 1e-3 * sum(map(np.size, chance.values()))
    for path, value in want.items():
        assert_close(got[path], value, 2 * RECIPE.lr, path, absolute_error)
        assert_close(np.where(chance[path], value, got[path]), value, STACK, path)
    for path, value in want_keys.items():
        assert_close(got_keys[path], value, 2 * reference.key_bias_drift(), f"{path} (keys)", absolute_error)


def test_twelve_steps_follow_torch(reference: Trajectory) -> None:
    history = reference.history
    assert (history[:, 3] > RECIPE.clip_per_group).all()  # clipping acts in both groups
    assert (history[:, 4] > RECIPE.clip_per_group).any()
    check_trajectory(reference, OURS)


@pytest.mark.parametrize(
    "change",
    [
        dict(weight_decay=2e-2),
        pytest.param(dict(milestones=(5, 8)), marks=pytest.mark.slow),
        pytest.param(dict(clip_norm=0.45), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_trajectory_fires(reference: Trajectory, change: dict[str, Any]) -> None:
    with pytest.raises(AssertionError, match="loss/text"):
        check_trajectory(reference, dataclasses.replace(OURS, **change))


@pytest.mark.parametrize(
    ("path", "place"), [("gpt/h/mlp/c_fc/kernel", (1, 5, 7)), ("gpt/h/attn/c_attn/bias", (1, -1)), ("keys", (1, 70))]
)
def test_weights_fire(reference: Trajectory, path: str, place: tuple[int, ...]) -> None:
    final = jax.tree.map(np.array, reference.final)
    check_weights(reference, final)
    by_path = flatten_dict(final, sep="/")
    by_path["gpt/h/attn/c_attn/bias" if path == "keys" else path][place] += 2e-3
    with pytest.raises(AssertionError, match=path):
        check_weights(reference, final)


# Groups


def test_groups_are_torchs(voice: Twin) -> None:
    model = tiny_unified_voice(seed=1)
    decayed, _ = torch_reference.parameter_groups(model)
    marks = {name: torch.full_like(p, float(name in decayed)) for name, p in model.named_parameters()}
    want = {path: value.max() for path, value in flatten_dict(voice_tree(voice.config, marks), sep="/").items()}
    labels = flatten_dict(group_labels(voice.params), sep="/")
    assert {path: float(label == "decayed") for path, label in labels.items()} == want
    assert set(labels.values()) == {"decayed", "undecayed"}


def test_group_norms_are_of_each_group() -> None:
    gradients = {"a": {"kernel": jnp.array([3.0, 4.0]), "bias": jnp.array([2.0])}, "b": {"scale": jnp.array([1.0])}}
    norms = group_norms(gradients)
    assert norms["grad_norm/decayed"] == pytest.approx(5)
    assert norms["grad_norm/undecayed"] == pytest.approx(5**0.5)
    frozen = group_norms(split(gradients, "a/kernel")[0])
    assert (frozen["grad_norm/decayed"], frozen["grad_norm/undecayed"]) == (0, pytest.approx(5**0.5))


def one_update(config: OptimizerConfig, params: Tree, gradients: Tree) -> Tree:
    optimizer = make_optimizer(config, params)
    with jax.numpy_dtype_promotion("standard"):
        return jax.jit(lambda: optimizer.update(gradients, optimizer.init(params), params)[0])()


FREEZE = r"gpt/h/.*|text_head/kernel"


def is_frozen(path: str) -> bool:
    return path.startswith("gpt/h/") or path == "text_head/kernel"


def test_a_split_tree_holds_each_leaf_once_and_merges_back() -> None:
    params = small.params()
    trained, frozen = split(params, FREEZE)
    held = lambda tree: set(jax.tree.leaves(paths(tree)))
    every = held(params)
    assert held(frozen) == {path for path in every if is_frozen(path)} != set()
    assert held(trained) == every - held(frozen)
    merged = merge(trained, frozen)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert all(ours is given for ours, given in zip(jax.tree.leaves(merged), jax.tree.leaves(params), strict=True))
    assert jax.tree.leaves(split(params, "")[1]) == []


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_frozen_parameters_have_no_state_and_no_update(name: str) -> None:
    """The state has the form it has for all parameters, so that runs begun before frozen ones were split off go on."""
    params = small.params()
    optimizer = make_optimizer(OptimizerConfig(name=name, freeze=FREEZE), params)
    trained, _ = split(params, FREEZE)
    state = optimizer.init(params)
    assert jax.tree.structure(state) == jax.tree.structure(optimizer.init(trained))
    held = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert [path for path in held if path.endswith("['wte']['embedding']") or "['text_head']['bias']" in path]
    assert not [path for path in held if "['gpt']['h']" in path or "['text_head']['kernel']" in path]
    with jax.numpy_dtype_promotion("standard"):
        updates, after = jax.jit(optimizer.update)(jax.tree.map(jnp.ones_like, trained), state, trained)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert jax.tree.structure(updates) == jax.tree.structure(trained)
    assert all(np.any(update) for update in jax.tree.leaves(updates))


def test_states_on_disk_keep_their_form() -> None:
    """The paths a checkpoint is read by: a run begun by an earlier version must go on."""
    state = make_optimizer(OptimizerConfig(), {"a": {"kernel": jnp.zeros(2)}}).init({"a": {"kernel": jnp.zeros(2)}})
    found = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    group = ".inner_states['{}'].inner_state[1].{}".format
    rate = ".inner_states['{}'].inner_state[3].count".format
    decayed = [group("decayed", name) for name in ("count", "mu['a']['kernel']", "nu['a']['kernel']")]
    assert found == [*decayed, rate("decayed"), group("undecayed", "count"), rate("undecayed")]
    assert list(state.inner_states) == ["decayed", "undecayed", "frozen"]


def test_decay_acts_on_weights_alone() -> None:
    params = small.params()
    nothing = jax.tree.map(jnp.zeros_like, params)
    updates = flatten_dict(one_update(OptimizerConfig(learning_rate=0.5, weight_decay=0.1), params, nothing), sep="/")
    for path, update in updates.items():
        want = -0.05 * flatten_dict(params, sep="/")[path] if path.endswith("kernel") else np.zeros_like(update)
        np.testing.assert_allclose(update, want, rtol=1e-6, err_msg=path)


def test_each_group_is_clipped_by_its_own_norm() -> None:
    """With Adam's epsilon far above the gradients an update is proportional to the clipped gradient."""
    params = {"a": {"kernel": jnp.zeros(2), "bias": jnp.zeros(2)}}
    gradients = {"a": {"kernel": jnp.array([3.0, 4.0]), "bias": jnp.array([0.3, 0.4])}}
    config = OptimizerConfig(learning_rate=1.0, epsilon=1e6, clip_norm=1.0, weight_decay=0.0)
    update = one_update(config, params, gradients)["a"]
    np.testing.assert_allclose(update["kernel"] * 1e6, [-0.6, -0.8], rtol=1e-4)
    np.testing.assert_allclose(update["bias"] * 1e6, [-0.3, -0.4], rtol=1e-4)


@pytest.mark.parametrize("scale", [1e-6, 1.0])
def test_narrow_moments_are_half_the_state_and_nearly_the_same_steps(scale: float) -> None:
    """Twelve updates from gradients of any size."""
    random = np.random.default_rng(0)
    params = {"a": {"kernel": jnp.asarray(random.standard_normal((8, 16), np.float32))}}
    gradients = [{"a": {"kernel": scale * (1 + random.standard_normal((8, 16), np.float32))}} for _ in range(12)]
    found = {}
    for moments in ("float32", "bfloat16"):
        config = OptimizerConfig(learning_rate=1.0, schedule="constant", moments=moments, weight_decay=0, epsilon=1e-12)
        optimizer = make_optimizer(config, params)
        state, total = optimizer.init(params), jnp.zeros((8, 16))
        assert {leaf.dtype.name for leaf in jax.tree.leaves(state) if leaf.ndim} == {moments}
        for gradient in gradients:
            with jax.numpy_dtype_promotion("standard"):
                updates, state = optimizer.update(gradient, state, params)
            total = total + updates["a"]["kernel"]
        assert {leaf.dtype.name for leaf in jax.tree.leaves(state) if leaf.ndim} == {moments}
        found[moments] = np.asarray(total)
    difference = np.abs(found["bfloat16"] - found["float32"]).max() / np.abs(found["float32"]).max()
    assert 0 < difference < 0.01


# Schedules


def rates(steps: int, **options: Any) -> list[float]:
    schedule = learning_rate_schedule(OptimizerConfig(learning_rate=1.0, **options))
    with jax.numpy_dtype_promotion("standard"):
        return [float(schedule(jnp.int32(step))) for step in range(steps)]


def test_stepped_schedule_halves_at_its_milestones() -> None:
    assert rates(6, milestones=(2, 4)) == [1, 1, 0.5, 0.5, 0.25, 0.25]


def test_warm_up_rises_to_the_rate_and_milestones_keep_their_steps() -> None:
    assert rates(7, milestones=(2, 5), warmup=4) == pytest.approx([0.25, 0.5, 0.75, 1, 0.5, 0.25, 0.25])
    assert rates(6, schedule="constant", warmup=3) == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1])
    assert rates(3, schedule="constant", warmup=1) == [1, 1, 1]


def test_cosine_schedule_ends_at_zero() -> None:
    got = rates(11, schedule="cosine", total_steps=10, warmup=2)
    assert got[:3] == pytest.approx([0.5, 1, 1])
    assert got[6] == pytest.approx(0.5)
    assert got[10] == pytest.approx(0, abs=1e-6)


# Errors


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (OptimizerConfig(name="sgd"), "optimizer.name is 'sgd'; expected one of adamw, adafactor"),
        (
            OptimizerConfig(schedule="linear"),
            "schedule is 'linear'; expected one of stepped, cosine, constant",
        ),
        (OptimizerConfig(freeze="gpt("), r"optimizer.freeze: 'gpt\(' is not a regular expression"),
        (OptimizerConfig(freeze=".*"), r"optimizer.freeze: '\.\*' matches every parameter: nothing would be trained"),
        (OptimizerConfig(freeze="gpt"), "optimizer.freeze: 'gpt' matches no parameter; their paths look like"),
    ],
)
def test_bad_settings_are_named(config: OptimizerConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_optimizer(config, small.params())


# --- the average of the parameters ------------------------------------------------------------------------------------


def test_the_average_follows_the_parameters_and_changes_no_step() -> None:
    """Against a plain loop; frozen parameters have none; a decay that rises forgets the start."""
    rng = np.random.default_rng(0)
    params = {"a": {"kernel": rng.standard_normal((2, 3), np.float32)}, "b": {"bias": np.ones(3, np.float32)}}
    plain = OptimizerConfig(learning_rate=0.1, schedule="constant", freeze="b/.*")
    averaging = dataclasses.replace(plain, ema=0.9)
    makers = [make_optimizer(config, params) for config in (plain, averaging)]
    states, current = [maker.init(params) for maker in makers], [params, params]
    mean = params["a"]["kernel"]
    for step in range(1, 120):
        gradient = {"a": {"kernel": rng.standard_normal((2, 3), np.float32)}, "b": {"bias": MaskedNode()}}
        for i, maker in enumerate(makers):
            trained, frozen = split(current[i], "b/.*")
            with jax.numpy_dtype_promotion("standard"):  # as in `train_step`
                updates, states[i] = maker.update(gradient, states[i], trained)
            current[i] = merge(optax.apply_updates(trained, updates), frozen)
        kept = min(0.9, (1 + step) / (10 + step))
        mean = kept * mean + (1 - kept) * np.asarray(current[1]["a"]["kernel"])
    np.testing.assert_array_equal(current[0]["a"]["kernel"], current[1]["a"]["kernel"])
    assert applied_steps(states[1]) == 119
    shown, kept_back = swapped(current[1], states[1])
    np.testing.assert_allclose(shown["a"]["kernel"], mean, rtol=1e-4)
    np.testing.assert_array_equal(shown["b"]["bias"], params["b"]["bias"])
    assert np.abs(shown["a"]["kernel"] - current[1]["a"]["kernel"]).max() > 1e-3
    jax.tree.map(np.testing.assert_array_equal, swapped(shown, kept_back), (current[1], states[1]))
    assert swapped(current[0], states[0]) == (current[0], states[0]), "a run without an average"
