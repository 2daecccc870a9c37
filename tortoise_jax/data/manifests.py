"""Which recordings with which transcripts: every format people have them in, read into lines.

Every line of an input becomes a `Line`, also one that cannot be used as it stands: then `reason` and `problem` say why.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tortoise_jax.audio import AUDIO_SUFFIXES
from tortoise_jax.data.splits import NAMES
from tortoise_jax.errors import UserError, did_you_mean

# Folders that hold one speaker's recordings without being named after him.
CONTAINERS = ("wavs", "wav", "clips", "audio", "audios", "segments")
# Whisper ends a segment early and cuts the last syllable; what follows up to the next segment is given back, so far.
SEGMENT_TAIL = 0.2


@dataclasses.dataclass(frozen=True)
class Line:
    """One transcript. file and number: where it stands; id: its name; split: "train", "validation", or "" if not given.

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
    reason: str = ""
    problem: str = ""

    @property
    def where(self) -> str:
        return f"{self.file}:{self.number}"


@dataclasses.dataclass(frozen=True)
class Input:
    """One path as it was given, the format it was read in, its lines, and remarks on what is lying about."""

    path: Path
    format: str
    lines: list[Line]
    notes: list[str]


def read_inputs(paths: Sequence[Path], format: str | None = None) -> list[Input]:
    """Reads every input in the format it is recognised to have, or in the one of `FORMATS` that is asked for.

    Raises UserError for what is not there, not recognised, not UTF-8 or without a single line.
    """
    if format is not None and format not in FORMATS:
        raise UserError(f'unknown format "{format}"{did_you_mean(format, FORMATS)}, choose {", ".join(FORMATS)}')
    return [_read_input(path, format or recognise(path)) for path in paths]


def _read_input(path: Path, format: str) -> Input:
    if not path.exists():
        raise UserError(f"{path}: there is no such file or folder")
    if path.is_dir() and not FORMATS[format].of_folders:
        raise UserError(f"{path}: is a folder; the format {format} is {FORMATS[format].description}")
    lines = list(FORMATS[format].read(path))
    if not lines:
        raise UserError(f"{path}: empty, no line found in it; expected {FORMATS[format].description}")
    notes = _unlisted(path, lines) if format == "ljspeech" else []
    return Input(path, format, lines, notes)


# --- recognising ------------------------------------------------------------------------------------------------------


def recognise(path: Path) -> str:
    """The name of the format a file or folder is in. Raises UserError that says what was looked for."""
    if not path.exists():
        near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"{path}: there is no such file or folder{did_you_mean(path.name, near)}")
    format = _of_folder(path) if path.is_dir() else _of_file(path)
    if format is None:
        known = ", ".join(FORMATS)
        raise UserError(f"{path}: {_what_is_there(path)}: none of the formats {known}; --help says what each expects")
    return format


def _what_is_there(path: Path) -> str:
    if path.is_file():
        return f'a file that begins "{_first_line(path)[:60]}"'
    lists = sorted(p for p in path.iterdir() if p.suffix.lower() in (".csv", ".tsv", ".txt", ".jsonl") and _of_file(p))
    if lists:
        return f"a folder with {', '.join(p.name for p in lists)}: give the files themselves (--data {lists[0]} …)"
    names = sorted(entry.name for entry in path.iterdir())
    return f"a folder with {', '.join(names[:5])}{' …' if len(names) > 5 else ''}" if names else "an empty folder"


def _of_folder(folder: Path) -> str | None:
    metadata = folder / "metadata.csv"
    if metadata.is_file() and _of_file(metadata) in ("ljspeech", None):
        return "ljspeech"
    if any(folder.glob("*/metadata.csv")):
        return "ljspeech"
    recordings = list(_recordings(folder))
    # Whisper writes a .txt too: its times are what long recordings need.
    if any(_segments_of(audio) for audio in recordings):
        return "whisper"
    return "folder" if any(_transcript_of(audio, ".txt") for audio in recordings) else None


def _of_file(path: Path) -> str | None:
    suffix, first = path.suffix.lower(), _first_line(path)
    if suffix == ".jsonl" or (suffix == ".json" and first.startswith("{") and '"audio"' in first):
        return "jsonl"
    if suffix in WHISPER_SUFFIXES:
        return "whisper"
    columns = _split_header(first)
    for name, columns_of in TABLES.items():
        if set(columns_of.needed) <= set(columns):
            return name
    if "|" not in first:
        return None
    name = first.split("|")[0]
    return "list" if Path(name).suffix.lower() in AUDIO_SUFFIXES or "/" in name else "ljspeech"


def _first_line(path: Path) -> str:
    return next((text for _, text in _text_lines(path) if text.strip()), "")


# --- LJSpeech and path|text -------------------------------------------------------------------------------------------


def read_ljspeech(path: Path) -> Iterator[Line]:
    """metadata.csv of ID|text or ID|text|normalised text; the recordings are wavs/ID.wav (or flac, ogg, mp3).

    A folder of such folders is several speakers.
    """
    metadata = _metadata(path)
    for file in [metadata] if metadata else sorted(path.glob("*/metadata.csv")):
        for number, text in _text_lines(file):
            if text.strip():
                yield _ljspeech_line(file, number, text)


def _metadata(path: Path) -> Path | None:
    return path if path.is_file() else path / "metadata.csv" if (path / "metadata.csv").is_file() else None


def _ljspeech_line(file: Path, number: int, row: str) -> Line:
    name, *texts = row.split("|")
    folder = file.parent / "wavs"
    audio = find_audio((folder if folder.is_dir() else file.parent) / name.strip())
    line = Line(str(file), number, name.strip(), audio, "", speaker_of(audio))
    if not 1 <= len(texts) <= 2 or not name.strip():
        return malformed(line, f"{len(texts) + 1} columns, expected ID|text or ID|text|normalised text")
    normalised = texts[-1].strip()
    return dataclasses.replace(line, text=normalised or texts[0].strip())


def _unlisted(path: Path, lines: Sequence[Line]) -> list[str]:
    listed = {line.audio for line in lines}
    unlisted = sorted(
        file for folder in {a.parent for a in listed} for file in _recordings(folder) if file not in listed
    )
    if not unlisted:
        return []
    return [f"{path}: {len(unlisted)} recordings are in no line of metadata.csv, e.g. {unlisted[0].name}"]


def read_list(path: Path) -> Iterator[Line]:
    """DLAS's lists: path|text, paths relative to the list. One named train, val, dev … says which split it is."""
    for number, row in _text_lines(path):
        if not row.strip():
            continue
        name, *texts = row.split("|")
        audio = find_audio(path.parent / name.strip())
        line = Line(str(path), number, _id(name), audio, texts[0].strip() if texts else "", speaker_of(audio))
        line = dataclasses.replace(line, split=NAMES.get(path.stem.lower(), ""))
        yield line if len(texts) == 1 else malformed(line, f"{len(texts) + 1} columns, expected path|text")


# --- tables and jsonl -------------------------------------------------------------------------------------------------

Fields = Mapping[str, Any]


def _no_field(fields: Fields) -> str:
    return ""


@dataclasses.dataclass(frozen=True)
class Columns:
    """Where a table has what: needed names its columns, the others take a row's fields."""

    needed: tuple[str, ...]
    audio: Callable[[Fields], str]
    text: Callable[[Fields], str]
    speaker: Callable[[Fields], str] = _no_field
    split: Callable[[Fields], str] = _no_field


TABLES = {
    "commonvoice": Columns(
        needed=("client_id", "path", "sentence"),
        audio=lambda f: f"clips/{f['path']}",
        text=lambda f: f["sentence"],
        speaker=lambda f: f["client_id"],
    ),
    "voxpopuli": Columns(
        needed=("id", "raw_text", "normalized_text", "speaker_id"),
        audio=lambda f: f"{f['id'][:4]}/{f['id']}.ogg",
        text=lambda f: f["raw_text"] or f["normalized_text"],
        speaker=lambda f: f["speaker_id"],
        split=lambda f: f.get("split", ""),
    ),
    "xtts": Columns(
        needed=("audio_file", "text"),
        audio=lambda f: f["audio_file"],
        text=lambda f: f["text"],
        speaker=lambda f: f.get("speaker_name", ""),
    ),
    "table": Columns(
        needed=("audio", "text"),
        audio=lambda f: f["audio"],
        text=lambda f: f["text"],
        speaker=lambda f: f.get("speaker", ""),
        split=lambda f: f.get("split", ""),
    ),
}


def read_table(path: Path, name: str) -> Iterator[Line]:
    """A csv, tsv or |-separated file whose first line names the columns; paths relative to the file."""
    numbered = _text_lines(path)
    header_number, header = next(((number, text) for number, text in numbered if text.strip()), (1, ""))
    delimiter, columns = _delimiter(header), _split_header(header)
    missing = [column for column in TABLES[name].needed if column not in columns]
    if missing:
        needed = ", ".join(TABLES[name].needed)
        raise UserError(f'{path}:{header_number}: no column "{missing[0]}"; expected a header with {needed}')
    # Only commas come with quotes: a tab-separated sentence may well begin with one.
    quoting: Any = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
    rows = csv.reader((text + "\n" for _, text in numbered), delimiter=delimiter, quoting=quoting, strict=True)
    number = header_number + 1
    try:
        for row in rows:
            if any(cell.strip() for cell in row):
                yield _table_line(path, number, columns, row, TABLES[name])
            number = header_number + rows.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}:{number}: not a row of csv ({error}); is a quote missing or not doubled?") from None


def _table_line(path: Path, number: int, columns: Sequence[str], row: Sequence[str], table: Columns) -> Line:
    if len(row) != len(columns):
        line = Line(str(path), number, f"{path.stem}:{number}", path, "", speaker_of(path))
        return malformed(line, f"{len(row)} columns, the header has {len(columns)} ({', '.join(columns)})")
    return _line_of_fields(path, number, dict(zip(columns, row, strict=True)), table)


def _line_of_fields(path: Path, number: int, fields: Fields, table: Columns) -> Line:
    name, split = table.audio(fields).strip(), table.split(fields).strip().lower()
    audio = find_audio(path.parent / name)
    line = Line(str(path), number, _id(name), audio, table.text(fields).strip(), table.speaker(fields).strip())
    line = dataclasses.replace(line, speaker=line.speaker or speaker_of(audio), split=NAMES.get(split, ""))
    if split and split not in NAMES:
        return malformed(line, f'split "{split}", expected one of {", ".join(NAMES)}')
    return line if line.split else dataclasses.replace(line, split=NAMES.get(path.stem.lower(), ""))


def read_jsonl(path: Path) -> Iterator[Line]:
    """A JSON object a line: audio (a path relative to the file), text; optional speaker, split, start and end (s)."""
    for number, text in _text_lines(path):
        if text.strip():
            yield _jsonl_line(path, number, text)


def _jsonl_line(path: Path, number: int, text: str) -> Line:
    nothing = Line(str(path), number, f"{path.stem}:{number}", path, "", speaker_of(path))
    try:
        fields = json.loads(text)
    except ValueError as error:
        return malformed(nothing, f"not JSON ({error})")
    if not isinstance(fields, dict) or not all(isinstance(fields.get(name), str) for name in ("audio", "text")):
        return malformed(nothing, 'expected an object with strings "audio" and "text"')
    strings = {name: "" if value is None else str(value) for name, value in fields.items()}
    line = _line_of_fields(path, number, strings, TABLES["table"])
    if fields.get("start") is None and fields.get("end") is None:
        return line
    return _with_span(line, fields.get("start"), fields.get("end"))


def _with_span(line: Line, start: Any, end: Any) -> Line:
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (start, end))
    if not numbers or not 0 <= start < end:
        return malformed(line, f"from {start!r} to {end!r}: expected seconds, the second larger than the first")
    return dataclasses.replace(line, id=f"{line.id}@{start:.2f}", start=float(start), end=float(end))


def _split_header(first: str) -> list[str]:
    return [column.strip().strip('"') for column in first.split(_delimiter(first))]


def _delimiter(header: str) -> str:
    return max("\t|,", key=header.count)


# --- folders of recordings with something beside them -----------------------------------------------------------------


def read_folder(folder: Path) -> Iterator[Line]:
    """Recordings, each with a .txt of the same name; folders in it are speakers."""
    recordings = list(_recordings(folder))
    for audio in recordings:
        line = Line(str(audio), 1, _id(str(audio.relative_to(folder))), audio, "", speaker_of(audio))
        transcript = _transcript_of(audio, ".txt")
        if transcript is None:
            problem = f"there is no {audio.stem}.txt beside it"
            yield dataclasses.replace(line, reason="no transcript", problem=problem)
        else:
            text = " ".join(text.strip() for _, text in _text_lines(transcript)).strip()
            yield dataclasses.replace(line, file=str(transcript), text=text)
    stems = {audio.with_suffix("") for audio in recordings}
    for transcript in sorted(folder.rglob("*.txt")):
        if transcript.with_suffix("") not in stems:
            audio = transcript.with_suffix(".wav")
            yield Line(str(transcript), 1, _id(str(audio.relative_to(folder))), audio, "", speaker_of(audio))


WHISPER_SUFFIXES = (".json", ".srt")


def read_whisper(path: Path) -> Iterator[Line]:
    """Long recordings, each with Whisper's .json or .srt of the same name beside it, cut at its segments."""
    if path.is_file():
        yield from _segment_lines(path, find_audio(path.with_suffix("")), path.parent)
        return
    for audio in _recordings(path):
        transcript = _segments_of(audio)
        if transcript is None:
            line = Line(str(audio), 1, _id(str(audio.relative_to(path))), audio, "", speaker_of(audio))
            problem = f"there is no {audio.stem}.json or {audio.stem}.srt beside it"
            yield dataclasses.replace(line, reason="no transcript", problem=problem)
        else:
            yield from _segment_lines(transcript, audio, path)


def _segments_of(audio: Path) -> Path | None:
    """Whisper's file beside a recording; a .json without segments is something else."""
    json_file = _transcript_of(audio, ".json")
    return json_file if json_file and '"segments"' in _text_of(json_file) else _transcript_of(audio, ".srt")


def _segment_lines(transcript: Path, audio: Path, root: Path) -> Iterator[Line]:
    read = _json_segments if transcript.suffix.lower() == ".json" else _srt_segments
    segments = list(read(transcript))
    for place, (number, start, end, text) in enumerate(segments):
        line = Line(str(transcript), number, _id(str(audio.relative_to(root))), audio, text.strip(), speaker_of(audio))
        line = _with_span(line, start, end)
        following = segments[place + 1][1] if place + 1 < len(segments) else None
        yield dataclasses.replace(line, end=_given_back(line.end, following)) if line.end is not None else line


def _given_back(end: float, following: Any) -> float:
    """The end of a segment with a little of the pause behind it."""
    later = end + SEGMENT_TAIL
    return max(end, min(later, following)) if isinstance(following, (int, float)) else later


Segment = tuple[int, Any, Any, str]  # number, start and end in seconds, text


def _json_segments(path: Path) -> Iterator[Segment]:
    try:
        segments = json.loads(_text_of(path))["segments"]
        for number, segment in enumerate(segments, start=1):
            yield number, segment.get("start"), segment.get("end"), str(segment.get("text", ""))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f'{path}: not Whisper\'s json: expected {{"segments": [{{"start", "end", "text"}} …]}}'
        ) from None


_SRT_TIMES = re.compile(r"(\d+):(\d\d):(\d\d)[,.](\d{3})\s*-->\s*(\d+):(\d\d):(\d\d)[,.](\d{3})")


def _srt_segments(path: Path) -> Iterator[Segment]:
    lines = [text.strip() for _, text in _text_lines(path)]
    starts = [i for i, line in enumerate(lines) if "-->" in line]
    for place, i in enumerate(starts):
        # A block: its number, its times, its text; the number before the next block's times is not text.
        end = starts[place + 1] - 1 if place + 1 < len(starts) else len(lines)
        times = _SRT_TIMES.search(lines[i])
        start, stop = (_seconds(times.groups()[:4]), _seconds(times.groups()[4:])) if times else (None, lines[i])
        yield i + 1, start, stop, " ".join(line for line in lines[i + 1 : end] if line)


def _seconds(groups: Sequence[str]) -> float:
    hours, minutes, seconds, thousandths = (int(group) for group in groups)
    return hours * 3600 + minutes * 60 + seconds + thousandths / 1000


# --- the formats ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Format:
    read: Callable[[Path], Iterator[Line]]
    description: str
    of_folders: bool = False


def _table_format(name: str, description: str) -> Format:
    return Format(lambda path: read_table(path, name), description)


FORMATS = {
    "ljspeech": Format(
        read_ljspeech, "a folder with metadata.csv (ID|text or ID|text|normalised text) and wavs/", True
    ),
    "list": Format(read_list, "a text file of lines path|text"),
    "table": _table_format("table", "csv or tsv with a header: audio, text, optional speaker and split"),
    "jsonl": Format(read_jsonl, "a JSON object a line: audio, text, optional speaker, split, start, end"),
    "folder": Format(read_folder, "a folder of recordings, each with a .txt of the same name", True),
    "whisper": Format(read_whisper, "long recordings, each with Whisper's .json or .srt of the same name", True),
    "commonvoice": _table_format("commonvoice", "a tsv of Common Voice beside its clips/"),
    "voxpopuli": _table_format("voxpopuli", "a tsv of VoxPopuli beside its folders of years"),
    "xtts": _table_format("xtts", "the tables XTTS trainers write: audio_file|text|speaker_name"),
}


# --- paths, names, text -----------------------------------------------------------------------------------------------


def malformed(line: Line, problem: str) -> Line:
    return dataclasses.replace(line, reason="malformed line", problem=problem)


def find_audio(stem: Path) -> Path:
    """The recording of this name, or with any suffix we read; the .wav it should have been if there is none."""
    if stem.suffix.lower() in AUDIO_SUFFIXES:
        return stem
    candidates = [stem.with_name(stem.name + suffix) for suffix in AUDIO_SUFFIXES] if stem.name else [stem]
    return next((path for path in candidates if path.is_file()), candidates[0])


def speaker_of(audio: Path) -> str:
    """The name of the folder a recording is in, or of the one above "wavs" and the like."""
    folder = audio.absolute().parent
    while folder.name.lower() in CONTAINERS:
        folder = folder.parent
    return folder.name


def _id(name: str) -> str:
    path = Path(name.strip())
    return str(path.with_suffix("")) if path.suffix.lower() in AUDIO_SUFFIXES else name.strip()


def _recordings(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in AUDIO_SUFFIXES)


def _transcript_of(audio: Path, *suffixes: str) -> Path | None:
    return next((path for suffix in suffixes if (path := audio.with_suffix(suffix)).is_file()), None)


def _text_lines(path: Path) -> Iterator[tuple[int, str]]:
    # Not splitlines(): a line separator of Unicode inside a transcript does not end the line.
    return iter(enumerate(_text_of(path).replace("\r\n", "\n").split("\n"), start=1))


def _text_of(path: Path) -> str:
    try:
        content = path.read_bytes()
        return content.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        number = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{number}: not UTF-8 text; save the file as UTF-8") from error
