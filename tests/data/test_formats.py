"""Files of the first version of the format, byte by byte: what was made then opens, and the same is written today."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from tortoise_jax.data import shards
from tortoise_jax.data.clips import Clip, Record, Sound
from tortoise_jax.data.dataset import Dataset, write_index
from tortoise_jax.data.filters import Reason
from tortoise_jax.text.tokenizer import Tokenizer

SHARD = "00003-b240c30f90f30c47.bin"
RECORD = b"\x03\x00" + b"\x01\x00\xff\xff\x02\x00"  # one code, three samples
CLIPS = (
    '{"id": "a", "text": "Grüße", "speaker": "ann", "split": "train", "samples": 3, "text_tokens": 2, "codes": 1, '
    f'"shard": "{SHARD}", "offset": 0, "codes_crc32": 1794392380, "waveform_crc32": 674570904}}\n'
    '{"id": "b", "text": "Hm", "speaker": "bob", "split": "validation", "samples": 3, "text_tokens": 1, "codes": 1, '
    f'"shard": "{SHARD}", "offset": 8, "codes_crc32": 1794392380, "waveform_crc32": 674570904}}\n'
)
TEXT_IDS = b"\x07\x00\x08\x00\x09\x00"
KEY, CODES_KEY = "0" * 32, "1" * 32
MEASURED = '"trimmed": 0, "loudness_db": -20.5, "ends_abruptly": false, "reason": "", "detail": ""'
GROUP = (
    f'{{"key": "{KEY}", "codes_key": "{CODES_KEY}", "shard": "{SHARD}", "sounds": ['
    f'{{"sound": {{"key": "k0", "samples": 3, {MEASURED}}}, "shard": "{SHARD}", "offset": 0, "codes": 1, '
    '"codes_crc32": 1794392380, "waveform_crc32": 674570904}, '
    '{"sound": {"key": "k1", "samples": 2, "trimmed": 7, "loudness_db": 0.0, "ends_abruptly": false, '
    '"reason": "too short", "detail": "0.00 s, at least 0.6 s"}, "shard": "", "offset": 0, "codes": 0, '
    '"codes_crc32": 0, "waveform_crc32": 0}, '
    f'{{"sound": {{"key": "k2", "samples": 3, {MEASURED}}}, "shard": "{SHARD}", "offset": 8, "codes": 1, '
    '"codes_crc32": 1794392380, "waveform_crc32": 674570904}]}'
)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A data set and a finished group, written without any code of the package but the tokenizer's."""
    tokenizer = Tokenizer.default().to_json()
    files = {"clips.jsonl": CLIPS.encode(), "text_ids.bin": TEXT_IDS, "tokenizer.json": tokenizer.encode()}
    header = {
        "format": "tortoise_jax data set 1",
        "clips": {"train": 1, "validation": 1},
        "seconds": {"train": 0.0, "validation": 0.0},
        "speakers": 2,
        "cleaner": "english",
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    }
    files |= {"dataset.json": (json.dumps(header, indent=2) + "\n").encode()}
    files |= {f"shards/{SHARD}": 2 * RECORD, f"finished/{KEY}.json": GROUP.encode()}
    for name, content in files.items():
        (tmp_path / "old" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "old" / name).write_bytes(content)
    return tmp_path / "old"


def test_a_data_set_of_the_first_version_opens(old):
    made = Dataset.open(old)
    made.verify()
    assert [(clip.id, clip.text, clip.speaker, clip.split) for clip in made.clips] == [
        ("a", "Grüße", "ann", "train"),
        ("b", "Hm", "bob", "validation"),
    ]
    assert [(clip.samples, clip.codes, clip.text_tokens) for clip in made.clips] == [(3, 1, 2), (3, 1, 1)]
    assert [made.text_ids(i).tolist() for i in (0, 1)] == [[7, 8], [9]]
    for i in (0, 1):
        assert made.codes(i).tolist() == [3]
        assert made.waveform(i).tolist() == [1, -1, 2]


def test_a_group_of_the_first_version_is_taken_as_finished(old):
    sounds = shards.read_group(old, KEY, verify=True)
    assert sounds is not None
    assert [(one.key, one.samples, one.trimmed, one.loudness_db, one.reason) for one in sounds] == [
        ("k0", 3, 0, -20.5, ""),
        ("k1", 2, 7, 0.0, Reason.TOO_SHORT),
        ("k2", 3, 0, -20.5, ""),
    ]
    assert sorted(shards.reusable(old, CODES_KEY)) == ["k0", "k2"]
    record = shards.read_record(old, sounds[2])
    assert record is not None
    assert (record.codes.tolist(), record.waveform.tolist()) == ([3], [1, -1, 2])


def test_the_same_files_are_written_today(old, tmp_path):
    record = Record(np.array([3], np.uint16), np.array([1, -1, 2], np.int16))
    good = [Sound(key, 3, loudness_db=-20.5) for key in ("k0", "k2")]
    short = Sound("k1", 2, 7, reason=Reason.TOO_SHORT, detail="0.00 s, at least 0.6 s")
    records = [record, None, record]
    stored = shards.write_group(tmp_path / "new", 3, KEY, CODES_KEY, [good[0], short, good[1]], records)
    clips = [
        Clip("a", "Grüße", "ann", "train", sound=stored[0], text_ids=(7, 8), text_tokens=2),
        Clip("b", "Hm", "bob", "validation", sound=stored[2], text_ids=(9,), text_tokens=1),
    ]
    write_index(tmp_path / "new", clips, Tokenizer.default(), {"cleaner": "english"})
    read = lambda root: {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert read(tmp_path / "new") == read(old)
