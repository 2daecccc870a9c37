"""Trains the AR model or the dVAE: devices -> checkpoint -> data -> step -> state -> loop -> export.

  python train.py --config configs/ar.py --config.checkpoint=DIR --config.data=RECORDINGS --workdir=RUN
  python train.py --config configs/dvae.py --config.data=RECORDINGS --workdir=RUN

The same command takes a stopped run up again, and the same command on every host of a pod runs it there. What it does
is tortoise_jax/training/train.py.
"""

from __future__ import annotations

import shlex
import sys

from tortoise_jax import parallel
from tortoise_jax.checkpoints.parts import AR
from tortoise_jax.commands import KINDS, torch_writer
from tortoise_jax.errors import exit_with_one_line
from tortoise_jax.training import config, planning, topologies
from tortoise_jax.training.train import Asked, train


def main() -> None:
    kind = KINDS.get(config.trains(config.with_packaged_file(sys.argv, KINDS[AR].schema)), KINDS[AR])
    config.show_help_and_exit(sys.argv, kind.schema, kind.fill)
    settings = config.parse(sys.argv, kind.schema)
    flags = config.FLAGS
    parallel.prepare_process(settings.deterministic)
    if flags.topology:
        parallel.prepare_to_compile_ahead()
        planning.plan_ahead(kind, settings, topologies.parse(flags.topology), flags.plan)
        return
    parallel.initialize(flags.coordinator, flags.num_processes, flags.process_id)
    again = shlex.join(["python", *sys.argv])
    with parallel.ending_together():
        train(kind, settings, Asked(flags.workdir, flags.plan, flags.replay, torch_writer(), again))


if __name__ == "__main__":
    exit_with_one_line(main)
