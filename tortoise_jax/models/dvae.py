"""The discrete VAE: log-mel <-> codes. One code stands for four mel frames (1024 samples).

Follows DL-Art-School's DiscreteVAE as its released checkpoint uses it: stride-2 convolutions, residual blocks, nearest
upsampling, ReLU, an EMA codebook. Everything runs at Precision.HIGHEST: the default float32 product of TPUs (bf16) and
recent NVIDIA cards (TF32) would change codes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tortoise_jax.models.layers import HIGHEST, Array, ResidualBlock

CODEBOOK_DECAY = 0.99
CODEBOOK_EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class DVAEConfig:
    """Dimensions of a dVAE, read from its tensors.

    codebook_dim: length of a code's vector. hidden: channels after the first strided convolution, doubled by each
    further one. layers: strided convolutions, each halving the frames. channels: mel bands. kernel: of the strided
    and the upsampling convolutions.
    """

    codebook_dim: int
    codes: int
    hidden: int
    layers: int
    res_blocks: int
    channels: int = 80
    kernel: int = 3

    def width(self, layer: int) -> int:
        """Channels after the layer-th strided convolution."""
        return self.hidden * 2**layer

    @property
    def frames_per_code(self) -> int:
        return int(2**self.layers)

    @property
    def inner(self) -> int:
        """Width between the strided and the upsampling layers."""
        return self.width(self.layers - 1)


RELEASED = DVAEConfig(codebook_dim=512, codes=8192, hidden=512, layers=2, res_blocks=3)


class Encoder(nn.Module):
    """Submodules are named for what they are, then the index of their torch key (encoder.0, encoder.1, …)."""

    config: DVAEConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b, t, m) -> (b, t / 2**layers, codebook_dim)
        c = self.config
        # torch pads kernel // 2 on both sides; "SAME" would pad a stride-2 convolution on one side only.
        pad = c.kernel // 2
        for i in range(c.layers):
            conv = nn.Conv(c.width(i), (c.kernel,), strides=2, padding=pad, precision=HIGHEST, name=f"conv_{i}")
            x = nn.relu(conv(x))
        for i in range(c.layers, c.layers + c.res_blocks):
            x = ResidualBlock(c.inner, HIGHEST, name=f"res_{i}")(x)
        return nn.Conv(c.codebook_dim, (1,), precision=HIGHEST, name=f"point_{c.layers + c.res_blocks}")(x)


class Decoder(nn.Module):
    """The encoder mirrored; without residual blocks there is no first 1x1 convolution either."""

    config: DVAEConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:  # (b, codes, codebook_dim) -> (b, t, m)
        c = self.config
        index = 0
        if c.res_blocks:
            x = nn.Conv(c.inner, (1,), precision=HIGHEST, name="point_0")(x)
            for i in range(1, c.res_blocks + 1):
                x = ResidualBlock(c.inner, HIGHEST, name=f"res_{i}")(x)
            index = c.res_blocks + 1
        for layer in reversed(range(c.layers)):
            x = jnp.repeat(x, 2, axis=1)
            conv = nn.Conv(c.width(layer), (c.kernel,), padding=c.kernel // 2, precision=HIGHEST, name=f"conv_{index}")
            x = nn.relu(conv(x))
            index += 1
        return nn.Conv(c.channels, (1,), precision=HIGHEST, name=f"point_{index}")(x)


class Codebook(nn.Module):
    """Columns of `embed` (codebook_dim, codes) are the codes; the other two are the running sums that move them.

    No gradient trains any of them, so they are in a collection of their own, "codebook", outside "params".
    """

    config: DVAEConfig

    def setup(self) -> None:
        shape = (self.config.codebook_dim, self.config.codes)
        normal = lambda: nn.initializers.normal(1.0)(self.make_rng("params"), shape)
        self.embed = self.variable("codebook", "embed", normal).value
        self.cluster_size = self.variable("codebook", "cluster_size", jnp.zeros, (self.config.codes,)).value
        self.embed_avg = self.variable("codebook", "embed_avg", normal).value

    def nearest(self, x: Array) -> Array:  # (b, c, codebook_dim) -> (b, c) int32
        """Index of the nearest column by squared distance; the term |x|^2 is the same for all and left out."""
        products = jnp.einsum("bce,en->bcn", x, self.embed, precision=HIGHEST)
        return jnp.argmin(jnp.sum(self.embed**2, axis=0)[None, None] - 2 * products, axis=-1).astype(jnp.int32)

    def lookup(self, codes: Array) -> Array:  # (b, c) -> (b, c, codebook_dim)
        return self.embed.T[codes]


class DiscreteVAE(nn.Module):
    """The dVAE: mel (b, t, m) -> codes (b, ceil(t / 4)) int32 -> mel (b, 4 c, m), mel norms applied throughout."""

    config: DVAEConfig

    def setup(self) -> None:
        """Its layers, named after the torch keys."""
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)
        self.codebook = Codebook(self.config)

    def features(self, mel: Array) -> Array:
        """mel (b, t, m), mel norms applied -> encoder output (b, ceil(t / 4), codebook_dim)."""
        return self.encoder(mel)

    def encode(self, mel: Array) -> Array:
        """mel (b, t, m), mel norms applied -> codes (b, ceil(t / 4)) int32."""
        return self.codebook.nearest(self.encoder(mel))

    def decode(self, codes: Array) -> Array:
        """codes (b, c) -> mel (b, 4 c, m), mel norms still applied."""
        return self.decoder(self.codebook.lookup(codes))

    def __call__(self, mel: Array) -> dict[str, Any]:
        """One training forward of mel (b, t, m), t a multiple of `frames_per_code`.

        Returns features and quantized (b, c, codebook_dim), codes (b, c), and out (b, t, m), which the decoder makes of
        the quantized features while its gradient goes to the features as they are.
        """
        features = self.encoder(mel)
        codes = self.codebook.nearest(features)
        quantized = jax.lax.stop_gradient(self.codebook.lookup(codes))
        straight_through = features + jax.lax.stop_gradient(quantized - features)
        return {"features": features, "quantized": quantized, "codes": codes, "out": self.decoder(straight_through)}


def move_codebook(book: dict[str, Array], picked: Array, features: Array) -> dict[str, Array]:
    """The codebook's three arrays after one moving-average step towards the features that its codes were picked for.

    picked (codes,): how often each was picked; features (codebook_dim, codes): the sum of the features it was picked
    for; both over the whole batch. Cluster sizes are Laplace-smoothed.
    """
    average = lambda old, new: CODEBOOK_DECAY * old + (1 - CODEBOOK_DECAY) * new
    cluster_size, embed_avg = average(book["cluster_size"], picked), average(book["embed_avg"], features)
    total = cluster_size.sum()
    smoothed = (cluster_size + CODEBOOK_EPSILON) / (total + cluster_size.size * CODEBOOK_EPSILON) * total
    return {"embed": embed_avg / smoothed[None], "cluster_size": cluster_size, "embed_avg": embed_avg}
