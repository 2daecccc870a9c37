"""Recordings and transcripts to a data set.

python -m tortoise_jax.prepare --data VOICE --checkpoint DIR --out DATASET
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tortoise_jax import parallel
from tortoise_jax.data.filters import MAX_SECONDS, MAX_TEXT
from tortoise_jax.data.manifests import FORMATS
from tortoise_jax.data.preparation import MAX_REJECTED, Options, check, prepare
from tortoise_jax.data.splits import VALIDATION_PART
from tortoise_jax.errors import Parser, UserError, exit_with_one_line


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    formats = "\n".join(f"  {name:12} {entry.description}" for name, entry in FORMATS.items())
    parser = Parser(
        "Turns recordings (wav, flac, ogg, mp3) and transcripts into a data set to train on.",
        prog="python -m tortoise_jax.prepare",
        epilog=f"formats:\n{formats}\n\nRun again after an interruption or with more recordings: what is done stays.",
    )
    flags: dict[str, dict[str, Any]] = {
        "data": {
            "type": Path,
            "nargs": "+",
            "required": True,
            "metavar": "PATH",
            "help": "recordings with transcripts",
        },
        "checkpoint": {"type": Path, "metavar": "DIR", "help": "a converted checkpoint; its dVAE makes the codes"},
        "out": {"type": Path, "metavar": "DATASET", "help": "the folder of the data set"},
        "check": {"action": "store_true", "help": "only report: nothing encoded or written, --checkpoint optional"},
        "format": {"metavar": "NAME", "help": "of all inputs, where it is not recognised rightly; see below"},
        "transcribe": {
            "type": Path,
            "metavar": "DIR",
            "help": "recordings without transcripts: a Whisper model that writes them down, cut at pauses",
        },
        "language": {"metavar": "CODE", "help": "of --transcribe, e.g. de (default: what each recording sounds like)"},
        "max_seconds": {"type": float, "metavar": "S", "help": f"longest clip (default {MAX_SECONDS})"},
        "max_text": {"type": int, "metavar": "N", "help": f"most tokens of a text (default {MAX_TEXT})"},
        "max_rejected": {
            "type": float,
            "metavar": "PART",
            "help": f"fail if more is rejected (default {MAX_REJECTED})",
        },
        "trim_silence": {"action": "store_true", "help": "cut silence off both ends of clips, but for 0.1 s"},
        "channel": {"metavar": "N", "help": "of recordings with several: a number (default 1), or mix for their mean"},
        "cleaner": {
            "metavar": "NAME",
            "help": "tortoise (default; as the released models), english (says & %% £ too), basic or none",
        },
        "tokenizer": {
            "type": Path,
            "metavar": "FILE",
            "help": "a BPE of one's own: python -m tortoise_jax.tokenizer",
        },
        "validation": {"type": float, "metavar": "PART", "help": f"held out if no split is given ({VALIDATION_PART})"},
        "seed": {"type": int, "metavar": "N", "help": "decides what is held out (default 0)"},
        "workers": {"type": int, "metavar": "N", "help": "processes that decode (default: one a processor; 0: none)"},
        "coordinator": {"metavar": "HOST:PORT", "help": "process 0 of several hosts that share the work"},
        "num_processes": {"type": int, "metavar": "N", "help": "how many hosts, with --coordinator"},
        "process_id": {"type": int, "metavar": "I", "help": "this host's number, with --coordinator"},
    }
    defaults = {field.name: field.default for field in dataclasses.fields(Options)}
    parser.set_defaults(**defaults, coordinator="", num_processes=0, process_id=-1)
    for name, about in flags.items():
        parser.add_argument(f"--{name}", **about)
    return parser.parse_args(argv)


def main() -> None:
    arguments = parse()
    fields = {field.name for field in dataclasses.fields(Options)}
    options = Options(**{name: value for name, value in vars(arguments).items() if name in fields})
    if arguments.check:
        check(arguments.data, arguments.checkpoint, options)
        return
    missing = [f"--{name}" for name in ("checkpoint", "out") if getattr(arguments, name) is None]
    if missing:
        raise UserError(f"{' and '.join(missing)} must be given, unless with --check")
    parallel.initialize(arguments.coordinator, arguments.num_processes, arguments.process_id)
    parallel.end_at_sigterm()  # what is finished is kept
    with parallel.ending_together():
        prepare(arguments.data, arguments.checkpoint, arguments.out, options)


class _Module(types.ModuleType):
    """Lets `tj.prepare(…)` stay a function: importing this module puts it in the place of that name."""

    def __call__(self, *arguments: Any, **fields: Any) -> dict[str, Any]:
        from tortoise_jax import commands

        return commands.prepare(*arguments, **fields)


sys.modules[__name__].__class__ = _Module


if __name__ == "__main__":
    exit_with_one_line(main)
