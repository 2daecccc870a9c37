"""A prepared data set on disk: text ids, codes and waveforms of every clip, checked as they are read.

    dataset.json        what it was made with and the digests of the three files below; written last
    clips.jsonl         one line per clip: id, text, speaker, split, lengths, where its record is and its checksums
    text_ids.bin        the text ids of all clips, joined in order, uint16
    tokenizer.json      the tokenizer that made the ids
    shards/NAME.bin     records: a clip's codes (uint16), then its waveform (int16 at 22050 Hz); all little-endian

An index and plain arrays are all that training needs: it reads any clip at random, from many hosts at once, and no
library has to exist in ten years. Shards are named after their content and never changed.
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
from tortoise_jax.data.clips import Clip, Record, Sound
from tortoise_jax.data.splits import SPLITS
from tortoise_jax.errors import UserError
from tortoise_jax.files import write_atomically
from tortoise_jax.text.tokenizer import Tokenizer

FORMATS = "tortoise_jax data set "
FORMAT = f"{FORMATS}1"
HEADER, CLIPS, TEXT_IDS, SHARDS, TOKENIZER = "dataset.json", "clips.jsonl", "text_ids.bin", "shards", "tokenizer.json"
REMEDY = "prepare the data set again (what is not damaged is kept)"


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A data set opened for reading. Reading is thread-safe, keeps no file open and checks every array's checksum."""

    path: Path
    header: dict[str, Any]
    clips: tuple[Clip, ...]

    @classmethod
    def open(cls, path: str | Path) -> Dataset:
        """Raises UserError where there is no complete data set of this format."""
        path = Path(path)
        header = _header(path)
        lines = _verified(path, header, CLIPS).decode().split("\n")[:-1]
        return cls(path, header, tuple(_clip_from_line(line) for line in lines))

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the text ids; a checkpoint trained on them must carry it."""
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
        """Codes and waveform of clip i."""
        return Record(self.codes(i), self.waveform(i))

    def text_ids(self, i: int) -> np.ndarray:
        """Token ids of clip i's text, without start and stop: (text_tokens,) uint16."""
        start = self._text_offsets[i]
        return self._all_text_ids[start : start + self.clips[i].text_tokens]

    def codes(self, i: int) -> np.ndarray:
        """dVAE codes of clip i, without start and stop: (samples // 1024 + 1,) uint16."""
        sound = self.clips[i].sound
        codes = self._read(i, sound.offset, sound.codes, "<u2")
        return self._checked(codes, sound.codes_crc32, i, f"the codes in {sound.shard}")

    def waveform(self, i: int) -> np.ndarray:
        """Clip i at 22050 Hz: (samples,) int16."""
        sound = self.clips[i].sound
        samples = self._read(i, sound.offset + 2 * sound.codes, sound.samples, "<i2")
        return self._checked(samples, sound.waveform_crc32, i, f"the waveform in {sound.shard}")

    def verify(self) -> None:
        """Reads everything once. Raises UserError naming the first record that is not what was written."""
        for i in range(len(self)):
            self.text_ids(i)
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

    def _read(self, i: int, start: int, count: int, dtype: str) -> np.ndarray:
        """`count` numbers of two bytes from byte `start` of the shard of clip i."""
        path = self.path / SHARDS / self.clips[i].sound.shard
        try:
            # An open file for each read: a large data set has more shards than a process may keep open.
            with path.open("rb") as file:
                file.seek(start)
                content = file.read(count * 2)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); {REMEDY}") from error
        if len(content) < count * 2:
            raise UserError(f"{path}: ends inside the record of clip {self.clips[i].id}; {REMEDY}")
        return np.frombuffer(content, dtype)

    def _checked(self, array: np.ndarray, crc32: int, i: int, where: str) -> np.ndarray:
        if zlib.crc32(array.tobytes()) != crc32:
            raise UserError(
                f"{self.path}: clip {i} ({self.clips[i].id}) is corrupt: {where} is not what was written "
                f"(checksum {zlib.crc32(array.tobytes()):08x}, expected {crc32:08x}); {REMEDY}"
            )
        return array


def write_index(path: Path, clips: Sequence[Clip], tokenizer: Tokenizer, about: dict[str, Any]) -> None:
    """Makes a data set of clips whose shards are written. about: more fields of the header, which is written last."""
    files = {
        CLIPS: "".join(_line_of_clip(clip) + "\n" for clip in clips).encode(),
        TEXT_IDS: b"".join(np.array(clip.text_ids, "<u2").tobytes() for clip in clips),
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


def _line_of_clip(clip: Clip) -> str:
    lengths = {"samples": clip.samples, "text_tokens": clip.text_tokens, "codes": clip.codes}
    about = {name: getattr(clip, name) for name in ("id", "text", "speaker", "split")}
    stored = {name: getattr(clip.sound, name) for name in ("shard", "offset", "codes_crc32", "waveform_crc32")}
    return json.dumps(about | lengths | stored, ensure_ascii=False)


def _clip_from_line(line: str) -> Clip:
    fields = json.loads(line)
    about = {name: fields.pop(name) for name in ("id", "text", "speaker", "split", "text_tokens")}
    return Clip(**about, sound=Sound(**fields))


def is_dataset(path: str | Path) -> bool:
    """Whether a folder holds a finished data set, of whatever version; another program's dataset.json is none."""
    try:
        header = json.loads((Path(path) / HEADER).read_bytes())
    except OSError:
        return False
    except ValueError:
        return (Path(path) / TEXT_IDS).is_file()  # ours, damaged
    return isinstance(header, dict) and str(header.get("format")).startswith(FORMATS)


def inputs_of(path: str | Path) -> list[dict[str, str]]:
    """What a data set was made of: path, format and digest of each input; nothing where an older version made it."""
    try:
        return list(_header(Path(path)).get("inputs", []))
    except UserError:
        return []


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
