"""Drafts to listen to while training: fixed prompts by fixed voices, made sound of by the configured preset."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
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
from tortoise_jax.models.lora import LoraConfig
from tortoise_jax.models.unified_voice import UnifiedVoiceConfig
from tortoise_jax.synthesis import drafts, presets, sampler, speech, voices
from tortoise_jax.synthesis.decoder import DecoderWeights
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


@dataclasses.dataclass(frozen=True)
class Speaker:
    """clips (clips, 132300) float32; diffusion: what the diffusion decoder reads of them, where the preset has one."""

    name: str
    clips: np.ndarray
    diffusion: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class PromptDrafter:
    """Says every prompt by every speaker's voice. prompts: with their ids; decoders: all models but the AR model."""

    config: UnifiedVoiceConfig
    adapters: LoraConfig
    decoders: Pretrained
    preset: Preset
    prompts: list[tuple[str, list[int]]]
    speakers: list[Speaker]
    options: sampler.SamplingOptions

    def __call__(self, step: int, params: Any, run: Run) -> None:
        if run.history.has("sample", step):
            return
        params = lora.merged(params, self.adapters)
        weights = DecoderWeights.of(params, self.config, self.options.dtype)
        models = self.decoders.with_part(AR, Part(self.config, {"params": params}))
        entries = [entry for i in range(len(self.speakers)) for entry in self.of_speaker(i, step, models, weights, run)]
        for entry in entries:
            run.history.add("sample", step, entry)
        share = float(np.mean([entry["stopped"] for entry in entries]))
        silence = float(np.mean([entry["trailing_silence"] for entry in entries]))
        run.writer.scalars(step, {"sample/share_that_stops": share, "sample/trailing_silence": silence})
        run.writer.say(
            f"step {step}: {count_of(len(entries), 'draft')} in {run.folder / FOLDER}; {share:.0%} stop by themselves, "
            f"{silence:.1f} s of silence after them"
        )

    def of_speaker(
        self, index: int, step: int, models: Pretrained, weights: DecoderWeights, run: Run
    ) -> Iterator[dict[str, Any]]:
        """Writes one speaker's recording and drafts; what the history keeps of each draft."""
        speaker = self.speakers[index]
        recording = f"{FOLDER}/voice-{index}-recording.wav"
        drafts.write_wav(run.folder / recording, trim_silence(speaker.clips[0]))
        vector = voices.condition(models.ar.params, self.config, models.mel_norms, list(speaker.clips))
        vectors, text_ids = np.repeat(vector[None], len(self.prompts), axis=0), [ids for _, ids in self.prompts]
        drawn = sampler.sample(weights, self.config, vectors, text_ids, SEED, self.options)
        said = [(Utterance(prompt, ids, []), only_candidate(drawn, i)) for i, (prompt, ids) in enumerate(self.prompts)]
        waveforms = speech.waveforms_of(models, weights, self.preset, said, Voice(vector, speaker.diffusion), SEED)
        for i, ((prompt, _), waveform) in enumerate(zip(self.prompts, waveforms, strict=True)):
            file = f"{FOLDER}/step-{step:06d}-voice-{index}-prompt-{i}.wav"
            drafts.write_wav(run.folder / file, waveform, self.preset.rate)
            run.writer.audio(step, f"draft/{speaker.name}/{i}", waveform, self.preset.rate)
            mel = drafts.draft_mel(models.dvae.variables, models.dvae.config, drawn.row(i))
            yield {
                "prompt": prompt,
                "voice": speaker.name,
                "recording": recording,
                "file": file,
                "stopped": bool(drawn.stopped[i]),
                "trailing_silence": trailing_silence(mel, models.mel_norms),
            }


def only_candidate(drawn: sampler.Samples, i: int) -> Candidate:
    return Candidate(i, (), float(drawn.log_likelihood[i]), drawn.row(i), stopped=bool(drawn.stopped[i]))


def make_drafter(settings: ConfigDict, pretrained: Pretrained, dataset: Dataset) -> Drafter | None:
    """A function of (step, params on the host, run) that writes drafts; None where none are wanted.

    The main host alone draws them, on its own devices; the others go on to the next step and wait there.
    """
    if not settings.sample_every or not settings.prompts:
        return None
    prompts = prompt_ids(settings, pretrained, recorded(dataset.header))
    # One candidate of each: what the model says, not the best of many.
    preset = presets.choose(settings.sample_preset).without_candidates()
    if not parallel.is_main():
        return None
    config, models = pretrained.ar.config, decoders_of(settings, pretrained, preset)
    voice = lambda clips: diffusion_half(models, preset, clips)
    speakers = [Speaker(name, clips, voice(clips)) for name, clips in fixed_voices(dataset).items()]
    decoders = models.only(*models.parts.keys() - {AR})  # the weights a run begins with are not kept for it
    options = sampler.SamplingOptions(max_codes=min(500, max_codes(config)))
    return PromptDrafter(config, schemas.lora(settings), decoders, preset, prompts, speakers, options)


def prompt_ids(settings: ConfigDict, pretrained: Pretrained, cleaner: str) -> list[tuple[str, list[int]]]:
    """Each prompt's text ids. Raises UserError for what the tokenizer does not know, or the model has no room for."""
    tokenizer, room = pretrained.tokenizer, max_text_ids(pretrained.ar.config)
    found = [(prompt, tokenizer.encode(prompt, cleaner)) for prompt in settings.prompts]
    for prompt, ids in found:
        unknown = tokenizer.unknown_in_words(prompt, cleaner)
        if unknown:
            unknown = unknown.replace("--cleaner", "data prepared with --cleaner")
            raise UserError(f"config: prompts: {prompt!r} holds characters the tokenizer does not know: {unknown}")
        if not 0 < len(ids) <= room:
            raise UserError(
                f"config: prompts: {prompt!r} has {len(ids)} text tokens, the model has room for 1 to {room}"
            )
    return found


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
    if not preset.diffuses:
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
