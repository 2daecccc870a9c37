"""Recordings without transcripts: cut at pauses, what is said in each part written down by Whisper, as a list to read.

faster-whisper does both, and has silero's detector of voices inside. What it finds is a file of JSON lines that
`prepare` reads like any other, and that a person may correct: a recording that is in it is not listened to again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soxr

from tortoise_jax.audio import SAMPLE_RATE, read_audio
from tortoise_jax.data.readers.names import recordings_below, speaker_of, text_lines
from tortoise_jax.data.recordings import file_digest
from tortoise_jax.errors import UserError, count_of, first_line
from tortoise_jax.files import write_atomically

WHISPER_RATE = 16_000
PAUSE_SECONDS = 0.3  # between two parts of a recording
JOINED_OVER_SECONDS = 0.8  # pauses that a clip may hold, so that it is longer than a few words
MARGIN_SECONDS = 0.15  # of what is around a part, so that no first or last sound is lost

Span = tuple[float, float]  # seconds


@dataclasses.dataclass(frozen=True)
class Listening:
    """How recordings are heard. model: a folder of a Whisper model in CTranslate2's format. language: "de", or None for
    what the recording's first part sounds like. seconds: of the longest clip. channel: see `read_audio`."""

    model: Path
    language: str | None
    seconds: float
    channel: int | str = 1


def transcribe(inputs: Sequence[Path], file: Path, listening: Listening) -> None:
    """Writes what is said in every recording of the inputs, folders or files, as JSON lines; keeps what is there.

    A recording that cannot be read, or in which nobody speaks, is a line without text: it is in the report too.
    Raises UserError where there is no recording, model or faster-whisper.
    """
    recordings = [recording for path in inputs for recording in _recordings_of(path)]
    rows = _rows(file)
    known = {row.get("digest") for row in rows}
    missing = [(recording, digest) for recording in recordings if (digest := file_digest(recording)) not in known]
    if not missing:
        return
    model = _load(listening.model)
    for number, (recording, digest) in enumerate(missing, start=1):
        try:
            found = list(_said(recording, model, listening))
        except RuntimeError as error:  # of CTranslate2, such as too little memory
            kept = f"; {count_of(len(rows), 'clip')} are kept in {file}" if file.exists() else ""
            raise UserError(f"{recording}: Whisper failed ({first_line(error)}){kept}") from None
        about = {"audio": str(recording.absolute()), "speaker": speaker_of(recording), "digest": digest}
        rows += [about | part for part in found]
        write_atomically(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        print(f"transcribed {number} of {len(missing)}: {recording}: {count_of(len(found), 'clip')}", flush=True)
    print(f"transcripts: {file}; listen to some, correct what is wrong there, and run again", flush=True)


def _recordings_of(path: Path) -> list[Path]:
    if not path.exists():
        raise UserError(f"{path}: there is no such file or folder")
    found = recordings_below(path) if path.is_dir() else [path]
    if not found:
        raise UserError(f"{path}: holds no recording to transcribe")
    return found


def _rows(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    try:
        rows = [json.loads(text) for _, text in text_lines(file) if text.strip()]
    except ValueError as error:
        raise UserError(f"{file}: not JSON lines ({first_line(error)}); put it right, or remove it") from None
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{file}: not JSON lines of objects; put it right, or remove it")
    return rows


def _load(folder: Path) -> Any:
    try:
        from faster_whisper import WhisperModel
    except ImportError:
        raise UserError("--transcribe needs faster-whisper: pip install 'tortoise_jax[transcribe]'") from None
    if not (folder / "model.bin").is_file():
        raise UserError(
            f"--transcribe {folder}: expected a folder with a Whisper model in CTranslate2's format (model.bin), such "
            "as the files of Systran/faster-whisper-large-v3 on the Hugging Face hub"
        )
    try:
        return WhisperModel(str(folder), local_files_only=True)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"--transcribe {folder}: no Whisper model ({first_line(error)})") from None


def _said(recording: Path, model: Any, listening: Listening) -> Iterator[dict[str, Any]]:
    """{"text", "start", "end"} of each part of a recording; {"text": ""} where there is none."""
    try:
        waveform = read_audio(recording, listening.channel)
    except UserError:
        yield {"text": ""}  # the report says why
        return
    heard = soxr.resample(waveform, SAMPLE_RATE, WHISPER_RATE).astype(np.float32)
    language, spans = listening.language, spoken(heard, listening.seconds)
    for start, end in spans:
        part = heard[round(start * WHISPER_RATE) : round(end * WHISPER_RATE)]
        segments, about = model.transcribe(part, language=language, condition_on_previous_text=False)
        language = language or about.language
        text = " ".join(segment.text.strip() for segment in segments).strip()
        yield {"text": text, "start": round(start, 3), "end": round(end, 3)}
    if not spans:
        yield {"text": ""}


def spoken(heard: np.ndarray, longest: float) -> list[Span]:
    """The parts of a recording (samples,) at 16 kHz in which somebody speaks, each at most `longest` seconds."""
    from faster_whisper.vad import VadOptions, get_speech_timestamps

    options = VadOptions(
        max_speech_duration_s=longest - 2 * MARGIN_SECONDS,
        min_silence_duration_ms=round(1000 * PAUSE_SECONDS),
        speech_pad_ms=round(1000 * MARGIN_SECONDS),
    )
    found = get_speech_timestamps(heard, options)
    return joined([(part["start"] / WHISPER_RATE, part["end"] / WHISPER_RATE) for part in found], longest)


def joined(spans: Sequence[Span], longest: float) -> list[Span]:
    """Neighbours over short pauses as one, as long as it is no longer than `longest` seconds."""
    clips: list[Span] = []
    for start, end in spans:
        if clips and start - clips[-1][1] <= JOINED_OVER_SECONDS and end - clips[-1][0] <= longest:
            clips[-1] = (clips[-1][0], end)
        else:
            clips.append((start, end))
    return clips
