"""The diffusion sampler: its schedule in numbers, the loop against a plain one, padding, and known mistakes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.parity import Twin, assert_close, twin_of
from tests.support.torch_reference import tiny_diffusion
from tortoise_jax.checkpoints import parts
from tortoise_jax.models.diffusion import DiffusionDecoder, frames_of
from tortoise_jax.synthesis import denoising, schedule

CHAIN = 1e-3  # of the largest value: every step amplifies the rounding of the one before
ROWS, FRAMES, STEPS, STRENGTH = 2, 13, 4, 2.0


# The schedule


def test_trap_12_kept_steps_are_rounded_half_to_even_on_summed_positions() -> None:
    assert schedule.kept_steps(80)[[0, 1, 2, 3, -2, -1]].tolist() == [0, 51, 101, 152, 3948, 3999]
    assert schedule.kept_steps(2).tolist() == [0, 3999]
    assert schedule.kept_steps(3).tolist() == [0, 2000, 3999]  # of 1999.5
    for steps in (30, 80, 200, 400, 4000):
        kept = schedule.kept_steps(steps)
        assert (kept[0], kept[-1], len(set(kept.tolist()))) == (0, 3999, steps)


def test_the_whole_schedule_ends_where_upstreams_does() -> None:
    assert schedule.spaced(4000).alphas_cumprod[-1] == pytest.approx(4.2467e-5, rel=1e-4)
    kept = schedule.spaced(30)
    trained = np.cumprod(1 - np.linspace(2.5e-5, 5e-3, 4000))
    np.testing.assert_allclose(kept.alphas_cumprod, trained[kept.trained], rtol=1e-12)


def test_trap_11_everything_is_derived_from_the_spaced_betas() -> None:
    """In ratios of the trained alphas between neighbours, not by reading the tables of 4000 steps."""
    kept, whole = schedule.spaced(30), schedule.spaced(4000)
    assert kept.betas[5] > 50 * whole.betas[kept.trained[5]]
    assert np.all(np.abs(kept.log_variance - whole.log_variance[kept.trained])[1:] > 1)


def test_trap_10_the_first_log_variance_is_the_seconds() -> None:
    kept = schedule.spaced(30)
    variance = kept.betas[1] * (1 - kept.alphas_cumprod[0]) / (1 - kept.alphas_cumprod[1])
    assert kept.log_variance[0] == kept.log_variance[1] == pytest.approx(np.log(variance))


def test_trap_9_guidance_grows_towards_the_end() -> None:
    assert schedule.guidance(4, 2.0).tolist() == [2.0, 1.5, 1.0, 0.5]  # by spaced index, 0 is the last step
    assert denoising.coefficients(4, 2.0)["guidance"].tolist() == [0.5, 1.0, 1.5, 2.0]


# The loop


@pytest.fixture(scope="module")
def decoder() -> Twin:
    """Wide enough that the unconditional pass does not amplify rounding."""
    return twin_of(parts.DIFFUSION, tiny_diffusion(num_layers=1, model_channels=64, in_channels=20, out_channels=40))


def given(mels: int = 20) -> dict[str, Any]:
    normal = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
    return {
        "aligned": normal(0, ROWS, FRAMES, 64),
        "start": normal(1, ROWS, FRAMES, mels),
        "noise": normal(2, STEPS, ROWS, FRAMES, mels),
    }


@functools.cache
def compiled(config: Any, guided: bool) -> Callable[..., Any]:
    model = DiffusionDecoder(config)
    return jax.jit(
        lambda variables, arrays, steps: denoising.loop(
            *(model, variables, arrays["aligned"], None, arrays["start"], lambda j: arrays["noise"][j], steps, guided)
        )[0]
    )


def ours(twin: Twin, guided: bool, compiled: Callable[..., Any] = compiled) -> np.ndarray:
    steps = {name: jnp.asarray(v) for name, v in denoising.coefficients(STEPS, STRENGTH if guided else None).items()}
    return np.asarray(compiled(twin.config, guided)(twin.variables, given(), steps))


def plain(twin: Twin, guided: bool) -> np.ndarray:
    """The same step by step in float64, two passes one after the other, from the formulas."""
    arrays, model = given(), DiffusionDecoder(twin.config)
    estimate = jax.jit(lambda x, steps, aligned: model.apply(twin.variables, x, steps, aligned, method="estimate"))
    free = model.apply(twin.variables, ROWS, FRAMES, method="unconditioned")
    trained = np.cumprod(1 - np.linspace(2.5e-5, 5e-3, 4000))[schedule.kept_steps(STEPS)]
    x = np.asarray(arrays["start"], np.float64)
    for j, i in enumerate(reversed(range(STEPS))):
        before = trained[i - 1] if i else 1.0
        beta = 1 - trained[i] / before
        lower = 1 if i == 0 else i
        variance = (1 - trained[lower] / trained[lower - 1]) * (1 - trained[lower - 1]) / (1 - trained[lower])
        steps = jnp.full(ROWS, schedule.kept_steps(STEPS)[i], jnp.int32)
        both = [np.asarray(estimate(jnp.float32(x), steps, c), np.float64) for c in (arrays["aligned"], free)]
        eps, value = both[0][..., :20], both[0][..., 20:]
        if guided:
            k = STRENGTH * (1 - i / STEPS)
            eps = (1 + k) * eps - k * both[1][..., :20]
        x0 = np.clip(np.sqrt(1 / trained[i]) * x - np.sqrt(1 / trained[i] - 1) * eps, -1, 1)
        x = (beta * np.sqrt(before) * x0 + (1 - before) * np.sqrt(1 - beta) * x) / (1 - trained[i])
        if i:
            fraction = (value + 1) / 2
            log_variance = fraction * np.log(beta) + (1 - fraction) * np.log(variance)
            x = x + np.exp(0.5 * log_variance) * np.asarray(arrays["noise"][j], np.float64)
    return x


@pytest.fixture(scope="module")
def wanted(decoder: Twin) -> np.ndarray:
    return plain(decoder, True)


def test_the_loop_is_the_plain_one(decoder: Twin, wanted: np.ndarray) -> None:
    assert_close(ours(decoder, True), wanted, CHAIN)


def test_without_guidance_it_is_the_plain_one(decoder: Twin) -> None:
    assert_close(ours(decoder, False), plain(decoder, False), CHAIN)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda c: c | {"guidance": c["guidance"][::-1].copy()}, id="trap 9: the ramp turned round"),
        pytest.param(lambda c: c | {"guidance": np.full_like(c["guidance"], 2.0)}, id="trap 9: no ramp"),
        pytest.param(lambda c: c | {"recip": 1.01 * c["recip"]}, id="x0"),
        pytest.param(lambda c: c | {"noise": np.ones_like(c["noise"])}, id="trap 10: noise at the last step"),
        pytest.param(lambda c: c | {"log_variance": c["log_beta"]}, id="the variance of beta alone"),
        pytest.param(lambda c: c | {"trained": c["trained"] // 4}, id="trap 7: steps of 1000"),
    ],
)
def test_parity_fires_for_mistakes(
    decoder: Twin, wanted: np.ndarray, change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = denoising.coefficients
    monkeypatch.setattr(denoising, "coefficients", lambda *arguments: change(right(*arguments)))
    with pytest.raises(AssertionError):
        assert_close(ours(decoder, True), wanted, CHAIN)


def test_trap_10_without_clipping_it_is_another_loop(
    decoder: Twin, wanted: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(denoising.jnp, "clip", lambda x, low, high: x)
    with pytest.raises(AssertionError):
        assert_close(ours(decoder, True, compiled.__wrapped__), wanted, CHAIN)


class VarianceOfBothPasses(DiffusionDecoder):
    """The variance of the other half of the batch."""

    def estimate(self, *given: Any) -> jax.Array:
        out = super().estimate(*given)
        half = out.shape[-1] // 2
        return jnp.concatenate([out[..., :half], jnp.roll(out[..., half:], len(out) // 2, axis=0)], axis=-1)


def test_trap_9_the_variance_is_the_conditional_passs(
    decoder: Twin, wanted: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.DiffusionDecoder", VarianceOfBothPasses)
    with pytest.raises(AssertionError):
        assert_close(ours(decoder, True, compiled.__wrapped__), wanted, CHAIN)


def test_trap_10_the_temperature_is_of_the_first_noise_alone(decoder: Twin, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(
        denoising, "loop", lambda *given: (seen.update(start=given[4], later=given[5](jnp.int32(1))) or given[4], {})
    )
    keys, steps = jax.random.split(jax.random.key(5), 2), denoising.coefficients(3, 2.0)
    given = (jnp.zeros((2, 7, 64)), jnp.ones((2, 7), bool), keys, steps, jnp.float32(0.5), True)
    denoising.denoise.__wrapped__(DiffusionDecoder(decoder.config), decoder.variables, *given)
    drawn = lambda j: [jax.random.normal(jax.random.fold_in(key, j), (7, 20)) for key in keys]
    assert_close(seen["start"], 0.5 * np.stack(drawn(3)), 1e-6)
    assert_close(seen["later"], np.stack(drawn(1)), 1e-6)


def test_trap_22_the_first_step_amplifies_what_is_not_clipped() -> None:
    """Why chains are compared at 1e-3 of the largest value, and single evaluations at 1e-5."""
    assert schedule.spaced(80).recipm1[-1] == pytest.approx(153.45, abs=0.05)


def test_a_rows_mel_depends_neither_on_others_nor_on_padding(decoder: Twin) -> None:
    model, steps = DiffusionDecoder(decoder.config), denoising.coefficients(3, 2.0)
    keys = jax.random.split(jax.random.key(5), 2)
    latents = jax.random.normal(jax.random.key(0), (2, 9, 24))
    voices, lengths = jax.random.normal(jax.random.key(1), (2, 128)), np.array([4, 9], np.int32)

    def mel(latents: Any, voices: Any, lengths: np.ndarray, keys: Any, frames: int) -> np.ndarray:
        aligned = denoising.align(model, decoder.variables, latents, voices, frames, lengths)
        mask = np.arange(frames) < np.array([[frames_of(int(n))] for n in lengths])
        return np.asarray(
            denoising.denoise(model, decoder.variables, aligned, mask, keys, steps, np.float32(1), guided=True)
        )

    together = mel(latents, voices, lengths, keys, frames_of(9) + 11)
    for r, n in enumerate(lengths.tolist()):
        row, t = slice(r, r + 1), frames_of(n)
        alone = mel(latents[row, :n], voices[row], lengths[row], keys[row], t)
        assert_close(together[row, :t], alone, CHAIN, f"row {r}")


def test_denormalised_ends() -> None:
    assert denoising.denormalised(jnp.array([-1.0, 1.0])).tolist() == pytest.approx([-11.512925, 2.3143387])
