"""The AR model (upstream's UnifiedVoice): which torch key is which Flax path, its dimensions, and its constructor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from convert.mapping import LINEAR, POINTWISE, SAME, Row, Shapes, layer_count, norm, shape_of, weights
from convert.tables.model import Facts, TorchModel, mirrors
from tortoise_jax.checkpoints.parts import AR
from tortoise_jax.errors import UserError
from tortoise_jax.models.unified_voice import RELEASED, UnifiedVoiceConfig

EARLY_MEL_POSITIONS = 304  # of an early release
CONDITIONING_INPUTS = "conditioning_inputs"  # an argument of TorToiSe's constructor; the tensors do not tell it
HEAD_WIDTH = 64  # of every released model
SMALLEST_WIDTH = 512  # of every released model
MASKED_BIAS = -1e4

MASK = "causal masks, constants that transformers before 4.30 saved"
ATTACHED = "copies that TorToiSe's inference model shares with the model, equal to it bit for bit"
SOLO = "solo embeddings, of text-only and speech-only training; neither fine-tuning nor synthesis reads them"
ALIGNMENT = "alignment heads of DL-Art-School's unified_voice3 and 4; neither fine-tuning nor synthesis reads them"

# GPT-2's Conv1D already stores (in, out): SAME. Everything else torch stores as (out, in).
TABLE: list[Row] = [
    Row("mel_solo_embedding", reason=SOLO),
    Row("text_solo_embedding", reason=SOLO),
    *weights("conditioning_encoder.init", "conditioning_encoder/init", POINTWISE),
    *norm("conditioning_encoder.attn.{i}.norm", "conditioning_encoder/attn/norm"),
    *weights("conditioning_encoder.attn.{i}.qkv", "conditioning_encoder/attn/qkv", POINTWISE),
    *weights("conditioning_encoder.attn.{i}.proj_out", "conditioning_encoder/attn/proj_out", POINTWISE),
    Row("text_embedding.weight", "text_embedding/embedding"),
    Row("mel_embedding.weight", "mel_embedding/embedding"),
    *norm("gpt.h.{i}.ln_1", "gpt/h/ln_1"),
    Row("gpt.h.{i}.attn.bias", reason=MASK),
    Row("gpt.h.{i}.attn.masked_bias", reason=MASK),
    *weights("gpt.h.{i}.attn.c_attn", "gpt/h/attn/c_attn", SAME),
    *weights("gpt.h.{i}.attn.c_proj", "gpt/h/attn/c_proj", SAME),
    *norm("gpt.h.{i}.ln_2", "gpt/h/ln_2"),
    *weights("gpt.h.{i}.mlp.c_fc", "gpt/h/mlp/c_fc", SAME),
    *weights("gpt.h.{i}.mlp.c_proj", "gpt/h/mlp/c_proj", SAME),
    *norm("gpt.ln_f", "gpt/ln_f"),
    Row("gpt.wte.weight", reason=ATTACHED, copy_of="mel_embedding.weight"),
    Row("mel_pos_embedding.emb.weight", "mel_pos_embedding/embedding"),
    Row("text_pos_embedding.emb.weight", "text_pos_embedding/embedding"),
    *norm("final_norm", "final_norm"),
    *weights("text_head", "text_head", LINEAR),
    *weights("mel_head", "mel_head", LINEAR),
    Row("aligned_head.*", reason=ALIGNMENT),
    Row("alignment_head.*", reason=ALIGNMENT),
    Row("inference_model.transformer.*", reason=ATTACHED, copy_of="gpt.*"),
    Row("inference_model.embeddings.*", reason=ATTACHED, copy_of="mel_embedding.*"),
    Row("inference_model.text_pos_embedding.*", reason=ATTACHED, copy_of="mel_pos_embedding.*"),
    Row("inference_model.final_norm.*", reason=ATTACHED, copy_of="final_norm.*"),
    Row("inference_model.lm_head.0.*", reason=ATTACHED, copy_of="final_norm.*"),
    Row("inference_model.lm_head.1.*", reason=ATTACHED, copy_of="mel_head.*"),
]


# --- dimensions -------------------------------------------------------------------------------------------------------


def config_of(shapes: Shapes, where: str, heads: int | None = None) -> UnifiedVoiceConfig:
    """Dimensions of a UnifiedVoice from the shapes of its torch tensors. Raises UserError.

    heads: of the attention, which shapes do not tell; None assumes width / 64, as in every released model.
    """
    text_tokens, width = shape_of(shapes, "text_embedding.weight", 2, where)
    mel_tokens = shape_of(shapes, "mel_embedding.weight", 2, where)[0]
    text_positions = shape_of(shapes, "text_pos_embedding.emb.weight", 2, where)[0]
    mel_positions = shape_of(shapes, "mel_pos_embedding.emb.weight", 2, where)[0]
    layers = layer_count(shapes, "gpt.h.{i}.", "ln_1.weight", where, at_least=2)
    conditioning_layers = layer_count(shapes, "conditioning_encoder.attn.{i}.", "norm.weight", where, at_least=2)
    if not layers:
        raise UserError(f"{where}: key gpt.h.0.ln_1.weight is missing; nothing was converted")
    if min(mel_tokens, text_tokens) < 3 or min(text_positions, mel_positions) < 3:
        raise UserError(
            f"{where}: tables of {text_tokens} text tokens and {mel_tokens} codes, {text_positions} and "
            f"{mel_positions} positions are too small for a start, a stop and anything between them"
        )
    if heads is None:
        if width < SMALLEST_WIDTH:
            raise UserError(
                f"{where}: width {width} is below every released model's, where heads = width / {HEAD_WIDTH} holds; "
                "say the number of heads: --heads N"
            )
        heads = width // HEAD_WIDTH
    if heads < 1 or width % heads:
        raise UserError(f"{where}: {heads} heads do not divide the width {width} (text_embedding.weight); --heads N")
    return UnifiedVoiceConfig(
        layers=layers,
        width=width,
        heads=heads,
        text_tokens=text_tokens,
        mel_tokens=mel_tokens,
        text_positions=text_positions,
        mel_positions=mel_positions,
        conditioning_layers=conditioning_layers,
        mel_channels=shape_of(shapes, "conditioning_encoder.init.weight", 3, where)[1],
    )


def summary(config: UnifiedVoiceConfig) -> str:
    return f"{_layers(config)}, positions {config.mel_positions} and {config.text_positions}"


def describe(config: UnifiedVoiceConfig, heads_from: str) -> list[str]:
    early = " (an early release's; later ones have 608 and 404)" if config.mel_positions == EARLY_MEL_POSITIONS else ""
    return [
        _layers(config, f" ({heads_from})"),
        f"positions: {config.mel_positions} for codes, {config.text_positions} for text{early}",
    ]


def _layers(config: UnifiedVoiceConfig, heads_from: str = "") -> str:
    return (
        f"{config.layers} layers, width {config.width}, {config.heads} heads{heads_from}, {config.codes} codes, "
        f"{config.text_tokens} text tokens"
    )


# --- export -----------------------------------------------------------------------------------------------------------


def masks(config: UnifiedVoiceConfig) -> dict[str, np.ndarray]:
    """The buffers `gpt.h.N.attn.bias` (1, 1, p, p) and `.masked_bias` () as transformers up to 4.29 makes them.

    p: the positions of both tables together.
    """
    positions = config.text_positions + config.mel_positions
    causal = np.tril(np.ones((positions, positions), np.uint8))[None, None]
    state: dict[str, np.ndarray] = {}
    for layer in range(config.layers):
        state[f"gpt.h.{layer}.attn.bias"] = causal
        state[f"gpt.h.{layer}.attn.masked_bias"] = np.array(MASKED_BIAS, np.float32)
    return state


def stated(config: UnifiedVoiceConfig, facts: Facts) -> dict[str, Any]:
    """What the .json beside an export says of this model: heads and the constructor, which the tensors do not tell."""
    return {"heads": config.heads, **facts, "constructor": constructor(config, facts)}


def constructor(config: UnifiedVoiceConfig, facts: Facts) -> dict[str, int]:
    """The arguments with which TorToiSe's UnifiedVoice has tables of these sizes."""
    inputs = facts[CONDITIONING_INPUTS]
    return {
        "layers": config.layers,
        "model_dim": config.width,
        "heads": config.heads,
        "max_text_tokens": config.text_positions - 2,
        "max_mel_tokens": config.mel_positions - 2 - inputs,
        "max_conditioning_inputs": inputs,
        "number_text_tokens": config.text_tokens - 1,
        "start_text_token": config.start_text,
        "number_mel_codes": config.mel_tokens,
        "start_mel_token": config.start_mel,
        "stop_mel_token": config.stop_mel,
    }


def how_to_use(config: UnifiedVoiceConfig, facts: Facts, out: Path) -> list[str]:
    """Lines that say how TorToiSe loads the exported file."""
    lines = [
        f"to speak with it: rename TorToiSe's own autoregressive.pth (in ~/.cache/tortoise/models, or in the folder "
        f"that TORTOISE_MODELS_DIR names), then copy {out} there as autoregressive.pth"
    ]
    if config == RELEASED:
        return lines
    arguments = ", ".join(f"{name}={value}" for name, value in constructor(config, facts).items())
    if config.text_tokens != RELEASED.text_tokens:
        lines.append(
            f"its text table has {config.text_tokens} rows, TorToiSe's code builds {RELEASED.text_tokens}: TorToiSe "
            "cannot load it unchanged; it needs the tokenizer.json of this checkpoint and the constructor below"
        )
    return [*lines, f"its size is not the released model's; TorToiSe's code must build it as UnifiedVoice({arguments})"]


MODEL = TorchModel(
    part=AR,
    title="TorToiSe AR model (UnifiedVoice)",
    marks=(r"gpt\.h\.\d+\.|mel_embedding\.|mel_pos_embedding\.|text_pos_embedding\.",),
    file="autoregressive.pth",
    size=1_690_000_000,
    locations=mirrors("autoregressive.pth"),
    table=TABLE,
    config=config_of,
    summary=summary,
    describe=describe,
    mel_bands=lambda config: config.mel_channels,
    facts={CONDITIONING_INPUTS: 2},
    stated=stated,
    how_to_use=how_to_use,
    masks=masks,
)
