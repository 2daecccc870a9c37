"""A text said by a voice, part by part: candidates drawn, ranked, the best kept, and the parts joined as sound."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np
from tqdm import tqdm

from tortoise_jax.audio import DIFFUSION_RATE, SAMPLE_RATE
from tortoise_jax.checkpoints.parts import DIFFUSION, VOCODER, Part
from tortoise_jax.checkpoints.pretrained import Pretrained
from tortoise_jax.synthesis import ranking, rendering, sampler
from tortoise_jax.synthesis.diffusion_inputs import diffusion_inputs
from tortoise_jax.synthesis.drafts import decode_mel, draft
from tortoise_jax.synthesis.prompts import max_text_ids
from tortoise_jax.synthesis.ranking import Candidate
from tortoise_jax.synthesis.rendering import Preset
from tortoise_jax.synthesis.sampler import SamplerWeights, Samples, SamplingOptions
from tortoise_jax.text import sentences

PAUSE_SECONDS = 0.3  # between the parts of a long text
COMFORTABLE_TOKENS = 150  # of one part: 500 codes hold it, and the released models were trained on up to 200


@dataclasses.dataclass(frozen=True)
class Utterance:
    """A part of a text that is said at once, and the best candidates drawn for it, best first."""

    text: str
    text_ids: list[int]
    kept: list[Candidate]


def split_text(pretrained: Pretrained, text: str, cleaner: str) -> list[str]:
    """A text in parts that a prompt has room for. Raises UserError for a sentence that is too long."""
    encode = lambda part: pretrained.tokenizer.encode(part, cleaner)
    room = max_text_ids(pretrained.ar.config)
    return sentences.split(text, encode, min(COMFORTABLE_TOKENS, room), room)


def say(
    pretrained: Pretrained,
    weights: SamplerWeights,
    voice: np.ndarray,
    texts: list[str],
    cleaner: str,
    seed: int,
    options: SamplingOptions,
    candidates: int,
    keep: int,
    batch: int,
    clvp: Part | None = None,
) -> list[Utterance]:
    """Draws candidates for each part of a text and keeps the best. voice (d,); batch: candidates drawn at once.

    The parts draw with seeds that follow each other from `seed` on; the batch does not change what is drawn. clvp:
    ranks them, as in TorToiSe; without it a candidate's flaws and likelihood do.
    """
    said = []
    for i, text in enumerate(texts):
        text_ids = pretrained.tokenizer.encode(text, cleaner)
        found: list[Candidate] = []
        for first in range(0, candidates, batch):
            count = min(batch, candidates - first)
            draw = functools.partial(
                sampler.sample, weights, pretrained.ar.config, voice, text_ids, seed + i, options, count, first
            )
            drawn = with_bar(draw, options.max_codes, f"part {i + 1}, {count} candidates")
            found += scored(clvp, text_ids, drawn, first) if clvp else evaluate(pretrained, drawn, first)
        ranked = ranking.by_score(found) if clvp else ranking.rank(found)
        said.append(Utterance(text, text_ids, ranked[:keep]))
    return said


def scored(clvp: Part, text_ids: list[int], drawn: Samples, first: int) -> list[Candidate]:
    """Drawn rows as candidates with CLVP's scores, numbered from `first` on."""
    rows = [drawn.row(i) for i in range(len(drawn.lengths))]
    return [
        Candidate(
            first + i,
            () if drawn.stopped[i] else ("never stops",),
            float(drawn.log_likelihood[i]),
            rows[i],
            float(score),
        )
        for i, score in enumerate(rendering.scores(clvp, text_ids, rows))
    ]


def with_bar(draw: Callable[..., Samples], total: int, title: str) -> Samples:
    """A draw under a progress bar that counts the codes of a candidate."""
    with tqdm(total=total, unit="code", desc=title, leave=False, dynamic_ncols=True, disable=None) as bar:

        def show(done: int) -> None:
            bar.update(done - bar.n)

        return draw(progress=show)


def evaluate(pretrained: Pretrained, drawn: Samples, first: int) -> list[Candidate]:
    """Drawn rows as candidates, numbered from `first` on."""
    found = []
    for i, mel in enumerate(candidate_mels(pretrained, drawn)):
        flags = ranking.flags(drawn.row(i), bool(drawn.stopped[i]), mel, pretrained.mel_norms)
        found.append(Candidate(first + i, flags, float(drawn.log_likelihood[i]), drawn.row(i)))
    return found


def candidate_mels(pretrained: Pretrained, drawn: Samples) -> list[np.ndarray]:
    """Each row's log-mel (4 c, m), see `decode_rows`."""
    return decode_rows(pretrained, [drawn.row(i) for i in range(len(drawn.lengths))])


def decode_rows(pretrained: Pretrained, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Rows of codes (c,) -> their log-mels (4 c, m), all decoded at once: rows are filled up with their last code.

    The dVAE's decoder looks ahead, so the last frames of a mel are approximate.
    """
    config = pretrained.dvae.config
    filled = np.zeros((len(rows), max(1, *map(len, rows))), np.int32)
    for line, codes in zip(filled, rows, strict=True):
        line[: len(codes)] = codes
        line[len(codes) :] = codes[-1] if len(codes) else 0
    mels = decode_mel(pretrained.dvae.variables, config, np.minimum(filled, config.codes - 1))
    return [mel[: config.frames_per_code * len(codes)] for mel, codes in zip(mels, rows, strict=True)]


def draft_of(pretrained: Pretrained, said: list[Utterance], index: int) -> np.ndarray:
    """A draft waveform (samples,) of the index-th best candidate of every part, with pauses between the parts."""
    dvae, norms = pretrained.dvae, pretrained.mel_norms
    return join([draft(dvae.variables, dvae.config, norms, part.kept[index].codes) for part in said])


def speech_of(
    pretrained: Pretrained,
    said: list[Utterance],
    voice: np.ndarray,
    diffusion_voice: np.ndarray,
    preset: Preset,
    seed: int,
) -> list[np.ndarray]:
    """Speech at 24 kHz, (samples,) for each kept candidate, best first, with pauses between the parts.

    voice (d,) and diffusion_voice (2 d,): both halves of a voice. Several parts and candidates are rendered at once; a
    row's noise depends on the seed and its number alone.
    """
    ar, keep = pretrained.ar, len(said[0].kept)
    rows = [(part, one) for part in said for one in part.kept]
    waveforms: list[np.ndarray] = []
    with tqdm(
        total=len(rows), unit="row", desc="diffusion and vocoder", leave=False, dynamic_ncols=True, disable=None
    ) as bar:
        for first in range(0, len(rows), rendering.RENDERED_AT_ONCE):
            now = rows[first : first + rendering.RENDERED_AT_ONCE]
            numbers = range(first, first + len(now))
            latents = [diffusion_inputs(ar.params, ar.config, voice, part.text_ids, one.codes)[1] for part, one in now]
            mels = rendering.diffuse(pretrained.part(DIFFUSION), latents, diffusion_voice, preset, seed, list(numbers))
            waveforms += rendering.vocode(pretrained.part(VOCODER), mels, seed, list(numbers))
            bar.update(len(now))
    return [join(waveforms[index::keep], DIFFUSION_RATE) for index in range(keep)]


def join(waveforms: list[np.ndarray], rate: int = SAMPLE_RATE) -> np.ndarray:
    """Waveforms (samples,) one after another, with a short pause between."""
    pause = np.zeros(round(PAUSE_SECONDS * rate), np.float32)
    pieces = [piece for waveform in waveforms for piece in (pause, waveform)]
    return np.concatenate(pieces[1:])


def describe(part: Utterance, candidates: int) -> str:
    """One line on what was drawn and kept."""
    kept = "; ".join(
        f"candidate {one.index + 1} ("
        + (f"{one.log_likelihood:.2f} per code" if one.score is None else f"CLVP {one.score:.2f}")
        + (f", {' and '.join(one.flags)}" if one.flags else "")
        + ")"
        for one in part.kept
    )
    return f'"{part.text[:50]}{"…" if len(part.text) > 50 else ""}": of {candidates} kept {kept}'
