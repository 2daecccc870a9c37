"""Says a text with a checkpoint or a run: a quick draft, or TorToiSe's speech at 24 kHz.

  python -m tortoise_jax.speak --checkpoint RUN --text "Hello there." --voice clips/ --out draft.wav
  python -m tortoise_jax.speak --checkpoint RUN --text "Hello there." --voice clips/ --preset fast --out speech.wav

A draft is the model's codes through the dVAE and Griffin-Lim. ultra_fast to high_quality need the CLVP, the diffusion
decoder and the vocoder, hifigan the fast path's decoder: in the checkpoint, or in the one that a run began with.
--latents writes what TorToiSe's own decoder needs.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tortoise_jax.checkpoints.pretrained import Pretrained, load_pretrained, with_parts_of_origin
from tortoise_jax.errors import Parser, UserError, count_of, exit_with_one_line
from tortoise_jax.files import check_writable, save_npz, write_atomically
from tortoise_jax.models.unified_voice import UnifiedVoiceConfig
from tortoise_jax.synthesis import presets, speech, voices
from tortoise_jax.synthesis.decoder import DecoderWeights
from tortoise_jax.synthesis.diffusion_inputs import check_diffusion_inputs, diffusion_inputs
from tortoise_jax.synthesis.drafts import write_wav
from tortoise_jax.synthesis.presets import DRAFT, MENDED, PRESETS, Preset
from tortoise_jax.synthesis.sampler import SamplingOptions
from tortoise_jax.synthesis.speech import Utterance
from tortoise_jax.text.cleaners import CLEANERS, DEFAULT, letters_changed, recorded

SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty", "max_codes", "dtype")


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    preset = check(arguments)

    # 1. The text, before anything large is read.
    metadata = load_pretrained(arguments.checkpoint, ())
    cleaner = arguments.cleaner or recorded(metadata.source)
    speech.check_text(metadata, arguments.text, cleaner)
    if changed := letters_changed(arguments.text, cleaner):
        print("note: the cleaner reads " + ", ".join(f'{a} as "{b}"' for a, b in changed.items()))
    texts = speech.split_text(metadata, arguments.text, cleaner)
    options = speech.options_for(metadata, preset, **sampling_of(arguments))
    if arguments.latents:
        check_diffusion_inputs(metadata.ar.config)

    # 2. The weights and the voice.
    pretrained = read_weights(arguments, metadata, preset)
    voice = voices.load(arguments.voice, pretrained, preset.diffuses, arguments.seed)
    if arguments.save_voice:
        voices.save_voice(arguments.save_voice, voice.conditioning, voice.diffusion)
        print(f"{arguments.save_voice}: the voice; give it as --voice")

    # 3. Codes.
    pretrained, weights = speech.lay_out(pretrained, preset, options.dtype)
    drawn_by: Any = (voice.conditioning, texts, cleaner, arguments.seed, options)
    count = {"candidates": arguments.candidates, "keep": arguments.keep, "batch": arguments.batch}
    said = speech.say(pretrained, weights, preset, *drawn_by, **count)
    for part in said:
        print(speech.describe(part, arguments.candidates))

    # 4. Sound, and what else was asked for.
    what = "a draft" if arguments.preset == DRAFT else f"preset {arguments.preset}"
    for index, waveform in enumerate(speech.speech_of(pretrained, weights, preset, said, voice, arguments.seed)):
        path = numbered(arguments.out, index)
        write_wav(path, waveform, preset.rate)
        print(f"{path}: {len(waveform) / preset.rate:.1f} s, {what}")
    reader = speech.in_dtype(pretrained, weights, preset.dtype) if arguments.latents else weights
    for i, part in enumerate(said):
        for index in range(arguments.keep):
            part_number = i if len(said) > 1 else None
            if arguments.codes:
                save_codes(numbered(arguments.codes, index, part_number), part.kept[index].codes)
            if arguments.latents:
                file = numbered(arguments.latents, index, part_number)
                save_latents(file, reader, pretrained.ar.config, voice.conditioning, part, index)


# --- the command line -------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    usual = SamplingOptions()
    parser = Parser(__doc__, prog="python -m tortoise_jax.speak")
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="DIR", help="a run, or a converted checkpoint")
    add("--step", type=int, metavar="N", help="which step of a run (default: the best)")
    add("--text", required=True, help="what to say; a long text is said in parts, split at sentence ends")
    add("--voice", type=Path, required=True, metavar="PATH", help="a folder of clips, one clip, a saved .npz, random")
    add("--out", type=Path, required=True, metavar="WAV", help="the sound to write; the second best is NAME.2.wav")
    add("--preset", default=DRAFT, help=f"{', '.join(PRESETS)}: TorToiSe's own (default: %(default)s)")
    add("--candidates", type=int, metavar="N", help="to draw for each part of the text (default: the preset's)")
    add("--steps", type=int, help="of the diffusion decoder (default: the preset's)")
    add("--guidance", type=float, help="how far from what it makes of no text; 0: off (default: the preset's)")
    add("--mend", action="store_true", help=f"better than TorToiSe, not as it is: {MENDED}")
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
    add("--max_codes", type=int, help="longest a part may get, 21.5 per second (default: the preset's, 500 or 603)")
    rest = "auto: codes in what suits the hardware, the rest float32; bfloat16: all but mels and vocoders"
    add("--dtype", default=usual.dtype, help=f"{rest} (default: %(default)s)")
    return parser.parse_args(argv)


def sampling_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was given of `SamplingOptions`."""
    return {name: getattr(arguments, name) for name in SAMPLING if getattr(arguments, name) is not None}


def check(arguments: argparse.Namespace) -> Preset:
    """What can be known to be wrong without reading anything; the preset, whose number of candidates is the default."""
    preset = presets.choose(arguments.preset, arguments.steps, arguments.guidance, arguments.mend, arguments.dtype)
    SamplingOptions(**sampling_of(arguments))
    if arguments.candidates is None:
        arguments.candidates = max(preset.candidates, arguments.keep)
    for name in ("candidates", "keep", "batch"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} is {getattr(arguments, name)}, expected at least 1")
    if arguments.keep > arguments.candidates:
        raise UserError(f"--keep {arguments.keep} of {arguments.candidates} candidates: there are not so many")
    speech.check_seed(arguments.seed)
    for name, suffix in (("out", ".wav"), ("codes", ".npy"), ("latents", ".npz"), ("save_voice", ".npz")):
        path = getattr(arguments, name)
        if path is not None and path.suffix != suffix:
            raise UserError(f"--{name} {path}: expected a name ending in {suffix}")
        if path is not None and path.is_dir():
            raise UserError(f"--{name} {path} is a folder, expected a file to write")
        if path is not None:
            check_writable(path, f"--{name}")
    return preset


def read_weights(arguments: argparse.Namespace, metadata: Pretrained, preset: Preset) -> Pretrained:
    """The checkpoint with the weights that are needed. Raises UserError where some are missing."""
    random = voices.is_random(arguments.voice)
    needed = preset.needs(random)
    own = [name for name in needed if name in metadata.parts]
    pretrained = with_parts_of_origin(load_pretrained(arguments.checkpoint, own, arguments.step), needed)
    presets.check_fit(pretrained, preset, random)
    return pretrained


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


def save_latents(
    path: Path, weights: DecoderWeights, config: UnifiedVoiceConfig, voice: np.ndarray, part: Utterance, index: int
) -> None:
    """What tortoise's diffusion model is given, with what it was made from."""
    codes, latents = diffusion_inputs(weights, config, voice, part.text_ids, part.kept[index].codes)
    arrays: dict[str, Any] = {"latents": latents, "codes": codes, voices.VECTOR: voice}
    save_npz(path, arrays)
    command = f"python convert/voices.py {path} --out {path.with_suffix('.pth')}"
    print(f"{path}: {len(latents)} latents; for TorToiSe: {command}")


if __name__ == "__main__":
    exit_with_one_line(main)
