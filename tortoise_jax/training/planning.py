"""`train.py --plan`: what the configured run would need, here or on a machine that is not here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from tortoise_jax import parallel
from tortoise_jax.checkpoints.parts import AR
from tortoise_jax.checkpoints.pretrained import Pretrained, load_pretrained, released_shapes
from tortoise_jax.errors import UserError
from tortoise_jax.training import ahead_of_time, ar_run, estimate, topologies
from tortoise_jax.training.kinds import Kind
from tortoise_jax.training.topologies import Target


def show_plan(kind: Kind, settings: ConfigDict, pretrained: Pretrained) -> None:
    """Says what the run would need; for speech of usual lengths where there is no data set yet."""
    lengths = planned_lengths(kind, settings, pretrained)
    kind.fill_presets(settings, len(lengths))
    step_config = kind.make_step_config(settings, pretrained, settings.batch_size)
    for line in estimate.describe(step_config, pretrained.part(kind.part).tree, settings, lengths):
        parallel.say(line)


def plan_ahead(kind: Kind, settings: ConfigDict, target: Target, plan: bool) -> None:
    """Says what the run would need on a machine that is not here; of the released model where there is none yet."""
    if not plan:
        raise UserError(f"--topology {target.name} is for --plan; a run uses the devices that are here")
    if kind.part != AR:
        raise UserError("--topology plans for the AR model; --plan alone times the dVAE's step here")
    topologies.check_compiler(target.chip.platform)
    if Path(settings.checkpoint).exists():
        pretrained = load_pretrained(settings.checkpoint, ())
        lengths = planned_lengths(kind, settings, pretrained)
    else:
        pretrained, lengths = released_shapes(), estimate.assumed_lengths()
        parallel.say(
            f"config.checkpoint={settings.checkpoint} does not exist: planning for the released model and "
            f"{len(lengths)} clips of usual lengths"
        )
    kind.fill_presets(settings, len(lengths))
    step_config = ar_run.make_step_config(settings, pretrained, settings.batch_size, target)
    for line in ahead_of_time.describe(target, step_config, pretrained.ar.params, settings, lengths):
        parallel.say(line)


def planned_lengths(kind: Kind, settings: ConfigDict, pretrained: Pretrained) -> np.ndarray:
    """Of the training rows (clips,): of the data, or of usual speech where there is none yet."""
    dataset = kind.find_data(settings, pretrained)[0] if Path(settings.data).exists() else None
    lengths = kind.row_lengths(settings, dataset)
    if dataset is None:
        parallel.say(f"config.data={settings.data} does not exist: planning for {len(lengths)} clips of usual lengths")
    return lengths
