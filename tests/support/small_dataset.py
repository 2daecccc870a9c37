"""A data set of noise, written through the same code that `prepare` writes with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tortoise_jax.audio import code_count
from tortoise_jax.data.clips import Clip, Record, Sound
from tortoise_jax.data.dataset import Dataset, write_index
from tortoise_jax.data.shards import write_group
from tortoise_jax.text.tokenizer import Tokenizer

CODES = 64


def small_dataset(path: Path, clips: Sequence[tuple[str, str, int, int]], seed: int = 0) -> Dataset:
    """clips: (speaker, split, samples, text tokens) each; waveforms of clip i hold values around 100 i."""
    rng = np.random.default_rng(seed)
    records = [
        Record(
            rng.integers(CODES, size=code_count(samples)).astype(np.uint16),
            (100 * i + rng.integers(100, size=samples)).astype(np.int16),
        )
        for i, (_, _, samples, _) in enumerate(clips)
    ]
    sounds = [Sound(f"key{i}", samples) for i, (_, _, samples, _) in enumerate(clips)]
    stored = write_group(path, 0, "group", "codes", sounds, records)
    lines = [
        Clip(
            id=f"clip{i}",
            text=f"text {i}",
            speaker=speaker,
            split=split,
            sound=sound,
            text_ids=tuple(rng.integers(1, 255, size=tokens).tolist()),
            text_tokens=tokens,
        )
        for i, ((speaker, split, _, tokens), sound) in enumerate(zip(clips, stored, strict=True))
    ]
    write_index(path, lines, Tokenizer.default(), {"cleaner": "english"})
    return Dataset.open(path)
