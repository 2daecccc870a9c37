"""Converts voices and latents between TorToiSe's torch files and this project's .npz.

  python convert/voices.py voice.pth --out voice.npz                       TorToiSe's voice -> ours
  python convert/voices.py voice.npz --out voice.pth --diffusion old.pth   ours -> TorToiSe's
  python convert/voices.py latents.npz --out latents.pth                   of speak --latents -> for its decoder

A voice of TorToiSe is a pair: a vector for the autoregressive model and one for the diffusion model. A draft needs and
saves the first alone; `speak --save_voice` with a preset saves both. After fine-tuning only the first is stale.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch

from convert.torch_files import load
from tortoise_jax.errors import Parser, UserError, exit_with_one_line
from tortoise_jax.files import read_npz, write_atomically
from tortoise_jax.synthesis.voices import DIFFUSION, VECTOR, read_voice, save_voice

LATENTS = "latents"


def read_pair(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """TorToiSe's voice file -> vectors (d,) of the autoregressive and (e,) of the diffusion model, float32."""
    loaded = load(path).content
    if isinstance(loaded, list) and loaded and all(isinstance(x, torch.Tensor) for x in loaded):
        raise UserError(
            f"{path} holds a list of {len(loaded)} waveforms, as TorToiSe keeps them beside the clips it read, not a "
            "voice's pair of vectors; give the clips to speak: --voice FOLDER --save_voice voice.npz"
        )
    if not isinstance(loaded, tuple) or len(loaded) != 2 or not all(isinstance(x, torch.Tensor) for x in loaded):
        raise UserError(f"{path} holds a {type(loaded).__name__}, expected TorToiSe's pair of voice vectors")
    first, second = (vector.detach().float().numpy().copy() for vector in loaded)
    for vector in (first, second):
        if vector.ndim == 0 or vector.size != vector.shape[-1] or not np.isfinite(vector).all():
            raise UserError(f"{path} holds a vector of shape {vector.shape}, expected finite (1, width)")
    return first.reshape(-1), second.reshape(-1)


def save(path: Path, content: Any) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())


def from_torch(source: Path, out: Path) -> list[str]:
    vector, diffusion = read_pair(source)
    save_voice(out, vector, diffusion)
    return [
        f"{out}: a voice of width {len(vector)}; speak with it: --voice {out}",
        "  with the diffusion model's half, which presets speak with",
    ]


def to_torch(source: Path, out: Path, diffusion: Path | None) -> list[str]:
    arrays = read_voice(source)
    half = read_pair(diffusion)[1] if diffusion else arrays.get(DIFFUSION)
    if half is None:
        raise UserError(
            f"{source} has no vector for the diffusion model; save the voice from its clips with a preset (speak "
            "--preset fast --save_voice), or give TorToiSe's own of the same voice: --diffusion FILE.pth"
        )
    save(out, (torch.from_numpy(arrays[VECTOR][None]), torch.from_numpy(np.asarray(half, np.float32)[None])))
    return [f"{out}: a voice for TorToiSe; the diffusion model's half is from {diffusion or source}"]


def latents_to_torch(source: Path, out: Path) -> list[str]:
    arrays = read_npz(source)
    latents = arrays[LATENTS]
    if latents.ndim != 2 or latents.dtype != np.float32 or not np.isfinite(latents).all():
        raise UserError(f"{source}: {LATENTS} is {latents.dtype} {latents.shape}, expected finite float32 of two axes")
    save(out, {name: torch.from_numpy(np.ascontiguousarray(value[None])) for name, value in arrays.items()})
    return [
        f"{out}: latents {(1, *latents.shape)} and what they were made from, a dictionary of tensors",
        "  TorToiSe takes them in do_spectrogram_diffusion(diffusion, diffuser, latents, diffusion_conditioning); "
        "the last comes from get_conditioning_latents",
    ]


def convert(source: Path, out: Path, diffusion: Path | None = None) -> list[str]:
    """Converts by what the files are; returns the lines to print."""
    suffixes = source.suffix, out.suffix
    if diffusion and suffixes != (".npz", ".pth"):
        raise UserError("--diffusion goes with a voice .npz that becomes a .pth")
    if suffixes == (".pth", ".npz"):
        return from_torch(source, out)
    if suffixes != (".npz", ".pth"):
        raise UserError(f"{source} to {out}: expected .pth to .npz, or .npz to .pth")
    if LATENTS not in read_npz(source):
        return to_torch(source, out, diffusion)
    if diffusion:
        raise UserError(f"{source} holds latents, not a voice: --diffusion does not go with it")
    return latents_to_torch(source, out)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("source", type=Path, help="voice.pth, voice.npz or latents.npz")
    parser.add_argument("--out", type=Path, required=True, help="the file to write, .npz or .pth")
    parser.add_argument("--diffusion", type=Path, help="a TorToiSe voice whose second half is used")
    arguments = parser.parse_args()
    for line in convert(arguments.source, arguments.out, arguments.diffusion):
        print(line)


if __name__ == "__main__":
    exit_with_one_line(main)
