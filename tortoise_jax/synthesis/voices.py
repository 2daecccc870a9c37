"""Who speaks: clips of a voice, a saved one or a random one, to the vectors that the models read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tortoise_jax.audio import (
    MIN_SECONDS,
    SAMPLE_RATE,
    SILENT_DB,
    crop_conditioning,
    diffusion_clip,
    heard_elsewhere,
    log_mel,
    log_mel_24k,
    loudness_db,
    read_audio,
)
from tortoise_jax.checkpoints import parts
from tortoise_jax.checkpoints.parts import Part
from tortoise_jax.checkpoints.pretrained import Pretrained
from tortoise_jax.decoders import AUDIO_SUFFIXES, is_recording
from tortoise_jax.errors import UserError
from tortoise_jax.files import read_npz, save_npz
from tortoise_jax.models.compiled import apply
from tortoise_jax.models.diffusion import DiffusionConfig, DiffusionDecoder
from tortoise_jax.models.random_voice import RandomVoice
from tortoise_jax.models.unified_voice import UnifiedVoice, UnifiedVoiceConfig

VECTOR = "conditioning"  # its name in a .npz
DIFFUSION = "diffusion"  # the other half of tortoise's voice files, carried along where there was one
RANDOM = Path("random")  # in the place of clips: a voice out of nothing, unless there is something of this name


@dataclasses.dataclass(frozen=True)
class Voice:
    """conditioning (d,), which the AR model reads; diffusion (e,), which the diffusion decoder reads, None without one.

    Both float32.
    """

    conditioning: np.ndarray
    diffusion: np.ndarray | None = None


def is_random(source: Path) -> bool:
    return source == RANDOM and not source.exists()


def load(source: Path, pretrained: Pretrained, both: bool, seed: int) -> Voice:
    """A folder of clips, one clip, a saved .npz or "random" -> a voice. Raises UserError naming the file.

    both: with the half that the diffusion decoder reads. pretrained: with the weights of the parts that make it. seed:
    where long clips are cropped, or which random voice.
    """
    ar = pretrained.ar
    if is_random(source):
        first = random_vector(pretrained.part(parts.RANDOM_AR), seed, 0)
        return Voice(first, random_vector(pretrained.part(parts.RANDOM_DIFFUSION), seed, 1) if both else None)
    vector = load_voice(source, ar.params, ar.config, pretrained.mel_norms, seed)
    return Voice(vector, load_diffusion_half(source, pretrained.part(parts.DIFFUSION)) if both else None)


def random_vector(part: Part, seed: int, half: int) -> np.ndarray:
    """One half of a voice out of nothing, (d,) float32; the two halves are unrelated, as upstream draws them."""
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(seed), half), (1, part.config.width))
    return np.asarray(apply(RandomVoice(part.config), "__call__", part.variables, noise))[0]


def load_voice(source: Path, params: Any, config: UnifiedVoiceConfig, mel_norms: np.ndarray, seed: int) -> np.ndarray:
    """A folder of clips, one clip or a saved .npz -> conditioning (d,) float32. Raises UserError naming the file."""
    if source.suffix == ".npz":
        return read_voice(source, config.width)[VECTOR]
    if source.suffix in (".pth", ".pt"):
        raise UserError(f"{source} is a torch file; convert it: python convert/voices.py {source} --out voice.npz")
    return condition(params, config, mel_norms, [crop(clip, seed, i) for i, clip in enumerate(find_clips(source))])


def load_diffusion_half(source: Path, diffusion: Part) -> np.ndarray:
    """The same sources -> the diffusion decoder's vector (2 d,) float32. Raises UserError naming the file."""
    width = 2 * diffusion.config.width
    if source.suffix != ".npz":
        return condition_diffusion(
            diffusion.variables, diffusion.config, [read_audio(clip) for clip in find_clips(source)]
        )
    vector = read_voice(source).get(DIFFUSION)
    if vector is None:
        raise UserError(
            f"{source} holds the AR model's half of a voice alone; give the clips it was made from, or save the voice "
            "again with --save_voice and a preset"
        )
    if vector.shape != (width,) or not np.isfinite(vector).all():
        raise UserError(f"{source}: {DIFFUSION} has shape {vector.shape}, the diffusion decoder reads ({width},)")
    return vector.astype(np.float32)


def find_clips(source: Path) -> list[Path]:
    """One clip, or a folder's clips by name."""
    if not source.exists():
        raise UserError(f"voice {source} does not exist; give a folder of clips, one clip, a saved .npz, or random")
    if not source.is_dir():
        return [source]
    clips = sorted(path for path in source.iterdir() if is_recording(path) and path.is_file())
    if not clips:
        raise UserError(f"voice {source} holds no clips ({', '.join(AUDIO_SUFFIXES)}); a few of 6 s or more are best")
    return clips


def crop(clip: Path, seed: int, index: int) -> np.ndarray:
    """Six seconds of a clip, (132300,) float32, as tortoise takes them: the start is drawn by (seed, index)."""
    waveform = read_audio(clip)
    if len(waveform) < MIN_SECONDS * SAMPLE_RATE:
        length = f"{len(waveform) / SAMPLE_RATE:.2f} s, at least {MIN_SECONDS} s"
        raise UserError(f"{clip}: the clip is too short ({length}); a few of 6 s or more are best")
    if loudness_db(waveform) < SILENT_DB:
        level = f"{loudness_db(waveform):.0f} dB, at least {SILENT_DB:.0f} dB"
        raise UserError(f"{clip}: the clip is silent ({level}){heard_elsewhere(clip)}")
    return crop_conditioning(waveform, np.random.default_rng([seed, index]))


def condition(
    params: Any, config: UnifiedVoiceConfig, mel_norms: np.ndarray, waveforms: Sequence[np.ndarray]
) -> np.ndarray:
    """Clips of one voice, each (132300,) -> conditioning (d,) float32: the mean of their vectors.

    One at a time, so that one program serves any number of clips. What synthesis, training's exports and the Python
    API call a voice all come from here.
    """
    model = UnifiedVoice(config)
    mels = (log_mel(waveform, mel_norms) for waveform in waveforms)
    vectors = [np.asarray(apply(model, "condition", {"params": params}, mel[None, None])) for mel in mels]
    return np.mean(vectors, axis=0)[0, 0]


def condition_diffusion(variables: Any, config: DiffusionConfig, waveforms: Sequence[np.ndarray]) -> np.ndarray:
    """Clips of one voice, each (samples,) at 22050 Hz -> the diffusion decoder's vector (2 d,) float32: their mean."""
    model = DiffusionDecoder(config)
    mels = (log_mel_24k(diffusion_clip(waveform)) for waveform in waveforms)
    return np.mean([np.asarray(apply(model, "condition", variables, mel[None, None]))[0] for mel in mels], axis=0)


def save_voice(path: Path, vector: np.ndarray, diffusion: np.ndarray | None = None) -> None:
    """Writes conditioning (d,), and the diffusion model's vector where a tortoise file had one, as .npz."""
    if path.suffix != ".npz":
        raise UserError(f"{path}: a voice is saved as .npz")
    arrays = {VECTOR: np.asarray(vector, np.float32)}
    if diffusion is not None:
        arrays[DIFFUSION] = np.asarray(diffusion, np.float32)
    save_npz(path, arrays)


def read_voice(path: Path, width: int | None = None) -> dict[str, np.ndarray]:
    """A saved voice's arrays, `conditioning` (d,) checked. width: of the model it is for."""
    arrays = read_npz(path)
    if VECTOR not in arrays:
        raise UserError(f"{path} holds {', '.join(arrays) or 'nothing'}, expected a voice: an array named {VECTOR}")
    vector = arrays[VECTOR]
    if vector.ndim != 1 or vector.dtype != np.float32 or not np.isfinite(vector).all():
        raise UserError(
            f"{path}: {VECTOR} is {vector.dtype} {vector.shape}, expected finite float32 of one axis; save it again"
        )
    if width is not None and len(vector) != width:
        raise UserError(
            f"{path}: the voice is a vector of {len(vector)}, the model's width is {width}: another model's"
        )
    return arrays
