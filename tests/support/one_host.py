"""Joins the other hosts and prints what this one sees of them as one line of JSON.

Started by test_parallel.py: DEVICES [COORDINATOR NUM_PROCESSES PROCESS_ID].
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import sys
from collections.abc import Callable
from typing import Any

import jax

from tortoise_jax import parallel
from tortoise_jax.errors import UserError


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
    jax.config.update("jax_disable_most_optimizations", True)
    if len(sys.argv) > 2:
        parallel.initialize(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        parallel.initialize()
    index = parallel.process_index()
    compare = functools.partial(parallel.check_same_everywhere, "the configuration")
    seen = {
        "processes": parallel.process_count(),
        "devices": parallel.device_count(),
        "local": parallel.local_device_count(),
        "main": parallel.is_main(),
        "describe": parallel.describe(),
        "any": [parallel.any_host(index == 1), parallel.any_host(False)],
        "alike": complaint(compare, {"optimizer": {"rate": 1e-5}, "steps": 5}),
        "unlike": complaint(compare, {"optimizer": {"rate": index}, "steps": 5}),
        "same code": complaint(parallel.check_same_code),
    }
    if index == 1:
        importlib.metadata.version = lambda name: "0.1"
    seen["other code"] = complaint(parallel.check_same_code)
    parallel.shutdown()
    print(json.dumps(seen))


def complaint(check: Callable[..., None], *arguments: Any) -> str:
    try:
        check(*arguments)
    except UserError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    main()
