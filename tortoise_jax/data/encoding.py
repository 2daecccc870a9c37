"""Waveforms to codes on the accelerator: many clips at once, with the codes that each clip has alone.

Zeros are added after each clip. How many depends on the clip's own length only, and they are enough that nothing after
them can change the clip's codes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from tortoise_jax import parallel
from tortoise_jax.audio import HOP, N_FFT, SAMPLES_PER_CODE, code_count, log_mel
from tortoise_jax.data.lengths import round_up
from tortoise_jax.errors import UserError
from tortoise_jax.models.dvae import DiscreteVAE, DVAEConfig
from tortoise_jax.models.layers import Array

Tree = Any
MIN_ZEROS = 8192
# Fewer lengths to compile cost more zeros to encode: with steps of 1.5 s a tenth of the work is zeros more.
# Accelerators encode faster than they compile (an H200: half an hour of speech in under a second, but 8 s for each
# length), so theirs double: at most seven.
LENGTH_BUCKET = 32 * SAMPLES_PER_CODE
# The last batch of each length has rows without a clip: with 100 clips of 1 to 10 s they are 8 % of the work in batches
# of 4 rows, 19 % in batches of 8; with 256 clips 2 % and 5 %. A CPU is no faster with 8.
ROWS, ROWS_ON_CPU = 8, 4


def zeros_after(config: DVAEConfig) -> int:
    """How many zero samples must follow a clip: 8192, or more for a dVAE that looks further ahead.

    Each strided layer looks kernel // 2 steps ahead, steps of twice as many frames as in the layer before; a residual
    block has two convolutions at the largest step; and the last frame reaches half a window further.
    """
    reach = config.kernel // 2
    frames = reach * (config.frames_per_code - 1) + 2 * config.res_blocks * reach * config.frames_per_code
    return max(MIN_ZEROS, round_up(frames * HOP + N_FFT // 2, SAMPLES_PER_CODE))


def padded_samples(samples: int, config: DVAEConfig) -> int:
    """The length, in samples, to which a clip of so many samples is padded for encoding."""
    buckets = -(-(samples + zeros_after(config)) // LENGTH_BUCKET)
    return LENGTH_BUCKET * (buckets if parallel.on_cpu() else 1 << (buckets - 1).bit_length())


@functools.cache
def _program(config: DVAEConfig) -> Callable[[Tree, np.ndarray], Array]:
    """((variables, mel norms), waveforms (b, samples) int16) -> codes (b, codes), compiled once per length."""
    model = DiscreteVAE(config)

    def codes(weights: Tree, waveforms: Array) -> Array:
        variables, mel_norms = weights
        return jnp.asarray(model.apply(variables, log_mel(waveforms, mel_norms), method="encode"))

    return parallel.by_rows(codes, replicated=1, sharded=1)


class CodeEncoder:
    """The dVAE of a checkpoint on this host's devices: each encodes `rows` clips of a batch, by default as suits it.

    Raises UserError if its codes do not stand for 1024 samples each, because all lengths of the AR model rely on that.
    """

    def __init__(self, config: DVAEConfig, variables: Tree, mel_norms: np.ndarray, rows: int = 0) -> None:
        if config.frames_per_code * HOP != SAMPLES_PER_CODE:
            raise UserError(
                f"the dVAE has {config.layers} strided layers: a code of it stands for {config.frames_per_code * HOP} "
                f"samples, expected {SAMPLES_PER_CODE} (2 layers), which is what TorToiSe's AR models count on"
            )
        if config.codes > 2**16:
            raise UserError(f"the dVAE has {config.codes} codes; a data set keeps them in 16 bits (65536 at most)")
        rows = rows or (ROWS_ON_CPU if parallel.on_cpu() else ROWS)
        self._config, self._rows = config, rows * parallel.local_device_count()
        self._weights = parallel.on_every_device((variables, np.asarray(mel_norms)))
        self._codes = _program(config)

    def encode(
        self, waveforms: Sequence[np.ndarray], progress: Callable[[list[int]], None] = lambda batch: None
    ) -> list[np.ndarray]:
        """int16 waveforms (samples,) -> their codes (samples // 1024 + 1,) uint16.

        progress: called after each batch with the indices of its clips.
        """
        batches = self._batches([len(waveform) for waveform in waveforms])
        # Dispatch is asynchronous: the devices work while later batches are being put together.
        running = [
            (members, self._codes(self._weights, self._joined(waveforms, members, length)))
            for length, members in batches
        ]
        codes: dict[int, np.ndarray] = {}
        for members, result in running:
            for index, row in zip(members, np.asarray(result), strict=False):
                codes[index] = row[: code_count(len(waveforms[index]))].astype(np.uint16)
            progress(members)
        return [codes[i] for i in range(len(waveforms))]

    def _batches(self, lengths: list[int]) -> list[tuple[int, list[int]]]:
        """(padded length, indices of clips of this padded length, at most one for each row)."""
        buckets: dict[int, list[int]] = {}
        for index, samples in enumerate(lengths):
            buckets.setdefault(padded_samples(samples, self._config), []).append(index)
        return [
            (length, members[i : i + self._rows])
            for length, members in sorted(buckets.items())
            for i in range(0, len(members), self._rows)
        ]

    def _joined(self, waveforms: Sequence[np.ndarray], members: list[int], length: int) -> np.ndarray:
        rows = np.zeros((self._rows, length), np.int16)
        for row, index in zip(rows, members, strict=False):
            row[: len(waveforms[index])] = waveforms[index]
        return rows
