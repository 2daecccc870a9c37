"""A checkpoint file opened for conversion: its family known, its dimensions read, the place of every key decided.

Nothing has been copied or computed yet, so this is also what `inspect_checkpoint.py` reports.
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
from convert.download import DVAE_SHA256
from convert.families import AR, DVAE, Found
from convert.torch_files import ZIP, Progress, load, silent
from tortoise_jax.checkpoints.parts import abstract_tree
from tortoise_jax.errors import UserError
from tortoise_jax.models.dvae import DVAEConfig
from tortoise_jax.models.unified_voice import UnifiedVoiceConfig

Config = UnifiedVoiceConfig | DVAEConfig
TABLES = {AR: mapping.UNIFIED_VOICE, DVAE: mapping.DVAE}
RELEASED_TEXT_TOKENS = 256


@dataclasses.dataclass(frozen=True)
class Source:
    part: str  # "ar" or "dvae"
    found: Found
    config: Config
    heads_from: str  # "--heads", "its .json", or "assumed: width / 64"; "" for a dVAE
    expected: dict[str, tuple[int, ...]]  # every Flax path and shape
    plan: mapping.Plan

    @property
    def path(self) -> Path:
        return self.found.path

    @property
    def parameters(self) -> int:
        """Numbers that are converted, buffers of the codebook included."""
        return sum(self.found.state[key].size for _, keys in self.plan.filled.values() for key in keys)

    @property
    def dtypes(self) -> str:
        """ "float32", or "float16 (84 tensors), float32 (2)" where they are mixed."""
        kinds = Counter(str(self.found.state[key].dtype) for _, keys in self.plan.filled.values() for key in keys)
        if len(kinds) == 1:
            return next(iter(kinds))
        return ", ".join(f"{kind} ({count} tensors)" for kind, count in kinds.most_common())

    @property
    def dropped(self) -> Counter[str]:
        """Reason -> number of tensors."""
        return Counter(found.row.reason for found in self.plan.dropped.values())


def open_source(
    path: Path, part: str, heads: int | None = None, checksums: bool = True, progress: Progress = silent
) -> Source:
    """Opens a file that must be the wanted part. UserError naming what it is instead, or the key that is wrong."""
    found = families.find(load(path, checksums, progress), path)
    families.require(found, part)
    return decide(found, part, heads)


def decide(found: Found, part: str, heads: int | None = None) -> Source:
    """Dimensions and every key's place, from names and shapes. Raises UserError."""
    where = str(found.path)
    shapes = {key: tensor.shape for key, tensor in found.state.items()}
    heads_from = ""
    config: Config
    if part == AR:
        stated = number_beside(found.path, "heads")
        heads_from = "--heads" if heads else "its .json" if stated else "assumed: width / 64"
        config = mapping.unified_voice_config(shapes, where, heads or stated)
    else:
        config = mapping.dvae_config(shapes, where)
    expected = expected_shapes(config)
    planned = mapping.plan(TABLES[part], shapes, expected, where)
    refuse_numberless(found, planned)
    return Source(part, found, config, heads_from, expected, planned)


@functools.lru_cache(maxsize=4)
def expected_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Every Flax path of a model of these dimensions, with its shape."""
    return {path: leaf.shape for path, leaf in flatten_dict(abstract_tree(config), sep="/").items()}


def refuse_numberless(found: Found, planned: mapping.Plan) -> None:
    for _, keys in planned.filled.values():
        for key in keys:
            if found.state[key].dtype.kind in "iub":
                raise UserError(
                    f"{found.path}: {key} is {found.state[key].dtype}, expected float32, float16 or bfloat16; "
                    "quantised weights cannot be fine-tuned"
                )


def card_beside(path: Path) -> dict[str, Any]:
    """The .json that `flax_to_torch.py` writes beside a .pth, or {}; a .json of anybody else's is not ours to read."""
    try:
        content = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path.with_suffix('.json')}, which belongs to {path}, is damaged: {error}") from None
    return content if isinstance(content, dict) and "tortoise_jax" in content else {}


def number_beside(path: Path, name: str) -> int | None:
    """A whole number that the .json states ("heads", "conditioning_inputs"), or None."""
    number = card_beside(path).get(name)
    if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
        raise UserError(f'{path.with_suffix(".json")}: "{name}" is {number!r}, expected a number of at least 1')
    return number


# --- the numbers in it ------------------------------------------------------------------------------------------------


def nonfinite(tensor: np.ndarray) -> int:
    """How many values are NaN or infinite. A sum of squares that is finite says none, at the speed of memory."""
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
    """The lines of a summary about one file: dimensions, what was unpacked, what was dropped and why."""
    config, size = source.config, f"{source.path}: {source.parameters:,} parameters"
    if isinstance(config, DVAEConfig):
        public = "" if config.codebook_dim == 256 else "; the public configs' 256 does not apply to this file"
        lines = [
            f"dVAE {size} and buffers, {source.dtypes}",
            f"  {config.layers} strided layers, {config.res_blocks} residual blocks, hidden {config.hidden}, "
            f"{config.codes} codes",
            f"  codebook_dim {config.codebook_dim}, read from codebook.embed{public}",
        ]
        if checksum == DVAE_SHA256:
            lines.append("  its sha256 is that of the released dvae.pth")
    else:
        early = " (an early release's; later ones have 608 and 404)" if config.mel_positions == 304 else ""
        lines = [
            f"AR model {size}, {source.dtypes}",
            f"  {config.layers} layers, width {config.width}, {config.heads} heads ({source.heads_from}), "
            f"{config.codes} codes, {config.text_tokens} text tokens",
            f"  positions: {config.mel_positions} for codes, {config.text_positions} for text{early}",
        ]
    if source.found.format != ZIP:
        lines.append(f"  a {source.found.format} file has no checksums: damage to its numbers cannot be seen")
    lines += [f"  {note}" for note in source.found.variant]
    return lines + [f"  dropped {count} tensors: {reason}" for reason, count in source.dropped.items()]
