"""The command line that says a text."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.support import runs
from tests.support.parity import Twin
from tortoise_jax import speak
from tortoise_jax.audio import SAMPLE_RATE, SAMPLES_PER_CODE, default_mel_norms
from tortoise_jax.checkpoints.pretrained import Pretrained, save_pretrained
from tortoise_jax.errors import UserError
from tortoise_jax.files import read_npz
from tortoise_jax.synthesis import drafts, speech, voices
from tortoise_jax.synthesis.diffusion_inputs import diffusion_inputs
from tortoise_jax.synthesis.sampler import SamplingOptions
from tortoise_jax.text.tokenizer import Tokenizer

NORMS = default_mel_norms()


def pretrained(voice: Twin, dvae: Twin | None) -> Pretrained:
    parts = {"ar": voice.part} | ({"dvae": dvae.part} if dvae else {})
    return Pretrained(parts, Tokenizer.default(), NORMS, {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, voice: Twin, dvae: Twin) -> Path:
    """A checkpoint, one without a dVAE, and a voice."""
    folder = tmp_path_factory.mktemp("speak")
    save_pretrained(pretrained(voice, dvae), folder / "checkpoint")
    save_pretrained(pretrained(voice, None), folder / "no_dvae")
    (folder / "clips").mkdir()
    noise = 0.1 * np.random.default_rng(0).standard_normal(SAMPLE_RATE)
    soundfile.write(folder / "clips" / "a.wav", noise, SAMPLE_RATE)
    voices.save_voice(folder / "voice.npz", np.random.default_rng(0).standard_normal(64).astype(np.float32))
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def quick_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tone of the right length: random mels are no work for Griffin-Lim."""
    tone = lambda mel, norms: np.full((len(mel) - 1) * 256, 0.5, np.float32)
    monkeypatch.setattr(drafts, "griffin_lim", tone)


def run(folder: Path, out: Path, *changes: str, text: str = "Hi there.") -> None:
    given = {"checkpoint": folder / "checkpoint", "text": text, "voice": folder / "voice.npz", "out": out / "draft.wav"}
    given |= {"candidates": 3, "max_codes": 6, "dtype": "float32"}
    arguments = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    speak.main([*arguments, *changes])


def test_says_a_text_with_a_folder_of_clips(
    folder: Path, tmp_path: Path, quick_drafts: None, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "saved.npz"
    options = ["--codes", str(tmp_path / "codes.npy"), "--save_voice", str(saved), "--keep", "2"]
    run(folder, tmp_path, "--voice", str(folder / "clips"), *options)
    printed = capsys.readouterr().out
    for name, codes_name in (("draft.wav", "codes.npy"), ("draft.2.wav", "codes.2.npy")):
        waveform, rate = soundfile.read(tmp_path / name)
        codes = np.load(tmp_path / codes_name)
        assert rate == SAMPLE_RATE
        assert codes.dtype == np.int32
        spoken = int((codes < 64).sum())  # a code beyond the dVAE's is left out of the sound
        assert len(waveform) == max(0, spoken * SAMPLES_PER_CODE - 256)
        assert np.abs(waveform).max() < 1
        assert str(tmp_path / name) in printed
    assert '"Hi there.": of 3 kept candidate' in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "codes.2.npy", "codes.npy", "draft.2.wav", "draft.wav", "saved.npz",
    ]  # fmt: skip
    before = np.load(tmp_path / "codes.npy")
    run(folder, tmp_path, "--voice", str(saved), "--codes", str(tmp_path / "codes.npy"))
    np.testing.assert_array_equal(np.load(tmp_path / "codes.npy"), before)


def test_the_batch_does_not_change_what_is_kept(folder: Path, tmp_path: Path, quick_drafts: None) -> None:
    def codes(*options: str) -> list[int]:
        run(folder, tmp_path, "--codes", str(tmp_path / "codes.npy"), *options)
        return np.load(tmp_path / "codes.npy").tolist()

    assert codes("--batch", "2") == codes()
    assert codes("--seed", "1") != codes()


def test_a_long_text_is_said_in_parts(
    folder: Path, tmp_path: Path, quick_drafts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speech, "COMFORTABLE_TOKENS", 8)
    run(folder, tmp_path, "--codes", str(tmp_path / "codes.npy"), text="One thing. Another thing. The last.")
    parts = [np.load(tmp_path / f"codes.part{i}.npy") for i in (1, 2, 3)]
    spoken = [max(0, int((codes < 64).sum()) * SAMPLES_PER_CODE - 256) for codes in parts]
    pause = round(0.3 * SAMPLE_RATE)
    assert soundfile.info(tmp_path / "draft.wav").frames == sum(spoken) + 2 * pause
    assert not (tmp_path / "codes.npy").exists()


def test_parts_are_packed_to_what_the_model_holds(
    folder: Path, tmp_path: Path, quick_drafts: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """29 tokens, not the 150 of the released model: a text of short sentences was refused with "split it"."""
    run(folder, tmp_path, text="One small thing. Another small thing. The last small thing. And then no more.")
    assert capsys.readouterr().out.count(": of 3 kept candidate") > 1


def test_a_voice_on_another_channel_is_pointed_out(folder: Path, tmp_path: Path) -> None:
    silence, noise = np.zeros(SAMPLE_RATE), 0.1 * np.random.default_rng(0).standard_normal(SAMPLE_RATE)
    soundfile.write(tmp_path / "a.wav", np.stack([silence, noise], axis=1), SAMPLE_RATE)
    with pytest.raises(UserError, match=r"a.wav: the clip is silent \(-120 dB, .*\); channel 2 is not"):
        run(folder, tmp_path, "--voice", str(tmp_path / "a.wav"))


def test_latents_are_those_of_the_kept_codes(
    folder: Path, tmp_path: Path, quick_drafts: None, voice: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"total": 24, "silence": 7, "ending": (5, 5, 8)}
    monkeypatch.setattr(speak, "diffusion_inputs", lambda *arguments: diffusion_inputs(*arguments, **small))
    monkeypatch.setattr(speak, "check_diffusion_inputs", lambda *_: None)
    run(folder, tmp_path, "--codes", str(tmp_path / "codes.npy"), "--latents", str(tmp_path / "latents.npz"))
    arrays = read_npz(tmp_path / "latents.npz")
    vector = voices.read_voice(folder / "voice.npz")["conditioning"]
    ids = Tokenizer.default().encode("Hi there.")
    codes, latents = diffusion_inputs(voice.params, voice.config, vector, ids, np.load(tmp_path / "codes.npy"), **small)
    np.testing.assert_array_equal(arrays["codes"], codes)
    np.testing.assert_allclose(arrays["latents"], latents, rtol=1e-5)
    np.testing.assert_array_equal(arrays["conditioning"], vector)


def test_letters_the_cleaner_changes_are_named(
    folder: Path, tmp_path: Path, quick_drafts: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run(folder, tmp_path, text="A café.")
    assert 'note: the cleaner reads é as "e"' in capsys.readouterr().out


BAD: dict[str, tuple[list[str], str]] = {
    "no candidates": (["--candidates", "0"], r"--candidates is 0, expected at least 1"),
    "keep nothing": (["--keep", "0"], r"--keep is 0, expected at least 1"),
    "keep more than drawn": (["--keep", "4"], r"--keep 4 of 3 candidates: there are not so many"),
    "not a number": (["--keep", "many"], r"argument --keep: invalid int value: 'many' \(see --help\)"),
    "unknown flag": (["--n", "3"], r"unrecognized arguments: --n 3"),
    "no batch": (["--batch", "-1"], r"--batch is -1, expected at least 1"),
    "negative seed": (["--seed", "-1"], r"seed is -1, expected 0 to 1073741824"),
    "seed of more than 32 bits": (["--seed", str(2**32)], r"seed is 4294967296, expected 0 to 1073741824"),
    "empty text": (["--text", "  "], r'the text "  " has nothing to say'),
    "text of marks": (["--text", '"...!"'], r"has nothing to say: no letter or digit is left"),
    "unknown characters": (
        ["--text", "a {b} = c"],
        r"characters the tokenizer does not know: \{ \(U\+007B\) \} \(U\+007D\) = \(U\+003D\)$",
    ),
    "signs of speech": (["--text", "R&B"], r"does not know: & \(U\+0026\); --cleaner english says them in words$"),
    "sentence too long": (
        ["--text", "word " * 40 + "."],
        r'the sentence "word word .*" has \d+ tokens, .* room for 29',
    ),
    "unknown cleaner": (["--cleaner", "englsh"], r'unknown cleaner "englsh" \(did you mean "english"\?\)'),
    "temperature": (["--temperature", "-1"], r"temperature is -1.0, expected at least 0"),
    "top_p": (["--top_p", "2"], r"top_p is 2.0, expected above 0 up to 1"),
    "dtype": (["--dtype", "half"], r"dtype is half, expected auto, float32 or bfloat16"),
    "too many codes": (["--max_codes", "43"], r"max_codes is 43, the model has room for 42"),
    "out is no wav": (["--out", "draft.mp3"], r"--out draft.mp3: expected a name ending in .wav"),
    "codes are no npy": (["--codes", "codes.txt"], r"--codes codes.txt: expected a name ending in .npy"),
    "latents of a small model": (["--latents", "x.npz"], r"this model has 64 codes, but TorToiSe's decoder"),
    "out that cannot be written": (["--out", "/proc/x/a.wav"], r"--out /proc/x/a.wav: cannot be written: /proc: "),
    "codes that cannot be written": (["--codes", "/proc/a.npy"], r"--codes /proc/a.npy: cannot be written"),
    "no such voice": (["--voice", "nowhere"], r"voice nowhere does not exist"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line(folder: Path, tmp_path: Path, changes: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(folder, tmp_path, *changes)
    assert not list(tmp_path.iterdir())


def test_no_clips_and_no_dvae_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"empty holds no clips"):
        run(folder, tmp_path, "--voice", str(folder / "empty"))
    with pytest.raises(UserError, match=r"no_dvae: without dVAE; convert all files"):
        run(folder, tmp_path, "--checkpoint", str(folder / "no_dvae"))
    with pytest.raises(UserError, match=r"clips holds no tortoise.json"):
        run(folder, tmp_path, "--checkpoint", str(folder / "clips"))


def test_the_command_ends_with_one_line_and_code_2() -> None:
    command = [sys.executable, "-m", "tortoise_jax.speak", "--checkpoint", "nowhere", "--text", "hi"]
    ended = subprocess.run(
        [*command, "--voice", "v", "--out", "x.wav"], capture_output=True, text=True, check=False, timeout=280
    )
    assert ended.returncode == 2
    (line,) = runs.own_lines(ended.stderr)
    assert line.startswith("error: nowhere does not exist; expected a converted checkpoint")
    assert not ended.stdout


def test_numbered_names() -> None:
    assert speak.numbered(Path("a/draft.wav"), 0) == Path("a/draft.wav")
    assert speak.numbered(Path("a/draft.wav"), 2) == Path("a/draft.3.wav")
    assert speak.numbered(Path("codes.npy"), 1, 0) == Path("codes.part1.2.npy")


def test_defaults_are_tortoises() -> None:
    """temperature 0.8, top-k 50, top-p 0.8, repetition penalty 2, 500 codes, an extra text stop."""
    arguments = speak.parse(["--checkpoint", "c", "--text", "t", "--voice", "v", "--out", "o.wav"])
    options = SamplingOptions(**speak.sampling_of(arguments))
    want = {"temperature": 0.8, "top_k": 50, "top_p": 0.8, "repetition_penalty": 2.0, "max_codes": 500}
    assert dataclasses.asdict(options) == want | {"extra_text_stop": True, "start_inside": True, "dtype": "auto"}
