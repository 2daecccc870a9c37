"""Codes equal the torch reference's, and do not depend on what a clip is encoded with or padded to."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from tests.support import torch_reference
from tests.support.parity import MEL_ABSOLUTE, Twin, dvae_twin
from tortoise_jax.audio import (
    SAMPLES_PER_CODE,
    code_count,
    default_mel_norms,
    int16_from_waveform,
    log_mel,
    read_audio,
    waveform_from_int16,
)
from tortoise_jax.data import encoding
from tortoise_jax.data.encoding import CodeEncoder, padded_samples, zeros_after
from tortoise_jax.errors import UserError

SPEECH = sorted((Path(__file__).parents[2] / "examples" / "voice" / "wavs").iterdir())[:24]
NORMS = default_mel_norms()
CLOSE = 1e-5  # relative distance of the best two codes below which float rounding may choose either


@pytest.fixture(scope="module")
def speech() -> list[np.ndarray]:
    return [int16_from_waveform(read_audio(path)) for path in SPEECH]


@pytest.fixture(scope="module")
def encoder(dvae: Twin) -> CodeEncoder:
    return CodeEncoder(dvae.config, dvae.variables, NORMS, rows=1)


@torch.no_grad()
def torch_codes(model: torch_reference.DiscreteVAE, waveform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes of one clip with 8192 zeros behind it, and how far the second best is behind the best, relatively."""
    padded = torch.from_numpy(np.pad(waveform, (0, 8192)).astype(np.float32) / 32768)
    features = model.encoder(torch_reference.log_mel(padded, torch.from_numpy(NORMS))[None])[0].T
    distance = torch.cdist(features.double(), model.codebook.embed.T.double()).square()
    best = distance.topk(2, largest=False)
    kept = code_count(len(waveform))
    margin = (best.values[:, 1] - best.values[:, 0]) / best.values[:, 1]
    return best.indices[:kept, 0].numpy(), margin[:kept].numpy()


def test_the_mel_of_speech_is_torchs(speech):
    for waveform in speech[:2]:
        ours = log_mel(waveform_from_int16(waveform), NORMS)
        theirs = torch_reference.log_mel(torch.from_numpy(waveform.astype(np.float32) / 32768), torch.from_numpy(NORMS))
        assert np.abs(np.asarray(ours) - theirs.numpy().T).max() <= MEL_ABSOLUTE


def test_codes_of_speech_are_torchs(speech, encoder, torch_dvae):
    total = excluded = 0
    for waveform, codes in zip(speech, encoder.encode(speech), strict=True):
        want, margin = torch_codes(torch_dvae, waveform)
        assert codes.dtype == np.uint16
        assert len(codes) == len(waveform) // 1024 + 1
        np.testing.assert_array_equal(codes[margin > CLOSE], want[margin > CLOSE])
        total, excluded = total + len(codes), excluded + int((margin <= CLOSE).sum())
    assert excluded < 0.001 * total
    assert len({int(c) for codes in encoder.encode(speech) for c in codes}) > 10, "not always the same code"


@hypothesis.given(
    st.lists(st.integers(13_230, 60_000), min_size=1, max_size=12), st.integers(0, 2**32 - 1), st.integers(0, 11)
)
@hypothesis.settings(max_examples=15)
def test_codes_do_not_depend_on_what_is_encoded_with_them(encoder, speech, lengths, seed, index):
    rng = np.random.default_rng(seed)
    whole = np.concatenate(speech)
    starts = rng.integers(len(whole) - 60_000, size=len(lengths))
    clips = [whole[start : start + length] for start, length in zip(starts, lengths, strict=True)]
    index %= len(clips)
    np.testing.assert_array_equal(encoder.encode(clips)[index], encoder.encode([clips[index]])[0])


@hypothesis.given(st.integers(13_230, 25_000), st.integers(0, 2**32 - 1))
@hypothesis.settings(max_examples=15)
def test_codes_do_not_depend_on_the_length_they_are_padded_to(dvae, speech, length, seed):
    start = np.random.default_rng(seed).integers(len(np.concatenate(speech)) - length)
    clip = np.concatenate(speech)[start : start + length]
    encoded = [codes_at(dvae, clip, padded) for padded in (34_816, 65_536)]
    np.testing.assert_array_equal(*encoded)


_programs: dict[int, CodeEncoder] = {}


def codes_at(dvae: Twin, clip: np.ndarray, padded: int, zeros: int | None = None) -> np.ndarray:
    """Codes of a clip encoded at a length of one's choice; zeros: only so many behind it, then noise."""
    if padded not in _programs:
        _programs[padded] = CodeEncoder(dvae.config, dvae.variables, NORMS, rows=1)
    one = _programs[padded]
    rows = np.zeros((one._rows, padded), np.int16)
    rows[0, : len(clip)] = clip
    if zeros is not None:
        after = rows[0, len(clip) + zeros :]
        after[:] = np.random.default_rng(1).integers(-9000, 9000, size=len(after))
    return np.asarray(one._codes(one._weights, rows))[0, : code_count(len(clip))]


def test_so_many_zeros_are_enough_and_needed(dvae, speech):
    """Noise behind the zeros changes nothing; closer, it does: a smaller margin would be seen."""
    clip = speech[0][:20_479]  # its last code begins as far in front of its end as one can
    alone = codes_at(dvae, clip, 65_536)
    np.testing.assert_array_equal(codes_at(dvae, clip, 65_536, zeros_after(dvae.config)), alone)
    assert (codes_at(dvae, clip, 65_536, 0) != alone).any()


def test_every_length_gets_its_zeros(dvae):
    assert zeros_after(dvae.config) == 8192
    for samples in range(1, 300_000, 997):
        padded = padded_samples(samples, dvae.config)
        assert samples + 8192 <= padded < samples + 8192 + encoding.LENGTH_BUCKET
        assert padded % SAMPLES_PER_CODE == 0


def test_an_accelerator_compiles_few_lengths(dvae, monkeypatch):
    monkeypatch.setattr(encoding.parallel, "on_cpu", lambda: False)
    padded = {padded_samples(samples, dvae.config) for samples in range(1, 600_000, 997)}
    assert sorted(padded) == [2**power for power in range(15, 21)]
    assert all(padded_samples(n, dvae.config) >= n + 8192 for n in range(24_000, 600_000, 997))


def test_a_dvae_that_looks_further_ahead_gets_more(dvae):
    assert zeros_after(dataclasses.replace(dvae.config, res_blocks=3)) == 8192
    deep = torch_reference.tiny_dvae(seed=2, num_resnet_blocks=6)
    twin = dvae_twin(deep)
    assert zeros_after(twin.config) == 14 * 1024
    clip = np.random.default_rng(0).integers(-9000, 9000, size=20_479).astype(np.int16)
    encoder = CodeEncoder(twin.config, twin.variables, NORMS, rows=1)
    (codes,) = encoder.encode([clip])
    rows = np.zeros((encoder._rows, padded_samples(len(clip), twin.config)), np.int16)
    rows[0, : len(clip)] = clip
    rows[0, len(clip) + zeros_after(twin.config) :] = 9000
    np.testing.assert_array_equal(np.asarray(encoder._codes(encoder._weights, rows))[0, : len(codes)], codes)


def test_another_stride_is_refused(dvae):
    with pytest.raises(UserError, match=r"a code of it stands for 2048 samples, expected 1024"):
        CodeEncoder(dataclasses.replace(dvae.config, layers=3), dvae.variables, NORMS)
    with pytest.raises(UserError, match=r"70000 codes; a data set keeps them in 16 bits"):
        CodeEncoder(dataclasses.replace(dvae.config, codes=70_000), dvae.variables, NORMS)


def test_nothing_to_encode(encoder):
    assert encoder.encode([]) == []
