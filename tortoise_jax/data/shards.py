"""Stores the finished work of a preparation: the sounds of each group of recordings, and their codes and waveforms.

A group is finished when `finished/KEY.json` exists. The key is a digest of all that decides the group's content (the
files with their size and time, the spans, the dVAE, the limits), so a killed run goes on with the missing groups,
whichever host did the others. A sound that another group has already encoded is copied from there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tortoise_jax.data.clips import Record, Sound
from tortoise_jax.data.dataset import SHARDS
from tortoise_jax.data.recordings import Recording
from tortoise_jax.files import digest_of, is_partial, remove_partials, write_atomically

FINISHED = "finished"
SHARD_NAME = re.compile(r"\d{5}-[0-9a-f]{16}\.bin")
LAYOUT = 1  # raise it when a record, a group's file or a reason to reject a sound changes


# The fields of a sound as a group's file has them: what was measured is an object of its own.
MEASURED = ("key", "samples", "trimmed", "loudness_db", "ends_abruptly", "reason", "detail")
STORED = ("shard", "offset", "codes", "codes_crc32", "waveform_crc32")


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
    out: Path, number: int, key: str, codes_key: str, sounds: Sequence[Sound], records: Sequence[Record | None]
) -> list[Sound]:
    """Writes a group's shard, then its `finished` file; returns the sounds with the offsets of their records.

    records: one for each sound, None where it cannot be used. codes_key: digest of what decides codes (dVAE, mel).
    """
    parts: list[bytes] = []
    stored: list[Sound] = []
    offset = 0
    for sound, record in zip(sounds, records, strict=True):
        if record is None:
            stored.append(sound)
            continue
        codes, waveform = record.codes.astype("<u2").tobytes(), record.waveform.astype("<i2").tobytes()
        stored.append(
            dataclasses.replace(
                sound,
                offset=offset,
                codes=len(record.codes),
                codes_crc32=zlib.crc32(codes),
                waveform_crc32=zlib.crc32(waveform),
            )
        )
        parts += (codes, waveform)
        offset += len(codes) + len(waveform)
    shard = ""
    if parts:
        content = b"".join(parts)
        shard = f"{number:05d}-{_content_digest(content)}.bin"
        if not is_whole(out, shard):
            write_atomically(out / SHARDS / shard, content)
        stored = [dataclasses.replace(sound, shard=shard) if sound.codes else sound for sound in stored]
    group = {"key": key, "codes_key": codes_key, "shard": shard, "sounds": [_to_json(sound) for sound in stored]}
    write_atomically(out / FINISHED / f"{key}.json", json.dumps(group))
    return stored


def read_group(out: Path, key: str, verify: bool = False) -> list[Sound] | None:
    """The sounds of a finished group, None if it is not finished.

    verify: also None if its shard is damaged, which reads all of the shard.
    """
    found = _finished(out / FINISHED / f"{key}.json")
    if found is None or (verify and found["shard"] and not is_whole(out, found["shard"])):
        return None
    return _sounds(found)


def is_whole(out: Path, shard: str) -> bool:
    """Whether a shard exists and has the content it is named after."""
    path = out / SHARDS / shard
    try:
        return bool(SHARD_NAME.fullmatch(shard)) and _content_digest(path.read_bytes()) == path.stem.split("-")[1]
    except OSError:
        return False


def reusable(out: Path, codes_key: str) -> dict[str, Sound]:
    """The sounds that finished groups encoded with the same dVAE, by their key."""
    found: dict[str, Sound] = {}
    for path in sorted((out / FINISHED).glob("*.json")):
        group = _finished(path)
        if group is not None and group["codes_key"] == codes_key:
            found |= {sound.key: sound for sound in _sounds(group) if sound.shard}
    return found


def read_record(out: Path, sound: Sound) -> Record | None:
    """A sound's record, or None where it is not what was written."""
    try:
        with (out / SHARDS / sound.shard).open("rb") as file:
            file.seek(sound.offset)
            codes, waveform = file.read(2 * sound.codes), file.read(2 * sound.samples)
    except OSError:
        return None
    if (zlib.crc32(codes), zlib.crc32(waveform)) != (sound.codes_crc32, sound.waveform_crc32):
        return None
    return Record(np.frombuffer(codes, "<u2"), np.frombuffer(waveform, "<i2"))


def remove_others(out: Path, keys: set[str], shards: set[str]) -> None:
    """Removes the groups and shards that a finished data set does not need, and what killed runs left half-written."""
    foreign = set(not_ours(out))
    remove_partials(out)
    for folder, needed in ((FINISHED, {f"{key}.json" for key in keys}), (SHARDS, shards)):
        remove_partials(out / folder)
        for path in (out / folder).glob("*"):
            if path.name not in needed and path not in foreign:
                path.unlink(missing_ok=True)


def not_ours(out: Path) -> list[Path]:
    """What no preparation wrote in the folders of groups and shards: there, content and name belong together."""
    groups = {path: _finished(path) for path in sorted((out / FINISHED).glob("*"))}
    named = {group["shard"] for group in groups.values() if group}
    shards = sorted((out / SHARDS).glob("*"))
    foreign = [path for path, group in groups.items() if not group]
    foreign += [path for path in shards if path.name not in named and not is_whole(out, path.name)]
    return [path for path in foreign if not is_partial(path)]


def _content_digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _finished(path: Path) -> dict[str, Any] | None:
    """A group's file; None for anything else."""
    try:
        group = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return group if isinstance(group, dict) and group.get("key") == path.stem and "codes_key" in group else None


def _sounds(group: dict[str, Any]) -> list[Sound]:
    return [Sound(**one["sound"], **{name: one[name] for name in STORED}) for one in group["sounds"]]


def _to_json(sound: Sound) -> dict[str, Any]:
    fields = lambda names: {name: getattr(sound, name) for name in names}
    return {"sound": fields(MEASURED), **fields(STORED)}
