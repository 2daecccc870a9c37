"""Folders of recordings with their transcripts beside them: a .txt each, or Whisper's segments."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tortoise_jax.data.clips import Clip
from tortoise_jax.data.filters import Reason
from tortoise_jax.data.readers.names import (
    clip_at,
    files_below,
    find_audio,
    id_of,
    malformed,
    recordings_below,
    text_lines,
    text_of,
    transcript_of,
    with_span,
)
from tortoise_jax.errors import UserError

# Whisper ends segments early and so cuts the last syllable: a segment is prolonged by so many seconds, at most up to
# the next one.
SEGMENT_TAIL = 0.2


def read_folder(folder: Path) -> Iterator[Clip]:
    """Recordings, each with a .txt of the same name; folders inside are speakers."""
    recordings = recordings_below(folder)
    for audio in recordings:
        transcript = transcript_of(audio, ".txt")
        if transcript is None:
            yield _without_transcript(audio, folder, f"there is no {audio.stem}.txt beside it")
        else:
            yield _folder_clip(transcript, audio, folder)
    for transcript in _without_recording(folder, recordings, ".txt"):
        audio = transcript.with_suffix(".wav")
        yield clip_at(transcript, 1, id_of(str(audio.relative_to(folder))), audio)


def _without_recording(folder: Path, recordings: Sequence[Path], *suffixes: str) -> Iterator[Path]:
    """Transcripts with none of the recordings beside them; of several for one name the first suffix's."""
    stems = {audio.with_suffix("") for audio in recordings}
    files = [path for path in files_below(folder) if path.suffix in suffixes]
    for transcript in sorted(files, key=lambda path: suffixes.index(path.suffix)):
        if transcript.with_suffix("") not in stems:
            stems.add(transcript.with_suffix(""))
            yield transcript


def _folder_clip(transcript: Path, audio: Path, root: Path) -> Clip:
    clip = clip_at(transcript, 1, id_of(str(audio.relative_to(root))), audio)
    try:
        lines = list(text_lines(transcript))
    except UserError as error:  # of one clip: the others are not at fault
        return malformed(clip, str(error).removeprefix(f"{transcript}:").strip())
    return dataclasses.replace(clip, text=" ".join(text.strip() for _, text in lines).strip())


def _without_transcript(audio: Path, root: Path, detail: str) -> Clip:
    clip = clip_at(audio, 1, id_of(str(audio.relative_to(root))), audio)
    return dataclasses.replace(clip, reason=Reason.NO_TRANSCRIPT, detail=detail)


WHISPER_SUFFIXES = (".json", ".srt")


def read_whisper(path: Path) -> Iterator[Clip]:
    """Long recordings, each with Whisper's .json or .srt of the same name beside it, cut at its segments."""
    if path.is_file():
        yield from _segment_clips(path, find_audio(path.with_suffix("")), path.parent)
        return
    recordings = recordings_below(path)
    for audio in recordings:
        transcript = segments_of(audio)
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
        clip = clip_at(transcript, 1, id_of(str(audio.relative_to(root))), audio)
        yield malformed(clip, str(error).removeprefix(f"{transcript}:").strip())


def segments_of(audio: Path) -> Path | None:
    """Whisper's file beside a recording; a .json without segments is something else."""
    json_file = transcript_of(audio, ".json")
    return json_file if json_file and b'"segments"' in json_file.read_bytes() else transcript_of(audio, ".srt")


def _has_segments(file: Path) -> bool:
    try:
        return '"segments"' in text_of(file)
    except UserError:
        return False  # no text: another program's


def _segment_clips(transcript: Path, audio: Path, root: Path) -> Iterator[Clip]:
    read = _json_segments if transcript.suffix.lower() == ".json" else _srt_segments
    segments = list(read(transcript))
    for index, (number, start, end, text) in enumerate(segments):
        clip = clip_at(transcript, number, id_of(str(audio.relative_to(root))), audio, text.strip())
        clip = with_span(clip, start, end)
        following = segments[index + 1][1] if index + 1 < len(segments) else None
        yield dataclasses.replace(clip, end=_with_tail(clip.end, following)) if clip.end is not None else clip


def _with_tail(end: float, following: Any) -> float:
    """The end of a segment, moved later by SEGMENT_TAIL, but not beyond the start of the following segment."""
    later = end + SEGMENT_TAIL
    return max(end, min(later, following)) if isinstance(following, (int, float)) else later


Segment = tuple[int, Any, Any, str]  # number, start and end in seconds, text


def _json_segments(path: Path) -> Iterator[Segment]:
    try:
        segments = json.loads(text_of(path))["segments"]
        for number, segment in enumerate(segments, start=1):
            yield number, segment.get("start"), segment.get("end"), str(segment.get("text", ""))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f'{path}: not Whisper\'s json: expected {{"segments": [{{"start", "end", "text"}} …]}}'
        ) from None


_SRT_TIME = r"(\d{1,4}):(\d\d):(\d\d)[,.](\d{3})"
_SRT_TIMES = re.compile(rf"{_SRT_TIME}\s*-->\s*{_SRT_TIME}")


def _srt_segments(path: Path) -> Iterator[Segment]:
    lines = [text.strip() for _, text in text_lines(path)]
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
