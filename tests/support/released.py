"""The released models by part: torch classes and sizes; their dimensions are RELEASED in tortoise_jax/models."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from tests.support.torch_reference import (
    CLVP,
    DiffusionTts,
    DiscreteVAE,
    Hifigan,
    RandomLatentConverter,
    UnifiedVoice,
    UnivNet,
)
from tests.support.torch_reference.builders import quietly
from tortoise_jax.checkpoints import parts

PARAMETERS = {
    parts.DVAE: 59_963_984,
    parts.AR: 421_526_786,
    parts.CLVP: 243_846_145 + 2 * 16,  # and the two buffers of frequencies
    parts.DIFFUSION: 292_334_380,
    parts.VOCODER: 14_865_506,
    parts.HIFIGAN: 17_844_226,
    parts.RANDOM_AR: 6_297_600,
    parts.RANDOM_DIFFUSION: 25_178_112,
}
BUILDERS: dict[str, Callable[[], nn.Module]] = {
    parts.DVAE: DiscreteVAE,
    parts.AR: UnifiedVoice,
    parts.CLVP: CLVP,
    parts.DIFFUSION: DiffusionTts,
    parts.VOCODER: UnivNet,
    parts.HIFIGAN: Hifigan,
    parts.RANDOM_AR: lambda: RandomLatentConverter(1024),
    parts.RANDOM_DIFFUSION: lambda: RandomLatentConverter(2048),
}


def torch_model(part: str) -> nn.Module:
    """The released model's modules, without memory for its weights."""
    with torch.device("meta"):
        return quietly(BUILDERS[part])
