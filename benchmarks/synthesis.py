"""The models after the codes at their real sizes, here and by the torch reference, alternately in one process.

  python -m benchmarks.synthesis                       5 s of speech: one diffusion evaluation, CLVP, both vocoders
  python -m benchmarks.synthesis --only diffusion --frames 2176

Random weights, float32, all cores; the reference's UnivNet filters all frames at once, as upstream. One evaluation is
the conditional and the unconditional pass: one batch of two here, two batches of one upstream. Sixteen candidates are
scored: the text side once here, once for each upstream. The median of several alternating rounds counts.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch

from tests.support.parity import error, twin_of
from tests.support.torch_reference import CLVP, DiffusionTts, Hifigan, UnivNet, vocoders
from tests.support.torch_reference.builders import quietly
from tortoise_jax import parallel
from tortoise_jax.checkpoints import parts
from tortoise_jax.models import clvp, diffusion, hifigan, vocoder
from tortoise_jax.models.layers import Compute, codes_of, frames_of

CANDIDATES, CODES, TEXT = 16, 500, 60
Pair = tuple[str, Callable[[], Any], Callable[[], Any]]


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def on_devices(part: str, model: torch.nn.Module) -> tuple[Any, Any]:
    """The same weights on our side: dimensions, variables."""
    twin = twin_of(part, model)
    return twin.config, parallel.on_every_device(twin.variables, 1)


def diffusion_pair(frames: int, unroll: int) -> Pair:
    model = DiffusionTts().eval()
    config, variables = on_devices(parts.DIFFUSION, model)
    x, aligned, step = noise(1, frames, 100), noise(1, frames, config.width, seed=1), 1234
    decoder = diffusion.DiffusionDecoder(config, Compute(unroll=unroll))

    @jax.jit
    def ours(variables: Any, x: Any, aligned: Any) -> Any:
        free = decoder.apply(variables, 1, frames, method="unconditioned")
        both = jax.numpy.concatenate([aligned, free])
        steps = jax.numpy.full((2,), step)
        return decoder.apply(variables, jax.numpy.tile(x, (2, 1, 1)), steps, both, method="estimate")

    given = [torch.from_numpy(array.swapaxes(1, 2).copy()) for array in (x, aligned)]

    def theirs() -> torch.Tensor:
        steps = torch.tensor([step])
        return torch.cat([model(given[0], steps, c) for c in (given[1], None)]).mT

    return f"one guided diffusion evaluation, {frames} frames", theirs, lambda: ours(variables, x, aligned)


def clvp_pair(unroll: int) -> Pair:
    model = CLVP().eval()
    config, variables = on_devices(parts.CLVP, model)
    random = np.random.default_rng(0)
    text = random.integers(0, 256, (1, TEXT)).astype(np.int32)
    codes = random.integers(0, 8192, (CANDIDATES, CODES)).astype(np.int32)
    flax = clvp.CLVP(config, Compute(unroll=unroll))

    @jax.jit
    def ours(variables: Any, text: Any, codes: Any) -> Any:
        latent = flax.apply(variables, text, method="text_latent")[0]
        return flax.apply(variables, latent, codes, method="score")

    texts, rows = torch.from_numpy(text).long().expand(CANDIDATES, -1), torch.from_numpy(codes).long()
    return f"CLVP of {CANDIDATES} candidates", lambda: model(texts, rows), lambda: ours(variables, text, codes)


def filtered_at_once(x: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`vocoders.local_convolution` without its loop over frames, which is there to be read."""
    hop = x.shape[-1] // kernel.shape[-1]
    windows = torch.nn.functional.pad(x, (1, 1)).unfold(-1, hop + 2, hop).unfold(-1, 3, 1)
    return (torch.einsum("bilhm,bioml->bolh", windows, kernel) + bias[..., None]).flatten(2)


def vocoder_pair(frames: int) -> Pair:
    vocoders.local_convolution = filtered_at_once
    model = quietly(UnivNet).eval()
    config, variables = on_devices(parts.VOCODER, model)
    mel, z = noise(1, frames, 100) - 5, noise(1, frames + vocoder.TAIL_FRAMES, config.noise_channels, seed=1)
    ours = jax.jit(lambda *given: vocoder.UnivNet(config).apply(*given, method="vocode"))
    given = [torch.from_numpy(array.swapaxes(1, 2).copy()) for array in (mel, z)]
    return f"UnivNet, {frames} frames", lambda: model.inference(*given)[:, 0], lambda: ours(variables, mel, z)


def hifigan_pair(frames: int) -> Pair:
    model = quietly(Hifigan).eval()
    config, variables = on_devices(parts.HIFIGAN, model)
    codes = codes_of(frames)
    latents, voice = noise(1, codes, config.latent_width), noise(1, config.voice_width, seed=1)
    decode = lambda *given: hifigan.Hifigan(config).apply(*given, frames_of(codes), method="decode")
    ours = jax.jit(decode)
    given = torch.from_numpy(latents), torch.from_numpy(voice)
    return f"HiFi-GAN, {codes} codes", lambda: model.inference(*given)[:, 0], lambda: ours(variables, latents, voice)


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - start


def measure(pair: Pair, rounds: int) -> str:
    """A line of the table; prints what each round took."""
    title, theirs, ours = pair
    first = seconds(ours)
    difference = error(ours(), theirs())
    took = [(seconds(theirs), seconds(ours)) for _ in range(rounds)]
    torch_took, ours_took = (statistics.median(column) for column in zip(*took, strict=True))
    print(f"{title}: torch, ours (s) {np.round(took, 2).tolist()}, largest difference {difference:.1e}", flush=True)
    ratio, compiling = torch_took / ours_took, first - ours_took
    return f"| {title} | {torch_took:.2f} s | {ours_took:.2f} s | {ratio:.2f} | {compiling:.0f} s |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    pairs: dict[str, Callable[[argparse.Namespace], Pair]] = {
        "diffusion": lambda given: diffusion_pair(given.frames, given.unroll),
        "clvp": lambda given: clvp_pair(given.unroll),
        "univnet": lambda given: vocoder_pair(given.frames),
        "hifigan": lambda given: hifigan_pair(given.frames),
    }
    parser.add_argument("--only", choices=pairs, nargs="+", default=list(pairs))
    parser.add_argument("--frames", type=int, default=470, help="mel frames at 24 kHz (default: %(default)s, 5 s)")
    parser.add_argument("--unroll", type=int, default=1, help="layers of a compiled loop step (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    torch.set_grad_enabled(False)
    load = os.getloadavg()[0]
    rows = [measure(pairs[name](arguments), arguments.rounds) for name in arguments.only]
    print(f"\n{parallel.describe()}, {os.cpu_count()} cores, load {load:.1f} before, {os.getloadavg()[0]:.1f} after\n")
    print("| what | torch | ours | ratio | compile |\n|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
