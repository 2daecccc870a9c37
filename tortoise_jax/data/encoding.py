"""Waveforms to codes on the accelerator, many clips at once, each as if it were alone.

A clip is encoded with zeros behind it up to a length that depends on its own alone, and at least so many that neither
what follows nor the end of the batch can reach the codes that are kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from tortoise_jax import parallel
from tortoise_jax.audio import HOP, N_FFT, SAMPLES_PER_CODE, code_count, log_mel
from tortoise_jax.errors import UserError
from tortoise_jax.models.dvae import DiscreteVAE, DVAEConfig
from tortoise_jax.models.layers import Array

Tree = Any
ZEROS_BEHIND = 8192
# Few shapes to compile, against zeros encoded for nothing: about 11 % behind the clips in steps of 1.5 s, and 6 % in
# half-empty batches of 8 rows where 512 clips of 1 to 10 s are encoded at a time.
LENGTH_BUCKET = 32 * SAMPLES_PER_CODE
ROWS = 8


def zeros_behind(config: DVAEConfig) -> int:
    """Samples that must follow a clip: at least 8192, and more where the dVAE looks further ahead.

    Its strided layers see (kernel // 2) frames ahead, each in steps twice those of the last; a residual block has two
    convolutions at the slowest step; the last frame seen reaches half a window further.
    """
    reach = config.kernel // 2
    frames = reach * (config.frames_per_code - 1) + 2 * config.res_blocks * reach * config.frames_per_code
    return max(ZEROS_BEHIND, _round_up(frames * HOP + N_FFT // 2, SAMPLES_PER_CODE))


def padded_samples(samples: int, config: DVAEConfig) -> int:
    """The length a clip of so many samples is encoded at."""
    return _round_up(samples + zeros_behind(config), LENGTH_BUCKET)


@functools.cache
def _program(config: DVAEConfig) -> Callable[[Tree, np.ndarray], Array]:
    """((variables, mel norms), waveforms (b, samples) int16) -> codes (b, codes), compiled once per length."""
    model = DiscreteVAE(config)

    def codes(weights: Tree, waveforms: Array) -> Array:
        variables, mel_norms = weights
        return jnp.asarray(model.apply(variables, log_mel(waveforms, mel_norms), method="encode"))

    return parallel.by_rows(codes, replicated=1, sharded=1)


class CodeEncoder:
    """The dVAE of a checkpoint on this host's devices, which share the rows of a batch: `rows` each.

    Raises UserError if a code of it does not stand for 1024 samples, which all lengths of the AR model count on.
    """

    def __init__(self, config: DVAEConfig, variables: Tree, mel_norms: np.ndarray, rows: int = ROWS) -> None:
        if config.frames_per_code * HOP != SAMPLES_PER_CODE:
            raise UserError(
                f"the dVAE has {config.layers} strided layers: a code of it stands for {config.frames_per_code * HOP} "
                f"samples, expected {SAMPLES_PER_CODE} (2 layers), which is what TorToiSe's AR models count on"
            )
        if config.codes > 2**16:
            raise UserError(f"the dVAE has {config.codes} codes; a data set keeps them in 16 bits (65536 at most)")
        self._config, self._rows = config, rows * parallel.local_device_count()
        self._weights = parallel.on_every_device((variables, np.asarray(mel_norms)))
        self._codes = _program(config)

    def encode(
        self, waveforms: Sequence[np.ndarray], progress: Callable[[list[int]], None] = lambda places: None
    ) -> list[np.ndarray]:
        """int16 waveforms (samples,) -> their codes (samples // 1024 + 1,) uint16; progress: told what is done."""
        batches = self._batches([len(waveform) for waveform in waveforms])
        # Dispatch is asynchronous: the devices work while later batches are being put together.
        running = [
            (members, self._codes(self._weights, self._joined(waveforms, members, length)))
            for length, members in batches
        ]
        codes: dict[int, np.ndarray] = {}
        for members, result in running:
            for place, row in zip(members, np.asarray(result), strict=False):
                codes[place] = row[: code_count(len(waveforms[place]))].astype(np.uint16)
            progress(members)
        return [codes[i] for i in range(len(waveforms))]

    def _batches(self, lengths: list[int]) -> list[tuple[int, list[int]]]:
        """(padded length, places), at most `rows` each, clips of one padded length together."""
        buckets: dict[int, list[int]] = {}
        for place, samples in enumerate(lengths):
            buckets.setdefault(padded_samples(samples, self._config), []).append(place)
        return [
            (length, places[i : i + self._rows])
            for length, places in sorted(buckets.items())
            for i in range(0, len(places), self._rows)
        ]

    def _joined(self, waveforms: Sequence[np.ndarray], members: list[int], length: int) -> np.ndarray:
        rows = np.zeros((self._rows, length), np.int16)
        for row, place in zip(rows, members, strict=False):
            row[: len(waveforms[place])] = waveforms[place]
        return rows


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
