"""Bare recordings: heard in parts, written down once, corrected by hand, prepared like any others.

Whisper and its detector of voices are stood in for; `make test-slow` has the real detector.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import soundfile

from tests.support.parity import Twin
from tests.support.recordings import RECORDINGS, checkpoint_at
from tortoise_jax.audio import SAMPLE_RATE, read_audio
from tortoise_jax.data import transcription
from tortoise_jax.data.dataset import Dataset
from tortoise_jax.data.preparation import Options, check, prepare
from tortoise_jax.errors import UserError

RATE = transcription.WHISPER_RATE


class Whisper:
    """Says which part it heard; the test knows them by their length."""

    calls: ClassVar[list[dict[str, Any]]] = []
    fails = False

    def __init__(self, folder: str, local_files_only: bool) -> None:
        assert local_files_only, "nothing is fetched from a hub"
        if (Path(folder) / "model.bin").read_bytes() != b"weights":
            raise RuntimeError("Unsupported model binary version\nsecond line")

    def transcribe(self, part: np.ndarray, **options: Any) -> tuple[Any, Any]:
        if Whisper.fails:
            raise RuntimeError("CUDA failed with error out of memory")
        assert part.dtype == np.float32
        Whisper.calls.append(options | {"seconds": len(part) / RATE})
        texts = (" Part number", f" {'abcdefgh'[len(Whisper.calls) % 8]} is said here. ")
        return (SimpleNamespace(text=text) for text in texts), SimpleNamespace(language="en")


def loud_parts(heard: np.ndarray, options: Any) -> list[dict[str, int]]:
    """Where the sound is, as silero's detector gives it: padded, apart where it pauses."""
    level = np.convolve(np.abs(heard), np.ones(800) / 800, "same") > 1e-3
    edges = np.flatnonzero(np.diff(np.r_[False, level, False].astype(int)))
    pad = options.speech_pad_ms * RATE // 1000
    return [{"start": max(0, s - pad), "end": min(len(heard), e + pad)} for s, e in edges.reshape(-1, 2).tolist()]


@pytest.fixture
def whisper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A stand-in for faster-whisper, and the folder of a model."""
    module, vad = ModuleType("faster_whisper"), ModuleType("faster_whisper.vad")
    module.WhisperModel, vad.VadOptions, vad.get_speech_timestamps = Whisper, SimpleNamespace, loud_parts  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "faster_whisper", module)
    monkeypatch.setitem(sys.modules, "faster_whisper.vad", vad)
    monkeypatch.setattr(Whisper, "calls", [])
    monkeypatch.setattr(Whisper, "fails", False)
    (tmp_path / "whisper").mkdir()
    (tmp_path / "whisper" / "model.bin").write_bytes(b"weights")
    return tmp_path / "whisper"


def talk(path: Path, clips: list[int], pause: float) -> None:
    """Recordings of the bundled voice, one after the other with pauses."""
    path.parent.mkdir(parents=True, exist_ok=True)
    silence = np.zeros(round(pause * SAMPLE_RATE), np.float32)
    parts = [sound for i in clips for sound in (silence, read_audio(RECORDINGS[i]))]
    soundfile.write(path, np.concatenate(parts), SAMPLE_RATE, subtype="PCM_16")


@pytest.fixture
def talks(tmp_path: Path) -> Path:
    """Two speakers' folders; what is no speech and what is no recording are in them too."""
    talk(tmp_path / "talks" / "ann" / "one.wav", [0, 1, 2], pause=1.5)
    talk(tmp_path / "talks" / "bob" / "two.flac", [3, 4], pause=1.5)
    soundfile.write(tmp_path / "talks" / "bob" / "hush.wav", np.zeros(SAMPLE_RATE), SAMPLE_RATE)
    (tmp_path / "talks" / "bob" / "broken.wav").write_bytes(b"RIFF")
    return tmp_path / "talks"


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_a_folder_of_recordings_is_enough(whisper: Path, talks: Path, dvae: Twin, voice: Twin, tmp_path: Path) -> None:
    checkpoint, out = checkpoint_at(tmp_path / "checkpoint", dvae, voice), tmp_path / "set"
    options = Options(workers=0, transcribe=whisper, max_rejected=0.5)
    report = prepare(talks, checkpoint, out, options)
    rows = rows_of(tmp_path / "set-transcripts.jsonl")
    assert [(Path(row["audio"]).name, bool(row["text"])) for row in rows] == [
        *[("one.wav", True)] * 3,
        *[("broken.wav", False), ("hush.wav", False)],
        *[("two.flac", True)] * 2,
    ]
    assert report["lines"] == 7
    assert {reason: amount["lines"] for reason, amount in report["reasons"].items()} == {"unreadable": 1, "silent": 1}
    assert {speaker: amount["lines"] for speaker, amount in report["speakers"].items()} == {"ann": 3, "bob": 2}
    lengths = [len(read_audio(RECORDINGS[i])) / SAMPLE_RATE for i in range(5)]
    margin = 2 * transcription.MARGIN_SECONDS + 0.1
    for row, length in zip([row for row in rows if row["text"]], lengths, strict=True):
        assert length - 0.3 < row["end"] - row["start"] < length + margin
        assert row["text"].startswith("Part number ")
    assert [call["language"] for call in Whisper.calls] == [None, "en", "en", None, "en"], "once for each recording"

    # Corrected by hand, and one more recording: only that is heard, and what was corrected stays.
    rows[0]["text"] = "Corrected by hand."
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "set-transcripts.jsonl").write_text(lines, encoding="utf-8")
    talk(talks / "bob" / "wavs" / "three.wav", [5], pause=0.5)
    Whisper.calls.clear()
    prepare(talks, checkpoint, out, options)
    assert len(Whisper.calls) == 1
    made = Dataset.open(out)
    assert "Corrected by hand." in [clip.text for clip in made.clips]
    assert sorted(clip.speaker for clip in made.clips) == ["ann"] * 3 + ["bob"] * 3


def test_parts_over_short_pauses_are_one_clip_up_to_the_longest() -> None:
    spans = [(0.0, 2.0), (2.5, 4.0), (4.1, 9.0), (9.2, 12.0), (14.0, 15.0)]
    assert transcription.joined(spans, 11.6) == [(0.0, 9.0), (9.2, 12.0), (14.0, 15.0)]
    assert transcription.joined([], 11.6) == []


def test_a_language_that_is_given_is_not_guessed(whisper: Path, talks: Path, tmp_path: Path) -> None:
    listening = transcription.Listening(whisper, "de", 11.6)
    transcription.transcribe([talks / "ann" / "one.wav"], tmp_path / "list.jsonl", listening)
    assert [call["language"] for call in Whisper.calls] == ["de"] * 3


def test_what_ends_in_one_line(whisper: Path, talks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, listening = tmp_path / "list.jsonl", transcription.Listening(whisper, None, 11.6)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: holds no recording to transcribe"):
        transcription.transcribe([tmp_path / "empty"], file, listening)
    with pytest.raises(UserError, match=r"nowhere: there is no such file or folder"):
        transcription.transcribe([tmp_path / "nowhere"], file, listening)
    with pytest.raises(UserError, match=r"--transcribe .*empty: expected a folder with a Whisper model"):
        transcription.transcribe([talks], file, transcription.Listening(tmp_path / "empty", None, 11.6))
    (whisper / "model.bin").write_bytes(b"other")
    with pytest.raises(UserError, match=r"no Whisper model \(Unsupported model binary version\)"):
        transcription.transcribe([talks], file, listening)
    (whisper / "model.bin").write_bytes(b"weights")
    assert not file.exists()
    transcription.transcribe([talks / "ann"], file, listening)
    monkeypatch.setattr(Whisper, "fails", True)
    with pytest.raises(UserError, match=r"two.flac: Whisper failed \(CUDA .* memory\); 5 clips are kept in .*jsonl"):
        transcription.transcribe([talks], file, listening)
    file.write_text("[1]\n")
    with pytest.raises(UserError, match=r"list.jsonl: not JSON lines of objects; put it right, or remove it"):
        transcription.transcribe([talks], file, listening)
    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    file.unlink()
    with pytest.raises(UserError, match=r"needs faster-whisper: pip install 'tortoise_jax\[transcribe\]'"):
        transcription.transcribe([talks], file, listening)
    with pytest.raises(UserError, match="--check with --transcribe"):
        check(talks, None, Options(transcribe=whisper))


@pytest.mark.slow
def test_the_real_detector_cuts_at_pauses(talks: Path) -> None:
    """Needs faster-whisper, which has silero's model in its wheel: `pip install 'tortoise_jax[transcribe]'`."""
    import soxr

    heard = soxr.resample(read_audio(talks / "ann" / "one.wav"), SAMPLE_RATE, RATE).astype(np.float32)
    spans = transcription.spoken(heard, 11.6)
    lengths = [len(read_audio(RECORDINGS[i])) / SAMPLE_RATE for i in range(3)]
    assert len(spans) == 3
    for i, (start, end) in enumerate(spans):
        begins = 1.5 * (i + 1) + sum(lengths[:i])
        assert abs(start - begins) < 0.5
        assert abs(end - begins - lengths[i]) < 0.5
    assert all(end - start <= 2.0 for start, end in transcription.spoken(heard, 2.0))
