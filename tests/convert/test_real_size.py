"""The real sizes, there and back, with random weights: minutes and gigabytes, run by `make test-slow`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from convert.mapping import same_bits
from convert.tables import MODELS
from convert.torch_files import read_state_dict
from tests.support.released import torch_model


@pytest.mark.slow
def test_real_sizes_there_and_back_within_memory_and_time(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The benchmark as typed: its exit code says that its targets are met; then every tensor bit for bit."""
    folder = tmp_path / "real"
    command = [sys.executable, "-m", "benchmarks.convert_real_size", "--folder", str(folder), "--keep"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    with capsys.disabled():
        print("", done.stdout, sep="\n")
    assert done.returncode == 0, done.stderr
    for part, model in MODELS.items():
        original, back = read_state_dict(folder / model.file), read_state_dict(folder / f"{part}-back.pth")
        assert list(back) == list(original)
        for key, value in original.items():
            assert same_bits(back[key], value), key
    for part in ("ar", "dvae"):
        exported = torch.load(folder / f"{part}-back.pth", weights_only=True, mmap=True)
        torch_model(part).load_state_dict(exported, strict=True, assign=True)
