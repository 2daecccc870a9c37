"""What is different between training one model and another: ar_run.py and dvae_run.py each make a `Kind`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from tortoise_jax import parallel
from tortoise_jax.checkpoints.pretrained import Pretrained
from tortoise_jax.data.dataset import Dataset
from tortoise_jax.training.config import Schema
from tortoise_jax.training.drafts import Drafter
from tortoise_jax.training.feed import Feed
from tortoise_jax.training.report import Subject
from tortoise_jax.training.step import Objective


@dataclasses.dataclass(frozen=True)
class Kind:
    """What is different between training one model and another.

    part: of a checkpoint, the one that is trained. load(settings, weights) -> the checkpoint to start from.
    find_data(settings, checkpoint) -> the data set, which suits it, and the checkpoint with what it takes from it.
    fill(settings, training clips) -> what was chosen for fields left open. feed, step and drafter make the three parts
    of the loop. describe(folder, settings, data set): facts for the report, of a run that has
    ended. leave(folder, data set): writes what a run leaves besides its report and export.
    """

    schema: Schema
    part: str
    load: Callable[[ConfigDict, bool], Pretrained]
    find_data: Callable[[ConfigDict, Pretrained], tuple[Dataset, Pretrained]]
    fill: Callable[[ConfigDict, int], list[str]]
    row_lengths: Callable[[ConfigDict, Dataset | None], np.ndarray]
    make_feed: Callable[[ConfigDict, Pretrained, Dataset], Feed]
    make_step_config: Callable[[ConfigDict, Pretrained, int], Objective]
    make_drafter: Callable[[ConfigDict, Pretrained, Dataset], Drafter | None]
    describe: Callable[[Path, ConfigDict, Dataset], dict[str, str]]
    leave: Callable[[Path, Dataset], None]
    subject: Subject

    def fill_presets(self, settings: ConfigDict, clips: int) -> None:
        chosen = self.fill(settings, clips)
        if chosen:
            parallel.say(f"recipe for {', '.join(chosen)}")
