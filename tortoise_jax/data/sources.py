"""Every recording heard and encoded once: in groups that hosts share, resumed where an earlier run ended."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tortoise_jax import parallel
from tortoise_jax.audio import HOP, N_FFT, SAMPLE_RATE
from tortoise_jax.checkpoints.pretrained import Pretrained, mel_norms_digest
from tortoise_jax.data import shards
from tortoise_jax.data.encoding import CodeEncoder
from tortoise_jax.data.manifests import Line
from tortoise_jax.data.recordings import Heard, Hearing, Recording, Sound, Span, listen, listen_ahead
from tortoise_jax.data.shards import Content, Encoded
from tortoise_jax.errors import UserError

GROUP = 512  # sounds a shard: the most that a killed run loses, an hour of audio
FEW = 64  # so few files are decoded sooner than worker processes have started


Source = tuple[Path, Span]


def sources_of(lines: Sequence[Line]) -> tuple[list[Source], list[int | None]]:
    """Distinct sources in order of their first line, and for each line which of them is its; None where it has none."""
    number: dict[Source, int] = {}
    places: list[int | None] = []
    for line in lines:
        span = None if line.start is None or line.end is None else (line.start, line.end)
        places.append(None if line.reason else number.setdefault((line.audio, span), len(number)))
    return list(number), places


def grouped(sources: Sequence[Source], size: int) -> list[list[Recording]]:
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


def workers_for(groups: Sequence[list[Recording]], workers: int | None) -> int:
    """As many as asked for, else one a processor, or none where there is little to do."""
    if workers is not None:
        return workers
    return (os.cpu_count() or 1) if sum(map(len, groups)) > FEW else 0


def listen_to_all(sources: Sequence[Source], hearing: Hearing, workers: int | None) -> list[Sound]:
    """Every source measured, none encoded."""
    groups = grouped(sources, FEW)
    heard = listen_ahead(groups, hearing, frozenset(), workers_for(groups, workers))
    sounds: list[Sound] = []
    with Progress(len(sources), "listening") as progress:
        for group in heard:
            sounds += [item[0] for item in group if not isinstance(item, str)]
            progress.add(sounds[-len(group) :])
    return sounds


def encode_all(
    out: Path,
    sources: Sequence[Source],
    pretrained: Pretrained,
    hearing: Hearing,
    workers: int | None = None,
    group_size: int = GROUP,
) -> tuple[list[Encoded], set[str]]:
    """Everything heard and encoded, in order, and the keys of its groups.

    Each host does its share of what is missing; all of them return the same.
    """
    audio = [SAMPLE_RATE, N_FFT, HOP, mel_norms_digest(pretrained.mel_norms)]
    codes_key = shards.digest_of([shards.LAYOUT, pretrained.dvae.digest, audio])
    groups = grouped(sources, group_size)
    keys = [shards.group_key(group, {"codes": codes_key, "hearing": dataclasses.asdict(hearing)}) for group in groups]
    parallel.check_same_everywhere("what is prepared (recordings, checkpoint or options)", keys)
    mine = range(parallel.process_index(), len(groups), parallel.process_count())
    missing = {i: (keys[i], groups[i]) for i in mine if shards.read_group(out, keys[i], verify=True) is None}
    if missing:
        encode_groups(out, missing, codes_key, pretrained, hearing, workers)
    parallel.wait_for_all("prepare: encoded")
    encoded: list[Encoded] = []
    for key in keys:
        group = shards.read_group(out, key)
        if group is None:
            raise UserError(f"{out / shards.FINISHED}/{key}.json or its shard vanished while it was needed; run again")
        encoded += group
    return encoded, set(keys)


def encode_groups(
    out: Path,
    groups: dict[int, tuple[str, list[Recording]]],
    codes_key: str,
    pretrained: Pretrained,
    hearing: Hearing,
    workers: int | None,
) -> None:
    """Decodes, encodes and writes groups, by their number with their key."""
    encoder = CodeEncoder(pretrained.dvae.config, pretrained.dvae.variables, pretrained.mel_norms)
    found = shards.reusable(out, codes_key)
    known = {key: one for key, one in found.items() if one.sound.seconds <= hearing.max_seconds}
    recordings = [group for _, group in groups.values()]
    heard_groups = listen_ahead(recordings, hearing, frozenset(known), workers_for(recordings, workers))
    with Progress(sum(len(r.spans) for group in recordings for r in group), "encoding") as progress:
        for (number, (key, group)), heard in zip(groups.items(), heard_groups, strict=True):
            sounds, contents = encode_group(out, group, heard, known, encoder, hearing, progress)
            shards.write_group(out, number, key, codes_key, sounds, contents)


def encode_group(
    out: Path,
    group: Sequence[Recording],
    heard: Sequence[Heard | str],
    known: dict[str, Encoded],
    encoder: CodeEncoder,
    hearing: Hearing,
    progress: Progress,
) -> tuple[list[Sound], list[Content | None]]:
    """A group's sounds and their records: copied where known, else encoded."""
    sources = [(recording.path, span) for recording in group for span in recording.spans]
    sounds: list[Sound] = []
    contents: list[Content | None] = []
    fresh: dict[int, np.ndarray] = {}
    for place, ((path, span), item) in enumerate(zip(sources, heard, strict=True)):
        copied = shards.read_content(out, known[item]) if isinstance(item, str) else None
        if isinstance(item, str) and copied is not None:
            sounds.append(known[item].sound)
            contents.append(copied)
            continue
        if isinstance(item, str):  # what was known is no longer whole
            (item,) = listen(Recording(path, (span,)), hearing)
        assert not isinstance(item, str)
        sounds.append(item[0])
        contents.append(None)
        if item[1] is not None:
            fresh[place] = item[1]
    places = list(fresh)
    progress.add([sound for place, sound in enumerate(sounds) if place not in fresh])
    done = encoder.encode(list(fresh.values()), lambda members: progress.add([sounds[places[m]] for m in members]))
    for place, codes in zip(places, done, strict=True):
        contents[place] = Content(codes, fresh[place])
    return sounds, contents


class Progress:
    """A bar of clips that says how many hours of audio a minute are done; on the main host only."""

    def __init__(self, clips: int, what: str) -> None:
        self._bar = tqdm(total=clips, unit="clip", desc=what, disable=not parallel.is_main())
        self._start, self._seconds = time.monotonic(), 0.0

    def add(self, sounds: Sequence[Sound]) -> None:
        self._seconds += sum(sound.seconds for sound in sounds)
        minutes = (time.monotonic() - self._start) / 60
        self._bar.set_postfix_str(f"{self._seconds / 3600 / max(minutes, 1e-9):.2f} h of audio a minute", refresh=False)
        self._bar.update(len(sounds))

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
