"""A text said by a voice, part by part: candidates drawn, ranked, the best kept, and the parts joined as sound."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from tortoise_jax.audio import SAMPLE_RATE
from tortoise_jax.checkpoints.parts import AR, CLVP, DIFFUSION, DVAE, HIFIGAN, VOCODER, Part
from tortoise_jax.checkpoints.pretrained import Pretrained
from tortoise_jax.errors import UserError, count_of
from tortoise_jax.synthesis import ranking, rendering, sampler
from tortoise_jax.synthesis.decoder import DecoderWeights
from tortoise_jax.synthesis.diffusion_inputs import DIFFUSION_CODES, SILENCE_CODE, hidden_states, repaired, silent_from
from tortoise_jax.synthesis.drafts import decode_mel, draft
from tortoise_jax.synthesis.presets import Preset
from tortoise_jax.synthesis.prompts import max_codes, max_text_ids
from tortoise_jax.synthesis.ranking import Candidate
from tortoise_jax.synthesis.sampler import Samples, SamplingOptions
from tortoise_jax.synthesis.voices import Voice
from tortoise_jax.text import sentences
from tortoise_jax.text.cleaners import clean

MAX_SEED = 2**30  # the parts of a text count on from it, in 32 bits
PAUSE_SECONDS = 0.3  # between the parts of a long text
COMFORTABLE_TOKENS = 150  # of one part: 500 codes hold it, and the released models were trained on up to 200


@dataclasses.dataclass(frozen=True)
class Utterance:
    """A part of a text that is said at once, and the best candidates drawn for it, best first."""

    text: str
    text_ids: list[int]
    kept: list[Candidate]


def check_seed(seed: int) -> None:
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"seed is {seed}, expected 0 to {MAX_SEED}")


def check_text(pretrained: Pretrained, text: str, cleaner: str) -> None:
    """Raises UserError for a text with nothing to say, and for characters the model does not know."""
    if not any(character.isalnum() for character in clean(text, cleaner)):
        raise UserError(f'the text "{text}" has nothing to say: no letter or digit is left of it after cleaning')
    unknown = pretrained.tokenizer.unknown_in_words(text, cleaner)
    if unknown:
        raise UserError(f"the text holds characters the tokenizer does not know: {unknown}")


def split_text(pretrained: Pretrained, text: str, cleaner: str) -> list[str]:
    """A text in parts that a prompt has room for. Raises UserError for a sentence that is too long."""
    encode = lambda part: pretrained.tokenizer.encode(part, cleaner)
    room = max_text_ids(pretrained.ar.config)
    return sentences.split(text, encode, min(COMFORTABLE_TOKENS, room), room)


def options_for(pretrained: Pretrained, preset: Preset, **given: Any) -> SamplingOptions:
    """How codes are drawn: what is given, and as many codes as preset and model have room for. Raises UserError."""
    room = max_codes(pretrained.ar.config)
    longest = given.pop("max_codes", None)
    if longest is not None and longest > room:
        raise UserError(f"max_codes is {longest}, the model has room for {room}")
    if longest is not None and preset.diffuses and longest > DIFFUSION_CODES:
        raise UserError(f"max_codes is {longest}, TorToiSe's diffusion decoder is handed at most {DIFFUSION_CODES}")
    codes = longest if longest is not None else min(preset.max_codes, room)
    return SamplingOptions(max_codes=codes, start_inside=not preset.mend, **given)


def lay_out(pretrained: Pretrained, preset: Preset, dtype: str) -> tuple[Pretrained, DecoderWeights]:
    """The AR model's weights to draw codes with, and the checkpoint with what they do not serve for.

    dtype: of `SamplingOptions`. Where the latents are of the same, the checkpoint's own copy is not kept: once there
    is a voice, nothing else reads it.
    """
    ar = pretrained.ar
    weights = DecoderWeights.of(ar.params, ar.config, dtype)
    return (pretrained.with_part(AR, ar.without_weights()) if weights.dtype == preset.dtype else pretrained), weights


def say(
    pretrained: Pretrained,
    weights: DecoderWeights,
    preset: Preset,
    voice: np.ndarray,
    texts: list[str],
    cleaner: str,
    seed: int,
    options: SamplingOptions,
    candidates: int,
    keep: int = 1,
    batch: int = 16,
) -> list[Utterance]:
    """Draws candidates for each part of a text and keeps the best. voice (d,); batch: candidates drawn at once.

    Part i draws with seed + i. Where one part has fewer candidates than `batch`, several parts are drawn at once; what
    is drawn does not depend on it. Where the preset has a CLVP it ranks them, as in TorToiSe;
    without it a candidate's flaws and likelihood do.
    """
    text_ids = [pretrained.tokenizer.encode(text, cleaner) for text in texts]
    found: list[list[Candidate]] = [[] for _ in texts]
    for parts, first, count in rounds(list(map(len, text_ids)), candidates, batch):
        prompts, seeds = [text_ids[i] for i in parts], [seed + i for i in parts]
        numbers = ", ".join(str(i + 1) for i in parts)
        with bar(options.max_codes, "code", f"{count_of(count, 'candidate')} of part {numbers}") as shown:
            progress = functools.partial(show, shown)
            drawn = sampler.sample(
                weights, pretrained.ar.config, voice, prompts, seeds, options, count, first, progress
            )
        made = evaluate(pretrained, preset, drawn, [*range(first, first + count)] * len(parts))
        for index, i in enumerate(parts):
            found[i] += made[index * count : (index + 1) * count]
    if CLVP in preset.parts:
        clvp = pretrained.part(CLVP)
        found = [scored(clvp, ids, found[i], f"part {i + 1}, scores", preset.dtype) for i, ids in enumerate(text_ids)]
    by_score = functools.partial(ranking.by_score, stopped_first=preset.mend)
    best = by_score if CLVP in preset.parts else ranking.rank
    return [Utterance(text, ids, best(drawn)[:keep]) for text, ids, drawn in zip(texts, text_ids, found, strict=True)]


def rounds(lengths: Sequence[int], candidates: int, batch: int) -> Iterator[tuple[list[int], int, int]]:
    """What is drawn at once: parts of a text, the first of their candidates, and how many of each.

    lengths: of the parts, of which those of like length are drawn together. A part's prompt counts as one candidate
    more, so that no round takes more memory than `batch` candidates of one part.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    for first in range(0, candidates, batch):
        count = min(batch, candidates - first)
        at_once = max(1, (batch + 1) // (count + 1))
        for index in range(0, len(order), at_once):
            yield order[index : index + at_once], first, count


def scored(clvp: Part, text_ids: list[int], candidates: list[Candidate], title: str, dtype: str) -> list[Candidate]:
    """The candidates with CLVP's scores."""
    with bar(len(candidates), "candidate", title) as shown:
        codes = [one.codes for one in candidates]
        found = rendering.scores(clvp, text_ids, codes, progress=shown.update, dtype=dtype)
    return [dataclasses.replace(one, score=float(score)) for one, score in zip(candidates, found, strict=True)]


def show(shown: tqdm, done: int) -> None:
    """Moves a bar to what is done."""
    shown.update(done - shown.n)


def bar(total: int, unit: str, title: str) -> tqdm:
    """A progress bar with the time left, where a person watches."""
    return tqdm(total=total, unit=unit, desc=title, leave=False, dynamic_ncols=True, disable=None)


def evaluate(pretrained: Pretrained, preset: Preset, drawn: Samples, numbers: Sequence[int]) -> list[Candidate]:
    """Drawn rows as candidates of these numbers; without the dVAE, silence after speech is not looked for."""
    rows = [drawn.row(i) for i in range(len(drawn.lengths))]
    mels = candidate_mels(pretrained, drawn) if DVAE in preset.parts else [None] * len(rows)
    found = []
    for i, (codes, mel, number) in enumerate(zip(rows, mels, numbers, strict=True)):
        stopped = bool(drawn.stopped[i])
        flags = ranking.flags(codes, stopped, mel, pretrained.mel_norms)
        found.append(Candidate(number, flags, float(drawn.log_likelihood[i]), codes, stopped=stopped))
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


Rows = list[tuple[Utterance, Candidate]]


def speech_of(
    pretrained: Pretrained, weights: DecoderWeights, preset: Preset, said: list[Utterance], voice: Voice, seed: int
) -> list[np.ndarray]:
    """The sound of what was said at the preset's rate, (samples,) for each kept candidate, best first.

    With pauses between the parts. Several parts and candidates are rendered at once; a row's noise depends on the seed
    and its number alone.
    """
    rows, keep = [(part, one) for part in said for one in part.kept], len(said[0].kept)
    waveforms = waveforms_of(pretrained, weights, preset, rows, voice, seed)
    return [join(waveforms[index::keep], preset.rate) for index in range(keep)]


def waveforms_of(
    pretrained: Pretrained, weights: DecoderWeights, preset: Preset, rows: Rows, voice: Voice, seed: int
) -> list[np.ndarray]:
    """Each row's sound (samples,) at the preset's rate. weights: that the codes were drawn with."""
    if preset.diffuses:
        return diffused(pretrained, weights, preset, rows, voice, seed)
    if HIFIGAN in preset.parts:
        return fast(pretrained, weights, preset, rows, voice)
    dvae = pretrained.dvae
    return [draft(dvae.variables, dvae.config, pretrained.mel_norms, one.codes) for _, one in rows]


def diffused(
    pretrained: Pretrained, weights: DecoderWeights, preset: Preset, rows: Rows, voice: Voice, seed: int
) -> list[np.ndarray]:
    """Each row by the diffusion decoder and the vocoder, (samples,) at 24 kHz."""
    fixed = [repaired(one.codes, keep_speech=preset.mend) for _, one in rows]
    latents = [
        states[: silent_from(codes, SILENCE_CODE)]
        for states, codes in zip(latents_of(pretrained, weights, preset, rows, voice, fixed), fixed, strict=True)
    ]
    with bar(len(rows), "row", "diffusion") as shown:
        mels = rendering.diffuse(
            pretrained.part(DIFFUSION),
            latents,
            np.asarray(voice.diffusion),
            preset.steps,
            preset.guidance,
            seed,
            progress=shown.update,
            dtype=preset.dtype,
        )
    with bar(len(rows), "row", "vocoder") as shown:
        return rendering.vocode(pretrained.part(VOCODER), mels, seed, progress=shown.update)


def fast(pretrained: Pretrained, weights: DecoderWeights, preset: Preset, rows: Rows, voice: Voice) -> list[np.ndarray]:
    """Each row by the fast path's decoder, (samples,) at 24 kHz: codes as they were drawn, the stop among them."""
    stop = pretrained.ar.config.stop_mel
    codes = [np.append(one.codes, stop) if one.stopped else one.codes for _, one in rows]
    latents = latents_of(pretrained, weights, preset, rows, voice, codes)
    with bar(len(rows), "row", "decoder") as shown:
        return rendering.vocode_latents(pretrained.part(HIFIGAN), latents, voice.conditioning, shown.update)


def latents_of(
    pretrained: Pretrained, weights: DecoderWeights, preset: Preset, rows: Rows, voice: Voice, codes: list[np.ndarray]
) -> list[np.ndarray]:
    """The AR model's hidden states (c, d) at each row's codes, computed in the preset's dtype."""
    reader, texts = in_dtype(pretrained, weights, preset.dtype), [part.text_ids for part, _ in rows]
    return hidden_states(reader, pretrained.ar.config, voice.conditioning, texts, codes)


def in_dtype(pretrained: Pretrained, weights: DecoderWeights, dtype: str) -> DecoderWeights:
    """The AR model's weights of this dtype: those that codes are drawn with, or others of the checkpoint."""
    return weights if weights.dtype == dtype else DecoderWeights.of(pretrained.ar.params, pretrained.ar.config, dtype)


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
