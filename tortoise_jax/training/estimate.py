"""`train.py --plan`: what a run needs before it starts: shapes, memory by part, time, what to change if too much."""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from tortoise_jax import parallel
from tortoise_jax.audio import CONDITIONING_SAMPLES
from tortoise_jax.checkpoints.pretrained import parameter_count
from tortoise_jax.data import batches
from tortoise_jax.data.lengths import ljspeech_lengths
from tortoise_jax.data.plan import training_epoch
from tortoise_jax.training.step import Recipe, TrainState, initial_state, train_step

GIB = 2**30
TIMED_STEPS = 3


def assumed_lengths() -> np.ndarray:
    """Row lengths of a data set that does not exist yet: as LJSpeech's, (13100,) int64."""
    return batches.row_length(*ljspeech_lengths())


def describe(recipe: Recipe, params: Any, settings: ConfigDict, lengths: np.ndarray) -> Iterator[str]:
    """The lines of the plan, each as soon as it is known: compiling and timing take a while.

    lengths: of the training rows. settings: filled.
    """
    model, accumulation, clips = recipe.model, settings.accumulation, len(lengths)
    batch_size = min(settings.batch_size, clips)
    epoch = training_epoch(lengths, batch_size, settings.seed, 0)
    shapes = Counter(length for length, _ in epoch)
    rows = -(-batch_size // (parallel.device_count() * accumulation))
    yield f"parameters: {parameter_count(params):,}"
    for part, tree in params.items():
        yield f"  {part}: {parameter_count(tree):,}"
    yield f"an epoch: {len(epoch)} steps of {batch_size} clips, {len(shapes)} shapes to compile:"
    for length, count in sorted(shapes.items()):
        yield f"  {rows} rows of {length} positions a device, {accumulation} times a step: {count} steps"
    state = jax.eval_shape(functools.partial(initial_state, optimizer=recipe.optimizer), params)
    step = parallel.mapped(functools.partial(train_step, recipe), donate=True)
    yield "compiling the longest shape …"
    started = time.perf_counter()
    compiled = step.lower(*with_device_axis(state, device_batch(max(shapes), rows, accumulation))).compile()
    yield f"  compiled in {time.perf_counter() - started:.0f} s"
    yield from memory_lines(state, compiled.memory_analysis(), model.compute.remat, accumulation, rows)
    longest = timed(compiled, state, device_batch(max(shapes), rows, accumulation))
    seconds = sum(longest * length / max(shapes) * count for length, count in shapes.items())
    yield f"the longest step takes {longest:.2f} s (median of {TIMED_STEPS}); an epoch about {duration(seconds)}"
    epochs = settings.steps / len(epoch)
    yield f"the run: {settings.steps} steps, {epochs:.1f} epochs of {clips} clips, about {duration(seconds * epochs)}"


def device_batch(length: int, rows: int, accumulation: int, clips: int = 2) -> dict[str, Any]:
    """One device's batch as shapes, without the device axis."""
    row = lambda dtype: jax.ShapeDtypeStruct((accumulation, rows, length), dtype)
    names = ("tokens", "kinds", "positions", "targets")
    return {
        **{name: row(np.int32) for name in names},
        "weights": row(np.float32),
        "example": jax.ShapeDtypeStruct((accumulation, rows), np.int32),
        "conditioning_wav": jax.ShapeDtypeStruct((accumulation, rows, clips, CONDITIONING_SAMPLES), np.int16),
    }


def with_device_axis(*trees: Any) -> tuple[Any, ...]:
    count = parallel.local_device_count()
    add = lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype)
    return tuple(jax.tree.map(add, tree) for tree in trees)


def size(tree: Any) -> int:
    return sum(int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def memory_lines(state: TrainState, analysis: Any, remat: bool, accumulation: int, rows: int) -> Iterator[str]:
    """Memory of one device, from the compiled program's own analysis."""
    parts = {"parameters": size(state.params), "optimiser": size(state.opt_state)}
    temporary = analysis.temp_size_in_bytes
    gradients = min(size(state.params), temporary)
    # Donated state is written in place; where the platform cannot (CPU), outputs take room of their own.
    copies = max(0, analysis.output_size_in_bytes - analysis.alias_size_in_bytes)
    parts |= {"gradients": gradients, "activations": temporary - gradients, "outputs beside the state": copies}
    needed = sum(parts.values()) + size_of_batch(analysis, state)
    yield "memory of one device:"
    for name, value in parts.items():
        yield f"  {name}: {value / GIB:.2f} GiB"
    limit = parallel.device_memory()
    yield f"  together: {needed / GIB:.2f} GiB" + (f" of {limit / GIB:.1f} GiB" if limit else "")
    if limit and needed > limit:
        yield "it does not fit; in this order:"
        if rows > 1:
            yield f"  --config.accumulation={2 * accumulation}: half the rows at a time, the same result"
        if not remat:
            yield "  --config.remat=True: a fifth slower, a fraction of the activations"
        yield "  --config.dtype=bfloat16: half the activations, where the hardware computes it"
        yield "  --config.optimizer.name=adafactor: optimiser state of a thousandth"
    else:
        yield "it fits" if limit else "the device does not say how much it has"


def size_of_batch(analysis: Any, state: TrainState) -> int:
    return max(0, int(analysis.argument_size_in_bytes) - size(state))


def timed(compiled: Any, state: TrainState, batch: dict[str, Any]) -> float:
    """Median seconds of a compiled step on zeros, in proportion to which shorter shapes are taken to cost less."""
    zeros = lambda tree: jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), tree)
    live, arrays = parallel.replicate(zeros(state)), zeros(with_device_axis(batch)[0])
    seconds = []
    for _ in range(1 + TIMED_STEPS):
        started = time.perf_counter()
        live, metrics = compiled(live, arrays)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds[1:]))


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
