"""The fast path's decoder (a HiFi-GAN): which torch key is which Flax path, and its dimensions."""

from __future__ import annotations

from convert.mapping import (
    CONV,
    CONV_TRANSPOSE,
    Row,
    Shapes,
    layer_count,
    normed_shape,
    shape_of,
    weight_normed,
    weights,
)
from convert.tables.model import Location, TorchModel
from tortoise_jax.checkpoints.parts import HIFIGAN
from tortoise_jax.errors import UserError
from tortoise_jax.models.hifigan import DILATIONS, HifiganConfig

TABLE: list[Row] = [
    *weight_normed("conv_pre", "conv_pre", CONV),
    *weight_normed("ups.{i}", "ups_{i}", CONV_TRANSPOSE),
    *(
        row
        for convs in ("convs1", "convs2")
        for c in range(len(DILATIONS))
        for row in weight_normed(f"resblocks.{{i}}.{convs}.{c}", f"resblocks_{{i}}/{convs}_{c}", CONV)
    ),
    *weight_normed("conv_post", "conv_post", CONV),
    *weights("cond_layer", "cond_layer", CONV),
]


def config_of(shapes: Shapes, where: str, heads: int | None = None) -> HifiganConfig:
    """Dimensions of the decoder from the shapes of its torch tensors; it has no heads. Raises UserError.

    A stride is half the kernel of its transposed convolution; dilations and slopes cannot be read.
    """
    channels, latent_width, _ = normed_shape(shapes, "conv_pre", where)
    stages = layer_count(shapes, "ups.{i}.", "weight_v", where)
    stacks = layer_count(shapes, "resblocks.{i}.", "convs1.0.weight_v", where)
    if not stages or stacks % stages:
        raise UserError(f"{where}: {stacks} residual stacks (resblocks) for {stages} upsamplings (ups); not supported")
    kernel = lambda name: normed_shape(shapes, name, where)[2]
    return HifiganConfig(
        latent_width=latent_width,
        voice_width=shape_of(shapes, "cond_layer.weight", 3, where)[1],
        channels=channels,
        kernels=tuple(kernel(f"ups.{i}") for i in range(stages)),
        resblock_kernels=tuple(kernel(f"resblocks.{j}.convs1.0") for j in range(stacks // stages)),
        weight_norm="conv_pre.weight" not in shapes,
    )


def summary(config: HifiganConfig) -> str:
    return (
        f"{config.channels} channels, strides {', '.join(map(str, config.strides))}, latents of width "
        f"{config.latent_width}, voices of {config.voice_width}"
        + ("" if config.weight_norm else ", weight norm folded")
    )


MODEL = TorchModel(
    part=HIFIGAN,
    title="TorToiSe decoder of the fast path (HiFi-GAN)",
    marks=(r"ups\.", r"conv_pre\."),
    file="hifidecoder.pth",
    size=71_000_000,
    locations=(Location("Manmay/tortoise-tts", "hifidecoder.pth"),),
    table=TABLE,
    config=config_of,
    summary=summary,
)
