"""Convolutions of the two vocoders, in full float32: weight norm as torch keeps it, transposed ones, masks.

Samples and frames are both on axis t: (b, t, c). What a mask (b, t) leaves out is zero to every convolution.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from tortoise_jax.models.layers import HIGHEST, Array


def kernel_of(module: nn.Module, shape: tuple[int, int, int], weight_norm: bool, gain_axis: int) -> Array:
    """The kernel (k, in, out) of a convolution: a parameter of its own, or g * v / |v| as weight norm has it.

    gain_axis: of v, along which g has a value each; |v| is the norm over the two others.
    """
    if not weight_norm:
        return module.param("kernel", nn.initializers.lecun_normal(), shape)
    v = module.param("kernel_v", nn.initializers.lecun_normal(), shape)
    g = module.param("kernel_g", nn.initializers.ones, (shape[gain_axis],))
    others = tuple(axis for axis in range(3) if axis != gain_axis)
    gain = jnp.expand_dims(g, others) / jnp.sqrt(jnp.sum(v**2, axis=others, keepdims=True))
    return v * gain


class Conv(nn.Module):
    """A convolution of stride 1. padding: zeros on both sides, those of the same length by default."""

    width: int
    kernel: int
    weight_norm: bool
    dilation: int = 1
    padding: int | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b, t, in) -> (b, t, width)
        kernel = kernel_of(self, (self.kernel, x.shape[-1], self.width), self.weight_norm, gain_axis=2)
        bias = self.param("bias", nn.initializers.zeros, (self.width,))
        padding = self.dilation * (self.kernel - 1) // 2 if self.padding is None else self.padding
        y = jax.lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(1,),
            padding=[(padding, padding)],
            rhs_dilation=(self.dilation,),
            dimension_numbers=("NWC", "WIO", "NWC"),
            precision=HIGHEST,
        )
        return y + bias[None, None]


class ConvTranspose(nn.Module):
    """torch's transposed convolution; its weight norm has a gain for each input channel.

    One matrix product for all taps, then shifted sums: no convolution of a signal that is mostly zeros.
    """

    width: int
    kernel: int
    stride: int
    padding: int
    output_padding: int
    weight_norm: bool

    @nn.compact
    def __call__(
        self, x: Array
    ) -> Array:  # (b, t, in) -> (b, (t - 1) stride - 2 padding + kernel + output_padding, width)
        b, t, c = x.shape
        kernel = kernel_of(self, (self.kernel, c, self.width), self.weight_norm, gain_axis=1)
        bias = self.param("bias", nn.initializers.zeros, (self.width,))
        blocks = -(-self.kernel // self.stride)  # how many input positions reach an output position
        taps = jnp.pad(kernel, ((0, blocks * self.stride - self.kernel), (0, 0), (0, 0)))
        products = jnp.einsum("btc,kco->btko", x, taps, precision=HIGHEST)
        products = products.reshape(b, t, blocks, self.stride, self.width)
        shifted = (jnp.pad(products[:, :, i], ((0, 0), (i, blocks - 1 - i), (0, 0), (0, 0))) for i in range(blocks))
        whole = sum(shifted, start=jnp.zeros((), x.dtype)).reshape(b, (t + blocks - 1) * self.stride, self.width)
        length = (t - 1) * self.stride - 2 * self.padding + self.kernel + self.output_padding
        return whole[:, self.padding : self.padding + length] + bias[None, None]


def reflected(x: Array, padding: int, lengths: Array | None) -> Array:
    """x (b, t, c) with `padding` reflected positions at the start and after the last real one."""
    if lengths is None:
        return jnp.pad(x, ((0, 0), (padding, padding), (0, 0)), mode="reflect")
    index = jnp.abs(jnp.arange(-padding, x.shape[1] + padding))[None]
    last = lengths[:, None] - 1
    index = jnp.where(index > last, 2 * last - index, index)
    return jnp.take_along_axis(x, jnp.clip(index, 0, x.shape[1] - 1)[..., None], axis=1)
