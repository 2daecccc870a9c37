"""torch names <-> Flax paths: one ordered table for both directions, dimensions from shapes, no torch needed.

A row maps a torch key to a Flax path by an operation that has an inverse. `{i}` in a key counts layers; a path that has
`{i}` too keeps them apart, one that has not stacks them on a new first axis. Rows that drop a key say why; a row that
drops a copy names the key it must equal. A key that no row matches, a path filled twice or not at all, a shape that
does not fit, a copy that differs: each is a UserError that names it.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from tortoise_jax.errors import UserError, did_you_mean
from tortoise_jax.models.dvae import DVAEConfig
from tortoise_jax.models.unified_voice import UnifiedVoiceConfig

StateDict = Mapping[str, np.ndarray]
Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
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
    """torch: a key, with `{i}` for a layer's number or a last `*` for any ending. flax: its path; empty: dropped."""

    torch: str
    flax: str = ""
    operation: Operation = SAME
    reason: str = ""  # why it is dropped
    copy_of: str = ""  # the key it must equal to be dropped, `*` standing for the same ending

    @functools.cached_property
    def pattern(self) -> re.Pattern[str]:
        return re.compile(re.escape(self.torch).replace(r"\{i\}", r"(?P<i>0|[1-9]\d*)").replace(r"\*", r"(?P<rest>.+)"))

    @functools.cached_property
    def flax_pattern(self) -> re.Pattern[str]:
        return re.compile(re.escape(self.flax).replace(r"\{i\}", r"(\d+)"))

    @property
    def stacked(self) -> bool:
        return "{i}" in self.torch and "{i}" not in self.flax

    def key(self, index: int) -> str:
        return self.torch.replace("{i}", str(index))


def _norm(torch: str, flax: str) -> list[Row]:
    return [Row(f"{torch}.weight", f"{flax}/scale"), Row(f"{torch}.bias", f"{flax}/bias")]


def _weights(torch: str, flax: str, operation: Operation) -> list[Row]:
    return [Row(f"{torch}.weight", f"{flax}/kernel", operation), Row(f"{torch}.bias", f"{flax}/bias")]


MASK = "causal masks, constants that transformers before 4.30 saved"
ATTACHED = "copies that TorToiSe's inference model shares with the model, equal to it bit for bit"
SOLO = "solo embeddings, of text-only and speech-only training; neither fine-tuning nor synthesis reads them"
ALIGNMENT = "alignment heads of DL-Art-School's unified_voice3 and 4; neither fine-tuning nor synthesis reads them"
STATISTICS = "statistics of the discretization loss, kept by XTTS's training; encoding and decoding do not read them"

# GPT-2's Conv1D already stores (in, out): SAME. Everything else torch stores as (out, in).
UNIFIED_VOICE: list[Row] = [
    Row("mel_solo_embedding", reason=SOLO),
    Row("text_solo_embedding", reason=SOLO),
    *_weights("conditioning_encoder.init", "conditioning_encoder/init", POINTWISE),
    *_norm("conditioning_encoder.attn.{i}.norm", "conditioning_encoder/attn/norm"),
    *_weights("conditioning_encoder.attn.{i}.qkv", "conditioning_encoder/attn/qkv", POINTWISE),
    *_weights("conditioning_encoder.attn.{i}.proj_out", "conditioning_encoder/attn/proj_out", POINTWISE),
    Row("text_embedding.weight", "text_embedding/embedding"),
    Row("mel_embedding.weight", "mel_embedding/embedding"),
    *_norm("gpt.h.{i}.ln_1", "gpt/h/ln_1"),
    Row("gpt.h.{i}.attn.bias", reason=MASK),
    Row("gpt.h.{i}.attn.masked_bias", reason=MASK),
    *_weights("gpt.h.{i}.attn.c_attn", "gpt/h/attn/c_attn", SAME),
    *_weights("gpt.h.{i}.attn.c_proj", "gpt/h/attn/c_proj", SAME),
    *_norm("gpt.h.{i}.ln_2", "gpt/h/ln_2"),
    *_weights("gpt.h.{i}.mlp.c_fc", "gpt/h/mlp/c_fc", SAME),
    *_weights("gpt.h.{i}.mlp.c_proj", "gpt/h/mlp/c_proj", SAME),
    *_norm("gpt.ln_f", "gpt/ln_f"),
    Row("gpt.wte.weight", reason=ATTACHED, copy_of="mel_embedding.weight"),
    Row("mel_pos_embedding.emb.weight", "mel_pos_embedding/embedding"),
    Row("text_pos_embedding.emb.weight", "text_pos_embedding/embedding"),
    *_norm("final_norm", "final_norm"),
    *_weights("text_head", "text_head", LINEAR),
    *_weights("mel_head", "mel_head", LINEAR),
    Row("aligned_head.*", reason=ALIGNMENT),
    Row("alignment_head.*", reason=ALIGNMENT),
    Row("inference_model.transformer.*", reason=ATTACHED, copy_of="gpt.*"),
    Row("inference_model.embeddings.*", reason=ATTACHED, copy_of="mel_embedding.*"),
    Row("inference_model.text_pos_embedding.*", reason=ATTACHED, copy_of="mel_pos_embedding.*"),
    Row("inference_model.final_norm.*", reason=ATTACHED, copy_of="final_norm.*"),
    Row("inference_model.lm_head.0.*", reason=ATTACHED, copy_of="final_norm.*"),
    Row("inference_model.lm_head.1.*", reason=ATTACHED, copy_of="mel_head.*"),
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
    Row("discrete_loss.*", reason=STATISTICS),
]


@dataclasses.dataclass(frozen=True)
class Match:
    row: Row
    place: int  # of the row in its table
    index: int  # the layer the key names, 0 where it names none
    original: str  # of a copy: the key it repeats


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where every torch key goes: each is in exactly one of the two, and each Flax path is filled exactly once."""

    filled: dict[str, tuple[Row, tuple[str, ...]]]  # Flax path -> its row and its torch keys, one a layer
    dropped: dict[str, Match]


@dataclasses.dataclass(frozen=True)
class Conversion:
    params: Tree
    dropped: dict[str, str]  # torch key -> reason


# --- torch to Flax ----------------------------------------------------------------------------------------------------


def match(table: Iterable[Row], key: str) -> Match:
    """The first row whose pattern is the whole key. UserError if there is none."""
    for place, row in enumerate(table):
        found = row.pattern.fullmatch(key)
        if found:
            groups = found.groupdict()
            return Match(row, place, int(groups.get("i", 0)), row.copy_of.replace("*", groups.get("rest", "*")))
    raise UserError(f'key "{key}" belongs to no known part of the model{did_you_mean(key, (r.torch for r in table))}')


def plan(table: list[Row], shapes: Shapes, expected: Shapes, where: str) -> Plan:
    """Decides by names and shapes alone where every key of a file goes; UserError naming `where` and the key.

    expected: every Flax path with its shape, the stacked axis included.
    """
    layers: dict[str, dict[int, str]] = {}
    rows: dict[str, Row] = {}
    dropped: dict[str, Match] = {}
    for key, shape in shapes.items():
        try:
            found = match(table, key)
        except UserError as error:
            raise UserError(f"{where}: {error}; nothing was converted") from None
        row, index = found.row, found.index
        if not row.flax:
            if found.original and shapes.get(found.original) != shape:
                raise UserError(f"{where}: {key} should repeat {found.original}, which {_describe(shapes, found)}")
            dropped[key] = found
            continue
        path = row.flax.replace("{i}", str(index))
        if path not in expected or (row.stacked and index >= expected[path][0]):
            raise UserError(f"{where}: {key} is one more than the other keys of this model leave room for")
        _check_shape(key, shape, row, expected[path][1:] if row.stacked else expected[path], where)
        parts = layers.setdefault(path, {})
        part = index if row.stacked else 0
        if part in parts:
            raise UserError(f"{where}: {key} and {parts[part]} are the same parameter")
        parts[part], rows[path] = key, row
    filled: dict[str, tuple[Row, tuple[str, ...]]] = {}
    for path, shape in expected.items():
        _, row, index = _row_of(table, path)
        numbers = range(shape[0]) if row.stacked else (index,)
        parts = layers.get(path, {})
        missing = [n for n in numbers if (n if row.stacked else 0) not in parts]
        if missing:
            raise UserError(f"{where}: key {row.key(missing[0])} is missing; nothing was converted")
        filled[path] = row, tuple(parts[part] for part in sorted(parts))
    return Plan(filled, dropped)


def _describe(shapes: Shapes, found: Match) -> str:
    original = shapes.get(found.original)
    return "is missing" if original is None else f"has another shape, {original}"


def _check_shape(key: str, shape: Shape, row: Row, want: Shape, where: str) -> None:
    if row.operation.rank not in (None, len(shape)):
        raise UserError(f"{where}: {key} has shape {shape}, expected {row.operation.rank} axes")
    # Zero-stride stand-ins: an operation shows what it does to a shape without memory of that size.
    blank = lambda size: np.broadcast_to(np.False_, size)
    torch_shape = row.operation.to_torch(blank(want)).shape
    if shape != torch_shape:
        raise UserError(f"{where}: {key} has shape {shape}, the rest of the file asks for {torch_shape}")


def to_flax(
    table: list[Row],
    state: StateDict,
    expected: Shapes,
    where: str,
    each: Callable[[str, np.ndarray], None] = lambda key, tensor: None,
) -> Conversion:
    """A torch state dict -> nested dict of float32 arrays of their own, and what was dropped with the reason.

    expected: every Flax path with its shape. where: names the file in errors. each: called with every key and tensor
    that is converted, as it is read.
    """
    planned = plan(table, {key: tensor.shape for key, tensor in state.items()}, expected, where)
    check_copies(planned, state, where)
    flat: dict[str, np.ndarray] = {}
    for path, (row, keys) in planned.filled.items():
        flat[path] = np.empty(expected[path], np.float32)
        for key, place in zip(keys, flat[path] if row.stacked else [flat[path]], strict=True):
            each(key, state[key])
            place[...] = row.operation.to_flax(state[key])
    return Conversion(nest(flat), {key: found.row.reason for key, found in planned.dropped.items()})


def check_copies(planned: Plan, state: StateDict, where: str) -> None:
    """Every dropped copy must equal its original bit for bit: UserError, since nobody can tell which one is meant."""
    for key, found in planned.dropped.items():
        if found.original and not same_bits(state[key], state[found.original]):
            raise UserError(
                f"{where}: {key} differs from {found.original}, of which it should be a copy; the file was changed "
                f"after it was saved, and which of the two is meant cannot be told. Remove the keys that begin with "
                f"{key.split('.')[0]}. (or the canonical ones) and convert again"
            )


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal in dtype, shape and bytes: NaN equals itself, -0.0 is not 0.0."""
    as_bytes = lambda array: np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(as_bytes(a), as_bytes(b))


# --- Flax to torch ----------------------------------------------------------------------------------------------------


def to_torch(table: list[Row], params: Tree) -> dict[str, np.ndarray]:
    """The inverse of `to_flax`: every torch key the table maps, in upstream's order, as contiguous arrays."""
    state: dict[str, np.ndarray] = {}
    for path, value in flatten(params).items():
        _, row, index = _row_of(table, path)
        for i, layer in enumerate(value) if row.stacked else [(index, value)]:
            state[row.key(i)] = np.ascontiguousarray(row.operation.to_torch(layer))
    return in_upstream_order(table, state)


def in_upstream_order(table: list[Row], state: StateDict) -> dict[str, np.ndarray]:
    """The same entries in the table's order, where rows that count the same layers are written layer by layer."""
    blocks = _blocks(table)

    def place(key: str) -> tuple[int, int, int]:
        found = match(table, key)
        return blocks[found.place], found.index, found.place

    return {key: state[key] for key in sorted(state, key=place)}


def _blocks(table: list[Row]) -> list[int]:
    """A number for each row, the same for neighbours that count the same layers."""
    numbers: list[int] = []
    for place, row in enumerate(table):
        stem = row.torch.split("{i}")[0]
        same = place > 0 and "{i}" in row.torch and table[place - 1].torch.split("{i}")[0] == stem
        numbers.append(numbers[-1] if same else place)
    return numbers


def _row_of(table: list[Row], path: str) -> tuple[int, Row, int]:
    """The row that fills a Flax path, its place in the table, and the index in the path (0 where there is none)."""
    for place, row in enumerate(table):
        found = row.flax_pattern.fullmatch(path) if row.flax else None
        if found:
            return place, row, int(found.group(1)) if found.groups() else 0
    raise UserError(f"parameter {path} has no place in a torch file")


# --- trees ------------------------------------------------------------------------------------------------------------


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


# --- dimensions from shapes -------------------------------------------------------------------------------------------


def _shape(shapes: Shapes, key: str, rank: int, where: str) -> Shape:
    if key not in shapes:
        raise UserError(f"{where}: key {key} is missing; nothing was converted")
    if len(shapes[key]) != rank or 0 in shapes[key]:
        raise UserError(f"{where}: {key} has shape {shapes[key]}, expected {rank} axes, none of them 0")
    return shapes[key]


def _layers(shapes: Shapes, block: str, key: str, where: str, first: int = 0, at_least: int = 1) -> int:
    """How many blocks of keys there are, numbered from `first` without a gap; fewer than `at_least` keys are no block.

    block: the beginning of their keys, with `{i}`. key: which one to name where a whole block is missing.
    """
    pattern = re.compile(re.escape(block).replace(r"\{i\}", r"(0|[1-9]\d*)"))
    keys = collections.Counter(int(found.group(1)) for name in shapes if (found := pattern.match(name)))
    numbers = {number for number, count in keys.items() if count >= at_least}
    for number in range(first, first + len(numbers)):
        if number not in numbers:
            raise UserError(f"{where}: key {block.replace('{i}', str(number))}{key} is missing; nothing was converted")
    return len(numbers)


def unified_voice_config(shapes: Shapes, where: str, heads: int | None = None) -> UnifiedVoiceConfig:
    """Dimensions of a UnifiedVoice from its tensors. heads: None assumes width / 64, as in every released model."""
    text_tokens, width = _shape(shapes, "text_embedding.weight", 2, where)
    mel_tokens = _shape(shapes, "mel_embedding.weight", 2, where)[0]
    text_positions = _shape(shapes, "text_pos_embedding.emb.weight", 2, where)[0]
    mel_positions = _shape(shapes, "mel_pos_embedding.emb.weight", 2, where)[0]
    layers = _layers(shapes, "gpt.h.{i}.", "ln_1.weight", where, at_least=2)
    conditioning_layers = _layers(shapes, "conditioning_encoder.attn.{i}.", "norm.weight", where, at_least=2)
    if not layers:
        raise UserError(f"{where}: key gpt.h.0.ln_1.weight is missing; nothing was converted")
    if min(mel_tokens, text_tokens) < 3 or min(text_positions, mel_positions) < 3:
        raise UserError(
            f"{where}: tables of {text_tokens} text tokens and {mel_tokens} codes, {text_positions} and "
            f"{mel_positions} positions are too small for a start, a stop and anything between them"
        )
    if heads is None:
        if width < 512:
            raise UserError(
                f"{where}: width {width} is below every released model's, where heads = width / 64 holds; "
                "say the number of heads: --heads N"
            )
        heads = width // 64
    if heads < 1 or width % heads:
        raise UserError(f"{where}: {heads} heads do not divide the width {width} (text_embedding.weight); --heads N")
    return UnifiedVoiceConfig(
        layers=layers,
        width=width,
        heads=heads,
        text_tokens=text_tokens,
        mel_tokens=mel_tokens,
        text_positions=text_positions,
        mel_positions=mel_positions,
        conditioning_layers=conditioning_layers,
        mel_channels=_shape(shapes, "conditioning_encoder.init.weight", 3, where)[1],
    )


def dvae_config(shapes: Shapes, where: str) -> DVAEConfig:
    """Dimensions of a dVAE from its tensors; the codebook's width is what `codebook.embed` says, no config."""
    for pattern, rank, what in UNSUPPORTED_DVAE:
        found = [key for key, shape in shapes.items() if re.fullmatch(pattern, key) and len(shape) in rank]
        if found:
            raise UserError(f"{where}: this dVAE {what} ({found[0]}), which no released model has; not supported")
    codebook_dim, codes = _shape(shapes, "codebook.embed", 2, where)
    hidden, channels, kernel = _shape(shapes, "encoder.0.0.weight", 3, where)
    layers = _layers(shapes, "encoder.{i}.0.", "weight", where)
    return DVAEConfig(
        codebook_dim=codebook_dim,
        codes=codes,
        hidden=hidden,
        layers=layers,
        res_blocks=_layers(shapes, "encoder.{i}.net.", "0.weight", where, first=layers),
        channels=channels,
        kernel=kernel,
    )


# (key, axes, what it shows)
UNSUPPORTED_DVAE: list[tuple[str, range, str]] = [
    (r"decoder\.\d+\.0\.(weight|bias)", range(1, 9), "upsamples by transposed convolutions"),
    (
        r"codebook\.(weight|codebooks.*|layers.*)|quantizer\..*",
        range(9),
        "has a learned quantizer, no EMA codebook",
    ),
    (r"encoder\.\d+\.weight", range(1, 2), "normalises its encoder"),
    (r"encoder\.0\.0\.weight", range(4, 5), "works on images"),
]
