"""Trains the AR model or the dVAE: devices -> checkpoint -> data -> recipe -> run -> loop -> export.

  python train.py --config configs/ar.py --config.checkpoint=DIR --config.data=RECORDINGS --workdir=RUN
  python train.py --config configs/dvae.py --config.data=RECORDINGS --workdir=RUN

The same command takes a stopped run up again, and the same command on every host of a pod runs it there.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import shlex
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from configs import ar, dvae
from tortoise_jax import parallel
from tortoise_jax.checkpoints.parts import AR, DVAE
from tortoise_jax.checkpoints.run_checkpoints import RunCheckpoints
from tortoise_jax.data.dataset import Dataset
from tortoise_jax.errors import UserError, exit_with_one_line
from tortoise_jax.files import check_writable
from tortoise_jax.training import (
    ar_run,
    config,
    dvae_run,
    planning,
    replay,
    report,
    run_data,
    run_directory,
    stopping,
    topologies,
)
from tortoise_jax.training.kinds import Kind
from tortoise_jax.training.loop import INTERRUPTED, Loop
from tortoise_jax.training.metrics import MetricWriter
from tortoise_jax.training.run_directory import History, Run
from tortoise_jax.training.step import Objective, TrainState, initial_state

KINDS = {AR: ar_run.kind(ar.get_config), DVAE: dvae_run.kind(dvae.get_config)}


def main() -> None:
    kind = KINDS.get(config.trains(config.with_packaged_file(sys.argv, KINDS[AR].schema)), KINDS[AR])
    config.show_help_and_exit(sys.argv, kind.schema)
    settings = config.parse(sys.argv, kind.schema)
    flags = config.FLAGS
    parallel.prepare_process(settings.deterministic)
    if flags.topology:
        parallel.prepare_to_compile_ahead()
        planning.plan_ahead(kind, settings, topologies.parse(flags.topology), flags.plan)
        return
    parallel.initialize(flags.coordinator, flags.num_processes, flags.process_id)
    with parallel.ending_together():
        train(kind, settings, flags)


def train(kind: Kind, settings: ConfigDict, flags: Any) -> None:
    # 1. Devices.
    folder = Path(flags.workdir or Path("runs") / run_data.named(Path(settings.data)).name)
    interrupted = stopping.on_signals()
    if parallel.process_count() > 1:
        print(parallel.describe_this_host(), flush=True)
    parallel.say(f"devices: {parallel.describe()}")
    parallel.check_same_code()
    parallel.check_same_everywhere("the configuration", config.flat(settings))

    if not (flags.plan or flags.replay):
        check_writable(folder, "--workdir")

    # 2. Checkpoint; a plan needs no weights.
    pretrained = kind.load(settings, not flags.plan)
    parallel.check_same_everywhere("the checkpoint", pretrained.identity)
    at = "" if pretrained.step is None else f", step {pretrained.step}"
    parallel.say(f"checkpoint: {settings.checkpoint or 'none, random weights'}{at}")

    # 3. Data.
    if flags.plan:
        planning.show_plan(kind, settings, pretrained)
        return
    dataset, pretrained = kind.find_data(settings, pretrained)
    parallel.check_same_everywhere("the data set", dataset.header["sha256"])

    # 4. What the configuration leaves open, by the size of the data set; the step and what it is fed.
    kind.fill_presets(settings, len(dataset.split("train")))
    feed = kind.make_feed(settings, pretrained, dataset)
    run_data.describe_feed(settings, dataset, feed)
    step_config = kind.make_step_config(settings, pretrained, feed.training.rows)
    drafter = kind.make_drafter(settings, pretrained, dataset)
    if flags.replay:
        show_replay(step_config, Path(flags.replay), dataset)
        return

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
        with MetricWriter(folder, first, settings.steps, parallel.is_main()) as writer:
            run = Run(folder, checkpoints, history, writer)
            loop = Loop(settings, step_config, run, feed, drafter)
            ended = loop.train(state, lambda step: parallel.stop_requested(step, interrupted()))
        checkpoints.finish()

        # 7. Export.
        if ended == INTERRUPTED:
            parallel.say(
                f"stopped and saved at step {checkpoints.newest()}; to go on: {shlex.join(['python', *sys.argv])}"
            )
            return
        if parallel.is_main():
            about = run_data.describe_data(dataset) | kind.describe(folder, settings, dataset)
            report.write(folder, history, ended, config.flat(settings), about, kind.subject)
        parallel.say(f"{ended}; report: {folder / 'report.html'}")
        if loop.failure:
            held_out = history.curve("validation", "total")
            best = f", the best is step {checkpoints.best()}" if held_out else ""
            raise UserError(f"{folder}: {loop.failure}; nothing was exported{best}")
        if parallel.is_main():
            kind.leave(folder, dataset)
            export(folder, settings.export, checkpoints.best())


def show_replay(step_config: Objective, file: Path, dataset: Dataset) -> None:
    """Computes a kept step again, on one device, and says what is not finite."""
    step, batch, params = replay.load(file)
    alone: Any = dataclasses.replace(step_config, axis=None)  # type: ignore[type-var]
    for line in replay.explain(alone, step, batch, params, [clip.id for clip in dataset.clips]):
        print(line)


def resume_or_start(checkpoints: RunCheckpoints, step_config: Objective, params: Any) -> TrainState:
    """The state on this host's devices: from the newest checkpoint that is whole, else the converted weights."""
    blank = jax.eval_shape(functools.partial(initial_state, optimizer=step_config.optimizer), params)
    found = checkpoints.restore_newest(blank.params, blank.opt_state, parallel.say)
    if found is None:
        start = functools.partial(initial_state, optimizer=step_config.optimizer)
        return parallel.mapped(start, donate=True)(parallel.replicate(params))
    restored, opt_state, progress = found
    parallel.say(f"going on from step {progress['step']}")
    step, skipped = (np.asarray(progress[name], np.int32) for name in ("step", "skipped"))
    return parallel.replicate(TrainState(step, restored, opt_state, skipped))


def export(folder: Path, name: str, best: int | None) -> None:
    """Writes the best checkpoint as a torch file where torch is installed, else says how. best: its step."""
    if best == 0:
        parallel.say(
            "no step was better than the start on held-out clips, so nothing is exported; flax_to_torch.py has --step"
        )
        return
    if not name:
        return
    command = f"python convert/flax_to_torch.py {folder} --out {folder / name}"
    if importlib.util.find_spec("torch") is None:
        parallel.say(f"torch is not installed here; to export: pip install 'tortoise_jax[convert]' && {command}")
        return
    from convert.flax_to_torch import export as write_pth

    for line in write_pth(folder, folder / name):
        parallel.say(line)


if __name__ == "__main__":
    exit_with_one_line(main)
