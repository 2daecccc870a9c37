"""The second front end, at 24 kHz: resampling and the mel that the diffusion decoder is conditioned on."""

from __future__ import annotations

import librosa
import numpy as np
import pytest
import torch

from tests.support.parity import MEL_ABSOLUTE, assert_close
from tortoise_jax import audio
from tortoise_jax.audio import DIFFUSION_CLIP_SAMPLES, diffusion_clip, log_mel_24k, to_24k


def sine(hertz: float, rate: int, samples: int) -> np.ndarray:
    return np.sin(2 * np.pi * hertz * np.arange(samples) / rate).astype(np.float32)


@pytest.mark.parametrize("hertz", [0.5, 440.0, 3000.0, 8000.0])
def test_a_sine_stays_the_sine(hertz: float) -> None:
    made = to_24k(sine(hertz, 22050, 22050))
    assert made.shape == (24000,)
    assert np.abs(made - sine(hertz, 24000, 24000))[100:-100].max() < 6e-3


@pytest.mark.parametrize(("samples", "length"), [(1, 2), (147, 160), (148, 162), (20000, 21769), (132300, 144000)])
def test_resampled_lengths_are_rounded_up(samples: int, length: int) -> None:
    assert to_24k(np.ones(samples, np.float32)).shape == (length,)


def reference_mel(waveform: np.ndarray) -> np.ndarray:
    """By torch.stft: magnitudes, Slaney's scale and area norm, natural logarithm, no mel norms."""
    x = torch.from_numpy(waveform).clamp(-1, 1).double()
    window = torch.hann_window(1024, dtype=torch.float64)
    spectrum = torch.stft(x, 1024, 256, 1024, window, center=True, pad_mode="reflect", return_complex=True).abs()
    filters = torch.from_numpy(librosa.filters.mel(sr=24000, n_fft=1024, n_mels=100, fmin=0, fmax=12000)).double()
    return (filters @ spectrum).clamp(min=1e-5).log().T.numpy()


def waveform() -> np.ndarray:
    random = np.random.default_rng(1)
    return (sine(300.0, 24000, 12345) + 0.4 * random.standard_normal(12345)).astype(np.float32)


def test_mel_is_torchs() -> None:
    made = log_mel_24k(waveform())
    assert made.shape == (1 + 12345 // 256, 100)
    assert_close(made, reference_mel(waveform()), MEL_ABSOLUTE)
    assert log_mel_24k(np.zeros(1024, np.float32)).max() == pytest.approx(np.log(1e-5))


@pytest.mark.parametrize("name", ["power", "htk", "unclipped", "rate"])
def test_trap_17_the_other_front_end_is_another(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Power for magnitude, the HTK scale, samples beyond 1, the filters of 22.05 kHz: each shows."""
    if name == "power":
        plain = np.abs
        monkeypatch.setattr(audio.np, "abs", lambda x: plain(x) ** 2)
    if name == "unclipped":
        monkeypatch.setattr(audio.np, "clip", lambda x, low, high: x)
    if name in ("htk", "rate"):
        options = {"htk": name == "htk", "sr": 24000 if name == "htk" else 22050}
        other = librosa.filters.mel(n_fft=1024, n_mels=100, fmin=0, fmax=11025, **options)
        monkeypatch.setattr(audio, "mel_filters_24k", lambda: other)
    made = log_mel_24k(waveform())
    monkeypatch.undo()
    with pytest.raises(AssertionError):
        assert_close(made, reference_mel(waveform()), MEL_ABSOLUTE)


def test_trap_16_clips_are_cut_from_the_start_and_padded_as_waveforms() -> None:
    random = np.random.default_rng(2)
    short, long = (random.standard_normal(n).astype(np.float32) for n in (5000, 200_000))
    assert diffusion_clip(long).shape == diffusion_clip(short).shape == (DIFFUSION_CLIP_SAMPLES,)
    assert np.array_equal(diffusion_clip(long), to_24k(long)[:DIFFUSION_CLIP_SAMPLES])
    assert np.array_equal(diffusion_clip(short)[:5443], to_24k(short))
    assert not diffusion_clip(short)[5443:].any()
    assert log_mel_24k(diffusion_clip(short)).shape == (401, 100)
