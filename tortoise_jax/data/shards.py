"""Finished work of a data set in the making: what was heard in a group of recordings, and its codes and waveforms.

A group is done when `finished/KEY.json` is there. Its key says all that decides its content: the files with their size
and time, the spans, the dVAE, the limits; so a run that was killed goes on with the groups that are missing, whichever
host did the others. A clip that some other group has already encoded is copied from there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tortoise_jax.data.dataset import SHARDS
from tortoise_jax.data.recordings import Recording, Sound
from tortoise_jax.files import remove_partials, write_atomically

FINISHED = "finished"
LAYOUT = 1  # raise it when a record, a group's file or what a sound is rejected for changes


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A sound and, where it can be used, its record: `codes` codes and the waveform, at `offset` of a shard."""

    sound: Sound
    shard: str = ""
    offset: int = 0
    codes: int = 0
    codes_crc32: int = 0
    waveform_crc32: int = 0


@dataclasses.dataclass(frozen=True)
class Content:
    """A record's arrays: codes uint16, waveform int16."""

    codes: np.ndarray
    waveform: np.ndarray


def digest_of(value: Any) -> str:
    """A short digest of anything JSON can hold."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def group_key(group: Sequence[Recording], settings: dict[str, Any]) -> str:
    """Digest of a group's files (path, size, time of change), spans and settings."""
    return digest_of([LAYOUT, settings, [[*_stat(recording.path), recording.spans] for recording in group]])


def _stat(path: Path) -> list[Any]:
    try:
        stat = path.stat()
    except OSError:
        return [str(path), None, None]
    return [str(path), stat.st_size, stat.st_mtime_ns]


def write_group(
    out: Path, number: int, key: str, codes_key: str, sounds: Sequence[Sound], contents: Sequence[Content | None]
) -> list[Encoded]:
    """Writes a group's shard, then its `finished` file. contents: None where a sound cannot be used."""
    record = b""
    parts: list[bytes] = []
    placed: list[Encoded] = []
    offset = 0
    for sound, content in zip(sounds, contents, strict=True):
        if content is None:
            placed.append(Encoded(sound))
            continue
        codes, waveform = content.codes.astype("<u2").tobytes(), content.waveform.astype("<i2").tobytes()
        record = codes + waveform
        placed.append(Encoded(sound, "", offset, len(content.codes), zlib.crc32(codes), zlib.crc32(waveform)))
        parts.append(record)
        offset += len(record)
    shard = ""
    if parts:
        whole = b"".join(parts)
        shard = f"{number:05d}-{_content_digest(whole)}.bin"
        if not is_whole(out, shard):
            write_atomically(out / SHARDS / shard, whole)
        placed = [dataclasses.replace(one, shard=shard) if one.codes else one for one in placed]
    lines = {"key": key, "codes_key": codes_key, "shard": shard, "sounds": [dataclasses.asdict(one) for one in placed]}
    write_atomically(out / FINISHED / f"{key}.json", json.dumps(lines))
    return placed


def read_group(out: Path, key: str, verify: bool = False) -> list[Encoded] | None:
    """A finished group, or None where it is not there. verify: nor where its shard is not whole, which reads it all."""
    found = _finished(out / FINISHED / f"{key}.json")
    if found is None or (verify and found["shard"] and not is_whole(out, found["shard"])):
        return None
    return _sounds(found)


def is_whole(out: Path, shard: str) -> bool:
    """Whether a shard is there with the content it is named after."""
    path = out / SHARDS / shard
    try:
        return _content_digest(path.read_bytes()) == path.stem.split("-")[1]
    except OSError:
        return False


def reusable(out: Path, codes_key: str) -> dict[str, Encoded]:
    """Sounds encoded by earlier groups with the same dVAE, by their key."""
    found: dict[str, Encoded] = {}
    for path in sorted((out / FINISHED).glob("*.json")):
        group = _finished(path)
        if group is not None and group["codes_key"] == codes_key:
            found |= {one.sound.key: one for one in _sounds(group) if one.shard}
    return found


def read_content(out: Path, one: Encoded) -> Content | None:
    """A record's arrays, or None where they are not what was written."""
    try:
        with (out / SHARDS / one.shard).open("rb") as file:
            file.seek(one.offset)
            codes, waveform = file.read(2 * one.codes), file.read(2 * one.sound.samples)
    except OSError:
        return None
    if (zlib.crc32(codes), zlib.crc32(waveform)) != (one.codes_crc32, one.waveform_crc32):
        return None
    return Content(np.frombuffer(codes, "<u2"), np.frombuffer(waveform, "<i2"))


def remove_others(out: Path, keys: set[str], shards: set[str]) -> None:
    """Removes what no group of a finished data set needs, and what killed runs left half-written."""
    remove_partials(out)
    for folder, names, needed in (
        (FINISHED, "[0-9a-f]" * 32 + ".json", {f"{key}.json" for key in keys}),
        (SHARDS, "[0-9]" * 5 + "-" + "[0-9a-f]" * 16 + ".bin", shards),
    ):
        remove_partials(out / folder)
        for path in (out / folder).glob(names):
            if path.name not in needed:
                path.unlink(missing_ok=True)


def _content_digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _finished(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def _sounds(group: dict[str, Any]) -> list[Encoded]:
    return [Encoded(**{**one, "sound": Sound(**one["sound"])}) for one in group["sounds"]]
