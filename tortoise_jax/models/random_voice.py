"""A voice out of nothing: noise to one of the two vectors of a voice, by tortoise's random latent converter."""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax.numpy as jnp

from tortoise_jax.models.layers import HIGHEST, Array

LAYERS = 6
LEARNING_RATE_SCALE = 0.1  # weights and biases are stored ten times as large as they are used
SLOPE = 0.2


@dataclasses.dataclass(frozen=True)
class RandomVoiceConfig:
    """width: of the vector, 1024 for the AR model, 2048 for the diffusion decoder."""

    width: int


RELEASED_AUTO, RELEASED_DIFFUSER = RandomVoiceConfig(1024), RandomVoiceConfig(2048)


class EqualizedDense(nn.Module):
    """sqrt(2) * lrelu(x (0.1 w / sqrt(d)) + 0.1 b)."""

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b, d) -> (b, d)
        d = x.shape[-1]
        kernel = self.param("kernel", nn.initializers.normal(1 / LEARNING_RATE_SCALE), (d, d))
        bias = self.param("bias", nn.initializers.zeros, (d,))
        scale = LEARNING_RATE_SCALE / math.sqrt(d)
        y = jnp.dot(x, kernel * scale, precision=HIGHEST) + bias[None] * LEARNING_RATE_SCALE
        return math.sqrt(2.0) * nn.leaky_relu(y, SLOPE)


class RandomVoice(nn.Module):
    """noise (b, d) -> vector (b, d)."""

    config: RandomVoiceConfig

    @nn.compact
    def __call__(self, noise: Array) -> Array:
        x = noise
        for i in range(LAYERS - 1):
            x = EqualizedDense(name=f"layers_{i}")(x)
        last = nn.Dense(self.config.width, precision=HIGHEST, name=f"layers_{LAYERS - 1}")
        return last(x)
