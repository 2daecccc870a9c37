"""What the command lines do, as functions: prepare, check, train, and export of what they make.

    import tortoise_jax as tj
    tj.prepare("data", "checkpoints/tortoise", "data-prepared", trim_silence=True)
    run = tj.train(tj.get_config(data="data-prepared"), workdir="runs/voice")
    tj.load(run).export("voice.pth")

It is the only module that imports from outside the package: the configurations, and convert/ if torch is installed.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs import ar, dvae
from tortoise_jax import parallel
from tortoise_jax.checkpoints.parts import AR, DVAE, PART_TYPES
from tortoise_jax.checkpoints.pretrained import Pretrained
from tortoise_jax.data import preparation
from tortoise_jax.data.preparation import Options, Paths
from tortoise_jax.errors import UserError, did_you_mean
from tortoise_jax.training import ar_run, config, dvae_run
from tortoise_jax.training.kinds import Kind
from tortoise_jax.training.train import Asked, Export
from tortoise_jax.training.train import train as train_run

KINDS = {AR: ar_run.kind(ar.get_config), DVAE: dvae_run.kind(dvae.get_config)}


# --- data -------------------------------------------------------------------------------------------------------------


def prepare(
    data: Paths, checkpoint: str | Path | Pretrained, out: str | Path, options: Options | None = None, **fields: Any
) -> dict[str, Any]:
    """`python -m tortoise_jax.prepare`: makes the data set `out` from recordings and transcripts; returns its report.

    data: one path or several. checkpoint: whose dVAE makes the codes. options or fields: as the command's flags, for
    example trim_silence=True. Raises UserError for whatever is wrong, and where too much is rejected.
    """
    checked = check_paths(data), check_path(checkpoint, "checkpoint", Pretrained), check_path(out, "out")
    parallel.prepare_process()  # XLA reads its flags once: a run that follows in this process computes as train.py does
    return preparation.prepare(*checked, options_of(options, fields))


def check(
    data: Paths, checkpoint: str | Path | None = None, options: Options | None = None, **fields: Any
) -> dict[str, Any]:
    """`prepare --check`: the report alone; nothing is encoded or written. Without a checkpoint, for the released model.

    Raises UserError as `prepare`.
    """
    at = None if checkpoint is None else check_path(checkpoint, "checkpoint")
    return preparation.check(check_paths(data), at, options_of(options, fields))


def options_of(options: Options | None, fields: Mapping[str, Any]) -> Options:
    """Raises UserError for an unknown field."""
    known = [field.name for field in dataclasses.fields(Options)]
    for name in fields:
        if name not in known:
            raise UserError(f"{name}: no option{did_you_mean(name, known)}; there are {', '.join(known)}")
    if not isinstance(options, Options | None):
        raise UserError(f"options is {options!r}, expected tj.Options")
    return dataclasses.replace(options or Options(), **fields)


# --- training ---------------------------------------------------------------------------------------------------------


def get_config(trains: str = AR, **fields: Any) -> ConfigDict:
    """The configuration of configs/ar.py, or configs/dvae.py for trains="dvae", with fields set.

    fields: by name, those in a group too: tj.get_config(steps=100, **{"optimizer.learning_rate": 1e-5}). Raises
    UserError for an unknown field, and for a value out of its range.
    """
    if trains not in KINDS:
        raise UserError(f"trains is {trains!r}, expected one of {', '.join(KINDS)}")
    schema = KINDS[trains].schema
    settings, known = schema.defaults(), schema.types()
    for name, value in fields.items():
        if name not in known:
            raise UserError(f"config: {schema.unknown(name)}")
        *groups, own = name.split(".")
        node = settings
        for group in groups:
            node = node[group]
        with node.ignore_type():  # `check` says it in words
            node[own] = value
    config.check(settings, schema)
    return settings


def train(settings: ConfigDict, workdir: str | Path = "") -> Path:
    """`python train.py`: trains the AR model or the dVAE, or takes up a run again; returns the run's directory.

    settings: `get_config` of this module or of a file as configs/ar.py; it is left as it was. workdir: the run's
    directory; "" for runs/NAME, the data's name. Ctrl-C saves and returns. Call it before anything else computes, or
    XLA's flags (on NVIDIA cards those of `deterministic`) come too late, which it says; of several hosts, each calls it
    once. Raises UserError for whatever is wrong, and for a run that comes to nothing.
    """
    if not isinstance(settings, ConfigDict):
        raise UserError(f"the configuration is {type(settings).__name__}, expected a ConfigDict: tj.get_config(…)")
    kind = kind_of(settings)
    config.check(settings, kind.schema)
    workdir = str(check_path(workdir, "workdir")) if workdir != "" else ""
    if late := parallel.prepare_process(settings.deterministic):
        print(
            "note: JAX computed in this process before tj.train, too early for XLA's flags: the run may take more "
            "memory and differ from train.py in its last bits. Call tj.train first, or set XLA_FLAGS yourself: "
            + " ".join(late)
        )
    parallel.initialize()
    asked = Asked(workdir, export=torch_writer(), again="the same call")
    with parallel.ending_together():
        return train_run(kind, copy.deepcopy(settings), asked)


def kind_of(settings: ConfigDict) -> Kind:
    """What a configuration trains: its field `trains`, or the AR model where it has none."""
    return KINDS.get(str(settings.get("trains", AR)), KINDS[AR])


# --- export -----------------------------------------------------------------------------------------------------------


def export(
    pretrained: Pretrained,
    path: str | Path,
    part: str | None = None,
    source: str | Path | None = None,
    dtype: str = "float32",
    attn_masks: bool | None = None,
) -> list[str]:
    """`python convert/flax_to_torch.py`: writes one model as a torch file and its .json; returns the lines to print.

    Raises UserError where torch is not installed, and for whatever else is wrong.
    """
    if part is not None and part not in PART_TYPES:
        raise UserError(f"part is {part!r}, expected one of {', '.join(PART_TYPES)}")
    if attn_masks not in (None, True, False):
        raise UserError(f"attn_masks is {attn_masks!r}, expected True, False or None")
    out, original = check_path(path, "path"), None if source is None else check_path(source, "source")
    require_torch()
    from convert.flax_to_torch import write

    return write(pretrained, out, part, original, dtype, attn_masks)


def torch_writer() -> Export | None:
    """The function that writes a run's best step as a torch file, None without torch; it imports torch when called."""
    return None if importlib.util.find_spec("torch") is None else _write_run


def _write_run(run: Path, out: Path) -> list[str]:
    from convert.flax_to_torch import export as write_pth

    return write_pth(run, out)


def require_torch() -> None:
    """Raises UserError that says how to install it."""
    if importlib.util.find_spec("torch") is None:
        raise UserError("torch, which writes .pth files, is not installed: pip install 'tortoise_jax[convert]'")


# --- what is given ----------------------------------------------------------------------------------------------------


def check_path(value: Any, what: str, *others: type) -> Any:
    """A path, or something of the other types as it is. Raises UserError."""
    if isinstance(value, others):
        return value
    if not isinstance(value, str | Path) or not str(value):
        raise UserError(f"{what} is {value!r}, expected a path")
    return Path(value)


def check_paths(data: Any) -> list[Path]:
    """One path or several. Raises UserError."""
    several = data if isinstance(data, Iterable) and not isinstance(data, str) else [data]
    paths = [check_path(path, "data") for path in several]
    if not paths:
        raise UserError("data is empty, expected at least one path")
    return paths
