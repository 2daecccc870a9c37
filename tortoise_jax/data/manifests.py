"""Recordings and their transcripts, in every format people have them in, read into clips.

Every line of an input becomes a `Clip`. Where a line cannot be used, the clip's `reason` and `detail` say why. Here is
which format an input is in; `readers/` reads them.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tortoise_jax import arrow
from tortoise_jax.data.clips import Clip
from tortoise_jax.data.readers import folders, lists, saved, tables
from tortoise_jax.data.readers.names import (
    files_below,
    is_unicode,
    recordings_below,
    text_lines,
    transcript_of,
    with_possible_names,
)
from tortoise_jax.decoders import AUDIO_SUFFIXES
from tortoise_jax.errors import UserError, count_of, did_you_mean
from tortoise_jax.files import LOCK, check_readable, digest_of

# What saves Parquet files, as they lie on the Hugging Face hub, as the format "datasets".
SAVE = "python -c \"import datasets; datasets.load_dataset('{path}').save_to_disk('{path}-saved')\""


@dataclasses.dataclass(frozen=True)
class Format:
    read: Callable[[Path], Iterator[Clip]]
    description: str
    of_folders: bool = False


def _table(name: str, description: str) -> Format:
    return Format(lambda path: tables.read_table(path, name), description)


def _objects(name: str, description: str) -> Format:
    return Format(lambda path: tables.read_objects(path, name), description)


FORMATS = {
    "ljspeech": Format(
        lists.read_ljspeech, "a folder with metadata.csv (ID|text or ID|text|normalised text) and wavs/", True
    ),
    "list": Format(lists.read_list, "a text file of lines path|text"),
    "table": _table("table", "csv or tsv with a header: audio, text, optional speaker and split"),
    "jsonl": _objects("jsonl", "a JSON object a line: audio, text, optional speaker, split, start, end"),
    "folder": Format(folders.read_folder, "a folder of recordings, each with a .txt of the same name", True),
    "whisper": Format(
        folders.read_whisper, "long recordings, each with Whisper's .json or .srt of the same name", True
    ),
    "audiofolder": Format(
        tables.read_audio_folder, "Hugging Face's: metadata.csv or .jsonl of file_name, transcription", True
    ),
    "datasets": Format(
        saved.read_saved,
        "a folder that Hugging Face's datasets library saved (save_to_disk), its recordings inside",
        True,
    ),
    "nemo": _objects("nemo", "NeMo's manifests: audio_filepath, text, optional offset, duration, speaker"),
    "commonvoice": _table("commonvoice", "a tsv of Common Voice beside its clips/"),
    "voxpopuli": _table("voxpopuli", "a tsv of VoxPopuli beside its folders of years"),
    "xtts": _table("xtts", "the tables XTTS trainers write: audio_file|text|speaker_name"),
}


@dataclasses.dataclass(frozen=True)
class Input:
    """One path of the command line, the format it was read in, a clip for each of its lines, and warnings."""

    path: Path
    format: str
    clips: list[Clip]
    warnings: list[str]

    @functools.cached_property
    def digest(self) -> str:
        """Tells whether what is read changed since: every line's fields, and the sizes and times of the recordings."""
        root = self.path if self.path.is_dir() else self.path.parent
        return digest_of(
            [[*_fields(clip), os.path.relpath(clip.audio, root), *_stat(clip.audio)] for clip in self.clips]
        )


def _fields(clip: Clip) -> tuple[Any, ...]:
    return (clip.id, clip.text, clip.speaker, clip.split, clip.start, clip.end, clip.reason)


def _stat(path: Path) -> tuple[int, int] | tuple[()]:
    try:
        stat = arrow.file_of(path).stat()
    except OSError:
        return ()
    return stat.st_size, stat.st_mtime_ns


def read_inputs(paths: Sequence[Path], format: str | None = None) -> list[Input]:
    """Reads every input in the format that `recognise` finds, or in `format`, one of `FORMATS`.

    Raises UserError for an input that does not exist, is in no known format, is not UTF-8, may not be read, or has no
    line.
    """
    if format is not None and format not in FORMATS:
        raise UserError(f'unknown format "{format}"{did_you_mean(format, FORMATS)}, choose {", ".join(FORMATS)}')
    for path in paths:
        if not is_unicode(str(path)):
            raise UserError(f"{path}: the name is not UTF-8; rename it")
    try:
        return [_read_input(path, format or recognise(path)) for path in paths]
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None


def _read_input(path: Path, format: str) -> Input:
    if not path.exists():
        raise UserError(f"{path}: there is no such file or folder")
    if path.is_dir() and not FORMATS[format].of_folders:
        raise UserError(f"{path}: is a folder; the format {format} is {FORMATS[format].description}")
    check_readable(path)
    clips = [with_possible_names(clip) for clip in FORMATS[format].read(path)]
    if not clips:
        raise UserError(f"{path}: empty, no line found in it; expected {FORMATS[format].description}")
    return Input(path, format, clips, _unlisted(path, clips) if format in ("ljspeech", "audiofolder") else [])


def _unlisted(path: Path, clips: Sequence[Clip]) -> list[str]:
    listed = {clip.audio for clip in clips}
    root = path if path.is_dir() else path.parent
    # A line may name any place, "/" too: only what is inside the data is looked through.
    folders = {a.parent for a in listed if a.is_relative_to(root) and ".." not in a.parts and a.parent.is_dir()}
    folders |= {path} if path.is_dir() else set()
    unlisted = sorted({file for folder in folders for file in recordings_below(folder)} - listed)
    if not unlisted:
        return []
    are = f"{count_of(len(unlisted), 'recording')} {'is' if len(unlisted) == 1 else 'are'}"
    return [f"{path}: {are} in no line of {Path(clips[0].file).name}, e.g. {unlisted[0].name}"]


# --- recognising ------------------------------------------------------------------------------------------------------


def recognise(path: Path) -> str:
    """The name of the format a file or folder is in. Raises UserError that says what was looked for."""
    if not path.exists():
        near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"{path}: there is no such file or folder{did_you_mean(path.name, near)}")
    check_readable(path)
    format = _of_folder(path) if path.is_dir() else _of_file(path)
    if format is None and (path / LOCK).exists():
        raise UserError(
            f"{path}: a data set that is still being prepared, or whose preparation was broken off; run "
            f"python -m tortoise_jax.prepare with --out {path} once more, which goes on where it was"
        )
    if format is None:
        if advice := _advice(path):
            raise UserError(f"{path}: {advice}")
        known = ", ".join(FORMATS)
        raise UserError(f"{path}: {_what_is_there(path)}: none of the formats {known}; --help says what each expects")
    return format


def _advice(path: Path) -> str:
    """What to do with a path in no format; "" where all that can be said is what is there."""
    texts = [path] if path.is_file() else _texts_in(path)
    array = next((file for file in texts if "json" in file.suffix and _first_text(file).startswith("[")), None)
    if array:
        return f"{array.name} is a JSON array, expected an object on each line: jq -c '.[]' {array} makes them"
    if path.is_file():
        return ""
    named = lambda file: file.suffix.lower() != ".jsonl" or tables.objects_named(_first_text(file))
    known = [file for file in texts if _of_file(file) and named(file)]
    if known:
        return f"a folder with {', '.join(p.name for p in known)}: give the files themselves (--data {known[0]} …)"
    if any(file.suffix == ".parquet" for file in files_below(path)):
        return f"a folder of Parquet files, which are not read as they are; save them: {SAVE.format(path=path)}"
    return ""


def _what_is_there(path: Path) -> str:
    if path.is_file():
        return _beginning(path, "a file that")
    names = sorted(entry.name for entry in path.iterdir())
    if not names:
        return "an empty folder"
    texts = _texts_in(path)
    if texts:
        return _beginning(texts[0], f"a folder whose {texts[0].name}")
    bare = ": recordings without transcripts, which prepare --transcribe writes" if recordings_below(path) else ""
    return f"a folder with {', '.join(names[:5])}{' …' if len(names) > 5 else ''}{bare}"


def _texts_in(folder: Path) -> list[Path]:
    """Files of a folder that may be transcripts; of .json those of one object per line."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    texts = [path for path in files if path.suffix.lower() in (".csv", ".tsv", ".txt", ".jsonl")]
    return texts + [
        path for path in files if path.suffix.lower() == ".json" and tables.objects_named(_first_text(path))
    ]


def _beginning(file: Path, what: str) -> str:
    first = _first_text(file)
    table = file.suffix.lower() in (".csv", ".tsv", ".jsonl")
    names = ", without such names as audio and text, or file_name and transcription" if table else ""
    return f'{what} begins "{first[:60]}"{names}' if first else f"{what} is empty"


def _of_folder(folder: Path) -> str | None:
    metadata = folder / "metadata.csv"
    if metadata.is_file() and _of_file(metadata) in ("ljspeech", "list", None):
        return "ljspeech"
    if tables.audio_folder_tables(folder):
        return "audiofolder"
    if lists.speaker_tables(folder):
        return "ljspeech"
    recordings = recordings_below(folder)
    # Whisper writes a .txt too: its times are what long recordings need.
    if any(folders.segments_of(audio) for audio in recordings):
        return "whisper"
    if any(transcript_of(audio, ".txt") for audio in recordings):
        return "folder"
    return "datasets" if saved.saved_files(folder) else None


def _of_file(path: Path) -> str | None:
    suffix, first = path.suffix.lower(), _first_text(path)
    if suffix in (".json", ".jsonl") and first.startswith("["):
        return None
    objects = tables.objects_named(first) if first.startswith("{") else None
    if objects or suffix == ".jsonl":
        return objects or "jsonl"
    if suffix in folders.WHISPER_SUFFIXES:
        return "whisper"
    table = tables.table_named(tables.split_header(first))
    if table or "|" not in first:
        return table
    name = first.split("|")[0]
    return "list" if Path(name).suffix.lower() in AUDIO_SUFFIXES or "/" in name else "ljspeech"


def _first_text(path: Path) -> str:
    return next((text for _, text in text_lines(path) if text.strip()), "")
