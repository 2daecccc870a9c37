"""A run's directory: what it was begun with, and the history of its losses.

config.json      the filled configuration and the data set's digest     summary.json   how it went, for programs
history.jsonl    a line per step or evaluation                          report.html    how it went, for people
steps/           checkpoints                  tensorboard/, samples/, nonfinite/      dvae/, tortoise.json, …
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from tortoise_jax import parallel
from tortoise_jax.checkpoints.pretrained import METADATA, Pretrained, write_metadata
from tortoise_jax.checkpoints.run_checkpoints import RunCheckpoints
from tortoise_jax.errors import UserError
from tortoise_jax.files import copy_folder, read_json, remove_partials, write_atomically
from tortoise_jax.training.config import flat
from tortoise_jax.training.metrics import MetricWriter

CONFIG = "config.json"
HISTORY = "history.jsonl"
# What a resumed run may not change: the state on disk would not fit, or the order of the data would break.
FIXED = ("seed", "batch_size", "optimizer.name", "optimizer.freeze", "data_digest")
# An evaluation this much above the best, this often in a row, while training still improves, is called overfitting.
OVERFIT_MARGIN = 0.01
OVERFIT_EVALUATIONS = 3


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that is going on: where it is, and what it writes to. On other hosts than the main one only
    `checkpoints` writes."""

    folder: Path
    checkpoints: RunCheckpoints
    history: History
    writer: MetricWriter


def begin(
    run: Path, settings: ConfigDict, pretrained: Pretrained, data_digest: str, renamed: Mapping[str, str]
) -> list[str]:
    """Makes the run's directory a checkpoint of its own (metadata, dVAE), or checks that it is this run's.

    Returns the settings that changed since the run began. Every host must call it. renamed: old names of fields, which
    a run begun with an older version has.
    """
    now = json.loads(json.dumps(flat(settings) | {"data_digest": data_digest}))
    if parallel.is_main():
        try:
            run.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--workdir {run}: cannot be written: {error.strerror or error}") from None
    parallel.check_shared(run)
    before = read_json(run / CONFIG) if (run / CONFIG).exists() else now
    changed = changes({renamed.get(name, name): value for name, value in before.items()}, now)
    refused = [line for line in changed if line.split(":")[0] in FIXED]
    if refused:
        advice = "begin another with --workdir, or put the old settings back"
        raise UserError(f"{run} was begun with what cannot change: {'; '.join(refused)}; {advice}")
    parallel.wait_for_all("reading the run's directory")
    if parallel.is_main():
        try:
            remove_partials(run)
            if not (run / METADATA).exists():
                if not (run / "dvae").exists():
                    copy_folder(pretrained.path / "dvae", run / "dvae")
                write_metadata(run, pretrained)
            write_atomically(run / CONFIG, json.dumps(now, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--workdir {run}: cannot be written: {error.strerror or error}") from None
    parallel.wait_for_all("writing the run's directory")
    return changed


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """ "field: old -> new" for each field that differs."""
    names = [name for name in now if before.get(name) != now[name]]
    return [f"{name}: {before.get(name)!r} -> {now[name]!r}" for name in names]


class History:
    """Losses by step, kept in `history.jsonl` of the main host and cut back to where a run is taken up again."""

    def __init__(self, run: Path, step: int, writes: bool) -> None:
        self.file, self.writes = run / HISTORY, writes
        self.lines: list[dict[str, Any]] = []
        if self.file.exists():
            whole = [line for line in self.file.read_text().splitlines(keepends=True) if line.endswith("}\n")]
            self.lines = [entry for entry in map(json.loads, whole) if entry["step"] <= step]
        if writes:
            write_atomically(self.file, "".join(json.dumps(entry) + "\n" for entry in self.lines))

    def add(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """kind: "train", "validation" or "sample"."""
        entry = {"kind": kind, "step": step, **values}
        self.lines.append(entry)
        if self.writes:
            with self.file.open("a") as file:
                file.write(json.dumps(entry) + "\n")

    def curve(self, kind: str, name: str) -> list[tuple[int, float]]:
        """(step, value) of one quantity."""
        return [(entry["step"], entry[name]) for entry in self.lines if entry["kind"] == kind and name in entry]

    def has(self, kind: str, step: int) -> bool:
        return any(entry["kind"] == kind and entry["step"] == step for entry in self.lines)


def evaluations_without_gain(losses: list[float]) -> int:
    """How many evaluations in a row, up to the last, have not been better than the best before them."""
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0


def overfitting_remark(validation: list[tuple[int, float]], training: list[tuple[int, float]]) -> str:
    """One plain sentence where held-out clips get worse while the training ones get better, else nothing."""
    losses = [loss for _, loss in validation]
    if evaluations_without_gain(losses) < OVERFIT_EVALUATIONS or losses[-1] < min(losses) * (1 + OVERFIT_MARGIN):
        return ""
    best = validation[losses.index(min(losses))][0]
    since = [loss for step, loss in training if step >= best]
    half = len(since) // 2
    if not half or sum(since[half:]) / len(since[half:]) >= sum(since[:half]) / half:
        return ""
    return (
        f"overfitting: held-out clips have got worse since step {best} while training clips still get better; the "
        f"model learns these recordings by heart. The checkpoint of step {best} is kept as the best; "
        "more recordings help, a lower learning rate may"
    )
