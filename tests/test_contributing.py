"""CONTRIBUTING.md leads newcomers through the code: every function it names is there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
WAYS = (ROOT / "CONTRIBUTING.md").read_text().split("## Four ways through the code")[1].split("## How to add")[0]


def resolved(name: str) -> Any:
    """What a dotted name stands for, as a person would look it up: convert's as they are, others in the package."""
    parts = name.split(".")
    if parts[0] != "convert":
        parts = ["tortoise_jax", *parts]
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[length:]:
            found = getattr(found, attribute)
        return found
    raise AssertionError(name)


def test_every_function_on_the_four_ways_is_there() -> None:
    names = [name for name in re.findall(r"`([\w.]+)`", WAYS) if name.count(".") >= 1]
    inner = {"reading.read_prompts", "decoder.decode", "logits.draw"}  # said beside sampler.sample
    assert len(names) > 30
    assert inner <= set(names)
    for name in names:
        assert callable(resolved(f"synthesis.{name}" if name in inner else name)), name
