"""Reading recordings, the log-mel against torch's, and the draft waveform back from it."""

from __future__ import annotations

import hashlib
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import librosa
import numpy as np
import pytest
import soundfile
import torch

from tests.support import torch_reference
from tests.support.distance import distance
from tests.support.programs import compiled_meanwhile
from tortoise_jax import audio, decoders
from tortoise_jax.errors import UserError

ROOT = Path(__file__).parents[1]
NORMS = audio.default_mel_norms()


def _voice(samples: int, rate: int = audio.SAMPLE_RATE, seed: int = 0) -> np.ndarray:
    """Something like speech: gliding harmonics that fade in and out, a little noise, a pause."""
    time = np.arange(samples) / rate
    pitch = 2 * np.pi * np.cumsum(140 + 40 * np.sin(2.1 * time)) / rate
    harmonics = sum(np.sin(k * pitch) / k for k in range(1, 25))
    loudness = np.clip(np.sin(5.0 * time), 0, None) ** 2
    noise = np.random.default_rng(seed).normal(size=samples) * 0.003
    return (0.2 * harmonics * loudness + noise * (loudness > 0)).astype(np.float32)


def _torch_mel(waveform: np.ndarray, norms: np.ndarray = NORMS) -> np.ndarray:
    mel = torch_reference.log_mel(torch.from_numpy(waveform), torch.from_numpy(norms))
    return np.moveaxis(mel.numpy(), -2, -1)


# --- silence ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [(1.0, 2.0), (0.0, 0.5), (0.05, 0.05)])
def test_silence_at_the_ends_is_cut_but_a_tenth_of_a_second(before, after):
    spoken = np.full(22050, 0.3, np.float32) * np.sin(np.arange(22050) / 5).astype(np.float32)
    noise = lambda seconds: np.random.default_rng(0).normal(0, 1e-4, round(seconds * 22050)).astype(np.float32)
    trimmed = audio.trim_silence(np.concatenate([noise(before), spoken, noise(after)]))
    assert len(trimmed) / 22050 - 1 == pytest.approx(min(before, 0.1) + min(after, 0.1), abs=0.05)
    assert np.abs(trimmed).sum() >= np.abs(spoken).sum(), "nothing that is spoken is lost"


@pytest.mark.parametrize("samples", [0, 100, 256 * 4096, 256 * 4096 + 1, 3 * 256 * 4096 + 300])
def test_levels_block_by_block_are_librosas(samples):
    noise = np.random.default_rng(0).normal(0, 0.1, samples).astype(np.float32)
    whole = librosa.feature.rms(y=noise, frame_length=audio.N_FFT, hop_length=audio.HOP)[0]
    np.testing.assert_allclose(audio.frame_levels(noise), whole, rtol=1e-6)


def test_a_pause_and_a_silent_clip_are_left_alone():
    spoken = 0.3 * np.sin(np.arange(8192) / 5).astype(np.float32)
    pause = np.concatenate([spoken, np.zeros(22050, np.float32), spoken])
    for clip in (pause, np.zeros(22050, np.float32)):
        np.testing.assert_array_equal(audio.trim_silence(clip), clip)


# --- counts -----------------------------------------------------------------------------------------------------------


def test_the_stop_comes_after_the_last_code():
    assert [audio.code_count(seconds * audio.SAMPLE_RATE) for seconds in (3, 6, 9, 11)] == [65, 130, 194, 237]
    assert audio.CONDITIONING_FRAMES == 517


@pytest.mark.parametrize("dtype", [np.float32, np.int16])
def test_a_conditioning_crop_is_six_seconds_from_the_start_or_from_anywhere(dtype):
    short, long = np.arange(1, 5, dtype=dtype), (np.arange(132_310) % 30_000).astype(dtype)
    for rng in (None, np.random.default_rng(0)):
        crop = audio.crop_conditioning(short, rng)
        assert (crop.shape, crop.dtype) == ((132_300,), dtype)
        assert crop[:5].tolist() == [1, 2, 3, 4, 0]
        assert not crop[4:].any()
    np.testing.assert_array_equal(audio.crop_conditioning(long), long[:132_300])
    rng, starts = np.random.default_rng(0), set()
    for _ in range(200):
        crop = audio.crop_conditioning(long, rng)
        starts.add(int(crop[0]))
        np.testing.assert_array_equal(crop, long[int(crop[0]) :][:132_300])
    assert starts == set(range(11))


def test_codes_cover_the_frames():
    for samples in range(0, 5 * audio.SAMPLES_PER_CODE, 37):
        assert audio.code_count(samples) == math.ceil(audio.mel_frames(samples) / audio.MEL_FRAMES_PER_CODE)


def test_mel_norms_are_the_released_float32_figures():
    assert NORMS.shape == (80,)
    assert NORMS.dtype == np.float32
    # Of the bytes of the little-endian array that the released models were trained with.
    expected = "c8d1452681391f3a4ea084d606b8f560f555fcb4f3ac9274839b75d12bd1af7e"
    assert hashlib.sha256(NORMS.astype("<f4").tobytes()).hexdigest() == expected


# --- log-mel ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [513, 22050, 22050 + 255, 22016, 30_000])
def test_log_mel_equals_torch(samples):
    waveform = _voice(samples)
    mel = np.asarray(audio.log_mel(waveform, NORMS))
    assert mel.shape == (audio.mel_frames(samples), 80)
    assert mel.dtype == np.float32
    np.testing.assert_allclose(mel, _torch_mel(waveform), rtol=0, atol=1e-4)


@pytest.mark.parametrize("waveform", [np.zeros(4096), np.ones(4096), np.eye(1, 4096, 2000)[0]], ids=str)
def test_log_mel_of_silence_of_full_scale_and_of_a_click(waveform):
    waveform = waveform.astype(np.float32)
    np.testing.assert_allclose(audio.log_mel(waveform, NORMS), _torch_mel(waveform), rtol=0, atol=1e-4)


def test_log_mel_of_silence_is_the_floor():
    floor = np.broadcast_to(math.log(1e-5) / NORMS, (5, 80))
    np.testing.assert_allclose(audio.log_mel(np.zeros(1024, np.float32), NORMS), floor, rtol=1e-6)


def test_filters_equal_torchaudios():
    np.testing.assert_allclose(audio.mel_filters(), torch_reference.mel_filters().numpy(), rtol=0, atol=1e-8)


def test_filters_and_window_are_librosas_bit_for_bit():
    options = dict(sr=audio.SAMPLE_RATE, n_fft=audio.N_FFT, n_mels=audio.MEL_BANDS, fmax=audio.MEL_MAX_HZ)
    np.testing.assert_array_equal(audio.mel_filters(), librosa.filters.mel(**options, htk=True, norm="slaney"))
    window = librosa.filters.get_window("hann", audio.N_FFT, fftbins=True)
    np.testing.assert_array_equal(audio.hann_window(), window.astype(np.float32))


def test_log_mel_of_many_clips_jitted_and_vmapped_without_hidden_promotion():
    clips = np.stack([[_voice(3000, seed=seed)] for seed in range(4)])
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        jitted = jax.jit(audio.log_mel)(clips, NORMS)
        mapped = jax.vmap(audio.log_mel, in_axes=(0, None))(clips, NORMS)
    assert jitted.shape == (4, 1, 12, 80)
    np.testing.assert_allclose(jitted[:, 0], _torch_mel(clips[:, 0]), rtol=0, atol=1e-4)
    np.testing.assert_allclose(mapped, jitted, rtol=0, atol=1e-5)


def test_a_clip_of_a_new_length_compiles_one_program():
    with compiled_meanwhile() as compiled:
        audio.log_mel(_voice(4321), NORMS)
        audio.log_mel([0.0] * 4322, NORMS)
    assert len(compiled) == 2, compiled


def test_filterbank_matmul_asks_for_full_float32():
    jaxpr = str(jax.make_jaxpr(audio.log_mel)(_voice(2000), NORMS))
    assert jaxpr.count("dot_general") == jaxpr.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == 1


def test_sixteen_bit_samples_are_scaled():
    samples = audio.int16_from_waveform(_voice(5000))
    assert samples.dtype == np.int16
    np.testing.assert_array_equal(
        audio.log_mel(samples, NORMS), audio.log_mel(samples.astype(np.float32) / 32768, NORMS)
    )
    every_sample = np.arange(-32768, 32768).astype(np.int16)
    np.testing.assert_array_equal(audio.int16_from_waveform(audio.waveform_from_int16(every_sample)), every_sample)
    np.testing.assert_array_equal(audio.int16_from_waveform(np.float32([-2, 1, 2])), [-32768, 32767, 32767])


def test_frames_before_the_end_do_not_depend_on_what_follows():
    clip = _voice(33_075)  # ends in the middle of a sound
    alone = np.asarray(audio.log_mel(clip, NORMS))
    padded = np.asarray(audio.log_mel(np.pad(clip, (0, 8192)), NORMS))
    assert len(alone) == 130
    assert len(padded) == 162
    unaffected = (33_075 - 512) // 256 + 1  # frame i ends at sample 256 i + 512
    np.testing.assert_allclose(padded[:unaffected], alone[:unaffected], rtol=0, atol=1e-5)
    assert np.abs(padded[unaffected:130] - alone[unaffected:]).max() > 1e-2  # these two are reflected


@pytest.mark.parametrize(
    ("waveform", "message"),
    [
        (np.zeros(512, np.float32), r"at least 513 samples \(512 given\)"),
        (np.zeros(0, np.float32), r"at least 513 samples \(0 given\)"),
        (np.zeros(1000, np.int32), "takes a float or int16 waveform, found int32"),
    ],
    ids=str,
)
def test_log_mel_refuses_what_it_would_misread(waveform, message):
    with pytest.raises(UserError, match=message):
        audio.log_mel(waveform, NORMS)


# --- recordings -------------------------------------------------------------------------------------------------------


def test_a_sixteen_bit_file_is_read_exactly(tmp_path):
    samples = audio.int16_from_waveform(_voice(4000))
    for name in ("clip.wav", "clip.flac"):
        soundfile.write(tmp_path / name, samples, audio.SAMPLE_RATE, subtype="PCM_16")
        waveform = audio.read_audio(tmp_path / name)
        assert waveform.dtype == np.float32
        np.testing.assert_array_equal(waveform, samples.astype(np.float32) / 32768)


@pytest.mark.parametrize("extension", ["ogg", "mp3"])
def test_lossy_files_are_read(tmp_path, extension):
    waveform = _voice(22050)
    soundfile.write(tmp_path / f"clip.{extension}", waveform, audio.SAMPLE_RATE)
    read = audio.read_audio(str(tmp_path / f"clip.{extension}"))
    assert read.shape == waveform.shape
    assert np.corrcoef(read, waveform)[0, 1] > 0.98


def test_the_first_channel_is_kept(tmp_path):
    left, right = _voice(3000), np.full(3000, 0.5, np.float32)
    soundfile.write(tmp_path / "stereo.wav", np.stack([left, right], axis=1), audio.SAMPLE_RATE, subtype="FLOAT")
    np.testing.assert_array_equal(audio.read_audio(tmp_path / "stereo.wav"), left)


def test_a_voice_on_another_channel_is_pointed_out(tmp_path):
    silence = np.zeros(22050)
    soundfile.write(tmp_path / "a.wav", np.stack([silence, silence, _voice(22050)], axis=1), 22050)
    assert audio.heard_elsewhere(tmp_path / "a.wav") == (
        "; channel 3 is not: save it as the first, or give prepare --channel 3"
    )
    soundfile.write(tmp_path / "b.wav", np.stack([silence, silence], axis=1), 22050)
    assert audio.heard_elsewhere(tmp_path / "b.wav") == ""


def test_samples_past_full_scale_are_clipped(tmp_path):
    soundfile.write(tmp_path / "loud.wav", np.float32([0.5, 1.5, -3.0]), audio.SAMPLE_RATE, subtype="FLOAT")
    np.testing.assert_array_equal(audio.read_audio(tmp_path / "loud.wav"), np.float32([0.5, 1.0, -1.0]))


def test_clipping_follows_resampling(tmp_path):
    square = np.sign(np.sin(2 * np.pi * 200 * np.arange(44100) / 44100)).astype(np.float32)
    soundfile.write(tmp_path / "square.wav", square, 44100, subtype="FLOAT")
    assert np.abs(audio.read_audio(tmp_path / "square.wav")).max() == 1.0  # its filter overshoots


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000])
def test_other_rates_are_resampled(tmp_path, rate):
    def tone(rate: int) -> np.ndarray:
        return (0.5 * np.sin(2 * np.pi * 1000 * np.arange(rate) / rate)).astype(np.float32)

    soundfile.write(tmp_path / "tone.wav", tone(rate), rate, subtype="FLOAT")
    waveform = audio.read_audio(tmp_path / "tone.wav")
    assert waveform.dtype == np.float32
    assert waveform.shape == (audio.SAMPLE_RATE,)
    middle = slice(2000, -2000)
    np.testing.assert_allclose(waveform[middle], tone(audio.SAMPLE_RATE)[middle], rtol=0, atol=1e-3)


def test_resampling_leaves_no_aliases(tmp_path):
    tone = np.sin(2 * np.pi * 15_000 * np.arange(44100) / 44100)  # above what 22050 Hz can hold
    soundfile.write(tmp_path / "high.wav", 0.5 * tone, 44100)
    assert np.abs(audio.read_audio(tmp_path / "high.wav")[1000:-1000]).max() < 1e-3


def _written(path, samples, **options):
    soundfile.write(path, samples, audio.SAMPLE_RATE, **options)
    return path.read_bytes()


def test_bad_files_are_named_with_the_reason(tmp_path):
    clip = tmp_path / "clip"
    wav = _written(clip.with_suffix(".wav"), _voice(9000))
    flac = _written(clip.with_suffix(".flac"), _voice(9000))
    mp3 = _written(clip.with_suffix(".mp3"), _voice(60_000))
    bad = np.float32([0, 0, np.nan, np.inf])
    files = {
        "text.wav": (b"Once upon a time, a long text was named like a recording.", "not readable as audio (Format not"),
        "nothing.wav": (b"", "the file is empty (0 bytes)"),
        "pointer.wav": (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n",
            "fetch the file with: git lfs pull",
        ),
        "renamed.wav": (b"\0\0\0\x1cftypM4A \0\0", "is an m4a or mp4 inside; name it so"),
        "silent.wav": (_written(tmp_path / "0.wav", np.zeros(0)), "the recording is empty (no samples)"),
        "half.wav": (wav[:9000], "the recording is truncated: 4478 samples could be read"),
        "half.flac": (flac[: len(flac) // 2], "not readable as audio"),
        "half.mp3": (mp3[: len(mp3) // 2], "the recording is truncated"),
        "nan.wav": (_written(tmp_path / "1.wav", bad, subtype="FLOAT"), "sample 2 is nan, expected finite"),
        "inf.wav": (_written(tmp_path / "2.wav", bad[3:], subtype="FLOAT"), "sample 0 is inf, expected finite"),
    }
    for name, (content, reason) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as caught:
            audio.read_audio(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: ")
        assert reason in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rate", [1, 3999, 768_001, 2**31 - 1])
def test_an_impossible_rate_is_refused_before_anything_is_made_of_it(tmp_path, rate):
    """130 kB that claim 1 Hz would be 18 hours, 6 GB of samples."""
    soundfile.write(tmp_path / "a.wav", np.zeros(65_000, np.float32), 22050, subtype="PCM_16")
    content = bytearray((tmp_path / "a.wav").read_bytes())
    content[24:28] = rate.to_bytes(4, "little")
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(UserError, match=rf"a.wav: its header claims {rate} Hz, expected 4000 to 768000"):
        audio.read_audio(tmp_path / "a.wav")


def test_a_recording_is_read_block_by_block(tmp_path, monkeypatch):
    stereo = 0.4 * np.random.default_rng(0).standard_normal((50_000, 2)).astype(np.float32)
    for rate in (16_000, 22_050, 44_100, 48_000):
        soundfile.write(tmp_path / f"{rate}.wav", stereo, rate, subtype="FLOAT")
        whole = librosa.resample(stereo[:, 0], orig_sr=rate, target_sr=22050, res_type="soxr_hq")
        monkeypatch.setattr(decoders, "BLOCK", 7000)
        np.testing.assert_array_equal(audio.read_audio(tmp_path / f"{rate}.wav"), np.clip(whole, -1, 1))


def test_a_recording_of_more_than_six_hours_is_to_be_cut(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.flac", np.zeros(80_000), 8000)
    monkeypatch.setattr(audio, "MAX_HOURS", 9 / 3600)
    monkeypatch.setattr(decoders, "BLOCK", 1000)
    with pytest.raises(UserError, match=r"a.flac: is longer than .* hours; cut it into parts"):
        audio.read_audio(tmp_path / "a.flac")


def test_pipes_and_devices_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.wav")
    with pytest.raises(UserError, match=r"a.wav: is a named pipe, expected a file"):
        audio.read_audio(tmp_path / "a.wav")
    with pytest.raises(UserError, match="/dev/zero: is a device, expected a file"):
        audio.read_audio("/dev/zero")


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(UserError, match=r"gone\.wav: there is no such file$"):
        audio.read_audio(tmp_path / "gone.wav")
    (tmp_path / "gone.flac").touch()
    with pytest.raises(UserError, match=r"gone\.wav: there is no such file; gone\.flac is there$"):
        audio.read_audio(tmp_path / "gone.wav")
    with pytest.raises(UserError, match="is a folder, expected a wav"):
        audio.read_audio(tmp_path)


def test_a_wav_written_to_a_pipe_is_not_truncated(tmp_path):
    content = bytearray(_written(tmp_path / "clip.wav", np.zeros(2000), subtype="PCM_16"))
    content[40:44] = b"\xff\xff\xff\xff"  # the size of the data, unknown when its header was written
    (tmp_path / "piped.wav").write_bytes(content)
    assert audio.read_audio(tmp_path / "piped.wav").shape == (2000,)


# --- draft audio ------------------------------------------------------------------------------------------------------


def test_draft_audio_has_the_mel_it_was_made_from():
    mel = np.asarray(audio.log_mel(_voice(22050), NORMS))
    draft = audio.griffin_lim(mel, NORMS)
    assert draft.dtype == np.float32
    assert draft.shape == ((len(mel) - 1) * audio.HOP,)
    again = np.asarray(audio.log_mel(draft, NORMS))
    assert again.shape == mel.shape
    loud = mel * NORMS > math.log(1e-2)
    assert loud.mean() > 0.2
    assert np.abs((again - mel) * NORMS)[loud].mean() < 0.5  # nepers of power, about 2 dB
    silence = np.full_like(mel, 0) + math.log(1e-5) / NORMS
    assert np.abs((silence - mel) * NORMS)[loud].mean() > 5


def test_a_draft_of_speech_is_near_its_mel_and_the_updates_bring_it_there(monkeypatch):
    waveform = audio.read_audio(sorted((ROOT / "examples/voice/wavs").iterdir())[0])
    mel = np.asarray(audio.log_mel(waveform, NORMS))
    decibels = lambda: distance(mel, np.asarray(audio.log_mel(audio.griffin_lim(mel, NORMS), NORMS)), NORMS)
    assert (near := decibels()) < 1.5
    power = audio.linear_power
    monkeypatch.setattr(audio, "linear_power", lambda mel_power: power(mel_power, iterations=0))
    assert decibels() > near + 0.2


@pytest.mark.slow
def test_copy_synthesis_comes_near_the_recording():
    """The benchmark as typed: recording -> codes -> waveform, through a small dVAE trained on other clips."""
    command = [sys.executable, "-m", "benchmarks.copy_synthesis", "--steps", "1000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found = {name.strip(): float(value) for name, value in re.findall(r"(.+?) +([\d.]+) dB from", done.stdout)}
    assert found["mel -> waveform"] < 1.5
    assert found["codes -> waveform"] < 7
    assert found["random codes -> mel"] > 2 * found["codes -> waveform"]


def test_draft_audio_is_the_same_every_time():
    mel = np.asarray(audio.log_mel(_voice(4000), NORMS))
    np.testing.assert_array_equal(audio.griffin_lim(mel, NORMS), audio.griffin_lim(mel, NORMS))


def test_draft_audio_stays_below_full_scale():
    draft = audio.griffin_lim(np.full((20, 80), -1e6, np.float32), NORMS)  # of a model that has learnt nothing
    assert 0.9 < np.abs(draft).max() <= 0.951
    assert np.abs(audio.griffin_lim(np.asarray(audio.log_mel(np.zeros(4096), NORMS)), NORMS)).max() < 0.05


def test_draft_audio_of_next_to_nothing():
    for frames in (0, 1):
        assert audio.griffin_lim(np.zeros((frames, 80), np.float32), NORMS).shape == (0,)
    assert audio.griffin_lim(np.zeros((2, 80), np.float32), NORMS).shape == (256,)


def test_draft_audio_of_a_diverged_model_is_refused():
    mel = np.zeros((10, 80), np.float32)
    mel[3, 5] = np.nan
    with pytest.raises(UserError, match="not finite; the model has diverged"):
        audio.griffin_lim(mel, NORMS)
