"""Codes per second of cached sampling, here and by the torch reference, alternately in one process.

  python -m benchmarks.generate                      the real size, random weights, batches 1 and 16
  python -m benchmarks.generate --size tiny

torch: transformers' GPT2Model with its cache and logits processors (tests/torch_reference), all cores, or the card
where there is one. Both draw the same number of codes for one text with tortoise's settings; the stop token is made
impossible. Codes per second include the reading of the prompt. Also measured: the time to compile, and how much memory
decoding reads per second next to what the memory can give, which limits batch 1: every code reads all weights once.
"Decoding per code" is the time of the codes after those of the first call of the compiled loop. The memory's bandwidth
is measured before and after each run, because other work on the machine changes it.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
import torch

from benchmarks import torch_side
from tests.support.parity import voice_twin
from tests.support.torch_reference import UnifiedVoice, tiny_unified_voice
from tortoise_jax import parallel
from tortoise_jax.models.unified_voice import UnifiedVoiceConfig
from tortoise_jax.synthesis import sampler
from tortoise_jax.synthesis.decoder import DecoderWeights
from tortoise_jax.synthesis.sampler import SamplingOptions

IMPOSSIBLE = -1e4


def torch_model(size: str) -> tuple[UnifiedVoice, int]:
    """A model of random weights that never stops, and its heads."""
    model = (
        UnifiedVoice(attention="sdpa")
        if size == "real"
        else tiny_unified_voice(max_mel_tokens=604, max_text_tokens=402)
    )
    with torch.no_grad():
        model.mel_head.bias[model.stop_mel_token] = IMPOSSIBLE
        model.mel_head.bias[model.start_mel_token] = IMPOSSIBLE
    return model.eval().requires_grad_(False), 16 if size == "real" else 4


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    torch_side.wait()
    return time.perf_counter() - start


def streaming_bandwidth() -> float:
    """GB/s of reading a gigabyte with all cores: the median of twenty readings."""
    block = torch.ones(2**28)
    return block.numel() * 4 / 1e9 / statistics.median(seconds(block.sum) for _ in range(20))


def decoding_bytes(weights: DecoderWeights) -> int:
    """Bytes of the weights that each code reads."""
    read = [weights.blocks, weights.mel_head]
    return sum(leaf.nbytes for leaf in jax.tree.leaves(read))


def compare(
    model: UnifiedVoice, heads: int, batches: list[int], codes: int, text: int, rounds: int, dtype: str
) -> list[str]:
    """A row of the table for each batch; rounds alternate between torch and us, the median counts."""
    config: UnifiedVoiceConfig = (twin := voice_twin(model, heads)).config
    weights = DecoderWeights.of(twin.params, config, dtype)
    device = torch_side.take_device(os.cpu_count() or 1)
    model.to(device, getattr(torch, dtype))
    ids = np.random.default_rng(0).integers(1, 255, text).tolist()
    vector = np.random.default_rng(0).standard_normal(config.width).astype(np.float32)
    whole = SamplingOptions(max_codes=codes, dtype=dtype)
    started = SamplingOptions(max_codes=sampler.CODES_PER_CALL, dtype=dtype)
    stopped_text, spoken_by = torch.tensor([*ids, 0]), torch.from_numpy(vector).to(device, getattr(torch, dtype))
    sample = functools.partial(sampler.sample, weights, config, vector, ids, 0)
    rows = []
    for batch in batches:
        theirs = functools.partial(model.sample, spoken_by, stopped_text, batch, max_codes=codes)
        ours, ours_start = (functools.partial(sample, options, batch) for options in (whole, started))
        first = seconds(ours)
        ours_start()
        measured = []
        for _ in range(rounds):
            theirs_took = seconds(theirs)
            before = streaming_bandwidth()
            ours_took = seconds(ours)
            bandwidth = (before + streaming_bandwidth()) / 2
            per_code = (ours_took - seconds(ours_start)) / (codes - started.max_codes)
            read = decoding_bytes(weights) / per_code / 1e9
            measured.append((theirs_took, ours_took, 1e3 * per_code, read, bandwidth, read / bandwidth))
        theirs_took, ours_took, per_code, read, bandwidth, part = map(statistics.median, zip(*measured, strict=True))
        rows.append(
            f"| {batch} | {batch * codes / theirs_took:.1f} | {batch * codes / ours_took:.1f} "
            f"| {theirs_took / ours_took:.2f} | {first - ours_took:.0f} s | {per_code:.1f} ms "
            f"| {read:.1f} of {bandwidth:.1f} GB/s ({part:.0%}) |"
        )
        print(
            rows[-1], f"torch, ours (s), ms per code, GB/s read, memory's: {np.round(measured, 1).tolist()}", flush=True
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("real", "tiny"), default="real", help="(default: %(default)s)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16], metavar="N")
    parser.add_argument("--codes", type=int, default=200)
    parser.add_argument("--text", type=int, default=60, metavar="TOKENS")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.codes <= sampler.CODES_PER_CALL:
        parser.error(f"--codes {arguments.codes}: expected more than {sampler.CODES_PER_CALL}, those of the first call")
    load = os.getloadavg()[0]
    rows = compare(
        *torch_model(arguments.size),
        arguments.batches,
        arguments.codes,
        arguments.text,
        arguments.rounds,
        arguments.dtype,
    )
    print(
        f"\n{arguments.size} size, {arguments.text} text tokens, {arguments.codes} codes, {arguments.dtype}, "
        f"{parallel.describe()}, {os.cpu_count()} cores, load {load:.1f} before, {os.getloadavg()[0]:.1f} after\n"
    )
    print("| batch | torch codes/s | ours codes/s | ratio | compile | decoding per code | weights read |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
