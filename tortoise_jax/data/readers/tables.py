"""Tables with a header and JSON objects, one per line: the columns of every project whose own files are read."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tortoise_jax.data.clips import Clip
from tortoise_jax.data.readers.names import (
    CONTAINERS,
    LONGEST_SECONDS,
    clip_at,
    files_below,
    find_audio,
    id_of,
    malformed,
    speaker_of,
    text_lines,
    with_span,
)
from tortoise_jax.data.splits import NAMES
from tortoise_jax.errors import UserError, count_of

Fields = Mapping[str, Any]
TRANSCRIPTIONS = ("transcription", "transcript", "text", "sentence", "normalized_text")  # of AudioFolder: any of them
AUDIO_FOLDER_TABLES = ("metadata.csv", "metadata.jsonl")


def _no_field(fields: Fields) -> str:
    return ""


def _start_and_end(fields: Fields) -> tuple[Any, Any] | None:
    start, end = fields.get("start"), fields.get("end")
    return None if start is None and end is None else (start, end)


def _offset_and_duration(fields: Fields) -> tuple[Any, Any] | None:
    """NeMo's: the part of a recording from `offset` on, `duration` long; without an offset all of it."""
    offset, duration = fields.get("offset"), fields.get("duration")
    if offset is None:
        return None
    sane = all(isinstance(value, (int, float)) and 0 <= value <= LONGEST_SECONDS for value in (offset, duration))
    return offset, offset + duration if sane else duration


@dataclasses.dataclass(frozen=True)
class Columns:
    """What is where in a table or an object, whose names of columns are lower case here.

    needed: columns that must exist, one of each tuple; the others: functions of a row's fields. span: seconds from and
    to, of what JSON holds, None for the whole recording.
    """

    needed: tuple[tuple[str, ...], ...]
    audio: Callable[[Fields], str]
    text: Callable[[Fields], str]
    speaker: Callable[[Fields], str] = _no_field
    split: Callable[[Fields], str] = _no_field
    span: Callable[[Fields], tuple[Any, Any] | None] = _start_and_end

    def missing(self, columns: Collection[str]) -> list[str]:
        """The needed columns that are not among these, the first of each choice."""
        return [choice[0] for choice in self.needed if not set(choice) & set(columns)]

    @property
    def names(self) -> list[str]:
        return [choice[0] for choice in self.needed]


TABLES = {
    "commonvoice": Columns(
        needed=(("client_id",), ("path",), ("sentence",)),
        audio=lambda f: f"clips/{f['path']}",
        text=lambda f: f["sentence"],
        speaker=lambda f: f["client_id"],
    ),
    "voxpopuli": Columns(
        needed=(("id",), ("raw_text",), ("normalized_text",), ("speaker_id",)),
        audio=lambda f: f"{f['id'][:4]}/{f['id']}.ogg",
        text=lambda f: f["raw_text"] or f["normalized_text"],
        speaker=lambda f: f["speaker_id"],
        split=lambda f: f.get("split", ""),
    ),
    "xtts": Columns(
        needed=(("audio_file",), ("text",)),
        audio=lambda f: f["audio_file"],
        text=lambda f: f["text"],
        speaker=lambda f: f.get("speaker_name", ""),
    ),
    "audiofolder": Columns(
        needed=(("file_name",), TRANSCRIPTIONS),
        audio=lambda f: f["file_name"],
        text=lambda f: next(f[name] for name in TRANSCRIPTIONS if name in f),
        speaker=lambda f: f.get("speaker", "") or f.get("speaker_id", ""),
        split=lambda f: f.get("split", ""),
    ),
    "table": Columns(
        needed=(("audio",), ("text",)),
        audio=lambda f: f["audio"],
        text=lambda f: f["text"],
        speaker=lambda f: f.get("speaker", ""),
        split=lambda f: f.get("split", ""),
    ),
}
OBJECTS = {
    "nemo": Columns(
        needed=(("audio_filepath",), ("text",)),
        audio=lambda f: f["audio_filepath"],
        text=lambda f: f["text"],
        speaker=lambda f: f.get("speaker", ""),
        span=_offset_and_duration,
    ),
    "audiofolder": TABLES["audiofolder"],
    "jsonl": TABLES["table"],
}


def table_named(columns: Collection[str]) -> str | None:
    """The format of a table with these columns."""
    return next((name for name, table in TABLES.items() if not table.missing(columns)), None)


def objects_named(first: str) -> str | None:
    """The format of a file whose first line is this JSON object, broken or whole."""
    return next((name for name, of in OBJECTS.items() if f'"{of.names[0]}"' in first), None)


# --- tables -----------------------------------------------------------------------------------------------------------


def read_table(path: Path, name: str) -> Iterator[Clip]:
    """A csv, tsv, ;- or |-separated file whose first line names the columns; paths relative to the file."""
    numbered = text_lines(path)
    header_number, header = next(((number, text) for number, text in numbered if text.strip()), (1, ""))
    delimiter, columns = _delimiter(header), split_header(header)
    missing = TABLES[name].missing(columns)
    if missing:
        needed = ", ".join(TABLES[name].names)
        raise UserError(f'{path}:{header_number}: no column "{missing[0]}"; expected a header with {needed}')
    # Only commas and semicolons come with quotes: a tab-separated sentence may well begin with one.
    quoting: Any = csv.QUOTE_MINIMAL if delimiter in ",;" else csv.QUOTE_NONE
    rows = csv.reader((text + "\n" for _, text in numbered), delimiter=delimiter, quoting=quoting, strict=True)
    number = header_number + 1
    try:
        for row in rows:
            if any(cell.strip() for cell in row):
                yield _table_clip(path, number, columns, row, TABLES[name])
            number = header_number + rows.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}:{number}: not a row of csv ({error}); is a quote missing or not doubled?") from None


def split_header(first: str) -> list[str]:
    """The names of columns, lower case."""
    return [column.strip().strip('"').lower() for column in first.split(_delimiter(first))]


def _delimiter(header: str) -> str:
    return max("\t|,;", key=header.count)


def _table_clip(path: Path, number: int, columns: Sequence[str], row: Sequence[str], table: Columns) -> Clip:
    if len(row) != len(columns):
        clip = clip_at(path, number, f"{path.stem}:{number}", path)
        return malformed(clip, f"{count_of(len(row), 'column')}, the header has {len(columns)} ({', '.join(columns)})")
    return _clip_of_fields(path, number, dict(zip(columns, row, strict=True)), table)


def _clip_of_fields(path: Path, number: int, fields: Fields, table: Columns) -> Clip:
    name, split = table.audio(fields).strip(), table.split(fields).strip().lower()
    audio = find_audio(path.parent / name)
    clip = clip_at(path, number, id_of(name), audio, table.text(fields).strip())
    clip = dataclasses.replace(clip, speaker=table.speaker(fields).strip() or clip.speaker, split=NAMES.get(split, ""))
    if split and split not in NAMES:
        return malformed(clip, f'split "{split}", expected one of {", ".join(NAMES)}')
    return clip if clip.split else dataclasses.replace(clip, split=NAMES.get(path.stem.lower(), ""))


# --- JSON objects -----------------------------------------------------------------------------------------------------


def read_objects(path: Path, name: str) -> Iterator[Clip]:
    """One JSON object per line; paths relative to the file."""
    for number, text in text_lines(path):
        if text.strip():
            yield _object_clip(path, number, text, OBJECTS[name])


def _object_clip(path: Path, number: int, text: str, table: Columns) -> Clip:
    nothing = clip_at(path, number, f"{path.stem}:{number}", path)
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        return malformed(nothing, f"not JSON ({error})")
    strings = [name for name, value in fields.items() if isinstance(value, str)] if isinstance(fields, dict) else []
    if table.missing(strings):
        needed = " and ".join(f'"{name}"' for name in table.names)
        found = f'"{", ".join(strings)[:60]}"' if strings else "none"
        return malformed(nothing, f"expected an object with strings {needed}, found {found}")
    as_text = {name: "" if value is None else str(value) for name, value in fields.items()}
    clip, span = _clip_of_fields(path, number, as_text, table), table.span(fields)
    return clip if span is None else with_span(clip, *span)


# --- Hugging Face's AudioFolder ---------------------------------------------------------------------------------------


def read_audio_folder(path: Path) -> Iterator[Clip]:
    """metadata.csv or metadata.jsonl of file_name and transcription, in the folder or in each folder of a split.

    Where no column says so, the folder's name does: train/a.wav is trained on, test/a.wav is held out.
    """
    root = path if path.is_dir() else path.parent
    for table in (audio_folder_tables(path) or _metadata_below(path)) if path.is_dir() else [path]:
        clips = read_objects(table, "audiofolder") if table.suffix == ".jsonl" else read_table(table, "audiofolder")
        yield from (_of_its_folder(clip, root) for clip in clips)


def audio_folder_tables(folder: Path) -> list[Path]:
    """The tables of an AudioFolder, none where a folder is in another format."""
    return [path for path in _metadata_below(folder) if _is_audio_folder_table(path)]


def _metadata_below(folder: Path) -> list[Path]:
    return [path for path in files_below(folder) if path.name in AUDIO_FOLDER_TABLES]


def _is_audio_folder_table(path: Path) -> bool:
    first = next((text for _, text in text_lines(path) if text.strip()), "")
    return (objects_named(first) if path.suffix == ".jsonl" else table_named(split_header(first))) == "audiofolder"


def _of_its_folder(clip: Clip, root: Path) -> Clip:
    """Folders of splits tell the split and are nobody's name."""
    inside = clip.audio.parent.relative_to(root).parts if clip.audio.is_relative_to(root) else ()
    split = clip.split or next((NAMES[part.lower()] for part in inside if part.lower() in NAMES), "")
    nobody = clip.speaker == speaker_of(clip.audio)
    speaker = speaker_of(clip.audio, (*CONTAINERS, *NAMES, "data")) if nobody else clip.speaker
    return dataclasses.replace(clip, split=split, speaker=speaker)
