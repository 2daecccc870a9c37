"""The progress a person watches: a bar on a terminal, a line a minute in a file."""

from __future__ import annotations

import importlib.machinery
import io
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from tortoise_jax.errors import UserError
from tortoise_jax.training import metrics
from tortoise_jax.training.loop import Loop
from tortoise_jax.training.metrics import MetricWriter

METRICS = {"loss/mel": 2.5}
STEP = {"headline": "mel", "clips": 4, "speech": 20.0, "log": False}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_time_left_is_reckoned_without_compiling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with MetricWriter(tmp_path, 2, 10, active=True) as writer:
        time.sleep(0.5)  # the first step compiles
        writer.step(3, METRICS, **STEP)
        first = writer.bar.format_dict
        writer.step(4, METRICS, **STEP)
        second = writer.bar.format_dict
    assert first["elapsed"] < 0.4
    assert (first["n"], first["initial"]) == (3, 3)
    assert (second["n"], second["total"]) == (4, 10)


def test_a_file_gets_a_line_a_minute_not_one_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with MetricWriter(tmp_path, 0, 5, active=True) as writer:
        for step in (1, 2, 3):
            writer.step(step, METRICS, **STEP)
        monkeypatch.setattr(metrics, "SECONDS_PER_LINE", 0)
        writer.step(4, METRICS, **STEP)
    printed = capsys.readouterr()
    assert printed.err == ""
    (line,) = printed.out.splitlines()
    assert line.startswith("step 4 of 5: mel loss 2.500 (trend 2.500), ")


def test_an_evaluation_is_no_part_of_the_next_steps_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(metrics, "SECONDS_PER_LINE", 0)
    settings = ConfigDict({"steps": 5, "eval_every": 1, "save_every": 0, "patience": 0})
    with MetricWriter(tmp_path, 0, 5, active=True) as writer:
        loop = Loop(settings, None, SimpleNamespace(writer=writer), None, None)
        monkeypatch.setattr(loop, "save", lambda *_: None)
        monkeypatch.setattr(loop, "evaluate", lambda *_: time.sleep(0.5))
        monkeypatch.setattr(loop, "stops_early", lambda: False)
        assert loop.after(1, None, stop=False) == ""
        writer.step(2, METRICS, **STEP)
    rate = float(capsys.readouterr().out.split()[-2])
    assert rate > STEP["clips"] / 0.4


class Logged:
    """Stands in for a run at Weights & Biases, where nothing can be sent."""

    def __init__(self, **options: Any) -> None:
        self.options, self.id, self.lines, self.ended = options, options["id"] or "abc123", [], None

    def log(self, values: dict[str, Any], step: int) -> None:
        self.lines.append((step, values))

    def finish(self, exit_code: int) -> None:
        self.ended = exit_code


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> list[Logged]:
    begun: list[Logged] = []

    class Refused(Exception):
        pass

    def init(**options: Any) -> Logged:
        if options["project"] == "closed":
            raise Refused("api_key not configured\nrun wandb login")
        begun.append(Logged(**options))
        return begun[-1]

    module = ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.init, module.Error = init, Refused  # type: ignore[attr-defined]
    module.Audio = lambda waveform, sample_rate: ("audio", len(waveform), sample_rate)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return begun


def test_weights_and_biases_get_what_tensorboard_gets(tmp_path: Path, wandb: list[Logged]) -> None:
    metrics.check_wandb("voices")
    with MetricWriter(tmp_path, 0, 5, True, "voices", {"seed": 3}) as writer:
        writer.scalars(1, {"loss/mel": 2.5, "loss/text": float("nan")})
        writer.audio(1, "draft/ann/0", np.zeros(100, np.float32))
    (first,) = wandb
    assert {name: first.options[name] for name in ("project", "name", "id", "resume", "config")} == {
        **{"project": "voices", "name": tmp_path.name, "id": None},
        **{"resume": "allow", "config": {"seed": 3}},
    }
    assert first.lines == [(1, {"loss/mel": 2.5}), (1, {"draft/ann/0": ("audio", 100, 22050)})]
    assert first.ended == 0
    with pytest.raises(ValueError, match="broken"), MetricWriter(tmp_path, 1, 5, True, "voices") as writer:
        raise ValueError("broken")
    assert wandb[1].options["id"] == "abc123", "a run that goes on is the same one there"
    assert wandb[1].ended == 1
    with MetricWriter(tmp_path, 0, 5, False, "voices"), MetricWriter(tmp_path, 0, 5, True):
        pass
    assert len(wandb) == 2, "other hosts and runs without a project begin none"


def test_what_is_wrong_with_weights_and_biases_is_one_line(
    tmp_path: Path, wandb: list[Logged], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"config\.wandb=closed: api_key not configured$"):
        MetricWriter(tmp_path, 0, 5, True, "closed")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    metrics.check_wandb("")
    with pytest.raises(UserError, match=r"config.wandb needs wandb: pip install 'tortoise_jax\[wandb\]'"):
        metrics.check_wandb("voices")
