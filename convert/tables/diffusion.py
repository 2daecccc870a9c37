"""The diffusion decoder (upstream's DiffusionTts): which torch key is which Flax path, and its dimensions."""

from __future__ import annotations

from convert.mapping import CONV, LINEAR, POINTWISE, Operation, Row, Shapes, layer_count, norm, shape_of, weights
from convert.tables.model import TorchModel, mirrors
from tortoise_jax.checkpoints.parts import DIFFUSION
from tortoise_jax.errors import UserError
from tortoise_jax.models.diffusion import BUCKETS, TAIL_LAYERS, DiffusionConfig

VECTOR = Operation(lambda w: w[0, :, 0], lambda w: w[None, :, None], 3)  # (1, d, 1) <-> (d,)


def attention(torch: str, flax: str, first: int = 0) -> list[Row]:
    numbers = (first, 1)
    return [
        *norm(f"{torch}.norm", f"{flax}/norm", numbers=numbers),
        *weights(f"{torch}.qkv", f"{flax}/qkv", POINTWISE, numbers=numbers),
        *weights(f"{torch}.proj_out", f"{flax}/proj_out", POINTWISE, numbers=numbers),
        Row(
            f"{torch}.relative_pos_embeddings.relative_attention_bias.weight",
            f"{flax}/relative_attention_bias",
            numbers=numbers,
        ),
    ]


def residual(torch: str, flax: str) -> list[Row]:
    return [
        *norm(f"{torch}.in_layers.0", f"{flax}/in_norm"),
        *weights(f"{torch}.in_layers.2", f"{flax}/in_conv", POINTWISE),
        *weights(f"{torch}.emb_layers.1", f"{flax}/emb", LINEAR),
        *norm(f"{torch}.out_layers.0", f"{flax}/out_norm"),
        *weights(f"{torch}.out_layers.3", f"{flax}/out_conv", CONV),
    ]


TABLE: list[Row] = [
    Row("unconditioned_embedding", "unconditioned_embedding", VECTOR),
    *weights("inp_block", "inp_block", CONV),
    *weights("time_embed.0", "time_embed_0", LINEAR),
    *weights("time_embed.2", "time_embed_2", LINEAR),
    Row("code_embedding.weight", "code_embedding/embedding"),
    *attention("code_converter.{i}", "code_converter/attn"),
    *norm("code_norm", "code_norm"),
    *weights("latent_conditioner.0", "latent_conditioner_0", CONV),
    *attention("latent_conditioner.{i}", "latent_conditioner/attn", first=1),
    *weights("contextual_embedder.0", "contextual_embedder_0", CONV),
    *weights("contextual_embedder.1", "contextual_embedder_1", CONV),
    *attention("contextual_embedder.{i}", "contextual_embedder/attn", first=2),
    *residual("conditioning_timestep_integrator.{i}.resblk", "conditioning_timestep_integrator/resblk"),
    *attention("conditioning_timestep_integrator.{i}.attn", "conditioning_timestep_integrator/attn"),
    *weights("integrating_conv", "integrating_conv", POINTWISE),
    *weights("mel_head", "mel_head", CONV),
    *residual("layers.{i}.resblk", "layers/resblk"),
    *attention("layers.{i}.attn", "layers/attn"),
    *residual("layers.{i}", "layers_{i}"),
    *norm("out.0", "out_norm"),
    *weights("out.2", "out_conv", CONV),
]


def config_of(shapes: Shapes, where: str, heads: int | None = None) -> DiffusionConfig:
    """Dimensions of a diffusion decoder from the shapes of its torch tensors, heads too. Raises UserError."""
    width, mel_channels, _ = shape_of(shapes, "inp_block.weight", 3, where)
    table = "layers.0.attn.relative_pos_embeddings.relative_attention_bias.weight"
    buckets, found = shape_of(shapes, table, 2, where)
    if buckets != BUCKETS or width % found:
        raise UserError(
            f"{where}: {table} has shape {shapes[table]}, expected {BUCKETS} rows, and heads that divide {width}"
        )
    return DiffusionConfig(
        layers=layer_count(shapes, "layers.{i}.attn.", "norm.weight", where),
        width=width,
        heads=found,
        latent_width=shape_of(shapes, "latent_conditioner.0.weight", 3, where)[1],
        codes=shape_of(shapes, "code_embedding.weight", 2, where)[0],
        mel_channels=mel_channels,
        out_channels=shape_of(shapes, "out.2.weight", 3, where)[0],
    )


def summary(config: DiffusionConfig) -> str:
    return (
        f"{config.layers} layers and {TAIL_LAYERS} without attention, width {config.width}, {config.heads} heads, "
        f"latents of width {config.latent_width}, mels of {config.mel_channels} bands"
    )


MODEL = TorchModel(
    part=DIFFUSION,
    title="TorToiSe diffusion decoder",
    marks=(r"latent_conditioner\.", r"conditioning_timestep_integrator\."),
    file="diffusion_decoder.pth",
    size=1_169_000_000,
    locations=mirrors("diffusion_decoder.pth"),
    table=TABLE,
    config=config_of,
    summary=summary,
)
