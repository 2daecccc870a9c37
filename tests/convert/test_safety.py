"""Files that are damaged, hostile or nothing of the kind: one line, exit code 2, nothing run, nothing left behind."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from convert import inspect_checkpoint, mapping, torch_to_flax
from convert.flax_to_torch import export
from convert.source import open_source
from convert.tables import MODELS
from convert.torch_files import load, read_state_dict
from convert.torch_to_flax import convert, convert_part
from tests.support import checkpoint_files as files
from tests.support.conversion import HEADS, assert_same, run
from tests.support.torch_reference import tiny_unified_voice
from tortoise_jax.checkpoints.parts import AR
from tortoise_jax.errors import UserError

ROOT = Path(__file__).parents[2]
FUZZ_ROUNDS = 1000
LONGEST = 10.0  # seconds for one damaged file; usual are milliseconds


@pytest.fixture(scope="module")
def state() -> files.State:
    return files.state_of(tiny_unified_voice(seed=4, layers=1, model_dim=16, max_text_tokens=5, max_mel_tokens=5))


def flipped(path: Path, state: files.State) -> Path:
    files.save(path, state)
    return files.flip(path, files.middle_of_largest_record(path))


def truncated(path: Path, state: files.State) -> Path:
    files.save(path, state)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    return path


def truncated_old_format(path: Path, state: files.State) -> Path:
    files.old_format(path, state)
    path.write_bytes(path.read_bytes()[:-100])
    return path


def truncated_safetensors(path: Path, state: files.State) -> Path:
    files.safetensors(path, state)
    path.write_bytes(path.read_bytes()[:-100])
    return path


def written(content: bytes) -> Any:
    def write(path: Path, state: files.State) -> Path:
        path.write_bytes(content)
        return path

    return write


def directory(path: Path, state: files.State) -> Path:
    path.mkdir()
    return path


def named_pipe(path: Path, state: files.State) -> Path:
    os.mkfifo(path)
    return path


def other_zip(path: Path, state: files.State) -> Path:
    import zipfile

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("autoregressive.pth", b"x")
    return path


BAD: dict[str, tuple[Any, str]] = {
    "malicious": (lambda path, state: files.malicious(path, path.with_name("proof")), "posix.system"),
    "malicious pickle": (lambda path, state: files.malicious_pickle(path, path.with_name("proof")), "is damaged"),
    "a pickled module": (lambda path, state: files.save(path, torch.nn.Linear(2, 2)), "torch.nn.modules.linear.Linear"),
    "a flipped bit": (flipped, "does not match its checksum"),
    "a truncated zip": (truncated, "is cut off"),
    "a truncated older file": (truncated_old_format, "is damaged or not a checkpoint"),
    "truncated safetensors": (truncated_safetensors, "is damaged or not a checkpoint"),
    "an empty file": (written(b""), "is empty (0 bytes)"),
    "a directory": (directory, "is a directory"),
    "a named pipe": (named_pipe, "is a named pipe, expected a file"),
    "a text file": (written(b"these are my weights\n"), "is not a checkpoint: it is text"),
    "a web page": (written(b"<!DOCTYPE html><html>"), "it is a web page"),
    "a git lfs pointer": (written(b"version https://git-lfs.github.com/spec/v1\noid"), "git lfs pull"),
    "noise": (written(bytes(range(128, 256)) * 9), "not a checkpoint"),
    "another zip": (other_zip, "not of torch (no data.pkl)"),
    "a zip bomb": (files.deflated, "is compressed"),
    "a huge storage": (files.huge_storage, "is damaged"),
    "a huge shape": (files.huge_safetensors, "is damaged"),
    "a huge safetensors header": (written((2**62).to_bytes(8, "little") + b"{}"), "not a checkpoint"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("command", ["convert", "inspect"])
def test_one_line_exit_code_2_and_nothing_left(name: str, command: str, state, tmp_path, monkeypatch, capsys) -> None:
    build, says = BAD[name]
    path = build(tmp_path / "given.pth", state)
    before = sorted(path.name for path in tmp_path.iterdir())
    if command == "convert":
        arguments: tuple[Any, ...] = ("--ar", path, "--heads", HEADS, "--out", tmp_path / "out")
        code, said, err = run(monkeypatch, capsys, torch_to_flax.main, *arguments)
    elif name == "a directory":
        code, said, err = run(monkeypatch, capsys, inspect_checkpoint.main, path)
        says = "nothing to inspect"
    else:
        code, said, err = run(monkeypatch, capsys, inspect_checkpoint.main, path)
    assert (code, said) == (2, "")
    assert err.startswith("error: ")
    assert says in err
    assert "given.pth" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert not (tmp_path / "proof").exists()


def test_the_malicious_files_would_run_if_they_were_run(tmp_path) -> None:
    proof = tmp_path / "proof"
    torch.load(files.malicious(tmp_path / "a.pth", proof), weights_only=False)
    assert proof.exists()


def test_torch_itself_does_not_see_a_flipped_bit(state, tmp_path) -> None:
    """Why the checksums are verified here; --ignore_checksums lets the file through."""
    path = flipped(tmp_path / "a.pth", state)
    torch.load(path, weights_only=True, mmap=True)
    with pytest.raises(UserError, match="--ignore_checksums"):
        open_source(path, AR, HEADS)
    open_source(path, AR, HEADS, checksums=False)


def test_a_training_state_that_torch_refuses_to_read_is_named_by_its_ending(tmp_path) -> None:
    path = files.save(tmp_path / "500.state", {"schedulers": defaultdict(list), "optimizers": []})
    with pytest.raises(UserError, match=r'collections.defaultdict.* A ".state" file holds an optimiser, no weights'):
        load(path)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(b"PK")

    def denied(*arguments: Any, **keywords: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(UserError, match=r"a.pth cannot be read: Permission denied"):
        load(path)


def test_a_conversion_that_is_interrupted_leaves_nothing(state, tmp_path, monkeypatch) -> None:
    path = files.save(tmp_path / "a.pth", state)

    def interrupted(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("convert.torch_to_flax.write_metadata", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert({AR: path}, tmp_path / "out", HEADS)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


# --- fuzzing ----------------------------------------------------------------------------------------------------------


def damaged(content: bytes, other: bytes, draw: random.Random) -> bytes:
    """The file with bits flipped, cut off, or spliced with itself or another one."""
    kind = draw.choice(["flip", "flips", "zero", "truncate", "behead", "splice", "repeat", "swap", "other"])
    at, end = sorted(draw.randrange(len(content)) for _ in range(2))
    changed = bytearray(content)
    if kind in ("flip", "flips"):
        for _ in range(1 if kind == "flip" else draw.randrange(2, 40)):
            # Half of them in the directory at the end and in the pickle at the beginning, where the structure is.
            position = draw.choice([draw.randrange(len(content)), -1 - draw.randrange(4000), draw.randrange(4000)])
            changed[position % len(content)] ^= 1 << draw.randrange(8)
    elif kind == "zero":
        changed[at:end] = bytes(end - at)
    elif kind == "truncate":
        del changed[end:]
    elif kind == "behead":
        del changed[:at]
    elif kind == "splice":
        del changed[at:end]
    elif kind == "repeat":
        changed[at:at] = content[at:end]
    elif kind == "swap":
        length = min(64, len(content) - end)
        changed[at : at + length], changed[end : end + length] = content[end : end + length], content[at : at + length]
    else:
        changed[at:end] = other[at:end]
    return bytes(changed)


WRITERS = {"zip": files.save, "older": files.old_format, "safetensors": files.safetensors}


@pytest.mark.parametrize("format_", WRITERS)
def test_a_thousand_damaged_files(format_: str, state, tmp_path) -> None:
    """A UserError of one line, or the conversion of undamaged numbers: a zip's checksums leave nothing between.

    The other two formats have no checksums, so there a changed number is only seen if it is no number any more.
    """
    draw = random.Random(format_)
    good = WRITERS[format_](tmp_path / "good", state).read_bytes()
    hostile = files.malicious(tmp_path / "hostile", tmp_path / "proof").read_bytes().ljust(len(good), b"\0")
    want = {key: value.numpy() for key, value in state.items()}
    given = tmp_path / "given.pth"
    refused = 0
    for round_ in range(FUZZ_ROUNDS // (1 if format_ == "zip" else 4)):
        given.write_bytes(damaged(good, hostile, draw))
        started = time.perf_counter()
        try:
            source = open_source(given, AR, HEADS)
            params = convert_part(source, allow_nonfinite=False)[0].tree
        except UserError as error:
            message = str(error)
            refused += 1
        else:
            message = str(given)
            got = mapping.to_torch(MODELS[AR].table, params)
            assert got.keys() == want.keys(), round_
            same = all(mapping.same_bits(got[key], value) for key, value in want.items())
            assert same or format_ != "zip", round_
        assert len(message.splitlines()) == 1, round_
        assert str(given) in message, round_
        assert time.perf_counter() - started < LONGEST, round_
    assert refused > 0.3 * FUZZ_ROUNDS / (1 if format_ == "zip" else 4)
    assert not (tmp_path / "proof").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["given.pth", "good", "hostile"]


def test_damaged_files_leave_no_half_written_directory(state, tmp_path) -> None:
    draw = random.Random(1)
    good = files.save(tmp_path / "good", state).read_bytes()
    for _ in range(30):
        (tmp_path / "given.pth").write_bytes(damaged(good, good, draw))
        try:
            convert({AR: tmp_path / "given.pth"}, tmp_path / "out", HEADS)
        except UserError:
            assert sorted(path.name for path in tmp_path.iterdir()) == ["given.pth", "good"]
        else:
            assert sorted(path.name for path in tmp_path.iterdir()) == ["given.pth", "good", "out"]
            assert len(read_state_dict(tmp_path / "good")) == len(state)
            shutil.rmtree(tmp_path / "out")


@pytest.mark.slow
def test_killed_at_twenty_moments_there_is_a_whole_checkpoint_or_none(tmp_path) -> None:
    model = tiny_unified_voice(seed=4)
    given = files.save(tmp_path / "given.pth", files.state_of(model))
    out, draw, whole = tmp_path / "out", random.Random(0), 0
    command = [sys.executable, "convert/torch_to_flax.py", "--ar", given, "--heads", str(HEADS), "--out", out]
    began = time.monotonic()
    subprocess.run(command, cwd=ROOT, capture_output=True, timeout=300, check=True)
    longest = time.monotonic() - began
    for _ in range(20):
        shutil.rmtree(out, ignore_errors=True)
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as converting:
            time.sleep(draw.uniform(0.5, 1) * longest)  # before, it imports
            converting.kill()
        if out.exists():
            whole += 1
            export(out, tmp_path / "back.pth")
            assert_same(read_state_dict(tmp_path / "back.pth"), model)
    shutil.rmtree(out, ignore_errors=True)
    subprocess.run(command, cwd=ROOT, capture_output=True, timeout=300, check=True)
    assert sorted(path.name for path in tmp_path.glob("*out*")) == ["out"], "what killed ones left is gone"
    assert whole < 20, "some were killed before the end"
