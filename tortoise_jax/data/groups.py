"""The recordings of a data set, measured and encoded once: in groups that hosts share and that a later run reuses."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from tortoise_jax import parallel
from tortoise_jax.audio import HOP, N_FFT, SAMPLE_RATE
from tortoise_jax.checkpoints.pretrained import Pretrained, mel_norms_digest
from tortoise_jax.data import shards
from tortoise_jax.data.clips import Clip, Record, Sound
from tortoise_jax.data.encoding import CodeEncoder
from tortoise_jax.data.filters import ClipLimits
from tortoise_jax.data.recordings import Loaded, Recording, load_ahead, load_clips
from tortoise_jax.errors import UserError
from tortoise_jax.files import digest_of

GROUP = 512  # sounds per shard: the most that a killed run loses, an hour of audio
SECONDS_PER_LINE = 60  # of progress, where it goes into a file
LISTENED = 64  # sounds measured at once, where none is encoded
# So few files are decoded before worker processes would have started, which take 5 s of two processors: 250 of wav take
# a quarter of a second, of mp3 to be resampled some seconds.
FEW = 256


def recordings_of(clips: Sequence[Clip]) -> list[Recording]:
    """What to decode for clips: one span each, in order, each span once; nothing for clips already rejected."""
    return list(dict.fromkeys(Recording(clip.audio, (clip.span,)) for clip in clips if not clip.reason))


def with_sounds(clips: Sequence[Clip], sounds: Sequence[Sound]) -> list[Clip]:
    """The clips, each with its sound. sounds: one for each of `recordings_of(clips)`."""
    sound_of = dict(zip(recordings_of(clips), sounds, strict=True))
    return [
        clip if clip.reason else dataclasses.replace(clip, sound=sound_of[Recording(clip.audio, (clip.span,))])
        for clip in clips
    ]


def grouped(recordings: Sequence[Recording], size: int) -> list[list[Recording]]:
    """Recordings of one span each, `size` of them per group; neighbouring spans of one file become one recording, so
    that the file is decoded once."""
    groups = []
    for start in range(0, len(recordings), size):
        group: list[Recording] = []
        for recording in recordings[start : start + size]:
            if group and group[-1].path == recording.path:
                group[-1] = Recording(recording.path, group[-1].spans + recording.spans)
            else:
                group.append(recording)
        groups.append(group)
    return groups


def workers_for(groups: Sequence[list[Recording]], workers: int | None) -> int:
    """The number asked for; else one per processor, or none where there is little to do."""
    if workers is not None:
        return workers
    return (os.cpu_count() or 1) if sum(map(len, groups)) > FEW else 0


def measure_all(recordings: Sequence[Recording], limits: ClipLimits, workers: int | None) -> list[Sound]:
    """The sound of every recording (of one span each), in order, none encoded."""
    groups = grouped(recordings, LISTENED)
    sounds: list[Sound] = []
    with Progress(len(recordings), "listening") as progress:
        for group in load_ahead(groups, limits, frozenset(), workers_for(groups, workers)):
            sounds += [sound for sound, _ in group]
            progress.add(sounds[-len(group) :])
    return sounds


def encode_all(
    out: Path,
    recordings: Sequence[Recording],
    pretrained: Pretrained,
    limits: ClipLimits,
    workers: int | None = None,
    group_size: int = GROUP,
) -> tuple[list[Sound], set[str]]:
    """The sound of every recording (of one span each), in order, measured and encoded; and the keys of the groups.

    Each host does its share of what is missing in the folder `out`; all of them return the same.
    """
    audio = [SAMPLE_RATE, N_FFT, HOP, mel_norms_digest(pretrained.mel_norms)]
    codes_key = digest_of([shards.LAYOUT, pretrained.dvae.digest, audio])
    groups = grouped(recordings, group_size)
    # The names in it are those of the first data sets: a key must not change while what it stands for does not.
    hearing: dict[str, Any] = {"max_seconds": limits.seconds, "trim_silence": limits.trim_silence}
    settings = {"codes": codes_key, "hearing": hearing | ({} if limits.channel == 1 else {"channel": limits.channel})}
    keys = [shards.group_key(group, settings) for group in groups]
    parallel.check_same_code()
    parallel.check_same_everywhere("what is prepared (recordings, checkpoint or options)", keys)
    mine = range(parallel.process_index(), len(groups), parallel.process_count())
    missing = {i: (keys[i], groups[i]) for i in mine if shards.read_group(out, keys[i], verify=True) is None}
    if missing:
        encode_groups(out, missing, codes_key, pretrained, limits, workers)
    parallel.wait_for_all("prepare: encoded")
    sounds: list[Sound] = []
    for key in keys:
        group = shards.read_group(out, key)
        if group is None:
            raise UserError(f"{out / shards.FINISHED}/{key}.json or its shard vanished while it was needed; run again")
        sounds += group
    return sounds, set(keys)


def encode_groups(
    out: Path,
    groups: dict[int, tuple[str, list[Recording]]],
    codes_key: str,
    pretrained: Pretrained,
    limits: ClipLimits,
    workers: int | None,
) -> None:
    """Decodes, encodes and writes groups. groups: by number, (key, recordings)."""
    encoder = CodeEncoder(pretrained.dvae.config, pretrained.dvae.variables, pretrained.mel_norms)
    found = shards.reusable(out, codes_key)
    known = {key: sound for key, sound in found.items() if sound.seconds <= limits.seconds}
    recordings = [group for _, group in groups.values()]
    loaded_groups = load_ahead(recordings, limits, frozenset(known), workers_for(recordings, workers))
    with Progress(sum(len(r.spans) for group in recordings for r in group), "encoding") as progress:
        for (number, (key, group)), loaded in zip(groups.items(), loaded_groups, strict=True):
            sounds, records = encode_group(out, group, loaded, known, encoder, limits, progress)
            shards.write_group(out, number, key, codes_key, sounds, records)


def encode_group(
    out: Path,
    group: Sequence[Recording],
    loaded: Sequence[Loaded],
    known: dict[str, Sound],
    encoder: CodeEncoder,
    limits: ClipLimits,
    progress: Progress,
) -> tuple[list[Sound], list[Record | None]]:
    """A group's sounds and their records: copied where known, else encoded. loaded: one for each span of the group."""
    spans = [Recording(recording.path, (span,)) for recording in group for span in recording.spans]
    sounds: list[Sound] = []
    records: list[Record | None] = []
    new: dict[int, np.ndarray] = {}
    for index, (recording, (sound, waveform)) in enumerate(zip(spans, loaded, strict=True)):
        copied = None
        if sound.key in known and not sound.reason:
            sound = known[sound.key]
            copied = shards.read_record(out, sound)
            if copied is None:  # the earlier record is damaged
                ((sound, waveform),) = load_clips(recording, limits)
        sounds.append(sound)
        records.append(copied)
        if waveform is not None:
            new[index] = waveform
    indices = list(new)
    progress.add([sound for index, sound in enumerate(sounds) if index not in new])
    done = encoder.encode(list(new.values()), lambda batch: progress.add([sounds[indices[i]] for i in batch]))
    for index, codes in zip(indices, done, strict=True):
        records[index] = Record(codes, new[index])
    return sounds, records


class Progress:
    """A bar of clips that says how many hours of audio are done per minute; on the main host only."""

    def __init__(self, clips: int, what: str) -> None:
        self._what, self._clips, self._done = what, clips, 0
        # disable=None: no bar where the output is no terminal, but a line per minute.
        self._bar = tqdm(total=clips, unit="clip", desc=what, disable=None if parallel.is_main() else True)
        self._start = self._said = time.monotonic()
        self._seconds = 0.0

    def add(self, sounds: Sequence[Sound]) -> None:
        self._seconds += sum(sound.seconds for sound in sounds)
        minutes = (time.monotonic() - self._start) / 60
        self._bar.set_postfix_str(f"{self._seconds / 3600 / max(minutes, 1e-9):.2f} h of audio a minute", refresh=False)
        self._bar.update(len(sounds))
        self._done += len(sounds)
        if self._bar.disable and parallel.is_main() and time.monotonic() - self._said >= SECONDS_PER_LINE:
            self._said = time.monotonic()
            print(f"{self._what}: {self._done} of {self._clips} clips", flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
