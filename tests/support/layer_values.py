"""What each layer of a torch model computes, and the same from its Flax leaves in plain numpy.

It shares nothing with the conversion tables, so it shows what is wrong in them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.support.torch_reference import DiscreteVAE
from tests.support.torch_reference.dvae import Codebook

TOLERANCE = 1e-5  # of max|a - b| / max|b|


def layer_outputs(model: nn.Module) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray]]]:
    """What each layer makes of a random input, in our layout: (b, t, channels)."""
    generator = torch.Generator().manual_seed(5)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Embedding):
            x = torch.arange(layer.num_embeddings)
            yield name, (x.numpy(), layer(x).detach().numpy())
        elif isinstance(layer, nn.Conv1d | nn.GroupNorm):
            width = layer.in_channels if isinstance(layer, nn.Conv1d) else layer.num_channels
            x = torch.randn(2, width, 8, generator=generator)
            yield name, (x.mT.numpy(), layer(x).mT.detach().numpy())
        elif isinstance(layer, nn.Linear | nn.LayerNorm | Conv1D):
            width = layer.weight.shape[0] if isinstance(layer, Conv1D) else layer.weight.shape[-1]
            x = torch.randn(2, 8, width, generator=generator)
            yield name, (x.numpy(), layer(x).detach().numpy())


def ours(model: nn.Module, name: str, layer: nn.Module, leaf: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """The same from the Flax leaves of the layer, in plain numpy."""
    if isinstance(layer, nn.Embedding):
        return leaf["embedding"][x]
    if isinstance(layer, nn.LayerNorm | nn.GroupNorm):
        groups = layer.num_groups if isinstance(layer, nn.GroupNorm) else None
        torch_x = torch.from_numpy(x)
        normed = F.group_norm(torch_x.mT, groups).mT if groups else F.layer_norm(torch_x, x.shape[-1:])
        return normed.numpy() * leaf["scale"] + leaf["bias"]
    kernel = leaf["kernel"]
    if kernel.ndim == 2:
        return x @ kernel + leaf["bias"]
    assert isinstance(layer, nn.Conv1d)
    pad, stride, taps = layer.padding[0], layer.stride[0], kernel.shape[0]
    padded = np.pad(x, ((0, 0), (pad, pad), (0, 0)))
    frames = range(0, padded.shape[1] - taps + 1, stride)
    return np.stack([sum(padded[:, t + k] @ kernel[k] for k in range(taps)) + leaf["bias"] for t in frames], axis=1)


def leaves_of(params: dict[str, Any], name: str, model: nn.Module) -> dict[str, np.ndarray]:
    """The Flax leaves that stand for a torch layer: by rules of their own, not by the table."""
    parts = name.split(".")
    if isinstance(model, DiscreteVAE):
        kind = "res" if "net" in parts else "point" if len(parts) == 2 else "conv"
        node = params[parts[0]][f"{kind}_{parts[1]}"]
        return node[f"net_{parts[3]}"] if kind == "res" else node
    node = params
    for part in parts:
        node = node if part.isdigit() or part == "emb" else node[part]
    number = [int(part) for part in parts if part.isdigit()]
    return {key: value[number[0]] if number else value for key, value in node.items()}


def check_values(
    model: nn.Module, params: dict[str, Any], outputs: dict[str, tuple[np.ndarray, np.ndarray]] | None = None
) -> None:
    """Fails unless every layer of the torch model computes the same from its Flax leaves."""
    for name, (x, want) in (outputs or dict(layer_outputs(model))).items():
        got = ours(model, name, model.get_submodule(name), leaves_of(params, name, model), x)
        assert np.abs(got - want).max() <= TOLERANCE * np.abs(want).max(), name
    if isinstance(model, DiscreteVAE):
        check_codebook(model.codebook, params["codebook"])


def check_codebook(book: Codebook, params: dict[str, np.ndarray]) -> None:
    x = torch.randn(40, book.embed.shape[0], generator=torch.Generator().manual_seed(6))
    distance = (params["embed"] ** 2).sum(0) - 2 * x.numpy() @ params["embed"]
    assert (distance.argmin(1) == book.codes(x).numpy()).all()
    after = Codebook(*book.embed.shape)
    after.load_state_dict({key: torch.from_numpy(np.array(value)) for key, value in params.items()})
    codes = book.codes(x)
    before = Codebook(*book.embed.shape)
    before.load_state_dict(book.state_dict())
    before.update(x, codes)
    after.update(x, codes)
    assert torch.equal(before.embed, after.embed)
