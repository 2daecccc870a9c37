"""The progress a person watches: a bar on a terminal, a line a minute in a file."""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path

import pytest

from tortoise_jax.training import metrics
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
