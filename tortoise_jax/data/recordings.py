"""Audio files to waveforms, measured; runs in worker processes, so that nothing waits for decoding."""

from __future__ import annotations

import dataclasses
import hashlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

from tortoise_jax import arrow
from tortoise_jax.audio import (
    MIN_SECONDS,
    SAMPLE_RATE,
    SILENT_DB,
    heard_elsewhere,
    int16_from_waveform,
    loudness_db,
    read_audio,
    trim_silence,
)
from tortoise_jax.data.clips import Sound
from tortoise_jax.data.filters import (
    ClipLimits,
    Reason,
    rejected_as_long,
    rejected_as_short,
    rejected_as_silent,
    rejected_for_span,
)
from tortoise_jax.errors import UserError

# A clip that is still this loud, measured against its own mean, in its last 20 ms was cut while somebody spoke.
ENDING_SECONDS = 0.02
ABRUPT_DB = -6.0

Span = tuple[float, float] | None  # seconds from and to; None: the whole file
Loaded = tuple[Sound, np.ndarray | None]  # the waveform (samples,) int16 at 22050 Hz, None where it is not wanted


@dataclasses.dataclass(frozen=True)
class Recording:
    """A file and the spans of it that are wanted, each of them the sound of a clip."""

    path: Path
    spans: tuple[Span, ...] = (None,)


def load_clips(recording: Recording, limits: ClipLimits, known: frozenset[str] = frozenset()) -> list[Loaded]:
    """Each span's sound, measured, with its waveform where it can be used; of a sound in `known`, the key alone."""
    digest = file_digest(recording.path)
    keys = [sound_key(digest, span, limits) if digest else "" for span in recording.spans]
    if all(key in known for key in keys):
        return [(Sound(key), None) for key in keys]
    try:
        waveform = read_audio(recording.path, limits.channel)
    except UserError as error:
        reason = Reason.UNREADABLE if arrow.file_of(recording.path).exists() else Reason.MISSING
        return _all_rejected(keys, reason, str(error).removeprefix(f"{recording.path}: "))
    except Exception as error:  # decoders have failures of their own; one file must not end the work on all others
        return _all_rejected(keys, Reason.UNREADABLE, f"{type(error).__name__}: {error}")
    loaded = [
        (Sound(key), None) if key in known else measure(waveform, key, span, limits)
        for key, span in zip(keys, recording.spans, strict=True)
    ]
    if any(sound.reason == Reason.SILENT for sound, _ in loaded):
        note = heard_elsewhere(recording.path)
        loaded = [(_noted(sound, note) if sound.reason == Reason.SILENT else sound, wave) for sound, wave in loaded]
    return loaded


def _noted(sound: Sound, note: str) -> Sound:
    return dataclasses.replace(sound, detail=sound.detail + note)


def _all_rejected(keys: list[str], reason: str, detail: str) -> list[Loaded]:
    return [(Sound(key, reason=reason, detail=detail), None) for key in keys]


def file_digest(path: Path) -> str:
    """Digest of a recording's bytes, "" where they cannot be read; a pipe or a device may never end."""
    try:
        if (packed := arrow.content(path)) is not None:
            return hashlib.blake2b(packed, digest_size=16).hexdigest()
        if not path.is_file():
            return ""
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError:
        return ""


def sound_key(digest: str, span: Span, limits: ClipLimits) -> str:
    where = "" if span is None else f"@{span[0]:.3f}-{span[1]:.3f}"
    channel = "" if limits.channel == 1 else f"~{limits.channel}"
    return f"{digest}{where}{'~trimmed' if limits.trim_silence else ''}{channel}"


def cut(recording: np.ndarray, span: Span) -> np.ndarray:
    if span is None:
        return recording
    start, end = (max(0, round(seconds * SAMPLE_RATE)) for seconds in span)
    return recording[start:end]


def measure(recording: np.ndarray, key: str, span: Span, limits: ClipLimits) -> Loaded:
    """One span of a recording (samples,) float32, its silent ends cut off if `limits` say so."""
    whole = waveform = cut(recording, span)
    if limits.trim_silence and len(whole) >= MIN_SECONDS * SAMPLE_RATE:
        waveform = trim_silence(whole)
    sound = Sound(key, len(waveform), len(whole) - len(waveform))
    rejection = rejected_for_span(span, recording) or rejected_as_short(sound) or rejected_as_long(sound, limits)
    if rejection is None:
        sound = dataclasses.replace(sound, loudness_db=loudness_db(waveform), ends_abruptly=ends_abruptly(waveform))
        rejection = rejected_as_silent(sound)
    if rejection is None:
        return sound, int16_from_waveform(waveform)
    reason, detail = rejection
    return dataclasses.replace(sound, reason=reason, detail=detail), None


def ends_abruptly(waveform: np.ndarray) -> bool:
    ending = waveform[-round(ENDING_SECONDS * SAMPLE_RATE) :]
    return loudness_db(ending) > max(loudness_db(waveform) + ABRUPT_DB, SILENT_DB)


# --- in worker processes ----------------------------------------------------------------------------------------------


def load_ahead(
    groups: Iterable[list[Recording]], limits: ClipLimits, known: frozenset[str], workers: int, ahead: int = 2
) -> Generator[list[Loaded], None, None]:
    """`load_clips` of every group of recordings, in order; the next `ahead` groups are decoded meanwhile.

    workers: processes; 0 decodes in this one. Raises UserError where a worker is killed.
    """
    if workers == 0:
        for group in groups:
            yield [loaded for recording in group for loaded in load_clips(recording, limits, known)]
        return
    # Not forked: JAX has threads, whose locks a forked child would inherit.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(limits, known))
    pending: list[list[Future[list[Loaded]]]] = []
    try:
        for group in groups:
            pending.append(_submit(executor, group))
            if len(pending) > ahead:
                yield _results(pending.pop(0))
        while pending:
            yield _results(pending.pop(0))
    except BrokenProcessPool:
        raise UserError(
            f"a process that decodes audio was killed (out of memory?); run again with fewer than {workers} --workers: "
            "what is finished is kept. A script of your own must call prepare under if __name__ == '__main__':"
        ) from None
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


_worker_settings: tuple[ClipLimits, frozenset[str]]


def _start_worker(limits: ClipLimits, known: frozenset[str]) -> None:
    global _worker_settings  # known can be large: sent once per process, not with every file
    _worker_settings = (limits, known)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent is killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _load_clips(recording: Recording) -> list[Loaded]:
    return load_clips(recording, *_worker_settings)


def _submit(executor: Executor, group: list[Recording]) -> list[Future[list[Loaded]]]:
    return [executor.submit(_load_clips, recording) for recording in group]


def _results(futures: list[Future[list[Loaded]]]) -> list[Loaded]:
    return [loaded for future in futures for loaded in future.result()]
