"""Recordings and transcripts to a data set.

python -m tortoise_jax.prepare --data VOICE --checkpoint DIR --out DATASET
"""

from __future__ import annotations

import argparse
import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from tortoise_jax import parallel
from tortoise_jax.audio import SAMPLE_RATE, SAMPLES_PER_CODE, SILENT_DB
from tortoise_jax.checkpoints.parts import AR
from tortoise_jax.checkpoints.pretrained import Pretrained, load_pretrained, mel_norms_digest
from tortoise_jax.data import dataset, report, shards
from tortoise_jax.data.filters import Verdict, judge
from tortoise_jax.data.manifests import FORMATS, Input, read_inputs
from tortoise_jax.data.recordings import MIN_SECONDS, Hearing, Sound
from tortoise_jax.data.shards import Encoded
from tortoise_jax.data.sources import GROUP, encode_all, listen_to_all, sources_of
from tortoise_jax.data.splits import TRAIN, VALIDATION_PART, assign_splits
from tortoise_jax.errors import UserError, did_you_mean, exit_with_one_line
from tortoise_jax.models.unified_voice import UnifiedVoiceConfig
from tortoise_jax.text.tokenizer import CLEANERS, Tokenizer

MAX_SECONDS, MAX_TEXT, MAX_REJECTED = 11.6, 200, 0.2  # the first two: DLAS's


@dataclasses.dataclass(frozen=True)
class Options:
    """What can be chosen. None: format as recognised; limits as DLAS's, or less where the model holds less; the
    checkpoint's tokenizer; a worker a processor."""

    format: str | None = None
    max_seconds: float | None = None
    max_text: int | None = None
    max_rejected: float = MAX_REJECTED
    trim_silence: bool = False
    cleaner: str = "english"
    tokenizer: Path | None = None
    validation: float = VALIDATION_PART
    seed: int = 0
    workers: int | None = None
    group: int = GROUP

    def check(self) -> None:
        """Raises UserError for what cannot be."""
        ranges = {
            "max_rejected": (0, 1),
            "validation": (0, 0.9),
            "max_seconds": (MIN_SECONDS, 3600),
            "max_text": (1, 10_000),
            "workers": (0, 1024),
            "seed": (0, 2**31),
            "group": (1, 2**20),
        }
        if self.cleaner not in CLEANERS:
            near = did_you_mean(self.cleaner, CLEANERS)
            raise UserError(f"--cleaner {self.cleaner}: there is none{near}, choose {', '.join(CLEANERS)}")
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UserError(f"--{name} {value}: expected {low} to {high}")


Paths = str | Path | Sequence[str | Path]


def prepare(data: Paths, checkpoint: str | Path, out: str | Path, options: Options = Options()) -> dict[str, Any]:
    """Makes the data set `out` from one or several inputs and returns its report; every host of a run calls it alike.

    What earlier runs have finished is kept. Raises UserError for whatever is wrong, and where more than
    `max_rejected` of the lines are rejected.
    """
    options.check()
    out = Path(out)
    check_out(out)
    inputs = read_inputs(_paths(data), options.format)
    pretrained = load_pretrained(checkpoint, parts=("dvae",))
    tokenizer = choose_tokenizer(options.tokenizer, pretrained.tokenizer, ar_config(pretrained))
    limits = limits_of(ar_config(pretrained), options)
    sources, places = sources_of([line for one in inputs for line in one.lines])
    hearing = Hearing(limits.seconds, options.trim_silence)
    encoded, keys = encode_all(out, sources, pretrained, hearing, options.workers, options.group)
    made = assess(inputs, places, [one.sound for one in encoded], tokenizer, limits, options)
    if parallel.is_main():
        print(report.table(made.report))
        report.write_report(out, made.report, made.verdict, dataclasses.asdict(limits) | {"loudness_db": SILENT_DB})
    check_rejected(made, options.max_rejected, f"{out / report.REJECTED} lists every one")
    if parallel.is_main():
        write_dataset(out, made, encoded, pretrained, tokenizer, options)
        shards.remove_others(out, keys, {one.shard for one in encoded})
        print(f"written: {out} ({report.REPORT}, {report.REJECTED} and {report.PICTURE} say what is in it)")
    parallel.wait_for_all("prepare: written")
    return made.report


def check(data: Paths, checkpoint: str | Path | None, options: Options = Options()) -> dict[str, Any]:
    """The report of `prepare` without encoding or writing anything; without a checkpoint, for the released model."""
    options.check()
    inputs = read_inputs(_paths(data), options.format)
    pretrained = load_pretrained(checkpoint, parts=()) if checkpoint else None
    config = ar_config(pretrained) if pretrained else RELEASED
    tokenizer = choose_tokenizer(options.tokenizer, pretrained.tokenizer if pretrained else Tokenizer.default(), config)
    limits = limits_of(config, options)
    sources, places = sources_of([line for one in inputs for line in one.lines])
    sounds = listen_to_all(sources, Hearing(limits.seconds, options.trim_silence), options.workers)
    made = assess(inputs, places, sounds, tokenizer, limits, options)
    if parallel.is_main():
        print("\n".join(filter(None, (report.listing(made.verdict.rejected), report.table(made.report)))))
    check_rejected(made, options.max_rejected, "they are listed above")
    return made.report


# --- what is asked for ------------------------------------------------------------------------------------------------

RELEASED = UnifiedVoiceConfig(30, 1024, 16, 256, 8194, 404, 608)


@dataclasses.dataclass(frozen=True)
class Limits:
    seconds: float
    text_tokens: int


def limits_of(config: UnifiedVoiceConfig | None, options: Options) -> Limits:
    """The limits asked for, or DLAS's where the position tables hold as much. Raises UserError where they do not."""
    if config is None:  # a dVAE alone
        return Limits(options.max_seconds or MAX_SECONDS, options.max_text or MAX_TEXT)
    # Start and stop take a position each; n codes are what up to 1024 n - 1 samples have.
    seconds = int(((config.mel_positions - 2) * SAMPLES_PER_CODE - 1) / SAMPLE_RATE * 100) / 100
    tokens = config.text_positions - 2
    for flag, asked, held in (("max_seconds", options.max_seconds, seconds), ("max_text", options.max_text, tokens)):
        if asked is not None and asked > held:
            raise UserError(f"--{flag} {asked:g}: the position table of the checkpoint's AR model holds {held:g}")
    return Limits(options.max_seconds or min(MAX_SECONDS, seconds), options.max_text or min(MAX_TEXT, tokens))


def choose_tokenizer(file: Path | None, of_checkpoint: Tokenizer, config: UnifiedVoiceConfig | None) -> Tokenizer:
    """The tokenizer of one's own, which must fill the checkpoint's text table, or the checkpoint's."""
    if file is None:
        return of_checkpoint
    tokenizer = Tokenizer.from_file(file)
    if config is not None and tokenizer.vocab_size != config.text_tokens - 1:
        raise UserError(
            f"{file}: {tokenizer.vocab_size} tokens, expected {config.text_tokens - 1}: the checkpoint's text table "
            f"has {config.text_tokens} rows, one of them the start token, and cannot be resized yet; train a "
            f"tokenizer with a vocabulary of {config.text_tokens - 1}"
        )
    return tokenizer


def ar_config(pretrained: Pretrained) -> UnifiedVoiceConfig | None:
    """Dimensions of the AR model; None in a checkpoint of a dVAE alone."""
    return pretrained.ar.config if AR in pretrained.parts else None


def check_out(out: Path) -> None:
    """Raises UserError where a data set would be mixed with something else."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; --out must be a folder, or the name of a new one")
    if not out.is_dir() or dataset.is_dataset(out) or (out / shards.FINISHED).is_dir():
        return
    if any(path.name != dataset.SHARDS for path in out.iterdir()):  # with shards alone, the first group was interrupted
        raise UserError(f"{out}: holds other files and no data set; choose a new or empty folder for --out")


def _paths(data: Paths) -> list[Path]:
    return [Path(path) for path in ([data] if isinstance(data, (str, Path)) else data)]


# --- judged -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Assessed:
    verdict: Verdict
    splits: list[str]
    report: dict[str, Any]


def assess(
    inputs: Sequence[Input],
    places: Sequence[int | None],
    sounds: Sequence[Sound],
    tokenizer: Tokenizer,
    limits: Limits,
    options: Options,
) -> Assessed:
    """Which lines are kept, in which split, and the report; nothing of it depends on how or when sounds were heard."""
    lines = [line for one in inputs for line in one.lines]
    verdict = judge(lines, places, sounds, tokenizer, options.cleaner, limits.text_tokens)
    kept = verdict.kept
    speakers, given = [one.line.speaker for one in kept], [one.line.split for one in kept]
    splits = assign_splits(speakers, [one.cleaned for one in kept], given, options.seed, options.validation)
    trained = Counter(speaker for speaker, split in zip(speakers, splits, strict=True) if split == TRAIN)
    alone = sum(count == 1 for count in trained.values())
    settings = dataclasses.asdict(limits) | {"cleaner": options.cleaner, "tokenizer_digest": tokenizer.digest}
    chosen = ("trim_silence", "max_rejected", "validation", "seed")
    settings |= {name: getattr(options, name) for name in chosen}
    return Assessed(verdict, splits, report.make_report(inputs, verdict, splits, alone, settings))


def check_rejected(made: Assessed, max_rejected: float, where: str) -> None:
    """Raises UserError where more than a part of the lines is rejected, or all of them."""
    rejected, total = len(made.verdict.rejected), made.report["lines"]
    if made.verdict.kept and rejected <= max_rejected * total:
        return
    reason, amount = max(made.report["reasons"].items(), key=lambda item: item[1]["lines"])
    example = next(one for one in made.verdict.rejected if one.reason == reason)
    raise UserError(
        f"{rejected} of {total} lines are rejected ({rejected / total:.0%}, at most {max_rejected:.0%} by "
        f"--max_rejected); the commonest reason is {reason} ({amount['lines']}), e.g. {example.line.where}: "
        f"{example.line.audio}: {example.detail}; {where}; no data set was written"
    )


# --- written ----------------------------------------------------------------------------------------------------------


def write_dataset(
    out: Path,
    made: Assessed,
    encoded: Sequence[Encoded],
    pretrained: Pretrained,
    tokenizer: Tokenizer,
    options: Options,
) -> None:
    """The index of what was kept, in the order of the lines."""
    digests = {
        "dvae_digest": pretrained.dvae.digest,
        "tokenizer_digest": tokenizer.digest,
        "mel_norms_digest": mel_norms_digest(pretrained.mel_norms),
    }
    own = options.tokenizer is not None
    about = digests | {"cleaner": options.cleaner, "seed": options.seed, "own_tokenizer": own}
    text_ids = [np.array(kept.text_ids, np.uint16) for kept in made.verdict.kept]
    dataset.write_index(out, clips_of(made, encoded), text_ids, tokenizer, about)


def clips_of(made: Assessed, encoded: Sequence[Encoded]) -> list[dataset.Clip]:
    """A name that was there before gets a number."""
    seen: Counter[str] = Counter()
    clips = []
    for kept, split in zip(made.verdict.kept, made.splits, strict=True):
        record, line = encoded[kept.place], kept.line
        seen[line.id] += 1
        clips.append(
            dataset.Clip(
                id=line.id if seen[line.id] == 1 else f"{line.id}#{seen[line.id]}",
                text=line.text,
                speaker=line.speaker,
                split=split,
                samples=record.sound.samples,
                text_tokens=len(kept.text_ids),
                codes=record.codes,
                shard=record.shard,
                offset=record.offset,
                codes_crc32=record.codes_crc32,
                waveform_crc32=record.waveform_crc32,
            )
        )
    return clips


# --- command line -----------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """One line instead of a page of usage where something is wrong."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help lists what there is")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    formats = "\n".join(f"  {name:12} {entry.description}" for name, entry in FORMATS.items())
    parser = Parser(
        prog="python -m tortoise_jax.prepare",
        description="Turns recordings (wav, flac, ogg, mp3) and transcripts into a data set to train on.",
        epilog=f"formats:\n{formats}\n\nRun again after an interruption or with more recordings: what is done stays.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
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
        "max_seconds": {"type": float, "metavar": "S", "help": f"longest clip (default {MAX_SECONDS})"},
        "max_text": {"type": int, "metavar": "N", "help": f"most tokens of a text (default {MAX_TEXT})"},
        "max_rejected": {
            "type": float,
            "metavar": "PART",
            "help": f"fail if more is rejected (default {MAX_REJECTED})",
        },
        "trim_silence": {"action": "store_true", "help": "cut silence off both ends of clips, but for 0.1 s"},
        "cleaner": {"metavar": "NAME", "help": "english (default; spells numbers, drops accents), basic or none"},
        "tokenizer": {"type": Path, "metavar": "FILE", "help": "a BPE of one's own, as large as the checkpoint's"},
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
    prepare(arguments.data, arguments.checkpoint, arguments.out, options)


if __name__ == "__main__":
    exit_with_one_line(main)
