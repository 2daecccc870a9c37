"""A step that was not finite: saved in one file with its batch and parameters, and computed again part by part."""

from __future__ import annotations

import functools
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from tortoise_jax import parallel
from tortoise_jax.data.batches import Batch
from tortoise_jax.errors import UserError, first_line
from tortoise_jax.files import check_readable, write_atomically
from tortoise_jax.training.optimizer import paths
from tortoise_jax.training.step import Objective, eval_step, evaluation, gradients

FOLDER = "nonfinite"
BATCH, PARAMS = "batch/", "params/"


def save(run: Path, step: int, batch: Batch, params: Any) -> Path:
    """Writes this host's batch and the parameters it was computed with; returns the file."""
    path = run / FOLDER / f"step-{step}-host-{parallel.process_index()}.npz"
    arrays: dict[str, Any] = {BATCH + name: value for name, value in batch.items()}
    arrays |= {PARAMS + name: value for name, value in flatten_dict(params, sep="/").items()}
    content = io.BytesIO()
    np.savez(content, **arrays, about=json.dumps({"step": step}))
    write_atomically(path, content.getvalue())
    return path


def load(path: Path) -> tuple[int, Batch, Any]:
    """(step, batch, params) of a file that `save` wrote."""
    check_readable(path)
    try:
        with path.open("rb") as opened, np.load(opened) as file:
            arrays = {name: file[name] for name in file.files}
        step = int(json.loads(str(arrays["about"]))["step"])
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"--replay {path}: not a file a non-finite step left: {first_line(error)}") from None
    part = lambda prefix: {
        name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)
    }
    return step, part(BATCH), unflatten_dict(part(PARAMS), sep="/")


def explain(config: Objective, step: int, batch: Batch, params: Any, names: list[str]) -> list[str]:
    """Where the non-finite numbers are, as lines: losses, clips whose own loss is not finite, parameters, gradients.

    config: with axis None. batch: (devices, a, b, …) as `save` got it. names: the data set's clip ids by index.
    """
    one = {name: value.reshape(1, -1, *value.shape[3:]) for name, value in batch.items()}
    gradient, sums, total = jax.jit(functools.partial(gradients, config))(params, one, np.int32(step - 1))
    losses = config.metrics(sums, total)
    shown = [name for name in config.curves if f"loss/{name}" in losses]
    lines = [f"step {step}: " + ", ".join(f"{name} loss {float(losses[f'loss/{name}']):.4g}" for name in shown)]
    evaluate = jax.jit(functools.partial(eval_step, config))
    for index, example in enumerate(one["example"][0]):
        if example >= 0:
            alone = evaluate(params, {name: value[:, index : index + 1] for name, value in one.items()})
            if not np.isfinite(list(evaluation(config, alone).values())).all():
                lines.append(f"clip {names[example]}: its own loss is not finite")
    for what, tree in (("parameter", params), ("gradient of", gradient)):
        by_path = zip(jax.tree.leaves(paths(tree)), jax.tree.leaves(tree), strict=True)
        bad = sorted(path for path, value in by_path if not np.isfinite(value).all())
        lines += [f"{what} {path} is not finite" for path in bad]
    return lines if len(lines) > 1 else [*lines, "everything is finite when computed again on this machine"]
