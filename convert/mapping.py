"""The engine of conversion: torch keys <-> Flax paths by one ordered table for both directions. It needs no torch.

A row maps a torch key to a Flax path by an operation that has an inverse. `{i}` in a key is the number of a layer. A
path that also has `{i}` keeps the layers apart; a path that has none stacks them on a new first axis. A row that drops
a key says why; a row that drops a copy names the key that the copy must equal. Each of these is a UserError that names
the key: no row matches it; its path is filled twice or never; its shape does not fit; the copy differs.

The tables themselves are in `convert/tables/`, one file per model.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from tortoise_jax.errors import UserError, did_you_mean

StateDict = Mapping[str, np.ndarray]
Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Operation:
    """What happens to a tensor on its way to Flax, and the inverse. Both return views and compute nothing."""

    to_flax: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]
    rank: int | None  # of the torch tensor; None: any


SAME = Operation(lambda w: w, lambda w: w, None)
LINEAR = Operation(lambda w: w.T, lambda w: w.T, 2)  # (out, in) <-> (in, out)
POINTWISE = Operation(lambda w: w[:, :, 0].T, lambda w: w.T[:, :, None], 3)  # (out, in, 1) <-> (in, out)
CONV = Operation(lambda w: w.transpose(2, 1, 0), lambda w: w.transpose(2, 1, 0), 3)  # (out, in, k) <-> (k, in, out)
# A transposed convolution: (in, out, k) <-> (k, in, out)
CONV_TRANSPOSE = Operation(lambda w: w.transpose(2, 0, 1), lambda w: w.transpose(1, 2, 0), 3)
GAIN = Operation(lambda w: w[:, 0, 0], lambda w: w[:, None, None], 3)  # (c, 1, 1) <-> (c,), weight norm's


FROM_0 = (0, 1)  # all numbers


@dataclasses.dataclass(frozen=True)
class Row:
    """torch: a key, with `{i}` for the number of a layer or a `*` at its end for any ending. flax: "": dropped.

    numbers: where a module list holds layers of several kinds, which numbers are this row's: the first, and the step to
    the next.
    """

    torch: str
    flax: str = ""
    operation: Operation = SAME
    reason: str = ""  # why it is dropped
    copy_of: str = ""  # the key that it must equal to be dropped; `*` stands for the same ending
    numbers: tuple[int, int] = FROM_0

    @functools.cached_property
    def pattern(self) -> re.Pattern[str]:
        return re.compile(re.escape(self.torch).replace(r"\{i\}", r"(?P<i>0|[1-9]\d*)").replace(r"\*", r"(?P<rest>.+)"))

    @functools.cached_property
    def stem(self) -> str:
        """What every key of this row begins with."""
        return re.split(r"\{i\}|\*", self.torch)[0]

    @functools.cached_property
    def flax_pattern(self) -> re.Pattern[str]:
        return re.compile(re.escape(self.flax).replace(r"\{i\}", r"(\d+)"))

    @property
    def stacked(self) -> bool:
        return "{i}" in self.torch and "{i}" not in self.flax

    def has(self, number: int) -> bool:
        """Whether the layer of this number is one of this row's."""
        first, step = self.numbers
        return number >= first and (number - first) % step == 0

    def index(self, number: int) -> int:
        """Where the layer of this number is on the stacked axis."""
        first, step = self.numbers
        return (number - first) // step

    def number(self, index: int) -> int:
        """The inverse of `index`."""
        first, step = self.numbers
        return first + step * index

    def key(self, number: int) -> str:
        return self.torch.replace("{i}", str(number))


def norm(torch: str, flax: str, numbers: tuple[int, int] = FROM_0) -> list[Row]:
    """The two rows of a LayerNorm or GroupNorm."""
    return [
        Row(f"{torch}.weight", f"{flax}/scale", numbers=numbers),
        Row(f"{torch}.bias", f"{flax}/bias", numbers=numbers),
    ]


def weights(torch: str, flax: str, operation: Operation, numbers: tuple[int, int] = FROM_0) -> list[Row]:
    """The two rows of a linear layer or a convolution."""
    return [
        Row(f"{torch}.weight", f"{flax}/kernel", operation, numbers=numbers),
        Row(f"{torch}.bias", f"{flax}/bias", numbers=numbers),
    ]


def weight_normed(torch: str, flax: str, operation: Operation) -> list[Row]:
    """The rows of a convolution with weight norm, in torch's older naming and its newer one, or folded already.

    Gain and direction are kept as they are: folding them would not be undone bit for bit. A file has one form; written
    is the older one, which TorToiSe loads.
    """
    return [
        Row(f"{torch}.weight", f"{flax}/kernel", operation),
        Row(f"{torch}.bias", f"{flax}/bias"),
        Row(f"{torch}.weight_g", f"{flax}/kernel_g", GAIN),
        Row(f"{torch}.weight_v", f"{flax}/kernel_v", operation),
        Row(f"{torch}.parametrizations.weight.original0", f"{flax}/kernel_g", GAIN),
        Row(f"{torch}.parametrizations.weight.original1", f"{flax}/kernel_v", operation),
    ]


WEIGHT_NORMED = ("weight_v", "parametrizations.weight.original1", "weight")  # the direction, or the kernel itself


def normed_shape(shapes: Shapes, torch: str, where: str) -> Shape:
    """The shape of the kernel of such a convolution, whichever form it has. Raises UserError."""
    forms = [f"{torch}.{name}" for name in WEIGHT_NORMED]
    return shape_of(shapes, next((key for key in forms if key in shapes), forms[0]), 3, where)


@dataclasses.dataclass(frozen=True)
class Match:
    row: Row
    row_index: int  # in the table
    layer: int  # the number in the key, the row's first if it has none
    original: str  # of a copy: the key that it repeats; "" for any other key


@dataclasses.dataclass(frozen=True)
class Assignment:
    """What fills one Flax path: the torch keys, one per layer of a stacked row, and the shape of the Flax array."""

    row: Row
    keys: tuple[str, ...]
    shape: Shape


@dataclasses.dataclass(frozen=True)
class KeyPlan:
    """Where every key of a torch file goes: each key is in exactly one of `filled` and `dropped`."""

    filled: dict[str, Assignment]  # by Flax path; every path of the model
    dropped: dict[str, Match]  # by torch key
    where: str  # names the file in errors

    @property
    def keys(self) -> list[str]:
        """The torch keys that are converted."""
        return [key for assignment in self.filled.values() for key in assignment.keys]

    @property
    def shapes(self) -> dict[str, Shape]:
        """Every Flax path with its shape, the stacked axis included."""
        return {path: assignment.shape for path, assignment in self.filled.items()}


# --- torch to Flax ----------------------------------------------------------------------------------------------------


def match(table: Iterable[Row], key: str) -> Match:
    """The first row whose pattern is the whole key. Raises UserError if no row matches."""
    for row_index, row in enumerate(table):
        if not key.startswith(row.stem):  # rules out most rows, in a fraction of the time
            continue
        found = row.pattern.fullmatch(key)
        groups = found.groupdict() if found else {}
        number = int(groups.get("i", row.numbers[0]))
        if found and row.has(number):
            return Match(row, row_index, number, row.copy_of.replace("*", groups.get("rest", "*")))
    raise UserError(f'key "{key}" belongs to no known part of the model{did_you_mean(key, (r.torch for r in table))}')


def plan(table: list[Row], shapes: Shapes, expected: Shapes, where: str) -> KeyPlan:
    """Decides from names and shapes alone where every key of a file goes. Raises UserError naming `where` and the key.

    shapes: of the torch tensors. expected: every Flax path with its shape, the stacked axis included.
    """
    keys_of: dict[str, dict[int, str]] = {}  # Flax path -> layer -> torch key; layer 0 where nothing is stacked
    rows: dict[str, Row] = {}  # Flax path -> the row that fills it, of several that could
    dropped: dict[str, Match] = {}
    for key, shape in shapes.items():
        try:
            found = match(table, key)
        except UserError as error:
            raise UserError(f"{where}: {error}; nothing was converted") from None
        row = found.row
        if not row.flax:
            if found.original and shapes.get(found.original) != shape:
                raise UserError(f"{where}: {key} should repeat {found.original}, which {_describe(shapes, found)}")
            dropped[key] = found
            continue
        path = row.flax.replace("{i}", str(found.layer))
        if path not in expected or (row.stacked and row.index(found.layer) >= expected[path][0]):
            raise UserError(f"{where}: {key} is one more than the other keys of this model leave room for")
        _check_shape(key, shape, row, expected[path][1:] if row.stacked else expected[path], where)
        layers = keys_of.setdefault(path, {})
        layer = row.index(found.layer) if row.stacked else 0
        if layer in layers:
            raise UserError(f"{where}: {key} and {layers[layer]} are the same parameter")
        layers[layer], rows[path] = key, row
    filled: dict[str, Assignment] = {}
    for path, shape in expected.items():
        row, number = _row_of(table, path)
        layers = keys_of.get(path, {})
        missing = next((layer for layer in range(shape[0] if row.stacked else 1) if layer not in layers), None)
        if missing is not None:
            raise UserError(
                f"{where}: key {row.key(row.number(missing) if row.stacked else number)} is missing; "
                "nothing was converted"
            )
        filled[path] = Assignment(rows[path], tuple(layers[layer] for layer in sorted(layers)), shape)
    return KeyPlan(filled, dropped, where)


def _describe(shapes: Shapes, found: Match) -> str:
    original = shapes.get(found.original)
    return "is missing" if original is None else f"has another shape, {original}"


def _check_shape(key: str, shape: Shape, row: Row, want: Shape, where: str) -> None:
    if row.operation.rank not in (None, len(shape)):
        raise UserError(f"{where}: {key} has shape {shape}, expected {row.operation.rank} axes")
    # An array without strides: it shows what the operation does to a shape, and takes no memory of that size.
    torch_shape = row.operation.to_torch(np.broadcast_to(np.False_, want)).shape
    if shape != torch_shape:
        raise UserError(f"{where}: {key} has shape {shape}, the rest of the file asks for {torch_shape}")


def to_flax(
    planned: KeyPlan, state: StateDict, each: Callable[[str, np.ndarray], None] = lambda key, tensor: None
) -> Tree:
    """A torch state dict -> nested dict of float32 arrays, none of which shares memory with the state dict.

    planned: what `plan` says of this state dict. each: called with every key and tensor that is converted, when it is
    read. Raises UserError where a copy differs from its original.
    """
    check_copies(planned, state)
    flat: dict[str, np.ndarray] = {}
    for path, assignment in planned.filled.items():
        row, flat[path] = assignment.row, np.empty(assignment.shape, np.float32)
        for key, layer in zip(assignment.keys, flat[path] if row.stacked else [flat[path]], strict=True):
            each(key, state[key])
            layer[...] = row.operation.to_flax(state[key])
    return unflatten_dict(flat, sep="/")


def check_copies(planned: KeyPlan, state: StateDict) -> None:
    """Every dropped copy must equal its original bit for bit: UserError, since nobody can tell which one is meant."""
    for key, found in planned.dropped.items():
        if found.original and not same_bits(state[key], state[found.original]):
            raise UserError(
                f"{planned.where}: {key} differs from {found.original}, of which it should be a copy; the file was "
                f"changed after it was saved, and which of the two is meant cannot be told. Remove the keys that begin "
                f"with {key.split('.')[0]}. (or the canonical ones) and convert again"
            )


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal in dtype, shape and bytes: NaN equals itself, -0.0 is not 0.0."""
    as_bytes = lambda array: np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(as_bytes(a), as_bytes(b))


# --- Flax to torch ----------------------------------------------------------------------------------------------------


def to_torch(table: list[Row], params: Tree) -> dict[str, np.ndarray]:
    """The inverse of `to_flax`: every torch key that the table maps, in upstream's order, as contiguous arrays.

    Raises UserError for a parameter that no row fills.
    """
    state: dict[str, np.ndarray] = {}
    for path, value in flatten_dict(params, sep="/").items():
        row, number = _row_of(table, path)
        for index, array in enumerate(value) if row.stacked else [(0, value)]:
            key = row.key(row.number(index) if row.stacked else number)
            state[key] = np.asarray(row.operation.to_torch(array), order="C")  # ascontiguousarray gives () an axis
    return in_upstream_order(table, state)


def in_upstream_order(table: list[Row], state: StateDict) -> dict[str, np.ndarray]:
    """The same entries in the order of the table; neighbouring rows with the same `{i}` are written layer by layer."""
    blocks = _blocks(table)

    def order(key: str) -> tuple[int, int, int]:
        found = match(table, key)
        return blocks[found.row_index], found.layer, found.row_index

    return {key: state[key] for key in sorted(state, key=order)}


def _blocks(table: list[Row]) -> list[int]:
    """A number per row, the same for neighbouring rows whose keys agree up to `{i}`."""
    numbers: list[int] = []
    for index, row in enumerate(table):
        stem = row.torch.split("{i}")[0]
        same = index > 0 and "{i}" in row.torch and table[index - 1].torch.split("{i}")[0] == stem
        numbers.append(numbers[-1] if same else index)
    return numbers


def _row_of(table: list[Row], path: str) -> tuple[Row, int]:
    """The row that fills a Flax path, and the number in the path (0 if it has none)."""
    for row in table:
        found = row.flax_pattern.fullmatch(path) if row.flax else None
        if found:
            return row, int(found.group(1)) if found.groups() else 0
    raise UserError(f"parameter {path} has no place in a torch file")


# --- dimensions from shapes -------------------------------------------------------------------------------------------


def shape_of(shapes: Shapes, key: str, rank: int, where: str) -> Shape:
    """The shape of a tensor that must exist, with `rank` axes, none of them empty. Raises UserError."""
    if key not in shapes:
        raise UserError(f"{where}: key {key} is missing; nothing was converted")
    if len(shapes[key]) != rank or 0 in shapes[key]:
        raise UserError(f"{where}: {key} has shape {shapes[key]}, expected {rank} axes, none of them 0")
    return shapes[key]


def layer_count(shapes: Shapes, block: str, key: str, where: str, first: int = 0, at_least: int = 1) -> int:
    """How many layers have keys, numbered from `first`. Raises UserError where a number is skipped.

    block: how their keys begin, with `{i}`. key: the end of the key that the error names. at_least: a layer with fewer
    keys does not count.
    """
    pattern = re.compile(re.escape(block).replace(r"\{i\}", r"(0|[1-9]\d*)"))
    keys = collections.Counter(int(found.group(1)) for name in shapes if (found := pattern.match(name)))
    numbers = {number for number, count in keys.items() if count >= at_least}
    for number in range(first, first + len(numbers)):
        if number not in numbers:
            raise UserError(f"{where}: key {block.replace('{i}', str(number))}{key} is missing; nothing was converted")
    return len(numbers)
