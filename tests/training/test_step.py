"""A step gives the same however its clips are padded, split into micro-batches or spread over devices."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import small
from tests.support.parity import MEL_ABSOLUTE, ZERO_GRADIENT, absolute_error, apart, assert_close
from tests.support.programs import CPU_OPTIONS
from tests.support.small import CONFIG, DROPOUT, Batch, clips, with_padding_rows
from tortoise_jax.models.layers import TABLE_GRADIENTS, Compute, Embedding
from tortoise_jax.models.unified_voice import UnifiedVoice
from tortoise_jax.parallel import AXIS, rows_on_devices
from tortoise_jax.training import forward
from tortoise_jax.training import step as step_module
from tortoise_jax.training.forward import dropout_keys
from tortoise_jax.training.losses import means
from tortoise_jax.training.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer, split
from tortoise_jax.training.step import TrainState, eval_step, initial_state, train_step

SAME = 1e-5  # of each array's gradient norm, and of each loss
STEPS = 20
NO_DROPOUT = Compute()
Layout = tuple[int, int]  # devices, micro-batches
LAYOUTS: list[Layout] = [(1, 1), (1, 4), (2, 1), (4, 2), (8, 1)]


def pmapped(step: Any, config: Any, devices: int) -> Any:
    """Not parallel.mapped, which takes all devices there are."""
    return jax.pmap(functools.partial(step, config), axis_name=AXIS, devices=jax.local_devices()[:devices])


@functools.cache
def trained_on(devices: int, compute: Compute) -> Any:
    return pmapped(train_step, small.step_config(compute), devices)


def laid_out(batch: Batch, layout: Layout) -> Batch:
    """Rows (r, …) -> (devices, micro-batches, rows of each, …)."""
    return {name: value.reshape(*layout, -1, *value.shape[1:]) for name, value in batch.items()}


def start(devices: int) -> TrainState:
    """Sharded as a step's own outputs are: else the second step would be another program."""
    state = initial_state(small.params(), small.step_config().optimizer)
    copies = jax.tree.map(lambda leaf: np.broadcast_to(leaf, (devices, *np.shape(leaf))), state)
    return rows_on_devices(copies, devices)


def first(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf)[0], tree)


def one_step(
    batch: Batch, layout: Layout = (1, 1), compute: Compute = DROPOUT, step: Any = None
) -> tuple[Any, dict[str, Any]]:
    """(gradient, metrics) of the first step."""
    state, metrics = (step or trained_on(layout[0], compute))(start(layout[0]), laid_out(batch, layout))
    return first(state.opt_state[1]), first(metrics)


def losses(batches: Iterator[Batch], layout: Layout = (1, 1), compute: Compute = DROPOUT) -> np.ndarray:
    """Text, mel and total loss of each step (steps, 3)."""
    state, rows = start(layout[0]), []
    for batch in batches:
        state, metrics = trained_on(layout[0], compute)(state, laid_out(batch, layout))
        rows.append([first(metrics[f"loss/{name}"]) for name in ("text", "mel", "total")])
    return np.array(rows, np.float64)


def assert_same_gradient(got: Any, want: Any) -> None:
    """Each array, layer by layer, to 1e-5 of its norm; key biases, whose gradient is zero, in absolute terms."""
    (got_rest, got_keys), (want_rest, want_keys) = apart(got, CONFIG.heads), apart(want, CONFIG.heads)
    for path, array in want_rest.items():
        layered = path.startswith(("gpt/h/", "conditioning_encoder/attn/"))
        pairs = zip(got_rest[path], array, strict=True) if layered else [(got_rest[path], array)]
        for layer, (a, b) in enumerate(pairs):
            norm = np.linalg.norm(b)
            assert norm > 1e-3, f"{path} {layer}: no gradient to compare"
            assert np.linalg.norm(a - b) <= SAME * norm, f"{path} {layer}: {np.linalg.norm(a - b) / norm:.1e}"
    for path, array in want_keys.items():
        assert absolute_error(got_keys[path], array) <= ZERO_GRADIENT, path


def assert_same_losses(got: np.ndarray, want: np.ndarray) -> None:
    assert len(want) == STEPS
    assert np.ptp(want[:, 1]) > 0.1  # it trains
    np.testing.assert_allclose(got, want, rtol=SAME, atol=0)


@functools.cache
def reference() -> tuple[Any, np.ndarray]:
    """Gradient of clips(0) and the losses of 20 steps, on one device in one piece, with dropout."""
    return one_step(clips(0))[0], losses(clips(s) for s in range(STEPS))


# Micro-batches and devices, with dropout


@pytest.mark.parametrize(
    "layout",
    [*(pytest.param(one, marks=pytest.mark.slow) for one in LAYOUTS[1:3]), *LAYOUTS[3:]],
    ids=lambda layout: f"{layout[0]} devices, {layout[1]} micro-batches",
)
def test_micro_batches_and_devices_change_nothing(layout: Layout) -> None:
    assert_same_gradient(one_step(clips(0), layout)[0], reference()[0])
    assert_same_losses(losses((clips(s) for s in range(STEPS)), layout), reference()[1])


@pytest.mark.slow
@given(st.data())
def test_no_split_changes_the_gradient(data: st.DataObject) -> None:
    """Any number of clips in any order, padding rows among them, in any layout."""
    layout = data.draw(st.sampled_from(LAYOUTS))
    real = data.draw(st.integers(1, 8))
    order = data.draw(st.permutations(range(8)))
    batch = with_padding_rows({name: value[:real] for name, value in clips(1).items()}, 8)
    want, want_metrics = one_step(batch)
    got, metrics = one_step({name: value[np.array(order)] for name, value in batch.items()}, layout)
    got_flat, want_flat = jax.tree.leaves(got), jax.tree.leaves(want)
    for a, b in zip(got_flat, want_flat, strict=True):
        assert np.linalg.norm(a - b) <= SAME * max(np.linalg.norm(b), 1e-1)
    for name in ("loss/text", "loss/mel", "loss/stop", "loss/total", "mel_count", "stop_count"):
        np.testing.assert_allclose(metrics[name], want_metrics[name], rtol=SAME)
    assert metrics["stop_count"] == real


def test_a_partial_batch_counts_its_real_rows_only() -> None:
    five = {name: value[:5] for name, value in clips(2).items()}
    want, want_metrics = one_step(five)
    for layout in LAYOUTS[3:]:
        got, metrics = one_step(with_padding_rows(five, 8), layout)
        assert_same_gradient(got, want)
        np.testing.assert_allclose(metrics["loss/total"], want_metrics["loss/total"], rtol=SAME)


def test_invariance_fires_for_a_mean_of_means(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each device dividing by its own count, and the shares averaged."""
    plain = step_module.global_counts
    own = lambda config, batch: jax.tree.map(
        lambda count: count * jax.lax.axis_size(AXIS), plain(step_module.dataclasses.replace(config, axis=None), batch)
    )
    monkeypatch.setattr(step_module, "global_counts", own)
    gradient, _ = one_step(clips(0), (2, 1), step=pmapped(train_step, small.step_config(), 2))
    with pytest.raises(AssertionError):
        assert_same_gradient(gradient, reference()[0])


def test_invariance_fires_for_dropout_by_index(monkeypatch: pytest.MonkeyPatch) -> None:
    by_index = lambda seed, step, example: dropout_keys(seed, step, jnp.arange(len(example)))
    monkeypatch.setattr(step_module, "dropout_keys", by_index)
    gradient, _ = one_step(clips(0), (2, 1), step=pmapped(train_step, small.step_config(), 2))
    with pytest.raises(AssertionError):
        assert_same_gradient(gradient, reference()[0])


# Padding and buckets, without dropout: attention's draws change with the length


PADDED, PADDED_LAYOUT = 64, (2, 2)


@pytest.mark.parametrize(
    ("length", "layout"),
    [(PADDED, PADDED_LAYOUT), pytest.param(small.LONGEST + 7, (1, 1), marks=pytest.mark.slow)],
)
def test_padding_changes_nothing(length: int, layout: Layout) -> None:
    want = one_step(clips(0), compute=NO_DROPOUT)[0]
    assert_same_gradient(one_step(clips(0, length=length), layout, NO_DROPOUT)[0], want)
    expected = losses((clips(s) for s in range(STEPS)), compute=NO_DROPOUT)
    assert_same_losses(losses((clips(s, length=length) for s in range(STEPS)), layout, NO_DROPOUT), expected)


def test_invariance_fires_for_counted_padding() -> None:
    want = one_step(clips(0), compute=NO_DROPOUT)[0]
    longer = clips(0, length=PADDED)
    longer["token_types"][:, -1], longer["weights"][:, -1] = 2, 1.0
    with pytest.raises(AssertionError):
        assert_same_gradient(one_step(longer, PADDED_LAYOUT, NO_DROPOUT)[0], want)


# How it is computed


@pytest.mark.parametrize("compute", [Compute(remat=remat, unrolled=True) for remat in ("dots", "full")])
def test_what_is_computed_again_changes_nothing(compute: Compute) -> None:
    got, metrics = one_step(
        clips(0), compute=dataclasses.replace(DROPOUT, remat=compute.remat, unrolled=compute.unrolled)
    )
    want, want_metrics = one_step(clips(0))
    assert_same_gradient(got, want)
    for name in ("loss/text", "loss/mel", "loss/total"):
        np.testing.assert_allclose(metrics[name], want_metrics[name], rtol=1e-6)


def test_gradients_of_tables_by_products_are_the_same() -> None:
    got, _ = one_step(clips(0), compute=dataclasses.replace(DROPOUT, table_gradient="products"))
    assert_same_gradient(got, one_step(clips(0))[0])


def test_gradients_of_tables_are_summed_in_float32() -> None:
    """A thousand rows of bfloat16 for one entry of a table: a scatter rounds the sum at each of them."""
    rows = jax.random.normal(jax.random.key(0), (1024, 8), jnp.bfloat16)
    indices = jnp.zeros((1024,), jnp.int32)
    want = np.asarray(rows, np.float64).sum(axis=0)
    off = {}
    for name in TABLE_GRADIENTS:
        table = Embedding(4, 8, dtype=jnp.bfloat16, compute=Compute(table_gradient=name))
        params = {"params": {"embedding": jnp.zeros((4, 8))}}
        loss = lambda params, table=table: (table.apply(params, indices) * rows).astype(jnp.float32).sum()
        got = jax.grad(loss)(params)["params"]["embedding"]
        assert not got[1:].any()
        off[name] = np.abs(got[0] - want).max() / np.abs(want).max()
    assert off["products"] < 1e-6 < 1e-3 < off["scatter"]


@pytest.mark.parametrize(
    ("unrolled", "remat", "share"),
    [(False, "dots", 0.5), (False, "full", 0.25), (True, "dots", 0.7), (True, "full", 0.5)],
)
def test_what_is_computed_again_is_not_kept(unrolled: bool, remat: str, share: float) -> None:
    """Where layers stand side by side in one program too: there XLA would compute all again before it is needed."""
    assert temporaries(remat, unrolled) < share * temporaries("none", unrolled)


@functools.cache
def temporaries(remat: str, unrolled: bool) -> int:
    """Bytes of the gradient's program for six layers, compiled as runs compile on CPU."""
    config = dataclasses.replace(CONFIG, layers=6)
    model = UnifiedVoice(config, Compute(remat=remat, unrolled=unrolled))
    row = np.zeros((4, 64), np.int32)
    arrays = (np.zeros((4, 1, 5, config.mel_channels), np.float32), row, row, row)
    params = jax.eval_shape(model.init, jax.random.key(0), *arrays)["params"]
    targets = {"text": row, "mel": row}
    losses_of = lambda params: model.apply({"params": params}, *arrays, targets, method=UnifiedVoice.losses)
    gradient = jax.jit(jax.grad(lambda params: sum(map(jnp.sum, losses_of(params).values()))))
    return gradient.lower(params).compile(compiler_options=CPU_OPTIONS).memory_analysis().temp_size_in_bytes


def test_the_moments_wait_for_the_parameters() -> None:
    """Each its own: else XLA on CPU keeps the first moments, or the new ones, beside the old until all is done."""
    params = {"part": {f"layer_{i}": {"kernel": jax.ShapeDtypeStruct((256, 256), np.float32)} for i in range(8)}}
    options = OptimizerConfig()
    config = SimpleNamespace(
        optimizer=make_optimizer(options, params),
        schedule=learning_rate_schedule(options),
        freeze="",
        axis=None,
        counts=lambda batch: {},
        sums=lambda params, batch, step: {"square": sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params)) * batch},
        loss=lambda sums, counts: sums["square"],
        moved=lambda params, sums: params,
        metrics=lambda sums, counts, batch: {},
    )
    state = jax.eval_shape(functools.partial(initial_state, optimizer=config.optimizer), params)
    step = jax.jit(functools.partial(train_step, config), donate_argnums=0)
    program = step.lower(state, jax.ShapeDtypeStruct((1,), np.float32))
    needed = program.compile(compiler_options=CPU_OPTIONS).memory_analysis()
    size = 4 * sizes(params)
    assert needed.alias_size_in_bytes > 3 * size
    assert needed.temp_size_in_bytes < 2.1 * size  # two gradients: the sum of the micro-batches, and the last one's


# Evaluation


def test_evaluation_sums_are_those_of_training_without_dropout() -> None:
    evaluate = lambda layout: first(
        pmapped(eval_step, small.step_config(DROPOUT), layout[0])(start(layout[0]).params, laid_out(clips(0), layout))
    )
    sums = evaluate((1, 1))
    metrics = one_step(clips(0), compute=NO_DROPOUT)[1]
    for name, value in means(sums, sums).items():
        np.testing.assert_allclose(value, metrics[f"loss/{name}"], rtol=SAME)
    for name, value in evaluate((4, 2)).items():
        np.testing.assert_allclose(value, sums[name], rtol=SAME)
    assert abs(one_step(clips(0))[1]["loss/mel"] - metrics["loss/mel"]) > 1e-3  # dropout would have been seen


# What a step does with what is not finite


def equal(a: Any, b: Any) -> bool:
    return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted() -> None:
    run = trained_on(1, DROPOUT)
    state, metrics = run(start(1), laid_out(clips(0), (1, 1)))
    assert first(metrics["finite"])
    broken = clips(1)
    broken["conditioning_mel"][3] = np.nan
    for skips in (1, 2):
        after, metrics = run(state, laid_out(broken, (1, 1)))
        assert not first(metrics["finite"])
        assert first(after.skipped) == skips
        assert first(after.step) == first(state.step) + 1
        for name in ("params", "opt_state"):
            assert equal(getattr(after, name), getattr(state, name))
        state = after
    after, metrics = run(state, laid_out(clips(1), (1, 1)))
    assert first(metrics["finite"])
    assert first(after.skipped) == 0
    assert not equal(after.params, state.params)


def test_a_gradient_that_overflows_under_a_finite_loss_is_not_applied() -> None:
    step = pmapped(train_step, small.step_config(DROPOUT, text_weight=1e30), 1)
    before = start(1)
    state, metrics = step(before, laid_out(clips(0), (1, 1)))
    assert np.isfinite(first(metrics["loss/total"]))
    assert not first(metrics["finite"])
    assert equal(state.params, before.params)


# The learning rate


def test_the_rate_logged_is_the_one_used_after_skipped_steps() -> None:
    """A skipped step does not move the optimiser along its schedule; two are skipped before the first milestone, 8."""
    run = trained_on(1, DROPOUT)
    good, broken = laid_out(clips(0), (1, 1)), laid_out(clips(0), (1, 1))
    broken["conditioning_mel"] = np.full_like(broken["conditioning_mel"], np.nan)
    state, logged = start(1), []
    for batch in [good, broken, broken, *[good] * 9]:
        state, metrics = run(state, batch)
        logged.append(float(first(metrics["learning_rate"])))
    assert first(state.step) == len(logged) == 12
    assert logged == pytest.approx([1e-3] * 10 + [5e-4] * 2)


# Frozen parameters

FREEZE = "(?!mel_head/).*"  # all but a head


def sizes(tree: Any) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def stepped_with_runs_kernels(config: Any, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """After a step compiled to the kernels of a run on CPU: the suite's own (conftest.py) round as XLA groups them."""
    batch = laid_out(clips(0), (1, 4))
    program = pmapped(train_step, config, 1).lower(state, batch)
    return program.compile(compiler_options={"xla_cpu_use_fusion_emitters": True})(state, batch)


@functools.cache
def all_trained_step() -> tuple[TrainState, dict[str, Any]]:
    return stepped_with_runs_kernels(small.step_config(DROPOUT), start(1))


@pytest.mark.parametrize("freeze", ["conditioning_encoder/.*", FREEZE])
def test_frozen_parameters_stay_and_the_gradient_of_others_is_the_same_bit_for_bit(freeze: str) -> None:
    config = small.step_config(DROPOUT, freeze=freeze)
    before = initial_state(small.params(), config.optimizer)
    alone = jax.tree.map(lambda leaf: np.asarray(leaf)[None], before)
    after, metrics = stepped_with_runs_kernels(config, alone)
    all_trained, all_metrics = all_trained_step()
    trained, frozen = split(small.params(), freeze)
    new_trained, new_frozen = split(first(after.params), freeze)
    assert jax.tree.leaves(frozen)
    assert equal(new_frozen, frozen)
    assert not any(map(np.array_equal, jax.tree.leaves(new_trained), jax.tree.leaves(trained)))
    gradient = first(after.opt_state[1])
    assert jax.tree.structure(gradient) == jax.tree.structure(trained)
    assert equal(gradient, split(first(all_trained.opt_state[1]), freeze)[0])
    parts = {f"grad_norm/{part}" for part, tree in trained.items() if jax.tree.leaves(tree)}
    assert {name for name in metrics if name.startswith("grad_norm/")} == parts | {
        "grad_norm/decayed",
        "grad_norm/undecayed",
    }
    for part in parts:
        assert equal(metrics[part], all_metrics[part])


@pytest.mark.parametrize("freeze", ["", FREEZE])
def test_gradients_are_computed_and_summed_for_trained_parameters_alone(freeze: str) -> None:
    config = small.step_config(NO_DROPOUT, freeze=freeze)
    state = initial_state(small.params(), config.optimizer)
    batch = {name: value[0] for name, value in laid_out(clips(0), (1, 4)).items()}
    program = jax.make_jaxpr(functools.partial(train_step, config), axis_env=[(AXIS, 2)])(state, batch).jaxpr
    trained = sizes(split(state.params, freeze)[0])
    for primitive in ("psum", "scan"):  # over devices; over micro-batches
        out = [
            variable.aval.size for one in program.eqns if one.primitive.name == primitive for variable in one.outvars
        ]
        assert trained < sum(out) < trained + 50, primitive  # the rest are losses and counts


def test_freezing_saves_memory_and_the_state_is_written_in_place() -> None:
    """On one device, where a sum over devices would be a copy."""

    def analysis(freeze: str) -> Any:
        config = small.step_config(NO_DROPOUT, freeze=freeze)
        state = jax.tree.map(lambda leaf: np.asarray(leaf)[None], initial_state(small.params(), config.optimizer))
        step = jax.pmap(functools.partial(train_step, config), AXIS, donate_argnums=0, devices=jax.local_devices()[:1])
        program = step.lower(state, laid_out(clips(0), (1, 4))).compile()
        assert "all-reduce" not in program.as_text()
        found = program.memory_analysis()
        assert found.alias_size_in_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        return found

    everything, head = analysis(""), analysis(FREEZE)
    saved = 4 * (sizes(small.params()) - sizes(split(small.params(), FREEZE)[0]))
    assert everything.temp_size_in_bytes - head.temp_size_in_bytes > saved


# Small parts


def test_dropout_keys_follow_seed_step_and_example() -> None:
    data = lambda *arguments: jax.random.key_data(dropout_keys(*arguments)).tolist()
    want = data(0, jnp.int32(7), jnp.array([3, 4]))
    assert data(0, jnp.int32(7), jnp.array([4, 9, 3]))[2] == want[0]
    assert data(0, jnp.int32(7), jnp.array([4, 9, 3]))[0] == want[1]
    keys = {str(key) for seed in (0, 1) for step in (0, 7) for key in data(seed, jnp.int32(step), jnp.arange(50))}
    assert len(keys) == 200


def test_conditioning_mel_is_the_log_mel_of_the_batchs_waveforms() -> None:
    import torch

    from tests.support.torch_reference import log_mel

    wav = np.random.default_rng(0).integers(-9000, 9000, (2, 2, 4096)).astype(np.int16)
    norms = -np.linspace(1, 3, 80, dtype=np.float32)
    got = forward.conditioning_mel({"conditioning_wav": jnp.asarray(wav)}, norms)
    want = log_mel(torch.tensor(wav.astype(np.float32) / 32768).reshape(4, 4096), torch.tensor(norms))
    assert_close(got.reshape(4, -1, 80), want.transpose(1, 2), MEL_ABSOLUTE, measure=absolute_error)
