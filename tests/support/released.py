"""The size of the released models; their dimensions are RELEASED in tortoise_jax/models."""

from __future__ import annotations

UNIFIED_VOICE_PARAMETERS = 421_526_786
DVAE_PARAMETERS = 59_963_984
