"""UnivNet, the vocoder: a 24 kHz mel and noise to a waveform, by convolutions whose kernels are predicted from the mel.

Follows tortoise's UnivNetGenerator as released, all in full float32.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from tortoise_jax.models.convolutions import Conv, ConvTranspose, reflected
from tortoise_jax.models.layers import HIGHEST, Array, mask_of, zero_padding

DILATIONS = (1, 3, 9, 27)
SLOPE = 0.2  # of every leaky ReLU, the kernel predictor's too
KERNEL = 3
ENDS_KERNEL = 7  # of the first and the last convolution, which pad by reflection
PREDICTOR_BLOCKS = 3
TAIL_FRAMES = 10  # appended before, cut off after
SILENT_MEL = -11.5129


@dataclasses.dataclass(frozen=True)
class VocoderConfig:
    """Dimensions of a UnivNet, read from its tensors.

    strides: of the transposed convolutions; their product is the samples per mel frame. weight_norm: whether the file
    keeps gains and directions, as upstream's does, or plain kernels.
    """

    channels: int
    noise_channels: int
    strides: tuple[int, ...]
    predictor_width: int = 64
    mel_channels: int = 100
    weight_norm: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "strides", tuple(self.strides))  # a list where it was read from a .json

    @property
    def hop(self) -> int:
        return math.prod(self.strides)


RELEASED = VocoderConfig(channels=32, noise_channels=64, strides=(8, 8, 4))


def leaky(x: Array) -> Array:
    return nn.leaky_relu(x, SLOPE)


class KernelPredictor(nn.Module):
    """A mel to the kernels and biases of one block's location-variable convolutions, one of each per frame."""

    config: VocoderConfig

    @nn.compact
    def __call__(self, mel: Array, mask: Array | None) -> dict[str, Any]:
        """mel (b, l, m), zero where masked -> input_conv (b, l, predictor_width), kernels (b, l, j, in, out, k), bias
        (b, l, j, out): j of the dilations, in = channels, out = 2 channels."""
        c = self.config
        conv = lambda width, kernel, name: Conv(width, kernel, c.weight_norm, name=name)
        first = x = leaky(conv(c.predictor_width, 5, "input_conv")(mel))
        for r in range(PREDICTOR_BLOCKS):
            h = leaky(conv(c.predictor_width, KERNEL, f"residual_convs_{r}_1")(zero_padding(x, mask)))
            x = x + leaky(conv(c.predictor_width, KERNEL, f"residual_convs_{r}_3")(zero_padding(h, mask)))
        x = zero_padding(x, mask)
        b, frames, _ = x.shape
        layers, out = len(DILATIONS), 2 * c.channels
        kernels = conv(layers * c.channels * out * KERNEL, KERNEL, "kernel_conv")(x)
        bias = conv(layers * out, KERNEL, "bias_conv")(x)
        return {
            "input_conv": first,
            "kernels": kernels.reshape(b, frames, layers, c.channels, out, KERNEL),
            "bias": bias.reshape(b, frames, layers, out),
        }


def location_variable_convolution(x: Array, kernels: Array, bias: Array) -> Array:
    """x (b, l hop, in), kernels (b, l, in, out, 3), bias (b, l, out) -> (b, l hop, out).

    Each frame's kernel filters its own samples; at a frame's borders it reads the neighbours', zeros only beyond the
    ends of the whole.
    """
    b, samples, c = x.shape
    frames = kernels.shape[1]
    padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0)))
    windows = jnp.stack([padded[:, m : m + samples] for m in range(KERNEL)], axis=-1)
    windows = windows.reshape(b, frames, samples // frames, c * KERNEL)
    taps = kernels.swapaxes(3, 4).reshape(b, frames, c * KERNEL, -1)
    y = jnp.einsum("blsk,blko->blso", windows, taps, precision=HIGHEST) + bias[:, :, None]
    return y.reshape(b, samples, -1)


class ResStack(nn.Module):
    """One transposed convolution, then a gated location-variable convolution for each dilation."""

    config: VocoderConfig
    stride: int

    @nn.compact
    def __call__(self, x: Array, mel: Array, lengths: Array | None, hop: int) -> dict[str, Any]:
        """x (b, t, c), mel (b, l, m), lengths (b,) frames, hop: samples per frame after this block -> out (b, t s, c)
        and what is on the way: convt_pre, conv_blocks (list), lvc (list), the kernel predictor's."""
        c, s = self.config, self.stride
        up = ConvTranspose(c.channels, 2 * s, s, s // 2 + s % 2, s % 2, c.weight_norm, name="convt_pre")
        upsampled = x = up(leaky(x))
        samples = mask_of(None if lengths is None else lengths * hop, x.shape[1])
        predicted = KernelPredictor(c, name="kernel_predictor")(mel, mask_of(lengths, mel.shape[1]))
        blocks, filtered = [], []
        for j, dilation in enumerate(DILATIONS):
            conv = Conv(c.channels, KERNEL, c.weight_norm, dilation, name=f"conv_blocks_{j}")
            y = zero_padding(leaky(conv(zero_padding(leaky(x), samples))), samples)
            o = location_variable_convolution(y, predicted["kernels"][:, :, j], predicted["bias"][:, :, j])
            gate, value = jnp.split(o, 2, axis=-1)
            x = x + nn.sigmoid(gate) * jnp.tanh(value)
            blocks.append(y)
            filtered.append(o)
        out = zero_padding(x, samples)  # the next transposed convolution reads beyond the end
        return {**predicted, "convt_pre": upsampled, "conv_blocks": blocks, "lvc": filtered, "out": out}


class UnivNet(nn.Module):
    """Mel (b, l, m), natural logarithms of magnitudes, and noise (b, l, noise_channels) to a waveform (b, l hop)."""

    config: VocoderConfig

    @nn.compact
    def __call__(self, mel: Array, noise: Array, lengths: Array | None = None) -> dict[str, Any]:
        """lengths (b,): frames that are real, all where None -> waveform (b, l hop) in [-1, 1], conv_pre, blocks (list
        of dicts), before_tanh; the waveform beyond a row's length is nothing."""
        c = self.config
        ends = lambda width, name: Conv(width, ENDS_KERNEL, c.weight_norm, padding=0, name=name)
        mask = mask_of(lengths, mel.shape[1])
        first = x = zero_padding(ends(c.channels, "conv_pre")(reflected(noise, ENDS_KERNEL // 2, lengths)), mask)
        mel = zero_padding(mel, mask)
        blocks, hop = [], 1
        for b, stride in enumerate(c.strides):
            hop *= stride
            blocks.append(ResStack(c, stride, name=f"res_stack_{b}")(x, mel, lengths, hop))
            x = blocks[-1]["out"]
        samples = None if lengths is None else lengths * hop
        last = ends(1, "conv_post")(reflected(leaky(x), ENDS_KERNEL // 2, samples))[..., 0]
        return {"conv_pre": first, "blocks": blocks, "before_tanh": last, "waveform": jnp.tanh(last)}

    def vocode(self, mel: Array, noise: Array, lengths: Array | None = None) -> Array:
        """As at synthesis: mel (b, l, m), noise (b, l + 10, noise_channels), lengths (b,) -> waveform (b, l hop).

        Ten silent frames are appended after each row's last and cut off again: without them the end is audibly wrong.
        """
        b, frames, m = mel.shape
        real = jnp.full((b,), frames) if lengths is None else lengths
        tail = jnp.full((b, TAIL_FRAMES, m), SILENT_MEL, mel.dtype)
        is_mel = jnp.arange(frames + TAIL_FRAMES)[None] < real[:, None]
        extended = jnp.where(is_mel[..., None], jnp.concatenate([mel, tail], axis=1), SILENT_MEL)
        extended_lengths = None if lengths is None else lengths + TAIL_FRAMES
        waveform = self(extended, noise, extended_lengths)["waveform"]
        return jnp.clip(waveform[:, : frames * self.config.hop], -1, 1)
