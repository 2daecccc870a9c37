"""How results are compared with torch's: error measure, tolerances, torch's weights and gradients as Flax trees.

Every comparison of the suite goes through `assert_close` or `assert_trees_close`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import torch
from flax.traverse_util import flatten_dict, unflatten_dict

from convert.mapping import Row, match, plan, to_flax
from convert.source import expected_shapes
from convert.tables import MODELS, dvae, unified_voice
from tests.support.torch_reference import UnifiedVoice as TorchUnifiedVoice
from tortoise_jax.checkpoints.parts import Part, in_collections
from tortoise_jax.models.dvae import DVAEConfig
from tortoise_jax.models.unified_voice import UnifiedVoiceConfig

Tree = dict[str, Any]
Change = Callable[[Tree], Tree]

# Tolerances, defined nowhere else. Of max|a - b| / max|b| for each array:
MODULE = 1e-5  # one module, values and gradients
STACK = 1e-4  # the whole model: logits, losses, gradients; weights after training
# Of max|a - b|:
MEL_ABSOLUTE = 1e-4  # a log-mel
ZERO_GRADIENT = 1e-5  # arrays whose true gradient is zero: all there is to see is rounding (others are around 1)


def error(got: Any, want: Any) -> float:
    """max|got - want| / max|want|, the error measure; NaN where either is not finite."""
    got, want = array(got), array(want)
    assert got.shape == want.shape, f"shape {got.shape}, expected {want.shape}"
    assert np.any(want), "expected values are all zero: nothing to be relative to"
    return float(np.max(np.abs(got - want)) / np.max(np.abs(want)))


def absolute_error(got: Any, want: Any) -> float:
    got, want = array(got), array(want)
    assert got.shape == want.shape, f"shape {got.shape}, expected {want.shape}"
    return float(np.max(np.abs(got - want)))


def array(value: Any) -> np.ndarray:
    """Anything array-like (a tensor too) as float64, so that the comparison itself rounds nothing."""
    return np.asarray(value.detach() if isinstance(value, torch.Tensor) else value).astype(np.float64)


def assert_close(got: Any, want: Any, tolerance: float, name: str = "", measure: Any = error) -> None:
    found = measure(got, want)
    assert found <= tolerance, f"{name or 'error'}: {found:.2e} > {tolerance:.0e}"


def assert_trees_close(got: Tree, want: Tree, tolerance: float, heads: int) -> None:
    """Compares each array of two trees of parameters or gradients; key biases in absolute terms."""
    (got_rest, got_keys), (want_rest, want_keys) = apart(got, heads), apart(want, heads)
    assert got_rest.keys() == want_rest.keys()
    for path, value in want_rest.items():
        assert_close(got_rest[path], value, tolerance, path)
    for path, value in want_keys.items():
        assert_close(got_keys[path], value, ZERO_GRADIENT, f"{path} (keys)", absolute_error)


def apart(tree: Tree, heads: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Arrays by path without key biases, and the key biases.

    A constant added to every key shifts all scores of a query alike, which the softmax takes out again: the gradient
    is zero. GPT-2's fused bias is [q | k | v]; the conditioning encoder's is q, k, v of each head in turn.
    """
    rest, keys = {}, {}
    for path, value in flatten_dict(tree, sep="/").items():
        parts = array(value)
        if path.endswith("c_attn/bias"):
            parts = parts.reshape(*parts.shape[:-1], 1, 3, -1)
        elif path.endswith("qkv/bias"):
            parts = parts.reshape(*parts.shape[:-1], heads, 3, -1)
        else:
            rest[path] = parts
            continue
        keys[path] = parts[..., 1, :]
        rest[path] = parts[..., [0, 2], :]
    return rest, keys


# Torch's weights and gradients as Flax trees


@dataclasses.dataclass(frozen=True)
class Twin:
    """A torch model's dimensions and weights on our side. params: all collections as one tree, as on disk."""

    config: Any
    params: Tree

    @property
    def heads(self) -> int:
        return self.config.heads

    @property
    def variables(self) -> Tree:
        return in_collections(self.config, self.params)

    @property
    def part(self) -> Part:
        return Part.of_tree(self.config, self.params)


def shapes_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def voice_twin(model: TorchUnifiedVoice, heads: int = 4) -> Twin:
    config = unified_voice.config_of(shapes_of(model), "the torch model", heads)
    return Twin(config, voice_tree(config, model.state_dict()))


def dvae_twin(model: torch.nn.Module) -> Twin:
    config = dvae.config_of(shapes_of(model), "the torch model")
    return Twin(config, dvae_tree(config, model.state_dict()))


def twin_of(part: str, model: torch.nn.Module) -> Twin:
    """Any model that needs no number beside its tensors."""
    config = MODELS[part].config(shapes_of(model), "the torch model", None)
    return Twin(config, tree_of(part, config, model.state_dict()))


def tree_of(part: str, config: Any, named: Mapping[str, torch.Tensor]) -> Tree:
    """Tensors under a model's key names (weights or gradients) -> a Flax tree."""
    return _tree(MODELS[part].table, config, named)


def voice_tree(config: UnifiedVoiceConfig, named: Mapping[str, torch.Tensor]) -> Tree:
    """Tensors under UnifiedVoice's key names (weights or gradients) -> a Flax tree."""
    return _tree(unified_voice.TABLE, config, named)


def dvae_tree(config: DVAEConfig, named: Mapping[str, torch.Tensor]) -> Tree:
    return _tree(dvae.TABLE, config, named)


def _tree(table: list[Row], config: Any, named: Mapping[str, torch.Tensor]) -> Tree:
    state = {key: numpy(tensor) for key, tensor in named.items()}
    shapes = {key: array.shape for key, array in state.items()}
    return to_flax(plan(table, shapes, expected_shapes(config), "torch"), state)


def numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().float().numpy()


def gradients_of(model: torch.nn.Module, total: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradient of `total` for each parameter, zeros where it has no part in it."""
    named = dict(model.named_parameters())
    found = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    pairs = zip(named.items(), found, strict=True)
    return {name: torch.zeros_like(p) if gradient is None else gradient for (name, p), gradient in pairs}


def with_gradients(function: Callable[..., jax.Array], weighting: Any, *arrays: Any) -> tuple[jax.Array, tuple]:
    """The function's value, and the gradients of a weighting of it for each argument, in one compiled program.

    Else each operation is a program of its own, and a thousand of them take half a minute to compile.
    """

    def both(weighting: jax.Array, *arrays: Any) -> tuple[jax.Array, tuple]:
        value, backward = jax.vjp(function, *arrays)
        return value, backward(weighting)

    return jax.jit(both)(weighting, *arrays)


# One module


def part_tree(table: list[Row], prefix: str, named: Mapping[str, torch.Tensor]) -> Tree:
    """Tensors of one torch submodule -> the tree of its Flax counterpart, without the path that leads there.

    prefix: where the submodule stands, as the table names it: "gpt.h.0", "encoder.2", "text_head".
    """
    flat = {}
    for key, tensor in named.items():
        found = match(table, f"{prefix}.{key}")
        flat[found.row.flax.replace("{i}", str(found.layer))] = found.row.operation.to_flax(numpy(tensor))
    depth = len(_common([path.split("/")[:-1] for path in flat]))
    return unflatten_dict({"/".join(path.split("/")[depth:]): value for path, value in flat.items()}, sep="/")


def _common(paths: list[list[str]]) -> list[str]:
    return [names[0] for names in zip(*paths, strict=False) if len(set(names)) == 1]


def assert_module_parity(
    module: torch.nn.Module,
    table: list[Row],
    prefix: str,
    apply: Callable[[Tree, jax.Array], jax.Array],
    x: torch.Tensor,
    *,
    channels_first: bool,
    heads: int = 1,
    change: Change = lambda params: params,
    **arguments: torch.Tensor,
) -> None:
    """Output of x, and the gradients of a random weighting of it for x and for each parameter, within MODULE.

    apply(params, x) -> y is ours; channels_first: torch's x and y are (b, c, t), ours (b, t, c). change: applied to
    our parameters, to see the comparison fail. arguments: what else torch's module takes.
    """
    module = copy.deepcopy(module).requires_grad_(True)
    x = x.clone().requires_grad_()
    y = module(x, **arguments)
    weighting = torch.randn(y.shape, generator=torch.Generator().manual_seed(99))
    total = (y * weighting).sum()
    want_x = torch.autograd.grad(total, x, retain_graph=True)[0]
    want_params = part_tree(table, prefix, gradients_of(module, total))

    ours = (lambda t: numpy(t).swapaxes(1, 2)) if channels_first else numpy
    params = change(part_tree(table, prefix, module.state_dict()))
    got, (got_params, got_x) = with_gradients(apply, ours(weighting), params, ours(x))
    assert_close(got, ours(y), MODULE, "output")
    assert_close(got_x, ours(want_x), MODULE, "gradient of the input")
    assert_trees_close(got_params, want_params, MODULE, heads)
