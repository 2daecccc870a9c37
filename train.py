"""Fine-tunes the AR model: config -> devices -> checkpoint -> data -> state -> loop -> export.

  python train.py --config configs/ar.py --config.checkpoint=DIR --config.data=RECORDINGS --workdir=RUN

The same command takes a stopped run up again, and the same command on every host of a pod runs it there.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tortoise_jax.prepare import prepare

from tortoise_jax import batches, config, parallel, stopping
from tortoise_jax.batches import TrainingPlan, ValidationPlan
from tortoise_jax.checkpoint import (
    CARD,
    Pretrained,
    RunCheckpoints,
    load_pretrained,
    mel_norms_digest,
    read_json,
    save_tree,
    write_card,
    write_json,
)
from tortoise_jax.dataset import Dataset
from tortoise_jax.errors import UserError, exit_with_one_line
from tortoise_jax.loss import means, total_loss
from tortoise_jax.optimizer import learning_rate_schedule, make_optimizer
from tortoise_jax.step import Recipe, TrainState, eval_step, initial_state, train_step
from tortoise_jax.unified_voice import UnifiedVoice
from tortoise_jax.watch import Watch

CONFIG = "config.json"
Plan = TrainingPlan | ValidationPlan
SKIPS_BEFORE_GIVING_UP = 10


def main() -> None:
    config.show_help_and_exit(sys.argv)
    settings = config.parse(sys.argv)
    flags = config.FLAGS

    # 1. Devices.
    parallel.initialize(flags.coordinator, flags.num_processes, flags.process_id)
    stop = stopping.on_signals()
    say(f"devices: {parallel.describe()}")
    parallel.check_same_everywhere("the configuration", config.flat(settings))
    run = Path(flags.workdir or Path("runs") / Path(settings.data).name)

    # 2. Checkpoint.
    pretrained = load_pretrained(settings.checkpoint)
    say(f"checkpoint: {settings.checkpoint}")

    # 3. Data.
    dataset = find_data(settings, pretrained)
    plan, validation = make_plans(settings, dataset)

    # 4. State: a run's newest checkpoint, else the converted weights.
    recipe = make_recipe(settings, pretrained)
    begin_run(run, settings, pretrained)
    checkpoints = RunCheckpoints(run, settings.keep_last)
    state = resume_or_start(checkpoints, recipe, pretrained.params)

    # 5. Loop.
    finished = train(settings, run, recipe, state, checkpoints, dataset, plan, validation, stop)

    # 6. Export.
    checkpoints.finish()
    if not finished:
        say(f"stopped and saved; the same command goes on: {' '.join(sys.argv)}")
    elif parallel.is_main():
        export(run, settings.export)
    parallel.wait_for_all("end of the run")


def say(line: str) -> None:
    if parallel.is_main():
        print(line, flush=True)


def find_data(settings: ConfigDict, pretrained: Pretrained) -> Dataset:
    """The prepared data set, or recordings prepared now, beside them; it must be made with this checkpoint's parts."""
    source = Path(settings.data)
    if not source.exists():
        raise UserError(f"config.data={source} does not exist; give recordings (metadata.csv, wavs/) or a data set")
    if not (source / "dataset.json").exists():
        prepared = source.with_name(f"{source.name}-prepared")
        if not (prepared / "dataset.json").exists():
            prepare(source, settings.checkpoint, prepared)
        source = prepared
    dataset = Dataset.open(source)
    ours = {
        "dvae_digest": pretrained.dvae_digest,
        "tokenizer_digest": pretrained.tokenizer.digest,
        "mel_norms_digest": mel_norms_digest(pretrained.mel_norms),
    }
    for name, value in ours.items():
        if dataset.header[name] != value:
            part = name.removesuffix("_digest").replace("_", " ")
            raise UserError(
                f"{source} was prepared with another {part} than {settings.checkpoint} has; "
                f"prepare it again: python -m tortoise_jax.prepare --checkpoint {settings.checkpoint} …"
            )
    return dataset


def make_plans(settings: ConfigDict, dataset: Dataset) -> tuple[TrainingPlan, ValidationPlan]:
    """Which clips are in which batch: training shuffled by the seed, validation always alike."""
    unit = parallel.device_count() * settings.accumulation
    clips = {split: dataset.split(split) for split in ("train", "validation")}
    lengths = {split: batches.row_lengths(dataset, split) for split in clips}
    plan = batches.TrainingPlan(clips["train"], lengths["train"], settings.batch_size, settings.seed, unit=unit)
    validation = batches.ValidationPlan(clips["validation"], lengths["validation"], settings.batch_size, unit=unit)
    if plan.note:
        say(plan.note)
    say(
        f"data: {dataset.path}: {len(clips['train'])} clips to train on, {len(clips['validation'])} held out; "
        f"{plan.batches_per_epoch} steps an epoch"
    )
    return plan, validation


def make_recipe(settings: ConfigDict, pretrained: Pretrained) -> Recipe:
    assert pretrained.config is not None
    unroll = pretrained.config.layers if parallel.on_cpu() else 1  # a rolled loop costs 10-20 % on CPU
    compute = config.compute(settings, parallel.best_dtype(), unroll)
    say(
        f"computing in {compute.dtype}; dropout: embedding {compute.embed_dropout}, residual "
        f"{compute.residual_dropout}, attention {compute.attention_dropout}"
    )
    optimizer_config = config.optimizer(settings)
    return Recipe(
        model=UnifiedVoice(pretrained.config, compute),
        optimizer=make_optimizer(optimizer_config, pretrained.params),
        schedule=learning_rate_schedule(optimizer_config),
        mel_norms=pretrained.mel_norms,
        seed=settings.seed,
        text_weight=settings.text_weight,
        freeze=settings.optimizer.freeze,
        axis=parallel.AXIS,
    )


def begin_run(run: Path, settings: ConfigDict, pretrained: Pretrained) -> None:
    """Makes the run's directory a checkpoint of its own (card, dVAE), or checks that it is this run's."""
    now = json.loads(json.dumps(config.flat(settings)))
    if (run / CONFIG).exists():
        changed = config.changes(read_json(run / CONFIG), now)
        refused = [line for line in changed if line.split(":")[0] in config.FIXED]
        if refused:
            raise UserError(f"{run} was begun with other settings that cannot change: {'; '.join(refused)}")
        for line in changed:
            say(f"changed since the run began: {line}")
    if parallel.is_main():
        try:
            run.mkdir(parents=True, exist_ok=True)
            if not (run / CARD).exists():
                if not (run / "dvae").exists():
                    save_tree(run / "dvae", pretrained.dvae_params)
                write_card(run, pretrained)
            write_json(run / CONFIG, now)
        except OSError as error:
            raise UserError(f"--workdir {run}: cannot be written: {error.strerror or error}") from None
    parallel.wait_for_all("the run's directory")
    if not (run / CARD).exists():
        raise UserError(f"--workdir {run} is not on storage that all hosts share; a run's directory must be")


def resume_or_start(checkpoints: RunCheckpoints, recipe: Recipe, params: Any) -> TrainState:
    """The state, replicated over this host's devices: from the newest checkpoint, else the converted weights."""
    newest = checkpoints.newest()
    if newest is None:
        return parallel.replicate(initial_state(params, recipe.optimizer))
    blank = jax.eval_shape(functools.partial(initial_state, optimizer=recipe.optimizer), params)
    restored, opt_state, progress = checkpoints.restore(newest, blank.params, blank.opt_state)
    say(f"going on from step {newest}")
    counters = {name: np.asarray(progress[name], np.int32) for name in ("step", "skipped")}
    return parallel.replicate(TrainState(params=restored, opt_state=opt_state, **counters))


def train(
    settings: ConfigDict,
    run: Path,
    recipe: Recipe,
    state: TrainState,
    checkpoints: RunCheckpoints,
    dataset: Dataset,
    plan: TrainingPlan,
    validation: ValidationPlan,
    stop: Callable[[], bool],
) -> bool:
    """Runs to `settings.steps`; False where a signal ended it before."""
    step_fn = parallel.mapped(functools.partial(train_step, recipe), donate=True)
    eval_fn = parallel.mapped(functools.partial(eval_step, recipe), donate=False)
    feed = functools.partial(feed_batch, settings, recipe, dataset)
    first = int(parallel.first_copy(state.step))
    clips = plan.batch_size

    def save(step: int, state: TrainState, loss: float | None) -> None:
        host = parallel.first_copy(state)
        progress = {"step": step, "skipped": int(host.skipped)}
        checkpoints.save(step, host.params, host.opt_state, progress, loss)

    with Watch(run, first, settings.steps, parallel.is_main()) as watch:
        if first == 0:
            evaluate(watch, 0, recipe, eval_fn, state, feed, validation)
        steps = range(first, settings.steps)
        for step, batch in zip(steps, batches.prefetch(lambda s: feed(plan, s), steps), strict=True):
            state, metrics = step_fn(state, batch)
            metrics = {name: float(value) for name, value in parallel.first_copy(metrics).items()}
            done = step + 1
            watch.step(done, metrics, clips, log=done % settings.log_every == 0)
            give_up_on_nan(watch, done, state, metrics)
            last = done == settings.steps
            if done % settings.eval_every == 0 or last:
                loss = evaluate(watch, done, recipe, eval_fn, state, feed, validation)
                save(done, state, loss)
            if parallel.any_host(stop()) and not last:
                save(done, state, None)
                return False
    return True


def feed_batch(settings: ConfigDict, recipe: Recipe, dataset: Dataset, plan: Plan, step: int) -> dict[str, np.ndarray]:
    """This host's part of a step's batch, laid out for its devices."""
    length, indices = plan.batch(step)
    batch = batches.make_batch(
        dataset,
        indices,
        length,
        rows=plan.rows,
        config=recipe.model.config,
        seed=settings.seed,
        step=step,
        conditioning_clips=settings.conditioning_clips,
        host=parallel.host_rows(plan.rows),
    )
    return parallel.split_rows(batch, settings.accumulation)


def evaluate(
    watch: Watch,
    step: int,
    recipe: Recipe,
    eval_fn: Callable[..., Any],
    state: TrainState,
    feed: Callable[[Plan, int], dict[str, np.ndarray]],
    validation: ValidationPlan,
) -> float | None:
    """The loss over all held-out clips, without dropout, with fixed conditioning; None where there are none."""
    if not validation.batches_per_epoch:
        return None
    totals: dict[str, np.ndarray] = {}
    for batch in batches.prefetch(lambda i: feed(validation, i), range(validation.batches_per_epoch)):
        sums = parallel.first_copy(eval_fn(state.params, batch))
        totals = {name: totals.get(name, 0) + value for name, value in sums.items()}
    losses = {name: float(value) for name, value in means(totals, totals).items()}
    loss = float(total_loss(totals, totals, recipe.text_weight))
    watch.scalars(step, {f"validation/{name}": value for name, value in losses.items()} | {"validation/total": loss})
    watch.say(
        f"step {step}: held-out loss mel {losses['mel']:.4f}, text {losses['text']:.4f}, stop {losses['stop']:.4f}"
    )
    return loss


def give_up_on_nan(watch: Watch, step: int, state: TrainState, metrics: dict[str, float]) -> None:
    if metrics["finite"]:
        return
    skipped = int(parallel.first_copy(state.skipped))
    watch.say(f"step {step}: the loss or a gradient was not finite; the step was not applied")
    if skipped >= SKIPS_BEFORE_GIVING_UP:
        raise UserError(f"{skipped} steps in a row were not finite; lower optimizer.learning_rate")


def export(run: Path, name: str) -> None:
    """Writes the best checkpoint for TorToiSe where torch is installed, else says how."""
    if not name:
        return
    command = f"python convert/flax_to_torch.py {run} --out {run / name}"
    if importlib.util.find_spec("torch") is None:
        say(f"torch is not installed here; to export: pip install 'tortoise_jax[convert]' && {command}")
        return
    from convert.flax_to_torch import export as write_pth

    for line in write_pth(run, run / name):
        say(line)


if __name__ == "__main__":
    exit_with_one_line(main)
