"""Compilers for machines that are not here, and a small step to compile with them. TARGET: compiles it, in a process.

TPU's compiler is a package of the tests, NVIDIA's stands apart.
"""

from __future__ import annotations

import functools
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tests.support import runs
from tortoise_jax import parallel
from tortoise_jax.audio import default_mel_norms
from tortoise_jax.checkpoints.parts import abstract_tree
from tortoise_jax.models.layers import Compute, Embedding
from tortoise_jax.models.unified_voice import UnifiedVoice, UnifiedVoiceConfig
from tortoise_jax.training import ahead_of_time
from tortoise_jax.training.estimate import size
from tortoise_jax.training.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer, split
from tortoise_jax.training.roofline import Step
from tortoise_jax.training.step import StepConfig
from tortoise_jax.training.topologies import parse

ROOT = Path(__file__).parents[2]
# JAX loads NVIDIA's compiler in every process that finds it, and each then says on stderr that there is no card. So
# `make test` installs it in a folder of its own, for the processes that are given this environment.
NVIDIA = ROOT / ".venv-nvidia"

needs_compilers = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="the compilers are for Linux on x86-64"
)


# XLA's: a third of the time for a TPU's program, with the same sums, updates in place and precisions.
LITTLE_EFFORT = "-1"


def with_nvidia(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that compiles for NVIDIA's cards."""
    assert (NVIDIA / "installed").exists(), "make .venv-nvidia/installed"
    paths = [str(NVIDIA), *environment.get("PYTHONPATH", "").split(os.pathsep)]
    return {**environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


STEP = Step(length=64, rows=2, accumulation=2, conditioning_clips=1)
BF16 = Compute(dtype="bfloat16", remat=True, embed_dropout=0.1, residual_dropout=0.1, table_gradient="products")


def recipe(
    compute: Compute, optimizer: str = "adamw", freeze: str = "", config: UnifiedVoiceConfig = runs.AR
) -> StepConfig:
    options = OptimizerConfig(name=optimizer, freeze=freeze)
    return StepConfig(
        model=UnifiedVoice(config, compute),
        optimizer=make_optimizer(options, abstract_tree(config)),
        schedule=learning_rate_schedule(options),
        mel_norms=default_mel_norms(),
        freeze=freeze,
    )


def compiled_with(target: str, compute: Compute, **options: Any) -> tuple[ahead_of_time.Compiled, int]:
    """The compiled step, and the bytes of the parameters that it trains."""
    config = recipe(compute, **options)
    params = abstract_tree(config.model.config)
    return ahead_of_time.compile_step(parse(target), config, params, STEP), size(split(params, config.freeze)[0])


def assert_as_wanted(compiled: ahead_of_time.Compiled, trained: int) -> None:
    """The state is written in place; every gradient is summed over the devices once, in float32, outside all loops.

    Nothing is sorted.
    """
    assert compiled.donated >= compiled.state
    assert compiled.sums
    assert not compiled.sorts
    assert not [one for one in compiled.sums if one.in_loop]
    assert {dtype for one in compiled.large_sums for dtype in one.dtypes} == {"f32"}
    assert 0 <= sum(one.size for one in compiled.large_sums) - trained < 1024  # a few metrics ride along


TABLE_SHAPES = (jax.ShapeDtypeStruct((64, 8), jnp.float32), jax.ShapeDtypeStruct((16,), jnp.int32))


def table_gradient(compute: Compute, table: jax.Array, indices: jax.Array) -> jax.Array:
    """Of an embedding's rows, each taken for what it is."""
    embedding = Embedding(*table.shape, dtype=jnp.dtype(compute.dtype), compute=compute)
    return jax.grad(lambda table: embedding.apply({"params": {"embedding": table}}, indices).sum())(table)


if __name__ == "__main__":
    parallel.prepare_process()  # with the flags of a run
    parallel.prepare_to_compile_ahead()
    scattered = functools.partial(table_gradient, Compute(dtype="bfloat16"))
    assert " sort(" in parse(sys.argv[1]).compile(scattered, *TABLE_SHAPES).as_text(), "the check can fire"
    assert_as_wanted(*compiled_with(sys.argv[1], BF16))
    print("as wanted")
