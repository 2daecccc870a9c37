"""Compiles the released model's training step for machines that are not here, and prints the README's table of them.

  pip install 'tortoise_jax[plan]' && python benchmarks/plan_table.py [MACHINE …]

What the compilers say (memory, sums between devices) are facts; seconds are estimates from published peaks.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import jax

from tortoise_jax import parallel
from tortoise_jax.audio import default_mel_norms
from tortoise_jax.checkpoints.parts import abstract_tree
from tortoise_jax.checkpoints.trees import parameter_count
from tortoise_jax.models.layers import Compute
from tortoise_jax.models.unified_voice import RELEASED, UnifiedVoice
from tortoise_jax.training import ahead_of_time, roofline, topologies
from tortoise_jax.training.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer
from tortoise_jax.training.step import StepConfig
from tortoise_jax.training.topologies import GIB, DoesNotFit, Target

MACHINES = (
    *("v3", "v4", "v5e", "v5p", "v6e", "v5e:16x16"),
    *("a100-40g", "h100", "h100:8", "rtx4090-24g", "rtx3060-12g", "t4-16g"),
)
# The longest rows of speech like LJSpeech's: 10 s with their text.
STEP = roofline.Step(length=320, rows=4, accumulation=4, conditioning_clips=2)
COMPILED = ("machine", "dtype", "memory of a device", "gradients summed")
ESTIMATED = ("a step", "clips per second", "communication", "below 10 % from")
HEADER = (*COMPILED, *ESTIMATED)


def recipe(target: Target) -> StepConfig:
    """The step of configs/ar.py's defaults."""
    options = OptimizerConfig()
    compute = Compute(
        dtype=target.chip.dtype, remat=True, embed_dropout=0.1, residual_dropout=0.1, table_gradient="products"
    )
    return StepConfig(
        model=UnifiedVoice(RELEASED, compute),
        optimizer=make_optimizer(options, abstract_tree(RELEASED)),
        schedule=learning_rate_schedule(options),
        mel_norms=default_mel_norms(),
    )


def row(target: Target) -> Sequence[str]:
    config, params = recipe(target), abstract_tree(RELEASED)
    name, dtype = f"{target.describe().split(',')[0]}", config.model.compute.dtype
    try:
        compiled = ahead_of_time.compile_step(target, config, params, STEP)
    except DoesNotFit:
        return (name, dtype, "too little", *["–"] * (len(HEADER) - 3))
    parameters = parameter_count(params)
    summed = sum(one.size for one in compiled.large_sums)
    line = roofline.roofline(target, config.model, STEP, parameters, summed)
    clips = STEP.device_rows * target.device_count
    looped = any(one.in_loop for one in compiled.large_sums)
    dtypes = ", ".join(sorted({dtype for one in compiled.large_sums for dtype in one.dtypes}))
    goal = roofline.rows_for_goal(target, config.model, STEP, parameters, summed) * target.device_count
    return (
        name,
        dtype,
        f"{compiled.needed / GIB:.1f} of {target.memory / GIB:.1f} GiB",
        f"{'in a loop' if looped else 'once'}, {dtypes}, {summed / GIB:.2f} GiB" if summed else "–",
        f"{line.usual:.2f} s",
        f"{clips / line.usual:,.0f}",
        f"{line.share:.1%}" if summed else "–",
        f"{goal:,} clips per step" if summed else "–",
    )


def main(names: Sequence[str]) -> None:
    parallel.prepare_process()
    parallel.prepare_to_compile_ahead()
    work = f"{STEP.accumulation} micro-batches of {STEP.rows} rows of {STEP.length} positions"
    print(f"jax {jax.__version__}; {work} per device and step")
    print(f"\n| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}", flush=True)
    for name in names:
        print(f"| {' | '.join(row(topologies.parse(name)))} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or MACHINES)
