"""A text and a voice to what the AR model reads first: the prompt's arrays.

A prompt is [conditioning | start, text, stop (twice with the extra one)]. Prompts are padded to a few lengths, so that
a new text compiles nothing new, or little.

Axis letters beside those of layers.py: r prompts, p prompt positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tortoise_jax.errors import UserError
from tortoise_jax.models.layers import Array
from tortoise_jax.models.unified_voice import CONDITIONING, CONDITIONING_VECTORS, TEXT, UnifiedVoiceConfig

PROMPT_LENGTHS = (64, 128, 256, 512)


def max_text_ids(config: UnifiedVoiceConfig, extra_text_stop: bool = True) -> int:
    """Text tokens one prompt has room for beside its start and stops."""
    return config.text_positions - (3 if extra_text_stop else 2)


def max_codes(config: UnifiedVoiceConfig) -> int:
    """Codes one row has room for beside its start and stop."""
    return config.mel_positions - 2


def prompt_arrays(
    config: UnifiedVoiceConfig, text_ids: Sequence[Sequence[int]], extra_text_stop: bool
) -> dict[str, np.ndarray]:
    """Text ids of r prompts -> tokens, token_types, positions (r, p) int32 and lengths (r,), padded to a common length.

    extra_text_stop: whether the text ends in two stops, as at synthesis, or in one, as in training. Raises UserError
    for a text that is empty, too long for the position table, or has ids outside the text table.
    """
    stops = [config.stop_text] * (2 if extra_text_stop else 1)
    limit = max_text_ids(config, extra_text_stop)
    rows = []
    for ids in text_ids:
        if not len(ids):
            raise UserError("the text is empty: there is nothing to say")
        if len(ids) > limit:
            raise UserError(f"the text has {len(ids)} tokens, the model has room for {limit}; split it")
        if min(ids) < 0 or max(ids) >= config.text_tokens:
            raise UserError(f"text ids must be 0 to {config.text_tokens - 1}, found {min(ids)} to {max(ids)}")
        rows.append([config.start_text, *ids, *stops])
    n = CONDITIONING_VECTORS
    lengths = np.array([n + len(row) for row in rows], np.int32)
    p = next((length for length in PROMPT_LENGTHS if length >= lengths.max()), int(lengths.max()))
    tokens = np.full((len(rows), p), config.stop_text, np.int32)
    for i, row in enumerate(rows):
        tokens[i, n : n + len(row)] = row
    index = np.arange(p) - n
    positions = np.where(np.arange(p) < lengths[:, None], index, 0).clip(0).astype(np.int32)
    token_types = np.broadcast_to(np.where(index < 0, CONDITIONING, TEXT), tokens.shape).astype(np.int32)
    return {"tokens": tokens, "token_types": token_types, "positions": positions, "lengths": lengths}


def pair_voices_and_texts(
    config: UnifiedVoiceConfig, conditioning: np.ndarray | Array, text_ids: Sequence[Any]
) -> tuple[np.ndarray, list[list[int]]]:
    """One voice for all texts, one text for all voices, or one of each per prompt -> (r, d) and r lists of text ids.

    conditioning (d,) or (r, d); text_ids one list or r lists. Raises UserError where their numbers or the width differ.
    """
    voices = np.atleast_2d(np.asarray(conditioning, np.float32))
    texts = [list(map(int, ids)) for ids in text_ids] if len(text_ids) and np.ndim(text_ids[0]) else [list(text_ids)]
    if voices.ndim != 2 or voices.shape[1] != config.width:
        raise UserError(
            f"the voice is a vector of {voices.shape[-1]}, the model's width is {config.width}: another model's"
        )
    r = max(len(voices), len(texts))
    if {len(voices), len(texts)} - {1, r}:
        raise UserError(f"{len(voices)} voices do not go with {len(texts)} texts; give one of either, or as many")
    return np.broadcast_to(voices, (r, config.width)), texts * (r // len(texts))
