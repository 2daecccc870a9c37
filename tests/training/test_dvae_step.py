"""A step of dVAE training: against torch over ten steps, and the same on any number of devices and micro-batches."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
import torch

from convert.tables.dvae import TABLE
from tests.support.parity import MODULE, STACK, Twin, assert_close, assert_trees_close, dvae_tree, part_tree
from tests.support.torch_reference import tiny_dvae
from tortoise_jax.audio import MEL_FRAMES_PER_CODE, SAMPLES_PER_CODE, default_mel_norms, log_mel
from tortoise_jax.checkpoints.parts import abstract_tree
from tortoise_jax.models.dvae import DiscreteVAE, DVAEConfig
from tortoise_jax.training import dvae_step
from tortoise_jax.training.dvae_step import MOVED, DVAEStep
from tortoise_jax.training.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer
from tortoise_jax.training.step import TrainState, eval_step, evaluation, gradients, initial_state, train_step

CODES, ROWS = 8, 8
RECIPE = OptimizerConfig(learning_rate=1e-3, schedule="constant", beta2=0.99, weight_decay=0.0, clip_norm=1e9)
SAME = 1e-5
STEPS: dict[tuple[int, int], Any] = {}  # by recipe and devices


def crops(seed: int, rows: int = ROWS, short: bool = False) -> dict[str, np.ndarray]:
    """Noise that rises and falls, (rows, samples); with `short`, rows of fewer codes and one without a clip."""
    random = np.random.default_rng(seed)
    samples = CODES * SAMPLES_PER_CODE
    loud = np.abs(np.sin(np.arange(samples) * random.uniform(1e-4, 1e-3, (rows, 1))))
    wav = (8000 * loud * random.standard_normal((rows, samples))).astype(np.int16)
    codes = np.full(rows, CODES)
    if short:
        codes = np.array([CODES, 3, 5, 1, CODES, 2, CODES, 0])[:rows]
        wav[np.arange(samples) >= codes[:, None] * SAMPLES_PER_CODE] = 0
    frames = (codes * MEL_FRAMES_PER_CODE).astype(np.int32)
    example = np.where(codes > 0, np.arange(rows), -1).astype(np.int32)
    return {"wav": wav, "frames": frames, "row": np.arange(rows, dtype=np.int32), "example": example}


def laid_out(batch: dict[str, np.ndarray], devices: int, accumulation: int) -> dict[str, np.ndarray]:
    return {name: value.reshape(devices, accumulation, -1, *value.shape[1:]) for name, value in batch.items()}


def recipe(twin: Twin, recipe: OptimizerConfig = RECIPE, axis: str | None = "data", **options: Any) -> DVAEStep:
    """The same object for the same recipe, so that its step is compiled once."""
    return recipe_of(twin.config, recipe, axis, **options)


@functools.cache
def recipe_of(model: DVAEConfig, recipe: OptimizerConfig, axis: str | None, **options: Any) -> DVAEStep:
    config = dataclasses.replace(recipe, freeze=MOVED)
    return DVAEStep(
        model=DiscreteVAE(model),
        optimizer=make_optimizer(config, abstract_tree(model)),
        schedule=learning_rate_schedule(config),
        mel_norms=default_mel_norms(),
        rows=ROWS,
        axis=axis,
        **options,
    )


def step_on(config: DVAEStep, twin: Twin, batch: dict[str, np.ndarray], devices: int, accumulation: int) -> Any:
    """(state, metrics) of the first device after one step."""
    if (id(config), devices) not in STEPS:
        step = functools.partial(train_step, config)
        STEPS[id(config), devices] = jax.pmap(step, "data", devices=jax.local_devices()[:devices])
    copies = jax.tree.map(lambda leaf: np.broadcast_to(leaf, (devices, *np.shape(leaf))), start(config, twin))
    after = STEPS[id(config), devices](copies, laid_out(batch, devices, accumulation))
    return jax.tree.map(lambda leaf: np.asarray(leaf)[0], after)


def start(config: DVAEStep, twin: Twin) -> TrainState:
    return jax.jit(functools.partial(initial_state, optimizer=config.optimizer))(twin.params)


# --- torch ------------------------------------------------------------------------------------------------------------


def mel_of(batch: dict[str, np.ndarray]) -> torch.Tensor:
    """(b, m, t), as the step computes it."""
    mel = log_mel(batch["wav"], default_mel_norms())[:, : CODES * MEL_FRAMES_PER_CODE]
    return torch.tensor(np.asarray(mel)).transpose(1, 2)


def ten_steps(torch_dvae: torch.nn.Module, twin: Twin, reconstruction: str, **options: Any) -> None:
    """Losses, gradients and the codebook's buffers at each of ten steps, and the weights after them."""
    model = copy.deepcopy(torch_dvae).requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), lr=RECIPE.learning_rate, betas=(0.9, 0.99), eps=1e-8)
    config = recipe(twin, axis=None, reconstruction=reconstruction, **options)
    step = jax.jit(functools.partial(train_step, config))
    gradient_of = jax.jit(lambda params, batch, step: gradients(config, params, batch, step)[0])
    state = start(config, twin)
    for number in range(10):
        batch = crops(number)
        recon, commit, _ = model.train_forward(mel_of(batch), smooth_l1=reconstruction == "smooth_l1")
        optimizer.zero_grad()
        (recon + 0.25 * commit).backward()
        one = laid_out(batch, 1, 1)
        gradient = gradient_of(state.params, {name: value[0] for name, value in one.items()}, np.int32(number))
        for part in ("encoder", "decoder"):
            named = {key: p.grad for key, p in model.get_submodule(part).named_parameters()}
            assert_trees_close(gradient[part], part_tree(TABLE, part, named), STACK, heads=1)
        optimizer.step()
        state, metrics = step(state, {name: value[0] for name, value in one.items()})
        assert_close(metrics["loss/recon"], recon, MODULE, f"recon_loss {number}")
        assert_close(metrics["loss/commit"], commit, STACK, f"commit_loss {number}")
        book = dvae_tree(twin.config, model.state_dict())["codebook"]
        for name, value in book.items():
            assert_close(state.params["codebook"][name], value, STACK, f"codebook {name} {number}")
    want = dvae_tree(twin.config, model.state_dict())
    for part in ("encoder", "decoder"):
        assert_trees_close(state.params[part], want[part], STACK, heads=1)


@pytest.mark.parametrize("reconstruction", ["mse", "smooth_l1"])
def test_ten_steps(torch_dvae: Any, dvae: Twin, reconstruction: str) -> None:
    ten_steps(torch_dvae, dvae, reconstruction)


@pytest.mark.parametrize(
    "change",
    [dict(commitment=0.3), dict(freeze=f"{MOVED}|encoder/point_4/.*"), dict(revive_below=100.0)],
    ids=["commitment", "frozen", "revived"],
)
def test_ten_steps_fire(torch_dvae: Any, dvae: Twin, change: dict[str, Any]) -> None:
    with pytest.raises((AssertionError, ValueError, KeyError)):
        ten_steps(torch_dvae, dvae, "mse", **change)


# --- devices and micro-batches ----------------------------------------------------------------------------------------


def assert_same_step(found: Any, wanted: Any) -> None:
    (state, metrics), (want_state, want_metrics) = found, wanted
    for one, other in zip(jax.tree.leaves(state.params), jax.tree.leaves(want_state.params), strict=True):
        np.testing.assert_allclose(one, other, atol=SAME * max(np.abs(other).max(), 1e-6))
    for name, value in want_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=SAME, atol=SAME, err_msg=name)


SGD_LIKE = dataclasses.replace(RECIPE, epsilon=1.0)  # Adam would make much of float noise where a gradient is zero


@pytest.fixture(scope="module")
def reviving_on_one_device(dvae: Twin) -> Any:
    return step_on(recipe(dvae, SGD_LIKE, revive_below=2.0), dvae, crops(3, short=True), 1, 1)


@pytest.mark.parametrize(("devices", "accumulation"), [(2, 1), (8, 1), (2, 2), (1, 4)])
def test_a_step_is_the_same_on_any_devices(
    dvae: Twin, reviving_on_one_device: Any, devices: int, accumulation: int
) -> None:
    """With dead codes revived, where the draws must be the same too."""
    config = recipe(dvae, SGD_LIKE, revive_below=2.0)
    assert_same_step(step_on(config, dvae, crops(3, short=True), devices, accumulation), reviving_on_one_device)


def test_a_step_that_revives_nothing_is_the_same_on_any_devices(dvae: Twin) -> None:
    config, batch = recipe(dvae, SGD_LIKE), crops(3, short=True)
    assert_same_step(step_on(config, dvae, batch, 2, 2), step_on(config, dvae, batch, 1, 1))


def test_it_fires_where_each_device_moves_its_own_codebook(dvae: Twin, monkeypatch: pytest.MonkeyPatch) -> None:
    config, batch = recipe(dvae, SGD_LIKE), crops(3)
    whole = step_on(config, dvae, batch, 1, 1)
    shared = DVAEStep.moved
    own = lambda self, params, sums: shared(self, params, jax.tree.map(lambda total: total / 2, sums))
    monkeypatch.setattr(DVAEStep, "moved", own)
    with pytest.raises(AssertionError):  # of another object, since its step is another
        assert_same_step(step_on(dataclasses.replace(config), dvae, batch, 2, 1), whole)


def test_what_follows_a_short_clip_counts_for_nothing(dvae: Twin) -> None:
    config = recipe(dvae, SGD_LIKE)
    batch = crops(4, short=True)
    state, metrics = step_on(config, dvae, batch, 1, 1)
    real = int(batch["frames"].sum()) // MEL_FRAMES_PER_CODE
    assert metrics["code_count"] == real
    before, after = dvae.params["codebook"]["cluster_size"], state.params["codebook"]["cluster_size"]
    np.testing.assert_allclose(after.sum(), 0.99 * before.sum() + 0.01 * real, rtol=1e-6)


def test_the_codebook_has_no_optimiser_state(dvae: Twin) -> None:
    state = start(recipe(dvae), dvae)
    shapes = {leaf.shape for leaf in jax.tree.leaves(state.opt_state)}
    assert dvae.params["codebook"]["embed"].shape not in shapes


# --- dead codes -------------------------------------------------------------------------------------------------------


def with_dead_codes(twin: Twin) -> Twin:
    params = jax.tree.map(np.array, twin.params)
    params["codebook"]["embed"][:, :40] = 1e3
    params["codebook"]["embed_avg"][:, :40] = 1e-3
    params["codebook"]["cluster_size"][:40] = 0.0
    return dataclasses.replace(twin, params=params)


def test_dead_codes_are_moved_onto_features(dvae: Twin) -> None:
    twin, batch = with_dead_codes(dvae), crops(5, short=True)
    state, _ = step_on(recipe(twin, SGD_LIKE, revive_below=0.05), twin, batch, 1, 1)
    mel = np.asarray(mel_of(batch).transpose(1, 2))
    variables = {"params": {name: twin.params[name] for name in ("encoder", "decoder")}}
    variables["codebook"] = {"codebook": twin.params["codebook"]}
    features = np.asarray(DiscreteVAE(twin.config).apply(variables, mel, method="features"))
    real = np.arange(CODES) < batch["frames"][:, None] // MEL_FRAMES_PER_CODE
    for code in range(40):
        moved = state.params["codebook"]["embed"][:, code]
        nearest = np.abs(features[real] - moved).max(axis=1).min()
        # A row without a clip can be drawn; the code waits for the next step then.
        assert nearest < 1e-5 or state.params["codebook"]["cluster_size"][code] == 0
    revived = state.params["codebook"]["cluster_size"][:40] == np.float32(0.05)
    assert revived.mean() > 0.7


def test_none_is_moved_where_reviving_is_off(dvae: Twin) -> None:
    twin = with_dead_codes(dvae)
    state, _ = step_on(recipe(twin, SGD_LIKE), twin, crops(5), 1, 1)
    assert (state.params["codebook"]["cluster_size"][:40] == 0).all()


# --- what is reported -------------------------------------------------------------------------------------------------


def test_metrics_say_what_the_codes_are_used_for(dvae: Twin) -> None:
    config, batch = recipe(dvae, axis=None), crops(6)
    totals = jax.jit(functools.partial(eval_step, config))(
        dvae.params, {name: value[None] for name, value in batch.items()}
    )
    values = evaluation(config, totals)
    counted = np.asarray(totals["picked"])
    share = counted[counted > 0] / counted.sum()
    assert counted.sum() == ROWS * CODES
    assert values["used"] == pytest.approx((counted > 0).mean())
    assert values["perplexity"] == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-5)
    assert values["total"] == pytest.approx(values["recon"] + 0.25 * values["commit"], rel=1e-6)
    metrics = {name: np.asarray(value) for name, value in config.metrics(totals, totals).items()}
    scalars = config.scalars(metrics)
    bands = [scalars[f"loss/bands_from_{start}"] for start in range(0, 80, 10)]
    assert np.mean(bands) == pytest.approx(values["recon"], rel=1e-5)
    assert len(set(bands)) == 8


def test_a_step_that_is_not_finite_moves_nothing(dvae: Twin) -> None:
    twin = dataclasses.replace(dvae, params=jax.tree.map(np.array, dvae.params))
    twin.params["decoder"]["point_5"]["bias"][0] = np.nan
    state, metrics = step_on(recipe(twin), twin, crops(7), 1, 1)
    assert isinstance(state, TrainState)
    assert not metrics["finite"]
    assert state.skipped == 1
    for name, value in twin.params["codebook"].items():
        np.testing.assert_array_equal(state.params["codebook"][name], value)


def test_smooth_l1_is_torchs() -> None:
    out, mel = (np.random.default_rng(i).standard_normal((4, 9)).astype(np.float32) * 2 for i in (0, 1))
    want = torch.nn.functional.smooth_l1_loss(torch.tensor(out), torch.tensor(mel), reduction="none")
    np.testing.assert_allclose(dvae_step.error("smooth_l1", out, mel), want, rtol=1e-6, atol=1e-7)


def test_a_dvae_learns(dvae: Twin) -> None:
    """Forty steps on one batch: the error falls, and without its codes it does not."""
    model = tiny_dvae(seed=3)
    assert model.codebook.embed.shape == dvae.params["codebook"]["embed"].shape
    config = recipe(dvae, dataclasses.replace(RECIPE, learning_rate=3e-3), axis=None, revive_below=0.05)
    step = jax.jit(functools.partial(train_step, config))
    state = start(config, dvae)
    batch = {name: value[None] for name, value in crops(8).items()}
    losses = []
    for _ in range(40):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss/recon"]))
    assert losses[-1] < 0.5 * losses[0]
