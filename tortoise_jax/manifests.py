"""Which recordings with which transcripts: every format people have them in, read into lines.

Every line of an input becomes a `Line`, also one that cannot be understood: then `problem` says why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from tortoise_jax.errors import UserError

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
# Folders that hold one speaker's recordings without being named after him.
CONTAINERS = ("wavs", "wav", "clips", "audio", "audios", "segments")


@dataclasses.dataclass(frozen=True)
class Line:
    """One transcript. file and number: where it stands; id: its name in the data set; split: "" where none is given.

    start and end: seconds of a long recording; None for a file of its own.
    """

    file: str
    number: int
    id: str
    audio: Path
    text: str
    speaker: str
    split: str = ""
    start: float | None = None
    end: float | None = None
    problem: str = ""

    @property
    def where(self) -> str:
        return f"{self.file}:{self.number}"


def read_inputs(paths: Sequence[Path], format: str | None = None) -> list[Line]:
    return [line for path in paths for line in read_ljspeech(path)]


def read_ljspeech(folder: Path) -> list[Line]:
    """metadata.csv: ID|text or ID|text|normalised text; wavs/ID.wav (or flac, ogg, mp3)."""
    path = folder / "metadata.csv"
    if not path.is_file():
        raise UserError(f"{folder}: no metadata.csv here")
    lines = []
    for number, row in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not row.strip():
            continue
        name, *texts = row.split("|")
        audio = find_audio(folder / "wavs" / name)
        text = (texts[-1] or texts[0]).strip() if texts else ""
        problem = "" if 1 <= len(texts) <= 2 else f"{len(texts) + 1} columns, expected ID|text or ID|text|normalised"
        lines.append(Line(str(path), number, name, audio, text, speaker_of(audio), problem=problem))
    return lines


def find_audio(stem: Path) -> Path:
    """The recording of this name with any suffix we read; the .wav it should have been if there is none."""
    if stem.suffix.lower() in AUDIO_SUFFIXES and stem.is_file():
        return stem
    candidates = [stem.with_name(stem.name + suffix) for suffix in AUDIO_SUFFIXES]
    return next((path for path in candidates if path.is_file()), candidates[0])


def speaker_of(audio: Path) -> str:
    """The name of the folder a recording is in, or of the one above "wavs" and the like."""
    folder = audio.absolute().parent
    while folder.name.lower() in CONTAINERS:
        folder = folder.parent
    return folder.name
