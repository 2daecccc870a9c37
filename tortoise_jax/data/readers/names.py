"""What readers share: which file a name stands for, whose recording it is, and text that is UTF-8."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from tortoise_jax.audio import MAX_HOURS
from tortoise_jax.data.clips import Clip
from tortoise_jax.data.filters import Reason
from tortoise_jax.decoders import AUDIO_SUFFIXES, OTHER_SUFFIXES, is_recording
from tortoise_jax.errors import UserError, printable
from tortoise_jax.files import check_readable

# Folders of one speaker's recordings that are not named after the speaker.
CONTAINERS = ("wavs", "wav", "clips", "audio", "audios", "segments")
LONGEST_SECONDS = MAX_HOURS * 3600  # of a recording, so that no segment ends later
LONGEST_NAME = 255  # bytes of one part of a path, on every usual file system


# --- clips ------------------------------------------------------------------------------------------------------------


def clip_at(file: Path, number: int, id_: str, audio: Path, text: str = "") -> Clip:
    return Clip(id_, text, speaker_of(audio), file=str(file), number=number, audio=audio)


def malformed(clip: Clip, detail: str) -> Clip:
    return dataclasses.replace(clip, reason=Reason.MALFORMED, detail=detail)


def with_span(clip: Clip, start: Any, end: Any) -> Clip:
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (start, end))
    if not numbers or not 0 <= start < end <= LONGEST_SECONDS:
        given = f"from {repr(start)[:40]} to {repr(end)[:40]}"
        return malformed(clip, f"{given}: expected seconds, the second larger than the first")
    return dataclasses.replace(clip, id=f"{clip.id}@{start:.2f}", start=float(start), end=float(end))


def with_possible_names(clip: Clip) -> Clip:
    """The clip, malformed if no file can have its recording's name or no UTF-8 file can hold its text."""
    if not all(map(is_unicode, (clip.id, clip.text, clip.speaker, str(clip.audio)))):
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


def is_unicode(text: str) -> bool:
    return not re.search("[\ud800-\udfff]", text)


# --- files ------------------------------------------------------------------------------------------------------------


def find_audio(stem: Path) -> Path:
    """The recording of this name, or with any suffix; the .wav it should have been if there is none."""
    if "\\" in stem.name:  # a path as Windows writes it
        inside = find_audio(stem.parent / stem.name.replace("\\", "/"))
        if is_file(inside):
            return inside
    suffixes = (*AUDIO_SUFFIXES, *OTHER_SUFFIXES)
    if stem.suffix.lower() in suffixes:
        return stem
    candidates = [stem.with_name(stem.name + suffix) for suffix in suffixes] if stem.name else [stem]
    return next((path for path in candidates if is_file(path)), candidates[0])


def is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # too long a name, for one
        return False


def speaker_of(audio: Path, containers: Collection[str] = CONTAINERS) -> str:
    """The name of the folder a recording is in, or of the one above "wavs" and the like."""
    folder = audio.absolute().parent
    while folder.name.lower() in containers:
        folder = folder.parent
    return folder.name


def id_of(name: str) -> str:
    path = Path(name.strip())
    return str(path.with_suffix("")) if path.suffix.lower() in (*AUDIO_SUFFIXES, *OTHER_SUFFIXES) else name.strip()


def recordings_below(folder: Path) -> list[Path]:
    """All below a folder; one with a suffix we may not read only where there is none of its name with another."""
    files = files_below(folder)
    read = {path.with_suffix("") for path in files if path.suffix.lower() in AUDIO_SUFFIXES}
    doubled = lambda path: path.suffix.lower() in OTHER_SUFFIXES and path.with_suffix("") in read
    return [path for path in files if is_recording(path) and not doubled(path)]


def files_below(folder: Path) -> list[Path]:
    """All files below a folder, sorted; links to folders are followed, but not back to one above them.

    Not those that macOS leaves beside what it copies: "._a.wav" holds no sound.
    """
    found: list[Path] = []
    for root, folders, names in os.walk(folder, followlinks=True, onerror=_cannot_be_read):
        here = Path(root)
        if any((here / name).is_symlink() for name in folders):
            above = {path.resolve() for path in (here, *here.parents) if path.is_relative_to(folder)}
            folders[:] = [name for name in folders if (here / name).resolve() not in above]
        found += [here / name for name in names if not name.startswith("._")]
    return sorted(found)


def _cannot_be_read(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None


def transcript_of(audio: Path, *suffixes: str) -> Path | None:
    return next((path for suffix in suffixes if (path := audio.with_suffix(suffix)).is_file()), None)


# --- text -------------------------------------------------------------------------------------------------------------


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    # Not splitlines(): a line separator of Unicode inside a transcript does not end the line.
    return iter(enumerate(text_of(path).replace("\r\n", "\n").split("\n"), start=1))


def text_of(path: Path) -> str:
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
    **dict.fromkeys((b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"), "a Parquet or Arrow file; give the folder it is in"),
}
