"""The config's fields that depend on how much data there is, and the rule behind each.

DLAS recommends to let the rate fall first within ten epochs of a set of 50-500 clips, and its users found 1e-5 too high
for 180 clips; with thousands of clips its own numbers (batch 128, 1e-5, halved at 500, 1000, 1400, 1800) hold.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

# Adapters begin at nothing and move alone: they ask for about so many times the rate.
LORA_RATE = 10


@dataclasses.dataclass(frozen=True)
class Preset:
    """epochs: how often every clip is seen; milestones: where in the run the stepped rate falls, as shares of it."""

    name: str
    most_clips: float
    batch_size: int
    learning_rate: float
    epochs: float
    milestones: tuple[float, ...]
    evaluations: int


PRESETS = (
    Preset("tens of clips", 100, 16, 2e-6, 30, (0.3, 0.5, 0.7, 0.9), 15),
    Preset("hundreds of clips", 1000, 32, 5e-6, 20, (0.3, 0.5, 0.7, 0.9), 20),
    Preset("thousands of clips", 10_000, 128, 1e-5, 15, (0.25, 0.5, 0.7, 0.9), 20),
    Preset("tens of hours", math.inf, 128, 1e-5, 8, (0.25, 0.5, 0.7, 0.9), 40),
)


def choose(clips: int) -> Preset:
    """The preset for so many training clips."""
    return next(preset for preset in PRESETS if clips <= preset.most_clips)


def values(preset: Preset, clips: int, batch_size: int | None = None, steps: int | None = None) -> dict[str, Any]:
    """The preset's fields in steps, for `clips` training clips, 1 or more; batch_size, steps: as far as given."""
    assert clips > 0, "the train split is empty, which the caller must find first"
    batch_size = batch_size or preset.batch_size
    epoch = math.ceil(clips / min(batch_size, clips))
    steps = steps or max(20, round(preset.epochs * epoch))
    eval_every = max(1, round(steps / preset.evaluations))
    return {
        "steps": steps,
        "batch_size": batch_size,
        "eval_every": eval_every,
        "sample_every": 4 * eval_every,
        "optimizer.learning_rate": preset.learning_rate,
        "optimizer.milestones": tuple(max(1, round(share * steps)) for share in preset.milestones),
    }


def fill(config: ConfigDict, clips: int) -> list[str]:
    """Sets every field of the config that is None; returns "field=value" of what was set, the preset's name first."""
    preset = choose(clips)
    chosen = values(preset, clips, config.batch_size, config.steps)
    if config.lora.rank:
        chosen["optimizer.learning_rate"] *= LORA_RATE
    return set_open(config, f"{preset.name} ({clips})", chosen)


def set_open(config: ConfigDict, title: str, defaults: Mapping[str, Any]) -> list[str]:
    """Sets the fields {dotted name: value} that are None; returns the title and "field=value" of each, [] for none."""
    chosen = []
    for name, value in defaults.items():
        *parents, field = name.split(".")
        node = config
        for parent in parents:
            node = node[parent]
        if node[field] is None:
            node[field] = value
            chosen.append(f"{name}={value}")
    return [title, *chosen] if chosen else []
