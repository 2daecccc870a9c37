"""What a step of dVAE training computes: reconstruction, commitment, and a codebook that follows its features.

A device's batch: wav (a, b, samples) int16, crops of clips, zeros after shorter ones; frames (a, b) int32, how many of
a crop's mel frames are speech, a multiple of the frames of a code, 0 in padding rows; row (a, b) int32, where in the
batch of all devices the row stands; example (a, b) int32, the clip or -1. a: micro-batches, b: rows, t: frames.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tortoise_jax.audio import HOP, SAMPLE_RATE, log_mel
from tortoise_jax.checkpoints.parts import in_collections
from tortoise_jax.models.dvae import DiscreteVAE, move_codebook
from tortoise_jax.models.layers import HIGHEST, Array
from tortoise_jax.training.losses import Sums
from tortoise_jax.training.optimizer import Tree

RECONSTRUCTIONS = ("mse", "smooth_l1")
CODEBOOK = "codebook"  # the top of its paths in the tree of all weights
MOVED = rf"{CODEBOOK}/.*"  # by averages, not by gradients
BANDS = 10  # mel bands that one logged error is the mean of


@dataclasses.dataclass(frozen=True)
class DVAEStep:
    """An `Objective` of training/step.py: the dVAE.

    reconstruction: "mse" or "smooth_l1". commitment: the weight of the mean squared distance of features from their
    codes. revive_below: a code whose cluster size (its average picks per step) is smaller is moved onto a feature of
    the batch; 0 never does. rows: of the batch of all devices, among which such features are drawn.
    """

    model: DiscreteVAE
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    mel_norms: Any
    rows: int
    seed: int = 0
    reconstruction: str = "mse"
    commitment: float = 0.25
    revive_below: float = 0.0
    freeze: str = MOVED
    axis: str | None = "data"

    curves = ("recon", "commit", "perplexity", "used")
    unit = "samples"

    def begun(self, params: Tree) -> Tree:
        return params

    def counts(self, batch: Any) -> Sums:
        """How many numbers each loss is the mean of, and the codes."""
        c = self.model.config
        frames = jnp.sum(batch["frames"]).astype(jnp.float32)
        codes = frames / c.frames_per_code
        return {"recon_count": frames * c.channels, "commit_count": codes * c.codebook_dim, "code_count": codes}

    def sums(self, params: Tree, batch: Any, step: Array | np.ndarray | None) -> Sums:
        """recon_sum, commit_sum, bands (m,): the reconstruction error by band; and what moves the codebook: picked
        (codes,), features (codebook_dim, codes). step: None in an evaluation, where nothing is moved."""
        mel = self.mel(batch)
        outputs: Any = self.model.apply(in_collections(self.model.config, params), mel)
        real = (jnp.arange(mel.shape[1])[None] < batch["frames"][:, None]).astype(jnp.float32)[..., None]  # (b, t, 1)
        real_codes = real[:, :: self.model.config.frames_per_code]  # (b, c, 1)
        bands = jnp.sum(error(self.reconstruction, outputs["out"], mel) * real, axis=(0, 1))
        commitment = jnp.square(outputs["quantized"] - outputs["features"]) * real_codes
        picked = jax.nn.one_hot(outputs["codes"], self.model.config.codes) * real_codes
        found = {"recon_sum": jnp.sum(bands), "commit_sum": jnp.sum(commitment), "bands": bands}
        found["picked"] = jnp.sum(picked, axis=(0, 1))
        if step is not None:
            features = jax.lax.stop_gradient(outputs["features"])
            found["features"] = jnp.einsum("bce,bcn->en", features, picked, precision=HIGHEST)
            if self.revive_below:
                drawn = self.drawn(batch, step, mel.shape[1] // self.model.config.frames_per_code)
                found["drawn"] = jnp.sum(drawn, axis=(0, 1))
                found["drawn_features"] = jnp.einsum("bce,bcn->en", features, drawn, precision=HIGHEST)
        return found

    def mel(self, batch: Any) -> Array:
        """(b, t, m), with as many frames as the crop has whole codes for."""
        frames = batch["wav"].shape[-1] // HOP
        return jax.lax.stop_gradient(log_mel(batch["wav"], self.mel_norms)[:, :frames])

    def drawn(self, batch: Any, step: Array | np.ndarray, codes: int) -> Array:
        """One-hot (b, c, n): for each code of the codebook one feature of the whole batch, where it is in these rows.

        Which one depends on (seed, step) alone, so that devices agree without a word.
        """
        key = jax.random.fold_in(jax.random.key(self.seed), step)
        by_row, by_code = jax.random.split(key)
        count = self.model.config.codes
        row = jax.random.randint(by_row, (1, count), 0, self.rows)
        real = batch["frames"] // self.model.config.frames_per_code  # (b,)
        index = jnp.floor(jax.random.uniform(by_code, (1, count)) * real[:, None].astype(jnp.float32))  # (b, n)
        here = (batch["row"][:, None] == row) & (real[:, None] > 0)  # (b, n)
        return jax.nn.one_hot(index.astype(jnp.int32), codes, axis=1) * here[:, None].astype(jnp.float32)

    def loss(self, sums: Sums, counts: Sums) -> Array:
        commitment = sums["commit_sum"] / counts["commit_count"]
        return sums["recon_sum"] / counts["recon_count"] + self.commitment * commitment

    def moved(self, params: Tree, sums: Sums) -> Tree:
        """The parameters with the codebook after a step, from the sums of all devices.

        A revived code begins with the cluster size at which codes are dead: where the next step does not pick it, it is
        moved again.
        """
        book = move_codebook(params[CODEBOOK], sums["picked"], sums["features"])
        if self.revive_below:
            dead = (book["cluster_size"] < self.revive_below) & (sums["drawn"] > 0)
            vectors = sums["drawn_features"]
            book = {
                "embed": jnp.where(dead[None], vectors, book["embed"]),
                "cluster_size": jnp.where(dead, self.revive_below, book["cluster_size"]),
                "embed_avg": jnp.where(dead[None], self.revive_below * vectors, book["embed_avg"]),
            }
        return params | {CODEBOOK: book}

    def metrics(self, sums: Sums, counts: Sums, batch: Any = None) -> Sums:
        """Losses; how many codes the picks would be if all were as frequent (perplexity), which share is used."""
        share = sums["picked"] / jnp.maximum(jnp.sum(sums["picked"]), 1.0)
        bands = self.model.config.channels
        return {
            "loss/recon": sums["recon_sum"] / jnp.maximum(counts["recon_count"], 1.0),
            "loss/commit": sums["commit_sum"] / jnp.maximum(counts["commit_count"], 1.0),
            "loss/bands": sums["bands"] / jnp.maximum(counts["recon_count"] / bands, 1.0),
            "codes/perplexity": jnp.exp(-jnp.sum(share * jnp.log(jnp.maximum(share, 1e-12)))),
            "codes/used": jnp.mean((sums["picked"] > 0).astype(jnp.float32)),
        }

    def scalars(self, metrics: dict[str, Any]) -> dict[str, float]:
        """What is logged, as plain numbers: the error by band in groups of ten."""
        values = {name: float(value) for name, value in metrics.items() if np.ndim(value) == 0}
        bands = np.asarray(metrics["loss/bands"])
        for start in range(0, len(bands), BANDS):
            values[f"loss/bands_from_{start}"] = float(bands[start : start + BANDS].mean())
        return values

    def speech_seconds(self, metrics: dict[str, Any]) -> float:
        return float(metrics["code_count"]) * self.model.config.frames_per_code * HOP / SAMPLE_RATE

    def batch_shapes(self, length: int, rows: int, accumulation: int) -> dict[str, Any]:
        """One device's batch of crops of so many samples, as shapes."""
        row = jax.ShapeDtypeStruct((accumulation, rows), np.int32)
        wav = jax.ShapeDtypeStruct((accumulation, rows, length), np.int16)
        return {"wav": wav, "frames": row, "row": row, "example": row}


def error(kind: str, out: Array, mel: Array) -> Array:
    """The reconstruction error of each number; smooth_l1 is squared below 1 and linear above, as torch has it."""
    difference = out - mel
    if kind == "mse":
        return jnp.square(difference)
    size = jnp.abs(difference)
    return jnp.where(size < 1.0, 0.5 * jnp.square(difference), size - 0.5)
