"""The models as a person uses them from Python: one object, arrays in, arrays out.

    import tortoise_jax as tj
    model = tj.load("checkpoints/tortoise")
    codes = model.encode(model.log_mel(tj.read_audio("clip.wav")))

The parts it is made of (`model.params`, `tj.UnifiedVoice`, `tj.DiscreteVAE`, `tj.loss_sums`, …) are plain Flax modules,
trees and functions for those who want to build on them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from tortoise_jax import audio
from tortoise_jax.checkpoints.pretrained import Pretrained, load_pretrained
from tortoise_jax.data import batches
from tortoise_jax.errors import UserError
from tortoise_jax.models.compiled import apply
from tortoise_jax.models.dvae import DiscreteVAE
from tortoise_jax.models.layers import Array
from tortoise_jax.models.unified_voice import UnifiedVoice
from tortoise_jax.synthesis import voices
from tortoise_jax.training import losses


@dataclasses.dataclass(frozen=True)
class Tortoise:
    """The models of a converted checkpoint or a run.

    Axis letters: b rows, s positions, t frames, m = 80 bands, c codes, d width; samples are spelled out.

    Where a checkpoint holds one of them only, what needs the other raises UserError.
    """

    pretrained: Pretrained

    @property
    def params(self) -> Any:
        """The AR model's parameter tree."""
        return self.pretrained.ar.params

    @property
    def model(self) -> UnifiedVoice:
        return UnifiedVoice(self.pretrained.ar.config)

    @property
    def dvae(self) -> DiscreteVAE:
        return DiscreteVAE(self.pretrained.dvae.config)

    def text_ids(self, text: str, cleaner: str = "english") -> list[int]:
        """Text, cleaned, as token ids, without start and stop."""
        return self.pretrained.tokenizer.encode(text, cleaner)

    def log_mel(self, waveform: np.ndarray | Array) -> Array:
        """Waveform (…, samples) in [-1, 1] at 22050 Hz -> mel (…, 1 + samples // 256, m), mel norms applied."""
        return audio.log_mel(waveform, self.pretrained.mel_norms)

    def encode(self, mel: np.ndarray | Array) -> Array:
        """mel (t, m) or (b, t, m) -> codes (ceil(t / 4),) or (b, ceil(t / 4)) int32."""
        return self._dvae("encode", mel, rank=3)

    def decode(self, codes: np.ndarray | Array) -> Array:
        """codes (c,) or (b, c), each below the codebook's size -> mel (4 c, m) or (b, 4 c, m)."""
        codes = jnp.asarray(codes)
        if codes.size and not 0 <= int(codes.min()) <= int(codes.max()) < self.dvae.config.codes:
            raise UserError(f"codes must lie in 0..{self.dvae.config.codes - 1}, found {codes.min()}..{codes.max()}")
        return self._dvae("decode", codes, rank=2)

    def _dvae(self, method: str, x: np.ndarray | Array, rank: int) -> Array:
        batch = jnp.asarray(x)[None] if np.ndim(x) == rank - 1 else jnp.asarray(x)
        out = apply(self.dvae, method, self.pretrained.dvae.variables, batch)
        return out[0] if np.ndim(x) == rank - 1 else out

    def conditioning(self, waveforms: Sequence[np.ndarray]) -> Array:
        """Clips of one voice, each (samples,) -> conditioning (d,): the mean over their vectors.

        Each clip is cut or zero-padded to 132,300 samples, what synthesis gives the encoder: the vector depends on it.
        """
        if not waveforms:
            raise UserError("conditioning needs at least one clip")
        clips = [audio.crop_conditioning(np.asarray(clip, np.float32)) for clip in waveforms]
        return jnp.asarray(voices.condition(self.params, self.model.config, self.pretrained.mel_norms, clips))

    def batch(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> dict[str, np.ndarray]:
        """(text ids, codes) of b clips, without start and stop -> arrays (b, s).

        tokens, token_types, positions, targets int32, weights float32.

        A row is [conditioning | start text stop | start codes stop | padding]; see batches.py.
        """
        length = max(batches.row_length(len(text_ids), len(codes)) for text_ids, codes in rows)
        made = [batches.row(np.asarray(text), np.asarray(codes), length, self.model.config) for text, codes in rows]
        return {name: np.stack([one[name] for one in made]) for name in made[0]}

    def outputs(self, conditioning: Array, batch: Mapping[str, np.ndarray]) -> dict[str, Array]:
        """conditioning (b, d), a batch's tokens, token_types, positions (b, s) -> the model's dict (text_logits, …)."""
        rows = (batch[name] for name in ("tokens", "token_types", "positions"))
        return apply(self.model, "from_conditioning", {"params": self.params}, conditioning[:, None], *rows)

    def losses(self, conditioning: Array, batch: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Mean cross-entropies of a batch (with targets and weights too): text, mel, stop."""
        stop = self.model.config.stop_mel
        sums = losses.loss_sums(self.outputs(conditioning, batch), batch, stop)
        means = losses.means(sums, losses.counts(batch, stop))
        return {name: float(means[name]) for name in losses.STREAMS}


def load(path: str | Path, step: int | None = None) -> Tortoise:
    """A directory written by convert/torch_to_flax.py, or a run (its best step, or the one given)."""
    return Tortoise(load_pretrained(path, step=step))
