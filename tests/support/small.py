"""A model small enough to be compiled many times, with rows to train it on. Needs no torch, so hosts start quickly."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tortoise_jax.data import batches
from tortoise_jax.models.layers import Compute
from tortoise_jax.models.unified_voice import UnifiedVoice, UnifiedVoiceConfig
from tortoise_jax.training.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer, split
from tortoise_jax.training.step import StepConfig

Batch = dict[str, np.ndarray]
CONFIG = UnifiedVoiceConfig(
    layers=2,
    width=32,
    heads=2,
    text_tokens=20,
    mel_tokens=18,
    text_positions=14,
    mel_positions=24,
    conditioning_layers=2,
    mel_channels=6,
)
DROPOUT = Compute(embed_dropout=0.1, residual_dropout=0.1, attention_dropout=0.1)
LONGEST = 1 + (10 + 2) + (18 + 2)


def joined_batch(
    config: UnifiedVoiceConfig, conditioning_mel: np.ndarray, text: list[Any], codes: list[Any], length: int = 0
) -> Batch:
    """The data set's joined rows with mels in place of waveforms, without the micro-batch axis.

    conditioning_mel (b, n, m, t) as torch has it; text and codes: each row's real tokens; length 0: the longest's.
    """
    length = length or max(batches.row_length(len(t), len(c)) for t, c in zip(text, codes, strict=True))
    rows = [batches.row(t, c, length, config) for t, c in zip(text, codes, strict=True)]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]} | {
        "conditioning_mel": np.ascontiguousarray(conditioning_mel.swapaxes(2, 3)),
        "example": np.arange(len(rows), dtype=np.int32),
    }


@functools.cache
def params() -> Any:
    """Random parameters of which every one changes the loss: no zero bias, no norm of ones."""
    row, mel = jnp.zeros((1, 4), jnp.int32), jnp.zeros((1, 1, 4, CONFIG.mel_channels))
    initial = jax.jit(UnifiedVoice(CONFIG).init)(jax.random.key(0), mel, row, row, row)["params"]
    random = np.random.default_rng(0)
    noisy = lambda leaf: np.asarray(leaf) + 0.1 * random.standard_normal(leaf.shape, np.float32)
    return jax.tree.map(noisy, initial)


def clips(seed: int, rows: int = 8, length: int = LONGEST) -> Batch:
    """`rows` clips of uneven lengths as one batch."""
    random = np.random.default_rng(seed)
    lengths = list(zip(random.integers(1, 11, rows), random.integers(2, 19, rows), strict=True))
    text = [random.integers(1, CONFIG.start_text, n) for n, _ in lengths]
    codes = [random.integers(0, CONFIG.codes, n) for _, n in lengths]
    mel = random.standard_normal((rows, 2, CONFIG.mel_channels, 5), np.float32)
    return joined_batch(CONFIG, mel, text, codes, length) | {
        "example": random.permutation(1000)[:rows].astype(np.int32)
    }


def with_padding_rows(batch: Batch, rows: int) -> Batch:
    """Filled up to `rows` rows with such as the last batch of an epoch ends in."""
    have, length = batch["tokens"].shape
    padding = batches.padding_row(length) | {
        "example": np.array(-1, np.int32),
        "conditioning_mel": np.zeros_like(batch["conditioning_mel"][0]),
    }
    return {name: np.concatenate([value, *[padding[name][None]] * (rows - have)]) for name, value in batch.items()}


def step_config(compute: Compute = DROPOUT, axis: str | None = "data", freeze: str = "", **options: Any) -> StepConfig:
    """DLAS's recipe with a rate and milestones at which 20 steps matter; keeps the last gradient for tests."""
    config = OptimizerConfig(learning_rate=1e-3, milestones=(8, 14), clip_norm=0.5, freeze=freeze)
    return StepConfig(
        model=UnifiedVoice(CONFIG, compute),
        optimizer=keeping_the_gradient(make_optimizer(config, params()), freeze),
        schedule=learning_rate_schedule(config),
        mel_norms=None,
        seed=3,
        freeze=freeze,
        axis=axis,
        **options,
    )


def keeping_the_gradient(optimizer: optax.GradientTransformation, freeze: str) -> optax.GradientTransformation:
    """The same updates; the state is (the optimiser's own, the gradient it was last given)."""

    def update(gradient: Any, state: Any, params: Any) -> Any:
        updates, inner = optimizer.update(gradient, state[0], params)
        return updates, (inner, gradient)

    def init(params: Any) -> Any:
        return optimizer.init(params), jax.tree.map(jnp.zeros_like, split(params, freeze)[0])

    return optax.GradientTransformation(init, update)
