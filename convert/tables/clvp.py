"""CLVP: which torch key is which Flax path, and its dimensions."""

from __future__ import annotations

from convert.mapping import LINEAR, Row, Shapes, layer_count, norm, shape_of, weights
from convert.tables.model import TorchModel, mirrors
from tortoise_jax.checkpoints.parts import CLVP
from tortoise_jax.errors import UserError
from tortoise_jax.models.clvp import HEAD_WIDTH, CLVPConfig

SIDES = ("text", "speech")


def encoder(side: str) -> list[Row]:
    """The rows of one encoder. torch numbers attention and feed-forward in turn: 0 and 1 are our layer 0."""
    torch, flax = f"{side}_transformer.transformer.attn_layers", f"{side}_transformer/layers"
    even, odd = (0, 2), (1, 2)
    block = torch + ".layers.{i}"
    return [
        Row(f"{block}.0.0.g", f"{flax}/attention_norm/g", numbers=even),
        *(
            Row(f"{block}.1.wrap.{name}.weight", f"{flax}/attention/{name}/kernel", LINEAR, numbers=even)
            for name in ("to_q", "to_k", "to_v")
        ),
        *weights(f"{block}.1.wrap.to_out", f"{flax}/attention/to_out", LINEAR, numbers=even),
        Row(f"{block}.0.0.g", f"{flax}/feed_forward_norm/g", numbers=odd),
        *weights(f"{block}.1.wrap.net.0.proj", f"{flax}/feed_forward/proj", LINEAR, numbers=odd),
        *weights(f"{block}.1.wrap.net.3", f"{flax}/feed_forward/out", LINEAR, numbers=odd),
        Row(f"{torch}.rotary_pos_emb.inv_freq", f"{side}_frequencies"),
        *norm(f"{side}_transformer.transformer.norm", f"{side}_transformer/norm"),
    ]


TABLE: list[Row] = [
    Row("temperature", "temperature"),
    Row("text_emb.weight", "text_emb/embedding"),
    Row("to_text_latent.weight", "to_text_latent/kernel", LINEAR),
    Row("speech_emb.weight", "speech_emb/embedding"),
    Row("to_speech_latent.weight", "to_speech_latent/kernel", LINEAR),
    *encoder("text"),
    *encoder("speech"),
]


def config_of(shapes: Shapes, where: str, heads: int | None = None) -> CLVPConfig:
    """Dimensions of a CLVP from the shapes of its torch tensors, heads too: each is 64 wide. Raises UserError."""
    sides: dict[str, int] = {}
    for side in SIDES:
        block = f"{side}_transformer.transformer.attn_layers.layers."
        tokens, width = shape_of(shapes, f"{side}_emb.weight", 2, where)
        inner = shape_of(shapes, f"{block}0.1.wrap.to_q.weight", 2, where)[0]
        if inner % HEAD_WIDTH:
            raise UserError(
                f"{where}: {block}0.1.wrap.to_q.weight has {inner} rows, expected heads of {HEAD_WIDTH}; not supported"
            )
        entries = layer_count(shapes, block + "{i}.", "0.0.g", where)
        feed_forward = shape_of(shapes, f"{block}1.1.wrap.net.3.weight", 2, where)[1]
        sides |= {
            f"{side}_tokens": tokens,
            f"{side}_width": width,
            f"{side}_layers": (entries + 1) // 2,
            f"{side}_heads": inner // HEAD_WIDTH,
            f"{side}_inner": feed_forward,
        }
    return CLVPConfig(**sides, latent=shape_of(shapes, "to_text_latent.weight", 2, where)[0])


def summary(config: CLVPConfig) -> str:
    c = config
    return (
        f"text encoder of {c.text_layers} layers, width {c.text_width}, {c.text_heads} heads, {c.text_tokens} tokens; "
        f"speech encoder of {c.speech_layers} layers, width {c.speech_width}, {c.speech_heads} heads, "
        f"{c.speech_tokens} codes"
    )


MODEL = TorchModel(
    part=CLVP,
    title="TorToiSe CLVP",
    marks=(r"to_text_latent\.", r"to_speech_latent\."),
    file="clvp2.pth",
    size=975_000_000,
    locations=mirrors("clvp2.pth"),
    table=TABLE,
    config=config_of,
    summary=summary,
)
