"""torch names <-> Flax paths: one ordered table for both directions, dimensions from shapes, no torch needed.

A row maps a torch key to a Flax path by an operation that has an inverse. `{i}` in a key counts layers; a path that has
`{i}` too keeps them apart, one that has not stacks them on a new first axis. Rows that drop a key say why. A key that no
row matches, a path filled twice or not at all, a shape that does not fit: each is a UserError that names it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from tortoise_jax.dvae import DVAEConfig
from tortoise_jax.errors import UserError, did_you_mean
from tortoise_jax.unified_voice import UnifiedVoiceConfig

StateDict = Mapping[str, np.ndarray]
Shapes = Mapping[str, tuple[int, ...]]
Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Operation:
    """What a tensor goes through on its way to Flax, and back. Both are views: nothing is computed."""

    to_flax: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]
    rank: int | None  # of the torch tensor; None: any


SAME = Operation(lambda w: w, lambda w: w, None)
LINEAR = Operation(lambda w: w.T, lambda w: w.T, 2)  # (out, in) <-> (in, out)
POINTWISE = Operation(lambda w: w[:, :, 0].T, lambda w: w.T[:, :, None], 3)  # (out, in, 1) <-> (in, out)
CONV = Operation(lambda w: w.transpose(2, 1, 0), lambda w: w.transpose(2, 1, 0), 3)  # (out, in, k) <-> (k, in, out)


@dataclasses.dataclass(frozen=True)
class Row:
    torch: str
    flax: str = ""  # empty: dropped
    operation: Operation = SAME
    reason: str = ""  # why it is dropped

    @property
    def pattern(self) -> re.Pattern[str]:
        return re.compile(re.escape(self.torch).replace(r"\{i\}", r"(\d+)").replace(r"\*", r".+"))

    @property
    def stacked(self) -> bool:
        return "{i}" in self.torch and "{i}" not in self.flax


def _norm(torch: str, flax: str) -> list[Row]:
    return [Row(f"{torch}.weight", f"{flax}/scale"), Row(f"{torch}.bias", f"{flax}/bias")]


def _weights(torch: str, flax: str, operation: Operation) -> list[Row]:
    return [Row(f"{torch}.weight", f"{flax}/kernel", operation), Row(f"{torch}.bias", f"{flax}/bias")]


# GPT-2's Conv1D already stores (in, out): SAME. Everything else torch stores as (out, in).
UNIFIED_VOICE: list[Row] = [
    *_weights("conditioning_encoder.init", "conditioning_encoder/init", POINTWISE),
    *_norm("conditioning_encoder.attn.{i}.norm", "conditioning_encoder/attn/norm"),
    *_weights("conditioning_encoder.attn.{i}.qkv", "conditioning_encoder/attn/qkv", POINTWISE),
    *_weights("conditioning_encoder.attn.{i}.proj_out", "conditioning_encoder/attn/proj_out", POINTWISE),
    Row("text_embedding.weight", "text_embedding/embedding"),
    Row("mel_embedding.weight", "mel_embedding/embedding"),
    *_norm("gpt.h.{i}.ln_1", "gpt/h/ln_1"),
    *_weights("gpt.h.{i}.attn.c_attn", "gpt/h/attn/c_attn", SAME),
    *_weights("gpt.h.{i}.attn.c_proj", "gpt/h/attn/c_proj", SAME),
    *_norm("gpt.h.{i}.ln_2", "gpt/h/ln_2"),
    *_weights("gpt.h.{i}.mlp.c_fc", "gpt/h/mlp/c_fc", SAME),
    *_weights("gpt.h.{i}.mlp.c_proj", "gpt/h/mlp/c_proj", SAME),
    *_norm("gpt.ln_f", "gpt/ln_f"),
    Row("mel_pos_embedding.emb.weight", "mel_pos_embedding/embedding"),
    Row("text_pos_embedding.emb.weight", "text_pos_embedding/embedding"),
    *_norm("final_norm", "final_norm"),
    *_weights("text_head", "text_head", LINEAR),
    *_weights("mel_head", "mel_head", LINEAR),
    Row("gpt.h.{i}.attn.bias", reason="causal mask, a constant that transformers before 4.30 saved"),
    Row("gpt.h.{i}.attn.masked_bias", reason="causal mask, a constant that transformers before 4.30 saved"),
]

# The index in a dVAE key depends on the numbers of layers and residual blocks, so Flax keeps torch's index:
# conv_N is a strided or upsampling convolution, res_N a residual block, point_N a 1x1 convolution.
DVAE: list[Row] = [
    *_weights("encoder.{i}.0", "encoder/conv_{i}", CONV),
    *(row for n in (0, 2, 4) for row in _weights(f"encoder.{{i}}.net.{n}", f"encoder/res_{{i}}/net_{n}", CONV)),
    *_weights("encoder.{i}", "encoder/point_{i}", CONV),
    *_weights("decoder.{i}.0.conv", "decoder/conv_{i}", CONV),
    *(row for n in (0, 2, 4) for row in _weights(f"decoder.{{i}}.net.{n}", f"decoder/res_{{i}}/net_{n}", CONV)),
    *_weights("decoder.{i}", "decoder/point_{i}", CONV),
    Row("codebook.embed", "codebook/embed"),
    Row("codebook.cluster_size", "codebook/cluster_size"),
    Row("codebook.embed_avg", "codebook/embed_avg"),
]


@dataclasses.dataclass(frozen=True)
class Conversion:
    params: Tree
    dropped: dict[str, str]  # torch key -> reason


def match(table: Iterable[Row], key: str) -> tuple[Row, int | None]:
    """The first row whose pattern is the whole key, and the layer it names."""
    for row in table:
        found = row.pattern.fullmatch(key)
        if found:
            return row, int(found.group(1)) if found.groups() else None
    raise UserError(f'key "{key}" belongs to no known part of the model{did_you_mean(key, (r.torch for r in table))}')


def to_flax(table: list[Row], state: StateDict, expected: Mapping[str, tuple[int, ...]], where: str) -> Conversion:
    """A torch state dict -> nested dict of float32 arrays, and what was dropped with the reason.

    expected: every Flax path with its shape (stacked axes included), as `flax_shapes` gives it. where: names the file.
    """
    layers: dict[str, dict[int, np.ndarray]] = {}
    flat: dict[str, np.ndarray] = {}
    sources: dict[str, str] = {}
    dropped: dict[str, str] = {}
    for key, tensor in state.items():
        try:
            row, index = match(table, key)
        except UserError as error:
            raise UserError(f"{where}: {error}; nothing was converted") from None
        if not row.flax:
            dropped[key] = row.reason
            continue
        if row.operation.rank not in (None, tensor.ndim):
            raise UserError(f"{where}: {key} has {tensor.ndim} axes, expected {row.operation.rank}")
        value = row.operation.to_flax(tensor)
        path = row.flax.replace("{i}", str(index))
        want = expected.get(path, ())[1:] if row.stacked else expected.get(path)
        if path not in expected or (row.stacked and index is not None and index >= expected[path][0]):
            raise UserError(f"{where}: {key} is one more than the other keys of this model leave room for")
        if value.shape != want:
            back = row.operation.to_torch(np.empty(want, np.bool_)).shape
            raise UserError(f"{where}: {key} has shape {tensor.shape}, the rest of the file asks for {back}")
        if row.stacked:
            assert index is not None
            layers.setdefault(path, {})[index] = value
        elif path in flat:
            raise UserError(f"{where}: {key} and {sources[path]} are the same parameter")
        else:
            flat[path] = value
        sources[path] = key
    for path, parts in layers.items():
        missing = sorted(set(range(expected[path][0])) - parts.keys())
        if missing:
            key = re.sub(r"\.\d+\.", f".{missing[0]}.", sources[path], count=1)
            raise UserError(f"{where}: key {key} is missing")
        flat[path] = _stack([parts[i] for i in range(expected[path][0])])
    for path in expected:
        if path not in flat:
            raise UserError(f"{where}: {torch_key(table, path)} is missing")
    return Conversion(nest({path: _own(flat[path]) for path in expected}), dropped)


def _stack(parts: list[np.ndarray]) -> np.ndarray:
    stacked = np.empty((len(parts), *parts[0].shape), np.float32)
    for i, part in enumerate(parts):
        stacked[i] = part
    return stacked


def _own(array: np.ndarray) -> np.ndarray:
    """float32, contiguous, and not a view of a mapped file."""
    return array if array.flags.owndata and array.dtype == np.float32 else np.array(array, np.float32, order="C")


def to_torch(table: list[Row], params: Tree) -> dict[str, np.ndarray]:
    """The inverse of `to_flax`: every torch key the table maps, in upstream's order, as contiguous arrays."""
    state: dict[str, tuple[tuple[int, int, int], np.ndarray]] = {}
    blocks = _blocks(table)
    for path, value in flatten(params).items():
        place, row, index = _row_of(table, path)
        layers = enumerate(value) if row.stacked else [(index, value)]
        for i, layer in layers:
            state[row.torch.replace("{i}", str(i))] = ((blocks[place], i, place), row.operation.to_torch(layer))
    ordered = sorted(state.items(), key=lambda item: item[1][0])
    return {key: np.ascontiguousarray(value) for key, (_, value) in ordered}


def _blocks(table: list[Row]) -> list[int]:
    """A number for each row, the same for neighbours that count the same layers: those are written layer by layer."""
    numbers: list[int] = []
    for place, row in enumerate(table):
        stem = row.torch.split("{i}")[0]
        same = place > 0 and "{i}" in row.torch and table[place - 1].torch.split("{i}")[0] == stem
        numbers.append(numbers[-1] if same else place)
    return numbers


def _row_of(table: list[Row], path: str) -> tuple[int, Row, int]:
    """The row that fills a Flax path, its place in the table, and the index in the path (0 where there is none)."""
    for place, row in enumerate(table):
        found = re.fullmatch(re.escape(row.flax).replace(r"\{i\}", r"(\d+)"), path) if row.flax else None
        if found:
            return place, row, int(found.group(1)) if found.groups() else 0
    raise UserError(f"parameter {path} has no place in a torch file")


def torch_key(table: list[Row], path: str) -> str:
    """The torch key of a Flax path (of its first layer, where layers are stacked)."""
    _, row, index = _row_of(table, path)
    return row.torch.replace("{i}", str(index))


def flatten(tree: Tree, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}/") if isinstance(value, dict) else {prefix + name: value}
    return flat


def nest(flat: Mapping[str, Any]) -> Tree:
    tree: Tree = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def _shape(shapes: Shapes, key: str, rank: int, where: str) -> tuple[int, ...]:
    if key not in shapes:
        raise UserError(f"{where}: key {key} is missing")
    if len(shapes[key]) != rank:
        raise UserError(f"{where}: {key} has shape {shapes[key]}, expected {rank} axes")
    return shapes[key]


def _indices(shapes: Shapes, pattern: str) -> list[int]:
    return sorted({int(found.group(1)) for key in shapes if (found := re.fullmatch(pattern, key))})


def unified_voice_config(shapes: Shapes, where: str, heads: int | None = None) -> UnifiedVoiceConfig:
    """Dimensions of a UnifiedVoice from its tensors. heads: None assumes width / 64, as in every released model."""
    text_tokens, width = _shape(shapes, "text_embedding.weight", 2, where)
    layers = _indices(shapes, r"gpt\.h\.(\d+)\..+")
    if not layers:
        raise UserError(f"{where}: no GPT block (gpt.h.0.…): this is not an autoregressive TorToiSe checkpoint")
    if heads is None:
        if width < 512:
            raise UserError(f"{where}: width {width} is below every released model's; say the number of heads: --heads N")
        heads = width // 64
    if width % heads:
        raise UserError(f"{where}: {heads} heads do not divide the width {width} (text_embedding.weight)")
    return UnifiedVoiceConfig(
        layers=layers[-1] + 1,
        width=width,
        heads=heads,
        text_tokens=text_tokens,
        mel_tokens=_shape(shapes, "mel_embedding.weight", 2, where)[0],
        text_positions=_shape(shapes, "text_pos_embedding.emb.weight", 2, where)[0],
        mel_positions=_shape(shapes, "mel_pos_embedding.emb.weight", 2, where)[0],
        conditioning_layers=len(_indices(shapes, r"conditioning_encoder\.attn\.(\d+)\.norm\.weight")),
        mel_channels=_shape(shapes, "conditioning_encoder.init.weight", 3, where)[1],
    )


def dvae_config(shapes: Shapes, where: str) -> DVAEConfig:
    """Dimensions of a dVAE from its tensors; the codebook's width is what `codebook.embed` says, whatever configs say."""
    if any(re.match(r"decoder\.\d+\.0\.(weight|bias)$", key) for key in shapes):
        raise UserError(f"{where}: this dVAE upsamples by transposed convolutions (decoder.N.0.weight); not supported")
    if "codebook.weight" in shapes or any(key.startswith("codebook.codebooks") for key in shapes):
        raise UserError(f"{where}: this dVAE has a learned quantizer, not an EMA codebook; not supported")
    codebook_dim, codes = _shape(shapes, "codebook.embed", 2, where)
    hidden, channels, kernel = _shape(shapes, "encoder.0.0.weight", 3, where)
    return DVAEConfig(
        codebook_dim=codebook_dim,
        codes=codes,
        hidden=hidden,
        layers=len(_indices(shapes, r"encoder\.(\d+)\.0\.weight")),
        res_blocks=len(_indices(shapes, r"encoder\.(\d+)\.net\.0\.weight")),
        channels=channels,
        kernel=kernel,
    )
