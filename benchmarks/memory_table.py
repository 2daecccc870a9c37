"""Prints the README's table of how many rows a micro-batch of the released model can have, by memory and optimiser.

  pip install 'tortoise_jax[plan]' && python benchmarks/memory_table.py [cards] [tpus]

Of each kind of machine, and of all parameters trained or adapters alone, the program is compiled for 1 and for 4 rows:
memory grows evenly with the rows. Optimisers differ by the state that they keep, which is counted.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Sequence
from typing import Any

import jax

from configs import ar
from tortoise_jax import parallel
from tortoise_jax.checkpoints.pretrained import Pretrained, released_shapes
from tortoise_jax.training import ahead_of_time, ar_run, presets, topologies
from tortoise_jax.training.estimate import size, state_shapes
from tortoise_jax.training.roofline import Step
from tortoise_jax.training.step import StepConfig
from tortoise_jax.training.topologies import CUDA_MEMORY_SHARE, GIB, Target

# The machine compiled for, whose memory is not too little for any; GiB that programs can use, by what is sold.
MACHINES = {
    "cards": ("a100-80g", {f"{gigabytes} GB": CUDA_MEMORY_SHARE * gigabytes for gigabytes in (8, 12, 16, 24, 40, 80)}),
    "tpus": ("v5p:2x2x1", {f"{gigabytes} GB": float(gigabytes) for gigabytes in (16, 32, 95)}),
}
STEP = Step(length=384, rows=1, accumulation=4, conditioning_clips=2)  # as long as rows of speech like LJSpeech's get
MORE_ROWS = 4
METHODS: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "AdamW, bfloat16 moments": {"optimizer.moments": "bfloat16"},
    "Adafactor": {"optimizer.name": "adafactor"},
    "adapters of rank 16": {"lora.rank": 16},
}
COMPILED = ("Adafactor", "adapters of rank 16")  # the others as the first of them, with their own state


def step_config(method: str, remat: str, target: Target, released: Pretrained) -> StepConfig:
    settings = ar.get_config()
    settings.update_from_flattened_dict({**METHODS[method], "remat": remat})
    presets.fill(settings, 300)
    return ar_run.make_step_config(settings, released, settings.batch_size, target)


def compiled_bytes(target: Target, method: str, remat: str, rows: int, released: Pretrained) -> int:
    """What the program needs besides the optimiser's state."""
    config, params = step_config(method, remat, target, released), released.ar.params
    compiled = ahead_of_time.compile_step(target, config, params, dataclasses.replace(STEP, rows=rows))
    return compiled.needed - size(state_shapes(config, params).opt_state)


def rows_that_fit(one: int, more: int, state: int, memory: float) -> int:
    """one, more: bytes without the state for 1 and MORE_ROWS rows; memory: GiB."""
    slope = max(1.0, (more - one) / (MORE_ROWS - 1))
    return max(0, int(1 + (memory * GIB - one - state) / slope))


def about(rows: int) -> str:
    """In two digits, downwards: what lies far beyond the rows compiled for is an estimate."""
    unit = 10 ** max(0, len(str(rows)) - 2)
    return f"{rows // unit * unit:,}" if rows else "–"


def table(kind: str) -> None:
    name, sizes = MACHINES[kind]
    target, released = topologies.parse(name), released_shapes()
    programs = {
        (method, remat): [compiled_bytes(target, method, remat, rows, released) for rows in (1, MORE_ROWS)]
        for method, remat in itertools.product(COMPILED, ("none", "full"))
    }
    lines = [f"\n| {kind} | remat | {' | '.join(sizes)} |", f"|---|---|{'---|' * len(sizes)}"]
    for method, remat in itertools.product(METHODS, ("none", "full")):
        own = method if method in COMPILED else COMPILED[0]
        state = size(state_shapes(step_config(method, remat, target, released), released.ar.params).opt_state)
        fit = [rows_that_fit(*programs[own, remat], state, memory) for memory in sizes.values()]
        lines.append(f"| {method} | {remat} | {' | '.join(map(about, fit))} |")
    print("\n".join(lines), flush=True)


def main(kinds: Sequence[str]) -> None:
    parallel.prepare_process()
    parallel.prepare_to_compile_ahead()
    print(f"jax {jax.__version__}; micro-batches of rows of {STEP.length} positions, bfloat16")
    for kind in kinds:
        table(kind)


if __name__ == "__main__":
    main(sys.argv[1:] or list(MACHINES))
