"""Low-rank adapters (LoRA) of the GPT blocks' products with weights: x W becomes x W + scale (x a) b.

They are a subtree of a run's parameters, beside the checkpoint's own, which stay as they are. A starts random and b at
zero, so that a run starts as exactly the model it began with.

Axis letters as in layers.py, and: l blocks   i, o inputs and outputs of a product   r rank
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tortoise_jax.models.layers import ADAPTERS

Tree = Any
LORA = "lora"  # the adapters' name among the parameters
PRODUCTS = (("attn", "c_attn"), ("attn", "c_proj"), ("mlp", "c_fc"), ("mlp", "c_proj"))


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """rank: r, 0 for no adapters; alpha: what they are added times is alpha / rank."""

    rank: int = 0
    alpha: float = 16.0

    @property
    def scale(self) -> float:
        return self.alpha / self.rank if self.rank else 0.0


NO_LORA = LoraConfig()


def with_adapters(params: Tree, config: LoraConfig, seed: int) -> Tree:
    """The parameters, and adapters that change nothing yet: a (l, i, r) uniform within 1 / √i, b (l, r, o) zero."""
    if not config.rank:
        return params
    adapters: dict[str, dict[str, Any]] = {}
    for index, (module, product) in enumerate(PRODUCTS):
        layers, inputs, outputs = params["gpt"]["h"][module][product]["kernel"].shape
        key, bound = jax.random.fold_in(jax.random.key(seed), index), inputs**-0.5
        adapters.setdefault(module, {})[product] = {
            "a": jax.random.uniform(key, (layers, inputs, config.rank), jnp.float32, -bound, bound),
            "b": jnp.zeros((layers, config.rank, outputs), jnp.float32),
        }
    return {**params, LORA: adapters}


def inserted(params: Tree, config: LoraConfig) -> Tree:
    """What the model is applied to: each adapter beside the weights of its product, b times the scale."""
    if LORA not in params:
        return params

    def beside(weights: Tree, adapter: Tree) -> Tree:
        return {**weights, **dict(zip(ADAPTERS, (adapter["a"], adapter["b"] * config.scale), strict=True))}

    return of_products(params, beside)


def merged(params: Tree, config: LoraConfig) -> Tree:
    """The model without adapters that computes the same: each is in its weights. On the host; nothing is changed."""
    if LORA not in params:
        return params

    def added(weights: Tree, adapter: Tree) -> Tree:
        kernel, a, b = np.array(weights["kernel"]), np.asarray(adapter["a"]), np.asarray(adapter["b"])
        for layer in range(len(kernel)):
            kernel[layer] += np.float32(config.scale) * (a[layer] @ b[layer])
        return {**weights, "kernel": kernel}

    return of_products(params, added)


def of_products(params: Tree, change: Any) -> Tree:
    """The model's parameters with change(weights, adapter) in the place of each product that has an adapter."""
    adapters = params[LORA]
    blocks = dict(params["gpt"]["h"])
    for module, products in adapters.items():
        changed = {name: change(blocks[module][name], adapter) for name, adapter in products.items()}
        blocks[module] = {**blocks[module], **changed}
    own = {name: tree for name, tree in params.items() if name != LORA}
    return {**own, "gpt": {**params["gpt"], "h": blocks}}
