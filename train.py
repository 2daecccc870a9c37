"""Fine-tunes the AR model: devices -> checkpoint -> data -> recipe -> run -> loop -> export.

  python train.py --config configs/ar.py --config.checkpoint=DIR --config.data=RECORDINGS --workdir=RUN

The same command takes a stopped run up again, and the same command on every host of a pod runs it there.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from configs import ar
from tortoise_jax import parallel
from tortoise_jax.audio import SAMPLE_RATE
from tortoise_jax.checkpoints.parts import AR, DVAE
from tortoise_jax.checkpoints.pretrained import Pretrained, load_pretrained, mel_norms_digest
from tortoise_jax.checkpoints.run_checkpoints import RunCheckpoints
from tortoise_jax.data import batches
from tortoise_jax.data.dataset import CLIPS, TEXT_IDS, Dataset, inputs_of, is_dataset
from tortoise_jax.data.manifests import read_inputs
from tortoise_jax.data.plan import BatchPlan, row_lengths
from tortoise_jax.data.preparation import prepare
from tortoise_jax.errors import UserError, exit_with_one_line
from tortoise_jax.files import check_writable
from tortoise_jax.models.unified_voice import UnifiedVoice, UnifiedVoiceConfig
from tortoise_jax.synthesis import voices
from tortoise_jax.text.cleaners import record, recorded
from tortoise_jax.training import config, estimate, presets, replay, report, run_directory, schemas, stopping
from tortoise_jax.training.drafts import fixed_voices, make_drafter
from tortoise_jax.training.feed import Feed
from tortoise_jax.training.loop import INTERRUPTED, Loop
from tortoise_jax.training.metrics import MetricWriter
from tortoise_jax.training.optimizer import learning_rate_schedule, make_optimizer
from tortoise_jax.training.run_directory import History, Run
from tortoise_jax.training.step import StepConfig, TrainState, initial_state

SCHEMA = schemas.ar_schema(ar.get_config)


def main() -> None:
    config.show_help_and_exit(sys.argv, SCHEMA)
    settings = config.parse(sys.argv, SCHEMA)
    flags = config.FLAGS
    parallel.prepare_process(settings.deterministic)
    parallel.initialize(flags.coordinator, flags.num_processes, flags.process_id)
    with parallel.ending_together():
        train(settings, flags)


def train(settings: ConfigDict, flags: Any) -> None:
    # 1. Devices.
    folder = Path(flags.workdir or Path("runs") / named(Path(settings.data)).name)
    interrupted = stopping.on_signals()
    if parallel.process_count() > 1:
        print(parallel.describe_this_host(), flush=True)
    say(f"devices: {parallel.describe()}")
    parallel.check_same_everywhere("the configuration", config.flat(settings))

    if not (flags.plan or flags.replay):
        check_writable(folder, "--workdir")

    # 2. Checkpoint; a plan needs no weights.
    pretrained = load_pretrained(settings.checkpoint, () if flags.plan else (AR, DVAE))
    say(f"checkpoint: {settings.checkpoint}")

    # 3. Data.
    if flags.plan:
        show_plan(settings, pretrained)
        return
    dataset = find_data(settings, pretrained)
    pretrained = with_text_of(dataset, pretrained)

    # 4. What the configuration leaves open, by the size of the data set; the step and what it is fed.
    fill_presets(settings, len(dataset.split("train")))
    feed = make_feed(settings, pretrained, dataset)
    step_config = make_step_config(settings, pretrained)
    drafter = make_drafter(settings, pretrained, dataset)
    if flags.replay:
        show_replay(step_config, Path(flags.replay), dataset)
        return

    with parallel.alone_in(folder, "--workdir"):
        # 5. State: of the run's newest whole checkpoint, else of the converted weights.
        for line in run_directory.begin(folder, settings, pretrained, digests_of(dataset), SCHEMA.renamed):
            say(f"changed since the run began: {line}")
        checkpoints = RunCheckpoints(folder, settings.keep_last)
        state = resume_or_start(checkpoints, step_config, pretrained.ar.params)
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
            say(f"stopped and saved at step {checkpoints.newest()}; to go on: {shlex.join(['python', *sys.argv])}")
        elif parallel.is_main():
            report.write(folder, history, ended, config.flat(settings), describe_data(dataset))
            say(f"{ended}; report: {folder / 'report.html'}")
            export(folder, settings.export, dataset)


def say(line: str) -> None:
    if parallel.is_main():
        print(line, flush=True)


def find_data(settings: ConfigDict, pretrained: Pretrained) -> Dataset:
    """The prepared data set, or recordings prepared now, beside them; it must be made with this checkpoint's parts."""
    source = Path(settings.data)
    if not source.exists():
        raise UserError(f"config.data={source} does not exist; give recordings (metadata.csv, wavs/) or a data set")
    if not is_dataset(source):
        prepared = named(source).with_name(f"{named(source).name}-prepared")
        if not is_dataset(prepared):
            say(f"preparing {source}, once, into {prepared}")
            prepare([source], settings.checkpoint, prepared)
        check_current(source, prepared, settings.checkpoint)
        source = prepared
    dataset = Dataset.open(source)
    if not len(dataset.split("train")):
        held_out = len(dataset.split("validation"))
        raise UserError(
            f"{source} has no clip to train on: all {held_out} are held out for validation. A list or table named dev, "
            "val or test, or a column split, says so; rename it, or add recordings to train on, and prepare again"
        )
    ours = {
        "dvae_digest": pretrained.dvae.digest,
        "tokenizer_digest": pretrained.tokenizer.digest,
        "mel_norms_digest": mel_norms_digest(pretrained.mel_norms),
    }
    if dataset.header["own_tokenizer"]:
        del ours["tokenizer_digest"]  # chosen by --tokenizer, on purpose
    for name, value in ours.items():
        if dataset.header[name] != value:
            part = name.removesuffix("_digest").replace("_", " ")
            raise UserError(
                f"{source} was prepared with another {part} than {settings.checkpoint} has; "
                f"prepare it again: python -m tortoise_jax.prepare --checkpoint {settings.checkpoint} …"
            )
    check_room(dataset, pretrained.ar.config)
    return dataset


def check_current(source: Path, prepared: Path, checkpoint: str) -> None:
    """Raises UserError where a data set was not made of what the recordings beside it are now."""
    inputs = inputs_of(prepared)
    if not inputs:
        say(f"{prepared} was made by an older version: it is used as it is, whether or not {source} changed since")
    elif not any(read_inputs([source], one["format"])[0].digest == one["digest"] for one in inputs):
        raise UserError(
            f"{prepared} was not made of what {source} holds now: recordings or transcripts changed since, or it is of "
            f"{inputs[0]['path']}; prepare again: python -m tortoise_jax.prepare --data {source} --checkpoint "
            f"{checkpoint} --out {prepared}; or train on it as it is: --config.data={prepared}"
        )


def named(path: Path) -> Path:
    """A path that ends in a name: "." and ".." are folders with a name too."""
    found = path if path.name not in ("", "..") else path.resolve()
    if not found.name:
        raise UserError(f"config.data={path} is no data set, and none can be made beside it; give one folder")
    return found


def with_text_of(dataset: Dataset, pretrained: Pretrained) -> Pretrained:
    """The checkpoint with the data set's tokenizer and cleaner, which the run and its export must carry."""
    if dataset.header["own_tokenizer"]:
        say("tokenizer: the data set's own, saved with the run")
    source = pretrained.source | record(recorded(dataset.header))
    return dataclasses.replace(pretrained, tokenizer=dataset.tokenizer(), source=source)


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


def digests_of(dataset: Dataset) -> dict[str, str]:
    """They tell one data set from another, whatever their folders are called."""
    digests = dataset.header["sha256"]
    return {"data_digest": digests[CLIPS], "text_digest": digests[TEXT_IDS]}


def describe_data(dataset: Dataset) -> dict[str, Any]:
    clips = {split: [dataset.clips[i] for i in dataset.split(split)] for split in ("train", "validation")}
    hours = {split: sum(clip.samples for clip in part) / SAMPLE_RATE / 3600 for split, part in clips.items()}
    return {
        "data set": str(dataset.path),
        **{f"{split} clips": len(part) for split, part in clips.items()},
        **{f"{split} hours": round(value, 3) for split, value in hours.items()},
        "speakers": len({clip.speaker for clip in dataset.clips}),
    }


def fill_presets(settings: ConfigDict, clips: int) -> None:
    chosen = presets.fill(settings, clips)
    if chosen:
        say(f"recipe for {', '.join(chosen)}")


def show_plan(settings: ConfigDict, pretrained: Pretrained) -> None:
    """Says what the run would need; for speech of usual lengths where there is no data set yet."""
    if Path(settings.data).exists():
        dataset = find_data(settings, pretrained)
        lengths = row_lengths(dataset, dataset.split("train"))
    else:
        lengths = estimate.assumed_lengths()
        say(f"config.data={settings.data} does not exist: planning for {len(lengths)} clips of usual lengths")
    fill_presets(settings, len(lengths))
    step_config = make_step_config(settings, pretrained)
    for line in estimate.describe(step_config, pretrained.ar.params, settings, lengths):
        say(line)


def make_feed(settings: ConfigDict, pretrained: Pretrained, dataset: Dataset) -> Feed:
    """Which clips are in which batch: training shuffled by the seed, validation always alike."""
    accumulation = settings.gradient_accumulation_steps
    unit = parallel.device_count() * accumulation
    clips = {split: dataset.split(split) for split in ("train", "validation")}
    training = BatchPlan.for_training(dataset, clips["train"], settings.batch_size, settings.seed, unit)
    validation = BatchPlan.for_validation(dataset, clips["validation"], settings.batch_size, unit)
    if training.batch_size < settings.batch_size:
        say(f"batch: {settings.batch_size} asked for, {training.batch_size} used, all the training clips there are")
    say(
        f"data: {dataset.path}: {len(clips['train'])} clips to train on, {len(clips['validation'])} held out; "
        f"{training.batches_per_epoch} steps per epoch"
    )
    alone = batches.conditioned_on_themselves(dataset)
    if alone:
        say(f"{alone} clips have no other clip of their speaker and are conditioned on themselves")
    model = pretrained.ar.config
    return Feed(dataset, training, validation, model, settings.seed, settings.conditioning_clips, accumulation)


def make_step_config(settings: ConfigDict, pretrained: Pretrained) -> StepConfig:
    unroll = pretrained.ar.config.layers if parallel.on_cpu() else 1  # a rolled loop costs 10-20 % on CPU
    compute = schemas.compute(settings, parallel.best_dtype(), unroll)
    say(
        f"computing in {compute.dtype}; dropout: embedding {compute.embed_dropout}, residual "
        f"{compute.residual_dropout}, attention {compute.attention_dropout}"
    )
    optimizer_config = schemas.optimizer(settings)
    return StepConfig(
        model=UnifiedVoice(pretrained.ar.config, compute),
        optimizer=make_optimizer(optimizer_config, pretrained.ar.params),
        schedule=learning_rate_schedule(optimizer_config),
        mel_norms=pretrained.mel_norms,
        seed=settings.seed,
        text_weight=settings.text_weight,
        freeze=settings.optimizer.freeze,
        axis=parallel.AXIS,
    )


def show_replay(step_config: StepConfig, file: Path, dataset: Dataset) -> None:
    """Computes a kept step again, on one device, and says what is not finite."""
    step, batch, params = replay.load(file)
    for line in replay.explain(
        dataclasses.replace(step_config, axis=None), step, batch, params, [clip.id for clip in dataset.clips]
    ):
        print(line)


def resume_or_start(checkpoints: RunCheckpoints, step_config: StepConfig, params: Any) -> TrainState:
    """The state on this host's devices: from the newest checkpoint that is whole, else the converted weights."""
    blank = jax.eval_shape(functools.partial(initial_state, optimizer=step_config.optimizer), params)
    found = checkpoints.restore_newest(blank.params, blank.opt_state, say)
    if found is None:
        return parallel.replicate(initial_state(params, step_config.optimizer))
    restored, opt_state, progress = found
    say(f"going on from step {progress['step']}")
    step, skipped = (np.asarray(progress[name], np.int32) for name in ("step", "skipped"))
    return parallel.replicate(TrainState(step, restored, opt_state, skipped))


def export(folder: Path, name: str, dataset: Dataset) -> None:
    """Writes the best checkpoint for TorToiSe where torch is installed, else says how; and the voice's vector."""
    best = load_pretrained(folder, (AR,))
    for speaker, clips in fixed_voices(dataset).items():
        file = folder / "voices" / f"{re.sub(r'[^A-Za-z0-9_-]', '_', speaker)}.npz"
        file.parent.mkdir(exist_ok=True)
        voices.save_voice(file, voices.condition(best.ar.params, best.ar.config, best.mel_norms, list(clips)))
        say(f"{file}: the conditioning vector of {speaker}; vectors made with other weights are stale")
    if not name:
        return
    command = f"python convert/flax_to_torch.py {folder} --out {folder / name}"
    if importlib.util.find_spec("torch") is None:
        say(f"torch is not installed here; to export: pip install 'tortoise_jax[convert]' && {command}")
        return
    from convert.flax_to_torch import export as write_pth

    for line in write_pth(folder, folder / name):
        say(line)


if __name__ == "__main__":
    exit_with_one_line(main)
