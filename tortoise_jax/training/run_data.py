"""The data set that a run's configuration names: found or prepared now, whether it is current, what is in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from tortoise_jax import parallel
from tortoise_jax.audio import SAMPLE_RATE
from tortoise_jax.checkpoints.pretrained import Pretrained
from tortoise_jax.data.dataset import CLIPS, TEXT_IDS, Dataset, inputs_of, is_dataset
from tortoise_jax.data.manifests import read_inputs
from tortoise_jax.data.preparation import prepare
from tortoise_jax.errors import UserError, hours_in_words
from tortoise_jax.training.feed import Feed

STEPS_PER_EPOCH = "steps per epoch"


def open_data(settings: ConfigDict, pretrained: Pretrained) -> Dataset:
    """The prepared data set, or recordings prepared now, beside them."""
    source = Path(settings.data)
    if not source.exists():
        raise UserError(f"config.data={source} does not exist; give recordings (metadata.csv, wavs/) or a data set")
    if not is_dataset(source):
        prepared = prepared_beside(source)
        if not is_dataset(prepared):
            parallel.say(f"preparing {source}, once, into {prepared}")
            prepare([source], settings.checkpoint or pretrained, prepared)
        check_current(source, prepared, settings.checkpoint)
        source = prepared
    dataset = Dataset.open(source)
    if not len(dataset.split("train")):
        held_out = len(dataset.split("validation"))
        raise UserError(
            f"{source} has no clip to train on: all {held_out} are held out for validation. A list or table named dev, "
            "val or test, or a column split, says so; rename it, or add recordings to train on, and prepare again"
        )
    return dataset


def prepared_beside(recordings: Path) -> Path:
    """Where the data set is that a run makes of recordings."""
    return named(recordings).with_name(f"{named(recordings).name}-prepared")


def named(path: Path) -> Path:
    """A path that ends in a name: "." and ".." are folders with a name too."""
    found = path if path.name not in ("", "..") else path.resolve()
    if not found.name:
        raise UserError(f"config.data={path} is no data set, and none can be made beside it; give one folder")
    return found


def check_current(source: Path, prepared: Path, checkpoint: str) -> None:
    """Raises UserError where a data set was not made of what the recordings beside it are now."""
    inputs = inputs_of(prepared)
    if not inputs:
        parallel.say(
            f"{prepared} was made by an older version: it is used as it is, whether or not {source} changed since"
        )
    elif not any(read_inputs([source], one["format"])[0].digest == one["digest"] for one in inputs):
        raise UserError(
            f"{prepared} was not made of what {source} holds now: recordings or transcripts changed since, or it is of "
            f"{inputs[0]['path']}; prepare again: python -m tortoise_jax.prepare --data {source} --checkpoint "
            f"{checkpoint} --out {prepared}; or train on it as it is: --config.data={prepared}"
        )


def digests_of(dataset: Dataset) -> dict[str, str]:
    """They tell one data set from another, whatever their folders are called."""
    digests = dataset.header["sha256"]
    return {"data_digest": digests[CLIPS], "text_digest": digests[TEXT_IDS]}


def describe_data(dataset: Dataset, feed: Feed) -> dict[str, Any]:
    """What a run was trained on, for its report; hours as h:mm:ss."""
    clips = {split: [dataset.clips[i] for i in dataset.split(split)] for split in ("train", "validation")}
    hours = {split: sum(clip.samples for clip in part) / SAMPLE_RATE / 3600 for split, part in clips.items()}
    return {
        "data set": str(dataset.path),
        **{f"{split} clips": len(part) for split, part in clips.items()},
        **{f"{split} hours": hours_in_words(value) for split, value in hours.items()},
        "speakers": len({clip.speaker for clip in dataset.clips}),
        STEPS_PER_EPOCH: feed.training.batches_per_epoch,
    }


def describe_feed(settings: ConfigDict, dataset: Dataset, feed: Feed) -> None:
    clips = {split: len(dataset.split(split)) for split in ("train", "validation")}
    if feed.training.batch_size < settings.batch_size:
        parallel.say(
            f"batch: {settings.batch_size} asked for, {feed.training.batch_size} used, all the training clips there are"
        )
    parallel.say(
        f"data: {dataset.path}: {clips['train']} clips to train on, {clips['validation']} held out; "
        f"{feed.training.batches_per_epoch} steps per epoch"
    )
