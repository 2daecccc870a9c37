"""Lists: ID|text as in LJSpeech's metadata.csv, path|text as in DLAS's lists."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from tortoise_jax.data.clips import Clip
from tortoise_jax.data.readers.names import clip_at, find_audio, id_of, is_file, malformed, text_lines
from tortoise_jax.data.splits import NAMES
from tortoise_jax.errors import count_of


def read_ljspeech(path: Path) -> Iterator[Clip]:
    """metadata.csv of ID|text or ID|text|normalised text; the recordings are wavs/ID.wav (or flac, ogg, mp3).

    An ID may be a path from the folder of metadata.csv too, as in wavs/ID.wav|text. A folder of such folders is
    several speakers.
    """
    metadata = _metadata(path)
    for file in [metadata] if metadata else speaker_tables(path):
        for number, text in text_lines(file):
            if text.strip():
                yield _ljspeech_clip(file, number, text)


def _metadata(path: Path) -> Path | None:
    return path if path.is_file() else path / "metadata.csv" if (path / "metadata.csv").is_file() else None


def speaker_tables(folder: Path) -> list[Path]:
    """metadata.csv of each folder inside. Raises PermissionError for a folder that may not be read."""
    tables = (inner / "metadata.csv" for inner in sorted(folder.iterdir()) if inner.is_dir())
    return [table for table in tables if table.is_file()]


def _ljspeech_clip(file: Path, number: int, row: str) -> Clip:
    name, *texts = row.split("|")
    clip = clip_at(file, number, name.strip(), _ljspeech_audio(file.parent, name.strip()))
    if not 1 <= len(texts) <= 2 or not name.strip():
        columns = count_of(len(texts) + 1, "column")
        return malformed(clip, f"{columns}, expected ID|text or ID|text|normalised text{_other_separator(row)}")
    normalised = texts[-1].strip()
    return dataclasses.replace(clip, text=normalised or texts[0].strip())


def _other_separator(row: str) -> str:
    """What to do with a line whose columns something else separates."""
    mark = next((mark for mark in "\t;," if mark in row), "") if "|" not in row else ""
    name = {"\t": "tabs", ";": "semicolons", ",": "commas"}.get(mark, "")
    return f"; if {name} separate it, its first line must name the columns, file_name and transcription" if name else ""


def _ljspeech_audio(folder: Path, name: str) -> Path:
    beside = find_audio(folder / name)
    if not (folder / "wavs").is_dir():
        return beside
    inside = find_audio(folder / "wavs" / name)
    return beside if ("/" in name or "\\" in name) and not is_file(inside) else inside


def read_list(path: Path) -> Iterator[Clip]:
    """DLAS's lists: path|text, paths relative to the list. A list named train, val, dev … is of that split."""
    for number, row in text_lines(path):
        if not row.strip():
            continue
        name, *texts = row.split("|")
        audio = find_audio(path.parent / name.strip())
        clip = clip_at(path, number, id_of(name), audio, texts[0].strip() if texts else "")
        clip = dataclasses.replace(clip, split=NAMES.get(path.stem.lower(), ""))
        yield clip if len(texts) == 1 else malformed(clip, f"{count_of(len(texts) + 1, 'column')}, expected path|text")
