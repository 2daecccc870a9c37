"""Text and a voice to 24 kHz speech by the command and from Python, on tiny random models."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import soundfile

import tortoise_jax as tj
from tests.support import readme
from tests.support.parity import assert_close, twin_of, voice_twin
from tests.support.torch_reference import (
    tiny_clvp,
    tiny_diffusion,
    tiny_hifigan,
    tiny_random_voice,
    tiny_unified_voice,
    tiny_vocoder,
)
from tortoise_jax import speak
from tortoise_jax.audio import MIN_SECONDS, SAMPLE_RATE, default_mel_norms
from tortoise_jax.checkpoints import parts
from tortoise_jax.checkpoints.pretrained import Pretrained, load_pretrained, save_pretrained, with_parts_of_origin
from tortoise_jax.errors import UserError
from tortoise_jax.files import read_npz
from tortoise_jax.models.diffusion import frames_of
from tortoise_jax.synthesis import presets, ranking, rendering, sampler, speech, voices
from tortoise_jax.synthesis.prompts import max_text_ids
from tortoise_jax.synthesis.sampler import SamplingOptions
from tortoise_jax.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint, one of the AR model alone, one whose CLVP knows too few codes, clips, half a voice."""
    folder = tmp_path_factory.mktemp("presets")
    codes = dict(number_mel_codes=302, start_mel_token=300, stop_mel_token=301)
    ar = voice_twin(tiny_unified_voice(layers=1, max_mel_tokens=604, max_text_tokens=60, **codes)).part
    fast = dict(in_channels=64, cond_channels=64, upsample_kernel_sizes=(16, 16, 4, 4))
    rest = {
        parts.CLVP: twin_of(parts.CLVP, tiny_clvp(num_text_tokens=256, num_speech_tokens=300)).part,
        parts.DIFFUSION: twin_of(parts.DIFFUSION, tiny_diffusion(num_layers=1, in_latent_channels=64)).part,
        parts.VOCODER: twin_of(parts.VOCODER, tiny_vocoder(n_mel_channels=100, strides=(8, 8, 4))).part,
        parts.HIFIGAN: twin_of(parts.HIFIGAN, tiny_hifigan(**fast)).part,
        parts.RANDOM_AR: twin_of(parts.RANDOM_AR, tiny_random_voice(channels=64)).part,
        parts.RANDOM_DIFFUSION: twin_of(parts.RANDOM_DIFFUSION, tiny_random_voice(seed=1, channels=64)).part,
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
    given |= {"preset": "fast", "candidates": 2, "steps": 3, "max_codes": 12, "dtype": "float32"}
    return [*(part for name, value in given.items() for part in (f"--{name}", str(value))), *changes]


def without(given: list[str], option: str) -> list[str]:
    """The command line without an option and its value."""
    places = [i for i, part in enumerate(given) if part == option]
    return [part for i, part in enumerate(given) if i not in places and i - 1 not in places]


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
    arrays = read_npz(saved)
    assert {name: array.shape for name, array in arrays.items()} == {"conditioning": (64,), "diffusion": (64,)}
    first = soundfile.read(tmp_path / "speech.wav")[0]
    speak.main(arguments(folder, tmp_path, "--keep", "2", "--voice", str(saved)))
    assert np.array_equal(soundfile.read(tmp_path / "speech.wav")[0], first)


def test_mending_is_asked_for(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, bool]] = []
    repaired, by_score, sample = speech.repaired, ranking.by_score, sampler.sample

    def drawn(*given: Any) -> Any:
        asked[-1]["start_inside"] = next(one for one in given if isinstance(one, SamplingOptions)).start_inside
        return sample(*given)

    monkeypatch.setattr(sampler, "sample", drawn)
    monkeypatch.setattr(speech, "repaired", lambda *given, **how: asked[-1].update(how) or repaired(*given, **how))
    monkeypatch.setattr(ranking, "by_score", lambda *given, **how: asked[-1].update(how) or by_score(*given, **how))
    for option in ([], ["--mend"]):
        asked.append({})
        speak.main(arguments(folder, tmp_path, *option))
    as_upstream = {"start_inside": True, "keep_speech": False, "stopped_first": False}
    assert asked == [as_upstream, {name: not value for name, value in as_upstream.items()}]


def test_the_ar_models_weights_are_in_memory_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Laid out for the decoder, which serves for the latents too where these are of the same dtype."""
    say, kept = speech.say, []

    def watched(pretrained: Pretrained, *rest: Any, **how: Any) -> Any:
        kept.append({type(leaf) for leaf in jax.tree.leaves(pretrained.ar.params)})
        return say(pretrained, *rest, **how)

    monkeypatch.setattr(speech, "say", watched)
    for preset in ("fast", "hifigan"):
        speak.main(without(arguments(folder, tmp_path, "--preset", preset), "--steps" if preset == "hifigan" else ""))
    assert kept == [{jax.ShapeDtypeStruct}] * 2


def test_bfloat16_is_asked_for_and_stays_out_of_the_vocoder(
    folder: Path, tmp_path: Path, model: tj.Tortoise, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes, scores, latents and diffusion in it, by one copy of the AR model's weights; by "auto" they are float32."""
    asked, vocode = [], rendering.vocode
    for module, name in ((rendering, "scores"), (rendering, "diffuse"), (speech, "hidden_states")):
        function = getattr(module, name)

        def watched(*given: Any, function: Any = function, **how: Any) -> Any:
            asked.append(how.get("dtype") or given[0].dtype)
            return function(*given, **how)

        monkeypatch.setattr(module, name, watched)
    heard = []
    monkeypatch.setattr(
        rendering,
        "vocode",
        lambda part, mels, *rest, **how: heard.append((part, mels)) or vocode(part, mels, *rest, **how),
    )
    with jax.numpy_dtype_promotion("standard"):  # Flax's norms mix half precision with float32 statistics
        speak.main(arguments(folder, tmp_path, "--dtype", "bfloat16"))
    assert asked == ["bfloat16"] * 3
    [(part, mels)] = heard
    assert {leaf.dtype for leaf in (*jax.tree.leaves(part.variables), *mels)} == {np.dtype("float32")}
    asked.clear()
    exact, _ = model.speak("Hi there.", folder / "clips", "fast", candidates=2, steps=3, max_codes=12)
    assert asked == ["float32"] * 3
    assert not np.array_equal(soundfile.read(tmp_path / "speech.wav", dtype="float32")[0], exact)


def test_the_fast_path(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Codes as they were drawn, with the stop where it came, and neither padding nor a second choice."""
    options = ["--preset", "hifigan", "--codes", str(tmp_path / "codes.npy"), "--save_voice", str(tmp_path / "v.npz")]
    speak.main(without(arguments(folder, tmp_path, *options), "--steps"))
    codes, said = np.load(tmp_path / "codes.npy"), capsys.readouterr().out
    stopped = "never stops" not in said
    info = soundfile.info(tmp_path / "speech.wav")
    assert (info.samplerate, info.frames) == (24000, 256 * frames_of(len(codes) + stopped))
    assert "preset hifigan" in said
    assert list(read_npz(tmp_path / "v.npz")) == ["conditioning"]


@pytest.mark.parametrize("preset", ["fast", "hifigan"])
def test_a_random_voice_is_its_seeds(folder: Path, tmp_path: Path, preset: str) -> None:
    def voice(seed: int) -> dict[str, np.ndarray]:
        saved = tmp_path / "voice.npz"
        given = arguments(folder, tmp_path, "--voice", "random", "--preset", preset, "--save_voice", str(saved))
        speak.main([*without(given, "--steps" if preset == "hifigan" else ""), "--seed", str(seed)])
        assert (tmp_path / "speech.wav").exists()
        return read_npz(saved)

    first, other = voice(3), voice(4)
    assert list(first) == ["conditioning", "diffusion"][: 2 if preset == "fast" else 1]
    for name, vector in first.items():
        assert vector.shape == (64,)
        assert np.abs(vector - other[name]).max() > 0.1


def test_something_called_random_is_a_voice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert voices.is_random(Path("random"))
    (tmp_path / "random").mkdir()
    assert not voices.is_random(Path("random"))


def test_rows_that_never_stop_are_said_to_the_end(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Upstream warns and goes on; a row of 500 is left as it is (test_rendering.py), a shorter one padded."""
    never = load_pretrained(folder / "whole")
    params = {**never.ar.params, "mel_head": {**never.ar.params["mel_head"]}}
    params["mel_head"]["bias"] = np.where(np.arange(302) == 301, np.float32(-1e4), params["mel_head"]["bias"])
    save_pretrained(never.with_part(parts.AR, parts.Part.of_tree(never.ar.config, params)), tmp_path / "never")
    speak.main(arguments(folder, tmp_path, "--checkpoint", str(tmp_path / "never")))
    assert "never stops" in capsys.readouterr().out
    assert soundfile.info(tmp_path / "speech.wav").frames == 256 * frames_of(12 + 8)


def test_a_short_clip_and_a_text_of_one_word(folder: Path, tmp_path: Path) -> None:
    """The shortest clip that is a voice."""
    samples = round(MIN_SECONDS * SAMPLE_RATE)
    soundfile.write(tmp_path / "short.wav", 0.1 * np.random.default_rng(0).standard_normal(samples), SAMPLE_RATE)
    speak.main(arguments(folder, tmp_path, "--voice", str(tmp_path / "short.wav"), "--text", "Yes."))
    assert soundfile.info(tmp_path / "speech.wav").frames > 0


def test_5000_characters_are_parts_that_a_prompt_holds(folder: Path) -> None:
    metadata = load_pretrained(folder / "whole", ())
    text = ("It was a bright cold day in April, and the clocks were striking. " * 80)[:5000]
    said = speech.split_text(metadata, text, "tortoise")
    room = max_text_ids(metadata.ar.config)
    assert 20 < len(said) <= 80
    assert all(0 < len(metadata.tokenizer.encode(part, "tortoise")) <= room for part in said)
    assert " ".join(said) == text.strip()
    with pytest.raises(UserError, match=r'the sentence "a a a .*" has \d+ tokens, the model has room for 59; split it'):
        speech.split_text(metadata, "a " * 2500, "tortoise")


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
    "the fast path's part missing": (
        ["--checkpoint", "{alone}", "--preset", "hifigan"],
        r"alone: without decoder of the fast path; convert all",
    ),
    "parts of a random voice missing": (
        ["--checkpoint", "{alone}", "--preset", "hifigan", "--voice", "random"],
        r"alone: without decoder of the fast path, random voices' AR half; convert all",
    ),
    "half a voice": (["--voice", "{half.npz}"], r"half.npz holds the AR model's half of a voice alone; give the clips"),
    "no such preset": (["--preset", "faster"], r"preset is 'faster', expected draft, hifigan, ultra_fast, fast, stan"),
    "one step": (["--steps", "1"], r"steps is 1, expected 2 to 4000"),
    "negative guidance": (["--guidance", "-1"], r"guidance is -1.0, expected at least 0"),
    "steps of a draft": (["--preset", "draft", "--steps", "3"], r"steps is of the diffusion decoder, which"),
    "guidance of the fast path": (["--preset", "hifigan", "--guidance", "3"], r"guidance is of the diffusion decoder"),
    "models that do not fit": (["--checkpoint", "{few_codes}"], r"the AR model's codes and CLVP's differ, 300 and 200"),
    "more codes than the decoder takes": (["--max_codes", "501"], r"max_codes is 501, .* is handed at most 500"),
    "a dtype": (["--dtype", "float16"], r"dtype is float16, expected auto, float32 or bfloat16"),
    "no such voice": (["--voice", "nowhere"], r"voice nowhere does not exist; give .* or random"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line(folder: Path, tmp_path: Path, changes: list[str], message: str) -> None:
    filled = [str(folder / change.strip("{}")) if change.startswith("{") else change for change in changes]
    given = arguments(folder, tmp_path)
    with pytest.raises(UserError, match=message):
        speak.main([*(without(given, "--steps") if "--preset" in changes else given), *filled])
    assert not list(tmp_path.iterdir())


def test_a_preset_draws_its_own_number_of_candidates() -> None:
    given = ["--checkpoint", "c", "--text", "t", "--voice", "v", "--out", "o.wav"]
    for name, candidates in (("draft", 4), ("hifigan", 1), ("ultra_fast", 16), ("high_quality", 256)):
        parsed = speak.parse([*given, "--preset", name])
        speak.check(parsed)
        assert parsed.candidates == candidates
    off = speak.check(speak.parse([*given, "--preset", "fast", "--guidance", "0"]))
    assert (off.guidance, off.steps) == (None, 80)
    more = speak.parse([*given, "--preset", "hifigan", "--keep", "3"])
    speak.check(more)
    assert more.candidates == 3


# From Python


@pytest.fixture(scope="module")
def model(folder: Path) -> tj.Tortoise:
    return tj.load(folder / "whole")


def test_the_readmes_three_lines(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand there, with fewer candidates and steps."""
    monkeypatch.chdir(tmp_path)
    Path("checkpoints").mkdir()
    Path("checkpoints/tortoise").symlink_to(folder / "whole")
    Path("clips").symlink_to(folder / "clips")
    few = dataclasses.replace(presets.PRESETS["fast"], candidates=2, steps=3, max_codes=12)
    monkeypatch.setitem(presets.PRESETS, "fast", few)
    code = readme.marked("speech")
    assert len([line for line in code.splitlines() if line]) == 4, "import, and three lines"
    exec(code, {})
    info = soundfile.info("speech.wav")
    assert info.samplerate == 24000
    assert info.frames > 0


def test_speak_is_what_the_command_writes(folder: Path, tmp_path: Path, model: tj.Tortoise) -> None:
    speak.main(arguments(folder, tmp_path))
    waveform, rate = model.speak("Hi there.", folder / "clips", "fast", candidates=2, steps=3, max_codes=12)
    written, written_rate = soundfile.read(tmp_path / "speech.wav")
    assert rate == written_rate == 24000
    np.testing.assert_allclose(waveform, written, atol=2**-15)
    quick, rate = model.speak("Hi there.", "random", "hifigan", max_codes=12)
    assert rate == 24000
    assert len(quick) > 0
    with pytest.raises(UserError, match="without dVAE; convert all files"):
        model.speak("Hi there.", "random", "draft", max_codes=12)


def test_stage_by_stage_it_is_the_same(folder: Path, model: tj.Tortoise) -> None:
    text_ids = model.text_ids("Hi there.")
    voice = model.voice(folder / "clips")
    codes = model.sample(text_ids, voice, candidates=2, max_codes=12)
    scores = model.score(text_ids, codes)
    best = codes[int(np.argmax(scores))]
    latents = model.latents(text_ids, best, voice)
    assert latents.shape == (len(best) + 8, 64)
    mel = model.diffuse(latents, voice, steps=3)
    assert mel.shape == (frames_of(len(latents)), 100)
    waveform = model.vocode(mel)
    whole, _ = model.speak("Hi there.", voice, "fast", candidates=2, steps=3, max_codes=12)
    assert waveform.shape == whole.shape
    assert_close(waveform, whole, 1e-3)  # the chain's: rounding is amplified by every step


def test_a_run_speaks_with_the_parts_of_where_it_began(folder: Path, tmp_path: Path) -> None:
    save_pretrained(load_pretrained(folder / "alone"), tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(json.dumps({"checkpoint": str(folder / "whole")}))
    waveform, rate = tj.load(tmp_path / "run").speak("Hi.", "random", "hifigan", max_codes=12)
    assert (rate, len(waveform) > 0) == (24000, True)


HALF = voices.Voice(np.zeros(64, np.float32))
WRONG: dict[str, tuple[Callable[[tj.Tortoise], object], str]] = {
    "preset": (lambda m: m.speak("Hi.", "random", "slow"), r"preset is 'slow', expected draft, hifigan, ultra_fast"),
    "steps": (lambda m: m.speak("Hi.", "random", "fast", steps=1), r"steps is 1, expected 2 to 4000"),
    "guidance": (lambda m: m.speak("Hi.", "random", guidance=-1.0), r"guidance is -1.0, expected at least 0"),
    "guidance of the fast path": (lambda m: m.speak("Hi.", "random", "hifigan", guidance=1.0), r"guidance is of the d"),
    "dtype": (lambda m: m.speak("Hi.", "random", dtype="half"), r"dtype is half, expected auto, float32 or bfloat16"),
    "candidates": (lambda m: m.speak("Hi.", "random", candidates=0), r"candidates is 0, expected a whole number of a"),
    "max_codes": (lambda m: m.speak("Hi.", "random", max_codes=603), r"max_codes is 603, .* is handed at most 500"),
    "seed": (lambda m: m.speak("Hi.", "random", seed=-1), r"seed is -1, expected 0 to 1073741824"),
    "empty text": (lambda m: m.speak(" ", "random"), r'the text " " has nothing to say'),
    "characters": (lambda m: m.speak("a {b}", "random"), r"the text holds characters the tokenizer does not know"),
    "no such voice": (lambda m: m.speak("Hi.", "nowhere"), r"voice nowhere does not exist"),
    "half a voice": (lambda m: m.speak("Hi.", HALF), r"the voice has no vector for the diffusion decoder; make it"),
    "no voice": (lambda m: m.sample([5], np.zeros(64)), r"voice is a ndarray, expected what model.voice\(…\) returns"),
    "another model's voice": (
        lambda m: m.sample([5], voices.Voice(np.zeros(32))),
        r"the voice's conditioning has the shape \(32,\), expected finite numbers of \(64,\)",
    ),
    "score of nothing": (lambda m: m.score([5], []), r"there are no codes"),
    "score of a stop": (lambda m: m.score([5], [[3, 301]]), r"row 0: codes hold 301, which is stop"),
    "score of text beyond": (lambda m: m.score([256], [[3]]), r"text ids must lie in 0\.\.25\d, found 256"),
    "latents of too many codes": (lambda m: m.latents([5], [3] * 501, HALF), r"codes are 501, the model has positions"),
    "diffuse a mel": (
        lambda m: m.diffuse(np.zeros((5, 100), np.float32), HALF),
        r"latents of the shape \(5, 100\), expected \(frames, 64\)",
    ),
    "diffuse half a voice": (lambda m: m.diffuse(np.zeros((5, 64), np.float32), HALF), r"no vector for the diffusion"),
    "vocode bands first": (lambda m: m.vocode(np.zeros((100, 7), np.float32)), r"shape \(100, 7\), expected \(frames"),
    "vocode NaN": (lambda m: m.vocode(np.full((7, 100), np.nan)), r"a mel at 24 kHz of float64, .* all finite"),
}


@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_said_at_the_door(
    model: tj.Tortoise, call: Callable[[tj.Tortoise], object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        call(model)
