"""Files that hold sound, decoded block by block: by soundfile, and what it does not read by PyAV.

A block is float32 (samples, channels) at the file's own rate, so that memory is needed for one block alone, whatever
the file or its header claims.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from tortoise_jax import arrow
from tortoise_jax.errors import UserError, first_line
from tortoise_jax.files import check_readable

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
# Recordings as people have them, which soundfile may not read: PyAV does, where it is installed.
OTHER_SUFFIXES = (
    *(".m4a", ".m4b", ".aac", ".opus", ".oga", ".wma", ".aif", ".aiff", ".caf", ".amr", ".mka"),
    *(".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi"),
)
MIN_RATE, MAX_RATE = 4_000, 768_000  # Hz; what claims another rate is damaged
MAX_CHANNELS = 1024
BLOCK = 1 << 20  # samples of all channels that are read at once
SLACK_SECONDS = 0.5  # what a container may promise more than its packets hold: times are rounded to packets


@dataclasses.dataclass(frozen=True)
class Decoding:
    """A file that is open: its rate in Hz, its channels, and its blocks, which can be walked through once.

    The blocks raise UserError where the file turns out to be damaged or shorter than its header promises.
    """

    rate: int
    channels: int
    blocks: Iterator[np.ndarray]


@contextlib.contextmanager
def decoding(path: Path) -> Iterator[Decoding]:
    """Opens a recording. Raises UserError naming the file when it is missing, unreadable or of an impossible rate."""
    check_readable(path)
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(soundfile.SoundFile(_source(path)))
        except (soundfile.SoundFileError, OSError, RuntimeError, ValueError) as error:
            if path.suffix.lower() not in OTHER_SUFFIXES or not _has_content(path):
                raise UserError(f"{path}: {_unreadable_because(path, error)}") from error
            yield stack.enter_context(_decoding_by_av(path))
            return
        _check_header(path, file.samplerate, file.channels)
        yield Decoding(file.samplerate, file.channels, _blocks(path, file))


def is_recording(path: Path) -> bool:
    """Whether a file's name is a recording's. macOS leaves a "._name.wav" beside what it copies, which is none."""
    return path.suffix.lower() in (*AUDIO_SUFFIXES, *OTHER_SUFFIXES) and not path.name.startswith("._")


def _source(path: Path) -> Path | io.BytesIO:
    """What a decoder is given: the file, or what an Arrow file holds of it."""
    packed = arrow.content(path)
    return path if packed is None else io.BytesIO(packed)


def _check_header(path: Path, rate: int, channels: int) -> None:
    if not MIN_RATE <= rate <= MAX_RATE:
        raise UserError(f"{path}: its header claims {rate} Hz, expected {MIN_RATE} to {MAX_RATE}; encode it again")
    if not 1 <= channels <= MAX_CHANNELS:
        raise UserError(f"{path}: its header claims {channels} channels, expected 1 to {MAX_CHANNELS}; encode it again")


def _truncated(path: Path, read: int) -> UserError:
    return UserError(
        f"{path}: the recording is truncated: {read} samples could be read, its header promises more; "
        "copy or encode it again"
    )


# --- by soundfile -----------------------------------------------------------------------------------------------------


def _blocks(path: Path, file: soundfile.SoundFile) -> Iterator[np.ndarray]:
    log, size, read = file.extra_info, max(1, BLOCK // file.channels), 0
    while True:
        try:
            block = file.read(size, dtype="float32", always_2d=True)
        except (soundfile.SoundFileError, OSError, RuntimeError, ValueError) as error:
            raise UserError(f"{path}: {_unreadable_because(path, error)}") from error
        read += len(block)
        yield block
        if len(block) < size:
            break
    if read and (read < file.frames or _wav_is_cut_short(log)):
        raise _truncated(path, read)


def _has_content(path: Path) -> bool:
    file = arrow.file_of(path)
    return file.is_file() and file.stat().st_size > 0


def _unreadable_because(path: Path, error: Exception) -> str:
    try:
        with path.open("rb") as file:
            start = file.read(8)
        if not start:
            return "the file is empty (0 bytes)"
        if start[4:] == b"ftyp" and path.suffix.lower() in AUDIO_SUFFIXES:
            return "is an m4a or mp4 inside; name it so"
    except FileNotFoundError:
        there = next((s for s in (*AUDIO_SUFFIXES, *OTHER_SUFFIXES) if path.with_suffix(s).is_file()), "")
        return "there is no such file" + (f"; {path.with_suffix(there).name} is there" if there else "")
    except IsADirectoryError:
        return "is a folder, expected a wav, flac, ogg or mp3 file"
    except OSError as refused:
        if arrow.file_of(path) == path:
            return f"cannot be read ({refused.strerror})"
    except ValueError:
        return "no file can have this name"
    reason = getattr(error, "error_string", str(error)).rstrip(".")
    return f"not readable as audio ({reason}), expected wav, flac, ogg or mp3"


def _wav_is_cut_short(log: str) -> bool:
    """Whether a wav file ends before the size in its header; libsndfile reads what is there and only logs it."""
    sizes = re.search(r"^data : (\d+) \(should be (\d+)\)", log, re.MULTILINE)
    if sizes is None:
        return False
    promised, found = int(sizes[1]), int(sizes[2])
    return found < promised < _SIZE_OF_A_STREAM


_SIZE_OF_A_STREAM = 0x7FFF0000  # programs that write to a pipe cannot know the size and promise the greatest


# --- by PyAV ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _decoding_by_av(path: Path) -> Iterator[Decoding]:
    try:
        import av
    except ImportError:
        raise UserError(
            f"{path}: {path.suffix.lower()} files need PyAV: pip install 'tortoise_jax[av]'; or save it as wav or flac"
        ) from None
    try:
        source = _source(path)
        container = av.open(str(source) if source is path else source, metadata_errors="ignore")
    except (av.FFmpegError, OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as audio ({_why(error)})") from error
    with container:
        stream = next(iter(container.streams.audio), None)
        if stream is None:
            raise UserError(f"{path}: there is no sound in it")
        _check_header(path, stream.rate, stream.channels)
        yield Decoding(stream.rate, stream.channels, _av_blocks(path, container, stream))


def _why(error: Exception) -> str:
    """Without FFmpeg's number and the name of the file, which the line has already."""
    return getattr(error, "strerror", None) or first_line(error)


def _av_blocks(path: Path, container: Any, stream: Any) -> Iterator[np.ndarray]:
    import av

    # The decoder's own numbers, whatever they are, as floats of one plane for each channel; the rate stays.
    as_floats, read = av.AudioResampler(format="fltp"), 0
    try:
        for frame in container.decode(stream):
            for floats in as_floats.resample(frame):
                block = floats.to_ndarray().T
                read += len(block)
                yield block
    except (av.FFmpegError, OSError, ValueError) as error:
        raise UserError(f"{path}: damaged after {read / stream.rate:.2f} s ({_why(error)}); encode it again") from error
    promised = float(stream.duration * stream.time_base) if stream.duration else 0.0
    if not promised and not container.streams.video:  # which may go on after the sound
        promised = (container.duration or 0) / 1_000_000
    if read and read / stream.rate < promised - SLACK_SECONDS:
        raise _truncated(path, read)
