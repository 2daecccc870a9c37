"""Recordings to waveforms to log-mel spectrograms, and a log-mel back to a draft waveform.

Waveforms are float32 in [-1, 1] at 22050 Hz. Log-mels are float32 (..., t, m): frames, 80 bands, divided by the
per-band constants ("mel norms") that the released models were trained with.
"""

from __future__ import annotations

import functools
import importlib.resources
import inspect
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import librosa
import numpy as np
import soxr

from tortoise_jax.decoders import MAX_CHANNELS, Decoding, decoding
from tortoise_jax.errors import UserError

SAMPLE_RATE = 22050
N_FFT = 1024
HOP = 256
MEL_BANDS = 80
MEL_MAX_HZ = 8000.0
LOG_FLOOR = 1e-5
INT16_SCALE = 32768

MEL_FRAMES_PER_CODE = 4  # the dVAE encoder has two layers of stride 2
SAMPLES_PER_CODE = HOP * MEL_FRAMES_PER_CODE
assert SAMPLES_PER_CODE == 1024
assert N_FFT % (2 * HOP) == 0, "frames are built from whole hops, half of them before the first sample"


def mel_frames(samples: int) -> int:
    """Frames of the centred log-mel of a waveform: one at its start and one more for every whole hop."""
    return samples // HOP + 1


def code_count(samples: int) -> int:
    """Codes a clip of so many samples has; the stop token is the next one."""
    return samples // SAMPLES_PER_CODE + 1


CONDITIONING_SAMPLES = 132_300  # what synthesis conditions on: exactly six seconds, cropped or padded with zeros
CONDITIONING_FRAMES = mel_frames(CONDITIONING_SAMPLES)
assert CONDITIONING_SAMPLES == 6 * SAMPLE_RATE
assert CONDITIONING_FRAMES == 517


def crop_conditioning(waveform: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
    """Six seconds of a clip (samples,) of any dtype, zeros after a shorter one: (132300,).

    rng: draws where they start, by one number from 0 to the last possible start; without it they are the first six.
    """
    start = 0 if rng is None else int(rng.integers(max(0, len(waveform) - CONDITIONING_SAMPLES) + 1))
    crop = waveform[start : start + CONDITIONING_SAMPLES]
    return np.pad(crop, (0, CONDITIONING_SAMPLES - len(crop)))


MIN_SECONDS = 0.6  # of a clip: the shortest that upstream trains on
SILENT_DB = -60.0  # loudness (RMS, full scale) below which nobody is speaking
SILENCE_BELOW_PEAK_DB = 40.0  # how far below the loudest part of a clip, or of what the model says, silence is
FRAMES_AT_ONCE = 4096
SILENCE_KEPT_SECONDS = 0.1  # of it, where the ends of a clip are cut: for breath

# Peak of a draft waveform, and the loudest log-mel (full scale stays below 8) it is made from: a model that has
# learnt nothing yet may ask for more than any recording holds.
DRAFT_PEAK = 0.95
DRAFT_MAX_LOG = 10.0


def loudness_db(waveform: np.ndarray) -> float:
    """RMS in dB of full scale, to a tenth; -120 for digital silence."""
    power = float(np.mean(np.square(waveform, dtype=np.float64)))
    return round(10 * math.log10(max(power, 1e-12)), 1)


def sounding_part(waveform: np.ndarray) -> tuple[int, int]:
    """The samples from and to which a clip (samples,) is louder than silence: all where nothing is loud."""
    level = frame_levels(waveform)
    loud = np.flatnonzero(level > level.max() * 10 ** (-SILENCE_BELOW_PEAK_DB / 20))
    if not len(loud):
        return 0, len(waveform)
    return int(loud[0]) * HOP, min(len(waveform), (int(loud[-1]) + 1) * HOP)


def trim_silence(waveform: np.ndarray) -> np.ndarray:
    """A clip (samples,) without the silence at its ends but a tenth of a second; all of it where all is silent."""
    start, end = sounding_part(waveform)
    kept = round(SILENCE_KEPT_SECONDS * SAMPLE_RATE)
    return waveform[max(0, start - kept) : end + kept]


def frame_levels(waveform: np.ndarray) -> np.ndarray:
    """RMS of the frames around every 256th sample of a clip (samples,) -> (1 + samples // 256,).

    As librosa.feature.rms, but block by block: it squares every frame at once, which takes eight times the memory of an
    hours-long recording, and its first use on a machine compiles for a quarter of a minute.
    """
    padded, count = np.pad(waveform, N_FFT // 2), 1 + len(waveform) // HOP
    starts = range(0, count * HOP, FRAMES_AT_ONCE * HOP)
    blocks = (padded[start : start + (FRAMES_AT_ONCE - 1) * HOP + N_FFT] for start in starts)
    frames = (np.lib.stride_tricks.sliding_window_view(block, N_FFT)[::HOP] for block in blocks)
    return np.concatenate([np.sqrt(np.mean(np.square(block), axis=1)) for block in frames])


MAX_HOURS = 6  # of one recording: 1.9 GB of samples
MIX = "mix"  # in place of a channel's number: the mean of all


def channel_of(given: int | str, what: str = "channel") -> int | str:
    """A channel by its number from 1, or MIX. Raises UserError for anything else."""
    if given == MIX:
        return MIX
    if isinstance(given, bool) or not str(given).isdecimal() or not 1 <= int(given) <= MAX_CHANNELS:
        raise UserError(f"{what} {given}: expected its number, from 1, or {MIX} for the mean of all")
    return int(given)


def read_audio(path: str | Path, channel: int | str = 1) -> np.ndarray:
    """One channel of a recording, float32 (samples,) at 22050 Hz, clipped to [-1, 1].

    channel: its number; the first, not the mean, is what TorToiSe trains on; "mix" is the mean. A recording of one
    channel is read whatever number is given. wav, flac, ogg and mp3 at any rate, and with PyAV (`tortoise_jax[av]`)
    m4a, aac, opus and the sound of videos. Memory is needed for the result alone, whatever the file or its header
    claims.
    Raises UserError naming the file when it is missing, unreadable, truncated, empty, longer than six hours, not
    finite, or has no such channel (a cut ogg file has no length to be checked against and is read as far as it goes).
    """
    path, channel = Path(path), channel_of(channel)
    with decoding(path) as file:
        if channel != MIX and 1 < file.channels < int(channel):
            raise UserError(f"{path}: has {file.channels} channels, and channel {channel} is asked for")
        waveform, read = _resampled(path, file, channel)
    if read == 0:
        raise UserError(f"{path}: the recording is empty (no samples); remove it or record it again")
    return waveform


def heard_elsewhere(path: Path) -> str:
    """For the message about a silent recording: which of its other channels is not silent; "" if none."""
    with decoding(path) as file:
        power, read = np.zeros(file.channels), 0
        for block in file.blocks:
            power, read = power + np.square(block, dtype=np.float64).sum(axis=0), read + len(block)
    loud = np.flatnonzero(power > max(read, 1) * 10 ** (SILENT_DB / 10))
    number = loud[0] + 1 if len(loud) else 0
    return f"; channel {number} is not: save it as the first, or give prepare --channel {number}" if number else ""


def _resampled(path: Path, file: Decoding, channel: int | str) -> tuple[np.ndarray, int]:
    """A channel at 22050 Hz, block by block, and how many samples of it the file had."""
    rate, samples, read = file.rate, bytearray(), 0
    stream = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32", quality="HQ") if rate != SAMPLE_RATE else None
    for channels in file.blocks:
        block = _one_channel(channels, channel)
        if not np.isfinite(block).all():
            bad = int(np.flatnonzero(~np.isfinite(block))[0])
            raise UserError(f"{path}: sample {read + bad} is {block[bad]}, expected finite numbers; encode it again")
        read += len(block)
        if read > MAX_HOURS * 3600 * rate:
            raise UserError(f"{path}: is longer than {MAX_HOURS} hours; cut it into parts")
        samples += (stream.resample_chunk(block) if stream else block).tobytes()
    if stream:
        samples += stream.resample_chunk(np.zeros(0, np.float32), last=True).tobytes()
    length = math.ceil(read * SAMPLE_RATE / rate)
    samples += bytes(4 * max(0, length - len(samples) // 4))
    waveform = np.frombuffer(samples, np.float32)[:length]
    return np.clip(waveform, -1.0, 1.0, out=waveform), read


def _one_channel(block: np.ndarray, channel: int | str) -> np.ndarray:
    """A block (samples, channels) -> (samples,)."""
    if channel == MIX:
        return block.mean(axis=1, dtype=np.float32)
    return np.ascontiguousarray(block[:, min(int(channel), block.shape[1]) - 1])


def waveform_from_int16(samples: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
    """16 bit samples to float32 in [-1, 1), the way soundfile reads 16 bit files; any shape, numpy or jax."""
    return samples.astype(np.float32) / np.float32(INT16_SCALE)


def int16_from_waveform(waveform: np.ndarray) -> np.ndarray:
    """The inverse of `waveform_from_int16`: rounded, and limited to what 16 bits hold."""
    return np.clip(np.rint(waveform * INT16_SCALE), -INT16_SCALE, INT16_SCALE - 1).astype(np.int16)


def log_mel(waveform: np.ndarray | jax.Array, mel_norms: np.ndarray | jax.Array) -> jax.Array:
    """The log-mel of waveforms (..., samples): float32 (..., 1 + samples // 256, 80), divided by `mel_norms` (80,).

    Centred frames with reflected ends, periodic Hann window, power spectrum, HTK mel scale to 8 kHz with Slaney's
    area normalisation, log(max(x, 1e-5)): what torchaudio computes for TorToiSe. A 16 bit waveform is scaled to
    [-1, 1). Can be jitted and vmapped. Raises UserError below 513 samples (nothing to reflect) and for other integers.
    """
    given = (value if isinstance(value, jax.Array) else np.asarray(value) for value in (waveform, mel_norms))
    return _log_mel(*given)


@jax.jit  # else each new length of clip compiles a dozen programs
def _log_mel(waveform: jax.Array, mel_norms: jax.Array) -> jax.Array:
    spectrum = jnp.fft.rfft(_windowed_frames(_as_float32(waveform)))
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    # HIGHEST: the default float32 matmul of an accelerator is bf16 or TF32, which would change the dVAE's codes.
    mel = jnp.einsum("...tf,mf->...tm", power, jnp.asarray(mel_filters()), precision=jax.lax.Precision.HIGHEST)
    return jnp.log(jnp.maximum(mel, LOG_FLOOR)) / _on_last_axis(mel_norms, mel.ndim)


def _as_float32(waveform: jax.Array) -> jax.Array:
    if waveform.dtype == jnp.int16:
        return jnp.asarray(waveform_from_int16(waveform))
    if not jnp.issubdtype(waveform.dtype, jnp.floating):
        raise UserError(f"log_mel takes a float or int16 waveform, found {waveform.dtype}")
    return waveform.astype(jnp.float32)


# An FFT, not a matmul with the DFT matrix: 64 clips of 6 s take 0.24 s on two CPU cores against 0.84 s (0.55 s with
# the matrix folded by its symmetry), and every accelerator has one in float32.
def _windowed_frames(waveform: jax.Array) -> jax.Array:
    """(..., samples) -> (..., t, 1024): windowed frames, the first centred on the first sample."""
    samples = waveform.shape[-1]
    if samples <= N_FFT // 2:
        raise UserError(f"log_mel needs at least {N_FFT // 2 + 1} samples ({samples} given): its ends are reflected")
    t, hops = mel_frames(samples), N_FFT // HOP
    no_padding = [(0, 0)] * (waveform.ndim - 1)
    padded = jnp.pad(waveform, [*no_padding, (N_FFT // 2, N_FFT // 2)], mode="reflect")
    used = padded[..., : (t + hops - 1) * HOP]
    blocks = used.reshape(*used.shape[:-1], t + hops - 1, HOP)
    # Neighbouring frames share all but one hop, so a frame is `hops` consecutive blocks: no gather needed.
    frames = jnp.concatenate([blocks[..., i : i + t, :] for i in range(hops)], axis=-1)
    return frames * _on_last_axis(jnp.asarray(hann_window()), frames.ndim)


def _on_last_axis(vector: jax.Array, ndim: int) -> jax.Array:
    return jnp.expand_dims(vector, tuple(range(ndim - 1)))


@functools.cache
def hann_window() -> np.ndarray:
    """The periodic Hann window, float32 (1024,)."""
    return np.hanning(N_FFT + 1)[:-1].astype(np.float32)


@functools.cache
def mel_filters() -> np.ndarray:
    """The triangular mel filters, float32 (80, 513): HTK scale, 0 to 8000 Hz, each of unit area in Hz.

    librosa's to the last bit; to import its filters, with scipy.signal and numba, takes a second of every start.
    """
    mels = np.linspace(0, 2595 * np.log10(1 + MEL_MAX_HZ / 700), MEL_BANDS + 2)
    corners = 700 * (10 ** (mels / 2595) - 1)  # in Hz; three consecutive ones are a triangle's
    distances = corners[:, None] - np.fft.rfftfreq(N_FFT, 1 / SAMPLE_RATE)
    widths = np.diff(corners)[:, None]
    rising, falling = -distances[:-2] / widths[:-1], distances[2:] / widths[1:]
    triangles = np.maximum(0, np.minimum(rising, falling)).astype(np.float32)
    return (triangles * (2 / (corners[2:] - corners[:-2]))[:, None]).astype(np.float32)


# --- the second front end: what the diffusion decoder and the vocoder hear --------------------------------------------

DIFFUSION_RATE = 24000
DIFFUSION_BANDS = 100
DIFFUSION_MAX_HZ = 12000.0
DIFFUSION_CLIP_SAMPLES = 102_400  # what the decoder is conditioned on: 4.27 s from a clip's start, zeros after
RESAMPLING_ZEROS, RESAMPLING_ROLLOFF = 6, 0.99  # of the windowed sinc, torchaudio's defaults


def to_24k(waveform: np.ndarray) -> np.ndarray:
    """A waveform (samples,) at 22050 Hz -> (ceil(160 samples / 147),) float32 at 24 kHz, by a Hann-windowed sinc."""
    divisor = math.gcd(SAMPLE_RATE, DIFFUSION_RATE)
    old, new = SAMPLE_RATE // divisor, DIFFUSION_RATE // divisor
    kernels, reach = resampling_kernels(old, new)
    padded = np.pad(np.asarray(waveform, np.float32), (reach, reach + old))
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernels.shape[1])[::old]
    return (windows @ kernels.T).reshape(-1)[: math.ceil(new * len(waveform) / old)]


@functools.cache
def resampling_kernels(old: int, new: int) -> tuple[np.ndarray, int]:
    """One low-pass kernel for each of the `new` phases, float32 (new, taps), and how far they reach back.

    In float32 at every step, as torchaudio computes it: the rounding is 6e-6 of the waveform, and 5e-3 in the logarithm
    of what is nearly silent.
    """
    cutoff = min(old, new) * RESAMPLING_ROLLOFF
    reach = math.ceil(RESAMPLING_ZEROS * old / cutoff)
    f32 = np.float32
    taps = np.arange(-reach, reach + old, dtype=f32) / f32(old)
    time = (taps - np.arange(new, dtype=f32)[:, None] / f32(new)) * f32(cutoff)
    time = np.clip(time, f32(-RESAMPLING_ZEROS), f32(RESAMPLING_ZEROS))
    window = np.cos(time * f32(np.pi) / f32(RESAMPLING_ZEROS) / f32(2)) ** 2
    angle = time * f32(np.pi)
    sinc = np.where(angle == 0, f32(1), np.sin(angle) / np.where(angle == 0, f32(1), angle))
    return sinc * (window * f32(cutoff / old)), reach


def diffusion_clip(waveform: np.ndarray) -> np.ndarray:
    """A clip (samples,) at 22050 Hz -> what the diffusion decoder is conditioned on, (102400,) float32 at 24 kHz."""
    start = to_24k(waveform)[:DIFFUSION_CLIP_SAMPLES]
    return np.pad(start, (0, DIFFUSION_CLIP_SAMPLES - len(start)))


def log_mel_24k(waveform: np.ndarray) -> np.ndarray:
    """The mel of a waveform (samples,) at 24 kHz: float32 (1 + samples // 256, 100), natural logarithms.

    Magnitudes, not powers, of 100 bands to 12 kHz on Slaney's mel scale, and no mel norms; else as `log_mel`. In
    float64 on the host: it is taken of a few clips only, and quiet bands show the rounding of a float32 FFT.
    """
    padded = np.pad(np.clip(waveform, -1, 1).astype(np.float64), N_FFT // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, N_FFT)[::HOP]
    mel = np.abs(np.fft.rfft(frames * hann_window())) @ mel_filters_24k().T
    return np.log(np.maximum(mel, LOG_FLOOR)).astype(np.float32)


@functools.cache
def mel_filters_24k() -> np.ndarray:
    """The triangular mel filters, float32 (100, 513): Slaney's scale, 0 to 12 kHz, each of unit area in Hz."""
    return librosa.filters.mel(sr=DIFFUSION_RATE, n_fft=N_FFT, n_mels=DIFFUSION_BANDS, fmax=DIFFUSION_MAX_HZ)


def default_mel_norms() -> np.ndarray:
    """The 80 per-band constants of the released models, float32 (80,), all negative."""
    text = importlib.resources.files("tortoise_jax").joinpath("assets/mel_norms.txt").read_text(encoding="utf-8")
    return np.array([line for line in text.splitlines() if not line.startswith("#")], dtype=np.float32)


@functools.cache
def inverse_mel_filters() -> np.ndarray:
    """What takes mel bands back to a power spectrum by least squares, float32 (513, 80)."""
    return np.linalg.pinv(mel_filters())


def linear_power(mel_power: np.ndarray, iterations: int = 20) -> np.ndarray:
    """A power spectrum (513, t), nowhere negative, whose mel bands come near `mel_power` (80, t).

    Least squares, then the multiplicative updates of Lee and Seung (2001). On speech drafts come out 0.4 dB nearer to
    their mel, and the step 10 times quicker, than with librosa's mel_to_stft, whose solver ends where it begins.
    """
    filters = mel_filters()
    power = np.maximum(inverse_mel_filters() @ mel_power, LOG_FLOOR**2)
    wanted = filters.T @ mel_power
    for _ in range(iterations):
        power *= wanted / np.maximum(filters.T @ (filters @ power), LOG_FLOOR**2)
    return power


def griffin_lim(mel: np.ndarray | jax.Array, mel_norms: np.ndarray | jax.Array, iterations: int = 32) -> np.ndarray:
    """A draft waveform float32 ((t - 1) * 256,) for one log-mel (t, 80): phases guessed by Griffin and Lim (1984).

    Good enough to hear words, pace and where speech stops; TorToiSe's diffusion model and vocoder make the real
    thing. The same mel always gives the same waveform, of peak at most 0.95. Raises UserError if `mel` is not finite.
    """
    mel = np.asarray(mel, np.float32)
    if not np.isfinite(mel).all():
        raise UserError("cannot make draft audio: the mel has values that are not finite; the model has diverged")
    length = max(0, len(mel) - 1) * HOP
    silence = max(0, N_FFT // HOP + 1 - len(mel))  # librosa needs a whole window
    log_power = np.clip(mel * np.asarray(mel_norms), np.log(LOG_FLOOR), DRAFT_MAX_LOG)
    log_power = np.pad(log_power, [(0, silence), (0, 0)], constant_values=np.log(LOG_FLOOR))
    magnitude = np.sqrt(linear_power(np.exp(log_power).T))
    parameters = inspect.signature(librosa.griffinlim).parameters
    seed: dict[str, Any] = {"rng" if "rng" in parameters else "random_state": 0}  # librosa 1.0 has renamed it
    waveform = librosa.griffinlim(magnitude, n_iter=iterations, hop_length=HOP, n_fft=N_FFT, **seed)[:length]
    return (waveform * min(1.0, DRAFT_PEAK / max(np.abs(waveform).max(initial=0.0), 1e-9))).astype(np.float32)
