"""The diffusion sampler: noise to a mel in N steps, one compiled loop for all rows, guided or not.

Ancestral sampling as upstream's p_sample_loop: x0 is clipped, the variance is the network's, and the unconditional pass
is half of the same batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tortoise_jax.models.diffusion import DiffusionDecoder
from tortoise_jax.models.layers import Array
from tortoise_jax.synthesis import schedule

Tree = Any
MEL_MIN, MEL_MAX = -11.512925148010254, 2.3143386840820312  # what the network's [-1, 1] stands for


def coefficients(steps: int, strength: float | None) -> dict[str, np.ndarray]:
    """What the loop reads, float32 (N,) in the order of the steps taken, the last spaced index first.

    strength: of the guidance, None for none.
    """
    spaced = schedule.spaced(steps)
    by_index = {
        "trained": spaced.trained.astype(np.int32),
        "log_beta": np.log(spaced.betas),
        "log_variance": spaced.log_variance,
        "coef1": spaced.coef1,
        "coef2": spaced.coef2,
        "recip": spaced.recip,
        "recipm1": spaced.recipm1,
        "guidance": schedule.guidance(steps, strength or 0.0),
        "noise": (np.arange(steps) > 0).astype(np.float64),  # none at the last step
    }
    return {
        name: (values if name == "trained" else values.astype(np.float32))[::-1].copy()
        for name, values in by_index.items()
    }


def loop(
    decoder: DiffusionDecoder,
    variables: Tree,
    aligned: Array,
    mask: Array | None,
    start: Array,
    draw: Callable[[Array], Array],
    steps: dict[str, Array],
    guided: bool,
) -> tuple[Array, dict[str, Array]]:
    """aligned (b, t, d), mask (b, t), start (b, t, m) -> mel (b, t, m) in [-1, 1], and every step's arrays.

    draw(j): the noise (b, t, m) after the j-th step taken. steps: of `coefficients`.
    """
    b, t, m = start.shape
    call: Any = functools.partial(decoder.apply, variables)
    twice = lambda rows: jnp.concatenate([rows, rows]) if guided else rows
    if guided:
        aligned = jnp.concatenate([aligned, call(b, t, method="unconditioned").astype(aligned.dtype)])
    real = None if mask is None else twice(mask)

    def step(x: Array, now: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        rows = 2 * b if guided else b
        out = call(twice(x), jnp.full((rows,), now["trained"]), aligned, real, method="estimate")
        eps, variance = out[:b, :, :m], out[:b, :, m:]  # the variance is the conditional pass's alone
        if guided:
            eps = (1 + now["guidance"]) * eps - now["guidance"] * out[b:, :, :m]
        x0 = jnp.clip(now["recip"] * x - now["recipm1"] * eps, -1, 1)
        mean = now["coef1"] * x0 + now["coef2"] * x
        fraction = (variance + 1) / 2
        log_variance = fraction * now["log_beta"] + (1 - fraction) * now["log_variance"]
        x = mean + now["noise"] * jnp.exp(0.5 * log_variance) * draw(now["index"])
        return x, {"out": out, "x0": x0, "log_variance": log_variance, "x": x}

    count = steps["trained"].shape[0]
    return jax.lax.scan(step, start, steps | {"index": jnp.arange(count, dtype=jnp.int32)})


@functools.partial(jax.jit, static_argnames=("decoder", "frames"))
def align(
    decoder: DiffusionDecoder, variables: Tree, latents: Array, voices: Array, frames: int, lengths: Array
) -> Array:
    """latents (b, s, l), voices (b, 2 d), lengths (b,) codes -> what does not depend on the step, (b, frames, d)."""
    call: Any = functools.partial(decoder.apply, variables)
    return call(latents, voices, frames, lengths, method="align")["aligned"]


@functools.partial(jax.jit, static_argnames=("decoder", "guided"))
def denoise(
    decoder: DiffusionDecoder,
    variables: Tree,
    aligned: Array,
    mask: Array,
    keys: Array,
    steps: dict[str, Array],
    temperature: Array,
    guided: bool,
) -> Array:
    """aligned (b, t, d), mask (b, t), keys (b,) -> log-mel (b, t, m), natural logarithms of magnitudes.

    Each row draws from its own key, so that its mel depends neither on the other rows nor on how far it is padded.
    temperature: of the first noise alone, as upstream has it.
    """
    shape = (aligned.shape[1], decoder.config.mel_channels)
    draw = lambda j: jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, j), shape))(keys)
    first = steps["trained"].shape[0]  # a number that no step has
    mel, _ = loop(decoder, variables, aligned, mask, temperature * draw(jnp.int32(first)), draw, steps, guided)
    return denormalised(mel)


def denormalised(mel: Array) -> Array:
    """A mel in [-1, 1] -> natural logarithms of magnitudes."""
    return (mel + 1) / 2 * (MEL_MAX - MEL_MIN) + MEL_MIN
