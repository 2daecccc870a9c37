"""The models after the codes at the released sizes, with random weights: the same numbers as torch's."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.parity import STACK
from tests.support.synthesis_models import (
    Comparison,
    clvp_comparison,
    diffusion_comparison,
    hifigan_comparison,
    random_voice_comparison,
    vocoder_comparison,
)
from tests.support.torch_reference import (
    CLVP,
    DiffusionTts,
    Hifigan,
    UnivNet,
    builders,
    tiny_clvp,
    tiny_diffusion,
    tiny_hifigan,
    tiny_random_voice,
    tiny_vocoder,
)


def released(model: type, tiny: dict[str, Any]) -> dict[str, Any]:
    """What the constructor has by default in place of each number that makes it tiny."""
    return {name: inspect.signature(model).parameters[name].default for name in tiny}


MODELS: dict[str, Callable[[], Comparison]] = {
    "CLVP": lambda: clvp_comparison(tiny_clvp(**released(CLVP, builders.TINY_CLVP)).requires_grad_(False)),
    "diffusion decoder": lambda: diffusion_comparison(
        tiny_diffusion(**released(DiffusionTts, builders.TINY_DIFFUSION)).requires_grad_(False), codes=20
    ),
    "UnivNet": lambda: vocoder_comparison(
        tiny_vocoder(**released(UnivNet, builders.TINY_VOCODER)).requires_grad_(False), frames=60
    ),
    "HiFi-GAN": lambda: hifigan_comparison(
        tiny_hifigan(**released(Hifigan, builders.TINY_HIFIGAN)).requires_grad_(False), codes=20
    ),
    "random voices": lambda: random_voice_comparison(tiny_random_voice(channels=2048).requires_grad_(False)),
}


@pytest.mark.slow
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())
def test_values_at_the_released_size(build: Callable[[], Comparison]) -> None:
    comparison = build()
    assert sum(leaf.numel() for leaf in comparison.model.state_dict().values()) > 1e7
    comparison.check(tolerance=STACK)
