"""The models after the codes, and all of `ultra_fast`, at their real sizes: time and memory, here and by torch.

  python -m benchmarks.synthesis                       5 s of speech each, one diffusion evaluation of 23 s too
  python -m benchmarks.synthesis --only clvp hifigan --rounds 5

Each side runs in a process of its own, one after the other in every round, so that its peak memory is its own; the
median counts. On a machine that others load the processors' seconds say more than the clock's. Random weights, float32,
all cores, or the card where there is one, whose memory is told then. torch: the tests' reference, whose UnivNet filters
all frames at once, and whose steps run one after the other, as upstream's. One diffusion evaluation is the conditional
and the unconditional pass: one batch of two here, two batches of one upstream. Sixteen candidates are scored: the text
side once here, once for each upstream. The values are compared in tests/synthesis/test_real_size.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch

from benchmarks import torch_side
from tests.support.torch_reference import CLVP, DiffusionTts, Hifigan, UnifiedVoice, UnivNet, vocoders
from tests.support.torch_reference.builders import quietly
from tortoise_jax import parallel
from tortoise_jax.audio import default_mel_norms
from tortoise_jax.checkpoints import parts
from tortoise_jax.checkpoints.parts import Part, abstract_variables
from tortoise_jax.checkpoints.pretrained import Pretrained
from tortoise_jax.models import clvp, diffusion, hifigan, unified_voice, vocoder
from tortoise_jax.models.layers import codes_of, frames_of
from tortoise_jax.synthesis import denoising, speech
from tortoise_jax.synthesis.presets import PRESETS
from tortoise_jax.synthesis.sampler import SamplingOptions
from tortoise_jax.synthesis.voices import Voice
from tortoise_jax.text.tokenizer import Tokenizer

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen when he came home."
CANDIDATES, CODES, CALM = 16, 500, 8
IMPOSSIBLE = -1e4
SHORT = 1.0  # seconds, under which the median of five runs counts
LONG = 60.0  # seconds, after which nothing is run again: compiling is taken off the clock, not off the processors
Work = Callable[[], Any]


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def channels_first(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.swapaxes(1, 2).copy())


def text_ids() -> list[int]:
    return Tokenizer.default().encode(TEXT, "tortoise")


def random_part(config: Any) -> Part:
    """A model whose activations neither vanish nor grow."""
    random = np.random.default_rng(0)

    def weights(path: Any, leaf: Any) -> Any:
        if path[-1].key == "bias":
            return jax.numpy.zeros(leaf.shape)
        if path[-1].key == "scale" or len(leaf.shape) < 2:
            return jax.numpy.ones(leaf.shape)
        drawn = random.standard_normal(leaf.shape, dtype=np.float32)
        return jax.numpy.asarray(drawn * np.float32(math.prod(leaf.shape[:-1]) ** -0.5))

    return Part(config, jax.tree_util.tree_map_with_path(weights, abstract_variables(config)))


# --- one model --------------------------------------------------------------------------------------------------------


def torch_diffusion(frames: int) -> Work:
    model = DiffusionTts().eval()
    x, aligned, steps = torch.randn(1, 100, frames), torch.randn(1, model.width, frames), torch.tensor([1234])
    return lambda: [model(x, steps, given) for given in (aligned, None)]


def our_diffusion(frames: int) -> Work:
    part = random_part(diffusion.RELEASED)
    decoder = diffusion.DiffusionDecoder(part.config)
    x, aligned = noise(1, frames, 100), noise(1, frames, part.config.width, seed=1)

    @jax.jit
    def estimate(variables: Any, x: Any, aligned: Any) -> Any:
        free = decoder.apply(variables, 1, frames, method="unconditioned")
        both, steps = jax.numpy.concatenate([aligned, free]), jax.numpy.full((2,), 1234)
        return decoder.apply(variables, jax.numpy.tile(x, (2, 1, 1)), steps, both, method="estimate")

    return lambda: estimate(part.variables, x, aligned)


def torch_clvp(_: int) -> Work:
    model = CLVP().eval()
    texts = torch.tensor([[*text_ids(), 0]]).expand(CANDIDATES, -1)
    codes = torch.randint(0, 8192, (CANDIDATES, CODES))
    return lambda: model(texts, codes)


def our_clvp(_: int) -> Work:
    part = random_part(clvp.RELEASED)
    model = clvp.CLVP(part.config)
    codes = np.random.default_rng(0).integers(0, 8192, (CANDIDATES, CODES)).astype(np.int32)
    text = np.array([[*text_ids(), 0]], np.int32)

    @jax.jit
    def score(variables: Any, text: Any, codes: Any) -> Any:
        latent = model.apply(variables, text, method="text_latent")[0]
        return model.apply(variables, latent, codes, method="score")

    return lambda: score(part.variables, text, codes)


def filtered_at_once(x: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`vocoders.local_convolution` without its loop over frames, which is there to be read."""
    hop = x.shape[-1] // kernel.shape[-1]
    windows = torch.nn.functional.pad(x, (1, 1)).unfold(-1, hop + 2, hop).unfold(-1, 3, 1)
    return (torch.einsum("bilhm,bioml->bolh", windows, kernel) + bias[..., None]).flatten(2)


def torch_vocoder() -> UnivNet:
    vocoders.local_convolution = filtered_at_once
    return quietly(UnivNet).eval()


def torch_univnet(frames: int) -> Work:
    model = torch_vocoder()
    mel, z = torch.randn(1, 100, frames) - 5, torch.randn(1, 64, frames + vocoder.TAIL_FRAMES)
    return lambda: model.inference(mel, z)


def our_univnet(frames: int) -> Work:
    part = random_part(vocoder.RELEASED)
    mel, z = noise(1, frames, 100) - 5, noise(1, frames + vocoder.TAIL_FRAMES, part.config.noise_channels)
    ours = jax.jit(lambda *given: vocoder.UnivNet(part.config).apply(*given, method="vocode"))
    return lambda: ours(part.variables, mel, z)


def torch_hifigan(frames: int) -> Work:
    model = quietly(Hifigan).eval()
    latents, voice = torch.randn(1, codes_of(frames), 1024), torch.randn(1, 1024)
    return lambda: model.inference(latents, voice)


def our_hifigan(frames: int) -> Work:
    part = random_part(hifigan.RELEASED)
    codes = codes_of(frames)
    latents, voice = noise(1, codes, part.config.latent_width), noise(1, part.config.voice_width)
    decode = lambda *given: hifigan.Hifigan(part.config).apply(*given, frames_of(codes), method="decode")
    ours = jax.jit(decode)
    return lambda: ours(part.variables, latents, voice)


# --- the whole of ultra_fast: 16 candidates of one text, the best one rendered ----------------------------------------


def torch_ultra_fast(frames: int) -> Work:
    voice, scorer, decoder, vocode = UnifiedVoice(attention="sdpa"), CLVP(), DiffusionTts(), torch_vocoder()
    for model in (voice, scorer, decoder):
        model.eval()
    voice.mel_head.bias[[voice.stop_mel_token, voice.start_mel_token]] = IMPOSSIBLE
    text, who, heard = torch.tensor([*text_ids(), 0]), torch.randn(1024), torch.randn(1, 2048)
    steps = {
        name: values.tolist() for name, values in denoising.coefficients(PRESETS["ultra_fast"].steps, None).items()
    }

    def work() -> torch.Tensor:
        drawn = voice.sample(who, text, CANDIDATES, codes_of(frames) - CALM)
        fixed = torch.nn.functional.pad(drawn, (0, CODES - drawn.shape[1]), value=83)
        fixed[:, -3:] = torch.tensor([45, 45, 248])
        best = drawn[scorer(text.expand(CANDIDATES, -1), fixed).argmax()]
        latents = voice.hand_over(who, text, best)[1][None]
        aligned = decoder.timestep_independent(latents, heard, frames)
        x = torch.randn(1, 100, frames)
        for now in (dict(zip(steps, values, strict=True)) for values in zip(*steps.values(), strict=True)):
            eps, variance = decoder(x, torch.tensor([now["trained"]]), aligned).chunk(2, dim=1)
            x0 = (now["recip"] * x - now["recipm1"] * eps).clamp(-1, 1)
            fraction = (variance + 1) / 2
            log_variance = fraction * now["log_beta"] + (1 - fraction) * now["log_variance"]
            drift = now["coef1"] * x0 + now["coef2"] * x
            x = drift + now["noise"] * (log_variance / 2).exp() * torch.randn_like(x)
        return vocode.inference(denoising.denormalised(x), torch.randn(1, 64, frames + vocoder.TAIL_FRAMES))

    return work


def our_ultra_fast(frames: int) -> Work:
    preset = PRESETS["ultra_fast"]
    configs = {
        parts.AR: unified_voice.RELEASED, parts.CLVP: clvp.RELEASED,
        parts.DIFFUSION: diffusion.RELEASED, parts.VOCODER: vocoder.RELEASED,
    }  # fmt: skip
    made = {name: random_part(config) for name, config in configs.items()}
    pretrained = Pretrained(made, Tokenizer.default(), default_mel_norms(), {})
    head = pretrained.ar.params["mel_head"]
    head["bias"] = head["bias"].at[unified_voice.RELEASED.codes :].set(IMPOSSIBLE)
    pretrained, weights = speech.lay_out(pretrained, preset, "float32")
    voice = Voice(noise(1024), noise(2048))
    options = SamplingOptions(max_codes=codes_of(frames) - CALM, dtype="float32")
    made.clear()  # the AR model's tree, which is laid out

    def work() -> np.ndarray:
        given: Any = (preset, voice.conditioning, [TEXT], "tortoise", 0, options, CANDIDATES)
        said = speech.say(pretrained, weights, *given)
        (waveform,) = speech.speech_of(pretrained, weights, preset, said, voice, 0)
        assert len(waveform) == 256 * frames
        return waveform

    return work


# --- measuring --------------------------------------------------------------------------------------------------------

FIVE_SECONDS, LONGEST = 470, 2176  # mel frames
WORKS: dict[str, tuple[str, int, Callable[[int], Work], Callable[[int], Work]]] = {
    "diffusion": ("one guided diffusion evaluation, 5 s", FIVE_SECONDS, torch_diffusion, our_diffusion),
    "diffusion_23s": ("the same, 23 s", LONGEST, torch_diffusion, our_diffusion),
    "clvp": (f"CLVP of {CANDIDATES} candidates", 0, torch_clvp, our_clvp),
    "univnet": ("UnivNet, 5 s", FIVE_SECONDS, torch_univnet, our_univnet),
    "hifigan": ("HiFi-GAN, 5 s", FIVE_SECONDS, torch_hifigan, our_hifigan),
    "ultra_fast": ("all of ultra_fast, 5 s", FIVE_SECONDS, torch_ultra_fast, our_ultra_fast),
}


@dataclasses.dataclass(frozen=True)
class Took:
    """Of one side in its own process: seconds of compiling, then of the work by the clock and of all processors
    together, and the most memory that it all took, in GB."""

    compiling: float
    wall: float
    processor: float
    peak: float


def seconds(work: Work) -> tuple[float, float]:
    """By the clock, and of all processors together."""
    start = time.perf_counter(), time.process_time()
    jax.block_until_ready(work())
    torch_side.wait()
    return time.perf_counter() - start[0], time.process_time() - start[1]


def measured_here(name: str, which: int) -> Took:
    _, frames, *sides = WORKS[name]
    compiling: list[float] = []
    keep = lambda event, took, **_: compiling.append(took) if event.endswith("backend_compile_duration") else None
    work = sides[which](frames)
    jax.monitoring.register_event_duration_secs_listener(keep)
    wall, processor = seconds(work)
    compiled = sum(compiling)
    if wall > LONG:
        wall -= compiled
    else:
        rounds = [seconds(work) for _ in range(1 if wall > SHORT else 5)]
        wall, processor = (statistics.median(column) for column in zip(*rounds, strict=True))
    on_card = parallel.peak_memory() if which else torch_side.peak_memory()
    peak = on_card or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Took(compiled, wall, processor, peak / 1e9)


def measured(name: str, which: int, compiled: str) -> Took:
    command = [sys.executable, "-m", "benchmarks.synthesis", "--side", str(which), "--only", name]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": compiled}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return Took(**json.loads(done.stdout.splitlines()[-1]))


def row(name: str, rounds: int, compiled: str) -> str:
    """A line of the table; prints what each round took."""
    took = [[measured(name, which, compiled) for which in (0, 1)] for _ in range(rounds)]
    print(f"{name}: torch, ours: {took}", flush=True)
    median = lambda which, field: statistics.median(getattr(both[which], field) for both in took)
    wall, processor = ([median(which, field) for which in (0, 1)] for field in ("wall", "processor"))
    sides = " | ".join(
        f"{wall[which]:.3g} s, {processor[which]:.3g} s, {median(which, 'peak'):.1f} GB" for which in (0, 1)
    )
    compiling = took[0][1].compiling  # later processes find the programs on disk
    return (
        f"| {WORKS[name][0]} | {sides} | {wall[0] / wall[1]:.2f} | {processor[0] / processor[1]:.2f} "
        f"| {compiling:.0f} s |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=WORKS, nargs="+", default=list(WORKS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", type=int, choices=(0, 1), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    if arguments.side is not None:
        if not arguments.side:
            torch_side.take_device(os.cpu_count() or 1)
        print(json.dumps(dataclasses.asdict(measured_here(arguments.only[0], arguments.side))))
        return
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as compiled:
        table = [row(name, arguments.rounds, compiled) for name in arguments.only]
    print(f"\n{parallel.describe()}, {os.cpu_count()} cores, load {load:.1f} before, {os.getloadavg()[0]:.1f} after\n")
    print("| what | torch: clock, processors, memory | ours | ratio by the clock | of the processors | compile |")
    print("|---|---|---|---|---|---|")
    print("\n".join(table))


if __name__ == "__main__":
    main()
