"""What a run of AR training begins from, reads, computes and leaves; train.py puts it together."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from tortoise_jax import parallel
from tortoise_jax.checkpoints.parts import AR, DVAE
from tortoise_jax.checkpoints.pretrained import Pretrained, load_pretrained, mel_norms_digest
from tortoise_jax.checkpoints.trees import parameter_count
from tortoise_jax.data import batches, plan
from tortoise_jax.data.dataset import Dataset
from tortoise_jax.data.plan import BatchPlan
from tortoise_jax.errors import UserError
from tortoise_jax.models.lora import with_adapters
from tortoise_jax.models.unified_voice import UnifiedVoice, UnifiedVoiceConfig
from tortoise_jax.synthesis import voices
from tortoise_jax.text.cleaners import record, recorded
from tortoise_jax.training import estimate, presets, report, schemas, text_tables
from tortoise_jax.training.drafts import fixed_voices, make_drafter
from tortoise_jax.training.feed import Feed
from tortoise_jax.training.kinds import Kind
from tortoise_jax.training.optimizer import (
    Tree,
    frozen_beside_adapters,
    learning_rate_schedule,
    make_optimizer,
    split,
)
from tortoise_jax.training.run_data import open_data
from tortoise_jax.training.step import StepConfig
from tortoise_jax.training.topologies import Target


def kind(get_config: Callable[[], ConfigDict]) -> Kind:
    return Kind(
        schema=schemas.ar_schema(get_config),
        part=AR,
        load=load,
        find_data=find_data,
        fill=presets.fill,
        row_lengths=row_lengths,
        make_feed=make_feed,
        make_step_config=make_step_config,
        make_drafter=make_drafter,
        describe=lambda folder, settings, dataset: {},
        leave=leave_voices,
        subject=report.AR_MODEL,
    )


def load(settings: ConfigDict, weights: bool) -> Pretrained:
    """The checkpoint's AR model and dVAE."""
    return load_pretrained(settings.checkpoint, (AR, DVAE) if weights else ()).only(AR, DVAE)


def find_data(settings: ConfigDict, pretrained: Pretrained) -> tuple[Dataset, Pretrained]:
    """The data set, which must be made with this checkpoint's parts, and the checkpoint with its tokenizer."""
    dataset = open_data(settings, pretrained)
    ours = {
        "dvae_digest": pretrained.dvae.digest,
        "tokenizer_digest": pretrained.tokenizer.digest,
        "mel_norms_digest": mel_norms_digest(pretrained.mel_norms),
    }
    if dataset.header["own_tokenizer"]:
        del ours["tokenizer_digest"]  # chosen by --tokenizer, on purpose
    for name, value in ours.items():
        if dataset.header[name] != value:
            part = name.removesuffix("_digest").replace("_", " ").replace("dvae", "dVAE")
            why = ": its codes stand for other sounds than this one's" if name == "dvae_digest" else ""
            raise UserError(
                f"{dataset.path} was prepared with another {part} than {settings.checkpoint} has{why}; "
                f"prepare it again: python -m tortoise_jax.prepare --checkpoint {settings.checkpoint} …"
            )
    check_room(dataset, pretrained.ar.config)
    return dataset, with_text_of(dataset, pretrained)


def with_text_of(dataset: Dataset, pretrained: Pretrained) -> Pretrained:
    """The checkpoint with the data set's tokenizer and cleaner, which the run and its export must carry."""
    tokenizer, source = dataset.tokenizer(), pretrained.source | record(recorded(dataset.header))
    if tokenizer.digest != pretrained.tokenizer.digest:
        before, rows = pretrained.tokenizer, pretrained.ar.config.text_tokens
        pretrained = text_tables.with_tokenizer(pretrained, tokenizer)
        parallel.say(
            f"tokenizer: the data set's own, saved with the run; its text tables have "
            f"{pretrained.ar.config.text_tokens} rows, the checkpoint's {rows}: {text_tables.kept(before, tokenizer)} "
            "tokens keep theirs"
        )
    return dataclasses.replace(pretrained, tokenizer=tokenizer, source=source)


def check_room(dataset: Dataset, model: UnifiedVoiceConfig) -> None:
    """Every clip must fit the position tables: what lies outside has no meaning, not a small error."""
    for clip in dataset.clips:
        for what, size, room in (
            ("codes", clip.codes, model.mel_positions - 2),
            ("text tokens", clip.text_tokens, model.text_positions - 2),
        ):
            if size > room:
                raise UserError(
                    f"{dataset.path}: clip {clip.id} has {size} {what}, the checkpoint has positions for {room}; "
                    "prepare again with a lower --max_seconds or --max_text"
                )


def row_lengths(settings: ConfigDict, dataset: Dataset | None) -> np.ndarray:
    """Of the AR model's training rows; without a data set, of usual ones."""
    return plan.row_lengths(dataset, dataset.split("train")) if dataset else estimate.assumed_lengths()


def make_feed(settings: ConfigDict, pretrained: Pretrained, dataset: Dataset) -> Feed:
    """Which clips are in which batch: training shuffled by the seed, validation always alike."""
    accumulation = settings.gradient_accumulation_steps
    unit = parallel.device_count() * accumulation
    clips = {split: dataset.split(split) for split in ("train", "validation")}
    training = BatchPlan.for_training(dataset, clips["train"], settings.batch_size, settings.seed, unit)
    validation = BatchPlan.for_validation(dataset, clips["validation"], settings.batch_size, unit)
    alone = batches.conditioned_on_themselves(dataset)
    if alone:
        parallel.say(f"{alone} clips have no other clip of their speaker and are conditioned on themselves")
    of_model = {"config": pretrained.ar.config, "conditioning_clips": settings.conditioning_clips}
    make = functools.partial(batches.make_batch, seed=settings.seed, **of_model)
    return Feed(dataset, training, validation, accumulation, make)


def make_step_config(
    settings: ConfigDict, pretrained: Pretrained, rows: int, target: Target | None = None
) -> StepConfig:
    """The step for the devices that are here, or for others."""
    dtype = target.chip.dtype if target else parallel.best_dtype()
    # To plan needs no cuDNN: XLA's attention takes the same memory.
    attention = "xla" if target else parallel.best_attention(settings.dtype if settings.dtype != "auto" else dtype)
    model = pretrained.ar.config
    on_cpu = parallel.on_cpu() and not target
    compute = schemas.compute(settings, dtype, attention, on_cpu, "scatter" if on_cpu else "products")
    fused = "plain" if compute.attention_dropout else compute.attention
    parallel.say(
        f"computing in {compute.dtype}, attention {fused}, remat {compute.remat}; dropout: embedding "
        f"{compute.embed_dropout}, residual {compute.residual_dropout}, attention {compute.attention_dropout}"
    )
    optimizer_config, lora = schemas.optimizer(settings), schemas.lora(settings)
    params = pretrained.ar.params
    if lora.rank:
        params = jax.eval_shape(functools.partial(with_adapters, config=lora, seed=settings.seed), params)
        freeze = frozen_beside_adapters(params, settings.optimizer.freeze, settings.lora.also_train)
        optimizer_config = dataclasses.replace(optimizer_config, freeze=freeze)
        parallel.say(f"adapters of rank {lora.rank}, added times {lora.scale:g}; {parameters_trained(params, freeze)}")
    return StepConfig(
        model=UnifiedVoice(model, compute),
        optimizer=make_optimizer(optimizer_config, params),
        schedule=learning_rate_schedule(optimizer_config),
        mel_norms=pretrained.mel_norms,
        seed=settings.seed,
        text_weight=settings.text_weight,
        freeze=optimizer_config.freeze,
        axis=parallel.AXIS,
        conditioning_clips=settings.conditioning_clips,
        lora=lora,
    )


def parameters_trained(params: Tree, freeze: str) -> str:
    trained = parameter_count(split(params, freeze)[0])
    return f"{trained:,} of {parameter_count(params):,} parameters are trained"


def leave_voices(folder: Path, dataset: Dataset) -> None:
    """Each speaker's conditioning vector by the best checkpoint, unless that is the start."""
    best = load_pretrained(folder, (AR,))
    if best.step == 0:
        return
    for speaker, clips in fixed_voices(dataset).items():
        file = folder / "voices" / f"{re.sub(r'[^A-Za-z0-9_-]', '_', speaker)}.npz"
        file.parent.mkdir(exist_ok=True)
        voices.save_voice(file, voices.condition(best.ar.params, best.ar.config, best.mel_norms, list(clips)))
        parallel.say(f"{file}: the conditioning vector of {speaker}; vectors made with other weights are stale")
