"""The clips that are evaluated: drafts by a checkpoint, and what they are compared with."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tortoise_jax.audio import read_audio, waveform_from_int16
from tortoise_jax.checkpoints.pretrained import Pretrained
from tortoise_jax.data.dataset import Dataset
from tortoise_jax.synthesis import sampler, voices
from tortoise_jax.synthesis.decoder import DecoderWeights
from tortoise_jax.synthesis.drafts import draft_waveform
from tortoise_jax.synthesis.speech import candidate_mels, decode_rows
from tortoise_jax.text.cleaners import recorded
from tortoise_jax.training.drafts import CLIPS_A_VOICE

RECORDINGS, COPIES, OTHERS = "recordings", "their codes", "other speakers"  # rows beside those of drafts
DRAWN_AT_ONCE = 16


@dataclasses.dataclass(frozen=True)
class Sentence:
    """A text, and which of the speaker's recordings says it; -1: none does."""

    text: str
    recording: int = -1


@dataclasses.dataclass(frozen=True)
class Sounds:
    """What a row of the table is about: a waveform (samples,) at 22050 Hz for each of some sentences.

    Of drafts: which step's they are, and which of them end by themselves.
    """

    name: str
    sentences: list[Sentence]
    waveforms: list[np.ndarray]
    step: int | None = None
    stopped: list[bool] | None = None


def reference_clips(dataset: Dataset, speaker: str, count: int) -> list[int]:
    """A speaker's clips to compare drafts with, at most `count`: held-out ones, then some of those trained on.

    What drafts are conditioned on is left out, unless there is nothing else.
    """
    trained_on = dataset.of_speaker(speaker, "train")
    chosen = [*dataset.of_speaker(speaker, "validation"), *trained_on[CLIPS_A_VOICE:]]
    return [int(i) for i in (chosen or trained_on)[:count]]


def recordings(dataset: Dataset, clips: Sequence[int]) -> Sounds:
    sentences = [Sentence(dataset.clips[index].text, i) for i, index in enumerate(clips)]
    return Sounds(RECORDINGS, sentences, [np.asarray(waveform_from_int16(dataset.waveform(i))) for i in clips])


def copies(pretrained: Pretrained, dataset: Dataset, clips: Sequence[int]) -> Sounds:
    """The same clips through the dVAE's codes and Griffin-Lim: as near as any draft can come."""
    mels = decode_rows(pretrained, [dataset.codes(i).astype(np.int32) for i in clips])
    waveforms = [draft_waveform(mel, pretrained.mel_norms) for mel in mels]
    return Sounds(COPIES, recordings(dataset, clips).sentences, waveforms)


def other_speakers(dataset: Dataset, speaker: str, folder: Path | None, count: int) -> list[Sounds]:
    """Clips of a folder, else of the data set's other speakers in turn; nothing where there are none."""
    if folder is not None:
        waveforms = [read_audio(path) for path in voices.find_clips(folder)[:count]]
    else:
        names = sorted({clip.speaker for clip in dataset.clips} - {speaker})
        turns = [dataset.of_speaker(name, "train")[turn : turn + 1] for turn in range(count) for name in names]
        chosen = [int(i) for turn in turns for i in turn][:count]
        waveforms = [np.asarray(waveform_from_int16(dataset.waveform(i))) for i in chosen]
    return [Sounds(OTHERS, [Sentence("")] * len(waveforms), waveforms)] if waveforms else []


def drafts(
    pretrained: Pretrained,
    step: int,
    sentences: Sequence[Sentence],
    clips: np.ndarray,
    seed: int,
    options: sampler.SamplingOptions,
) -> Sounds:
    """One draft of each sentence by a step's checkpoint, with the voice of clips (n, 132300)."""
    config, cleaner = pretrained.ar.config, recorded(pretrained.source)
    vector = voices.condition(pretrained.ar.params, config, pretrained.mel_norms, list(clips))
    weights = DecoderWeights.of(pretrained.ar.params, config, options.dtype)
    waveforms: list[np.ndarray] = []
    stopped: list[bool] = []
    for first in range(0, len(sentences), DRAWN_AT_ONCE):
        now = sentences[first : first + DRAWN_AT_ONCE]
        text_ids = [pretrained.tokenizer.encode(sentence.text, cleaner) for sentence in now]
        vectors = np.repeat(vector[None], len(now), axis=0)
        drawn = sampler.sample(weights, config, vectors, text_ids, seed + first, options)
        waveforms += [draft_waveform(mel, pretrained.mel_norms) for mel in candidate_mels(pretrained, drawn)]
        stopped += drawn.stopped.tolist()
    return Sounds(f"step {step}", list(sentences), waveforms, step, stopped)
