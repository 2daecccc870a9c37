"""Says a text with a checkpoint or a run: a quick draft, or TorToiSe's speech at 24 kHz.

  python -m tortoise_jax.speak --checkpoint RUN --text "Hello there." --voice clips/ --out draft.wav
  python -m tortoise_jax.speak --checkpoint RUN --text "Hello there." --voice clips/ --preset fast --out speech.wav

A draft is the model's codes through the dVAE and Griffin-Lim. A preset needs the CLVP, the diffusion decoder and the
vocoder: in the checkpoint, or in the one that a run began with. --latents writes what TorToiSe's own decoder needs.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tortoise_jax.audio import DIFFUSION_RATE, SAMPLE_RATE
from tortoise_jax.checkpoints.parts import AR, CLVP, DIFFUSION, VOCODER
from tortoise_jax.checkpoints.pretrained import Pretrained, load_pretrained, with_parts_of_origin
from tortoise_jax.errors import Parser, UserError, count_of, exit_with_one_line
from tortoise_jax.files import check_writable, write_atomically
from tortoise_jax.synthesis import speech, voices
from tortoise_jax.synthesis.diffusion_inputs import check_diffusion_inputs, diffusion_inputs
from tortoise_jax.synthesis.drafts import write_wav
from tortoise_jax.synthesis.prompts import max_codes
from tortoise_jax.synthesis.rendering import PRESETS, Preset
from tortoise_jax.synthesis.sampler import SamplerWeights, SamplingOptions
from tortoise_jax.synthesis.schedule import TRAINED_STEPS
from tortoise_jax.synthesis.speech import Utterance
from tortoise_jax.text.cleaners import CLEANERS, DEFAULT, clean, letters_changed, recorded

MAX_SEED = 2**30  # the parts of a text count on from it, in 32 bits

DRAFT = "draft"
DRAFT_CANDIDATES = 4


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    options = check(arguments)
    preset = preset_of(arguments)

    # 1. The text, before anything large is read.
    metadata = load_pretrained(arguments.checkpoint, ())
    cleaner = arguments.cleaner or recorded(metadata.source)
    check_text(arguments.text, cleaner, metadata)
    texts = speech.split_text(metadata, arguments.text, cleaner)
    options = within_the_model(options, metadata, arguments)

    # 2. The weights and the voice.
    pretrained = read_weights(arguments, metadata, preset)
    params, config = pretrained.ar.params, pretrained.ar.config
    voice = voices.load_voice(arguments.voice, params, config, pretrained.mel_norms, arguments.seed)
    diffusion_voice = voices.load_diffusion_half(arguments.voice, pretrained.part(DIFFUSION)) if preset else None
    if arguments.save_voice:
        voices.save_voice(arguments.save_voice, voice, diffusion_voice)
        print(f"{arguments.save_voice}: the voice; give it as --voice")

    # 3. Codes.
    weights = SamplerWeights.of(params, config, options.dtype)
    count = {"candidates": arguments.n, "keep": arguments.keep, "batch": arguments.batch}
    clvp = pretrained.part(CLVP) if preset else None
    said = speech.say(pretrained, weights, voice, texts, cleaner, arguments.seed, options, **count, clvp=clvp)
    for part in said:
        print(speech.describe(part, arguments.n))

    # 4. Sound, and what else was asked for.
    if preset and diffusion_voice is not None:
        waveforms = speech.speech_of(pretrained, said, voice, diffusion_voice, preset, arguments.seed)
        rate, what = DIFFUSION_RATE, f"preset {arguments.preset}"
    else:
        waveforms = [speech.draft_of(pretrained, said, index) for index in range(arguments.keep)]
        rate, what = SAMPLE_RATE, "a draft"
    for index, waveform in enumerate(waveforms):
        path = numbered(arguments.out, index)
        write_wav(path, waveform, rate)
        print(f"{path}: {len(waveform) / rate:.1f} s, {what}")
    for i, part in enumerate(said):
        for index in range(arguments.keep):
            part_number = i if len(said) > 1 else None
            if arguments.codes:
                save_codes(numbered(arguments.codes, index, part_number), part.kept[index].codes)
            if arguments.latents:
                save_latents(numbered(arguments.latents, index, part_number), pretrained, voice, part, index)


# --- the command line -------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    usual = SamplingOptions()
    parser = Parser(__doc__, prog="python -m tortoise_jax.speak")
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="DIR", help="a run, or a converted checkpoint")
    add("--step", type=int, metavar="N", help="which step of a run (default: the best)")
    add("--text", required=True, help="what to say; a long text is said in parts, split at sentence ends")
    add("--voice", type=Path, required=True, metavar="PATH", help="a folder of clips, one clip, or a saved .npz")
    add("--out", type=Path, required=True, metavar="WAV", help="the draft to write; the second best is NAME.2.wav")
    add("--preset", default="draft", help=f"draft, {', '.join(PRESETS)}: TorToiSe's own (default: %(default)s)")
    add("--n", type=int, help=f"candidates to draw (default: {DRAFT_CANDIDATES} for a draft, else the preset's)")
    add("--steps", type=int, help="of the diffusion decoder (default: the preset's)")
    add("--guidance", type=float, help="how far from what it makes of no text; 0: off (default: the preset's)")
    add("--keep", type=int, default=1, help="how many of the best to write (default: %(default)s)")
    add("--seed", type=int, default=0, help="the same seed draws the same (default: %(default)s)")
    add("--batch", type=int, default=16, metavar="N", help="candidates drawn at once (default: %(default)s)")
    add("--cleaner", help=f"how text is cleaned: {', '.join(CLEANERS)} (default: as the run's data, else {DEFAULT})")
    add("--codes", type=Path, metavar="NPY", help="also write the codes, int32 (c,)")
    add("--latents", type=Path, metavar="NPZ", help="also write what TorToiSe's own decoder takes (convert/voices.py)")
    add("--save_voice", type=Path, metavar="NPZ", help="also write the voice's vector, to be given as --voice")
    sampling = parser.add_argument_group("sampling (TorToiSe's settings by default)")
    add = sampling.add_argument
    add("--temperature", type=float, default=usual.temperature, help="0: always the likeliest (default: %(default)s)")
    add("--top_k", type=int, default=usual.top_k, help="0: off (default: %(default)s)")
    add("--top_p", type=float, default=usual.top_p, help="1: off (default: %(default)s)")
    add("--repetition_penalty", type=float, default=usual.repetition_penalty, help="1: off (default: %(default)s)")
    add("--max_codes", type=int, help=f"longest a part may get, 21.5 per second (default: {usual.max_codes})")
    add("--dtype", default=usual.dtype, help="float32, bfloat16, or auto for what suits the hardware")
    return parser.parse_args(argv)


def preset_of(arguments: argparse.Namespace) -> Preset | None:
    """The preset with what was given in its place, None for a draft. Raises UserError."""
    if arguments.preset == DRAFT:
        for name in ("steps", "guidance"):
            if getattr(arguments, name) is not None:
                raise UserError(f"--{name} goes with a preset; a draft has no diffusion decoder")
        return None
    preset = PRESETS[arguments.preset]
    if arguments.steps is not None:
        preset = dataclasses.replace(preset, steps=arguments.steps)
    if arguments.guidance is not None:
        preset = dataclasses.replace(preset, guidance=arguments.guidance or None)
    return preset


def read_weights(arguments: argparse.Namespace, metadata: Pretrained, preset: Preset | None) -> Pretrained:
    """The checkpoint with the weights that are needed. Raises UserError where some are missing."""
    if preset is None:
        return load_pretrained(arguments.checkpoint, ("ar", "dvae"), arguments.step)
    needed = (CLVP, DIFFUSION, VOCODER)
    own = [name for name in ("ar", *needed) if name in metadata.parts]
    pretrained = with_parts_of_origin(load_pretrained(arguments.checkpoint, own, arguments.step), needed)
    check_fit(pretrained)
    return pretrained


def check_fit(pretrained: Pretrained) -> None:
    """Raises UserError for parts whose widths, codes or mels are not each other's."""
    ar, clvp, diffusion, vocoder = (pretrained.part(name).config for name in (AR, CLVP, DIFFUSION, VOCODER))
    pairs = {
        "the AR model's width and the diffusion decoder's latents": (ar.width, diffusion.latent_width),
        "the AR model's codes and CLVP's": (ar.codes, clvp.speech_tokens),
        "the mel bands of diffusion decoder and vocoder": (diffusion.mel_channels, vocoder.mel_channels),
    }
    for what, (one, other) in pairs.items():
        if one != other:
            raise UserError(f"{pretrained.path}: {what} differ, {one} and {other}: they do not belong together")
    if ar.text_tokens > clvp.text_tokens:
        raise UserError(
            f"{pretrained.path}: the AR model has {ar.text_tokens} text tokens, CLVP {clvp.text_tokens}: it cannot "
            "read this model's text"
        )


def check(arguments: argparse.Namespace) -> SamplingOptions:
    """What can be known to be wrong without reading anything."""
    if arguments.preset not in (DRAFT, *PRESETS):
        raise UserError(f"--preset is {arguments.preset!r}, expected {DRAFT}, {', '.join(PRESETS)}")
    if arguments.n is None:
        arguments.n = DRAFT_CANDIDATES if arguments.preset == DRAFT else PRESETS[arguments.preset].candidates
    if arguments.steps is not None and not 2 <= arguments.steps <= TRAINED_STEPS:
        raise UserError(f"--steps is {arguments.steps}, expected 2 to {TRAINED_STEPS}")
    if arguments.guidance is not None and not 0 <= arguments.guidance < math.inf:
        raise UserError(f"--guidance is {arguments.guidance}, expected at least 0")
    for name in ("n", "keep", "batch"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} is {getattr(arguments, name)}, expected at least 1")
    if arguments.keep > arguments.n:
        raise UserError(f"--keep {arguments.keep} of --n {arguments.n} candidates: there are not so many")
    if not 0 <= arguments.seed <= MAX_SEED:
        raise UserError(f"--seed is {arguments.seed}, expected 0 to {MAX_SEED}")
    for name, suffix in (("out", ".wav"), ("codes", ".npy"), ("latents", ".npz"), ("save_voice", ".npz")):
        path = getattr(arguments, name)
        if path is not None and path.suffix != suffix:
            raise UserError(f"--{name} {path}: expected a name ending in {suffix}")
        if path is not None and path.is_dir():
            raise UserError(f"--{name} {path} is a folder, expected a file to write")
        if path is not None:
            check_writable(path, f"--{name}")
    names = ("temperature", "top_k", "top_p", "repetition_penalty", "dtype")
    given = {name: getattr(arguments, name) for name in names}
    if arguments.max_codes is not None:
        given["max_codes"] = arguments.max_codes
    return SamplingOptions(**given)


def check_text(text: str, cleaner: str, metadata: Pretrained) -> None:
    """Raises UserError for a text with nothing to say, and for characters the model does not know."""
    if not any(character.isalnum() for character in clean(text, cleaner)):
        raise UserError(f'--text "{text}" has nothing to say: no letter or digit is left of it after cleaning')
    unknown = metadata.tokenizer.unknown_in_words(text, cleaner)
    if unknown:
        raise UserError(f"--text holds characters the tokenizer does not know: {unknown}")
    changed = letters_changed(text, cleaner)
    if changed:
        print("note: the cleaner reads " + ", ".join(f'{a} as "{b}"' for a, b in changed.items()))


def within_the_model(options: SamplingOptions, metadata: Pretrained, arguments: argparse.Namespace) -> SamplingOptions:
    """The options with as many codes as the model has room for, where no number was given."""
    if arguments.latents or arguments.preset != DRAFT:
        check_diffusion_inputs(metadata.ar.config)
    room = max_codes(metadata.ar.config)
    if arguments.max_codes is None:
        return dataclasses.replace(options, max_codes=min(options.max_codes, room))
    if arguments.max_codes > room:
        raise UserError(f"--max_codes is {arguments.max_codes}, the model has room for {room}")
    return options


# --- files ------------------------------------------------------------------------------------------------------------


def numbered(path: Path, index: int, part: int | None = None) -> Path:
    """draft.wav, draft.2.wav for the second best; codes.part1.npy where a text was said in parts."""
    stem = path.stem + (f".part{part + 1}" if part is not None else "") + (f".{index + 1}" if index else "")
    return path.with_name(stem + path.suffix)


def save_codes(path: Path, codes: np.ndarray) -> None:
    content = io.BytesIO()
    np.save(content, codes.astype(np.int32))
    write_atomically(path, content.getvalue())
    print(f"{path}: {count_of(len(codes), 'code')}")


def save_latents(path: Path, pretrained: Pretrained, voice: np.ndarray, part: Utterance, index: int) -> None:
    """What tortoise's diffusion model is given, with what it was made from."""
    ar = pretrained.ar
    codes, latents = diffusion_inputs(ar.params, ar.config, voice, part.text_ids, part.kept[index].codes)
    arrays: dict[str, Any] = {"latents": latents, "codes": codes, voices.VECTOR: voice}
    voices.save_npz(path, arrays)
    command = f"python convert/voices.py {path} --out {path.with_suffix('.pth')}"
    print(f"{path}: {len(latents)} latents; for TorToiSe: {command}")


if __name__ == "__main__":
    exit_with_one_line(main)
