"""A prepared data set on disk: text ids, codes and waveforms of every clip, checked as they are read.

    dataset.json        what it was made with and the digests of the three files below; written last
    clips.jsonl         a line a clip: id, text, speaker, split, lengths, where its record is and its checksums
    text_ids.bin        the clips' text ids, one behind the other, uint16
    tokenizer.json      the tokenizer the ids are of
    shards/NAME.bin     records: a clip's codes (uint16), then its waveform (int16 at 22050 Hz); all little-endian

Plain arrays behind an index, because that is all training asks for: any clip at random, by many hosts at once, without
a library that has to be there in ten years. Shards are named after their content and never changed.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tortoise_jax.audio import SAMPLE_RATE
from tortoise_jax.errors import UserError
from tortoise_jax.files import write_atomically
from tortoise_jax.text.tokenizer import Tokenizer

FORMAT = "tortoise_jax data set 1"
HEADER, CLIPS, TEXT_IDS, SHARDS, TOKENIZER = "dataset.json", "clips.jsonl", "text_ids.bin", "shards", "tokenizer.json"
SPLITS = ("train", "validation")
REMEDY = "prepare the data set again (what is whole is kept)"


@dataclasses.dataclass(frozen=True)
class Clip:
    """One line of clips.jsonl. Lengths: samples at 22050 Hz, text_tokens without start and stop, codes without stop."""

    id: str
    text: str
    speaker: str
    split: str
    samples: int
    text_tokens: int
    codes: int
    shard: str
    offset: int
    codes_crc32: int
    waveform_crc32: int


@dataclasses.dataclass(frozen=True)
class Record:
    """text_ids (text_tokens,) uint16, codes (codes,) uint16, waveform (samples,) int16."""

    text_ids: np.ndarray
    codes: np.ndarray
    waveform: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Reading is thread-safe and keeps no file open; every array is compared with its checksum."""

    path: Path
    header: dict[str, Any]
    clips: tuple[Clip, ...]

    @classmethod
    def open(cls, path: str | Path) -> Dataset:
        """Raises UserError where there is no complete data set of this format."""
        path = Path(path)
        header = _header(path)
        lines = _verified(path, header, CLIPS).decode().split("\n")[:-1]
        return cls(path, header, tuple(Clip(**json.loads(line)) for line in lines))

    def tokenizer(self) -> Tokenizer:
        """The tokenizer the text ids are of, which a checkpoint trained on them must carry."""
        content = _verified(self.path, self.header, TOKENIZER).decode()
        return Tokenizer.from_json(content, str(self.path / TOKENIZER))

    def __len__(self) -> int:
        return len(self.clips)

    def split(self, name: str) -> np.ndarray:
        """Indices of the clips of "train" or "validation", in order, int64."""
        if name not in SPLITS:
            raise ValueError(f"split {name!r}: expected one of {SPLITS}")
        return np.array([i for i, clip in enumerate(self.clips) if clip.split == name], np.int64)

    def of_speaker(self, speaker: str, split: str) -> np.ndarray:
        """Indices of a speaker's clips in a split, in order, int64; none if there is no such speaker."""
        return self._by_speaker.get((speaker, split), np.zeros(0, np.int64))

    def read(self, i: int) -> Record:
        return Record(self.text_ids(i), self.codes(i), self.waveform(i))

    def text_ids(self, i: int) -> np.ndarray:
        start = self._text_offsets[i]
        return self._all_text_ids[start : start + self.clips[i].text_tokens]

    def codes(self, i: int) -> np.ndarray:
        clip = self.clips[i]
        return self._checked(self._part(clip, 0, clip.codes, "<u2"), clip.codes_crc32, i, f"the codes in {clip.shard}")

    def waveform(self, i: int) -> np.ndarray:
        clip = self.clips[i]
        samples = self._part(clip, 2 * clip.codes, clip.samples, "<i2")
        return self._checked(samples, clip.waveform_crc32, i, f"the waveform in {clip.shard}")

    def verify(self) -> None:
        """Reads everything once. Raises UserError naming the first record that is not what was written."""
        for i in range(len(self)):
            self.read(i)

    @functools.cached_property
    def _by_speaker(self) -> dict[tuple[str, str], np.ndarray]:
        found: dict[tuple[str, str], list[int]] = {}
        for i, clip in enumerate(self.clips):
            found.setdefault((clip.speaker, clip.split), []).append(i)
        return {key: np.array(members, np.int64) for key, members in found.items()}

    @functools.cached_property
    def _all_text_ids(self) -> np.ndarray:
        return np.frombuffer(_verified(self.path, self.header, TEXT_IDS), "<u2")

    @functools.cached_property
    def _text_offsets(self) -> np.ndarray:
        return np.cumsum([0, *(clip.text_tokens for clip in self.clips)])

    def _part(self, clip: Clip, skip: int, count: int, dtype: str) -> np.ndarray:
        path = self.path / SHARDS / clip.shard
        try:
            # An open file for each read: a large data set has more shards than a process may keep open.
            with path.open("rb") as file:
                file.seek(clip.offset + skip)
                content = file.read(count * 2)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); {REMEDY}") from error
        if len(content) < count * 2:
            raise UserError(f"{path}: ends inside the record of clip {clip.id}; {REMEDY}")
        return np.frombuffer(content, dtype)

    def _checked(self, array: np.ndarray, crc32: int, i: int, where: str) -> np.ndarray:
        if zlib.crc32(array.tobytes()) != crc32:
            raise UserError(
                f"{self.path}: clip {i} ({self.clips[i].id}) is corrupt: {where} is not what was written "
                f"(checksum {zlib.crc32(array.tobytes()):08x}, expected {crc32:08x}); {REMEDY}"
            )
        return array


def write_index(
    path: Path, clips: Sequence[Clip], text_ids: Sequence[np.ndarray], tokenizer: Tokenizer, about: dict[str, Any]
) -> None:
    """Makes a data set of shards that are there already. about: goes into the header, which is written last."""
    files = {
        CLIPS: "".join(json.dumps(dataclasses.asdict(clip), ensure_ascii=False) + "\n" for clip in clips).encode(),
        TEXT_IDS: b"".join(ids.astype("<u2").tobytes() for ids in text_ids),
        TOKENIZER: tokenizer.to_json().encode(),
    }
    samples = {name: sum(clip.samples for clip in clips if clip.split == name) for name in SPLITS}
    header = {
        "format": FORMAT,
        "clips": {name: sum(clip.split == name for clip in clips) for name in SPLITS},
        "seconds": {name: round(samples[name] / SAMPLE_RATE, 3) for name in SPLITS},
        "speakers": len({clip.speaker for clip in clips}),
        **about,
        "sha256": {name: sha256(content) for name, content in files.items()},
    }
    for name, content in files.items():
        write_atomically(path / name, content)
    write_atomically(path / HEADER, json.dumps(header, indent=2) + "\n")


def is_dataset(path: str | Path) -> bool:
    """Whether a folder holds a finished data set (of whatever version)."""
    return (Path(path) / HEADER).is_file()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _header(path: Path) -> dict[str, Any]:
    file = path / HEADER
    if not file.is_file():
        raise UserError(f"{path}: no data set here ({HEADER} is missing); make one: python -m tortoise_jax.prepare")
    try:
        header = json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error}); {REMEDY}") from error
    found = header.get("format") if isinstance(header, dict) else None
    if found != FORMAT:
        raise UserError(f'{file}: format is {found!r}, expected "{FORMAT}"; {REMEDY}')
    return header


def _verified(path: Path, header: dict[str, Any], name: str) -> bytes:
    try:
        content = (path / name).read_bytes()
    except OSError as error:
        raise UserError(f"{path / name}: cannot be read ({error.strerror}); {REMEDY}") from error
    if sha256(content) != header["sha256"][name]:
        raise UserError(f"{path / name}: is not the file {HEADER} describes; {REMEDY}")
    return content
