"""Drafts to listen to while training: fixed prompts by fixed voices, through the dVAE and Griffin-Lim."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from tortoise_jax import parallel
from tortoise_jax.audio import crop_conditioning, waveform_from_int16
from tortoise_jax.checkpoints.pretrained import Pretrained
from tortoise_jax.data.dataset import Dataset
from tortoise_jax.errors import UserError, count_of
from tortoise_jax.synthesis import drafts, sampler, voices
from tortoise_jax.synthesis.prompts import max_codes, max_text_ids
from tortoise_jax.synthesis.ranking import trailing_silence
from tortoise_jax.text.cleaners import recorded
from tortoise_jax.training.run_directory import Run

FOLDER = "samples"
VOICES, CLIPS_A_VOICE = 2, 3
SEED = 0

Drafter = Callable[[int, Any, Run], None]


def make_drafter(settings: ConfigDict, pretrained: Pretrained, dataset: Dataset) -> Drafter | None:
    """A function of (step, params on the host, run) that writes drafts; None where none are wanted.

    The main host alone draws them, on its own devices; the others go on to the next step and wait there.
    """
    if not settings.sample_every or not settings.prompts:
        return None
    config, dvae, mel_norms = pretrained.ar.config, pretrained.dvae, pretrained.mel_norms  # not the AR model's weights
    cleaner = recorded(dataset.header)
    text_ids = [pretrained.tokenizer.encode(prompt, cleaner) for prompt in settings.prompts]
    room = max_text_ids(config)
    for prompt in settings.prompts:
        unknown = pretrained.tokenizer.unknown_in_words(prompt, cleaner).replace(
            "--cleaner", "data prepared with --cleaner"
        )
        if unknown:
            raise UserError(f"config: prompts: {prompt!r} holds characters the tokenizer does not know: {unknown}")
    for prompt, ids in zip(settings.prompts, text_ids, strict=True):
        if not 0 < len(ids) <= room:
            raise UserError(
                f"config: prompts: {prompt!r} has {len(ids)} text tokens, the model has room for 1 to {room}"
            )
    speakers = fixed_voices(dataset)
    options = sampler.SamplingOptions(max_codes=min(500, max_codes(config)))

    def draft(step: int, params: Any, run: Run) -> None:
        if run.history.has("sample", step):
            return
        weights = sampler.SamplerWeights.of(params, config, options.dtype)
        entries: list[dict[str, Any]] = []
        for voice, clips in speakers.items():
            vector = voices.condition(params, config, mel_norms, list(clips))
            vectors = np.repeat(vector[None], len(text_ids), axis=0)
            drawn = sampler.sample(weights, config, vectors, text_ids, SEED, options)
            for i, prompt in enumerate(settings.prompts):
                name = f"step-{step:06d}-voice-{len(entries) // len(text_ids)}-prompt-{i}.wav"
                mel = drafts.draft_mel(dvae.variables, dvae.config, drawn.row(i))
                waveform = drafts.draft_waveform(mel, mel_norms)
                drafts.write_wav(run.folder / FOLDER / name, waveform)
                run.writer.audio(step, f"draft/{voice}/{i}", waveform)
                entries.append(
                    {
                        "prompt": prompt,
                        "voice": voice,
                        "file": f"{FOLDER}/{name}",
                        "stopped": bool(drawn.stopped[i]),
                        "trailing_silence": trailing_silence(mel, mel_norms),
                    }
                )
        for entry in entries:
            run.history.add("sample", step, entry)
        share = float(np.mean([entry["stopped"] for entry in entries]))
        silence = float(np.mean([entry["trailing_silence"] for entry in entries]))
        run.writer.scalars(step, {"sample/share_that_stops": share, "sample/trailing_silence": silence})
        run.writer.say(
            f"step {step}: {count_of(len(entries), 'draft')} in {run.folder / FOLDER}; {share:.0%} stop by themselves, "
            f"{silence:.1f} s of silence after them"
        )

    return draft if parallel.is_main() else None


def fixed_voices(dataset: Dataset) -> dict[str, np.ndarray]:
    """The first clips of the speakers with most clips: speaker -> (clips, 132300) float32, cut or zero-padded."""
    clips: dict[str, list[int]] = {}
    for i in dataset.split("train"):
        clips.setdefault(dataset.clips[i].speaker, []).append(int(i))
    speakers = sorted(clips, key=lambda speaker: (-len(clips[speaker]), speaker))[:VOICES]
    fitted = lambda i: np.asarray(waveform_from_int16(crop_conditioning(dataset.waveform(i))))
    return {speaker or "voice": np.stack([fitted(i) for i in clips[speaker][:CLIPS_A_VOICE]]) for speaker in speakers}
