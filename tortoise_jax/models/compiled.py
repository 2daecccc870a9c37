"""A model's methods as compiled programs that all callers share: one for each model, method and shape of the arrays.

For a single device, without gradients. What is shared out over devices compiles its own (parallel.py).
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax

from tortoise_jax.models.layers import Array


@functools.partial(jax.jit, static_argnums=(0, 1))
def apply(model: nn.Module, method: str, variables: Any, *arrays: Array) -> Any:
    """What `method` of the model returns for these variables (collections of trees) and arrays."""
    return model.apply(variables, *arrays, method=method)
