"""`train.py --plan --topology …`: the run's own step, compiled for a machine that is not here.

What the compiler says is a fact of the program that would run: its memory, what it sends between devices. How long that
takes is an estimate, from published peaks.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from tortoise_jax.checkpoints.trees import parameter_count
from tortoise_jax.training import hlo, roofline
from tortoise_jax.training.estimate import (
    GIB,
    Epoch,
    describe_memory,
    describe_parameters,
    duration,
    memory_parts,
    remedies,
    size,
    state_shapes,
)
from tortoise_jax.training.optimizer import split
from tortoise_jax.training.step import StepConfig, train_step
from tortoise_jax.training.topologies import CUDA_MEMORY_SHARE, DoesNotFit, Target

MEBIBYTE = 2**20
SMALL = 64 * 1024  # bytes: counts and metrics, whose sums take no time


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Facts of one compiled step. memory: bytes of one device by part; donated, state: bytes of the training state.

    sums: all operations between devices. sorts: operations that sort, as scatters of the same bits every time do on
    NVIDIA cards: they take longer than what they are for.
    """

    memory: dict[str, int]
    donated: int
    state: int
    sums: tuple[hlo.Collective, ...]
    sorts: int

    @property
    def needed(self) -> int:
        return sum(self.memory.values())

    @property
    def large_sums(self) -> tuple[hlo.Collective, ...]:
        return tuple(one for one in self.sums if one.size > SMALL)


def compile_step(target: Target, config: StepConfig, params: Any, step: roofline.Step) -> Compiled:
    """Raises topologies.DoesNotFit where the compiler itself finds too little memory, as it does for TPUs."""
    state = state_shapes(config, params)
    batch = config.batch_shapes(step.length, step.rows, step.accumulation)
    program = target.compile(functools.partial(train_step, config), state, batch, donate=True)
    analysis = program.memory_analysis()
    memory = memory_parts(analysis, state, size(split(state.params, config.freeze)[0]))
    text = program.as_text()
    sums = tuple(hlo.collectives(text))
    return Compiled(memory, analysis.alias_size_in_bytes, size(state), sums, text.count(" sort("))


def describe(
    target: Target, config: StepConfig, params: Any, settings: ConfigDict, lengths: np.ndarray
) -> Iterator[str]:
    """The lines of the plan, each as soon as it is known. As `estimate.describe`, for `target`."""
    epoch = Epoch.of(settings, lengths, target.device_count)
    step = roofline.Step(epoch.longest, epoch.rows, epoch.accumulation, settings.conditioning_clips)
    yield f"planning for {target.describe()}"
    yield from describe_parameters(config, state_shapes(config, params).params)
    yield from epoch.describe(config.unit)
    yield from describe_spare_rows(epoch, target)
    yield "compiling the longest shape for it …"
    started = time.perf_counter()
    try:
        compiled = compile_step(target, config, params, step)
    except DoesNotFit as error:
        yield f"it does not fit: {error}; in this order:"
        yield from remedies(settings, step.accumulation, step.rows)
        return
    yield f"compiled in {time.perf_counter() - started:.0f} s; these are facts of the program that would run:"
    yield from describe_memory(compiled.memory, target.memory)
    if compiled.needed > target.memory:
        yield from describe_too_much(target, settings, compiled, step)
        return
    yield f"it fits{room(target)}"
    yield from describe_sums(compiled)
    yield from describe_largest(target, config, params, step, compiled)
    yield from describe_time(target, config, params, settings, epoch, step, compiled)


def describe_spare_rows(epoch: Epoch, target: Target) -> Iterator[str]:
    """Where the batch is smaller than what the devices compute at least."""
    computed = epoch.rows * epoch.accumulation * target.device_count
    if computed >= 1.25 * epoch.batch_size:
        yield (
            f"only {epoch.batch_size} of the {computed} rows of a step hold a clip: raise --config.batch_size or lower "
            "--config.gradient_accumulation_steps"
        )


def room(target: Target) -> str:
    """What of a card's memory is counted on."""
    if not target.chip.card:
        return ""
    return f" in the {CUDA_MEMORY_SHARE:.0%} of the card that JAX takes"


def describe_too_much(target: Target, settings: ConfigDict, compiled: Compiled, step: roofline.Step) -> Iterator[str]:
    yield f"it does not fit{room(target)}; in this order:"
    if target.chip.card and compiled.needed < 0.92 * target.chip.memory:
        yield "  XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 in the environment: more of the card, if nothing else uses it"
    yield from remedies(settings, step.accumulation, step.rows)


def describe_sums(compiled: Compiled) -> Iterator[str]:
    """What is summed over the devices, and how often."""
    in_place = min(compiled.donated, compiled.state)  # a TPU pads arrays
    yield f"state updated in place: {in_place / GIB:.2f} of {compiled.state / GIB:.2f} GiB"
    if not compiled.large_sums:
        yield "sums over devices: none" if not compiled.sums else "sums over devices: only counts and metrics"
        return
    for looped in (False, True):
        sums = [one for one in compiled.large_sums if one.in_loop == looped]
        if sums:
            dtypes = ", ".join(sorted({dtype for one in sums for dtype in one.dtypes}))
            often = "in a loop, many times per step" if looped else "outside all loops, once per step"
            total = sum(one.size for one in sums) / MEBIBYTE
            yield f"sums over devices: {len(sums)} of gradients, {total:.0f} MiB together in {dtypes}, {often}"
    small = [one for one in compiled.sums if one.size <= SMALL]
    yield f"  and {len(small)} of counts and metrics, {sum(one.size for one in small)} bytes"


def describe_largest(
    target: Target, config: StepConfig, params: Any, step: roofline.Step, compiled: Compiled
) -> Iterator[str]:
    most, tried = rows_that_fit(target, config, params, step, compiled)
    yield f"rows of a micro-batch that fit: about {most}, estimated from the programs for {step.rows} and {tried}"


def rows_that_fit(
    target: Target, config: StepConfig, params: Any, step: roofline.Step, compiled: Compiled
) -> tuple[int, int]:
    """How many rows a micro-batch can have, and the rows of the second program that shows it.

    Memory grows evenly with the rows. A compiler that refuses the second program only says that it is too large.
    """
    more = dataclasses.replace(step, rows=4 * step.rows)
    try:
        other = compile_step(target, config, params, more)
    except DoesNotFit:
        more = dataclasses.replace(step, rows=2 * step.rows)
        try:
            other = compile_step(target, config, params, more)
        except DoesNotFit:
            return step.rows, more.rows
    slope = max(1.0, (other.needed - compiled.needed) / (more.rows - step.rows))
    return int(step.rows + (target.memory - compiled.needed) / slope), more.rows


def describe_time(
    target: Target,
    config: StepConfig,
    params: Any,
    settings: ConfigDict,
    epoch: Epoch,
    step: roofline.Step,
    compiled: Compiled,
) -> Iterator[str]:
    model, parameters = config.model, parameter_count(params)
    summed = sum(one.size for one in compiled.large_sums)
    of_length = lambda length: roofline.roofline(
        target, model, dataclasses.replace(step, length=length), parameters, summed
    )
    line = of_length(step.length)
    work = roofline.computed_products(model, step)
    traffic = roofline.memory_traffic(model, step, parameters)
    yield "estimated from the published peaks:"
    yield f"  the longest step on a device: {work / 1e12:.1f} TFLOP, at least {traffic / 1e9:.0f} GB to and from memory"
    yield (
        f"  it takes {line.bound:.2f} s at the peaks: products {line.products:.2f} s or memory {line.memory:.2f} s, "
        f"communication {line.communication:.3f} s"
    )
    useful = roofline.model_products(model.config, step) / target.peak(model.compute.dtype) / line.usual
    yield (
        f"  usual programs reach {roofline.USUAL_SHARE_OF_PEAK:.0%} of the peaks: about {line.usual:.2f} s, "
        f"{epoch.batch_size / line.usual:.0f} clips per second, {useful:.0%} of the peak for the model's own products"
    )
    if line.communication:
        goal = roofline.rows_for_goal(target, model, step, parameters, summed) * target.device_count
        yield (
            f"  communication: {line.share:.0%} of such a step ({line.share_of_bound:.0%} at the peaks); under "
            f"{roofline.COMMUNICATION_GOAL:.0%} from {goal} clips per step on"
        )
    in_epoch = sum(of_length(length).usual * count for length, count in epoch.shapes.items())
    yield f"  an epoch about {duration(in_epoch)}"
    yield "  " + epoch.describe_run(settings.steps, in_epoch)
