"""What is read is what was written, or an error that names the record."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.support.small_dataset import small_dataset
from tortoise_jax.data.dataset import Dataset, is_dataset
from tortoise_jax.errors import UserError
from tortoise_jax.files import write_atomically
from tortoise_jax.text.tokenizer import Tokenizer

CLIPS = [
    ("ann", "train", 3000, 4),
    ("bob", "train", 1023, 1),
    ("ann", "validation", 1024, 2),
    ("ann", "train", 5000, 3),
]


@pytest.fixture
def made(tmp_path: Path) -> Dataset:
    return small_dataset(tmp_path / "set", CLIPS)


def shard_of(made: Dataset) -> Path:
    return made.path / "shards" / made.clips[0].sound.shard


def flip(path: Path, index: int) -> None:
    content = bytearray(path.read_bytes())
    content[index] ^= 1
    path.write_bytes(content)


def test_every_record_comes_back(made):
    rng = np.random.default_rng(0)
    for i, (_, _, samples, _) in enumerate(CLIPS):
        codes = rng.integers(64, size=samples // 1024 + 1)
        waveform = 100 * i + rng.integers(100, size=samples)
        record = made.read(i)
        np.testing.assert_array_equal(record.codes, codes)
        np.testing.assert_array_equal(record.waveform, waveform)
        assert (record.codes.dtype, record.waveform.dtype, made.text_ids(i).dtype) == (np.uint16, np.int16, np.uint16)
    for i, (_, _, _, tokens) in enumerate(CLIPS):
        np.testing.assert_array_equal(made.text_ids(i), rng.integers(1, 255, size=tokens))
    made.verify()


def test_header_splits_and_speakers(made):
    assert made.header["clips"] == {"train": 3, "validation": 1}
    assert made.header["seconds"] == {"train": round(9023 / 22050, 3), "validation": round(1024 / 22050, 3)}
    assert made.header["speakers"] == 2
    assert made.split("train").tolist() == [0, 1, 3]
    assert made.split("validation").tolist() == [2]
    assert made.of_speaker("ann", "train").tolist() == [0, 3]
    assert made.of_speaker("carl", "train").tolist() == []
    assert made.tokenizer().digest == Tokenizer.default().digest
    with pytest.raises(ValueError, match="test"):
        made.split("test")


def test_a_corrupt_code_names_its_clip(made):
    flip(shard_of(made), made.clips[3].sound.offset)
    made.codes(0)
    made.waveform(3)
    with pytest.raises(UserError, match=r"clip 3 \(clip3\) is corrupt: the codes"):
        made.verify()


def test_a_corrupt_sample_names_its_clip(made):
    flip(shard_of(made), made.clips[1].sound.offset + 2 * made.clips[1].codes)
    made.codes(1)
    with pytest.raises(UserError, match=r"clip 1 \(clip1\) is corrupt: the waveform"):
        made.read(1)


def test_a_truncated_shard_names_the_clip(made):
    shard = shard_of(made)
    shard.write_bytes(shard.read_bytes()[:-1])
    made.read(2)
    with pytest.raises(UserError, match="ends inside the record of clip clip3"):
        made.read(3)


def test_a_missing_shard_is_named(made):
    shard_of(made).unlink()
    with pytest.raises(UserError, match=r"00000-\w+\.bin: cannot be read"):
        made.read(0)


@pytest.mark.parametrize("name", ["clips.jsonl", "text_ids.bin", "tokenizer.json"])
def test_every_other_file_is_checked(made, name):
    flip(made.path / name, 0)

    def read_it_all() -> None:
        again = Dataset.open(made.path)
        again.text_ids(0)
        again.tokenizer()

    with pytest.raises(UserError, match=rf"{name}: is not the file dataset.json describes"):
        read_it_all()


def test_what_is_no_data_set(tmp_path, made):
    assert is_dataset(made.path)
    assert not is_dataset(tmp_path)
    with pytest.raises(UserError, match="no data set here"):
        Dataset.open(tmp_path)
    header = made.path / "dataset.json"
    header.write_text(json.dumps({**made.header, "format": "tortoise_jax data set 0"}))
    with pytest.raises(UserError, match="format is 'tortoise_jax data set 0', expected"):
        Dataset.open(made.path)
    header.write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        Dataset.open(made.path)


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, "old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "full").touch()
    with pytest.raises(UserError, match="cannot be written"):
        write_atomically(tmp_path / "folder", "new")
    with pytest.raises(UserError, match="cannot be written"):
        write_atomically(path / "below a file", "new")
    assert path.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
