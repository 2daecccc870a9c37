"""TorToiSe's log-mel spectrogram in torch: torchaudio's mel filters (HTK scale, Slaney area), 80 bands up to 8 kHz."""

from __future__ import annotations

import math

import torch

SAMPLE_RATE = 22050
N_FFT = 1024
HOP = 256
BANDS = 80
MAX_HZ = 8000.0
FLOOR = 1e-5


def mel_filters() -> torch.Tensor:
    """The (m, f) triangles, each of unit area in Hz; computed in float64, returned in float32."""
    top = 2595.0 * math.log10(1.0 + MAX_HZ / 700.0)
    mels = torch.linspace(0.0, top, BANDS + 2, dtype=torch.float64)
    corners = 700.0 * (10.0 ** (mels / 2595.0) - 1.0)
    low, centre, high = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    bins = torch.linspace(0.0, SAMPLE_RATE / 2, N_FFT // 2 + 1, dtype=torch.float64)
    rising = (bins - low) / (centre - low)
    falling = (high - bins) / (high - centre)
    triangles = torch.minimum(rising, falling).clamp(min=0.0)
    return (triangles * 2.0 / (high - low)).float()


def log_mel(wav: torch.Tensor, mel_norms: torch.Tensor | None = None) -> torch.Tensor:
    """Waveform (..., samples) at 22050 Hz -> log-mel (..., m, 1 + samples // 256).

    With `mel_norms` (m,) the bands are divided by them, which is what the models are given.
    """
    spectrum = torch.stft(
        wav.clamp(-1.0, 1.0),
        N_FFT,
        hop_length=HOP,
        window=torch.hann_window(N_FFT, periodic=True, dtype=wav.dtype, device=wav.device),
        center=True,
        pad_mode="reflect",
        return_complex=True,
    )
    mel = (mel_filters().to(wav) @ spectrum.abs().pow(2)).clamp(min=FLOOR).log()
    return mel if mel_norms is None else mel / mel_norms[:, None]
