"""What --plan says of a run: of its own shapes, and in bounded time."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from configs import ar
from tests.support import runs, small
from tortoise_jax.audio import CONDITIONING_SAMPLES
from tortoise_jax.checkpoints.parts import abstract_tree
from tortoise_jax.models.unified_voice import UnifiedVoice
from tortoise_jax.training import config, estimate, presets
from tortoise_jax.training.optimizer import OptimizerConfig, make_optimizer

LENGTHS = np.full(40, 30)


class Compiler:
    """In place of the mapped step: keeps the batches it is compiled for, and says that a program needs a gibibyte."""

    def __init__(self) -> None:
        self.batches: list[dict[str, jax.ShapeDtypeStruct]] = []

    def lower(self, state: Any, batch: Any) -> Compiler:
        self.batches.append(batch)
        return self

    def compile(self) -> Compiler:
        return self

    def memory_analysis(self) -> SimpleNamespace:
        return SimpleNamespace(
            temp_size_in_bytes=2**30, argument_size_in_bytes=0, output_size_in_bytes=0, alias_size_in_bytes=0
        )


def plan_that_does_not_fit(monkeypatch: pytest.MonkeyPatch, **fields: Any) -> tuple[list[str], Compiler]:
    """The lines for the tests' tiny model on one device of a mebibyte, and what was compiled."""
    compiler = Compiler()
    for name, value in {"mapped": compiler, "device_count": 1, "local_device_count": 1, "device_memory": 2**20}.items():
        monkeypatch.setattr(estimate.parallel, name, lambda *_, value=value, **__: value)
    settings = ar.get_config()
    settings.update(fields)
    presets.fill(settings, len(LENGTHS))
    params = abstract_tree(runs.AR)
    optimizer = make_optimizer(OptimizerConfig(), params)
    step_config = dataclasses.replace(
        small.step_config(),
        model=UnifiedVoice(runs.AR),
        optimizer=optimizer,
        conditioning_clips=settings.conditioning_clips,
    )
    return list(estimate.describe(step_config, params, settings, LENGTHS)), compiler


def test_the_plan_is_for_the_batches_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = dict(conditioning_clips=3, batch_size=20, gradient_accumulation_steps=2)
    _, compiler = plan_that_does_not_fit(monkeypatch, **fields)
    [batch] = compiler.batches
    assert batch["conditioning_wav"].shape == (1, 2, 10, 3, CONDITIONING_SAMPLES)
    assert batch["tokens"].shape == (1, 2, 10, 32)


def test_a_run_that_does_not_fit_is_told_fields_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    lines, _ = plan_that_does_not_fit(monkeypatch, gradient_accumulation_steps=2, remat="none")
    assert "it does not fit, and so is not timed; in this order:" in lines
    advised = [line.strip().removeprefix("--config.").split("=")[0] for line in lines if "--config." in line]
    optimizer = ["optimizer.moments", "optimizer.name"]
    assert advised == ["gradient_accumulation_steps", "remat", "dtype", *optimizer, "lora.rank"]
    assert set(advised) <= config.flat(ar.get_config()).keys()


@pytest.mark.parametrize(
    ("row_seconds", "rows_timed", "at_most"),
    [(0.001, 128, 4 * (4 + 128) * 0.001), (0.5, 4, 4 * 4 * 0.5), (10.0, 4, 40)],
    ids=["quick", "slow", "slower than the time allowed"],
)
def test_slow_steps_are_estimated_from_a_few_rows(
    row_seconds: float, rows_timed: int, at_most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock that each program's run puts forward by its rows' seconds."""
    clock = [0.0]
    monkeypatch.setattr(estimate, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def program(rows: int, accumulation: int) -> Any:
        def run(live: Any, batch: Any) -> Any:
            clock[0] += rows * accumulation * row_seconds
            return live, {}

        return run

    work: Any = SimpleNamespace(state={}, batch=lambda rows, accumulation: {}, compile=program)
    seconds, rows = estimate.step_seconds(work, program(32, 4), 32, 4)
    assert seconds == pytest.approx(128 * row_seconds)
    assert rows == rows_timed
    assert clock[0] <= at_most * 1.001
