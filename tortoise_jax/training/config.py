"""A run's configuration: from a Python file and --config.field flags, checked before anything is loaded.

What fields there are and what they may hold is a `Schema`, one per kind of run, which train.py hands in.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import runpy
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from tortoise_jax.errors import UserError, did_you_mean, first_line
from tortoise_jax.training import field_help

LARGEST = 2**31 - 1  # of 32 bits: a larger step overflows, a larger seed wraps
ONE_OR_MORE = (1, LARGEST)
ZERO_OR_MORE = (0, LARGEST)

EXAMPLE_CLIPS = 300  # the data set for which --help shows what is chosen by its size
KINDS = {"bool": "truth value (true or false)", "int": "whole number", "string": "text"}
FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "the configuration, e.g. configs/ar.py", lock_config=True)
flags.DEFINE_string("workdir", "", "the run's directory (default: runs/NAME, the data's name)")
flags.DEFINE_bool("plan", False, "print what the run would need (memory, time, shapes) and train nothing")
flags.DEFINE_string("topology", "", "with --plan: a machine that is not here, e.g. v5e:16x16, h100:8, rtx3060-12g")
flags.DEFINE_string("replay", "", "a file that a non-finite step left: compute it again and say what is not finite")
flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, where a run has several hosts and none was found")
flags.DEFINE_integer("num_processes", 0, "hosts of the run, with --coordinator")
flags.DEFINE_integer("process_id", -1, "this host's number, with --coordinator")


@dataclasses.dataclass(frozen=True)
class Schema:
    """What a kind of run can be told.

    file: the configuration to start from, which has every field and its default. defaults: makes it. choices: fields
    that hold one of a few strings. ranges: lowest and highest value of a field. renamed: old name -> new name.
    meanings: of a field's values that older versions had: value -> what is meant.
    rule: raises UserError for fields that do not go together, given all as {dotted name: value}.
    """

    file: str
    defaults: Callable[[], ConfigDict]
    choices: Mapping[str, tuple[str, ...]]
    ranges: Mapping[str, tuple[float, float]]
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    meanings: Mapping[str, Mapping[Any, str]] = dataclasses.field(default_factory=dict)
    rule: Callable[[dict[str, Any]], None] = lambda given: None

    def types(self) -> dict[str, type]:
        return types(self.defaults())

    def unknown(self, name: str) -> str:
        """Why a name is no field, and what it may be meant for."""
        if name in self.renamed:
            return f"the field {name} is called {self.renamed[name]} now"
        inside = [field for field in self.types() if field.startswith(f"{name}.")]
        if inside:
            return f"{name} is a group of fields: {', '.join(inside)}"
        # In "optimizer.lr" most letters are the group's: names alone are compared, and "lr" stands for "learning_rate".
        own_names = {field.rpartition(".")[2]: field for field in self.types()}
        own_names |= {"".join(word[0] for word in own.split("_")): own_names[own] for own in own_names if "_" in own}
        meant = did_you_mean(name.rpartition(".")[2], own_names)
        for own, field in own_names.items():
            meant = meant.replace(f'"{own}"', f'"{field}"')
        return f"unknown field {name}{meant}"


def parse(argv: list[str], schema: Schema) -> ConfigDict:
    """The command line's configuration. Raises UserError for anything unknown or of a wrong type."""
    argv = with_packaged_file(argv, schema)
    check_overrides(argv, schema)
    others, apart = set_apart(argv, schema)
    try:
        rest = FLAGS(others)
        if FLAGS.config is not None:
            getattr(FLAGS.config, "checkpoint", None)  # a file that could not be loaded says so on first use
    except Exception as error:  # a user's file may raise anything
        raise UserError(explained(error, config_argument(argv)[1])) from None
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; flags begin with --, see --help")
    if FLAGS.config is None:
        raise UserError("which configuration? e.g. --config configs/ar.py")
    if not isinstance(FLAGS.config, ConfigDict):
        raise UserError(f"--config: get_config() must return an ml_collections ConfigDict, as {schema.file} does")
    for field, value in apart.items():
        *groups, name = field.split(".")
        node = functools.reduce(lambda inner, group: inner[group], groups, FLAGS.config)
        with node.ignore_type():
            node[name] = value
    for field in [field for field in schema.meanings if field in FLAGS.config]:  # `check` says which are missing
        with FLAGS.config.ignore_type():
            FLAGS.config[field] = schema.meanings[field].get(FLAGS.config[field], FLAGS.config[field])
    check(FLAGS.config, schema)
    return FLAGS.config


def set_apart(argv: list[str], schema: Schema) -> tuple[list[str], dict[str, str | None]]:
    """The command line without what ml_collections would take for another type than the file's, and that by field.

    None for what is left open; fields whose other values have meanings hold what is typed.
    """
    others: list[str] = []
    apart: dict[str, str | None] = {}
    words = iter(argv)
    for argument in words:
        name, given, value = argument.lstrip("-").partition("=")
        field = name.removeprefix("config.")
        if left_open(argument, schema):
            apart[field] = None
        elif name.startswith("config.") and field in schema.meanings:
            apart[field] = value if given else next(words)
        else:
            others.append(argument)
    return others, apart


def left_open(argument: str, schema: Schema) -> str:
    """The field of "--config.field=None", where it is one that is chosen by the size of the data set; else ""."""
    name, _, value = argument.lstrip("-").partition("=")
    field = name.removeprefix("config.")
    return field if value == "None" and flat(schema.defaults()).get(field, value) is None else ""


def with_packaged_file(argv: list[str], schema: Schema) -> list[str]:
    """`--config configs/ar.py` means the installed file where the working directory has none, as after a wheel."""
    folder = Path(inspect.getfile(schema.defaults)).parent
    index, file = config_argument(argv)
    installed = folder.parent / file
    if Path(file).is_file() or Path(file).parent.name != folder.name or not installed.is_file():
        return argv
    return [*argv[:index], argv[index].replace(file, str(installed), 1), *argv[index + 1 :]]


def config_argument(argv: list[str]) -> tuple[int, str]:
    """Which argument names the file of --config, and the file without absl's `:suffix`; (0, "") for none."""
    for index, argument in enumerate(argv):
        name, given, value = argument.lstrip("-").partition("=")
        if name == "config":
            index, value = (index, value) if given else (index + 1, next(iter(argv[index + 1 :]), ""))
            return index, value.partition(":")[0]
    return 0, ""


def trains(argv: list[str]) -> str:
    """The field `trains` of the configuration file that a command line names; "" where there is none to be read.

    Which schema the rest is checked by depends on it. What is wrong with the file is said by `parse`.
    """
    try:
        return str(runpy.run_path(config_argument(argv)[1])["get_config"]().get("trains", ""))
    except Exception:
        return ""


def check_overrides(argv: list[str], schema: Schema) -> None:
    """Names and numbers of --config.field=value, and the file, before ml_collections, whose messages are bare."""
    known = schema.types()
    for index, argument in enumerate(argv):
        name, given, value = argument.lstrip("-").partition("=")
        if name == "config" and not Path(file := config_argument(argv)[1]).is_file():
            raise UserError(f"--config {file}: there is no such file; {schema.file} is the one to start from")
        if given and name != "config" and name in FLAGS:
            try:
                FLAGS[name].parser.parse(value)
            except (ValueError, TypeError):
                raise UserError(f"--{name}: {value!r} is no {KINDS[FLAGS[name].flag_type()]}") from None
        if not name.startswith("config."):
            continue
        field = name.removeprefix("config.")
        if field not in known:
            raise UserError(f"--{name}: {schema.unknown(field)}; --help lists all")
        if not given and known[field] is not bool and not argv[index + 1 :]:
            raise UserError(f"--{name}: a value is missing; --{name}=VALUE")
        if given and known[field] is bool and value.lower() not in ("true", "t", "1", "false", "f", "0"):
            raise UserError(f"--{name}: {value!r} is neither true nor false")
        if given and known[field] in (int, float) and not left_open(argument, schema):
            try:
                known[field](value)
            except ValueError:
                raise UserError(f"--{name}: {value!r} is not a number ({known[field].__name__})") from None


def explained(error: BaseException, file: str) -> str:
    """One line for what went wrong first: at which line of the configuration's file, or on the command line.

    A file's own error comes wrapped several times.
    """
    errors = [error]
    while cause := errors[-1].__cause__ or errors[-1].__context__:
        errors.append(cause)
    for inner in reversed(errors):
        lines = [frame for frame in traceback.extract_tb(inner.__traceback__) if frame.filename == file]
        if lines:
            return f"--config {file}:{lines[-1].lineno}: {lines[-1].line}: {first_line(inner)}"
    if isinstance(errors[-1], KeyError):  # of a field that the command line gives
        return f"--config {file}: its configuration has no field {errors[-1].args[0]}"
    return f"command line: {first_line(errors[-1])}"


def show_help_and_exit(argv: list[str], schema: Schema, fill: Callable[[ConfigDict, int], object]) -> None:
    """--help lists this program's own flags and the fields of the configuration, not absl's hundred.

    fill: chooses what a configuration leaves open, for a data set of so many clips.
    """
    if any(argument in ("--help", "-h", "--helpfull") for argument in argv[1:]):
        print("usage: python train.py --config FILE [--config.FIELD=VALUE …] [--workdir RUN]\n")
        for name in ("config", "workdir", "plan", "topology", "replay", "coordinator", "num_processes", "process_id"):
            print(f"  --{name:14} {FLAGS[name].help}")
        example = schema.defaults()
        fill(example, EXAMPLE_CLIPS)
        print(f"\nfields, as they are typed, with the values and in the words of {schema.file}:\n")
        print(field_help.page(schema.defaults, flat(schema.defaults()), flat(example), EXAMPLE_CLIPS))
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


def check(config: ConfigDict, schema: Schema) -> None:
    """Every field must be one of the schema's, of its type, and in its range."""
    known, given = schema.types(), flat(config)
    optional = {name for name, value in flat(schema.defaults()).items() if value is None}
    for name, value in given.items():
        if name not in known:
            raise UserError(f"config: {schema.unknown(name)}")
        accepted: tuple[type, ...] = (float, int) if known[name] is float else (known[name],)
        if isinstance(value, bool) and known[name] is not bool:
            accepted = ()
        if not isinstance(value, accepted) and not (value is None and name in optional):
            raise UserError(f"config: {name} is {value!r}, expected {known[name].__name__}")
    for name in known:
        if name not in given:
            raise UserError(f"config: field {name} is missing; start from get_config() of {schema.file}")
    for name, allowed in schema.choices.items():
        if given[name] not in allowed:
            raise UserError(f"config: {name} is {given[name]!r}, expected one of {', '.join(allowed)}")
    for name, (low, high) in schema.ranges.items():
        if given[name] is not None and not low <= given[name] <= high:
            above = given[name] < low and high in (LARGEST, math.inf)
            raise UserError(
                f"config: {name} is {given[name]}, expected {f'at least {low:g}' if above else f'{low:g} to {high}'}"
            )
    schema.rule(given)
