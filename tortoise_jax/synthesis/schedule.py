"""The noise schedule of the diffusion sampler: upstream's 4000 trained steps, and the N of them that are kept.

Everything is derived in float64; what a step uses is cast to float32.
"""

from __future__ import annotations

import dataclasses

import numpy as np

TRAINED_STEPS = 4000
FIRST_BETA, LAST_BETA = 2.5e-5, 5e-3


def kept_steps(steps: int) -> np.ndarray:
    """The trained steps (N,) that are kept: evenly spaced from the first to the last, int.

    As upstream: positions summed up one by one in float64, each rounded half to even.
    """
    stride = (TRAINED_STEPS - 1) / (steps - 1)
    position, kept = 0.0, []
    for _ in range(steps):
        kept.append(round(position))
        position += stride
    return np.array(kept)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """By spaced index i, 0 the last step taken; each (N,) float64 but `trained`, the step that the network is given.

    x0 = recip * x - recipm1 * eps; mean = coef1 * x0 + coef2 * x; the variance lies between exp(log_variance) and beta.
    """

    trained: np.ndarray
    betas: np.ndarray
    alphas_cumprod: np.ndarray
    log_variance: np.ndarray
    coef1: np.ndarray
    coef2: np.ndarray
    recip: np.ndarray
    recipm1: np.ndarray


def spaced(steps: int) -> Schedule:
    """The schedule of `steps` kept steps, at least 2. All is derived from the betas between them."""
    trained = kept_steps(steps)
    cumulative = np.cumprod(1.0 - np.linspace(FIRST_BETA, LAST_BETA, TRAINED_STEPS, dtype=np.float64))[trained]
    betas = 1.0 - cumulative / np.append(1.0, cumulative[:-1])
    alphas_cumprod = np.cumprod(1.0 - betas)
    before = np.append(1.0, alphas_cumprod[:-1])
    variance = betas * (1.0 - before) / (1.0 - alphas_cumprod)
    return Schedule(
        trained=trained,
        betas=betas,
        alphas_cumprod=alphas_cumprod,
        log_variance=np.log(np.append(variance[1], variance[1:])),  # the first would be the logarithm of 0
        coef1=betas * np.sqrt(before) / (1.0 - alphas_cumprod),
        coef2=(1.0 - before) * np.sqrt(1.0 - betas) / (1.0 - alphas_cumprod),
        recip=np.sqrt(1.0 / alphas_cumprod),
        recipm1=np.sqrt(1.0 / alphas_cumprod - 1.0),
    )


def guidance(steps: int, strength: float) -> np.ndarray:
    """How far each spaced index (N,) goes beyond the conditional estimate: hardly at first, `strength` at the end."""
    return strength * (1.0 - np.arange(steps) / steps)
