"""A run's directory: what it was begun with, and the history of its losses.

config.json      the filled configuration and the data set's digest     summary.json   how it went, for programs
history.jsonl    a line per step or evaluation                          report.html    how it went, for people
steps/           checkpoints                  tensorboard/, samples/, nonfinite/      dvae/, tortoise.json, …
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from tortoise_jax import parallel
from tortoise_jax.checkpoints.parts import AR, DVAE, PART_TYPES
from tortoise_jax.checkpoints.pretrained import (
    MEL_NORMS,
    METADATA,
    RUN_CONFIG,
    SUMMARY,
    TOKENIZER,
    Pretrained,
    read_metadata,
    read_parts,
    trained_part,
    write_metadata,
)
from tortoise_jax.checkpoints.run_checkpoints import ELSEWHERE, STEPS, RunCheckpoints, reachable
from tortoise_jax.checkpoints.trees import checksum
from tortoise_jax.errors import UserError
from tortoise_jax.files import copy_folder, read_json, remove_partials, write_atomically
from tortoise_jax.training.config import flat
from tortoise_jax.training.metrics import MetricWriter

HISTORY = "history.jsonl"
# What a resumed run may not change: the state on disk would not fit, or the order of the data would break.
DIGESTS = ("data_digest", "text_digest")
OF_LORA = {"lora.rank": 0, "lora.alpha": 16.0, "lora.also_train": ""}
OF_OPTIMIZER = ("optimizer.name", "optimizer.moments", "optimizer.freeze")
FIXED = ("seed", "batch_size", "save_to", "ema", *OF_OPTIMIZER, *OF_LORA, *DIGESTS)
# Fields that older versions did not have, with the values that their runs amount to.
ADDED = {"save_to": "", "ema": 0.0, "sample_preset": "draft", "optimizer.moments": "float32", **OF_LORA}
# What a run writes; without RUN_CONFIG, which is written first, it is somebody else's. A converted checkpoint has "ar".
WRITTEN = (RUN_CONFIG, HISTORY, METADATA, TOKENIZER, MEL_NORMS, STEPS, ELSEWHERE, AR, DVAE, SUMMARY, "report.html")
RATE = "learning_rate"  # of a step's line, beside its losses
# The gap to the training loss is mentioned once it has grown by this share of the held-out loss.
PARTING_SHARE = 0.05
# An evaluation this much above the best, this often in a row, while training still improves, is called overfitting.
OVERFIT_MARGIN = 0.01
OVERFIT_EVALUATIONS = 3
# A held-out loss so many times the best, while training clips get no better, is called divergence; where no clip is
# held out, a training loss so many times the first.
MUCH_WORSE, FAR_WORSE = 1.1, 1.5


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that is going on: where it is, and what it writes to. On other hosts than the main one only
    `checkpoints` writes."""

    folder: Path
    checkpoints: RunCheckpoints
    history: History
    writer: MetricWriter


def begin(
    run: Path,
    settings: ConfigDict,
    pretrained: Pretrained,
    part: str,
    digests: Mapping[str, str],
    renamed: Mapping[str, str],
) -> list[str]:
    """Makes the run's directory a checkpoint of its own (metadata, the other parts), or checks that it is this run's.

    Returns the settings that changed since the run began. Every host must call it. part: the one that is trained.
    digests: "data_digest" and "text_digest" of the data set. renamed: old names of fields, which a run begun with an
    older version has.
    """
    check_folder(run)
    check_part(run, part)
    now = json.loads(json.dumps(flat(settings) | dict(digests)))
    before = read_json(run / RUN_CONFIG) if (run / RUN_CONFIG).exists() else now
    older = {name: value for name, value in ADDED.items() if name in now}
    before = older | {renamed.get(name, name): value for name, value in before.items()}
    changed = changes(before, now)
    differ = {name for name in FIXED if name in before and before[name] != now.get(name)}
    if differ:
        refused = [line for line in changed if line.split(":")[0] in differ - set(DIGESTS)]
        if differ & set(DIGESTS):
            refused.append(other_data(str(before.get("data")), str(now["data"])))
        advice = "begin another with --workdir, or put the old settings back"
        raise UserError(f"{run} was begun with what cannot change: {'; '.join(refused)}; {advice}")
    if (run / METADATA).exists():
        check_checkpoint(run, pretrained, str(before.get("checkpoint")), str(now["checkpoint"]))
    parallel.wait_for_all("reading the run's directory")
    parallel.on_main(lambda: write_beginning(run, now, pretrained, part))
    return changed


def write_beginning(run: Path, settings: dict[str, Any], pretrained: Pretrained, part: str) -> None:
    """Writes what a run has before its first step; for one that goes on, its settings."""
    try:
        remove_partials(run)
        begun = (run / METADATA).exists()  # it is written last: a start that was killed is made anew
        elsewhere = "" if begun else elsewhere_for(run, settings["save_to"])
        write_atomically(run / RUN_CONFIG, json.dumps(settings, indent=2) + "\n")
        if elsewhere:
            write_atomically(run / ELSEWHERE, elsewhere + "\n")
        if not begun:
            for other in pretrained.parts.keys() - {part}:
                shutil.rmtree(run / other, ignore_errors=True)  # maybe of another checkpoint
                copy_folder(pretrained.path / other, run / other)
            write_metadata(run, pretrained, trains=part)
    except OSError as error:
        raise UserError(f"--workdir {run}: cannot be written: {error.strerror or error}") from None


def elsewhere_for(run: Path, folder: str) -> str:
    """Where a new run's steps go, "" for its own directory. Raises UserError where somebody's steps are there."""
    if not folder:
        return ""
    absolute = folder if "://" in folder else str(Path(folder).absolute())
    if any(path.name.isdigit() for path in reachable(absolute, run).glob("*")):
        raise UserError(f"config.save_to={folder} holds steps of another run; choose an empty folder")
    return absolute


def other_data(before: str, now: str) -> str:
    """What differs, in words that say more than two digests."""
    return f"the data set in {now}, which holds other clips since" if before == now else f"data: {before} -> {now}"


def check_folder(run: Path) -> None:
    """Raises UserError where files of something else than a run would be overwritten."""
    if (run / RUN_CONFIG).exists():
        config = read_json(run / RUN_CONFIG)
        ours = isinstance(config, dict) and "data_digest" in config
    else:
        ours = False
    taken = [name for name in WRITTEN if (run / name).exists()]
    if taken and not ours:
        what = "is a converted checkpoint" if METADATA in taken else f"holds a {taken[0]} that is no run's"
        raise UserError(f"--workdir {run} {what}; give the run another folder, new or empty")


def check_checkpoint(run: Path, pretrained: Pretrained, before: str, now: str) -> None:
    """Raises UserError where a run that goes on is given another checkpoint than it began with.

    One in another place (`now` is not `before`) is the same if its weights are; a run to start from may have gone on
    since.
    """
    metadata = read_metadata(run)
    checksums = metadata.get("checksums", {}) if now != before else {}  # old versions wrote none
    for name, part in read_parts(run, metadata).items():
        given = pretrained.part(name)
        other_digest = given.digest != part.digest and "" not in (given.digest, part.digest)
        if given.config != part.config:
            other = "dimensions"
        elif other_digest or (name in checksums and checksum(given.tree) != checksums[name]):
            other = "weights"
        else:
            continue
        there = f"{before} -> {now}" if now != before else now
        raise UserError(
            f"{run} was begun with another config.checkpoint ({there}): its {PART_TYPES[name].title} had other "
            f"{other}; begin another run with --workdir, or put the old checkpoint back"
        )


def check_part(run: Path, part: str) -> None:
    """Raises UserError for a run that trains another part of a checkpoint."""
    trained = trained_part(read_metadata(run)) if (run / METADATA).exists() else part
    if trained != part:
        titles = PART_TYPES[trained].title, PART_TYPES[part].title
        raise UserError(f"--workdir {run} trains the {titles[0]}, not the {titles[1]}; give the run another folder")


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

    @classmethod
    def to_read(cls, run: Path) -> History:
        """All there is; nothing is written."""
        return cls(run, sys.maxsize, writes=False)

    def add(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """kind: "train", "validation" or "sample"."""
        entry = {"kind": kind, "step": step, **values}
        self.lines.append(entry)
        if self.writes:
            try:
                with self.file.open("a") as file:
                    file.write(json.dumps(entry) + "\n")
            except OSError as error:
                gone = "" if self.file.parent.exists() else ": the run's folder is gone"
                raise UserError(f"{self.file}: cannot be written: {error.strerror}{gone}") from None

    def curve(self, kind: str, name: str) -> Curve:
        """(step, value) of one quantity."""
        return [(entry["step"], entry[name]) for entry in self.lines if entry["kind"] == kind and name in entry]

    def has(self, kind: str, step: int) -> bool:
        return any(entry["kind"] == kind and entry["step"] == step for entry in self.lines)


Curve = list[tuple[int, float]]  # (step, loss)


def best_evaluation(validation: Curve) -> tuple[int, float] | None:
    """Step and loss of the best evaluation, of equals the later one, as `RunCheckpoints.best`; None: none is finite."""
    finite = [(step, loss) for step, loss in validation if math.isfinite(loss)]
    return min(finite, key=lambda point: (point[1], -point[0]), default=None)


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
    ordered = [comparable(loss) for loss in losses]
    return len(losses) - 1 - ordered.index(min(ordered)) if losses else 0


def comparable(loss: float) -> float:
    """What is not finite is worse than anything."""
    return loss if math.isfinite(loss) else math.inf


def remark(validation: Curve, training: Curve) -> str:
    """One plain sentence about a run that goes wrong, else nothing."""
    return divergence_remark(validation, training) or overfitting_remark(validation, training)


def overfitting_remark(validation: Curve, training: Curve) -> str:
    """One plain sentence where held-out clips get worse while the training ones get better, else nothing."""
    losses, best = [loss for _, loss in validation], best_evaluation(validation)
    if best is None or evaluations_without_gain(losses) < OVERFIT_EVALUATIONS:
        return ""
    if losses[-1] < best[1] * (1 + OVERFIT_MARGIN):
        return ""
    since = [loss for step, loss in training if step >= best[0]]
    half = len(since) // 2
    if not half or sum(since[half:]) / len(since[half:]) >= sum(since[:half]) / half:
        return ""
    return (
        f"overfitting: held-out clips have got worse since step {best[0]} while training clips still get better; the "
        f"model learns these recordings by heart. The checkpoint of step {best[0]} is kept as the best; "
        "more recordings help, a lower learning rate may"
    )


def parting(validation: Curve, training: Curve) -> str:
    """One plain sentence about a run whose held-out and training losses part, even while both fall; else nothing.

    An evaluation's gap is its loss less the mean of the training steps since the evaluation before it.
    """
    gaps: list[tuple[int, float]] = []
    for (before, _), (step, loss) in itertools.pairwise(validation):
        steps = [value for at, value in training if before < at <= step and math.isfinite(value)]
        if steps and math.isfinite(loss):
            gaps.append((step, loss - sum(steps) / len(steps)))
    if len(gaps) < 3:
        return ""
    since, least = min(gaps, key=lambda gap: gap[1])
    grown = gaps[-1][1] - least
    if grown < PARTING_SHARE * validation[-1][1]:
        return ""
    return (
        f"Held-out and training losses part: the gap between them has grown by {grown:.2g} since step {since}. "
        "From there on the model learns more and more of these recordings alone."
    )


def divergence_remark(validation: Curve, training: Curve) -> str:
    """One plain sentence where held-out clips get much worse and the training ones no better, else nothing."""
    best = best_evaluation(validation)
    step, loss = best or (0, math.inf)
    since = [comparable(value) for at, value in training if at > step]
    if len(since) < 2:
        return ""
    end = since[-max(1, len(since) // 4) :]
    first, last = since[0], sum(end) / len(end)  # a step's loss is from before it: the first is of the best parameters
    if not validation:
        if last < FAR_WORSE * first:
            return ""
        return (
            f"diverged: training clips have got much worse ({first:.4g} at the start, now {last:.4g}), and no clip is "
            "held out to find a better checkpoint by; a lower optimizer.learning_rate helps"
        )
    now = validation[-1][1]
    if comparable(now) < MUCH_WORSE * loss or last < first:
        return ""
    kept = f"The checkpoint of step {step} is kept as the best" if best else "No evaluation was finite"
    return (
        f"diverged: held-out clips have got much worse since step {step} ({loss:.4g}, now {now:.4g}) and training "
        f"clips no better. {kept}; a lower optimizer.learning_rate helps"
    )


def failure(validation: Curve, training: Curve) -> str:
    """Why a run that has ended has nothing to offer: it diverged before it was better than its start; else nothing."""
    best = best_evaluation(validation)
    return "" if best and best[0] > 0 else divergence_remark(validation, training)
