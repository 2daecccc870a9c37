"""The judges of speech, asked in processes of their own: who recognises words, voices and quality."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soxr

from tortoise_jax.audio import SAMPLE_RATE, SILENT_DB, loudness_db
from tortoise_jax.errors import UserError
from tortoise_jax.evaluation import judging

JUDGES = WORDS, LIKENESS, QUALITY = "words", "likeness", "quality"
SHORTEST_SECONDS = 0.25  # nothing can be said of less


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a judge says of clips: one answer for each, None where a clip is too short or silent; by: its name."""

    of_clips: list[Any]
    by: str


class UnavailableError(Exception):
    """A judge cannot be asked; the message says why."""


def check_python(python: str) -> None:
    """Raises UserError for what is no Python with numpy, before drafts are made that none could judge."""
    try:
        done = subprocess.run([python, "-c", "import numpy"], capture_output=True, text=True)
        why = last_line(done.stderr, done.returncode) if done.returncode else ""
    except OSError as error:
        why = error.strerror or str(error)
    if why:
        raise UserError(
            f"--judges {python}: {why}; expected a Python with numpy and the packages of the judges "
            f"({', '.join(JUDGES)}), e.g. .venv-judges/bin/python"
        )


def last_line(said: str, code: int) -> str:
    return (said.strip().splitlines() or [f"it ended with exit code {code}"])[-1]


def ask(judge: str, waveforms: Sequence[np.ndarray], options: dict[str, Any], python: str = sys.executable) -> Answers:
    """judge: one of JUDGES; waveforms (samples,) at 22050 Hz; python: which has the judge installed.

    Raises UnavailableError where it is not, or fails.
    """
    can_be_heard = [
        len(waveform) >= SHORTEST_SECONDS * SAMPLE_RATE and loudness_db(waveform) >= SILENT_DB for waveform in waveforms
    ]
    heard = [waveform for waveform, can in zip(waveforms, can_be_heard, strict=True) if can]
    with tempfile.TemporaryDirectory() as folder:
        resampled = (soxr.resample(waveform, SAMPLE_RATE, judging.RATE) for waveform in heard)
        np.savez(Path(folder) / judging.CLIPS, **{str(i): clip for i, clip in enumerate(resampled)})
        (Path(folder) / judging.OPTIONS).write_text(json.dumps(options))
        command = [python, "-W", "ignore", judging.__file__, judge, folder]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise UnavailableError(f"{python} cannot be started: {error.strerror}") from None
        if done.returncode:
            raise UnavailableError(f"{judge} failed: {last_line(done.stderr, done.returncode)}")
        found = json.loads((Path(folder) / judging.ANSWERS).read_text())
    if "missing" in found:
        raise UnavailableError(found["missing"])
    answers = iter(found["answers"])
    return Answers([next(answers) if can else None for can in can_be_heard], found["by"])
