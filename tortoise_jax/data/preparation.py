"""Recordings and transcripts to a data set: read, measure and encode, filter, split, report, write."""

from __future__ import annotations

import dataclasses
import typing
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tortoise_jax import parallel
from tortoise_jax.audio import MIN_SECONDS, SAMPLE_RATE, SAMPLES_PER_CODE, SILENT_DB, channel_of
from tortoise_jax.checkpoints.parts import AR
from tortoise_jax.checkpoints.pretrained import Pretrained, load_pretrained, mel_norms_digest
from tortoise_jax.data import dataset, report, shards, transcription
from tortoise_jax.data.clips import Clip
from tortoise_jax.data.filters import MAX_SECONDS, MAX_TEXT, ClipLimits, Reason, filter_clips
from tortoise_jax.data.groups import GROUP, encode_all, measure_all, recordings_of, with_sounds
from tortoise_jax.data.manifests import Input, read_inputs
from tortoise_jax.data.splits import TRAIN, VALIDATION, VALIDATION_PART, assign_splits, moved_to_validation
from tortoise_jax.errors import UserError
from tortoise_jax.files import LOCK, is_partial
from tortoise_jax.models.unified_voice import RELEASED, UnifiedVoiceConfig
from tortoise_jax.text.cleaners import DEFAULT, check_cleaner, record
from tortoise_jax.text.tokenizer import Tokenizer

MAX_REJECTED = 0.2


@dataclasses.dataclass(frozen=True)
class Options:
    """The choices of a preparation, named as the flags of the command line.

    None stands for: the recognised format; DLAS's limits, or the model's where it holds less; the checkpoint's
    tokenizer; existing transcripts; the detected language; one worker per processor.
    """

    format: str | None = None
    max_seconds: float | None = None
    max_text: int | None = None
    max_rejected: float = MAX_REJECTED
    trim_silence: bool = False
    channel: int | str = 1
    cleaner: str = DEFAULT
    tokenizer: str | Path | None = None
    validation: float = VALIDATION_PART
    seed: int = 0
    transcribe: str | Path | None = None
    language: str | None = None
    workers: int | None = None
    group: int = GROUP

    def check(self) -> None:
        """Raises UserError for a value of another type or out of its range."""
        for name, hint in typing.get_type_hints(Options).items():
            value, numbers = getattr(self, name), hint | int if float in (hint, *typing.get_args(hint)) else hint
            if not isinstance(value, numbers) or (isinstance(value, bool) and hint is not bool):
                raise UserError(f"--{name} is {value!r}, expected {getattr(hint, '__name__', hint)}")
        ranges = {
            "max_rejected": (0, 1),
            "validation": (0, 0.9),
            "max_seconds": (MIN_SECONDS, 3600),
            "max_text": (1, 10_000),
            "workers": (0, 1024),
            "seed": (0, 2**31 - 1),
            "group": (1, 2**20),
        }
        check_cleaner(self.cleaner, "--cleaner")
        channel_of(self.channel, "--channel")
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UserError(f"--{name} {value}: expected {low} to {high}")


Paths = str | Path | Sequence[str | Path]


def prepare(
    data: Paths, checkpoint: str | Path | Pretrained, out: str | Path, options: Options = Options()
) -> dict[str, Any]:
    """Makes the data set `out` from one or several inputs and returns its report; every host of a run calls it alike.

    checkpoint: where it is, or one loaded with its dVAE. What earlier runs have finished in `out` is reused. Raises
    UserError for whatever is wrong, and if a larger part of the clips than `max_rejected` is rejected.
    """
    options.check()
    out = Path(out)
    check_out(out)
    paths = _paths(data)
    if options.transcribe is not None:
        paths = [transcribed(paths, out, options)]
    inputs = read_inputs(paths, options.format)
    check_inputs(out, inputs)
    with parallel.alone_in(out, "--out"):
        return prepare_inputs(inputs, checkpoint, out, options)


def transcribed(paths: Sequence[Path], out: Path, options: Options) -> Path:
    """The file of what is said in the recordings, beside the data set: made now, or added to."""
    file = out.with_name(f"{out.name}-transcripts.jsonl")
    longest = options.max_seconds or MAX_SECONDS
    model = Path(options.transcribe or "")
    listening = transcription.Listening(model, options.language, longest, channel_of(options.channel))
    parallel.on_main(lambda: transcription.transcribe(paths, file, listening))
    return file


def prepare_inputs(
    inputs: Sequence[Input], checkpoint: str | Path | Pretrained, out: Path, options: Options
) -> dict[str, Any]:
    """`prepare` of inputs that are read, in a folder that is this run's."""
    pretrained = checkpoint if isinstance(checkpoint, Pretrained) else load_pretrained(checkpoint, parts=("dvae",))
    tokenizer = choose_tokenizer(options.tokenizer, pretrained.tokenizer, ar_config(pretrained))
    limits = limits_of(ar_config(pretrained), options)
    clips = [clip for one in inputs for clip in one.clips]
    sounds, keys = encode_all(out, recordings_of(clips), pretrained, limits, options.workers, options.group)
    found = assess(inputs, with_sounds(clips, sounds), tokenizer, limits, options)
    if parallel.is_main():
        print(report.table(found.report))
        drawn = {"seconds": limits.seconds, "text_tokens": limits.text_tokens, "loudness_db": SILENT_DB}
        report.write_report(out, found.report, found.kept, found.rejected, drawn)
    check_rejected(found, options.max_rejected, f"{out / report.REJECTED} lists every one")
    if parallel.is_main():
        write_dataset(out, inputs, found.kept, pretrained, tokenizer, options)
        shards.remove_others(out, keys, {sound.shard for sound in sounds})
        print(f"written: {out} ({report.REPORT}, {report.REJECTED} and {report.PICTURE} say what is in it)")
    parallel.wait_for_all("prepare: written")
    return found.report


def check(data: Paths, checkpoint: str | Path | None, options: Options = Options()) -> dict[str, Any]:
    """The report of `prepare` without encoding or writing anything; without a checkpoint, for the released model."""
    options.check()
    if options.transcribe is not None:
        raise UserError("--check with --transcribe: transcripts are written beside --out, so leave one of them out")
    inputs = read_inputs(_paths(data), options.format)
    pretrained = load_pretrained(checkpoint, parts=()) if checkpoint else None
    config = ar_config(pretrained) if pretrained else RELEASED
    tokenizer = choose_tokenizer(options.tokenizer, pretrained.tokenizer if pretrained else Tokenizer.default(), config)
    limits = limits_of(config, options)
    clips = [clip for one in inputs for clip in one.clips]
    sounds = measure_all(recordings_of(clips), limits, options.workers)
    found = assess(inputs, with_sounds(clips, sounds), tokenizer, limits, options)
    if parallel.is_main():
        print("\n".join(filter(None, (report.listing(found.rejected), report.table(found.report)))))
    check_rejected(found, options.max_rejected, "they are listed above")
    return found.report


# --- what is asked for ------------------------------------------------------------------------------------------------


def limits_of(config: UnifiedVoiceConfig | None, options: Options) -> ClipLimits:
    """The limits asked for; else DLAS's, or what the position tables hold if that is less.

    Raises UserError if more is asked for than they hold.
    """
    trim, channel = options.trim_silence, channel_of(options.channel)
    if config is None:  # a dVAE alone
        return ClipLimits(options.max_seconds or MAX_SECONDS, options.max_text or MAX_TEXT, trim, channel)
    # Start and stop take one position each; a clip of up to 1024 n - 1 samples has n codes.
    seconds = int(((config.mel_positions - 2) * SAMPLES_PER_CODE - 1) / SAMPLE_RATE * 100) / 100
    tokens = config.text_positions - 2
    for flag, asked, held in (("max_seconds", options.max_seconds, seconds), ("max_text", options.max_text, tokens)):
        if asked is not None and asked > held:
            raise UserError(f"--{flag} {asked:g}: the position table of the checkpoint's AR model holds {held:g}")
    seconds, tokens = options.max_seconds or min(MAX_SECONDS, seconds), options.max_text or min(MAX_TEXT, tokens)
    return ClipLimits(seconds, tokens, trim, channel)


def choose_tokenizer(file: str | Path | None, of_checkpoint: Tokenizer, config: UnifiedVoiceConfig | None) -> Tokenizer:
    """The user's own tokenizer, or the checkpoint's."""
    if file is None:
        return of_checkpoint
    tokenizer = Tokenizer.from_file(file)
    if config is not None and tokenizer.digest != of_checkpoint.digest:
        parallel.say(
            f"tokenizer: {file}, {tokenizer.vocab_size} tokens; the checkpoint has {config.text_tokens - 1} others, so "
            "train.py changes its text tables"
        )
    return tokenizer


def ar_config(pretrained: Pretrained) -> UnifiedVoiceConfig | None:
    """Dimensions of the AR model; None in a checkpoint of a dVAE alone."""
    return pretrained.ar.config if AR in pretrained.parts else None


def check_out(out: Path) -> None:
    """Raises UserError where a data set would be mixed with something else."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; --out must be a folder, or the name of a new one")
    if not out.is_dir() or dataset.is_dataset(out):
        return
    # What interrupted preparations leave, and those that rejected too many clips.
    known = {LOCK, shards.FINISHED, dataset.SHARDS}
    if report.is_report(out / report.REPORT):
        known |= {report.REPORT, report.REJECTED, report.PICTURE, dataset.CLIPS, dataset.TEXT_IDS, dataset.TOKENIZER}
    others = [path for path in sorted(out.iterdir()) if path.name not in known and not is_partial(path)]
    others += shards.not_ours(out)
    if others:
        raise UserError(
            f"{out}: holds other files and no data set, e.g. {others[0].relative_to(out)}; choose a new or empty "
            "folder for --out"
        )


def check_inputs(out: Path, inputs: Sequence[Input]) -> None:
    """Raises UserError where a data set would be replaced by one of other recordings; more of them may be added."""
    paths, digests = {str(i.path.resolve()) for i in inputs}, {i.digest for i in inputs}
    before = dataset.inputs_of(out)
    gone = [i["path"] for i in before if i["path"] not in paths and i["digest"] not in digests]
    if gone:
        raise UserError(
            f"{out} holds a data set of {', '.join(gone)}, which --data does not name: it would be replaced; name that "
            "too, choose another --out, or remove the data set"
        )


def _paths(data: Paths) -> list[Path]:
    return [Path(path) for path in ([data] if isinstance(data, (str, Path)) else data)]


# --- kept, rejected, split --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Assessed:
    """kept: clips with their final id and split; rejected: clips with their reason; report: all of it counted."""

    kept: list[Clip]
    rejected: list[Clip]
    report: dict[str, Any]


def assess(
    inputs: Sequence[Input], clips: Sequence[Clip], tokenizer: Tokenizer, limits: ClipLimits, options: Options
) -> Assessed:
    """Which measured clips are kept, in which split, and the report. Depends on the clips and their order alone."""
    kept, rejected = filter_clips(clips, tokenizer, options.cleaner, limits.text_tokens)
    given = [clip.split for clip in kept]
    splits = assign_splits(
        [clip.speaker for clip in kept], [clip.cleaned for clip in kept], given, options.seed, options.validation
    )
    kept = [
        dataclasses.replace(clip, id=id_, split=split)
        for clip, id_, split in zip(kept, unique_ids(kept), splits, strict=True)
    ]
    trained = Counter(clip.speaker for clip in kept if clip.split == TRAIN)
    alone = sum(count == 1 for count in trained.values())
    settings = {
        "seconds": limits.seconds,
        "text_tokens": limits.text_tokens,
        "cleaner": options.cleaner,
        "tokenizer_digest": tokenizer.digest,
        "trim_silence": options.trim_silence,
        "channel": channel_of(options.channel),
        "max_rejected": options.max_rejected,
        "validation": options.validation,
        "seed": options.seed,
    }
    moved = moved_to_validation(splits, given)
    part = None if VALIDATION in given else options.validation
    return Assessed(kept, rejected, report.make_report(inputs, kept, rejected, moved, alone, part, settings))


def unique_ids(clips: Sequence[Clip]) -> list[str]:
    """The clips' ids; an id that an earlier clip has gets a number, as in "name#2"."""
    seen: Counter[str] = Counter()
    ids = []
    for clip in clips:
        seen[clip.id] += 1
        ids.append(clip.id if seen[clip.id] == 1 else f"{clip.id}#{seen[clip.id]}")
    return ids


def check_rejected(found: Assessed, max_rejected: float, where: str) -> None:
    """Raises UserError if a larger part of the clips than `max_rejected` is rejected, or all of them."""
    rejected, total = len(found.rejected), found.report["lines"]
    if found.kept and rejected <= max_rejected * total:
        return
    reason, amount = max(found.report["reasons"].items(), key=lambda item: item[1]["lines"])
    example = next(clip for clip in found.rejected if clip.reason == reason)
    named = reason != Reason.MALFORMED and example.audio != Path(example.file)
    recording = f"{example.audio}: " if named else ""
    raise UserError(
        f"{rejected} of {total} lines are rejected ({rejected / total:.0%}, at most {max_rejected:.0%} by "
        f"--max_rejected); the commonest reason is {reason} ({amount['lines']}), e.g. {example.where}: "
        f"{recording}{example.detail}; {where}; no data set was written"
    )


def write_dataset(
    out: Path,
    inputs: Sequence[Input],
    clips: Sequence[Clip],
    pretrained: Pretrained,
    tokenizer: Tokenizer,
    options: Options,
) -> None:
    """The index of the kept clips, in the order of the inputs' lines."""
    digests = {
        "dvae_digest": pretrained.dvae.digest,
        "tokenizer_digest": tokenizer.digest,
        "mel_norms_digest": mel_norms_digest(pretrained.mel_norms),
    }
    own = options.tokenizer is not None
    about: dict[str, Any] = digests | record(options.cleaner) | {"seed": options.seed, "own_tokenizer": own}
    about["inputs"] = [{"path": str(i.path.resolve()), "format": i.format, "digest": i.digest} for i in inputs]
    dataset.write_index(out, clips, tokenizer, about)
