"""Folders of Hugging Face's datasets library, accounted for row by row.

saved_by_datasets/ was written by `save_to_disk` of datasets 3.6.0: six rows with an ogg, an mp3, a flac and an m4a of
0.8 s of the bundled voice, one damaged recording, and one row without any.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pyarrow
import pytest

from tortoise_jax import arrow
from tortoise_jax.data.filters import ClipLimits
from tortoise_jax.data.manifests import read_inputs, recognise
from tortoise_jax.data.preparation import Options, check
from tortoise_jax.data.recordings import Recording, load_clips
from tortoise_jax.errors import UserError

SAVED = Path(__file__).parent / "saved_by_datasets"
FIRST, SECOND = (f"train/data-0000{i}-of-00002.arrow" for i in range(2))
LAST = "test/data-00000-of-00001.arrow"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(SAVED, tmp_path / "anna")
    # What the library keeps of columns it computed, and what it says of them.
    shutil.copy(SAVED / FIRST, tmp_path / "anna" / "train" / "cache-0123.arrow")
    return tmp_path / "anna"


def write(file: Path, **columns: list[object]) -> Path:
    table = pyarrow.table(columns, metadata={"huggingface": '{"info": {"features": {"audio": {"_type": "Audio"}}}}'})
    file.parent.mkdir(parents=True, exist_ok=True)
    with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return file.parent


def test_every_row_is_accounted_for(folder: Path) -> None:
    assert recognise(folder) == "datasets"
    [one] = read_inputs([folder])
    found = [
        (clip.where, str(clip.audio), clip.id, clip.text, clip.speaker, clip.split, clip.reason) for clip in one.clips
    ]
    row = lambda file, number, name, *about: (f"{folder / file}:{number}", f"{folder / file}{name}", *about)
    assert found == [
        row(LAST, 1, "/1/3.m4a", "3", "Open the door.", "7", "validation", ""),
        row(FIRST, 1, "/1/0.ogg", "0", "One, two.", "7", "train", ""),
        row(FIRST, 2, "/2/1.mp3", "1", "Buckle my shoe.", "8", "train", ""),
        row(FIRST, 3, "/3/damaged.ogg", "damaged", "Nothing.", "8", "train", ""),
        row(SECOND, 1, "", "data-00001-of-00002:1", "Nobody.", "7", "train", "missing"),
        row(SECOND, 2, "/2/2.flac", "2", "", "anna", "train", ""),
    ]
    report = check([folder], None, Options(max_rejected=1, workers=0))
    assert (report["lines"], report["kept"]["lines"]) == (6, 3)
    assert {reason: of["lines"] for reason, of in report["reasons"].items()} == {
        "missing": 1, "unreadable": 1, "empty text": 1,
    }  # fmt: skip
    before = one.digest
    shutil.copy(folder / LAST, folder / FIRST)
    assert read_inputs([folder])[0].digest != before


def test_a_recording_inside_is_as_one_outside(folder: Path, tmp_path: Path) -> None:
    for clip in read_inputs([folder])[0].clips:
        if clip.reason:
            continue
        outside = tmp_path / clip.audio.name
        outside.write_bytes(arrow.content(clip.audio) or b"")
        [(inside, heard)], [(alone, heard_alone)] = (
            load_clips(Recording(path), ClipLimits()) for path in (clip.audio, outside)
        )
        assert inside == alone
        assert (heard is None) == (heard_alone is None) == ("damaged" in clip.id)
        assert heard is None or (heard == heard_alone).all()


def test_the_column_is_looked_up_once_per_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked, lookup = [], arrow._audio_column
    monkeypatch.setattr(arrow, "_audio_column", lambda file, schema: looked.append(file) or lookup(file, schema))
    for clip in read_inputs([folder])[0].clips:
        arrow.content(clip.audio)
    assert sorted(looked) == sorted(folder / name for name in (FIRST, SECOND, LAST))


def test_rows_may_name_files_beside_them(tmp_path: Path) -> None:
    rows: list[object] = [{"bytes": None, "path": "a.wav"}, {"bytes": b"RIFF", "path": None}]
    folder = write(tmp_path / "ann" / "data.arrow", audio=rows, TEXT=["One", "Two"])
    [one] = read_inputs([folder])
    assert [(clip.audio, clip.text, clip.speaker, clip.split) for clip in one.clips] == [
        (folder / "a.wav", "One", "ann", ""),
        (folder / "data.arrow" / "2" / "recording", "Two", "ann", ""),
    ]
    for wrong in ("0", "3", "x", "-1"):
        assert arrow.content(folder / "data.arrow" / wrong / "a.wav") is None


def test_what_ends_in_one_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = (folder / FIRST).read_bytes()
    (folder / FIRST).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"00000-of-00002.arrow: not a whole Arrow file of the datasets library \("):
        read_inputs([folder])
    (folder / FIRST).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match=r"00000-of-00002.arrow: is a Git LFS pointer"):
        read_inputs([folder])
    without = write(tmp_path / "no-text" / "data.arrow", audio=[{"bytes": b"x", "path": "a"}], words=["One"])
    with pytest.raises(UserError, match=r"no column of texts; expected one of transcription, .* found audio, words$"):
        read_inputs([without])
    silent = write(tmp_path / "no-audio" / "data.arrow", sound=[b"x"], text=["One"])
    with pytest.raises(UserError, match=r"data.arrow: no column of Audio, expected one; its columns are sound, text$"):
        read_inputs([silent])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (folder / LAST).touch()  # another time: it is opened anew
    with pytest.raises(UserError, match=r"read by pyarrow: pip install 'tortoise_jax\[datasets\]'$"):
        read_inputs([folder])


def test_parquet_says_how_to_save_it(tmp_path: Path) -> None:
    (tmp_path / "hub" / "data").mkdir(parents=True)
    (tmp_path / "hub" / "data" / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(
        UserError, match=r"Parquet files, .*datasets.load_dataset\('.*hub'\).save_to_disk\('.*hub-saved'\)"
    ):
        read_inputs([tmp_path / "hub"])
