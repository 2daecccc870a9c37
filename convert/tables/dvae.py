"""The dVAE (upstream's DiscreteVAE): which torch key is which Flax path, and its dimensions."""

from __future__ import annotations

import re

from convert.mapping import CONV, Row, Shapes, layer_count, shape_of, weights
from convert.tables.model import Location, TorchModel
from tortoise_jax.checkpoints.parts import DVAE
from tortoise_jax.errors import UserError
from tortoise_jax.models.dvae import DVAEConfig

STATISTICS = "statistics of the discretization loss, kept by XTTS's training; encoding and decoding do not read them"

# The index in a dVAE key depends on the numbers of layers and residual blocks, so Flax keeps torch's index:
# conv_N is a strided or upsampling convolution, res_N a residual block, point_N a 1x1 convolution.
TABLE: list[Row] = [
    *weights("encoder.{i}.0", "encoder/conv_{i}", CONV),
    *(row for n in (0, 2, 4) for row in weights(f"encoder.{{i}}.net.{n}", f"encoder/res_{{i}}/net_{n}", CONV)),
    *weights("encoder.{i}", "encoder/point_{i}", CONV),
    *weights("decoder.{i}.0.conv", "decoder/conv_{i}", CONV),
    *(row for n in (0, 2, 4) for row in weights(f"decoder.{{i}}.net.{n}", f"decoder/res_{{i}}/net_{n}", CONV)),
    *weights("decoder.{i}", "decoder/point_{i}", CONV),
    Row("codebook.embed", "codebook/embed"),
    Row("codebook.cluster_size", "codebook/cluster_size"),
    Row("codebook.embed_avg", "codebook/embed_avg"),
    Row("discrete_loss.*", reason=STATISTICS),
]

PUBLIC_CODEBOOK_DIM = 256  # what the public configs say; the released file has 512

# (pattern of a key, its possible numbers of axes, what such a key shows)
UNSUPPORTED: list[tuple[str, range, str]] = [
    (r"decoder\.\d+\.0\.(weight|bias)", range(1, 9), "upsamples by transposed convolutions"),
    (
        r"codebook\.(weight|codebooks.*|layers.*)|quantizer\..*",
        range(9),
        "has a learned quantizer, no EMA codebook",
    ),
    (r"encoder\.\d+\.weight", range(1, 2), "normalises its encoder"),
    (r"encoder\.0\.0\.weight", range(4, 5), "works on images"),
]


def config_of(shapes: Shapes, where: str, heads: int | None = None) -> DVAEConfig:
    """Dimensions of a dVAE from the shapes of its torch tensors. A dVAE has no heads. Raises UserError.

    The width of the codebook is what `codebook.embed` says, never what a config says.
    """
    for pattern, ranks, what in UNSUPPORTED:
        found = [key for key, shape in shapes.items() if re.fullmatch(pattern, key) and len(shape) in ranks]
        if found:
            raise UserError(f"{where}: this dVAE {what} ({found[0]}), which no released model has; not supported")
    codebook_dim, codes = shape_of(shapes, "codebook.embed", 2, where)
    hidden, channels, kernel = shape_of(shapes, "encoder.0.0.weight", 3, where)
    layers = layer_count(shapes, "encoder.{i}.0.", "weight", where)
    return DVAEConfig(
        codebook_dim=codebook_dim,
        codes=codes,
        hidden=hidden,
        layers=layers,
        res_blocks=layer_count(shapes, "encoder.{i}.net.", "0.weight", where, first=layers),
        channels=channels,
        kernel=kernel,
    )


def _layers(config: DVAEConfig) -> str:
    return (
        f"{config.layers} strided layers, {config.res_blocks} residual blocks, hidden {config.hidden}, "
        f"{config.codes} codes"
    )


def summary(config: DVAEConfig) -> str:
    return f"{_layers(config)}, codebook_dim {config.codebook_dim}"


def describe(config: DVAEConfig, heads_from: str) -> list[str]:
    public = ""
    if config.codebook_dim != PUBLIC_CODEBOOK_DIM:
        public = f"; the public configs' {PUBLIC_CODEBOOK_DIM} does not apply to this file"
    return [_layers(config), f"codebook_dim {config.codebook_dim}, read from codebook.embed{public}"]


MODEL = TorchModel(
    part=DVAE,
    title="TorToiSe dVAE (DiscreteVAE)",
    marks=(r"codebook\.|encoder\.0\.0\.|decoder\.\d+\.net\.|quantizer\.",),
    file="dvae.pth",
    size=240_000_000,
    locations=(
        Location("Gatozu35/tortoise-tts", "dvae.pth"),
        Location("jbetker/tortoise-tts-v2", ".models/dvae.pth", "3704aea61678e7e468a06d8eea121dba368a798e"),
    ),
    sha256="a990825371506c16bcf0e8167bf24ccf82f65bb6a1dbcbfcf058d76f9b197e35",
    table=TABLE,
    config=config_of,
    summary=summary,
    describe=describe,
    mel_bands=lambda config: config.channels,
)
