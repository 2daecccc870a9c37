"""The models after the codes: each with random inputs, what torch makes of them, and the same through Flax.

Every parameter and buffer of a model changes at least one output, so a comparison of all outputs sees all of them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch

from tests.support.changes import noise
from tests.support.parity import (
    MODULE,
    STACK,
    Change,
    Tree,
    Twin,
    assert_close,
    assert_trees_close,
    gradients_of,
    numpy,
    tree_of,
    twin_of,
)
from tests.support.torch_reference import (
    CLVP,
    DiffusionTts,
    Hifigan,
    RandomLatentConverter,
    UnivNet,
    tiny_clvp,
    tiny_diffusion,
    tiny_hifigan,
    tiny_random_voice,
    tiny_vocoder,
)
from tortoise_jax.checkpoints import parts
from tortoise_jax.checkpoints.parts import in_collections
from tortoise_jax.models import clvp, diffusion, hifigan, random_voice, vocoder

Outputs = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """want: torch's outputs in our layout, by name. got: the same of ours, from a config and the model's variables."""

    part: str
    model: torch.nn.Module
    want: Callable[[], Outputs]
    got: Callable[[Any, Tree], Outputs]

    @functools.cached_property
    def twin(self) -> Twin:
        return twin_of(self.part, self.model)

    @functools.cached_property
    def wanted(self) -> Outputs:
        return self.want()

    @functools.cached_property
    def compiled(self) -> Callable[[Tree], Outputs]:
        return jax.jit(lambda variables: self.got(self.twin.config, variables))

    def check(self, change: Change = lambda tree: tree, tolerance: float = MODULE) -> None:
        """Every output of torch and of ours, within the tolerance. change: of our weights."""
        got = self.compiled(in_collections(self.twin.config, change(self.twin.params)))
        for name, want in self.wanted.items():
            assert_close(got[name], want, tolerance, name)

    def check_gradients(self, heads: int = 1) -> None:
        """The gradients of a random weighting of all outputs, for every parameter. heads: of a fused qkv."""
        twin = self.twin
        self.model.requires_grad_(True)
        outputs = self.want()
        weights = {name: noise(*value.shape, seed=9) for name, value in outputs.items()}
        total = sum((outputs[name] * weight).sum() for name, weight in weights.items())
        buffers = {name: torch.zeros_like(buffer) for name, buffer in self.model.named_buffers()}
        named = gradients_of(self.model, total) | buffers
        self.model.requires_grad_(False)
        want = in_collections(twin.config, tree_of(self.part, twin.config, named))["params"]

        def weighted(params: Tree) -> jax.Array:
            got = self.got(twin.config, twin.variables | {"params": params})
            return sum((jnp.sum(got[name] * numpy(weight)) for name, weight in weights.items()), jnp.zeros(()))

        got = jax.jit(jax.grad(weighted))(jax.tree.map(jnp.asarray, twin.variables["params"]))
        assert_trees_close(got, want, STACK, heads)


def channels_last(x: torch.Tensor) -> jnp.ndarray:
    return jnp.asarray(numpy(x).swapaxes(-1, -2))


def integers(below: int, *shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(seed))


def ours(x: torch.Tensor) -> jnp.ndarray:
    return jnp.asarray(x.to(torch.int32).numpy() if not x.is_floating_point() else numpy(x))


def clvp_comparison(model: CLVP | None = None) -> Comparison:
    model = model or tiny_clvp().requires_grad_(False)
    text = integers(model.text_emb.num_embeddings, 3, 9)
    codes = integers(model.speech_emb.num_embeddings, 3, 14)
    lengths = torch.tensor([9, 4, 7]), torch.tensor([5, 14, 11])
    masks = [torch.arange(n) < row[:, None] for n, row in zip((9, 14), lengths, strict=True)]

    def want() -> Outputs:
        text_latent, speech_latent = model.latents(text, codes)
        return {
            "text latent": text_latent,
            "speech latent": speech_latent,
            "similarity": model(text, codes),
            "candidates": model(text[:1].expand(3, -1), codes),
            "masked": model(text, codes, *masks),
        }

    def got(config: clvp.CLVPConfig, variables: Tree) -> Outputs:
        flax = clvp.CLVP(config)
        out = flax.apply(variables, ours(text), ours(codes))
        first = flax.apply(variables, ours(text[:1]), method="text_latent")[0]
        masked = flax.apply(variables, ours(text), ours(codes), *(jnp.asarray(mask.numpy()) for mask in masks))
        return {
            "text latent": out["text"]["latent"],
            "speech latent": out["speech"]["latent"],
            "similarity": out["similarity"],
            "candidates": flax.apply(variables, first, ours(codes), method="score"),
            "masked": masked["similarity"],
        }

    return Comparison(parts.CLVP, model, want, got)


def diffusion_comparison(model: DiffusionTts | None = None, codes: int = 7) -> Comparison:
    model = model or tiny_diffusion().requires_grad_(False)
    frames = diffusion.frames_of(codes)
    latents = noise(2, codes, model.latent_conditioner[0].in_channels)
    mels = model.inp_block.in_channels
    clips, x = noise(2, 3, mels, 33, seed=6), noise(2, mels, frames, seed=7)
    ids, steps = integers(model.code_embedding.num_embeddings, 2, codes), torch.tensor([3, 3999])

    def want() -> Outputs:
        conditioning = model.conditioning(clips)
        aligned = model.timestep_independent(latents, conditioning, frames)
        of_codes = model.timestep_independent(ids, conditioning, frames)
        return {
            "conditioning": conditioning,
            "aligned": aligned.mT,
            "of codes": of_codes.mT,
            "mel head": model.mel_head(aligned).mT,
            "estimates": torch.cat([model(x, steps, aligned), model(x, steps, None)]).mT,
        }

    def got(config: diffusion.DiffusionConfig, variables: Tree) -> Outputs:
        call = lambda method, *arguments: diffusion.DiffusionDecoder(config).apply(variables, *arguments, method=method)
        conditioning = call("condition", channels_last(clips))
        aligned = call("align", ours(latents), conditioning, frames)["aligned"]
        # Both passes as one batch, as at synthesis; torch runs one after the other.
        both = jnp.concatenate([aligned, call("unconditioned", 2, frames)])
        return {
            "conditioning": conditioning,
            "aligned": aligned,
            "of codes": call("align_codes", ours(ids), conditioning, frames)["aligned"],
            "mel head": call("mel_of_aligned", aligned),
            "estimates": call("estimate", jnp.tile(channels_last(x), (2, 1, 1)), jnp.tile(ours(steps), 2), both),
        }

    return Comparison(parts.DIFFUSION, model, want, got)


def vocoder_comparison(model: UnivNet | None = None, frames: int = 6) -> Comparison:
    model = model or tiny_vocoder().requires_grad_(False)
    channels = model.res_stack[0].kernel_predictor.input_conv[0].in_channels
    mel, z = noise(2, channels, frames), noise(2, model.conv_pre.in_channels, frames + 10, seed=6)

    def want() -> Outputs:
        return {
            "waveform": model(mel, z[..., :frames])[:, 0],
            "inference": model.inference(mel, z)[:, 0],
        }

    def got(config: vocoder.VocoderConfig, variables: Tree) -> Outputs:
        flax = vocoder.UnivNet(config)
        return {
            "waveform": flax.apply(variables, channels_last(mel), channels_last(z[..., :frames]))["waveform"],
            "inference": flax.apply(variables, channels_last(mel), channels_last(z), method="vocode"),
        }

    return Comparison(parts.VOCODER, model, want, got)


def hifigan_comparison(model: Hifigan | None = None, codes: int = 5) -> Comparison:
    model = model or tiny_hifigan().requires_grad_(False)
    latents = noise(2, codes, model.conv_pre.in_channels)
    voice = noise(2, model.cond_layer.in_channels, seed=6)

    def want() -> Outputs:
        return {"upsampled": model.upsample(latents).mT, "waveform": model.inference(latents, voice)[:, 0]}

    def got(config: hifigan.HifiganConfig, variables: Tree) -> Outputs:
        frames = hifigan.frames_of(codes)
        flax = hifigan.Hifigan(config)
        return {
            "upsampled": hifigan.upsampled(ours(latents), frames)[1],
            "waveform": flax.apply(variables, ours(latents), ours(voice), frames, method="decode"),
        }

    return Comparison(parts.HIFIGAN, model, want, got)


def random_voice_comparison(model: RandomLatentConverter | None = None) -> Comparison:
    model = model or tiny_random_voice().requires_grad_(False)
    z = noise(3, len(model.layers[-1].bias))

    def got(config: random_voice.RandomVoiceConfig, variables: Tree) -> Outputs:
        return {"vector": random_voice.RandomVoice(config).apply(variables, ours(z))}

    return Comparison(parts.RANDOM_AR, model, lambda: {"vector": model(z)}, got)


COMPARISONS: dict[str, Callable[..., Comparison]] = {
    parts.CLVP: clvp_comparison,
    parts.DIFFUSION: diffusion_comparison,
    parts.VOCODER: vocoder_comparison,
    parts.HIFIGAN: hifigan_comparison,
    parts.RANDOM_AR: random_voice_comparison,
}
