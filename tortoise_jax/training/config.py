"""A run's configuration: from a Python file and --config.field flags, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from configs import ar
from tortoise_jax.errors import UserError, did_you_mean
from tortoise_jax.models.layers import ATTENTION_IMPLEMENTATIONS, Compute
from tortoise_jax.training.optimizer import OPTIMIZERS, SCHEDULES, OptimizerConfig

DTYPES = ("auto", "float32", "bfloat16")
CHOICES = {
    "dtype": DTYPES,
    "attention": ATTENTION_IMPLEMENTATIONS,
    "optimizer.name": OPTIMIZERS,
    "optimizer.schedule": SCHEDULES,
}
ONE_OR_MORE = (1, math.inf)
NONE_OR_MORE = (0, math.inf)
BELOW_ONE = (0, 0.99)
RANGES = {
    **dict.fromkeys(("steps", "batch_size", "accumulation", "eval_every", "log_every", "keep_last"), ONE_OR_MORE),
    **dict.fromkeys(("conditioning_clips", "max_nonfinite"), ONE_OR_MORE),
    **dict.fromkeys(("seed", "save_every", "sample_every", "patience", "text_weight"), NONE_OR_MORE),
    **dict.fromkeys(("optimizer.warmup", "optimizer.weight_decay"), NONE_OR_MORE),
    **dict.fromkeys(("embed_dropout", "residual_dropout", "attention_dropout"), BELOW_ONE),
    **dict.fromkeys(("optimizer.beta1", "optimizer.beta2"), (0, 0.999999)),
    "optimizer.learning_rate": (1e-12, 1),
    "optimizer.gamma": (1e-6, 1),
    "optimizer.epsilon": (1e-30, 1),
    "optimizer.clip_norm": (1e-6, math.inf),
}

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "the configuration, e.g. configs/ar.py", lock_config=True)
flags.DEFINE_string("workdir", "", "the run's directory (default: runs/NAME, the data's name)")
flags.DEFINE_bool("plan", False, "print what the run would need (memory, time, shapes) and train nothing")
flags.DEFINE_string("replay", "", "a file that a non-finite step left: compute it again and say what is not finite")
flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, where a run has several hosts and none was found")
flags.DEFINE_integer("num_processes", 0, "hosts of the run, with --coordinator")
flags.DEFINE_integer("process_id", -1, "this host's number, with --coordinator")


def parse(argv: list[str]) -> ConfigDict:
    """The command line's configuration. Raises UserError for anything unknown or of a wrong type."""
    check_overrides(argv)
    try:
        rest = FLAGS(argv)
        if FLAGS.config is not None:
            getattr(FLAGS.config, "checkpoint", None)  # a file that could not be loaded says so on first use
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError, SyntaxError) as error:
        raise UserError(f"command line: {root_cause(error)}") from None
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; flags begin with --, see --help")
    if FLAGS.config is None:
        raise UserError("which configuration? e.g. --config configs/ar.py")
    if not isinstance(FLAGS.config, ConfigDict):
        raise UserError("--config: get_config() must return an ml_collections ConfigDict, as configs/ar.py does")
    check(FLAGS.config)
    return FLAGS.config


def check_overrides(argv: list[str]) -> None:
    """Names and numbers of --config.field=value, and the file, before ml_collections, whose messages are bare."""
    known = types(ar.get_config())
    for place, argument in enumerate(argv):
        name, given, value = argument.lstrip("-").partition("=")
        if name == "config":
            file = value if given else next(iter(argv[place + 1 :]), "")
            if not Path(file.partition(":")[0]).is_file():
                raise UserError(f"--config {file}: there is no such file; configs/ar.py is the one to start from")
        if not name.startswith("config."):
            continue
        field = name.removeprefix("config.")
        if field not in known:
            raise UserError(f"--{name}: unknown field{did_you_mean(field, known)}; --help lists all")
        if given and known[field] in (int, float):
            try:
                known[field](value)
            except ValueError:
                raise UserError(f"--{name}: {value!r} is not a number ({known[field].__name__})") from None


def root_cause(error: BaseException) -> str:
    """The first line of what went wrong first: a config file's own error comes wrapped several times."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    text = str(error.args[0] if len(error.args) == 1 else error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def show_help_and_exit(argv: list[str]) -> None:
    """--help lists this program's own flags and the fields of the recipe, not absl's hundred."""
    if any(argument in ("--help", "-h", "--helpfull") for argument in argv[1:]):
        print("usage: python train.py --config FILE [--config.FIELD=VALUE …] [--workdir RUN]\n")
        for name in ("config", "workdir", "plan", "replay", "coordinator", "num_processes", "process_id"):
            print(f"  --{name:14} {FLAGS[name].help}")
        print("\nfields, with configs/ar.py's values (its comments say what each is for):\n")
        for name, value in flat(ar.get_config()).items():
            print(f"  --config.{name}={value}")
        sys.exit(0)


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted field names -> values."""
    fields: dict[str, Any] = {}
    for name, value in config.items():
        inner = hasattr(value, "items")
        fields |= flat(value, f"{prefix}{name}.") if inner else {prefix + name: value}
    return fields


def types(config: ConfigDict, prefix: str = "") -> dict[str, type]:
    """Dotted field names -> types, those of fields that are None (a preset's) included."""
    found: dict[str, type] = {}
    for name in config:
        inner = isinstance(config[name], ConfigDict)
        found |= types(config[name], f"{prefix}{name}.") if inner else {prefix + name: config.get_type(name)}
    return found


def check(config: ConfigDict) -> None:
    """Every field must be one of configs/ar.py's, of its type, and in its range."""
    known = types(ar.get_config())
    given = flat(config)
    optional = {name for name, value in flat(ar.get_config()).items() if value is None}
    for name, value in given.items():
        if name not in known:
            raise UserError(f"config: unknown field {name}{did_you_mean(name, known)}")
        accepted: tuple[type, ...] = (float, int) if known[name] is float else (known[name],)
        if isinstance(value, bool) and known[name] is not bool:
            accepted = ()
        if not isinstance(value, accepted) and not (value is None and name in optional):
            raise UserError(f"config: {name} is {value!r}, expected {known[name].__name__}")
    for name in known:
        if name not in given:
            raise UserError(f"config: field {name} is missing; start from configs/ar.py's get_config()")
    for name, allowed in CHOICES.items():
        if given[name] not in allowed:
            raise UserError(f"config: {name} is {given[name]!r}, expected one of {', '.join(allowed)}")
    for name, (low, high) in RANGES.items():
        if given[name] is not None and not low <= given[name] <= high:
            expected = f"at least {low:g}" if high == math.inf else f"{low:g} to {high:g}"
            raise UserError(f"config: {name} is {given[name]}, expected {expected}")
    milestones = given["optimizer.milestones"] or ()
    if any(not isinstance(step, int) or step < 1 for step in milestones) or sorted(set(milestones)) != [*milestones]:
        raise UserError(
            f"config: optimizer.milestones is {milestones}, expected rising step numbers such as (500, 1000)"
        )
    if given["attention_dropout"] and given["attention"] != "plain":
        raise UserError(f"config: attention={given['attention']} has no dropout; set attention_dropout=0")


def compute(config: ConfigDict, dtype: str, unroll: int) -> Compute:
    """How the model is computed, with `dtype` in place of "auto"."""
    return Compute(
        dtype=dtype if config.dtype == "auto" else config.dtype,
        remat=config.remat,
        unroll=unroll,
        embed_dropout=config.embed_dropout,
        residual_dropout=config.residual_dropout,
        attention_dropout=config.attention_dropout,
        attention=config.attention,
    )


def optimizer(config: ConfigDict) -> OptimizerConfig:
    fields = {field.name for field in dataclasses.fields(OptimizerConfig)} - {"total_steps"}
    values = {name: config.optimizer[name] for name in fields}
    values["milestones"] = tuple(values["milestones"])
    return OptimizerConfig(**values, total_steps=config.steps)
