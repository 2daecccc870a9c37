"""Seconds and memory of a training step, here and by the torch reference, alternately, each in a process of its own.

  python -m benchmarks.train                            the released model, 4 rows: needs 24 GB for two sides at once
  python -m benchmarks.train --layers 4                 the released width with 4 of its 30 layers
  python -m benchmarks.train --size tiny
  python -m benchmarks.train --sides ours               without torch, on whatever devices there are

A row has 60 text tokens, 200 codes and two conditioning clips of six seconds, as waveforms: both sides compute the
mels, the model, both losses, all gradients and AdamW's update by the same recipe: in float32 on CPUs, in bfloat16 where
the device is fast at it (torch under autocast; --set dtype=float32 for the other, which cards multiply as TF32).
`eager` and `sdpa` are transformers' two attentions. Dropout is as configs/ar.py has it, on both sides. The sides wait
while another one works; medians of the rounds after the first are compared. A side's memory is the peak of its process
from its start, and on a card what it took there. Utilisation is the work that the model needs (training/roofline.py) by
the device's published peak. Other work on the machine slows threads that wait for each other down by more than its
share: where there is some, compare the processors' seconds with --threads 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import sides
from benchmarks.sides import Side, filled_config
from tortoise_jax.audio import CONDITIONING_SAMPLES, default_mel_norms
from tortoise_jax.data import batches
from tortoise_jax.data.lengths import round_up
from tortoise_jax.data.plan import BUCKET
from tortoise_jax.models.unified_voice import RELEASED, UnifiedVoiceConfig
from tortoise_jax.training import roofline, topologies

TINY = dataclasses.replace(RELEASED, layers=3, width=64, heads=4, mel_tokens=66)
CLIPS, CLIPS_PER_ROW = 1000, 2  # of a data set, by which the recipe's open fields are filled; of conditioning


def model_config(options: argparse.Namespace) -> UnifiedVoiceConfig:
    config = RELEASED if options.size == "real" else TINY
    return dataclasses.replace(config, layers=options.layers) if options.layers else config


def rows_of(options: argparse.Namespace, config: UnifiedVoiceConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """text (b, 60), codes (b, 200) int, conditioning (b, 2, 132300) int16, the same on all sides."""
    random = np.random.default_rng(0)
    text = random.integers(1, config.start_text, (options.rows, options.text))
    codes = random.integers(0, config.codes, (options.rows, options.codes))
    wav = random.integers(-9000, 9000, (options.rows, CLIPS_PER_ROW, CONDITIONING_SAMPLES)).astype(np.int16)
    return text, codes, wav


def padded_length(options: argparse.Namespace) -> int:
    """Positions of a row of ours, as a run pads it."""
    return round_up(batches.row_length(options.text, options.codes), BUCKET)


def make_side(options: argparse.Namespace) -> Callable[[int], None]:
    """The step of `options.side` on its one batch."""
    config, filled = model_config(options), filled_config(options.rows, options.set, CLIPS)
    text, codes, wav = rows_of(options, config)
    if options.side == "ours":
        batch = sides.our_batch(text, codes, wav, padded_length(options), config)
        step = sides.our_step(config, filled, options.rows)
        return lambda _: step(batch)
    return torch_run(options, filled, text, codes, wav)


def torch_run(
    options: argparse.Namespace, filled: Any, text: np.ndarray, codes: np.ndarray, wav: np.ndarray
) -> Callable[[int], None]:
    import torch

    from tests.support.torch_reference import log_mel

    step = sides.torch_step(model_config(options), filled, options.threads, options.side)
    on_device = lambda array: torch.from_numpy(array).to(torch.get_default_device())
    batch = {"text": on_device(text), "codes": on_device(codes)}
    batch |= {"text_lengths": torch.full((options.rows,), options.text)}
    batch |= {"code_lengths": torch.full((options.rows,), options.codes)}
    norms, clips = on_device(default_mel_norms()), on_device(wav)

    def run(_: int) -> None:
        mel = log_mel(clips.flatten(0, 1).float() / 32768, norms).unflatten(0, clips.shape[:2])
        step({"cond_mel": mel, **batch})

    return run


def utilisation(side: Side, options: argparse.Namespace) -> str:
    """Of the device's published peak; unknown without ours, which knows the device."""
    step = roofline.Step(padded_length(options), options.rows, 1, CLIPS_PER_ROW)
    work = roofline.model_products(model_config(options), step)
    return f"{work / side.median('seconds') / options.peak:.0%}" if options.peak else "–"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("real", "tiny"), default="real", help="(default: %(default)s)")
    parser.add_argument("--layers", type=int, default=0, help="other than the size's")
    parser.add_argument("--rows", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--text", type=int, default=60, metavar="TOKENS")
    parser.add_argument("--codes", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5, help="after the first (default: %(default)s)")
    parser.add_argument("--sides", nargs="+", choices=sides.NAMES, default=sides.NAMES, help="(default: all)")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="of configs/ar.py, e.g. remat=none")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of both sides (default: all cores)")
    parser.add_argument("--side", choices=sides.NAMES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        filled = filled_config(options.rows, options.set, CLIPS)
        sides.serve(lambda: make_side(options), lambda: sides.device_facts(options.side, filled))
        return
    load = os.getloadavg()[0]
    running: list[Side] = []
    for name in options.sides:  # one after the other: the first step's memory is the largest
        running.append(Side(name, "benchmarks.train", options.threads))
        print(f"{name}: first step {running[-1].step():.2f} s", flush=True)
    for _ in range(options.rounds):
        print("  ".join(f"{side.name} {side.step():.3f} s" for side in running), flush=True)
    for side in running:
        side.end()
    config = model_config(options)
    here, dtype = (running[0].steps[0].get(name, "") for name in ("device", "dtype"))
    options.peak = peak_of(here.partition(" x ")[2], dtype)
    print(
        f"\n{here} {dtype}, {config.layers} layers of width {config.width}, {options.rows} rows of {options.text} text "
        f"tokens and {options.codes} codes, {options.threads} threads, load {load:.1f} before, "
        f"{os.getloadavg()[0]:.1f} after\n"
    )
    print(
        "| side | a step | of the processors | clips per second | utilisation | ours takes, of it "
        "| peak memory: process | device | to the first step |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    ours_takes = {what: running[0].median(what) for what in ("seconds", "cpu")} if running[0].name == "ours" else {}
    for side in running:
        ratios = ", ".join(f"{own / side.median(what):.2f} ({what})" for what, own in ours_takes.items())
        print(
            f"| {side.name} | {side.median('seconds'):.3f} s | {side.median('cpu'):.3f} s "
            f"| {options.rows / side.median('seconds'):.2f} | {utilisation(side, options)} | {ratios or '–'} "
            f"| {side.peak('peak')} | {side.peak('device_peak')} | {side.steps[0]['since_start']:.0f} s |"
        )


def peak_of(kind: str, dtype: str) -> float | None:
    """Operations per second of a device by JAX's name for it; None where nobody has published them."""
    chip = topologies.chip_of(kind)
    return topologies.Target(kind, chip, (1,)).peak(dtype) if chip else None


if __name__ == "__main__":
    main()
