"""Adapters beside full fine-tuning: the demo's pair learns its new voice both ways, in as many steps.

  python benchmarks/lora.py [--ranks 4 16] [--rates 2e-3 6e-3]

Prints for each: how many parameters are trained, what their gradients and AdamW's state take, the held-out mel loss at
the start and the best one. A minute or two each on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import tortoise_jax as tj
from configs import ar_demo
from tortoise_jax.checkpoints.pretrained import load_pretrained
from tortoise_jax.checkpoints.trees import parameter_count
from tortoise_jax.training import ar_run
from tortoise_jax.training.estimate import size, state_shapes
from tortoise_jax.training.optimizer import split

ROOT = Path(__file__).parents[1]
PAIR = ROOT / "demo"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[4, 16])
    parser.add_argument("--rates", type=float, nargs="*", default=[6e-3])
    parser.add_argument("--full", type=float, nargs="*", default=[6e-4], help="rates without adapters")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="lora-"))
    try:
        pair = ("--dvae", PAIR / "dvae.pth", "--ar", PAIR / "autoregressive.pth", "--out", folder / "tortoise")
        subprocess.run([sys.executable, "convert/torch_to_flax.py", *map(str, pair)], cwd=ROOT, check=True)
        tj.prepare(PAIR / "voice/metadata.csv", folder / "tortoise", folder / "data")
        runs = [(0, rate) for rate in options.full] + [(rank, rate) for rank in options.ranks for rate in options.rates]
        lines = [measure(folder, rank, rate) for rank, rate in runs]
    finally:
        shutil.rmtree(folder)
    print("\n| trained | rate | parameters | gradients and state | held-out mel loss |\n|---|---|---|---|---|")
    print("\n".join(lines))


def measure(folder: Path, rank: int, rate: float) -> str:
    """Trains once; the table's line."""
    settings = ar_demo.get_config()
    settings.checkpoint, settings.data = str(folder / "tortoise"), str(folder / "data")
    settings.sample_every, settings.export = 0, ""
    settings.lora.rank, settings.optimizer.learning_rate = rank, rate
    run = tj.train(settings, folder / f"rank-{rank}-{rate:g}")
    losses = [loss for _, loss in json.loads((run / "summary.json").read_text())["validation_mel"]]
    pretrained = load_pretrained(folder / "tortoise", ("ar", "dvae"))
    config = ar_run.make_step_config(settings, pretrained, settings.batch_size)
    state = state_shapes(config, pretrained.ar.params)
    trained = split(state.params, config.freeze)[0]
    memory = (size(trained) + size(state.opt_state)) / 1e6
    what = f"adapters of rank {rank}" if rank else "the model"
    return (
        f"| {what} | {rate:g} | {parameter_count(trained):,} | {memory:.2f} MB | {losses[0]:.3f} -> {min(losses):.3f} |"
    )


if __name__ == "__main__":
    main()
