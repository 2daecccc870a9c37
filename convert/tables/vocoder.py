"""UnivNet, the vocoder: which torch key is which Flax path, and its dimensions."""

from __future__ import annotations

from convert.mapping import CONV, CONV_TRANSPOSE, Row, Shapes, layer_count, normed_shape, weight_normed
from convert.tables.model import TorchModel, mirrors
from tortoise_jax.checkpoints.parts import VOCODER
from tortoise_jax.errors import UserError
from tortoise_jax.models.vocoder import DILATIONS, KERNEL, PREDICTOR_BLOCKS, VocoderConfig

STACK, FLAX_STACK = "res_stack.{i}", "res_stack_{i}"
PREDICTOR, FLAX_PREDICTOR = f"{STACK}.kernel_predictor", f"{FLAX_STACK}/kernel_predictor"

TABLE: list[Row] = [
    *weight_normed(f"{PREDICTOR}.input_conv.0", f"{FLAX_PREDICTOR}/input_conv", CONV),
    *(
        row
        for r in range(PREDICTOR_BLOCKS)
        for n in (1, 3)
        for row in weight_normed(
            f"{PREDICTOR}.residual_convs.{r}.{n}", f"{FLAX_PREDICTOR}/residual_convs_{r}_{n}", CONV
        )
    ),
    *weight_normed(f"{PREDICTOR}.kernel_conv", f"{FLAX_PREDICTOR}/kernel_conv", CONV),
    *weight_normed(f"{PREDICTOR}.bias_conv", f"{FLAX_PREDICTOR}/bias_conv", CONV),
    *weight_normed(f"{STACK}.convt_pre.1", f"{FLAX_STACK}/convt_pre", CONV_TRANSPOSE),
    *(
        row
        for j in range(len(DILATIONS))
        for row in weight_normed(f"{STACK}.conv_blocks.{j}.1", f"{FLAX_STACK}/conv_blocks_{j}", CONV)
    ),
    *weight_normed("conv_pre", "conv_pre", CONV),
    *weight_normed("conv_post.1", "conv_post", CONV),
]


def config_of(shapes: Shapes, where: str, heads: int | None = None) -> VocoderConfig:
    """Dimensions of a UnivNet from the shapes of its torch tensors; it has no heads. Raises UserError.

    A stride is half the kernel of its transposed convolution. Dilations cannot be read, only how many there are.
    """
    channels, noise_channels, _ = normed_shape(shapes, "conv_pre", where)
    stacks = layer_count(shapes, STACK + ".", "convt_pre.1.weight_v", where)
    strides = tuple(normed_shape(shapes, f"res_stack.{b}.convt_pre.1", where)[2] // 2 for b in range(stacks))
    width, mel_channels, _ = normed_shape(shapes, "res_stack.0.kernel_predictor.input_conv.0", where)
    kernels = normed_shape(shapes, "res_stack.0.kernel_predictor.kernel_conv", where)[0]
    if kernels != len(DILATIONS) * channels * 2 * channels * KERNEL:
        raise UserError(
            f"{where}: res_stack.0.kernel_predictor.kernel_conv makes {kernels} numbers a frame, expected kernels of "
            f"{KERNEL} for the {len(DILATIONS)} dilations {', '.join(map(str, DILATIONS))}; not supported"
        )
    return VocoderConfig(channels, noise_channels, strides, width, mel_channels, "conv_pre.weight" not in shapes)


def summary(config: VocoderConfig) -> str:
    return (
        f"{config.channels} channels, strides {', '.join(map(str, config.strides))}, noise of {config.noise_channels} "
        f"channels, mels of {config.mel_channels} bands" + ("" if config.weight_norm else ", weight norm folded")
    )


MODEL = TorchModel(
    part=VOCODER,
    title="TorToiSe vocoder (UnivNet)",
    marks=(r"res_stack\.", r"conv_pre\."),
    file="vocoder.pth",
    size=59_000_000,
    wrapper="model_g",
    locations=mirrors("vocoder.pth"),
    table=TABLE,
    config=config_of,
    summary=summary,
)
