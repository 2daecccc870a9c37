"""Clips to the conditioning vector, saved vectors, and TorToiSe's voice files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import soundfile
import torch

from convert import voices as convert_voices
from tests.support import torch_reference
from tests.support.parity import STACK, Twin, assert_close, twin_of
from tortoise_jax.audio import CONDITIONING_SAMPLES, SAMPLE_RATE, default_mel_norms
from tortoise_jax.checkpoints import parts
from tortoise_jax.checkpoints.parts import Part
from tortoise_jax.checkpoints.pretrained import Pretrained
from tortoise_jax.errors import UserError
from tortoise_jax.files import save_npz
from tortoise_jax.synthesis import voices
from tortoise_jax.text.tokenizer import Tokenizer

NORMS = default_mel_norms()


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(round(seconds * SAMPLE_RATE))).astype(np.float32)


def write(path: Path, waveform: np.ndarray) -> Path:
    soundfile.write(path, waveform, SAMPLE_RATE, subtype="FLOAT")
    return path


def load(source: Path, voice: Twin, seed: int = 0) -> np.ndarray:
    return voices.load_voice(source, voice.params, voice.config, NORMS, seed)


# Clips


def test_the_vector_is_torchs_mean_over_the_clips(
    tmp_path: Path, torch_voice: torch_reference.UnifiedVoice, voice: Twin
) -> None:
    """A clip of exactly six seconds, and a short one padded with zeros as a waveform."""
    clips = [noise(6, seed=1), noise(2, seed=2)]
    for i, clip in enumerate(clips):
        write(tmp_path / f"{i}.wav", clip)
    padded = [np.pad(clip, (0, CONDITIONING_SAMPLES - len(clip))) for clip in clips]
    mels = torch.stack([torch_reference.log_mel(torch.from_numpy(clip), torch.from_numpy(NORMS)) for clip in padded])
    want = torch_voice.conditioning_latent(mels[None])[0]
    got = load(tmp_path, voice)
    assert got.dtype == np.float32
    assert_close(got, want, STACK)
    assert_close(load(tmp_path / "0.wav", voice), torch_voice.conditioning_latent(mels[None, :1])[0], STACK)


def test_long_clips_are_cropped_by_the_seed(tmp_path: Path) -> None:
    waveform = noise(20)
    clip = write(tmp_path / "long.wav", waveform)
    crops = {seed: voices.crop(clip, seed, 0) for seed in range(6)}
    starts = {seed: int(np.flatnonzero(waveform == crop[0])[0]) for seed, crop in crops.items()}
    for seed, crop in crops.items():
        np.testing.assert_array_equal(crop, waveform[starts[seed] : starts[seed] + CONDITIONING_SAMPLES])
    assert len(set(starts.values())) == 6
    np.testing.assert_array_equal(voices.crop(clip, 0, 0), crops[0])
    assert not np.array_equal(voices.crop(clip, 0, 1), crops[0])


def test_a_crop_may_begin_at_either_end(tmp_path: Path) -> None:
    """One sample more than a crop: both places are drawn."""
    waveform = noise(6)
    clip = write(tmp_path / "clip.wav", np.append(waveform, np.float32(0.05)))
    firsts = {float(voices.crop(clip, seed, 0)[0]) for seed in range(20)}
    assert firsts == {float(waveform[0]), float(waveform[1])}


def test_clips_are_taken_by_name_and_other_files_left(tmp_path: Path) -> None:
    for name in ("b.flac", "a.WAV", "c.mp3", "d.ogg", "notes.txt", ".hidden"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "e.wav").mkdir()
    assert [path.name for path in voices.find_clips(tmp_path)] == ["a.WAV", "b.flac", "c.mp3", "d.ogg"]


def make_silent(folder: Path) -> Path:
    return write(folder / "silent.wav", np.zeros(SAMPLE_RATE * 7, np.float32))


def make_short(folder: Path) -> Path:
    write(folder / "a.wav", noise(7))
    write(folder / "b.wav", noise(1)[: round(0.5 * SAMPLE_RATE)])
    return folder


def make_empty_folder(folder: Path) -> Path:
    (folder / "readme.txt").write_text("no clips here")
    return folder


def make_text(folder: Path) -> Path:
    (folder / "clip.wav").write_text("not audio")
    return folder / "clip.wav"


def make_torch(folder: Path) -> Path:
    torch.save((torch.ones(1, 64), torch.ones(1, 128)), folder / "voice.pth")
    return folder / "voice.pth"


def make_wide(folder: Path) -> Path:
    voices.save_voice(folder / "wide.npz", np.ones(1024, np.float32))
    return folder / "wide.npz"


def make_other(folder: Path) -> Path:
    np.savez(folder / "other.npz", something=np.ones(3))
    return folder / "other.npz"


def make_double(folder: Path) -> Path:
    np.savez(folder / "double.npz", conditioning=np.ones(64))
    return folder / "double.npz"


def make_nan(folder: Path) -> Path:
    np.savez(folder / "nan.npz", conditioning=np.full(64, np.nan, np.float32))
    return folder / "nan.npz"


def make_cut(folder: Path) -> Path:
    voices.save_voice(folder / "cut.npz", np.ones(64, np.float32))
    (folder / "cut.npz").write_bytes((folder / "cut.npz").read_bytes()[:100])
    return folder / "cut.npz"


def make_objects(folder: Path) -> Path:
    np.savez(folder / "objects.npz", conditioning=np.array([{"a": 1}], dtype=object))
    return folder / "objects.npz"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "nowhere", r"voice .*nowhere does not exist; give a folder of clips"),
        (make_empty_folder, r"holds no clips \(\.wav, \.flac, \.ogg, \.mp3\)"),
        (make_silent, r"silent\.wav: the clip is silent \(-120 dB, at least -60 dB\)"),
        (make_short, r"b\.wav: the clip is too short \(0\.50 s, at least 0\.6 s\); a few of 6 s or more are best"),
        (make_text, r"clip\.wav: not readable as audio"),
        (make_torch, r"voice\.pth is a torch file; convert it: python convert/voices\.py"),
        (make_wide, r"wide\.npz: the voice is a vector of 1024, the model's width is 64"),
        (make_other, r"other\.npz holds something, expected a voice: an array named conditioning"),
        (make_double, r"double\.npz: conditioning is float64 \(64,\), expected finite float32"),
        (make_nan, r"nan\.npz: conditioning is float32 \(64,\), expected finite"),
        (make_cut, r"cut\.npz: not a readable \.npz"),
        (make_objects, r"objects\.npz: not a readable \.npz"),
        (lambda folder: folder / "nowhere.npz", r"nowhere\.npz: there is no such file"),
    ],
)
def test_bad_voices_are_named(tmp_path: Path, voice: Twin, make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(make(tmp_path), voice)


# Saved vectors


def test_a_saved_voice_is_the_same_voice(tmp_path: Path, voice: Twin) -> None:
    vector = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    voices.save_voice(tmp_path / "new" / "voice.npz", vector)
    np.testing.assert_array_equal(load(tmp_path / "new" / "voice.npz", voice), vector)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["voice.npz"]
    with pytest.raises(UserError, match=r"voice\.pt: a voice is saved as \.npz"):
        voices.save_voice(tmp_path / "voice.pt", vector)


# Random voices


def test_the_halves_of_a_random_voice_are_unrelated() -> None:
    part = twin_of(parts.RANDOM_AR, torch_reference.tiny_random_voice()).part
    first, again, other = (voices.random_vector(part, 3, half) for half in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1
    assert np.abs(first - voices.random_vector(part, 4, 0)).max() > 0.1


# TorToiSe's files


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, torch.Tensor, torch.Tensor]:
    vectors = torch.randn(1, 64), torch.randn(1, 128)
    torch.save(vectors, tmp_path / "tortoise.pth")
    return tmp_path / "tortoise.pth", *vectors


def test_a_tortoise_voice_goes_there_and_back_exactly(
    tmp_path: Path, voice: Twin, pair: tuple[Path, torch.Tensor, torch.Tensor]
) -> None:
    source, vector, diffusion = pair
    lines = convert_voices.convert(source, tmp_path / "voice.npz")
    assert "which presets speak with" in lines[1]
    np.testing.assert_array_equal(load(tmp_path / "voice.npz", voice), vector[0].numpy())
    convert_voices.convert(tmp_path / "voice.npz", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert isinstance(back, tuple)
    assert torch.equal(back[0], vector)
    assert torch.equal(back[1], diffusion)


def test_our_own_voice_needs_the_diffusion_half_from_elsewhere(
    tmp_path: Path, pair: tuple[Path, torch.Tensor, torch.Tensor]
) -> None:
    source, _, diffusion = pair
    ours = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    voices.save_voice(tmp_path / "ours.npz", ours)
    with pytest.raises(UserError, match=r"no vector for the diffusion model; save the voice .*--diffusion"):
        convert_voices.convert(tmp_path / "ours.npz", tmp_path / "ours.pth")
    assert not (tmp_path / "ours.pth").exists()
    convert_voices.convert(tmp_path / "ours.npz", tmp_path / "ours.pth", diffusion=source)
    back = torch.load(tmp_path / "ours.pth", weights_only=True)
    np.testing.assert_array_equal(back[0][0].numpy(), ours)
    assert torch.equal(back[1], diffusion)


def test_latents_become_a_torch_file(tmp_path: Path) -> None:
    arrays = {
        "latents": np.random.default_rng(0).standard_normal((9, 64)).astype(np.float32),
        "codes": np.arange(24, dtype=np.int32),
        "conditioning": np.ones(64, np.float32),
    }
    save_npz(tmp_path / "latents.npz", arrays)
    convert_voices.convert(tmp_path / "latents.npz", tmp_path / "latents.pth")
    back = torch.load(tmp_path / "latents.pth", weights_only=True)
    assert back.keys() == arrays.keys()
    for name, value in arrays.items():
        np.testing.assert_array_equal(back[name][0].numpy(), value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": torch.ones(3)}, "holds a dict, expected TorToiSe's pair of voice vectors"),
        ((torch.ones(1, 4), torch.ones(1, 4), torch.ones(1, 4)), "holds a tuple, expected TorToiSe's pair"),
        ((torch.ones(2, 4), torch.ones(1, 4)), r"holds a vector of shape \(2, 4\)"),
        ((torch.full((1, 4), float("inf")), torch.ones(1, 4)), "expected finite"),
    ],
)
def test_what_is_no_tortoise_voice_is_named(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "voice.pth")
    with pytest.raises(UserError, match=rf"voice\.pth {message}|voice\.pth.*{message}"):
        convert_voices.convert(tmp_path / "voice.pth", tmp_path / "voice.npz")
    assert not (tmp_path / "voice.npz").exists()


def test_trap_20_waveforms_that_tortoise_keeps_are_no_voice(tmp_path: Path) -> None:
    """Its newer versions write NAME.pth beside the clips they load: a list, where a voice is a tuple."""
    for clips in (2, 3):
        torch.save([torch.zeros(1, 30000) for _ in range(clips)], tmp_path / "clips.pth")
        with pytest.raises(UserError, match=rf"clips\.pth holds a list of {clips} waveforms, .*; give the clips to"):
            convert_voices.convert(tmp_path / "clips.pth", tmp_path / "voice.npz")
    assert not (tmp_path / "voice.npz").exists()


def test_trap_21_after_fine_tuning_the_first_half_alone_is_another(tmp_path: Path, voice: Twin) -> None:
    write(tmp_path / "clip.wav", noise(2, seed=2))
    diffusion = twin_of(parts.DIFFUSION, torch_reference.tiny_diffusion(num_layers=1)).part
    tuned = jax.tree.map(lambda leaf: leaf * np.float32(1.1), voice.params)
    before, after = (
        voices.load(
            tmp_path / "clip.wav",
            Pretrained(
                {parts.AR: Part(voice.config, {"params": params}), parts.DIFFUSION: diffusion},
                Tokenizer.default(),
                NORMS,
                {},
            ),
            both=True,
            seed=0,
        )
        for params in (voice.params, tuned)
    )
    assert np.abs(before.conditioning - after.conditioning).max() > 1e-2
    np.testing.assert_array_equal(before.diffusion, after.diffusion)


def test_kinds_of_files_that_do_not_go_together(tmp_path: Path, pair: tuple[Path, torch.Tensor, torch.Tensor]) -> None:
    source = pair[0]
    with pytest.raises(UserError, match=r"expected \.pth to \.npz, or \.npz to \.pth"):
        convert_voices.convert(source, tmp_path / "again.pth")
    with pytest.raises(UserError, match=r"--diffusion goes with a voice \.npz"):
        convert_voices.convert(source, tmp_path / "voice.npz", diffusion=source)
    save_npz(tmp_path / "latents.npz", {"latents": np.ones((2, 3))})
    with pytest.raises(UserError, match=r"holds latents, not a voice"):
        convert_voices.convert(tmp_path / "latents.npz", tmp_path / "x.pth", diffusion=source)
    with pytest.raises(UserError, match=r"latents is float64 \(2, 3\), expected finite float32 of two axes"):
        convert_voices.convert(tmp_path / "latents.npz", tmp_path / "x.pth")
