"""A checkpoint file opened for conversion: its model, its dimensions, and where each of its keys goes.

Nothing is copied or computed here, so `inspect_checkpoint.py` can report the same without a conversion.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from convert import families, mapping
from convert.families import Found
from convert.tables import MODELS, TorchModel
from convert.torch_files import ZIP, Progress, load, silent
from tortoise_jax.checkpoints.parts import PART_TYPES, abstract_tree, abstract_variables
from tortoise_jax.errors import UserError
from tortoise_jax.files import check_readable


@dataclasses.dataclass(frozen=True)
class Source:
    model: TorchModel
    found: Found
    config: Any  # of `model`
    heads_from: str  # "--heads", "its .json", or "assumed: width / 64"
    plan: mapping.KeyPlan

    @property
    def path(self) -> Path:
        return self.found.path

    @property
    def parameters(self) -> int:
        """How many numbers are converted, buffers of the codebook included."""
        return sum(self.found.state[key].size for key in self.plan.keys)

    @property
    def dtypes(self) -> str:
        """ "float32", or "float16 (84 tensors), float32 (2)" where they are mixed."""
        counts = Counter(str(self.found.state[key].dtype) for key in self.plan.keys)
        if len(counts) == 1:
            return next(iter(counts))
        return ", ".join(f"{dtype} ({count} tensors)" for dtype, count in counts.most_common())

    @property
    def dropped(self) -> Counter[str]:
        """Reason -> number of tensors."""
        return Counter(found.row.reason for found in self.plan.dropped.values())


def open_source(
    path: Path, part: str, heads: int | None = None, checksums: bool = True, progress: Progress = silent
) -> Source:
    """Opens a file that must hold the model of `part`.

    heads: of its attention; None reads them from the .json beside the file, else assumes width / 64. checksums: verify
    those of a .pth file. Raises UserError that says what the file is instead, or which of its keys is wrong.
    """
    found = families.find(load(path, checksums, progress), path)
    families.require(found, part)
    return decide(found, part, heads)


def decide(found: Found, part: str, heads: int | None = None) -> Source:
    """The dimensions and where every key goes, from names and shapes. Raises UserError."""
    model, where = MODELS[part], str(found.path)
    shapes = {key: tensor.shape for key, tensor in found.state.items()}
    stated = number_beside(found.path, "heads")
    heads_from = "--heads" if heads else "its .json" if stated else "assumed: width / 64"
    config = model.config(shapes, where, heads or stated)
    planned = mapping.plan(model.table, shapes, expected_shapes(config), where)
    refuse_other_dtypes(found, planned)
    return Source(model, found, config, heads_from, planned)


@functools.lru_cache(maxsize=4)
def expected_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Every Flax path of a model of these dimensions, with its shape."""
    return {path: leaf.shape for path, leaf in flatten_dict(abstract_tree(config), sep="/").items()}


def refuse_other_dtypes(found: Found, planned: mapping.KeyPlan) -> None:
    """Raises UserError for a weight that is stored as integers or booleans."""
    for key in planned.keys:
        if found.state[key].dtype.kind in "iub":
            raise UserError(
                f"{found.path}: {key} is {found.state[key].dtype}, expected float32, float16 or bfloat16; "
                "quantised weights cannot be fine-tuned"
            )


def metadata_beside(path: Path) -> dict[str, Any]:
    """The .json that `flax_to_torch.py` writes beside a .pth; {} without one, or if another program wrote it.

    Raises UserError for one of ours that is damaged.
    """
    check_readable(path.with_suffix(".json"))
    try:
        content = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        if not wrote(path.with_suffix(".json")):
            return {}
        raise UserError(f"{path.with_suffix('.json')}, which belongs to {path}, is damaged: {error}") from None
    return content if isinstance(content, dict) and "tortoise_jax" in content else {}


def wrote(file: Path) -> bool:
    """Whether a file that is no JSON was ours; another program's may hold anything."""
    try:
        return b'"tortoise_jax"' in file.read_bytes()
    except OSError:
        return True


def number_beside(path: Path, name: str) -> int | None:
    """A whole number that the .json states ("heads", "conditioning_inputs"), or None. Raises UserError."""
    number = metadata_beside(path).get(name)
    if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
        raise UserError(f'{path.with_suffix(".json")}: "{name}" is {number!r}, expected a number of at least 1')
    return number


# --- the numbers in it ------------------------------------------------------------------------------------------------


def nonfinite(tensor: np.ndarray) -> int:
    """How many values are NaN or infinite. A finite sum of squares shows that none is, in one pass over the memory."""
    flat = np.asarray(tensor, np.float32).reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(np.dot(flat, flat)):
            return 0
    return int(flat.size - np.isfinite(flat).sum())


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- for people -------------------------------------------------------------------------------------------------------


def describe(source: Source, checksum: str = "") -> list[str]:
    """The lines of a summary about one file: dimensions, what was unpacked, what was dropped and why.

    checksum: the sha256 of the file, where it is known.
    """
    model, title = source.model, PART_TYPES[source.model.part].title
    lines = [
        f"{title} {source.path}: {source.parameters:,} {counted(source.config)}, {source.dtypes}",
        *(f"  {line}" for line in model.lines(source.config, source.heads_from)),
    ]
    if model.sha256 and checksum == model.sha256:
        lines.append(f"  its sha256 is that of the released {model.file}")
    if source.found.format != ZIP:
        lines.append(f"  a {source.found.format} file has no checksums: damage to its numbers cannot be seen")
    lines += [f"  {note}" for note in source.found.variant]
    return lines + [f"  dropped {count} tensors: {reason}" for reason, count in source.dropped.items()]


def counted(config: Any) -> str:
    """What the number of a model's values counts."""
    return "parameters" if abstract_variables(config).keys() == {"params"} else "parameters and buffers"
