"""Clips per second of the whole recipe, ours against DLAS's as it really computes, on clips of LJSpeech-like lengths.

  python -m benchmarks.recipe                           the released model, one side after the other: 16 GB
  python -m benchmarks.recipe --layers 4                the released width with 4 of its 30 layers

Some batches of an epoch, spread over its lengths, each stepped on several times. Ours: text and codes joined in a row,
padded to a multiple of 32 positions, codes from the data set, as many conditioning clips of six seconds as a run takes.
The torch reference: the texts padded to the batch's longest, the recordings to 11.6 s, whose log-mels and 250 codes are
made at every step by a dVAE of the released size, and two conditioning clips of two seconds. All parameters are trained
on both sides, by the same recipe, with the dropout of configs/ar.py, and a batch's gradients are added up over four
micro-batches, as both do by default. What reads recordings from disk is in neither.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import sides
from benchmarks.sides import Side
from tortoise_jax.audio import CONDITIONING_SAMPLES, SAMPLE_RATE, SAMPLES_PER_CODE, default_mel_norms
from tortoise_jax.data import batches
from tortoise_jax.data.lengths import LJSPEECH_CLIPS, ljspeech_lengths
from tortoise_jax.data.plan import training_epoch
from tortoise_jax.models.unified_voice import RELEASED, UnifiedVoiceConfig

DLAS_CODES, DLAS_CLIPS, DLAS_SECONDS = 250, 2, 2  # of each row; its conditioning clips, and their length


@dataclasses.dataclass(frozen=True)
class Clips:
    """A batch: text tokens and codes of each clip (b,), and the positions that our rows are padded to."""

    text: np.ndarray
    codes: np.ndarray
    length: int

    def dlas_length(self) -> int:
        return batches.row_length(int(self.text.max()), DLAS_CODES)


def chosen(rows: int, count: int) -> list[Clips]:
    """So many batches of an epoch, from its short to its long ones."""
    text, codes = ljspeech_lengths()
    epoch = training_epoch(batches.row_length(text, codes), rows, seed=0, epoch=0)
    whole = sorted((batch for batch in epoch if len(batch[1]) == rows), key=lambda batch: batch[0])
    middles = [whole[int((i + 0.5) / count * len(whole))] for i in range(count)]
    return [Clips(text[members], codes[members], length) for length, members in middles]


def settings(options: argparse.Namespace) -> Any:
    return sides.filled_config(options.rows, options.set, LJSPEECH_CLIPS, options.micro_batches)


def our_side(options: argparse.Namespace, config: UnifiedVoiceConfig, work: list[Clips]) -> Callable[[int], None]:
    filled = settings(options)
    step = sides.our_step(config, filled, options.rows)
    random = np.random.default_rng(0)
    made = []
    for clips in work:
        texts = [random.integers(1, config.start_text, n) for n in clips.text]
        codes = [random.integers(0, config.codes, n) for n in clips.codes]
        shape = (options.rows, filled.conditioning_clips, CONDITIONING_SAMPLES)
        wav = random.integers(-9000, 9000, shape).astype(np.int16)
        made.append(sides.our_batch(texts, codes, wav, clips.length, config))
    return lambda number: step(made[number])


def torch_side(options: argparse.Namespace, config: UnifiedVoiceConfig, work: list[Clips]) -> Callable[[int], None]:
    import torch

    from tests.support.torch_reference import DiscreteVAE, log_mel

    filled = settings(options)
    step = sides.torch_step(config, filled, options.threads, options.side)
    dvae, norms = DiscreteVAE().eval(), torch.from_numpy(default_mel_norms()).to(torch.get_default_device())

    def run(number: int) -> None:
        clips, random = work[number], np.random.default_rng(number)
        drawn = lambda high, *shape: torch.from_numpy(random.integers(1, high, shape)).to(norms.device)
        sound = drawn(9000, options.rows, DLAS_CODES * SAMPLES_PER_CODE - 1).float() / 32768
        conditioning = drawn(9000, options.rows * DLAS_CLIPS, DLAS_SECONDS * SAMPLE_RATE).float() / 32768
        with torch.no_grad():
            features = dvae.encoder(log_mel(sound, norms))
            codes = dvae.codebook.codes(features.transpose(1, 2))
        batch = {"cond_mel": log_mel(conditioning, norms).unflatten(0, (options.rows, DLAS_CLIPS))}
        batch |= {"text": drawn(config.start_text, options.rows, int(clips.text.max())), "codes": codes}
        batch |= {"text_lengths": torch.from_numpy(clips.text), "code_lengths": torch.from_numpy(clips.codes)}
        step(batch)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=RELEASED.layers, help="(default: all %(default)s)")
    parser.add_argument("--rows", type=int, default=16, help="clips of a batch (default: %(default)s)")
    parser.add_argument("--micro_batches", type=int, default=4, help="of a batch (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=3, help="of the epoch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="after the first (default: %(default)s)")
    parser.add_argument(
        "--sides", nargs="+", choices=sides.NAMES, default=("ours", "sdpa"), help="(default: ours sdpa)"
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="of configs/ar.py, e.g. remat=none")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of both sides (default: all cores)")
    parser.add_argument("--side", choices=sides.NAMES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rows % options.micro_batches:
        parser.error(f"--rows {options.rows} cannot be shared out evenly over --micro_batches {options.micro_batches}")
    config = dataclasses.replace(RELEASED, layers=options.layers)
    work = chosen(options.rows, options.batches)
    filled = settings(options)
    if options.side:
        make = our_side if options.side == "ours" else torch_side
        sides.serve(lambda: make(options, config, work), lambda: sides.device_facts(options.side, filled))
        return
    # One side ends before the next begins: two of the released size at once need more memory than many machines have.
    measured = [measure(name, options) for name in options.sides]
    report(measured, options, work, filled.conditioning_clips)


def measure(name: str, options: argparse.Namespace) -> Side:
    side = Side(name, "benchmarks.recipe", options.threads)
    for turn in range(options.rounds + 1):
        seconds = [side.step(number) for number in range(options.batches)]
        print(f"{name}, round {turn}: " + "  ".join(f"{one:.2f} s" for one in seconds), flush=True)
    side.end()
    return side


def report(measured: list[Side], options: argparse.Namespace, work: list[Clips], conditioning_clips: int) -> None:
    clips = options.rows * options.batches
    real = sum(int(batches.row_length(c.text, c.codes).sum()) for c in work)
    print(
        f"\n{measured[0].steps[0].get('device', '')}, {options.layers} layers of width {RELEASED.width}, "
        f"{options.batches} batches of {options.rows} clips in {options.micro_batches} micro-batches, "
        f"{options.threads} threads, "
        f"load {os.getloadavg()[0]:.1f} after; {real / clips:.0f} positions of a clip are real\n"
    )
    print("| side | clips per second | ours is | positions | conditioning frames | codes made | peak memory |")
    print("|---|---|---|---|---|---|---|")
    total = lambda side: sum(side.median("seconds", number) for number in range(options.batches))
    for side in measured:
        ours = side.name == "ours"
        positions = sum(options.rows * (c.length if ours else c.dlas_length()) for c in work) / clips
        samples = conditioning_clips * CONDITIONING_SAMPLES if ours else DLAS_CLIPS * DLAS_SECONDS * SAMPLE_RATE
        ratio = f"{total(side) / total(measured[0]):.2f} x" if measured[0].name == "ours" and not ours else "–"
        print(
            f"| {side.name} | {clips / total(side):.3f} | {ratio} | {positions:.0f} | {samples // 256} "
            f"| {0 if ours else DLAS_CODES} | {side.peak('peak')} |"
        )
    print("\nPositions, conditioning frames and codes made are those of one clip and step.")


if __name__ == "__main__":
    main()
