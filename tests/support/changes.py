"""Random inputs, and changes of parameters that a comparison with torch must notice."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from tests.support.parity import Change, Tree


def noise(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def edited(path: str, edit: Callable[[np.ndarray], np.ndarray]) -> Change:
    """A change of the one parameter at `path`."""

    def change(params: Tree) -> Tree:
        name, _, rest = path.partition("/")
        return params | {name: edited(rest, edit)(params[name]) if rest else edit(params[name])}

    return change


def swapped(first: str, second: str) -> Change:
    return lambda params: params | {first: params[second], second: params[first]}


def transposed(path: str) -> Change:
    """Swaps the last two axes of a square matrix: no shape check could see it."""
    return edited(path, lambda w: w.swapaxes(-1, -2))


def un_interleaved(w: np.ndarray) -> np.ndarray:
    """q, k, v of each of four heads in turn -> all q, all k, all v."""
    parts = w.reshape(*w.shape[:-1], 4, 3, -1)
    return parts.swapaxes(-3, -2).reshape(w.shape)
