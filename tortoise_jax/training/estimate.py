"""`train.py --plan`: what a run needs before it starts: shapes, memory by part, time, what to change if too much."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from tortoise_jax import parallel
from tortoise_jax.checkpoints.trees import parameter_count
from tortoise_jax.data import batches
from tortoise_jax.data.lengths import ljspeech_lengths
from tortoise_jax.data.plan import training_epoch
from tortoise_jax.errors import count_of
from tortoise_jax.training.optimizer import split
from tortoise_jax.training.step import Objective, TrainState, first_state, train_step

GIB = 2**30
TIMED_STEPS = 3
TIMING_SECONDS = 20.0  # of all timed runs of one shape together, about
FEW_ROWS = 4  # per device: enough to occupy most machines, quick on a CPU


def assumed_lengths() -> np.ndarray:
    """Row lengths of a data set that does not exist yet: as LJSpeech's, (13100,) int64."""
    return batches.row_length(*ljspeech_lengths())


def describe(config: Objective, params: Any, settings: ConfigDict, lengths: np.ndarray) -> Iterator[str]:
    """The lines of the plan, each as soon as it is known: compiling and timing take about a minute.

    params: the checkpoint's tree, of which only shapes and dtypes are used. settings: filled.
    lengths (clips,): of the training rows, before padding, in `config.unit`.
    """
    epoch = Epoch.of(settings, lengths, parallel.device_count())
    rows, accumulation = epoch.rows, epoch.accumulation
    work = Work(config, params, epoch.longest)
    yield from describe_parameters(config, work.state.params)
    yield from epoch.describe(config.unit)
    yield "compiling the longest shape …"
    started = time.perf_counter()
    compiled = work.compile(rows, accumulation)
    compiling = time.perf_counter() - started
    yield f"  compiled in {compiling:.0f} s"
    memory = memory_parts(compiled.memory_analysis(), work.state, size(split(work.state.params, config.freeze)[0]))
    needed, limit = sum(memory.values()), parallel.device_memory()
    yield from describe_memory(memory, limit)
    if limit and needed > limit:
        yield "it does not fit, and so is not timed; in this order:"
        yield from remedies(settings, accumulation, rows)
        return
    yield "it fits" if limit else "the device does not say how much it has"

    seconds, timed_rows = step_seconds(work, compiled, rows, accumulation)
    whole = timed_rows == rows * accumulation
    takes = f"takes {seconds:.2f} s (median of {TIMED_STEPS})"
    if not whole:
        takes = (
            f"takes about {seconds:.2f} s (estimated from {timed_rows} rows of {work.length} {config.unit} per device)"
        )
    in_epoch = sum(seconds * length / work.length * count for length, count in epoch.shapes.items())
    yield f"the longest step {takes}; an epoch about {duration(in_epoch)}"
    shapes = count_of(len(epoch.shapes), "shape")
    yield epoch.describe_run(settings.steps, in_epoch)
    yield f"  and {duration(len(epoch.shapes) * compiling)} once to compile {shapes}, which later runs find on the disk"


@dataclasses.dataclass(frozen=True)
class Epoch:
    """The steps of an epoch. shapes: length of the rows -> number of steps; rows: of a micro-batch on a device."""

    clips: int
    batch_size: int
    rows: int
    accumulation: int
    shapes: Counter[int]

    @classmethod
    def of(cls, settings: ConfigDict, lengths: np.ndarray, devices: int) -> Epoch:
        accumulation, clips = settings.gradient_accumulation_steps, len(lengths)
        batch_size = min(settings.batch_size, clips)
        shapes = Counter(length for length, _ in training_epoch(lengths, batch_size, settings.seed, 0))
        return cls(clips, batch_size, -(-batch_size // (devices * accumulation)), accumulation, shapes)

    @property
    def steps(self) -> int:
        return self.shapes.total()

    @property
    def longest(self) -> int:
        return max(self.shapes)

    def describe(self, unit: str) -> Iterator[str]:
        """unit: of the lengths."""
        yield f"an epoch: {self.steps} steps of {self.batch_size} clips, {len(self.shapes)} shapes to compile:"
        times = f"{self.accumulation} times per step"
        for length, count in sorted(self.shapes.items()):
            yield f"  {self.rows} rows of {length} {unit} per device, {times}: {count} steps"

    def describe_run(self, steps: int, epoch_seconds: float) -> str:
        epochs = steps / self.steps
        takes = duration(epoch_seconds * epochs)
        return f"the run: {steps} steps, {epochs:.1f} epochs of {self.clips} clips, about {takes}"


def describe_parameters(config: Objective, params: Any) -> Iterator[str]:
    yield f"parameters: {parameter_count(params):,}"
    for part, tree in params.items():
        yield f"  {part}: {parameter_count(tree):,}"
    if config.freeze:
        yield f"  of which {parameter_count(split(params, config.freeze)[1]):,} are frozen"


def describe_memory(memory: dict[str, int], limit: float | None) -> Iterator[str]:
    yield "memory of one device:"
    for name, value in memory.items():
        yield f"  {name}: {value / GIB:.2f} GiB"
    yield f"  together: {sum(memory.values()) / GIB:.2f} GiB" + (f" of {limit / GIB:.1f} GiB" if limit else "")


class Work:
    """A run's training step for batches of one length, compiled for as many rows as asked for."""

    def __init__(self, config: Objective, params: Any, length: int) -> None:
        self.length, self.shapes = length, functools.partial(config.batch_shapes, length)
        self.state = state_shapes(config, params)
        self.step = parallel.mapped(functools.partial(train_step, config), donate=True)

    def batch(self, rows: int, accumulation: int) -> Any:
        """This host's batch as shapes, (local devices, accumulation, rows, …)."""
        return with_device_axis(self.shapes(rows, accumulation))

    def compile(self, rows: int, accumulation: int) -> Any:
        return self.step.lower(with_device_axis(self.state), self.batch(rows, accumulation)).compile()


def state_shapes(config: Objective, params: Any) -> TrainState:
    return jax.eval_shape(functools.partial(first_state, config=config), params)


def with_device_axis(tree: Any) -> Any:
    count = parallel.local_device_count()
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype), tree)


def zeros(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), tree)


def size(tree: Any) -> int:
    """Bytes of all arrays."""
    return sum(int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def memory_parts(analysis: Any, state: TrainState, trained: int) -> dict[str, int]:
    """Bytes of one device by part, from the compiled program's own analysis; trained: of the trained parameters."""
    temporary = analysis.temp_size_in_bytes
    gradients = min(trained, temporary)
    return {
        "parameters": size(state.params),
        "optimiser": size(state.opt_state),
        "gradients": gradients,
        "activations": temporary - gradients,
        "batch": max(0, analysis.argument_size_in_bytes - size(state)),
        # Donated state is written in place; where the platform cannot do that, the new state needs memory of its own.
        "outputs beside the state": max(0, analysis.output_size_in_bytes - analysis.alias_size_in_bytes),
    }


def remedies(settings: ConfigDict, accumulation: int, rows: int) -> Iterator[str]:
    """What to change where memory does not suffice, what costs least first."""
    if rows > 1:
        yield f"  --config.gradient_accumulation_steps={2 * accumulation}: half the rows at a time, the same result"
    if settings.get("remat", "full") != "full":
        yield "  --config.remat=full: a fifth slower, a fraction of the activations"
    if "dtype" in settings:
        yield "  --config.dtype=bfloat16: half the activations, where the hardware computes it"
    if settings.optimizer.moments != "bfloat16" and settings.optimizer.name == "adamw":
        yield "  --config.optimizer.moments=bfloat16: half the optimiser state"
    if settings.optimizer.name != "adafactor":
        yield "  --config.optimizer.name=adafactor: optimiser state of a thousandth"
    if settings.get("lora", {"rank": 1})["rank"] == 0:
        yield "  --config.lora.rank=16: adapters alone are trained, no gradients or optimiser state of the model"


def step_seconds(work: Work, whole: Any, rows: int, accumulation: int) -> tuple[float, int]:
    """Seconds of a step of rows x accumulation rows per device, and how many rows per device were timed for it.

    whole: the compiled step. A few rows in one micro-batch are timed first. Only where they show that the whole step is
    quick is it timed itself; else their time is taken in proportion.
    """
    total, few = rows * accumulation, min(rows, FEW_ROWS)
    live = parallel.replicate(zeros(work.state))
    if total > few:
        seconds, live = timed(work.compile(few, 1), live, zeros(work.batch(few, 1)))
        estimate = seconds * total / few
        if parallel.any_host(estimate * (1 + TIMED_STEPS) > TIMING_SECONDS):  # all hosts must run the same
            return estimate, few
    return timed(whole, live, zeros(work.batch(rows, accumulation)))[0], total


def timed(compiled: Any, live: Any, batch: Any) -> tuple[float, Any]:
    """Median seconds of TIMED_STEPS runs after a first one, or of fewer where they take long; and the last state."""
    seconds: list[float] = []
    while len(seconds) <= TIMED_STEPS and not parallel.any_host(sum(seconds) > TIMING_SECONDS):
        started = time.perf_counter()
        live, metrics = compiled(live, batch)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds[1:] or seconds)), live


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
