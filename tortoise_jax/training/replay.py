"""A step that was not finite, kept whole in one file, and computed again part by part."""

from __future__ import annotations

import functools
import json
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tortoise_jax import parallel
from tortoise_jax.checkpoints.state_dict import flatten, nest
from tortoise_jax.data.batches import Batch
from tortoise_jax.errors import UserError, first_line
from tortoise_jax.training.losses import STREAMS, means
from tortoise_jax.training.step import Recipe, eval_step, gradients

FOLDER = "nonfinite"
BATCH, PARAMS = "batch/", "params/"


def save(run: Path, step: int, batch: Batch, params: Any) -> Path:
    """Writes this host's batch and the parameters it was computed with; returns the file."""
    path = run / FOLDER / f"step-{step}-host-{parallel.process_index()}.npz"
    partial = path.with_suffix(".partial")
    arrays: dict[str, Any] = {BATCH + name: value for name, value in batch.items()}
    arrays |= {PARAMS + name: value for name, value in flatten(params).items()}
    try:
        path.parent.mkdir(exist_ok=True)
        with partial.open("wb") as file:
            np.savez(file, **arrays, about=json.dumps({"step": step}))
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None
    return path


def load(path: Path) -> tuple[int, Batch, Any]:
    """(step, batch, params) of a file that `save` wrote."""
    try:
        with path.open("rb") as opened, np.load(opened) as file:
            arrays = {name: file[name] for name in file.files}
        step = int(json.loads(str(arrays["about"]))["step"])
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"--replay {path}: not a file a non-finite step left: {first_line(error)}") from None
    part = lambda prefix: {
        name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)
    }
    return step, part(BATCH), nest(part(PARAMS))


def explain(recipe: Recipe, step: int, batch: Batch, params: Any, names: list[str]) -> list[str]:
    """Where the non-finite numbers are, as lines: losses, clips whose own loss is not finite, parameters, gradients.

    recipe: with axis None. names: the data set's clip ids by index.
    """
    one = {name: value.reshape(1, -1, *value.shape[3:]) for name, value in batch.items()}
    gradient, sums, total = jax.jit(functools.partial(gradients, recipe))(params, one, np.int32(step - 1))
    losses = means(sums, total)
    lines = [f"step {step}: " + ", ".join(f"{name} loss {float(losses[name]):.4g}" for name in STREAMS)]
    evaluate = jax.jit(functools.partial(eval_step, recipe))
    for place, example in enumerate(one["example"][0]):
        if example >= 0:
            alone = evaluate(params, {name: value[:, place : place + 1] for name, value in one.items()})
            if not all(np.isfinite(alone[f"{name}_sum"]) for name in STREAMS):
                lines.append(f"clip {names[example]}: its own loss is not finite")
    for what, tree in (("parameter", params), ("gradient of", gradient)):
        bad = [path for path, value in sorted(flatten(tree).items()) if not np.isfinite(value).all()]
        lines += [f"{what} {path} is not finite" for path in bad]
    return lines if len(lines) > 1 else [*lines, "everything is finite when computed again on this machine"]
