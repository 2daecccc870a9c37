"""A data set of noise, written through the same code that `prepare` writes with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tortoise_jax.audio import code_count
from tortoise_jax.data.dataset import Clip, Dataset, write_index
from tortoise_jax.data.recordings import Sound
from tortoise_jax.data.shards import Content, write_group
from tortoise_jax.text.tokenizer import Tokenizer

CODES = 64


def small_dataset(path: Path, clips: Sequence[tuple[str, str, int, int]], seed: int = 0) -> Dataset:
    """clips: (speaker, split, samples, text tokens) each; waveforms of clip i hold values around 100 i."""
    rng = np.random.default_rng(seed)
    contents = [
        Content(
            rng.integers(CODES, size=code_count(samples)).astype(np.uint16),
            (100 * i + rng.integers(100, size=samples)).astype(np.int16),
        )
        for i, (_, _, samples, _) in enumerate(clips)
    ]
    sounds = [Sound(f"key{i}", samples) for i, (_, _, samples, _) in enumerate(clips)]
    placed = write_group(path, 0, "group", "codes", sounds, contents)
    text_ids = [rng.integers(1, 255, size=tokens).astype(np.uint16) for _, _, _, tokens in clips]
    lines = [
        Clip(
            id=f"clip{i}",
            text=f"text {i}",
            speaker=speaker,
            split=split,
            samples=samples,
            text_tokens=tokens,
            codes=one.codes,
            shard=one.shard,
            offset=one.offset,
            codes_crc32=one.codes_crc32,
            waveform_crc32=one.waveform_crc32,
        )
        for i, ((speaker, split, samples, tokens), one) in enumerate(zip(clips, placed, strict=True))
    ]
    write_index(path, lines, text_ids, Tokenizer.default(), {"cleaner": "english"})
    return Dataset.open(path)
