"""A tiny run of several hosts: WAY [COORDINATOR NUM_PROCESSES PROCESS_ID]. Prints a line for each thing it reaches.

Started by test_hosts.py, which says what is to come of it.
"""

from __future__ import annotations

import os
import sys
import time

import jax
from jax._src.xla_bridge import CUDA_VISIBLE_DEVICES

from tortoise_jax import parallel
from tortoise_jax.errors import UserError, exit_with_one_line
from tortoise_jax.training import stopping


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    way, *coordinates = sys.argv[1:]
    if coordinates:
        parallel.initialize(coordinates[0], int(coordinates[1]), int(coordinates[2]))
    else:
        parallel.initialize()
    say(f"joined {parallel.process_count()}")
    with parallel.ending_together():
        WAYS[way]()
    say("ended")


def say(line: str) -> None:
    print(line, flush=True)


def nothing() -> None:
    parallel.wait_for_all("nothing")


def cards() -> None:
    say(f"cards: {CUDA_VISIBLE_DEVICES.value}")


def total() -> None:
    parallel.any_host(True)
    parallel.wait_for_all("summed")


def idle() -> None:
    """No computation over hosts: only the coordination service can notice that one is lost."""
    time.sleep(600)


def steps() -> None:
    """A sum over all hosts per step, for ever."""
    for step in range(10**9):
        parallel.any_host(False)
        if step == 0:
            say("stepping")


def stop() -> None:
    """Steps of unequal length, until one host is asked to stop."""
    with stopping.on_signals() as interrupted:
        for step in range(1, 10**9):
            time.sleep(0.01 * (1 + parallel.process_index()))
            if step == 5:
                say("stepping")
            if parallel.stop_requested(step, interrupted()):
                say(f"stopped after step {step}")
                return


def fail() -> None:
    """One host finds something wrong, the others are in a step."""
    if parallel.process_index() == 1:
        parallel.any_host(False)
        raise UserError("the disk is full")
    steps()


def fail_alike() -> None:
    raise UserError("no such data set")


def abort() -> None:
    """An abort that has nothing to do with hosts, and other lines on the native stderr."""
    os.write(2, b"a native line\n")
    os.abort()


WAYS = {function.__name__: function for function in (nothing, cards, total, idle, steps, stop, fail, fail_alike, abort)}

if __name__ == "__main__":
    exit_with_one_line(main)
