"""Says a text with a checkpoint or a run, as a draft: the model's codes through the dVAE and Griffin-Lim.

  python -m tortoise_jax.speak --checkpoint RUN --text "Hello there." --voice clips/ --out draft.wav

What TorToiSe makes of the same codes sounds far better; --latents writes what its decoder needs.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import soundfile
from tqdm import tqdm

from tortoise_jax.audio import SAMPLE_RATE
from tortoise_jax.checkpoints.pretrained import Pretrained, load_pretrained
from tortoise_jax.errors import UserError, exit_with_one_line
from tortoise_jax.files import write_atomically
from tortoise_jax.synthesis import ranking, voices
from tortoise_jax.synthesis import sampler as generate
from tortoise_jax.synthesis.ranking import Judged
from tortoise_jax.synthesis.sampler import SamplingOptions
from tortoise_jax.text import sentences
from tortoise_jax.text.cleaners import CLEANERS, clean, letters_changed

PAUSE_SECONDS = 0.3  # between the parts of a long text
COMFORTABLE_TOKENS = 150  # a part of a long text: 500 codes hold it, and the released models were trained on up to 200


@dataclasses.dataclass(frozen=True)
class Part:
    """A stretch of text said at once, and the best of what was drawn for it, best first."""

    text: str
    text_ids: list[int]
    kept: list[Judged]
    codes: list[np.ndarray]


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    options = check(arguments)

    # 1. The text, before anything large is read.
    card = load_pretrained(arguments.checkpoint, ())
    arguments.cleaner = arguments.cleaner or card.source.get("cleaner", "english")
    texts = read_text(arguments.text, arguments.cleaner, card)
    options = within_the_model(options, card, arguments)

    # 2. The weights and the voice.
    pretrained = load_pretrained(arguments.checkpoint, ("ar", "dvae"), arguments.step)
    params, config = pretrained.ar.params, pretrained.ar.config
    voice = voices.load_voice(arguments.voice, params, config, pretrained.mel_norms, arguments.seed)
    if arguments.save_voice:
        voices.save_voice(arguments.save_voice, voice)
        print(f"{arguments.save_voice}: the voice; give it as --voice")

    # 3. Codes.
    prepared = generate.prepare(params, config, options.dtype)
    parts = [say(pretrained, prepared, voice, text, i, arguments, options) for i, text in enumerate(texts)]
    for part in parts:
        print(describe(part, arguments.n))

    # 4. Sound, and what else was asked for.
    for place in range(arguments.keep):
        waveform = join([generate_draft(pretrained, part.codes[place]) for part in parts])
        path = numbered(arguments.out, place)
        write_wav(path, waveform)
        print(f"{path}: {len(waveform) / SAMPLE_RATE:.1f} s, a draft")
    for i, part in enumerate(parts):
        for place in range(arguments.keep):
            part_number = i if len(parts) > 1 else None
            if arguments.codes:
                save_codes(numbered(arguments.codes, place, part_number), part.codes[place])
            if arguments.latents:
                save_latents(numbered(arguments.latents, place, part_number), pretrained, voice, part, place)


# --- the command line -------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    usual = SamplingOptions()
    parser = Parser(
        prog="python -m tortoise_jax.speak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="DIR", help="a run, or a converted checkpoint")
    add("--step", type=int, metavar="N", help="which step of a run (default: the best)")
    add("--text", required=True, help="what to say; a long text is said in parts, split at sentence ends")
    add("--voice", type=Path, required=True, metavar="PATH", help="a folder of clips, one clip, or a saved .npz")
    add("--out", type=Path, required=True, metavar="WAV", help="the draft to write; the second best is NAME.2.wav")
    add("--n", type=int, default=4, help="candidates to draw (default: %(default)s; TorToiSe draws 16 to 256)")
    add("--keep", type=int, default=1, help="how many of the best to write (default: %(default)s)")
    add("--seed", type=int, default=0, help="the same seed draws the same (default: %(default)s)")
    add("--batch", type=int, default=16, metavar="N", help="candidates drawn at once (default: %(default)s)")
    add("--cleaner", help=f"how text is cleaned: {', '.join(CLEANERS)} (default: as the run's data, else english)")
    add("--codes", type=Path, metavar="NPY", help="also write the codes, int32 (c,)")
    add("--latents", type=Path, metavar="NPZ", help="also write what TorToiSe's own decoder takes (convert/voices.py)")
    add("--save_voice", type=Path, metavar="NPZ", help="also write the voice's vector, to be given as --voice")
    sampling = parser.add_argument_group("sampling (TorToiSe's settings by default)")
    add = sampling.add_argument
    add("--temperature", type=float, default=usual.temperature, help="0: always the likeliest (default: %(default)s)")
    add("--top_k", type=int, default=usual.top_k, help="0: off (default: %(default)s)")
    add("--top_p", type=float, default=usual.top_p, help="1: off (default: %(default)s)")
    add("--repetition_penalty", type=float, default=usual.repetition_penalty, help="1: off (default: %(default)s)")
    add("--max_codes", type=int, help=f"longest a part may get, 21.5 a second (default: {usual.max_codes})")
    add("--dtype", default=usual.dtype, help="float32, bfloat16, or auto for what suits the hardware")
    return parser.parse_args(argv)


def check(arguments: argparse.Namespace) -> SamplingOptions:
    """What can be known to be wrong without reading anything."""
    for name in ("n", "keep", "batch"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} is {getattr(arguments, name)}, expected at least 1")
    if arguments.keep > arguments.n:
        raise UserError(f"--keep {arguments.keep} of --n {arguments.n} candidates: there are not so many")
    if arguments.seed < 0:
        raise UserError(f"--seed is {arguments.seed}, expected at least 0")
    for name, suffix in (("out", ".wav"), ("codes", ".npy"), ("latents", ".npz"), ("save_voice", ".npz")):
        path = getattr(arguments, name)
        if path is not None and path.suffix != suffix:
            raise UserError(f"--{name} {path}: expected a name ending in {suffix}")
        if path is not None and path.is_dir():
            raise UserError(f"--{name} {path} is a folder, expected a file to write")
    names = ("temperature", "top_k", "top_p", "repetition_penalty", "dtype")
    given = {name: getattr(arguments, name) for name in names}
    if arguments.max_codes is not None:
        given["max_codes"] = arguments.max_codes
    return SamplingOptions(**given)


def read_text(text: str, cleaner: str, card: Pretrained) -> list[str]:
    """The text's parts. Raises UserError for an empty one and for characters the model does not know."""
    if not any(character.isalnum() for character in clean(text, cleaner)):
        raise UserError(f'--text "{text}" has nothing to say: no letter or digit is left of it after cleaning')
    unknown = card.tokenizer.unknown_characters(text, cleaner)
    if unknown:
        named = ", ".join(f"{c} (U+{ord(c):04X})" if c.isprintable() else f"U+{ord(c):04X}" for c in unknown)
        raise UserError(f"--text holds characters the tokenizer does not know: {named}")
    changed = letters_changed(text, cleaner)
    if changed:
        print("note: the cleaner reads " + ", ".join(f'{a} as "{b}"' for a, b in changed.items()))
    encode = lambda part: card.tokenizer.encode(part, cleaner)
    return sentences.split(text, encode, COMFORTABLE_TOKENS, generate.max_text_ids(card.ar.config))


def within_the_model(options: SamplingOptions, card: Pretrained, arguments: argparse.Namespace) -> SamplingOptions:
    """The options with as many codes as the model has room for, where no number was given."""
    if arguments.latents:
        generate.check_hand_over(card.ar.config)
    room = generate.max_codes(card.ar.config)
    if arguments.max_codes is None:
        return dataclasses.replace(options, max_codes=min(options.max_codes, room))
    if arguments.max_codes > room:
        raise UserError(f"--max_codes is {arguments.max_codes}, the model has room for {room}")
    return options


# --- the work ---------------------------------------------------------------------------------------------------------


def say(
    pretrained: Pretrained,
    prepared: generate.Prepared,
    voice: np.ndarray,
    text: str,
    number: int,
    arguments: argparse.Namespace,
    options: SamplingOptions,
) -> Part:
    """Draws candidates for one part of the text, judges them, and keeps the best."""
    config = pretrained.ar.config
    ids = pretrained.tokenizer.encode(text, arguments.cleaner)
    codes: list[np.ndarray] = []
    judged: list[Judged] = []
    for first in range(0, arguments.n, arguments.batch):
        count = min(arguments.batch, arguments.n - first)
        draw = functools.partial(
            generate.sample, prepared, config, voice, ids, arguments.seed + number, options, count, first
        )
        drawn = with_bar(draw, options.max_codes, f"part {number + 1}, {count} candidates")
        mels = decoded(pretrained, drawn)
        for i in range(count):
            flags = ranking.flags(drawn.row(i), bool(drawn.stopped[i]), mels[i], pretrained.mel_norms)
            judged.append(Judged(first + i, flags, float(drawn.log_likelihood[i])))
            codes.append(drawn.row(i))
    kept = ranking.rank(judged)[: arguments.keep]
    rows = [one.row for one in kept]
    return Part(text, ids, kept, [codes[row] for row in rows])


def with_bar(draw: Callable[..., generate.Samples], total: int, title: str) -> generate.Samples:
    """A draw under a progress bar that counts the codes of a candidate."""
    with tqdm(total=total, unit="code", desc=title, leave=False, dynamic_ncols=True) as bar:

        def show(done: int) -> None:
            bar.update(done - bar.n)

        return draw(progress=show)


def decoded(pretrained: Pretrained, drawn: generate.Samples) -> list[np.ndarray]:
    """Each row's mel (4 c, m), all decoded at once: with the last code repeated behind, so its end is approximate."""
    config = pretrained.dvae.config
    last = np.maximum(drawn.lengths - 1, 0)[:, None]
    places = np.minimum(np.arange(drawn.codes.shape[1]), last)
    filled = np.minimum(np.take_along_axis(drawn.codes, places, axis=1), config.codes - 1)
    mels = generate.decode_mel(pretrained.dvae.variables, config, filled)
    return [mel[: config.frames_per_code * length] for mel, length in zip(mels, drawn.lengths, strict=True)]


def generate_draft(pretrained: Pretrained, codes: np.ndarray) -> np.ndarray:
    return generate.draft(pretrained.dvae.variables, pretrained.dvae.config, pretrained.mel_norms, codes)


def join(waveforms: list[np.ndarray]) -> np.ndarray:
    """The parts with a short pause between."""
    pause = np.zeros(round(PAUSE_SECONDS * SAMPLE_RATE), np.float32)
    pieces = [piece for waveform in waveforms for piece in (pause, waveform)]
    return np.concatenate(pieces[1:])


def describe(part: Part, n: int) -> str:
    """One line on what was drawn and kept."""
    kept = "; ".join(
        f"candidate {one.row + 1} ({one.log_likelihood:.2f} a code"
        + (f", {' and '.join(one.flags)}" if one.flags else "")
        + ")"
        for one in part.kept
    )
    return f'"{part.text[:50]}{"…" if len(part.text) > 50 else ""}": of {n} kept {kept}'


# --- files ------------------------------------------------------------------------------------------------------------


def numbered(path: Path, place: int, part: int | None = None) -> Path:
    """draft.wav, draft.2.wav for the second best; codes.part1.npy where a text was said in parts."""
    stem = path.stem + (f".part{part + 1}" if part is not None else "") + (f".{place + 1}" if place else "")
    return path.with_name(stem + path.suffix)


def write_wav(path: Path, waveform: np.ndarray) -> None:
    content = io.BytesIO()
    soundfile.write(content, waveform, SAMPLE_RATE, format="WAV", subtype="PCM_16")
    write_atomically(path, content.getvalue())


def save_codes(path: Path, codes: np.ndarray) -> None:
    content = io.BytesIO()
    np.save(content, codes.astype(np.int32))
    write_atomically(path, content.getvalue())
    print(f"{path}: {len(codes)} codes")


def save_latents(path: Path, pretrained: Pretrained, voice: np.ndarray, part: Part, place: int) -> None:
    """What tortoise's diffusion model is given, with what it was made from."""
    ar = pretrained.ar
    codes, latents = generate.hand_over(ar.params, ar.config, voice, part.text_ids, part.codes[place])
    arrays: dict[str, Any] = {"latents": latents, "codes": codes, voices.VECTOR: voice}
    voices.save_npz(path, arrays)
    command = f"python convert/voices.py {path} --out {path.with_suffix('.pth')}"
    print(f"{path}: {len(latents)} latents; for TorToiSe: {command}")


if __name__ == "__main__":
    exit_with_one_line(main)
