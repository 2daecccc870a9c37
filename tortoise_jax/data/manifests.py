"""Recordings and their transcripts, in every format people have them in, read into clips.

Every line of an input becomes a `Clip`. Where a line cannot be used, the clip's `reason` and `detail` say why.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tortoise_jax.audio import AUDIO_SUFFIXES, MAX_HOURS
from tortoise_jax.data.clips import Clip
from tortoise_jax.data.filters import Reason
from tortoise_jax.data.splits import NAMES
from tortoise_jax.errors import UserError, count_of, did_you_mean, printable
from tortoise_jax.files import check_readable, digest_of

# Folders of one speaker's recordings that are not named after the speaker.
CONTAINERS = ("wavs", "wav", "clips", "audio", "audios", "segments")
# Recordings as people have them that no decoder of ours is sure to read: each is a line of the report nevertheless.
OTHER_SUFFIXES = (
    *(".m4a", ".m4b", ".aac", ".opus", ".oga", ".wma", ".aif", ".aiff", ".caf", ".amr", ".mka"),
    *(".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi"),
)
# Whisper ends segments early and so cuts the last syllable: a segment is prolonged by so many seconds, at most up to
# the next one.
SEGMENT_TAIL = 0.2
LONGEST_SECONDS = MAX_HOURS * 3600  # of a recording, so that no segment ends later
LONGEST_NAME = 255  # bytes of one part of a path, on every usual file system


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
        stat = path.stat()
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
        if not _is_unicode(str(path)):
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
    clips = [_with_possible_names(clip) for clip in FORMATS[format].read(path)]
    if not clips:
        raise UserError(f"{path}: empty, no line found in it; expected {FORMATS[format].description}")
    return Input(path, format, clips, _unlisted(path, clips) if format == "ljspeech" else [])


# --- recognising ------------------------------------------------------------------------------------------------------


def recognise(path: Path) -> str:
    """The name of the format a file or folder is in. Raises UserError that says what was looked for."""
    if not path.exists():
        near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"{path}: there is no such file or folder{did_you_mean(path.name, near)}")
    check_readable(path)
    format = _of_folder(path) if path.is_dir() else _of_file(path)
    if format is None:
        known = ", ".join(FORMATS)
        raise UserError(f"{path}: {_what_is_there(path)}: none of the formats {known}; --help says what each expects")
    return format


def _what_is_there(path: Path) -> str:
    if path.is_file():
        return f'a file that begins "{_first_text(path)[:60]}"'
    texts = [p for p in path.iterdir() if p.suffix.lower() in (".csv", ".tsv", ".txt", ".jsonl") and p.is_file()]
    lists = sorted(p for p in texts if _of_file(p))
    if lists:
        return f"a folder with {', '.join(p.name for p in lists)}: give the files themselves (--data {lists[0]} …)"
    names = sorted(entry.name for entry in path.iterdir())
    return f"a folder with {', '.join(names[:5])}{' …' if len(names) > 5 else ''}" if names else "an empty folder"


def _of_folder(folder: Path) -> str | None:
    metadata = folder / "metadata.csv"
    if metadata.is_file() and _of_file(metadata) in ("ljspeech", None):
        return "ljspeech"
    if _speaker_tables(folder):
        return "ljspeech"
    recordings = _recordings(folder)
    # Whisper writes a .txt too: its times are what long recordings need.
    if any(_segments_of(audio) for audio in recordings):
        return "whisper"
    return "folder" if any(_transcript_of(audio, ".txt") for audio in recordings) else None


def _of_file(path: Path) -> str | None:
    suffix, first = path.suffix.lower(), _first_text(path)
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


def _first_text(path: Path) -> str:
    return next((text for _, text in _text_lines(path) if text.strip()), "")


# --- LJSpeech and path|text -------------------------------------------------------------------------------------------


def read_ljspeech(path: Path) -> Iterator[Clip]:
    """metadata.csv of ID|text or ID|text|normalised text; the recordings are wavs/ID.wav (or flac, ogg, mp3).

    A folder of such folders is several speakers.
    """
    metadata = _metadata(path)
    for file in [metadata] if metadata else _speaker_tables(path):
        for number, text in _text_lines(file):
            if text.strip():
                yield _ljspeech_clip(file, number, text)


def _metadata(path: Path) -> Path | None:
    return path if path.is_file() else path / "metadata.csv" if (path / "metadata.csv").is_file() else None


def _speaker_tables(folder: Path) -> list[Path]:
    """metadata.csv of each folder inside. Raises PermissionError for a folder that may not be read."""
    tables = (inner / "metadata.csv" for inner in sorted(folder.iterdir()) if inner.is_dir())
    return [table for table in tables if table.is_file()]


def _ljspeech_clip(file: Path, number: int, row: str) -> Clip:
    name, *texts = row.split("|")
    folder = file.parent / "wavs"
    audio = find_audio((folder if folder.is_dir() else file.parent) / name.strip())
    clip = _clip(file, number, name.strip(), audio)
    if not 1 <= len(texts) <= 2 or not name.strip():
        tabs = "; it is separated by tabs" if "\t" in row else ""
        columns = count_of(len(texts) + 1, "column")
        return malformed(clip, f"{columns}, expected ID|text or ID|text|normalised text{tabs}")
    normalised = texts[-1].strip()
    return dataclasses.replace(clip, text=normalised or texts[0].strip())


def _unlisted(path: Path, clips: Sequence[Clip]) -> list[str]:
    listed = {clip.audio for clip in clips}
    root = path if path.is_dir() else path.parent
    # A line may name any place, "/" too: only what is inside the data is looked through.
    folders = {a.parent for a in listed if a.is_relative_to(root) and ".." not in a.parts and a.parent.is_dir()}
    folders |= {path} if path.is_dir() else set()
    unlisted = sorted({file for folder in folders for file in _recordings(folder)} - listed)
    if not unlisted:
        return []
    are = f"{count_of(len(unlisted), 'recording')} {'is' if len(unlisted) == 1 else 'are'}"
    return [f"{path}: {are} in no line of metadata.csv, e.g. {unlisted[0].name}"]


def read_list(path: Path) -> Iterator[Clip]:
    """DLAS's lists: path|text, paths relative to the list. A list named train, val, dev … is of that split."""
    for number, row in _text_lines(path):
        if not row.strip():
            continue
        name, *texts = row.split("|")
        audio = find_audio(path.parent / name.strip())
        clip = _clip(path, number, _id(name), audio, texts[0].strip() if texts else "")
        clip = dataclasses.replace(clip, split=NAMES.get(path.stem.lower(), ""))
        yield clip if len(texts) == 1 else malformed(clip, f"{count_of(len(texts) + 1, 'column')}, expected path|text")


# --- tables and jsonl -------------------------------------------------------------------------------------------------

Fields = Mapping[str, Any]


def _no_field(fields: Fields) -> str:
    return ""


@dataclasses.dataclass(frozen=True)
class Columns:
    """What is where in a table. needed: columns that must exist; the others: functions of a row's fields."""

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


def read_table(path: Path, name: str) -> Iterator[Clip]:
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
                yield _table_clip(path, number, columns, row, TABLES[name])
            number = header_number + rows.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}:{number}: not a row of csv ({error}); is a quote missing or not doubled?") from None


def _table_clip(path: Path, number: int, columns: Sequence[str], row: Sequence[str], table: Columns) -> Clip:
    if len(row) != len(columns):
        clip = _clip(path, number, f"{path.stem}:{number}", path)
        return malformed(clip, f"{count_of(len(row), 'column')}, the header has {len(columns)} ({', '.join(columns)})")
    return _clip_of_fields(path, number, dict(zip(columns, row, strict=True)), table)


def _clip_of_fields(path: Path, number: int, fields: Fields, table: Columns) -> Clip:
    name, split = table.audio(fields).strip(), table.split(fields).strip().lower()
    audio = find_audio(path.parent / name)
    clip = _clip(path, number, _id(name), audio, table.text(fields).strip())
    clip = dataclasses.replace(clip, speaker=table.speaker(fields).strip() or clip.speaker, split=NAMES.get(split, ""))
    if split and split not in NAMES:
        return malformed(clip, f'split "{split}", expected one of {", ".join(NAMES)}')
    return clip if clip.split else dataclasses.replace(clip, split=NAMES.get(path.stem.lower(), ""))


def read_jsonl(path: Path) -> Iterator[Clip]:
    """One JSON object per line: audio (a path relative to the file), text; optional speaker, split, start, end (s)."""
    for number, text in _text_lines(path):
        if text.strip():
            yield _jsonl_clip(path, number, text)


def _jsonl_clip(path: Path, number: int, text: str) -> Clip:
    nothing = _clip(path, number, f"{path.stem}:{number}", path)
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        return malformed(nothing, f"not JSON ({error})")
    if not isinstance(fields, dict) or not all(isinstance(fields.get(name), str) for name in ("audio", "text")):
        return malformed(nothing, 'expected an object with strings "audio" and "text"')
    strings = {name: "" if value is None else str(value) for name, value in fields.items()}
    clip = _clip_of_fields(path, number, strings, TABLES["table"])
    if fields.get("start") is None and fields.get("end") is None:
        return clip
    return _with_span(clip, fields.get("start"), fields.get("end"))


def _with_span(clip: Clip, start: Any, end: Any) -> Clip:
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (start, end))
    if not numbers or not 0 <= start < end <= LONGEST_SECONDS:
        given = f"from {repr(start)[:40]} to {repr(end)[:40]}"
        return malformed(clip, f"{given}: expected seconds, the second larger than the first")
    return dataclasses.replace(clip, id=f"{clip.id}@{start:.2f}", start=float(start), end=float(end))


def _split_header(first: str) -> list[str]:
    return [column.strip().strip('"') for column in first.split(_delimiter(first))]


def _delimiter(header: str) -> str:
    return max("\t|,", key=header.count)


# --- folders of recordings with something beside them -----------------------------------------------------------------


def read_folder(folder: Path) -> Iterator[Clip]:
    """Recordings, each with a .txt of the same name; folders inside are speakers."""
    recordings = _recordings(folder)
    for audio in recordings:
        transcript = _transcript_of(audio, ".txt")
        if transcript is None:
            yield _without_transcript(audio, folder, f"there is no {audio.stem}.txt beside it")
        else:
            yield _folder_clip(transcript, audio, folder)
    for transcript in _without_recording(folder, recordings, ".txt"):
        audio = transcript.with_suffix(".wav")
        yield _clip(transcript, 1, _id(str(audio.relative_to(folder))), audio)


def _without_recording(folder: Path, recordings: Sequence[Path], *suffixes: str) -> Iterator[Path]:
    """Transcripts with none of the recordings beside them; of several for one name the first suffix's."""
    stems = {audio.with_suffix("") for audio in recordings}
    files = [path for path in _files(folder) if path.suffix in suffixes]
    for transcript in sorted(files, key=lambda path: suffixes.index(path.suffix)):
        if transcript.with_suffix("") not in stems:
            stems.add(transcript.with_suffix(""))
            yield transcript


def _folder_clip(transcript: Path, audio: Path, root: Path) -> Clip:
    clip = _clip(transcript, 1, _id(str(audio.relative_to(root))), audio)
    try:
        lines = list(_text_lines(transcript))
    except UserError as error:  # of one clip: the others are not at fault
        return malformed(clip, str(error).removeprefix(f"{transcript}:").strip())
    return dataclasses.replace(clip, text=" ".join(text.strip() for _, text in lines).strip())


def _without_transcript(audio: Path, root: Path, detail: str) -> Clip:
    clip = _clip(audio, 1, _id(str(audio.relative_to(root))), audio)
    return dataclasses.replace(clip, reason=Reason.NO_TRANSCRIPT, detail=detail)


WHISPER_SUFFIXES = (".json", ".srt")


def read_whisper(path: Path) -> Iterator[Clip]:
    """Long recordings, each with Whisper's .json or .srt of the same name beside it, cut at its segments."""
    if path.is_file():
        yield from _segment_clips(path, find_audio(path.with_suffix("")), path.parent)
        return
    recordings = _recordings(path)
    for audio in recordings:
        transcript = _segments_of(audio)
        if transcript is None:
            yield _without_transcript(audio, path, f"there is no {audio.stem}.json or {audio.stem}.srt beside it")
        else:
            yield from _segment_clips_or_why(transcript, audio, path)
    for transcript in _without_recording(path, recordings, *WHISPER_SUFFIXES):
        if transcript.suffix == ".srt" or _has_segments(transcript):
            yield from _segment_clips_or_why(transcript, transcript.with_suffix(".wav"), path)


def _segment_clips_or_why(transcript: Path, audio: Path, root: Path) -> Iterator[Clip]:
    """The clips of one recording, or one that says why its transcript cannot be read: the others are not at fault."""
    try:
        yield from _segment_clips(transcript, audio, root)
    except UserError as error:
        clip = _clip(transcript, 1, _id(str(audio.relative_to(root))), audio)
        yield malformed(clip, str(error).removeprefix(f"{transcript}:").strip())


def _segments_of(audio: Path) -> Path | None:
    """Whisper's file beside a recording; a .json without segments is something else."""
    json_file = _transcript_of(audio, ".json")
    return json_file if json_file and b'"segments"' in json_file.read_bytes() else _transcript_of(audio, ".srt")


def _has_segments(file: Path) -> bool:
    try:
        return '"segments"' in _text_of(file)
    except UserError:
        return False  # no text: another program's


def _segment_clips(transcript: Path, audio: Path, root: Path) -> Iterator[Clip]:
    read = _json_segments if transcript.suffix.lower() == ".json" else _srt_segments
    segments = list(read(transcript))
    for index, (number, start, end, text) in enumerate(segments):
        clip = _clip(transcript, number, _id(str(audio.relative_to(root))), audio, text.strip())
        clip = _with_span(clip, start, end)
        following = segments[index + 1][1] if index + 1 < len(segments) else None
        yield dataclasses.replace(clip, end=_with_tail(clip.end, following)) if clip.end is not None else clip


def _with_tail(end: float, following: Any) -> float:
    """The end of a segment, moved later by SEGMENT_TAIL, but not beyond the start of the following segment."""
    later = end + SEGMENT_TAIL
    return max(end, min(later, following)) if isinstance(following, (int, float)) else later


Segment = tuple[int, Any, Any, str]  # number, start and end in seconds, text


def _json_segments(path: Path) -> Iterator[Segment]:
    try:
        segments = json.loads(_text_of(path))["segments"]
        for number, segment in enumerate(segments, start=1):
            yield number, segment.get("start"), segment.get("end"), str(segment.get("text", ""))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f'{path}: not Whisper\'s json: expected {{"segments": [{{"start", "end", "text"}} …]}}'
        ) from None


_SRT_TIME = r"(\d{1,4}):(\d\d):(\d\d)[,.](\d{3})"
_SRT_TIMES = re.compile(rf"{_SRT_TIME}\s*-->\s*{_SRT_TIME}")


def _srt_segments(path: Path) -> Iterator[Segment]:
    lines = [text.strip() for _, text in _text_lines(path)]
    starts = [i for i, line in enumerate(lines) if "-->" in line]
    for index, i in enumerate(starts):
        # A block: its number, its times, its text; the number before the next block's times is not text.
        end = starts[index + 1] - 1 if index + 1 < len(starts) else len(lines)
        times = _SRT_TIMES.search(lines[i])
        start, stop = (_seconds(times.groups()[:4]), _seconds(times.groups()[4:])) if times else (None, lines[i])
        yield i + 1, start, stop, " ".join(line for line in lines[i + 1 : end] if line)


def _seconds(groups: Sequence[str]) -> float:
    hours, minutes, seconds, thousandths = (int(group) for group in groups)
    return hours * 3600 + minutes * 60 + seconds + thousandths / 1000


# --- the formats ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Format:
    read: Callable[[Path], Iterator[Clip]]
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


def _clip(file: Path, number: int, id_: str, audio: Path, text: str = "") -> Clip:
    return Clip(id_, text, speaker_of(audio), file=str(file), number=number, audio=audio)


def malformed(clip: Clip, detail: str) -> Clip:
    return dataclasses.replace(clip, reason=Reason.MALFORMED, detail=detail)


def _with_possible_names(clip: Clip) -> Clip:
    """The clip, malformed if no file can have its recording's name or no UTF-8 file can hold its text."""
    if not all(map(_is_unicode, (clip.id, clip.text, clip.speaker, str(clip.audio)))):
        clip = dataclasses.replace(
            clip,
            id=printable(clip.id),
            text=printable(clip.text),
            speaker=printable(clip.speaker),
            audio=Path(printable(str(clip.audio))),
        )
        return malformed(clip, "its name or text is no Unicode (other bytes than UTF-8, or half a surrogate pair)")
    longest = max((len(os.fsencode(part)) for part in clip.audio.parts), default=0)
    if longest > LONGEST_NAME:
        shown = Path(*(part if len(part) <= 60 else f"{part[:60]}…" for part in clip.audio.parts))
        clip = dataclasses.replace(clip, id=clip.id[:60], audio=shown)
        detail = f"the recording's name has {longest} bytes, at most {LONGEST_NAME}"
        return clip if clip.reason else malformed(clip, detail)
    if "\0" in str(clip.audio) and not clip.reason:
        return malformed(dataclasses.replace(clip, audio=Path(clip.file)), "the recording's name holds a zero byte")
    return clip


def _is_unicode(text: str) -> bool:
    return not re.search("[\ud800-\udfff]", text)


def find_audio(stem: Path) -> Path:
    """The recording of this name, or with any suffix; the .wav it should have been if there is none."""
    suffixes = (*AUDIO_SUFFIXES, *OTHER_SUFFIXES)
    if stem.suffix.lower() in suffixes:
        return stem
    candidates = [stem.with_name(stem.name + suffix) for suffix in suffixes] if stem.name else [stem]
    return next((path for path in candidates if _is_file(path)), candidates[0])


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # too long a name, for one
        return False


def speaker_of(audio: Path) -> str:
    """The name of the folder a recording is in, or of the one above "wavs" and the like."""
    folder = audio.absolute().parent
    while folder.name.lower() in CONTAINERS:
        folder = folder.parent
    return folder.name


def _id(name: str) -> str:
    path = Path(name.strip())
    return str(path.with_suffix("")) if path.suffix.lower() in (*AUDIO_SUFFIXES, *OTHER_SUFFIXES) else name.strip()


def _recordings(folder: Path) -> list[Path]:
    """All below a folder; one with a suffix we may not read only where there is none of its name with another."""
    files = _files(folder)
    read = {path.with_suffix("") for path in files if path.suffix.lower() in AUDIO_SUFFIXES}
    other = lambda path: path.suffix.lower() in OTHER_SUFFIXES and path.with_suffix("") not in read
    return [path for path in files if path.suffix.lower() in AUDIO_SUFFIXES or other(path)]


def _files(folder: Path) -> list[Path]:
    """All files below a folder, sorted; links to folders are followed, but not back to one above them."""
    found: list[Path] = []
    for root, folders, names in os.walk(folder, followlinks=True, onerror=_cannot_be_read):
        here = Path(root)
        if any((here / name).is_symlink() for name in folders):
            above = {path.resolve() for path in (here, *here.parents) if path.is_relative_to(folder)}
            folders[:] = [name for name in folders if (here / name).resolve() not in above]
        found += [here / name for name in names]
    return sorted(found)


def _cannot_be_read(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None


def _transcript_of(audio: Path, *suffixes: str) -> Path | None:
    return next((path for suffix in suffixes if (path := audio.with_suffix(suffix)).is_file()), None)


def _text_lines(path: Path) -> Iterator[tuple[int, str]]:
    # Not splitlines(): a line separator of Unicode inside a transcript does not end the line.
    return iter(enumerate(_text_of(path).replace("\r\n", "\n").split("\n"), start=1))


def _text_of(path: Path) -> str:
    check_readable(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    for start, kind in _NO_TEXT.items():
        if content.startswith(start):
            raise UserError(f"{path}: is {kind}, expected text (UTF-8); --help lists the formats")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{number}: not UTF-8 text; save the file as UTF-8") from error
    if "\0" in text:
        number = content[: content.index(b"\0")].count(b"\n") + 1
        raise UserError(f"{path}:{number}: not UTF-8 text: it holds zero bytes, as UTF-16 does; save the file as UTF-8")
    return text


_NO_TEXT = {
    **dict.fromkeys((b"RIFF", b"fLaC", b"OggS", b"ID3", b"\xff\xfb", b"\xff\xf3"), "a recording, not its transcripts"),
    b"PK\x03\x04": "a zip archive or a spreadsheet; save the sheet as csv",
    b"\xd0\xcf\x11\xe0": "an old spreadsheet or document; save it as csv",
    b"%PDF": "a PDF",
    b"\x1f\x8b": "compressed (gzip)",
}
