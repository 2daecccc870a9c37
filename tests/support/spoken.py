"""Whether drafts say their sentences, stop, and sound like a voice: figures in which a person's ear can be checked.

A sentence has a rendering by the speaker's own synthesiser. A draft says it if, stretched in time, it is nearer to that
rendering than to those of all other sentences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import librosa
import numpy as np

from tests.support.distance import DECIBELS
from tortoise_jax.audio import (
    MEL_FRAMES_PER_CODE,
    griffin_lim,
    int16_from_waveform,
    log_mel,
    mel_frames,
    read_audio,
)
from tortoise_jax.checkpoints.pretrained import Pretrained
from tortoise_jax.data.encoding import CodeEncoder
from tortoise_jax.evaluation.measures import pitch
from tortoise_jax.synthesis import drafts, sampler, voices
from tortoise_jax.synthesis.decoder import DecoderWeights
from tortoise_jax.synthesis.prompts import max_codes
from tortoise_jax.synthesis.ranking import trailing_silence
from tortoise_jax.synthesis.speech import candidate_mels

PITCHED = 10  # clips are enough to know a voice's pitch
# TorToiSe's repetition penalty is meant for 8192 codes; of 256, speech repeats many.
OPTIONS = sampler.SamplingOptions(temperature=0.5, repetition_penalty=1.0)


@dataclasses.dataclass(frozen=True)
class Figures:
    """Of drafts of several sentences by one voice.

    stops: which share ends with the stop token; silence: the longest that one ends in, in seconds. nearest: which share
    is nearest to its own sentence. ratio: its mean distance to that sentence's rendering, over the distance of the
    rendering's own codes to it. pitch: median fundamental frequency, Hz; level: distance of the mean log-mel from the
    renderings', dB.
    """

    stops: float
    silence: float
    nearest: float
    ratio: float
    pitch: float
    level: float


@dataclasses.dataclass(frozen=True)
class Renderings:
    """What sentences sound like in a voice: waveforms (samples,), their mels (t, m), and the median pitch."""

    sentences: list[str]
    waveforms: list[np.ndarray]
    mels: list[np.ndarray]
    pitch: float

    @classmethod
    def read(cls, folder: Path, sentences: Sequence[str], mel_norms: np.ndarray) -> Renderings:
        """The recordings 01.ogg, 02.ogg, … of the sentences in their order."""
        waveforms = [read_audio(folder / f"{i + 1:02d}.ogg") for i in range(len(sentences))]
        longest = max(map(len, waveforms))  # one length, so that one program is compiled
        padded = np.stack([np.pad(waveform, (0, longest - len(waveform))) for waveform in waveforms])
        mels = [
            mel[: mel_frames(len(waveform))]
            for mel, waveform in zip(np.asarray(log_mel(padded, mel_norms)), waveforms, strict=True)
        ]
        return cls(list(sentences), waveforms, mels, median_pitch(waveforms))


def draw(
    pretrained: Pretrained, clips: Sequence[np.ndarray], sentences: Sequence[str], seed: int = 0
) -> sampler.Samples:
    """One draft of each sentence, with a voice of waveforms (samples,)."""
    config = pretrained.ar.config
    vector = voices.condition(pretrained.ar.params, config, pretrained.mel_norms, list(clips))
    text_ids = [pretrained.tokenizer.encode(sentence) for sentence in sentences]
    weights = DecoderWeights.of(pretrained.ar.params, config, OPTIONS.dtype)
    options = dataclasses.replace(OPTIONS, max_codes=min(OPTIONS.max_codes, max_codes(config)))
    return sampler.sample(weights, config, np.repeat(vector[None], len(text_ids), axis=0), text_ids, seed, options)


def copies(pretrained: Pretrained, renderings: Renderings) -> list[np.ndarray]:
    """The renderings' mels through the dVAE's codes and back: as near as any draft can come."""
    dvae = pretrained.dvae
    encoder = CodeEncoder(dvae.config, dvae.variables, pretrained.mel_norms)
    codes = encoder.encode([int16_from_waveform(waveform) for waveform in renderings.waveforms])
    rows = np.zeros((len(codes), max(map(len, codes))), np.int32)
    for row, one in zip(rows, codes, strict=True):
        row[: len(one)] = one
    decoded = drafts.decode_mel(dvae.variables, dvae.config, rows)
    return [mel[: len(true)] for mel, true in zip(decoded, renderings.mels, strict=True)]


def figures(pretrained: Pretrained, drawn: sampler.Samples, renderings: Renderings) -> Figures:
    """Of one draft for each rendering, in their order."""
    norms, mels = pretrained.mel_norms, candidate_mels(pretrained, drawn)
    coarse = [by_code(mel) for mel in renderings.mels]
    right = [
        int(np.argmin([stretched_distance(by_code(mel), other, norms) for other in coarse])) == i
        for i, mel in enumerate(mels)
    ]
    away = [stretched_distance(mel, other, norms) for mel, other in zip(mels, renderings.mels, strict=True)]
    copied = [
        stretched_distance(copy, mel, norms)
        for copy, mel in zip(copies(pretrained, renderings), renderings.mels, strict=True)
    ]
    mean_mel = lambda several: np.concatenate(several).mean(axis=0)
    level = np.abs((mean_mel(mels) - mean_mel(renderings.mels)) * norms).mean() * DECIBELS
    return Figures(
        stops=float(drawn.stopped.mean()),
        silence=max(trailing_silence(mel, norms) for mel in mels),
        nearest=float(np.mean(right)),
        ratio=float(np.mean(away) / np.mean(copied)),
        pitch=median_pitch([griffin_lim(mel, norms) for mel in mels[:PITCHED]]),
        level=float(level),
    )


def by_code(mel: np.ndarray) -> np.ndarray:
    """The mean of every four frames: enough to tell words apart, and a sixteenth of the work."""
    codes = len(mel) // MEL_FRAMES_PER_CODE
    return mel[: codes * MEL_FRAMES_PER_CODE].reshape(codes, MEL_FRAMES_PER_CODE, -1).mean(axis=1)


def stretched_distance(mel: np.ndarray, other: np.ndarray, mel_norms: np.ndarray) -> float:
    """Mean absolute difference in dB of two log-mels (t, m), along the best way of stretching them in time."""
    if not len(mel):
        return np.inf
    cost = np.abs((mel[:, None] - other[None]) * mel_norms).mean(axis=-1) * DECIBELS
    _, path = librosa.sequence.dtw(C=cost)
    return float(cost[path[:, 0], path[:, 1]].mean())


def median_pitch(waveforms: Sequence[np.ndarray]) -> float:
    """Of the first few clips."""
    return float(np.nanmedian([pitch(waveform) for waveform in waveforms[:PITCHED]]))
