"""The size of the released models; their dimensions are RELEASED in tortoise_jax/models."""

from __future__ import annotations

UNIFIED_VOICE_PARAMETERS = 421_526_786
DVAE_PARAMETERS = 59_963_984
CLVP_PARAMETERS = 243_846_145 + 2 * 16  # and the two buffers of frequencies
DIFFUSION_PARAMETERS = 292_334_380
VOCODER_PARAMETERS = 14_865_506
HIFIGAN_PARAMETERS = 17_844_226
RANDOM_AR_PARAMETERS = 6_297_600
RANDOM_DIFFUSION_PARAMETERS = 25_178_112
