"""The adapters of a run apart from its model: one small .npz, which can be merged into a converted checkpoint.

It holds each adapter's arrays by path ("lora/attn/c_attn/a") and, as "about", what they were trained on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from tortoise_jax.checkpoints.parts import AR, PART_TYPES, Part
from tortoise_jax.checkpoints.pretrained import (
    RUN_CONFIG,
    Pretrained,
    check_result,
    read_metadata,
    read_parts,
    saved_params,
    trained_part,
)
from tortoise_jax.checkpoints.run_checkpoints import is_run
from tortoise_jax.checkpoints.trees import checksum
from tortoise_jax.errors import UserError, first_line
from tortoise_jax.files import check_writable, read_json, read_npz, save_npz
from tortoise_jax.models.lora import LORA, LoraConfig, merged

SUFFIX = ".npz"
ABOUT = "about"


def save(run: Path, out: Path, step: int | None = None) -> list[str]:
    """Writes the adapters of a run's step; None takes the best. Returns the lines to print. Raises UserError."""
    if out.suffix != SUFFIX:
        raise UserError(f"--out {out}: expected a name ending in {SUFFIX}")
    check_writable(out, "--out")
    if out.exists():
        read(out)  # else it is somebody else's
    metadata = read_metadata(run)
    if not is_run(run) or trained_part(metadata) != AR:
        raise UserError(f"{run} is no run with adapters; a {SUFFIX} holds those of a run begun with --config.lora.rank")
    also = read_json(run / RUN_CONFIG).get("lora.also_train", "")
    if also:
        raise UserError(f"{run} trained {also!r} beside its adapters, which alone are not its model; export a .pth")
    if step is None:
        check_result(run)
    found, params, config = saved_params(run, read_parts(run, metadata)[AR].config, step)
    if not config.rank:
        raise UserError(f"{run} has no adapters: it trained the model itself; export a .pth")
    about = {"alpha": config.alpha, "base": metadata["checksums"][AR], "step": found}
    arrays = flatten_dict({LORA: params[LORA]}, sep="/")
    save_npz(out, {**arrays, ABOUT: np.array(json.dumps(about))})
    return [f"{out}: the adapters of step {found}, rank {config.rank}; they are for the checkpoint the run began with"]


def read(file: Path) -> tuple[Any, LoraConfig, int]:
    """(the adapters, how they are added, the checksum of the weights they are for). Raises UserError."""
    arrays = read_npz(file)
    try:
        about = json.loads(str(arrays.pop(ABOUT)))
        adapters = unflatten_dict(arrays, sep="/")
        rank = adapters[LORA]["attn"]["c_attn"]["a"].shape[-1]
        return adapters, LoraConfig(rank, float(about["alpha"])), int(about["base"])
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(f"{file}: not the adapters of a run: {first_line(error)}") from None


def merge(pretrained: Pretrained, file: Path) -> Pretrained:
    """A checkpoint with the adapters of a file in its AR model, which must be the one they were trained on."""
    adapters, config, base = read(file)
    part = pretrained.ar
    if checksum(part.tree) != base:
        title = PART_TYPES[AR].title
        raise UserError(f"{file}: was trained on another {title} than {pretrained.path} has; take the run's checkpoint")
    params = merged({**part.params, **adapters}, config)
    return pretrained.with_part(AR, Part.of_tree(part.config, params))
