"""Text and a voice to 24 kHz speech by the command, on tiny random models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.support.parity import twin_of, voice_twin
from tests.support.torch_reference import tiny_clvp, tiny_diffusion, tiny_unified_voice, tiny_vocoder
from tortoise_jax import speak
from tortoise_jax.audio import default_mel_norms
from tortoise_jax.checkpoints import parts
from tortoise_jax.checkpoints.pretrained import Pretrained, load_pretrained, save_pretrained, with_parts_of_origin
from tortoise_jax.errors import UserError
from tortoise_jax.models.diffusion import frames_of
from tortoise_jax.synthesis import voices
from tortoise_jax.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint, one of the AR model alone, one whose CLVP knows too few codes, clips, half a voice."""
    folder = tmp_path_factory.mktemp("presets")
    codes = dict(number_mel_codes=302, start_mel_token=300, stop_mel_token=301)
    ar = voice_twin(tiny_unified_voice(layers=1, max_mel_tokens=604, max_text_tokens=60, **codes)).part
    rest = {
        parts.CLVP: twin_of(parts.CLVP, tiny_clvp(num_text_tokens=256, num_speech_tokens=300)).part,
        parts.DIFFUSION: twin_of(parts.DIFFUSION, tiny_diffusion(num_layers=1, in_latent_channels=64)).part,
        parts.VOCODER: twin_of(parts.VOCODER, tiny_vocoder(n_mel_channels=100, strides=(8, 8, 4))).part,
    }
    whole = Pretrained({parts.AR: ar, **rest}, Tokenizer.default(), default_mel_norms(), {})
    save_pretrained(whole, folder / "whole")
    save_pretrained(whole.only(parts.AR), folder / "alone")
    few = twin_of(parts.CLVP, tiny_clvp(num_text_tokens=256, num_speech_tokens=200)).part
    save_pretrained(whole.with_part(parts.CLVP, few), folder / "few_codes")
    (folder / "clips").mkdir()
    noise = 0.1 * np.random.default_rng(0).standard_normal(30000)
    soundfile.write(folder / "clips" / "a.wav", noise, 22050)
    voices.save_voice(folder / "half.npz", np.zeros(64, np.float32))
    return folder


def arguments(folder: Path, out: Path, *changes: str) -> list[str]:
    given = {"checkpoint": folder / "whole", "text": "Hi there.", "voice": folder / "clips", "out": out / "speech.wav"}
    given |= {"preset": "fast", "n": 2, "steps": 3, "max_codes": 12, "dtype": "float32"}
    return [*(part for name, value in given.items() for part in (f"--{name}", str(value))), *changes]


def test_speech_at_24_khz(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "voice.npz"
    options = ["--keep", "2", "--save_voice", str(saved), "--codes", str(tmp_path / "codes.npy")]
    speak.main(arguments(folder, tmp_path, *options))
    said = capsys.readouterr().out
    assert '"Hi there.": of 2 kept candidate' in said
    assert "CLVP " in said
    for name, codes_name in (("speech.wav", "codes.npy"), ("speech.2.wav", "codes.2.npy")):
        info = soundfile.info(tmp_path / name)
        codes = np.load(tmp_path / codes_name)
        assert info.samplerate == 24000
        assert info.frames == 256 * frames_of(len(codes) + 8)  # eight calm codes stay
        assert np.abs(soundfile.read(tmp_path / name)[0]).max() > 1e-3
        assert f"{name}: {info.frames / 24000:.1f} s, preset fast" in said
    arrays = voices.read_npz(saved)
    assert {name: array.shape for name, array in arrays.items()} == {"conditioning": (64,), "diffusion": (64,)}
    first = soundfile.read(tmp_path / "speech.wav")[0]
    speak.main(arguments(folder, tmp_path, "--keep", "2", "--voice", str(saved)))
    assert np.array_equal(soundfile.read(tmp_path / "speech.wav")[0], first)


def test_a_run_takes_the_parts_it_lacks_from_where_it_began(folder: Path, tmp_path: Path) -> None:
    """Through a run that began as a run."""
    for name, origin in (("first", folder / "whole"), ("second", tmp_path / "first")):
        save_pretrained(load_pretrained(folder / "alone"), tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps({"checkpoint": str(origin)}))
    needed = (parts.CLVP, parts.DIFFUSION, parts.VOCODER)
    whole = with_parts_of_origin(load_pretrained(tmp_path / "second"), needed)
    assert {*needed, parts.AR} == set(whole.parts)
    (tmp_path / "first" / "config.json").unlink()
    says = r"second and .*first: without CLVP, diffusion decoder, vocoder; convert all files"
    with pytest.raises(UserError, match=says):
        with_parts_of_origin(load_pretrained(tmp_path / "second"), needed)


BAD: dict[str, tuple[list[str], str]] = {
    "parts missing": (["--checkpoint", "{alone}"], r"alone: without CLVP, diffusion decoder, vocoder; convert all"),
    "half a voice": (["--voice", "{half.npz}"], r"half.npz holds the AR model's half of a voice alone; give the clips"),
    "no such preset": (["--preset", "faster"], r"--preset is 'faster', expected draft, ultra_fast, fast, standard"),
    "one step": (["--steps", "1"], r"--steps is 1, expected 2 to 4000"),
    "negative guidance": (["--guidance", "-1"], r"--guidance is -1.0, expected at least 0"),
    "steps of a draft": (["--preset", "draft"], r"--steps goes with a preset; a draft has no diffusion decoder"),
    "models that do not fit": (["--checkpoint", "{few_codes}"], r"the AR model's codes and CLVP's differ, 300 and 200"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line(folder: Path, tmp_path: Path, changes: list[str], message: str) -> None:
    filled = [str(folder / change.strip("{}")) if change.startswith("{") else change for change in changes]
    with pytest.raises(UserError, match=message):
        speak.main(arguments(folder, tmp_path, *filled))
    assert not list(tmp_path.iterdir())


def test_a_preset_draws_its_own_number_of_candidates() -> None:
    given = ["--checkpoint", "c", "--text", "t", "--voice", "v", "--out", "o.wav"]
    for name, candidates in (("draft", 4), ("ultra_fast", 16), ("high_quality", 256)):
        parsed = speak.parse([*given, "--preset", name])
        speak.check(parsed)
        assert parsed.n == candidates
    off = speak.preset_of(speak.parse([*given, "--preset", "fast", "--guidance", "0"]))
    assert off is not None
    assert (off.guidance, off.steps) == (None, 80)
