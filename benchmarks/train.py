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
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from tortoise_jax.audio import CONDITIONING_SAMPLES, default_mel_norms
from tortoise_jax.data import batches
from tortoise_jax.data.lengths import round_up
from tortoise_jax.data.plan import BUCKET
from tortoise_jax.models.unified_voice import RELEASED, UnifiedVoiceConfig
from tortoise_jax.training import roofline, topologies

GIB = 2**30
TINY = dataclasses.replace(RELEASED, layers=3, width=64, heads=4, mel_tokens=66)
CLIPS, CLIPS_PER_ROW = 1000, 2  # of a data set, by which the recipe's open fields are filled; of conditioning
SIDES = ("ours", "eager", "sdpa")


def model_config(options: argparse.Namespace) -> UnifiedVoiceConfig:
    config = RELEASED if options.size == "real" else TINY
    return dataclasses.replace(config, layers=options.layers) if options.layers else config


def settings(options: argparse.Namespace) -> Any:
    """configs/ar.py as a run would fill it, with all rows in one micro-batch, as torch has them."""
    from configs import ar
    from tortoise_jax.training import presets

    found = ar.get_config()
    found.batch_size, found.gradient_accumulation_steps = options.rows, 1
    for change in options.set:
        name, _, value = change.partition("=")
        found[name] = type(found[name])(value)
    presets.fill(found, CLIPS)
    return found


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


def ours(options: argparse.Namespace) -> Callable[[], None]:
    """The run's own step, as train.py makes it."""
    import jax

    from tortoise_jax import parallel
    from tortoise_jax.checkpoints.parts import AR, Part, abstract_variables
    from tortoise_jax.checkpoints.pretrained import Pretrained
    from tortoise_jax.text.tokenizer import Tokenizer
    from tortoise_jax.training import ar_run
    from tortoise_jax.training.step import initial_state, train_step

    parallel.prepare_process()
    config = model_config(options)
    shapes = Part(config, abstract_variables(config))
    pretrained = Pretrained({AR: shapes}, Tokenizer.default(), default_mel_norms(), {})
    filled = settings(options)
    step_config = ar_run.make_step_config(filled, pretrained, options.rows)
    random = np.random.default_rng(0)
    draw = lambda leaf: 0.02 * random.standard_normal(leaf.shape, np.float32)
    start = functools.partial(initial_state, optimizer=step_config.optimizer)
    state = parallel.mapped(start, donate=True)(parallel.replicate(jax.tree.map(draw, shapes.tree)))
    step = parallel.mapped(functools.partial(train_step, step_config), donate=True)
    text, codes, wav = rows_of(options, config)
    length = padded_length(options)
    made = [batches.row(t, c, length, config) for t, c in zip(text, codes, strict=True)]
    batch = {name: np.stack([one[name] for one in made]) for name in made[0]}
    batch |= {"example": np.arange(options.rows, dtype=np.int32), "conditioning_wav": wav}
    placed = parallel.rows_on_devices(parallel.split_rows(batch, 1))

    def run() -> None:
        nonlocal state
        state, metrics = parallel.call(step, state, placed)
        jax.block_until_ready(metrics)

    return run


def theirs(options: argparse.Namespace, attention: str) -> Callable[[], None]:
    """The torch reference by DLAS's recipe, with the dropout of our configuration."""
    import torch

    from benchmarks import torch_side
    from tests.support.torch_reference import Recipe, Trainer, UnifiedVoice, log_mel

    device = torch_side.take_device(options.threads)
    c = model_config(options)
    model = UnifiedVoice(
        layers=c.layers,
        model_dim=c.width,
        heads=c.heads,
        number_mel_codes=c.mel_tokens,
        start_mel_token=c.start_mel,
        stop_mel_token=c.stop_mel,
        attention=attention,
    ).train()
    filled = settings(options)
    for block in model.gpt.h:
        block.attn.attn_dropout.p = filled.attention_dropout
    dtype = torch_side.best_dtype() if filled.dtype == "auto" else getattr(torch, filled.dtype)
    computing = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    text, codes, wav = (torch.from_numpy(array).to(device) for array in rows_of(options, c))
    norms = torch.from_numpy(default_mel_norms()).to(device)
    trainer = Trainer(model, Recipe())
    lengths = {"text_lengths": torch.full((options.rows,), options.text)}
    lengths |= {"code_lengths": torch.full((options.rows,), options.codes)}

    def run() -> None:
        mel = log_mel(wav.flatten(0, 1).float() / 32768, norms).unflatten(0, wav.shape[:2])
        with computing:
            trainer.step({"cond_mel": mel, "text": text, "codes": codes, **lengths})
        torch_side.wait()

    return run


def serve(options: argparse.Namespace) -> None:
    """A side: makes its step, then runs it once for every line it is sent and says how long that took."""
    started = time.perf_counter()
    run = ours(options) if options.side == "ours" else theirs(options, options.side)
    for _ in sys.stdin:
        before, worked = time.perf_counter(), time.process_time()
        run()
        now = time.perf_counter()
        found = {"seconds": now - before, "cpu": time.process_time() - worked, "since_start": now - started}
        found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(found | device_facts(options)), flush=True)


def device_facts(options: argparse.Namespace) -> dict[str, Any]:
    """Bytes taken on the device at most, None on CPUs; of our side also what the device is and what it computes in."""
    if options.side != "ours":
        from benchmarks import torch_side

        return {"device_peak": torch_side.peak_memory()}
    from tortoise_jax import parallel

    dtype = settings(options).dtype
    dtype = parallel.best_dtype() if dtype == "auto" else dtype
    return {"device_peak": parallel.peak_memory(), "device": parallel.describe(), "dtype": dtype}


class Side:
    """A process that makes steps when it is asked to."""

    def __init__(self, name: str, threads: int) -> None:
        self.name = name
        command = [sys.executable, "-m", "benchmarks.train", *sys.argv[1:], "--side", name]
        environment = os.environ | {"NPROC": str(threads)}  # of XLA; torch is told in its process
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the sides share a card
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.steps: list[dict[str, Any]] = []

    def step(self) -> float:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):
                self.steps.append(json.loads(line))
                return self.steps[-1]["seconds"]
        raise SystemExit(f"{self.name} ended with exit code {self.process.wait()}")

    def median(self, what: str) -> float:
        """Of a step: "seconds" on the clock or of the processors ("cpu"), without the first, which compiles."""
        return statistics.median(step[what] for step in self.steps[1:])

    def peak(self, what: str) -> str:
        return f"{max(step[what] for step in self.steps) / GIB:.2f} GiB" if self.steps[0][what] else "–"

    def utilisation(self, options: argparse.Namespace) -> str:
        """Of the device's published peak; unknown without ours, which knows the device."""
        step = roofline.Step(padded_length(options), options.rows, 1, CLIPS_PER_ROW)
        work = roofline.model_products(model_config(options), step)
        return f"{work / self.median('seconds') / options.peak:.0%}" if options.peak else "–"

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("real", "tiny"), default="real", help="(default: %(default)s)")
    parser.add_argument("--layers", type=int, default=0, help="other than the size's")
    parser.add_argument("--rows", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--text", type=int, default=60, metavar="TOKENS")
    parser.add_argument("--codes", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5, help="after the first (default: %(default)s)")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES, help="(default: all)")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="of configs/ar.py, e.g. remat=none")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of both sides (default: all cores)")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        serve(options)
        return
    load = os.getloadavg()[0]
    sides = []
    for name in options.sides:  # one after the other: the first step's memory is the largest
        sides.append(Side(name, options.threads))
        print(f"{name}: first step {sides[-1].step():.2f} s", flush=True)
    for _ in range(options.rounds):
        print("  ".join(f"{side.name} {side.step():.3f} s" for side in sides), flush=True)
    for side in sides:
        side.end()
    config = model_config(options)
    here, dtype = (sides[0].steps[0].get(name, "") for name in ("device", "dtype"))
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
    ours_takes = {what: sides[0].median(what) for what in ("seconds", "cpu")} if sides[0].name == "ours" else {}
    for side in sides:
        ratios = ", ".join(f"{own / side.median(what):.2f} ({what})" for what, own in ours_takes.items())
        print(
            f"| {side.name} | {side.median('seconds'):.3f} s | {side.median('cpu'):.3f} s "
            f"| {options.rows / side.median('seconds'):.2f} | {side.utilisation(options)} | {ratios or '–'} "
            f"| {side.peak('peak')} | {side.peak('device_peak')} | {side.steps[0]['since_start']:.0f} s |"
        )


def peak_of(kind: str, dtype: str) -> float | None:
    """Operations per second of a device by JAX's name for it; None where nobody has published them."""
    chip = topologies.chip_of(kind)
    return topologies.Target(kind, chip, (1,)).peak(dtype) if chip else None


if __name__ == "__main__":
    main()
