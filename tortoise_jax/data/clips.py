"""A clip on its way from a line of a manifest to a batch. What is known of it grows:

manifests.py    Clip: who says what in which recording
recordings.py   Sound: how long and how loud the recording is, decoded once for all clips of it
encoding.py     Record: its codes and its waveform
shards.py       Sound: where its record is stored
filters.py      Clip: the cleaned text and its ids, or the reason why it is rejected
dataset.py      Clip: one line of the index
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from tortoise_jax.audio import SAMPLE_RATE


@dataclasses.dataclass(frozen=True, slots=True)
class Sound:
    """The audio of a clip. reason: why it cannot be used, one of `filters.Reason`, or "" where it can; detail: a note.

    key: digest of the file's content and the span, "" for a file that does not exist. samples: at 22050 Hz, without
    the `trimmed` ones, which were silent. ends_abruptly: somebody still speaks at its end.

    Once its record is written: `codes` codes (without stop) and the waveform, at byte `offset` of the file `shard`,
    with their checksums; shard is "" before, and where the sound cannot be used.
    """

    key: str = ""
    samples: int = 0
    trimmed: int = 0
    loudness_db: float = 0.0
    ends_abruptly: bool = False
    reason: str = ""
    detail: str = ""
    shard: str = ""
    offset: int = 0
    codes: int = 0
    codes_crc32: int = 0
    waveform_crc32: int = 0

    @property
    def seconds(self) -> float:
        return self.samples / SAMPLE_RATE


@dataclasses.dataclass(frozen=True, slots=True)
class Clip:
    """One transcript and its recording.

    id: its name; split: "train", "validation", or "" if the manifest gives none. file and number: the line of the
    manifest; audio: the recording, of which the clip is the part from `start` to `end` (seconds), or all (None).
    A data set read from disk keeps none of these last five, nor `cleaned` and `text_ids`.

    reason and detail: why it is rejected, "" while it is not. cleaned: the text as the tokenizer is given it;
    text_ids: its tokens, `text_tokens` of them, without start and stop.
    """

    id: str
    text: str
    speaker: str
    split: str = ""
    file: str = ""
    number: int = 0
    audio: Path = Path()
    start: float | None = None
    end: float | None = None
    reason: str = ""
    detail: str = ""
    sound: Sound = Sound()
    cleaned: str = ""
    text_ids: tuple[int, ...] = ()
    text_tokens: int = 0

    @property
    def where(self) -> str:
        return f"{self.file}:{self.number}"

    @property
    def span(self) -> tuple[float, float] | None:
        """Seconds from and to; None: the whole recording."""
        return None if self.start is None or self.end is None else (self.start, self.end)

    @property
    def samples(self) -> int:
        return self.sound.samples

    @property
    def seconds(self) -> float:
        return self.sound.seconds

    @property
    def codes(self) -> int:
        """How many codes it has, without stop."""
        return self.sound.codes


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """What a shard holds of a clip: codes (codes,) uint16 and waveform (samples,) int16 at 22050 Hz."""

    codes: np.ndarray
    waveform: np.ndarray
