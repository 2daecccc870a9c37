"""Cached sampling against the torch reference and against an uncached forward; seeds, rows, devices; bad input."""

from __future__ import annotations

import dataclasses
import functools
import gc
from typing import Any

import jax
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import torch_reference
from tests.support.parity import STACK, Twin, assert_close, voice_twin
from tortoise_jax import parallel
from tortoise_jax.data import batches
from tortoise_jax.errors import UserError
from tortoise_jax.models.unified_voice import UnifiedVoice
from tortoise_jax.synthesis import prompts, reading, sampler
from tortoise_jax.synthesis.decoder import DecoderWeights
from tortoise_jax.synthesis.diffusion_inputs import hidden_states
from tortoise_jax.synthesis.sampler import Layout, Samples, SamplingOptions

GREEDY = SamplingOptions(temperature=0, repetition_penalty=1.0, max_codes=30, extra_text_stop=False, dtype="float32")
CLEAR = 1e-4  # how far apart the two best logits must be for the choice to be asked for
TEXT = [5, 9, 200, 31, 7]


def voice_vector(seed: int = 0, width: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(width).astype(np.float32)


def sample(voice: Twin, *arguments: Any, **named: Any) -> Samples:
    return sampler.sample(voice.params, voice.config, *arguments, **named)


# Against torch


@pytest.mark.parametrize("penalty", [1.0, 2.0])
@pytest.mark.parametrize("text_length", [1, 9, 14, 29])
def test_greedy_codes_are_torchs(
    torch_voice: torch_reference.UnifiedVoice, voice: Twin, penalty: float, text_length: int
) -> None:
    text = np.random.default_rng(text_length).integers(1, 255, text_length)
    vector = voice_vector(text_length)
    want = torch_voice.generate(torch.from_numpy(vector), torch.from_numpy(text), 30, penalty).numpy()
    got = sample(voice, vector, text, options=dataclasses.replace(GREEDY, repetition_penalty=penalty))
    stops = want[-1] == voice.config.stop_mel
    assert got.stopped.tolist() == [stops]
    np.testing.assert_array_equal(got.row(0), want[:-1] if stops else want)


def test_the_extra_stop_is_one_more_text_stop(torch_voice: torch_reference.UnifiedVoice, voice: Twin) -> None:
    vector = voice_vector(1)
    want = torch_voice.generate(torch.from_numpy(vector), torch.tensor([*TEXT, 0]), 30).numpy()
    got = sample(voice, vector, TEXT, options=dataclasses.replace(GREEDY, extra_text_stop=True))
    np.testing.assert_array_equal(got.codes[0, : len(want)], want)
    without = sample(voice, vector, TEXT, options=GREEDY)
    assert without.codes.tolist() != got.codes.tolist()


def test_upstreams_position_slip_would_be_seen(voice: Twin) -> None:
    """With the code positions shifted by one after the start, as in tortoise's cached path, other codes come out."""
    table = np.array(voice.params["mel_pos_embedding"]["embedding"])
    slipped = dict(voice.params, mel_pos_embedding={"embedding": np.concatenate([table[:1], table[2:], table[-1:]])})
    right = sample(voice, voice_vector(1), TEXT, options=GREEDY)
    wrong = sampler.sample(slipped, voice.config, voice_vector(1), TEXT, options=GREEDY)
    assert right.codes.tolist() != wrong.codes.tolist()


# Against an uncached forward of our own model


@functools.cache
def tiny(seed: int, layers: int, heads: int, stop_bias: float) -> Twin:
    model = torch_reference.tiny_unified_voice(seed, layers=layers, heads=heads)
    with torch.no_grad():
        model.mel_head.bias[model.stop_mel_token] += stop_bias
    return voice_twin(model, heads)


@functools.cache
def uncached(config: Any) -> Any:
    model = UnifiedVoice(config)
    method = UnifiedVoice.from_conditioning
    return jax.jit(lambda params, *arrays: model.apply({"params": params}, *arrays, method=method)["mel_logits"])


def uncached_logits(twin: Twin, vectors: np.ndarray, texts: list[list[int]], codes: list[np.ndarray]) -> np.ndarray:
    """The training forward's mel logits (b, 80, v) over rows as training joins them."""
    rows = [batches.row(np.array(text), np.array(c), 80, twin.config) for text, c in zip(texts, codes, strict=True)]
    one_shape = np.arange(5) % len(rows)  # always five rows, so that a model is compiled once
    arrays = (np.stack([row[name] for row in rows])[one_shape] for name in ("tokens", "token_types", "positions"))
    return np.array(uncached(twin.config)(twin.params, vectors[one_shape][:, None], *arrays))


def assert_greedy_everywhere(
    twin: Twin, vectors: np.ndarray, texts: list[list[int]], drawn: Samples, penalty: float, extra_stop: bool
) -> int:
    """Each clear choice is the likeliest code of an uncached forward; returns how many were clear."""
    config, clear = twin.config, 0
    texts = [[*text, config.stop_text] if extra_stop else text for text in texts]
    codes = [drawn.row(i) for i in range(len(texts))]
    logits = uncached_logits(twin, vectors, texts, codes)
    for i, row in enumerate(codes):
        want = [*row, config.stop_mel] if drawn.stopped[i] else list(row)
        seen = [1, config.start_mel]
        for step, code in enumerate(want):
            scores = logits[i, 1 + len(texts[i]) + 2 + step]
            scores[seen] = np.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
            second, first = np.sort(scores)[-2:]
            if first - second > CLEAR * np.abs(scores).max():
                assert code == scores.argmax(), f"row {i}, code {step}"
                clear += 1
            seen = sorted({*seen, int(code)})
    return clear


@settings(max_examples=10)
@given(
    seed=st.integers(0, 3),
    shape=st.sampled_from([(1, 2), (2, 8)]),
    text_lengths=st.lists(st.integers(1, 28), min_size=1, max_size=5),
    penalty=st.sampled_from([1.0, 2.0]),
    extra_stop=st.booleans(),
)
def test_greedy_codes_are_those_of_an_uncached_forward(
    seed: int, shape: tuple[int, int], text_lengths: list[int], penalty: float, extra_stop: bool
) -> None:
    """Prompts of different lengths in one batch, over eight devices; rows stop at different steps."""
    twin = tiny(seed, *shape, stop_bias=1.5)
    random = np.random.default_rng(seed)
    texts = [random.integers(1, 255, length).tolist() for length in text_lengths]
    vectors = random.standard_normal((len(texts), 64)).astype(np.float32)
    options = dataclasses.replace(GREEDY, repetition_penalty=penalty, extra_text_stop=extra_stop, max_codes=38)
    drawn = sampler.sample(twin.params, twin.config, vectors, texts, options=options)
    assert assert_greedy_everywhere(twin, vectors, texts, drawn, penalty, extra_stop) > 0


def test_a_wrong_code_would_be_seen(voice: Twin) -> None:
    vectors, texts = voice_vector(2)[None], [TEXT]
    drawn = sample(voice, vectors, texts, options=GREEDY)
    assert assert_greedy_everywhere(voice, vectors, texts, drawn, 1.0, False) > 20
    wrong = dataclasses.replace(drawn, codes=(drawn.codes + (np.arange(30) == 7)).astype(np.int32))
    with pytest.raises(AssertionError, match="row 0, code 7"):
        assert_greedy_everywhere(voice, vectors, texts, wrong, 1.0, False)


def test_longer_caches_and_prompts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches that grow twice, and prompts padded otherwise, against one cache for all."""
    options = dataclasses.replace(GREEDY, max_codes=38, temperature=0.8)
    voice = tiny(1, 1, 2, stop_bias=0.0)
    whole = sample(voice, voice_vector(3), TEXT, 7, options, candidates=3)
    monkeypatch.setattr(sampler, "CACHE_LENGTHS", (8, 24, 40))
    monkeypatch.setattr(sampler, "CODES_PER_CALL", 8)
    monkeypatch.setattr(prompts, "PROMPT_LENGTHS", (16, 32))
    counted: list[int] = []
    grown = sample(voice, voice_vector(3), TEXT, 7, options, candidates=3, progress=counted.append)
    np.testing.assert_array_equal(grown.codes, whole.codes)
    np.testing.assert_allclose(grown.log_likelihood, whole.log_likelihood, rtol=1e-5)
    assert counted == [8, 16, 24, 32, 38]


# Seeds, rows, devices


def test_the_seed_decides(voice: Twin) -> None:
    options = SamplingOptions(max_codes=30, dtype="float32")
    draw = lambda seed: sample(voice, voice_vector(), TEXT, seed, options, candidates=2).codes.tolist()
    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(1)[0] != draw(1)[1]


def test_a_candidate_is_the_same_in_any_company(voice: Twin) -> None:
    """Alone, among others (some of which the devices pad with), or drawn later as candidate number 4."""
    options = SamplingOptions(max_codes=30, dtype="float32")
    draw = functools.partial(sample, voice, voice_vector(), TEXT, 3, options)
    many = draw(candidates=11)
    assert len(many.codes) == 11
    few = draw(candidates=3)
    later = draw(candidates=2, first_candidate=4)
    for got, first in ((few, 0), (later, 4)):
        for i in range(len(got.lengths)):
            np.testing.assert_array_equal(got.row(i), many.row(first + i))
            np.testing.assert_allclose(got.log_likelihood[i], many.log_likelihood[first + i], rtol=1e-5)


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
@pytest.mark.parametrize(("prompt_count", "candidates"), [(1, 1), (1, 16), (3, 1), (3, 5), (9, 2)])
def test_layout_places_every_candidate_once(prompt_count: int, candidates: int, devices: int) -> None:
    layout = Layout.of(prompt_count, candidates, devices)
    assert len(layout.prompt) % devices == 0
    placed = np.stack([np.repeat(layout.prompt, layout.share), layout.candidate()], axis=1)[layout.rows()]
    assert placed.tolist() == [[prompt, candidate] for prompt in range(prompt_count) for candidate in range(candidates)]


def test_rows_on_eight_devices_are_rows_on_one(voice: Twin, monkeypatch: pytest.MonkeyPatch) -> None:
    options = SamplingOptions(max_codes=30, dtype="float32")
    arguments = (np.stack([voice_vector(1), voice_vector(2)]), [TEXT, [8, 9]], 5, options)
    assert jax.local_device_count() == 8
    on_eight = sample(voice, *arguments, candidates=3)
    with monkeypatch.context() as patch:
        first = jax.local_devices()[:1]
        patch.setattr(jax, "local_devices", lambda: first)
        patch.setattr(jax, "local_device_count", lambda: 1)
        forget_programs()
        on_one = sample(voice, *arguments, candidates=3)
    forget_programs()
    np.testing.assert_array_equal(on_one.codes, on_eight.codes)
    np.testing.assert_allclose(on_one.log_likelihood, on_eight.log_likelihood, rtol=1e-5)


def forget_programs() -> None:
    for made in (reading._embed, reading._read_layer, sampler._decode, sampler._write_cache):
        made.cache_clear()


def test_rows_stop_by_themselves_and_sampling_stops_when_all_have(monkeypatch: pytest.MonkeyPatch) -> None:
    twin = tiny(0, 2, 4, stop_bias=5.0)
    monkeypatch.setattr(sampler, "CODES_PER_CALL", 8)
    counted: list[int] = []
    options = SamplingOptions(max_codes=38, repetition_penalty=1.0, dtype="float32")
    drawn = sampler.sample(twin.params, twin.config, voice_vector(), TEXT, 0, options, 6, progress=counted.append)
    stop = twin.config.stop_mel
    assert drawn.stopped.all()
    assert counted[-1] < 38
    assert drawn.codes.shape[1] == max(1, drawn.lengths.max())
    for i, length in enumerate(drawn.lengths):
        assert (drawn.codes[i, :length] != stop).all()
        assert (drawn.codes[i, length:] == stop).all()


def test_a_start_token_inside_a_row_can_be_ruled_out() -> None:
    """As likely as this model holds it: tortoise draws it, though no row was trained with a second one."""
    twin = tiny(0, 2, 4, stop_bias=-5.0)
    twin.params["mel_head"]["bias"][twin.config.start_mel] += 9.0
    options = SamplingOptions(max_codes=20, dtype="float32")
    for temperature in (0.8, 0.0):
        as_tortoise = dataclasses.replace(options, temperature=temperature)
        mended = dataclasses.replace(as_tortoise, start_inside=False)
        drawn = [sample(twin, voice_vector(), TEXT, 0, one).codes for one in (as_tortoise, mended)]
        assert [(codes == twin.config.start_mel).any() for codes in drawn] == [True, False]


def test_log_likelihood_is_the_models_own_mean(voice: Twin) -> None:
    """Of the unfiltered logits, over the codes and the stop: recomputed from the uncached forward."""
    twin = tiny(0, 2, 4, stop_bias=2.0)
    options = SamplingOptions(max_codes=38, extra_text_stop=False, dtype="float32")
    drawn = sampler.sample(twin.params, twin.config, voice_vector(), TEXT, 1, options, 4)
    assert 0 < drawn.stopped.sum() < 5
    for i in range(4):
        codes = drawn.row(i)
        logits = uncached_logits(twin, voice_vector()[None], [TEXT], [codes])[0].astype(np.float64)
        want = [*codes, twin.config.stop_mel] if drawn.stopped[i] else list(codes)
        logits = logits[1 + len(TEXT) + 2 :][: len(want)]
        scores = logits[np.arange(len(want)), want] - np.log(np.exp(logits).sum(axis=1))
        assert_close(drawn.log_likelihood[i], scores.mean(), STACK)


def test_bfloat16_draws_and_differs() -> None:
    voice = tiny(1, 1, 2, stop_bias=0.0)
    options = SamplingOptions(max_codes=20, dtype="bfloat16")
    with jax.numpy_dtype_promotion("standard"):  # Flax's norms mix half precision with float32 statistics
        half = sample(voice, voice_vector(), TEXT, 0, options)
    full = sample(voice, voice_vector(), TEXT, 0, dataclasses.replace(options, dtype="float32"))
    assert half.codes.shape[0] == 1
    assert half.log_likelihood != full.log_likelihood
    np.testing.assert_allclose(half.log_likelihood, full.log_likelihood, atol=1.5)


def test_a_new_text_of_similar_length_compiles_nothing(voice: Twin) -> None:
    options = SamplingOptions(max_codes=20, dtype="float32")
    weights = DecoderWeights.of(voice.params, voice.config, "float32")
    sampler.sample(weights, voice.config, voice_vector(), TEXT, 0, options)
    decode = sampler._decode(voice.config, 50, False, sampler.CODES_PER_CALL)
    programs = [reading._embed(voice.config), reading._read_layer(voice.config), decode]
    before = [program._cache_size() for program in programs]
    other = dataclasses.replace(options, temperature=0.7, top_p=0.5, repetition_penalty=1.5)
    sampler.sample(weights, voice.config, voice_vector(1), list(range(3, 20)), 9, other)
    assert [program._cache_size() for program in programs] == before


# Memory


def test_the_devices_hold_the_model_once(voice: Twin, monkeypatch: pytest.MonkeyPatch) -> None:
    """For prompts, codes and latents together, and less than one product's weights more while they are laid out."""
    put, seen = parallel.on_every_device, []
    held = lambda: sum(array.nbytes for array in jax.live_arrays())
    monkeypatch.setattr(parallel, "on_every_device", lambda tree: seen.append(held()) or put(tree))
    gc.collect()
    before = held()
    weights = DecoderWeights.of(voice.params, voice.config, "float32")
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(voice.params)]
    assert len(seen) > 10
    assert max(seen) - before < held() - before + max(sizes)
    assert 0.5 * sum(sizes) < held() - before < sum(sizes)
    monkeypatch.setattr(parallel, "on_every_device", lambda tree: pytest.fail("there is more on the devices"))
    drawn = sampler.sample(weights, voice.config, voice_vector(), TEXT, 0, GREEDY)
    hidden_states(weights, voice.config, voice_vector(), [TEXT], [drawn.row(0)])


# Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1, expected at least 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1, expected at least 0"),
        ({"top_p": 0.0}, r"top_p is 0.0, expected above 0 up to 1"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0, expected above 0"),
        ({"max_codes": 0}, "max_codes is 0, expected at least 1"),
        ({"dtype": "float16"}, "dtype is float16, expected auto, float32 or bfloat16"),
    ],
)
def test_bad_options_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SamplingOptions(**changes)


SHORT = SamplingOptions(max_codes=8, dtype="float32")


@pytest.mark.parametrize(
    ("arguments", "named", "message"),
    [
        ((voice_vector(), []), {}, "the text is empty"),
        ((voice_vector(), [3] * 30), {}, "the text has 30 tokens, the model has room for 29"),
        ((voice_vector(), [256]), {}, "text ids must be 0 to 255, found 256 to 256"),
        ((voice_vector(width=32), TEXT), {}, "the voice is a vector of 32, the model's width is 64"),
        ((np.zeros((3, 64), np.float32), [TEXT, TEXT]), {}, "3 voices do not go with 2 texts"),
        ((voice_vector(), TEXT), {"candidates": 0}, "0 candidates were asked for"),
        ((voice_vector(), TEXT), {"options": SamplingOptions()}, "max_codes is 500, the model has room for 42"),
    ],
)
def test_bad_input_is_named(voice: Twin, arguments: tuple[Any, ...], named: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sample(voice, *arguments, **({"options": SHORT} | named))


def test_a_model_gone_wrong_is_named(voice: Twin) -> None:
    broken = dict(
        voice.params, mel_head={"kernel": np.full((64, 66), np.nan, np.float32), "bias": np.zeros(66, np.float32)}
    )
    with pytest.raises(UserError, match="outputs are not finite"):
        sampler.sample(broken, voice.config, voice_vector(), TEXT, options=SHORT)
