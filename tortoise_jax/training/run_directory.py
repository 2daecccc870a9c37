"""A run's directory: what it was begun with, and the history of its losses.

config.json      the filled configuration and the data set's digest     summary.json   how it went, for programs
history.jsonl    a line a step or evaluation                            report.html    how it went, for people
steps/           checkpoints                  tensorboard/, samples/, nonfinite/      dvae/, tortoise.json, …
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from tortoise_jax import parallel
from tortoise_jax.checkpoints.parts import AR, DVAE, PART_TYPES
from tortoise_jax.checkpoints.pretrained import (
    MEL_NORMS,
    METADATA,
    TOKENIZER,
    Pretrained,
    read_metadata,
    read_parts,
    write_metadata,
)
from tortoise_jax.checkpoints.run_checkpoints import STEPS, RunCheckpoints
from tortoise_jax.checkpoints.trees import checksum
from tortoise_jax.errors import UserError
from tortoise_jax.files import copy_folder, read_json, remove_partials, write_atomically
from tortoise_jax.training.config import flat
from tortoise_jax.training.metrics import MetricWriter

CONFIG = "config.json"
HISTORY = "history.jsonl"
# What a resumed run may not change: the state on disk would not fit, or the order of the data would break.
FIXED = ("seed", "batch_size", "optimizer.name", "optimizer.freeze", "data_digest", "text_digest")
DIGESTS = ("data_digest", "text_digest")
# What a run writes; without CONFIG, which is written first, it is somebody else's. A converted checkpoint has "ar".
WRITTEN = (CONFIG, HISTORY, METADATA, TOKENIZER, MEL_NORMS, STEPS, AR, DVAE, "summary.json", "report.html")
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
    run: Path, settings: ConfigDict, pretrained: Pretrained, digests: Mapping[str, str], renamed: Mapping[str, str]
) -> list[str]:
    """Makes the run's directory a checkpoint of its own (card, dVAE), or checks that it is this run's.

    Returns the settings that changed since the run began. Every host must call it. digests: "data_digest" and
    "text_digest" of the data set. renamed: old names of fields, which a run begun with an older version has.
    """
    check_folder(run)
    now = json.loads(json.dumps(flat(settings) | dict(digests)))
    before = read_json(run / CONFIG) if (run / CONFIG).exists() else now
    before = {renamed.get(name, name): value for name, value in before.items()}
    changed = changes(before, now)
    refused = [line for line in changed if (name := line.split(":")[0]) in FIXED and name in before]
    if refused:
        refused = [line for line in refused if not line.startswith(DIGESTS)]
        if len(refused) < sum(name in before and before[name] != now[name] for name in FIXED):
            refused.append(other_data(str(before.get("data")), str(now["data"])))
        advice = "begin another with --workdir, or put the old settings back"
        raise UserError(f"{run} was begun with what cannot change: {'; '.join(refused)}; {advice}")
    if (run / METADATA).exists():
        check_checkpoint(run, pretrained, str(before.get("checkpoint")), str(now["checkpoint"]))
    parallel.wait_for_all("reading the run's directory")
    if parallel.is_main():
        try:
            run.mkdir(parents=True, exist_ok=True)
            remove_partials(run)
            write_atomically(run / CONFIG, json.dumps(now, indent=2) + "\n")
            if not (run / METADATA).exists():
                shutil.rmtree(run / DVAE, ignore_errors=True)  # of a start that was killed, maybe of another checkpoint
                copy_folder(pretrained.path / DVAE, run / DVAE)
                write_metadata(run, pretrained)
        except OSError as error:
            raise UserError(f"--workdir {run}: cannot be written: {error.strerror or error}") from None
    parallel.wait_for_all("writing the run's directory")
    if not (run / METADATA).exists():
        raise UserError(f"--workdir {run} is not on storage that all hosts share; a run's directory must be")
    return changed


def other_data(before: str, now: str) -> str:
    """What differs, in words that say more than two digests."""
    return f"the data set in {now}, which holds other clips since" if before == now else f"data: {before} -> {now}"


def check_folder(run: Path) -> None:
    """Raises UserError where files of something else than a run would be overwritten."""
    if (run / CONFIG).exists():
        config = read_json(run / CONFIG)
        ours = isinstance(config, dict) and "data_digest" in config
    else:
        ours = False
    taken = [name for name in WRITTEN if (run / name).exists()]
    if taken and not ours:
        raise UserError(f"--workdir {run} holds a {taken[0]} that is no run's; choose a new or empty folder")


def check_checkpoint(run: Path, pretrained: Pretrained, before: str, now: str) -> None:
    """Raises UserError where a run that goes on is given another checkpoint than it began with.

    One in another place (`now` is not `before`) is the same if its weights are; a run to start from may have gone on
    since.
    """
    metadata = read_metadata(run)
    checksums = metadata.get("checksums", {}) if now != before else {}  # old versions wrote none
    for name, part in read_parts(run, metadata).items():
        given = pretrained.part(name)
        if given.config != part.config:
            other = "dimensions"
        elif "" not in (given.digest, part.digest) and given.digest != part.digest:
            other = "weights"
        elif name in checksums and checksum(given.tree) != checksums[name]:
            other = "weights"
        else:
            continue
        there = f"{before} -> {now}" if now != before else now
        raise UserError(
            f"{run} was begun with another config.checkpoint ({there}): its {PART_TYPES[name].title} had other {other}; "
            "begin another run with --workdir, or put the old checkpoint back"
        )


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """ "field: old -> new" for each field that differs."""
    names = [name for name in now if before.get(name) != now[name]]
    return [f"{name}: {before.get(name)!r} -> {now[name]!r}" for name in names]


class History:
    """Losses by step, kept in `history.jsonl` of the main host and cut back to where a run is taken up again."""

    def __init__(self, run: Path, step: int, writes: bool) -> None:
        self.file, self.writes = run / HISTORY, writes
        self.lines = [entry for entry in read_history(self.file) if entry["step"] <= step]
        if writes:
            write_atomically(self.file, "".join(json.dumps(entry) + "\n" for entry in self.lines))

    def add(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """kind: "train", "validation" or "sample"."""
        entry = {"kind": kind, "step": step, **values}
        self.lines.append(entry)
        if self.writes:
            try:
                with self.file.open("a") as file:
                    file.write(json.dumps(entry) + "\n")
            except OSError as error:
                raise UserError(
                    f"{self.file}: cannot be written: {error.strerror}; is the run's folder gone?"
                ) from None

    def curve(self, kind: str, name: str) -> list[tuple[int, float]]:
        """(step, value) of one quantity."""
        return [(entry["step"], entry[name]) for entry in self.lines if entry["kind"] == kind and name in entry]

    def has(self, kind: str, step: int) -> bool:
        return any(entry["kind"] == kind and entry["step"] == step for entry in self.lines)


def read_history(file: Path) -> list[dict[str, Any]]:
    """The lines of a history, without one that a killed run left half. Raises UserError for a line that is damaged."""
    if not file.exists():
        return []
    entries = []
    for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], start=1):
        try:
            entry = json.loads(line)
            if not isinstance(entry["step"], int) or not isinstance(entry["kind"], str):
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(
                f"{file}:{number}: the line is damaged, and early stopping counts on it; remove it or put it right"
            ) from None
        entries.append(entry)
    return entries


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
