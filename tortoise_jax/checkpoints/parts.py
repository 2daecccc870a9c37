"""The models a checkpoint can hold, each a part: its dimensions and its variables.

A new model is one more entry of PART_TYPES. Variables are Flax's: collections of trees, "params" and whatever else the
model keeps (the dVAE: "codebook"). On disk a part is one tree, all collections together, as its torch file is.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tortoise_jax.checkpoints.trees import Tree, checksum, digest
from tortoise_jax.models import clvp, diffusion, hifigan, random_voice, vocoder
from tortoise_jax.models.dvae import DiscreteVAE, DVAEConfig
from tortoise_jax.models.unified_voice import UnifiedVoice, UnifiedVoiceConfig

AR, DVAE, CLVP, DIFFUSION, VOCODER, HIFIGAN = "ar", "dvae", "clvp", "diffusion", "vocoder", "hifigan"
RANDOM_AR, RANDOM_DIFFUSION = "random_ar", "random_diffusion"
Variables = dict[str, Tree]


@dataclasses.dataclass(frozen=True)
class PartType:
    """title: for people. init: the model's variables for these dimensions, to be called under `jax.eval_shape`."""

    title: str
    config: type
    init: Callable[[Any], Any]


def _init_unified_voice(config: UnifiedVoiceConfig) -> Any:
    mel, row = jnp.zeros((1, 1, 8, config.mel_channels)), jnp.zeros((1, 4), jnp.int32)
    return UnifiedVoice(config).init(jax.random.key(0), mel, row, row, row)


def _init_dvae(config: DVAEConfig) -> Any:
    return DiscreteVAE(config).init(jax.random.key(0), jnp.zeros((1, 2 * config.frames_per_code, config.channels)))


def _init_clvp(config: clvp.CLVPConfig) -> Any:
    row = jnp.zeros((1, 2), jnp.int32)
    return clvp.CLVP(config).init(jax.random.key(0), row, row)


def _init_diffusion(config: diffusion.DiffusionConfig) -> Any:
    mel, row = jnp.zeros((1, 4, config.mel_channels)), jnp.zeros((1, 2), jnp.int32)
    latents = jnp.zeros((1, 2, config.latent_width))
    return diffusion.DiffusionDecoder(config).init(jax.random.key(0), mel, row[0, :1], latents, mel[None], row)


def _init_vocoder(config: vocoder.VocoderConfig) -> Any:
    mel, noise = jnp.zeros((1, 4, config.mel_channels)), jnp.zeros((1, 4, config.noise_channels))
    return vocoder.UnivNet(config).init(jax.random.key(0), mel, noise)


def _init_hifigan(config: hifigan.HifiganConfig) -> Any:
    latents, voice = jnp.zeros((1, 4, config.latent_width)), jnp.zeros((1, config.voice_width))
    return hifigan.Hifigan(config).init(jax.random.key(0), latents, voice)


def _init_random_voice(config: random_voice.RandomVoiceConfig) -> Any:
    return random_voice.RandomVoice(config).init(jax.random.key(0), jnp.zeros((1, config.width)))


PART_TYPES = {
    AR: PartType("AR model", UnifiedVoiceConfig, _init_unified_voice),
    DVAE: PartType("dVAE", DVAEConfig, _init_dvae),
    CLVP: PartType("CLVP", clvp.CLVPConfig, _init_clvp),
    DIFFUSION: PartType("diffusion decoder", diffusion.DiffusionConfig, _init_diffusion),
    VOCODER: PartType("vocoder", vocoder.VocoderConfig, _init_vocoder),
    HIFIGAN: PartType("decoder of the fast path", hifigan.HifiganConfig, _init_hifigan),
    RANDOM_AR: PartType("random voices' AR half", random_voice.RandomVoiceConfig, _init_random_voice),
    RANDOM_DIFFUSION: PartType("random voices' diffusion half", random_voice.RandomVoiceConfig, _init_random_voice),
}


@dataclasses.dataclass(frozen=True)
class Part:
    """One model of a checkpoint.

    variables: arrays by collection; only their shapes where the weights were not asked for.
    digest: sha256 of the weights that were converted; "" where an old checkpoint does not state it. checksum: of the
    weights on disk, where they are not in memory.
    """

    config: Any
    variables: Variables
    digest: str = ""
    checksum: int | None = None

    @classmethod
    def of_tree(cls, config: Any, tree: Tree) -> Part:
        """A part with the weights of one tree, as a converter makes it or a disk holds it."""
        return cls(config, in_collections(config, tree), digest(tree))

    def on_disk(self) -> Part:
        """The same without its weights, whose memory is free again."""
        return dataclasses.replace(self.without_weights(), checksum=checksum(self.tree))

    def without_weights(self) -> Part:
        """The same with shapes alone, where nothing on disk stands for it."""
        return dataclasses.replace(self, variables=abstract_variables(self.config))

    @property
    def params(self) -> Tree:
        return self.variables["params"]

    @property
    def tree(self) -> Tree:
        """All collections as the one tree that is on disk."""
        return joined(self.variables)


@functools.cache
def abstract_variables(config: Any) -> Variables:
    """The variables of a model of these dimensions as shapes, without computing anything. Not to be changed."""
    init = next(kind.init for kind in PART_TYPES.values() if isinstance(config, kind.config))
    return jax.eval_shape(lambda: init(config))


def abstract_tree(config: Any) -> Tree:
    """The same as the one tree that is on disk."""
    return joined(abstract_variables(config))


def joined(variables: Variables) -> Tree:
    return {name: tree for collection in variables.values() for name, tree in collection.items()}


def in_collections(config: Any, tree: Tree) -> Variables:
    """The inverse of `joined`."""
    shapes = abstract_variables(config)
    return {collection: {name: tree[name] for name in names} for collection, names in shapes.items()}
