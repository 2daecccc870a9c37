"""The fast path's decoder: hidden states of the AR model and its voice vector straight to a 24 kHz waveform.

Follows tortoise's HifiganGenerator as api_fast uses it, all in full float32.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from tortoise_jax.models.convolutions import Conv, ConvTranspose
from tortoise_jax.models.layers import FRAMES_PER_CODE, Array, frames_of, mask_of, zero_padding

DILATIONS = (1, 3, 5)
SLOPE = 0.1
LAST_SLOPE = 0.01
ENDS_KERNEL = 7
RATE_NUMERATOR, RATE_DENOMINATOR = 160, 147  # 24000 / 22050


@dataclasses.dataclass(frozen=True)
class HifiganConfig:
    """Dimensions of the fast path's decoder, read from its tensors; a stride is half its kernel.

    channels: after the first convolution, halved by each upsampling. kernels: of the upsampling convolutions.
    resblock_kernels: of the stacks after each. weight_norm: as in the other vocoder's config.
    """

    latent_width: int
    voice_width: int
    channels: int
    kernels: tuple[int, ...]
    resblock_kernels: tuple[int, ...]
    weight_norm: bool = True

    def __post_init__(self) -> None:
        for name in ("kernels", "resblock_kernels"):  # lists where they were read from a .json
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(kernel // 2 for kernel in self.kernels)

    @property
    def hop(self) -> int:
        return math.prod(self.strides)


RELEASED = HifiganConfig(
    latent_width=1024, voice_width=1024, channels=512, kernels=(16, 16, 4, 4), resblock_kernels=(3, 7, 11)
)


def interpolated(x: Array, scale: float, frames: int, lengths: Array) -> Array:
    """x (b, t, d) at `frames` positions a row, linearly between the two nearest. lengths (b,): of what is real.

    torch's: half-pixel centres, positions in float32 (rounded once, of the rounded scale), and the scale as given, not
    the ratio of the lengths.
    """
    step = float(np.float32(1.0 / scale))
    position = np.maximum((np.arange(frames) + 0.5) * step - 0.5, 0.0).astype(np.float32)
    below = position.astype(np.int32)
    fraction = jnp.asarray(position - below.astype(np.float32), x.dtype)[None, :, None]
    last = lengths[:, None] - 1
    pick = lambda index: jnp.take_along_axis(x, jnp.minimum(index[None], last)[..., None], axis=1)
    return (1 - fraction) * pick(below) + fraction * pick(below + 1)


def upsampled(latents: Array, frames: int, lengths: Array | None = None) -> tuple[Array, Array]:
    """latents (b, s, l) -> at four frames a code (b, 4 s, l), and of those (b, frames, l) at 24 kHz.

    lengths (b,): codes of each row, s where None. Where the second step keeps a row's length, torch copies it.
    """
    b, s, _ = latents.shape
    codes = jnp.full((b,), s) if lengths is None else lengths
    four = interpolated(latents, FRAMES_PER_CODE, FRAMES_PER_CODE * s, codes)
    real = FRAMES_PER_CODE * codes
    scaled = interpolated(four, RATE_NUMERATOR / RATE_DENOMINATOR, frames, real)
    copied = jnp.take_along_axis(four, jnp.minimum(jnp.arange(frames)[None], real[:, None] - 1)[..., None], axis=1)
    kept = real * RATE_NUMERATOR // RATE_DENOMINATOR == real
    return four, jnp.where(kept[:, None, None], copied, scaled)


class ResBlock(nn.Module):
    """Three times y + conv(lrelu(conv(lrelu(y)))), the first of each pair dilated."""

    kernel: int
    weight_norm: bool

    @nn.compact
    def __call__(self, x: Array, mask: Array | None) -> Array:  # (b, t, c) -> (b, t, c)
        for c, dilation in enumerate(DILATIONS):
            first = Conv(x.shape[-1], self.kernel, self.weight_norm, dilation, name=f"convs1_{c}")
            second = Conv(x.shape[-1], self.kernel, self.weight_norm, name=f"convs2_{c}")
            h = first(zero_padding(nn.leaky_relu(x, SLOPE), mask))
            x = x + second(zero_padding(nn.leaky_relu(h, SLOPE), mask))
        return x


class Hifigan(nn.Module):
    """Hidden states at the codes, the stop's included (b, s, l), and the AR model's voice vector (b, v) to speech."""

    config: HifiganConfig

    @nn.compact
    def __call__(self, x: Array, voice: Array, lengths: Array | None = None) -> dict[str, Any]:
        """x (b, t, l) at 24 kHz mel rate, voice (b, v), lengths (b,) real frames -> waveform (b, t hop) in [-1, 1].

        And what is on the way: conv_pre (b, t, c), cond (b, 1, c), stages (list of dicts: input, ups, resblocks, out),
        before_tanh.
        """
        c = self.config
        conv = lambda width, name: Conv(width, ENDS_KERNEL, c.weight_norm, name=name)
        first = conv(c.channels, "conv_pre")(zero_padding(x, mask_of(lengths, x.shape[1])))
        cond = Conv(c.channels, 1, False, name="cond_layer")(voice[:, None])
        h, stages, hop = first + cond, [], 1
        for i, (kernel, stride) in enumerate(zip(c.kernels, c.strides, strict=True)):
            given = nn.leaky_relu(zero_padding(h, mask_of(scaled(lengths, hop), h.shape[1])), SLOPE)
            hop *= stride
            width = c.channels // 2 ** (i + 1)
            up = ConvTranspose(width, kernel, stride, (kernel - stride) // 2, 0, c.weight_norm, name=f"ups_{i}")
            h = raised = up(given)
            mask = mask_of(scaled(lengths, hop), h.shape[1])
            count = len(c.resblock_kernels)
            stacks = [
                ResBlock(size, c.weight_norm, name=f"resblocks_{count * i + j}")(h, mask)
                for j, size in enumerate(c.resblock_kernels)
            ]
            h = sum(stacks[1:], start=stacks[0]) / count
            stages.append({"input": given, "ups": raised, "resblocks": stacks, "out": h})
        given = zero_padding(nn.leaky_relu(h, LAST_SLOPE), mask_of(scaled(lengths, hop), h.shape[1]))
        last = conv(1, "conv_post")(given)[..., 0]
        return {
            "conv_pre": first, "cond": cond, "stages": stages, "conv_post_input": given, "before_tanh": last,
            "waveform": jnp.tanh(last),
        }  # fmt: skip

    def decode(self, latents: Array, voice: Array, frames: int, lengths: Array | None = None) -> Array:
        """latents (b, s, l), voice (b, v), frames: frames_of(s), lengths (b,) codes -> waveform (b, frames hop)."""
        x = upsampled(latents, frames, lengths)[1]
        real = None if lengths is None else frames_of(lengths)
        return self(x, voice, real)["waveform"]


def scaled(lengths: Array | None, factor: int) -> Array | None:
    return None if lengths is None else lengths * factor
