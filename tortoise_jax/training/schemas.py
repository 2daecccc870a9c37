"""The fields of each kind of run: what they may hold, and the objects they become."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from tortoise_jax.errors import UserError
from tortoise_jax.models.layers import ATTENTION_IMPLEMENTATIONS, REMAT, Compute
from tortoise_jax.models.lora import LoraConfig
from tortoise_jax.synthesis.presets import PRESETS
from tortoise_jax.training.config import ONE_OR_MORE, ZERO_OR_MORE, Schema
from tortoise_jax.training.dvae_step import RECONSTRUCTIONS
from tortoise_jax.training.optimizer import MOMENTS, OPTIMIZERS, SCHEDULES, OptimizerConfig

BELOW_ONE = (0, 0.99)
_COUNTS = (
    "steps",
    "batch_size",
    "gradient_accumulation_steps",
    "eval_every",
    "log_every",
    "keep_last",
    "max_nonfinite",
)
_AMOUNTS = ("seed", "save_every", "sample_every", "patience", "optimizer.warmup", "optimizer.weight_decay")
COMMON_RANGES = {
    **dict.fromkeys(_COUNTS, ONE_OR_MORE),
    **dict.fromkeys(_AMOUNTS, ZERO_OR_MORE),
    **dict.fromkeys(("optimizer.beta1", "optimizer.beta2"), (0, 0.999999)),
    "optimizer.learning_rate": (1e-12, 1),
    "optimizer.gamma": (1e-6, 1),
    "optimizer.epsilon": (1e-30, 1),
    "optimizer.clip_norm": (1e-6, math.inf),
}
COMMON_CHOICES = {"optimizer.name": OPTIMIZERS, "optimizer.schedule": SCHEDULES, "optimizer.moments": MOMENTS}


def ar_schema(defaults: Callable[[], ConfigDict]) -> Schema:
    """Of fine-tuning the AR model. defaults: `get_config` of configs/ar.py."""
    return Schema(
        file="configs/ar.py",
        defaults=defaults,
        choices={
            "dtype": ("auto", "float32", "bfloat16"),
            "attention": ("auto", *ATTENTION_IMPLEMENTATIONS),
            "remat": REMAT,
            "sample_preset": tuple(PRESETS),
            **COMMON_CHOICES,
        },
        ranges={
            **COMMON_RANGES,
            **dict.fromkeys(("conditioning_clips",), ONE_OR_MORE),
            **dict.fromkeys(("text_weight",), ZERO_OR_MORE),
            "ema": (0, 0.999999),
            "lora.rank": (0, 1024),
            "lora.alpha": (1e-6, math.inf),
            **dict.fromkeys(("embed_dropout", "residual_dropout", "attention_dropout"), BELOW_ONE),
        },
        renamed={"accumulation": "gradient_accumulation_steps"},
        meanings={"remat": {True: "full", False: "none", "True": "full", "False": "none"}},
        rule=check_ar,
    )


def dvae_schema(defaults: Callable[[], ConfigDict]) -> Schema:
    """Of training the dVAE. defaults: `get_config` of configs/dvae.py."""
    dimensions = ("codebook_dim", "codes", "hidden", "layers")
    return Schema(
        file="configs/dvae.py",
        defaults=defaults,
        choices={"trains": ("dvae",), "reconstruction": RECONSTRUCTIONS, **COMMON_CHOICES},
        ranges={
            **COMMON_RANGES,
            **dict.fromkeys(("crop_codes", *(f"model.{name}" for name in dimensions)), ONE_OR_MORE),
            **dict.fromkeys(("commitment", "revive_below", "model.res_blocks"), ZERO_OR_MORE),
        },
        rule=check_milestones,
    )


def check_ar(given: dict[str, Any]) -> None:
    """Raises UserError for milestones that do not rise and for dropout that an attention kernel does not have."""
    check_milestones(given)
    if given["attention_dropout"] and given["attention"] not in ("auto", "plain"):
        raise UserError(f"config: attention={given['attention']} has no dropout; set attention_dropout=0")


def check_milestones(given: dict[str, Any]) -> None:
    """Raises UserError where they do not rise."""
    milestones = given["optimizer.milestones"] or ()
    if any(not isinstance(step, int) or step < 1 for step in milestones) or sorted(set(milestones)) != [*milestones]:
        raise UserError(
            f"config: optimizer.milestones is {milestones}, expected rising step numbers such as (500, 1000)"
        )


def compute(config: ConfigDict, dtype: str, attention: str, unrolled: bool, table_gradient: str) -> Compute:
    """How the model is computed, with `dtype` and `attention` in place of "auto"."""
    return Compute(
        dtype=dtype if config.dtype == "auto" else config.dtype,
        remat=config.remat,
        unrolled=unrolled,
        embed_dropout=config.embed_dropout,
        residual_dropout=config.residual_dropout,
        attention_dropout=config.attention_dropout,
        attention=attention if config.attention == "auto" else config.attention,
        table_gradient=table_gradient,
    )


def lora(config: ConfigDict) -> LoraConfig:
    return LoraConfig(config.lora.rank, config.lora.alpha)


def optimizer(config: ConfigDict) -> OptimizerConfig:
    fields = {field.name for field in dataclasses.fields(OptimizerConfig)} - {"total_steps", "ema"}
    values = {name: config.optimizer[name] for name in fields}
    values["milestones"] = tuple(values["milestones"])
    return OptimizerConfig(**values, total_steps=config.steps, ema=config.get("ema", 0.0))
