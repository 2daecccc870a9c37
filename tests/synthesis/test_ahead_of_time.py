"""The diffusion sampler at its real size, compiled for a TPU that is not here: whether it fits, and in what memory."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tests.support.compilers import needs_compilers
from tortoise_jax.checkpoints.parts import abstract_variables
from tortoise_jax.models.diffusion import RELEASED, frames_of
from tortoise_jax.synthesis import denoising, rendering
from tortoise_jax.training.estimate import GIB, size
from tortoise_jax.training.topologies import parse

ROWS, CODES = rendering.RENDERED_AT_ONCE, 500
WEIGHTS, MOST = 1.09, 8.0  # GiB


@pytest.mark.slow
@needs_compilers
@pytest.mark.usefixtures("compilers")
def test_the_sampler_of_the_released_size_fits_a_tpu() -> None:
    """Four rows of 500 codes (23 s each), guided, as 80 steps of one loop; the memory is printed."""
    variables, steps = abstract_variables(RELEASED), denoising.coefficients(80, 2.0)
    shape = lambda dtype, *axes: jax.ShapeDtypeStruct(axes, dtype)
    rows = (
        shape(np.float32, ROWS, CODES, RELEASED.latent_width),
        shape(np.float32, ROWS, 2 * RELEASED.width),
        shape(np.int32, ROWS),
        shape(np.uint32, ROWS, 2),
    )
    alike = (variables, steps, shape(np.float32))
    denoise = rendering._denoiser(RELEASED, frames_of(CODES), True)
    analysis = parse("v5e:1x1").compile(denoise, *alike, *rows).memory_analysis()
    needed = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes + analysis.output_size_in_bytes
    print(f"sampler: {needed / GIB:.2f} GiB, of it {analysis.temp_size_in_bytes / GIB:.2f} GiB of activations")
    assert size(variables) / GIB == pytest.approx(WEIGHTS, abs=0.01)
    assert needed / GIB < MOST
