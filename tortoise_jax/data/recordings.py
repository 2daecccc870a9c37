"""Audio files to waveforms and what is wrong with them; runs in worker processes, so that decoding costs no time."""

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

from tortoise_jax.audio import SAMPLE_RATE, SILENT_DB, int16_from_waveform, loudness_db, read_audio, trim_silence
from tortoise_jax.errors import UserError

MIN_SECONDS = 0.6  # the shortest clip upstream trains on
# A clip that is still this loud, measured against its own mean, in its last 20 ms was cut while somebody spoke.
ENDING_SECONDS = 0.02
ABRUPT_DB = -6.0

Span = tuple[float, float] | None  # seconds from and to; None: the whole file


@dataclasses.dataclass(frozen=True)
class Recording:
    """A file and the parts of it that are wanted."""

    path: Path
    spans: tuple[Span, ...]


@dataclasses.dataclass(frozen=True)
class Hearing:
    """What a clip may be at most, and whether silence at its ends is cut off."""

    max_seconds: float
    trim_silence: bool = False


@dataclasses.dataclass(frozen=True)
class Sound:
    """What was found at one span. reason: why it cannot be used, "" where it can.

    key: digest of the file's content and the span, "" for a file that is not there. samples: without the `trimmed`
    ones, which were silent.
    """

    key: str
    samples: int = 0
    trimmed: int = 0
    loudness_db: float = 0.0
    ends_abruptly: bool = False
    reason: str = ""
    detail: str = ""

    @property
    def seconds(self) -> float:
        return self.samples / SAMPLE_RATE


Heard = tuple[Sound, np.ndarray | None]


def listen(recording: Recording, hearing: Hearing, known: frozenset[str] = frozenset()) -> list[Heard | str]:
    """Each span's Sound and, where it can be used, its waveform (samples,) int16; just its key where that is known."""
    digest = file_digest(recording.path)
    keys = [sound_key(digest, span, hearing) if digest else "" for span in recording.spans]
    if all(key in known for key in keys):
        return list(keys)
    try:
        waveform = read_audio(recording.path)
    except UserError as error:
        reason = "missing" if not recording.path.exists() else "unreadable"
        return _all_rejected(keys, reason, str(error).removeprefix(f"{recording.path}: "))
    except Exception as error:  # decoders have failures of their own; one file must not end the work on all others
        return _all_rejected(keys, "unreadable", f"{type(error).__name__}: {error}")
    return [
        key if key in known else hear(cut(waveform, span), key, span, len(waveform), hearing)
        for key, span in zip(keys, recording.spans, strict=True)
    ]


def _all_rejected(keys: list[str], reason: str, detail: str) -> list[Heard | str]:
    return [(Sound(key, reason=reason, detail=detail), None) for key in keys]


def file_digest(path: Path) -> str:
    """Digest of a file's bytes, "" where they cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError:
        return ""


def sound_key(digest: str, span: Span, hearing: Hearing) -> str:
    where = "" if span is None else f"@{span[0]:.3f}-{span[1]:.3f}"
    return f"{digest}{where}{'~trimmed' if hearing.trim_silence else ''}"


def cut(waveform: np.ndarray, span: Span) -> np.ndarray:
    if span is None:
        return waveform
    start, end = (max(0, round(seconds * SAMPLE_RATE)) for seconds in span)
    return waveform[start:end]


def hear(waveform: np.ndarray, key: str, span: Span, file_samples: int, hearing: Hearing) -> Heard:
    """Measures a float waveform, trimmed if asked for, and judges its length and loudness."""
    whole = len(waveform)
    if hearing.trim_silence and whole >= MIN_SECONDS * SAMPLE_RATE:
        waveform = trim_silence(waveform)
    seconds = len(waveform) / SAMPLE_RATE
    sound = Sound(key, len(waveform), whole - len(waveform))
    if span is not None and span[1] > file_samples / SAMPLE_RATE + 1:
        found = f"from {span[0]:.2f} to {span[1]:.2f} s, but the recording ends at {file_samples / SAMPLE_RATE:.2f} s"
        return dataclasses.replace(sound, reason="outside the recording", detail=found), None
    length = f"{seconds:.2f} s" + (f" ({whole / SAMPLE_RATE:.2f} s before trimming)" if sound.trimmed else "")
    if seconds < MIN_SECONDS:
        return dataclasses.replace(sound, reason="too short", detail=f"{length}, at least {MIN_SECONDS} s"), None
    sound = dataclasses.replace(sound, loudness_db=loudness_db(waveform), ends_abruptly=ends_abruptly(waveform))
    if seconds > hearing.max_seconds:
        found = f"{length}, at most {hearing.max_seconds:g} s"
        return dataclasses.replace(sound, reason="too long", detail=found), None
    if sound.loudness_db < SILENT_DB:
        found = f"loudness {sound.loudness_db:.0f} dB, at least {SILENT_DB:.0f} dB"
        return dataclasses.replace(sound, reason="silent", detail=found), None
    return sound, int16_from_waveform(waveform)


def ends_abruptly(waveform: np.ndarray) -> bool:
    ending = waveform[-round(ENDING_SECONDS * SAMPLE_RATE) :]
    return loudness_db(ending) > max(loudness_db(waveform) + ABRUPT_DB, SILENT_DB)


# --- in worker processes ----------------------------------------------------------------------------------------------


def listen_ahead(
    groups: Iterable[list[Recording]], hearing: Hearing, known: frozenset[str], workers: int, ahead: int = 2
) -> Generator[list[Heard | str], None, None]:
    """`listen` to every recording of every group, in order, the next `ahead` groups being decoded meanwhile.

    workers: processes; 0 decodes in this one. Raises UserError where a worker is killed.
    """
    if workers == 0:
        for group in groups:
            yield [heard for recording in group for heard in listen(recording, hearing, known)]
        return
    # Not forked: JAX has threads, whose locks a forked child would inherit.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(hearing, known))
    pending: list[list[Future[list[Heard | str]]]] = []
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
            "what is finished is kept"
        ) from None
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


_worker_settings: tuple[Hearing, frozenset[str]]


def _start_worker(hearing: Hearing, known: frozenset[str]) -> None:
    global _worker_settings  # known can be large: sent once a process, not with every file
    _worker_settings = (hearing, known)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent is killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _listen(recording: Recording) -> list[Heard | str]:
    return listen(recording, *_worker_settings)


def _submit(executor: Executor, group: list[Recording]) -> list[Future[list[Heard | str]]]:
    return [executor.submit(_listen, recording) for recording in group]


def _results(futures: list[Future[list[Heard | str]]]) -> list[Heard | str]:
    return [heard for future in futures for heard in future.result()]
