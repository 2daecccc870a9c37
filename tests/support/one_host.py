"""Trains the small model for five steps on this process's part of a run and prints what it saw as one line of JSON.

Started by test_parallel.py: DEVICES [COORDINATOR NUM_PROCESSES PROCESS_ID].
"""

from __future__ import annotations

import functools
import json
import sys
from typing import Any

import jax

from tests.support import small
from tortoise_jax import parallel
from tortoise_jax.errors import UserError
from tortoise_jax.training.step import initial_state, train_step

ROWS, ACCUMULATION, STEPS = 8, 2, 5


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
    jax.config.update("jax_disable_most_optimizations", True)
    if len(sys.argv) > 2:
        parallel.initialize(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        parallel.initialize()
    index = parallel.process_index()
    seen = {
        "processes": parallel.process_count(),
        "devices": parallel.device_count(),
        "local": parallel.local_device_count(),
        "main": parallel.is_main(),
        "describe": parallel.describe(),
        "losses": losses(),
        "any": [parallel.any_host(index == 1), parallel.any_host(False)],
        "alike": complaint({"optimizer": {"rate": 1e-5}, "steps": 5}),
        "unlike": complaint({"optimizer": {"rate": index}, "steps": 5}),
    }
    parallel.shutdown()
    print(json.dumps(seen))


def losses() -> list[float]:
    recipe = small.recipe()
    step = parallel.mapped(functools.partial(train_step, recipe), donate=True)
    state = parallel.replicate(initial_state(small.params(), recipe.optimizer))
    found = []
    for seed in range(STEPS):
        batch = {name: value[parallel.host_rows(ROWS)] for name, value in small.clips(seed, ROWS).items()}
        state, metrics = step(state, parallel.split_rows(batch, ACCUMULATION))
        found.append(float(parallel.first_copy(metrics)["loss/total"]))
    return found


def complaint(settings: dict[str, Any]) -> str:
    try:
        parallel.check_same_everywhere("the configuration", settings)
    except UserError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    main()
