"""What the tests of the converter share: a command run in this process, and exported tensors compared with a model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from convert.mapping import same_bits
from tortoise_jax.errors import exit_with_one_line

HEADS = 4  # of the small models, whose width does not tell


def run(monkeypatch: pytest.MonkeyPatch, capsys: Any, main: Any, *arguments: Any) -> tuple[int, str, str]:
    """A command in this process: exit code, what it printed, its error line."""
    monkeypatch.setattr("sys.argv", ["command", *map(str, arguments)])
    code = 0
    try:
        exit_with_one_line(main)
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    assert len(err.splitlines()) <= 1, err
    return code, out, err


def assert_same(state: dict[str, np.ndarray], model: torch.nn.Module) -> None:
    want = {key: value.numpy() for key, value in model.state_dict().items()}
    assert list(state) == list(want)
    for key, value in want.items():
        assert same_bits(state[key], value), key
