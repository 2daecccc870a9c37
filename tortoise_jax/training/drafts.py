"""Drafts to listen to while training: fixed prompts by fixed voices, made sound of by the configured preset."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from tortoise_jax import parallel
from tortoise_jax.audio import crop_conditioning, trim_silence, waveform_from_int16
from tortoise_jax.checkpoints.parts import AR, DIFFUSION, Part
from tortoise_jax.checkpoints.pretrained import Pretrained, load_pretrained, with_parts_of_origin
from tortoise_jax.data.dataset import Dataset
from tortoise_jax.errors import UserError, count_of
from tortoise_jax.models import lora
from tortoise_jax.synthesis import drafts, presets, sampler, speech, voices
from tortoise_jax.synthesis.presets import Preset
from tortoise_jax.synthesis.prompts import max_codes, max_text_ids
from tortoise_jax.synthesis.ranking import Candidate, trailing_silence
from tortoise_jax.synthesis.speech import Utterance
from tortoise_jax.synthesis.voices import Voice
from tortoise_jax.text.cleaners import recorded
from tortoise_jax.training import schemas
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
    # One candidate of each: what the model says, not the best of many.
    preset = presets.choose(settings.sample_preset).without_candidates()
    decoders = decoders_of(settings, pretrained, preset) if parallel.is_main() else pretrained
    speakers = fixed_voices(dataset)
    heard = {voice: diffusion_half(decoders, preset, clips) for voice, clips in speakers.items()}
    decoders = decoders.only(*decoders.parts.keys() - {AR})  # the weights a run begins with are not kept for it
    options = sampler.SamplingOptions(max_codes=min(500, max_codes(config)))

    def draft(step: int, params: Any, run: Run) -> None:
        if run.history.has("sample", step):
            return
        params = lora.merged(params, schemas.lora(settings))
        weights = sampler.SamplerWeights.of(params, config, options.dtype)
        now = decoders.with_part(AR, Part(config, {"params": params}))
        entries: list[dict[str, Any]] = []
        for index, (voice, clips) in enumerate(speakers.items()):
            recording = f"{FOLDER}/voice-{index}-recording.wav"
            drafts.write_wav(run.folder / recording, trim_silence(clips[0]))
            vector = voices.condition(params, config, mel_norms, list(clips))
            vectors = np.repeat(vector[None], len(text_ids), axis=0)
            drawn = sampler.sample(weights, config, vectors, text_ids, SEED, options)
            rows = [
                (
                    Utterance(prompt, ids, []),
                    Candidate(i, (), float(drawn.log_likelihood[i]), drawn.row(i), stopped=bool(drawn.stopped[i])),
                )
                for i, (prompt, ids) in enumerate(zip(settings.prompts, text_ids, strict=True))
            ]
            waveforms = speech.waveforms_of(now, preset, rows, Voice(vector, heard[voice]), SEED)
            for i, (prompt, waveform) in enumerate(zip(settings.prompts, waveforms, strict=True)):
                name = f"step-{step:06d}-voice-{len(entries) // len(text_ids)}-prompt-{i}.wav"
                mel = drafts.draft_mel(dvae.variables, dvae.config, drawn.row(i))
                drafts.write_wav(run.folder / FOLDER / name, waveform, preset.rate)
                run.writer.audio(step, f"draft/{voice}/{i}", waveform, preset.rate)
                entries.append(
                    {
                        "prompt": prompt,
                        "voice": voice,
                        "recording": recording,
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


def decoders_of(settings: ConfigDict, pretrained: Pretrained, preset: Preset) -> Pretrained:
    """The run's models and what the preset needs besides, of the checkpoint that it begins with. Raises UserError."""
    has = load_pretrained(settings.checkpoint, ()).parts
    lacking = [name for name in preset.parts if name not in pretrained.parts]
    found = load_pretrained(settings.checkpoint, [name for name in lacking if name in has])
    found = with_parts_of_origin(found, lacking)
    for name in lacking:
        pretrained = pretrained.with_part(name, found.part(name))
    presets.check_fit(pretrained, preset)
    return pretrained


def diffusion_half(decoders: Pretrained, preset: Preset, clips: np.ndarray) -> np.ndarray | None:
    """Of a voice's clips (clips, 132300) what the diffusion decoder reads, where the preset has one."""
    if not preset.diffuses or not parallel.is_main():
        return None
    part = decoders.part(DIFFUSION)
    return voices.condition_diffusion(part.variables, part.config, list(clips))


def fixed_voices(dataset: Dataset) -> dict[str, np.ndarray]:
    """The speakers with most clips to train on: speaker -> (clips, 132300) float32, see `conditioning_clips`."""
    clips = Counter(dataset.clips[i].speaker for i in dataset.split("train"))
    speakers = sorted(clips, key=lambda speaker: (-clips[speaker], speaker))[:VOICES]
    return {speaker or "voice": conditioning_clips(dataset, speaker) for speaker in speakers}


def conditioning_clips(dataset: Dataset, speaker: str) -> np.ndarray:
    """A speaker's first clips to train on: (clips, 132300) float32, cut or zero-padded."""
    chosen = dataset.of_speaker(speaker, "train")[:CLIPS_A_VOICE]
    return np.stack([np.asarray(waveform_from_int16(crop_conditioning(dataset.waveform(i)))) for i in chosen])
