"""What a run of dVAE training begins from, reads, listens to and leaves; train.py puts it together."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import unfreeze
from ml_collections import ConfigDict

from tortoise_jax import parallel
from tortoise_jax.audio import HOP, SAMPLES_PER_CODE, default_mel_norms, log_mel
from tortoise_jax.checkpoints.parts import DVAE, Part, in_collections, joined
from tortoise_jax.checkpoints.pretrained import Pretrained, load_pretrained
from tortoise_jax.data import crops
from tortoise_jax.data.dataset import Dataset
from tortoise_jax.data.encoding import CodeEncoder
from tortoise_jax.data.lengths import LJSPEECH_CLIPS
from tortoise_jax.data.plan import BatchPlan
from tortoise_jax.errors import UserError
from tortoise_jax.models.compiled import apply
from tortoise_jax.models.dvae import DiscreteVAE, DVAEConfig
from tortoise_jax.synthesis import drafts
from tortoise_jax.text.tokenizer import Tokenizer
from tortoise_jax.training import report, schemas
from tortoise_jax.training.drafts import FOLDER, Drafter
from tortoise_jax.training.dvae_step import CODEBOOK, MOVED, DVAEStep
from tortoise_jax.training.feed import Feed
from tortoise_jax.training.kinds import Kind
from tortoise_jax.training.optimizer import frozen_marks, learning_rate_schedule, make_optimizer
from tortoise_jax.training.presets import set_open
from tortoise_jax.training.run_data import open_data
from tortoise_jax.training.run_directory import Run

EVALUATIONS = 20
CLIPS_TO_HEAR = 3
CLIPS_COMPARED = 500
SCRATCH = {"steps": 20_000, "optimizer.learning_rate": 3e-4, "revive_below": 0.05}
FINE_TUNING = {"steps": 1_000, "optimizer.learning_rate": 1e-5, "revive_below": 0.0}


def kind(get_config: Callable[[], ConfigDict]) -> Kind:
    return Kind(
        schema=schemas.dvae_schema(get_config),
        part=DVAE,
        load=load,
        find_data=lambda settings, pretrained: (open_data(settings, pretrained), pretrained),
        fill=fill,
        row_lengths=row_lengths,
        make_feed=make_feed,
        make_step_config=make_step_config,
        make_drafter=make_drafter,
        describe=describe_change,
        leave=lambda folder, dataset: None,
        subject=report.CODEC,
    )


# --- start ------------------------------------------------------------------------------------------------------------


def load(settings: ConfigDict, weights: bool) -> Pretrained:
    """The checkpoint's dVAE alone, or a random one of the configuration's dimensions."""
    if not settings.checkpoint:
        return random_start(DVAEConfig(**settings.model), settings.seed)
    pretrained = load_pretrained(settings.checkpoint, (DVAE,) if weights else ())
    return dataclasses.replace(pretrained, parts={DVAE: pretrained.dvae})


def random_start(config: DVAEConfig, seed: int) -> Pretrained:
    """The same on every host."""
    mel = jnp.zeros((1, config.frames_per_code, config.channels))
    tree = unfreeze(joined(jax.jit(DiscreteVAE(config).init)(jax.random.key(seed), mel)))
    tree[CODEBOOK]["embed_avg"] = tree[CODEBOOK]["embed"]
    part = Part.of_tree(config, jax.tree.map(np.asarray, tree))
    return Pretrained({DVAE: part}, Tokenizer.default(), default_mel_norms(), {DVAE: {"random_weights": seed}})


def fill(settings: ConfigDict, clips: int) -> list[str]:
    """Sets every field that is None; returns "field=value" of what was set."""
    recipe = FINE_TUNING if settings.checkpoint else SCRATCH
    steps = recipe["steps"] if settings.steps is None else settings.steps
    eval_every = max(1, round(steps / EVALUATIONS)) if settings.eval_every is None else settings.eval_every
    values = recipe | {"steps": int(steps), "eval_every": eval_every, "sample_every": 4 * eval_every}
    return set_open(settings, "fine-tuning a dVAE" if settings.checkpoint else "a dVAE from scratch", values)


# --- what is fed, what a step is --------------------------------------------------------------------------------------


def make_feed(settings: ConfigDict, pretrained: Pretrained, dataset: Dataset) -> Feed:
    accumulation, samples = settings.gradient_accumulation_steps, settings.crop_codes * SAMPLES_PER_CODE
    unit = parallel.device_count() * accumulation
    clips = {split: dataset.split(split) for split in ("train", "validation")}
    training = BatchPlan.of_crops(clips["train"], settings.batch_size, samples, unit, settings.seed)
    validation = BatchPlan.of_crops(clips["validation"], settings.batch_size, samples, unit)
    make = functools.partial(crops.make_crops, seed=settings.seed)
    return Feed(dataset, training, validation, accumulation, make)


def row_lengths(settings: ConfigDict, dataset: Dataset | None) -> np.ndarray:
    """Samples of the training crops, all alike; without a data set, of as many as LJSpeech has clips."""
    clips = len(dataset.split("train")) if dataset else LJSPEECH_CLIPS
    return np.full(clips, settings.crop_codes * SAMPLES_PER_CODE, np.int64)


def make_step_config(settings: ConfigDict, pretrained: Pretrained, rows: int) -> DVAEStep:
    """rows: of the batch of all devices."""
    config, tree = pretrained.dvae.config, pretrained.dvae.tree
    if settings.crop_codes * SAMPLES_PER_CODE % (config.frames_per_code * HOP):
        raise UserError(
            f"config: crop_codes is {settings.crop_codes}, which is no multiple of a code of this dVAE "
            f"({config.frames_per_code} frames)"
        )
    freeze = settings.optimizer.freeze
    if freeze:
        frozen_marks(tree, freeze)  # says what is wrong with it
    optimizer_config = dataclasses.replace(schemas.optimizer(settings), freeze=f"{MOVED}|{freeze}" if freeze else MOVED)
    return DVAEStep(
        model=DiscreteVAE(config),
        optimizer=make_optimizer(optimizer_config, tree),
        schedule=learning_rate_schedule(optimizer_config),
        mel_norms=pretrained.mel_norms,
        rows=rows,
        seed=settings.seed,
        reconstruction=settings.reconstruction,
        commitment=settings.commitment,
        revive_below=settings.revive_below,
        freeze=optimizer_config.freeze,
        axis=parallel.AXIS,
    )


# --- listening --------------------------------------------------------------------------------------------------------


def make_drafter(settings: ConfigDict, pretrained: Pretrained, dataset: Dataset) -> Drafter | None:
    """A function of (step, params on the host, run) that writes clips through the dVAE; None where none are wanted.

    The clips themselves are written once, at the first step: through Griffin-Lim too, so that the two can be compared.
    """
    if not settings.sample_every or not parallel.is_main():
        return None
    config, norms = pretrained.dvae.config, pretrained.mel_norms
    held_out = dataset.split("validation")
    clips = [int(i) for i in (held_out if len(held_out) else dataset.split("train"))[:CLIPS_TO_HEAR]]
    mels = [np.asarray(log_mel(dataset.waveform(i), norms)) for i in clips]

    def reconstruct(step: int, params: Any, run: Run) -> None:
        if run.history.has("sample", step):
            return
        (run.folder / FOLDER).mkdir(exist_ok=True)
        variables = in_collections(config, params)
        for i, mel in zip(clips, mels, strict=True):
            codes = np.asarray(apply(DiscreteVAE(config), "encode", variables, mel[None]))
            clip, decoded = dataset.clips[i], drafts.decode_mel(variables, config, codes)[0][: len(mel)]
            recording, made = f"{FOLDER}/{clip.id}-original.wav", f"{FOLDER}/{clip.id}-step-{step:06d}.wav"
            for name, tag, shown in ((recording, "original", mel), (made, "codes", decoded)):
                if tag == "codes" or step == 0:
                    waveform = drafts.draft_waveform(shown, norms)
                    drafts.write_wav(run.folder / name, waveform)
                    run.writer.audio(step, f"{tag}/{clip.id}", waveform)
            sample = {"prompt": clip.text, "voice": "through the codes", "recording": recording, "file": made}
            run.history.add("sample", step, sample)

    return reconstruct


# --- what has changed -------------------------------------------------------------------------------------------------


def describe_change(folder: Path, settings: ConfigDict, dataset: Dataset) -> dict[str, str]:
    """Says and returns which share of the training clips' codes the best checkpoint still gives as the start did."""
    if not settings.checkpoint:
        return {}
    before, after = load(settings, weights=True), load_pretrained(folder, (DVAE,))
    clips = dataset.split("train")[:CLIPS_COMPARED]
    same, total = unchanged_codes(before, after, [dataset.waveform(int(i)) for i in clips])
    line = f"{same / total:.1%} of {total} codes of {len(clips)} training clips"
    parallel.say(
        f"unchanged: {line}, by the best checkpoint; an AR model trained with the old codes reads the others wrong: "
        f"prepare data sets again with {folder} and train it on them"
    )
    return {"codes unchanged": line}


def unchanged_codes(before: Pretrained, after: Pretrained, waveforms: list[np.ndarray]) -> tuple[int, int]:
    """(codes that both dVAEs give alike, all codes) of int16 waveforms."""
    old, new = (
        CodeEncoder(one.dvae.config, one.dvae.variables, one.mel_norms).encode(waveforms) for one in (before, after)
    )
    return sum(int((a == b).sum()) for a, b in zip(old, new, strict=True)), sum(map(len, old))
