"""Recordings and transcripts to a data set: python -m tortoise_jax.prepare --data VOICE --checkpoint DIR --out DATASET"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from tortoise_jax import dataset, parallel, shards, splits
from tortoise_jax.atomic import write_atomically
from tortoise_jax.audio import SAMPLE_RATE
from tortoise_jax.checkpoint import Pretrained, load_pretrained, mel_norms_digest
from tortoise_jax.encoding import CodeEncoder
from tortoise_jax.errors import UserError, exit_with_one_line
from tortoise_jax.judging import Kept, Verdict, judge
from tortoise_jax.manifests import Line, read_inputs
from tortoise_jax.recordings import Recording, Sound, Span, listen_ahead
from tortoise_jax.shards import Content, Encoded

MAX_SECONDS, MAX_TEXT, MAX_REJECTED = 11.6, 200, 0.2
GROUP = 512  # sounds a shard: what a killed run loses at most


@dataclasses.dataclass(frozen=True)
class Options:
    """What is chosen on the command line; None: see there."""

    format: str | None = None
    max_seconds: float | None = None
    max_text: int | None = None
    max_rejected: float = MAX_REJECTED
    cleaner: str = "english"
    seed: int = 0
    workers: int | None = None
    group: int = GROUP


def prepare(
    data: str | Path | Sequence[str | Path], checkpoint: str | Path, out: str | Path, options: Options = Options()
) -> None:
    """Makes the data set `out` from one or several inputs; every host of a run calls it alike.

    What earlier runs have finished is kept. Raises UserError for anything wrong, a data set that is mostly rejected too.
    """
    inputs = [Path(path) for path in ([data] if isinstance(data, (str, Path)) else data)]
    out = Path(out)
    lines = read_inputs(inputs, options.format)
    pretrained = load_pretrained(checkpoint, parts=("dvae",))
    limits = limits_of(pretrained, options)
    sources, places = sources_of(lines)
    encoded, keys = encode_all(out, sources, pretrained, limits, options)
    parallel.wait_for_all("prepare: encoded")
    verdict = judge(
        lines, places, [one.sound for one in encoded], pretrained.tokenizer, options.cleaner, limits.max_text
    )
    check_rejected(verdict, options.max_rejected)
    if parallel.is_main():
        write_dataset(out, verdict, encoded, pretrained, options)
        shards.remove_others(out, keys, {one.shard for one in encoded})
    parallel.wait_for_all("prepare: written")


@dataclasses.dataclass(frozen=True)
class Limits:
    max_seconds: float
    max_text: int


def limits_of(pretrained: Pretrained, options: Options) -> Limits:
    return Limits(options.max_seconds or MAX_SECONDS, options.max_text or MAX_TEXT)


def sources_of(lines: Sequence[Line]) -> tuple[list[tuple[Path, Span]], list[int]]:
    """Distinct (file, span) in order of their first line, and for each line which of them is its."""
    number: dict[tuple[Path, Span], int] = {}
    places = []
    for line in lines:
        span = None if line.start is None or line.end is None else (line.start, line.end)
        places.append(number.setdefault((line.audio, span), len(number)))
    return list(number), places


def grouped(sources: Sequence[tuple[Path, Span]], size: int) -> list[list[Recording]]:
    """Sources cut into groups of so many, neighbouring spans of a file put together so that it is decoded once."""
    groups = []
    for start in range(0, len(sources), size):
        group: list[Recording] = []
        for path, span in sources[start : start + size]:
            if group and group[-1].path == path:
                group[-1] = Recording(path, (*group[-1].spans, span))
            else:
                group.append(Recording(path, (span,)))
        groups.append(group)
    return groups


def encode_all(
    out: Path, sources: Sequence[tuple[Path, Span]], pretrained: Pretrained, limits: Limits, options: Options
) -> tuple[list[Encoded], set[str]]:
    """Everything heard and encoded, in order, and the keys of its groups; this host does every n-th missing group."""
    codes_key = shards.digest_of([pretrained.dvae_digest, mel_norms_digest(pretrained.mel_norms), SAMPLE_RATE])
    settings = {"codes": codes_key, "max_seconds": limits.max_seconds}
    groups = grouped(sources, options.group)
    keys = [shards.group_key(group, settings) for group in groups]
    mine = range(parallel.process_index(), len(groups), parallel.process_count())
    missing = [i for i in mine if shards.read_group(out, keys[i]) is None]
    if missing:
        encode_groups(out, {i: (keys[i], groups[i]) for i in missing}, codes_key, pretrained, limits, options)
    parallel.wait_for_all("prepare: groups")
    encoded = []
    for key in keys:
        group = shards.read_group(out, key)
        if group is None:
            raise UserError(f"{out}: a shard vanished or changed while the data set was made; run again")
        encoded += group
    return encoded, set(keys)


def encode_groups(
    out: Path,
    groups: dict[int, tuple[str, list[Recording]]],
    codes_key: str,
    pretrained: Pretrained,
    limits: Limits,
    options: Options,
) -> None:
    encoder = CodeEncoder(pretrained.dvae_config, pretrained.dvae_params, pretrained.mel_norms)
    known = shards.reusable(out, codes_key)
    workers = os.cpu_count() or 1 if options.workers is None else options.workers
    total = sum(len(recording.spans) for _, group in groups.values() for recording in group)
    heard_groups = listen_ahead((g for _, g in groups.values()), limits.max_seconds, frozenset(known), workers)
    with tqdm(total=total, unit="clip", desc="encoding", disable=not parallel.is_main()) as bar:
        for (number, (key, _)), heard in zip(groups.items(), heard_groups, strict=True):
            sounds: list[Sound] = []
            contents: list[Content | None] = []
            fresh = []
            for item in heard:
                if isinstance(item, str):
                    sounds.append(known[item].sound)
                    contents.append(shards.read_content(out, known[item]))
                else:
                    sounds.append(item[0])
                    contents.append(None)
                    if item[1] is not None:
                        fresh.append((len(sounds) - 1, item[1]))
            for (place, waveform), codes in zip(fresh, encoder.encode([w for _, w in fresh]), strict=True):
                contents[place] = Content(codes, waveform)
            shards.write_group(out, number, key, codes_key, sounds, contents)
            bar.update(len(sounds))


def check_rejected(verdict: Verdict, max_rejected: float) -> None:
    total = len(verdict.kept) + len(verdict.rejected)
    if not verdict.kept:
        raise UserError(f"no clip is left of {total} lines")
    if len(verdict.rejected) > max_rejected * total:
        raise UserError(f"{len(verdict.rejected)} of {total} lines are rejected")


def write_dataset(
    out: Path, verdict: Verdict, encoded: Sequence[Encoded], pretrained: Pretrained, options: Options
) -> None:
    kept = verdict.kept
    split = splits.assign_splits(
        [one.line.speaker for one in kept],
        [one.cleaned for one in kept],
        [one.line.split for one in kept],
        options.seed,
    )
    clips = [clip_of(one, encoded[one.place], where) for one, where in zip(kept, split, strict=True)]
    seconds = {
        name: round(sum(c.samples for c in clips if c.split == name) / SAMPLE_RATE, 3) for name in dataset.SPLITS
    }
    text_ids = np.concatenate([np.array(one.text_ids, "<u2") for one in kept]).tobytes()
    lines = "".join(json.dumps(dataclasses.asdict(clip), ensure_ascii=False) + "\n" for clip in clips).encode()
    header: dict[str, Any] = {
        "format": dataset.FORMAT,
        "dvae_digest": pretrained.dvae_digest,
        "tokenizer_digest": pretrained.tokenizer.digest,
        "mel_norms_digest": mel_norms_digest(pretrained.mel_norms),
        "cleaner": options.cleaner,
        "seed": options.seed,
        "clips": {name: sum(clip.split == name for clip in clips) for name in dataset.SPLITS},
        "seconds": seconds,
        "speakers": len({clip.speaker for clip in clips}),
        "sha256": {dataset.CLIPS: dataset.sha256(lines), dataset.TEXT_IDS: dataset.sha256(text_ids)},
    }
    write_atomically(out / dataset.CLIPS, lines)
    write_atomically(out / dataset.TEXT_IDS, text_ids)
    write_atomically(out / dataset.TOKENIZER, pretrained.tokenizer.to_json())
    write_atomically(out / dataset.HEADER, json.dumps(header, indent=2) + "\n")


def clip_of(kept: Kept, encoded: Encoded, split: str) -> dataset.Clip:
    import zlib

    return dataset.Clip(
        id=kept.line.id,
        text=kept.line.text,
        speaker=kept.line.speaker,
        split=split,
        samples=encoded.sound.samples,
        text_tokens=len(kept.text_ids),
        codes=encoded.codes,
        shard=encoded.shard,
        offset=encoded.offset,
        text_crc32=zlib.crc32(np.array(kept.text_ids, "<u2").tobytes()),
        codes_crc32=encoded.codes_crc32,
        waveform_crc32=encoded.waveform_crc32,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tortoise_jax.prepare", description=__doc__)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    prepare(arguments.data, arguments.checkpoint, arguments.out)


if __name__ == "__main__":
    exit_with_one_line(main)
