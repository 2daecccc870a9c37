"""A whole run: devices -> checkpoint -> data -> step -> state -> loop -> export.

`train.py` and `tj.train` both call it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from tortoise_jax import parallel
from tortoise_jax.checkpoints.run_checkpoints import RunCheckpoints
from tortoise_jax.data.dataset import Dataset
from tortoise_jax.errors import UserError
from tortoise_jax.files import check_writable
from tortoise_jax.training import config, planning, replay, report, run_data, run_directory, stopping
from tortoise_jax.training.kinds import Kind
from tortoise_jax.training.loop import INTERRUPTED, Loop
from tortoise_jax.training.metrics import MetricWriter, check_wandb
from tortoise_jax.training.optimizer import swapped
from tortoise_jax.training.run_directory import History, Run
from tortoise_jax.training.step import Objective, TrainState, first_state

Export = Callable[[Path, Path], list[str]]  # writes a run's best step as a torch file and returns what to print


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is asked for beside the configuration.

    workdir: the run's directory, "" for runs/NAME, the data's name. plan: only print what the run would need. replay:
    a file that a non-finite step left. export: None where torch is not installed. again: how to go on after a stop.
    """

    workdir: str = ""
    plan: bool = False
    replay: str = ""
    export: Export | None = None
    again: str = ""


def train(kind: Kind, settings: ConfigDict, asked: Asked) -> Path:
    """Trains, or plans or replays; returns the run's directory. Every host of a run calls it alike.

    Raises UserError for whatever is wrong, and for a run that comes to nothing.
    """
    with stopping.on_signals() as interrupted:
        # 1. Devices.
        folder = Path(asked.workdir or Path("runs") / run_data.named(Path(settings.data)).name)
        if parallel.process_count() > 1:
            print(parallel.describe_this_host(), flush=True)
        parallel.say(f"devices: {parallel.describe()}")
        parallel.check_same_code()
        parallel.check_same_everywhere("the configuration", config.flat(settings))

        if not (asked.plan or asked.replay):
            check_writable(folder, "--workdir")
            check_wandb(settings.wandb)

        # 2. Checkpoint; a plan needs no weights.
        pretrained = kind.load(settings, not asked.plan)
        parallel.check_same_everywhere("the checkpoint", pretrained.identity)
        at = "" if pretrained.step is None else f", step {pretrained.step}"
        parallel.say(f"checkpoint: {settings.checkpoint or 'none, random weights'}{at}")

        # 3. Data.
        if asked.plan:
            planning.show_plan(kind, settings, pretrained)
            return folder
        dataset, pretrained = kind.find_data(settings, pretrained)
        parallel.check_same_everywhere("the data set", dataset.header["sha256"])

        # 4. What the configuration leaves open, by the size of the data set; the step and what it is fed.
        kind.fill_presets(settings, len(dataset.split("train")))
        feed = kind.make_feed(settings, pretrained, dataset)
        run_data.describe_feed(settings, dataset, feed)
        step_config = kind.make_step_config(settings, pretrained, feed.training.rows)
        drafter = kind.make_drafter(settings, pretrained, dataset)
        if asked.replay:
            show_replay(step_config, Path(asked.replay), dataset)
            return folder

        with parallel.alone_in(folder, "--workdir"):
            # 5. State: of the run's newest whole checkpoint, else of the checkpoint's weights.
            for line in run_directory.begin(
                folder, settings, pretrained, kind.part, run_data.digests_of(dataset), kind.schema.renamed
            ):
                parallel.say(f"changed since the run began: {line}")
            checkpoints = RunCheckpoints(folder, settings.keep_last)
            state = resume_or_start(checkpoints, step_config, pretrained.part(kind.part).tree)
            del pretrained  # on CPU the memory of its weights is the devices' own
            first = int(parallel.first_copy(state.step))
            history = History(folder, first, parallel.is_main())

            # 6. Loop.
            named = config.flat(settings)
            with MetricWriter(folder, first, settings.steps, parallel.is_main(), settings.wandb, named) as writer:
                run = Run(folder, checkpoints, history, writer)
                loop = Loop(settings, step_config, run, feed, drafter)
                ended = loop.train(state, lambda step: parallel.stop_requested(step, interrupted()))
            checkpoints.finish()

            # 7. Export.
            if ended == INTERRUPTED:
                parallel.say(f"stopped and saved at step {checkpoints.newest()}; to go on: {asked.again}")
                return folder
            if parallel.is_main():
                about = run_data.describe_data(dataset, feed) | kind.describe(folder, settings, dataset)
                facts = report.write_summary(folder, history, ended, config.flat(settings), about, kind.subject)
                if not loop.failure:
                    kind.leave(folder, dataset)  # which the report names
                report.write_page(folder, history, facts, kind.subject)
            parallel.say(f"{ended}; report: {folder / 'report.html'}")
            if loop.failure:
                held_out = history.curve("validation", "total")
                best = f", the best is step {checkpoints.best()}" if held_out else ""
                raise UserError(f"{folder}: {loop.failure}; nothing was exported{best}")
            if parallel.is_main():
                export(folder, settings.export, checkpoints.best(), asked.export)
    return folder


def show_replay(step_config: Objective, file: Path, dataset: Dataset) -> None:
    """Computes a kept step again, on one device, and says what is not finite."""
    step, batch, params = replay.load(file)
    alone: Any = dataclasses.replace(step_config, axis=None)  # type: ignore[type-var]
    for line in replay.explain(alone, step, batch, params, [clip.id for clip in dataset.clips]):
        print(line)


def resume_or_start(checkpoints: RunCheckpoints, step_config: Objective, params: Any) -> TrainState:
    """The state on this host's devices: from the newest checkpoint that is whole, else the converted weights."""
    start = functools.partial(first_state, config=step_config)
    blank = jax.eval_shape(start, params)
    found = checkpoints.restore_newest(blank.params, blank.opt_state, parallel.say)
    if found is None:
        return parallel.mapped(start, donate=True)(parallel.replicate(params))
    restored, opt_state = swapped(*found[:2])
    progress = found[2]
    parallel.say(f"going on from step {progress['step']}")
    step, skipped = (np.asarray(progress[name], np.int32) for name in ("step", "skipped"))
    return parallel.replicate(TrainState(step, restored, opt_state, skipped))


def export(folder: Path, name: str, best: int | None, write: Export | None) -> None:
    """Writes the best checkpoint as a torch file where torch is installed, else says how. best: its step."""
    if best == 0:
        parallel.say(
            "no step was better than the start on held-out clips, so nothing is exported; flax_to_torch.py has --step"
        )
        return
    if not name:
        return
    if write is None:
        command = f"python convert/flax_to_torch.py {folder} --out {folder / name}"
        parallel.say(f"torch is not installed here; to export: pip install 'tortoise_jax[convert]' && {command}")
        return
    for line in write(folder, folder / name):
        parallel.say(line)
