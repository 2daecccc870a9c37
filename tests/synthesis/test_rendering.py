"""From drawn codes to 24 kHz speech: scores, mels and waveforms of rows, however they are batched and padded."""

from __future__ import annotations

import functools
import re
from collections import Counter

import jax
import numpy as np
import pytest
import torch

from tests.support.parity import MODULE, Twin, absolute_error, assert_close, error, twin_of
from tests.support.torch_reference import CLVP, tiny_clvp, tiny_diffusion, tiny_vocoder
from tortoise_jax.checkpoints import parts
from tortoise_jax.models.clvp import CLVP as CLVPModel
from tortoise_jax.models.compiled import apply
from tortoise_jax.models.diffusion import DiffusionDecoder, frames_of
from tortoise_jax.models.layers import Compute
from tortoise_jax.synthesis import denoising, diffusion_inputs, rendering
from tortoise_jax.synthesis.diffusion_inputs import repaired
from tortoise_jax.synthesis.presets import PRESETS

CHAIN = 1e-3
# What bfloat16 may change: of an evaluation's largest value; a mel's mean difference in nepers; a score.
EVALUATION_IN_BFLOAT16, MEL_IN_BFLOAT16, SCORES_IN_BFLOAT16 = 0.01, 0.1, 0.01
TEXT = [5, 9, 30, 31, 7]
TOTAL = 24  # codes of a row, in place of 500


@pytest.fixture(scope="module")
def torch_clvp() -> CLVP:
    return tiny_clvp(num_speech_tokens=300).requires_grad_(False)


@pytest.fixture(scope="module")
def clvp(torch_clvp: CLVP) -> Twin:
    return twin_of(parts.CLVP, torch_clvp)


def rows() -> list[np.ndarray]:
    """Speech that stops early, late, at the last place but one, and never."""
    random = np.random.default_rng(0)
    return [random.integers(0, 300, n).astype(np.int32) for n in (3, 17, 23, 24)]


def test_repaired_codes() -> None:
    made = [repaired(row, TOTAL) for row in rows()]
    assert made[0].tolist() == [*rows()[0], *[83] * 18, 45, 45, 248]
    assert made[2].tolist() == [*rows()[2][:21], 45, 45, 248]  # a stop in the last two places loses speech
    assert made[3].tolist() == rows()[3].tolist()


def test_trap_3_scores_are_of_repaired_codes_and_of_the_text_with_its_zero(torch_clvp: CLVP, clvp: Twin) -> None:
    fixed = torch.from_numpy(np.stack([repaired(row, TOTAL) for row in rows()])).long()
    text = torch.tensor([[*TEXT, 0]]).expand(4, -1)
    assert_close(rendering.scores(clvp.part, TEXT, rows(), TOTAL), torch_clvp(text, fixed), MODULE)
    with pytest.raises(AssertionError):
        assert_close(rendering.scores(clvp.part, TEXT, rows(), TOTAL), torch_clvp(text[:, :-1], fixed), MODULE)


def test_scores_do_not_depend_on_the_batch(clvp: Twin, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = rendering.scores(clvp.part, TEXT, rows(), TOTAL)
    monkeypatch.setattr(rendering, "SCORED_AT_ONCE", 3)
    assert_close(rendering.scores(clvp.part, TEXT, rows(), TOTAL), whole, MODULE)


def test_a_code_that_clvp_does_not_know_is_the_worst(clvp: Twin) -> None:
    """A model may draw its own start token; upstream would end there."""
    drawn = rows()
    drawn[1][4] = 300
    scores = rendering.scores(clvp.part, TEXT, drawn, TOTAL)
    assert np.isneginf(scores).tolist() == [False, True, False, False]


def test_products_are_no_coarser_than_upstreams(clvp: Twin) -> None:
    """TF32 on NVIDIA cards, three bfloat16 products on TPUs: one alone would be multiplied by 153 in the first step."""
    diffusion = twin_of(parts.DIFFUSION, tiny_diffusion(num_layers=1, model_channels=16))
    row = lambda dtype, *shape: jax.ShapeDtypeStruct((1, *shape), dtype)
    steps, temperature = denoising.coefficients(2, 2.0), np.float32(1)
    rows = (row(np.float32, 5, 24), row(np.float32, 32), row(np.int32), row(np.uint32, 2))
    lowered = [
        jax.jit(rendering._denoiser(diffusion.config, 21, True)).lower(diffusion.variables, steps, temperature, *rows),
        jax.jit(rendering._scorer(CLVPModel(clvp.config))).lower(
            clvp.variables, jax.ShapeDtypeStruct((40,), np.float32), row(np.int32, 9)
        ),
    ]
    for program in lowered:
        products = re.findall(r".*stablehlo\.(?:dot_general|convolution).*", program.as_text())
        assert len(products) > 5
        assert all(re.search(r"precision(?:_config)? = \[.*HIGH.*, .*HIGH", line) for line in products), products[0]


@pytest.fixture(scope="module")
def wide_diffusion() -> Twin:
    """Wide enough for the rounding of products to average out, as it does at the real size."""
    return twin_of(parts.DIFFUSION, tiny_diffusion(num_layers=2, model_channels=128))


def test_bfloat16_is_near_float32_and_is_not_it(wide_diffusion: Twin, clvp: Twin) -> None:
    """One evaluation of its largest value; a mel on average, for single bins of a random decoder's vary; scores."""
    random = np.random.default_rng(0)
    latents, voice = [random.standard_normal((12, 24)).astype(np.float32)], random.standard_normal(256)
    x, aligned = (random.standard_normal((1, 21, width)).astype(np.float32) for width in (100, 128))
    made = {}
    for dtype in ("float32", "bfloat16"):
        decoder = DiffusionDecoder(wide_diffusion.config, Compute(dtype=dtype))
        evaluation = apply(decoder, "estimate", wide_diffusion.variables, x, np.array([1234]), aligned)
        (mel,) = rendering.diffuse(wide_diffusion.part, latents, voice, steps=5, guidance=2.0, dtype=dtype)
        made[dtype] = evaluation, mel, rendering.scores(clvp.part, TEXT, rows(), TOTAL, dtype=dtype)
    measures = (error, lambda one, other: np.abs(one - other).mean(), absolute_error)
    most = (EVALUATION_IN_BFLOAT16, MEL_IN_BFLOAT16, SCORES_IN_BFLOAT16)
    for half, full, measure, bound in zip(made["bfloat16"], made["float32"], measures, most, strict=True):
        assert half.dtype == np.float32
        assert 1e-4 < measure(half, full) < bound


def test_bfloat16_is_for_the_blocks_products_alone(wide_diffusion: Twin) -> None:
    """Of an evaluation all else is float32: the state it is given, norms, softmax, what it returns. So are vocoders."""
    vocoder = twin_of(parts.VOCODER, tiny_vocoder(n_mel_channels=100, strides=(4, 2)))
    decoder = DiffusionDecoder(wide_diffusion.config, Compute(dtype="bfloat16"))
    row = lambda dtype, *shape: jax.ShapeDtypeStruct((1, *shape), dtype)
    evaluate = functools.partial(decoder.apply, method="estimate")
    x, steps, aligned = row(np.float32, 21, 100), row(np.int32), row(np.float32, 21, 128)
    evaluation = str(jax.make_jaxpr(evaluate)(wide_diffusion.variables, x, steps, aligned))
    vocoded = jax.make_jaxpr(rendering._vocoder(vocoder.config))(
        vocoder.variables, row(np.float32, 21, 100), row(np.uint32, 2), row(np.int32)
    )
    assert "bf16" not in str(vocoded)
    made = lambda name: re.findall(rf":(\w+)\[[^\]]*\] = {name}\[?", evaluation)
    assert "bf16" in made("dot_general")
    for name in ("exp", "rsqrt", "logistic", "reduce_sum", "sin", "cos"):
        assert "f32" in made(name), name
        assert "bf16" not in made(name), name
    # The integrator's, the layers' and the tail's, beside the first and the last.
    assert Counter(made("conv_general_dilated")) == {"bf16": 1 + 1 + 3, "f32": 2}


def test_presets_are_upstreams() -> None:
    found = {name: (preset.candidates, preset.steps, preset.guidance) for name, preset in PRESETS.items()}
    assert found == {
        "draft": (4, 0, None),
        "hifigan": (1, 0, None),
        "ultra_fast": (16, 30, None),
        "fast": (96, 80, 2.0),
        "standard": (256, 200, 2.0),
        "high_quality": (256, 400, 2.0),
    }


def test_a_row_is_rendered_alike_alone_and_beside_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusion_inputs, "CODE_BUCKET", 8)
    diffusion = twin_of(parts.DIFFUSION, tiny_diffusion(num_layers=1, model_channels=64))
    vocoder = twin_of(parts.VOCODER, tiny_vocoder(n_mel_channels=100, strides=(4, 2)))
    random, codes = np.random.default_rng(0), (12, 20)
    latents = [random.standard_normal((n, 24)).astype(np.float32) for n in codes]
    voice, how = random.standard_normal(128).astype(np.float32), {"steps": 3, "guidance": 2.0}
    together = rendering.diffuse(diffusion.part, latents, voice, **how, seed=4)
    assert [mel.shape for mel in together] == [(frames_of(n), 100) for n in codes]
    alone = rendering.diffuse(diffusion.part, latents[:1], voice, **how, seed=4, rows=[0])[0]
    assert_close(together[0], alone, CHAIN)
    assert np.abs(rendering.diffuse(diffusion.part, latents[:1], voice, **how, seed=5)[0] - alone).max() > 0.1
    waveforms = rendering.vocode(vocoder.part, together, seed=4)
    assert [len(waveform) for waveform in waveforms] == [8 * frames_of(n) for n in codes]
    assert_close(rendering.vocode(vocoder.part, together[:1], seed=4)[0], waveforms[0], MODULE)
    assert np.abs(waveforms[1]).max() <= 1


def test_rows_are_not_padded_to_twice_their_length_and_come_back_in_their_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grouped = lambda *lengths: [(s, index.tolist()) for s, index in rendering.of_like_length(np.array(lengths))]
    assert grouped(60, 3, 120, 300, 0, 151) == [(300, [3, 5]), (150, [0, 2]), (50, [1, 4])]
    echo = lambda frames: lambda _, __, ___, latents, *____: jax.numpy.repeat(latents[:, :1], frames, axis=1)
    monkeypatch.setattr(rendering, "_denoiser", lambda config, frames, guided, dtype: echo(frames))
    lengths = (60, 3, 120, 300, 151)
    latents = [np.full((length, 2), length, np.float32) for length in lengths]
    diffusion = parts.Part(None, {})
    mels = rendering.diffuse(diffusion, latents, np.zeros(4), steps=2, guidance=None)
    assert [(len(mel), mel[0, 0]) for mel in mels] == [(frames_of(length), length) for length in lengths]


def test_new_lengths_in_a_bucket_are_not_new_programs() -> None:
    assert {rendering.bucket(n) for n in range(1, 501)} == set(range(50, 501, 50))
