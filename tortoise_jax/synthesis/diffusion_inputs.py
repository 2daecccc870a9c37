"""What TorToiSe's diffusion model takes: repaired codes, and the AR model's hidden states at them.

As tortoise does it (its fix_autoregressive_output, and the cut before diffusion).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tortoise_jax.errors import UserError
from tortoise_jax.models.compiled import apply
from tortoise_jax.models.unified_voice import MEL, UnifiedVoice, UnifiedVoiceConfig
from tortoise_jax.synthesis.prompts import max_codes, prompt_arrays

Tree = Any

DIFFUSION_CODES = 500
SILENCE_CODE = 83
ENDING_CODES = (45, 45, 248)
SILENCE_RUN = 9  # the latents end where so many silent codes in a row have been seen


def diffusion_inputs(
    params: Tree,
    config: UnifiedVoiceConfig,
    conditioning: np.ndarray,
    text_ids: Sequence[int],
    codes: np.ndarray,
    total: int = DIFFUSION_CODES,
    silence: int = SILENCE_CODE,
    ending: tuple[int, int, int] = ENDING_CODES,
) -> tuple[np.ndarray, np.ndarray]:
    """What tortoise gives its diffusion model: the codes (total,) it repairs, and hidden states (kept, d) float32.

    conditioning (d,), text_ids and codes (c,) without stops. As tortoise does it: codes that have not filled `total`
    are filled up with silence from the stop on, the last three of all become `ending`; the text has its extra stop;
    hidden states are those at the start token and the codes but the last, cut before the ninth silence in a row. Codes
    that fill `total` never stopped and are not repaired.
    """
    if len(codes) > total:
        raise UserError(
            f"{len(codes)} codes, but TorToiSe's decoder is handed at most {total}: sample with max_codes {total}"
        )
    check_diffusion_inputs(config, total, max(silence, *ending))
    fixed = repaired(codes, total, silence, ending)
    prompt = prompt_arrays(config, [text_ids], extra_text_stop=True)
    p, room = int(prompt["lengths"][0]), prompt["tokens"].shape[1]
    # The codes follow the prompt without a gap; its padding comes after them, where nothing sees it.
    read = {
        "tokens": np.concatenate([[config.start_mel], fixed[:-1]]),
        "token_types": np.full(total, MEL),
        "positions": np.arange(total),
    }
    rows = {name: np.zeros((1, room + total), np.int32) for name in read}
    for name, row in rows.items():
        row[:, :p], row[:, p : p + total] = prompt[name][:, :p], read[name]
    voice = np.asarray(conditioning, np.float32)[None, None]
    hidden = apply(UnifiedVoice(config), "hidden_states", {"params": params}, voice, *rows.values())
    return fixed, np.asarray(hidden)[0, p : p + silent_from(fixed, silence)]


def repaired(
    codes: np.ndarray,
    total: int = DIFFUSION_CODES,
    silence: int = SILENCE_CODE,
    ending: tuple[int, int, int] = ENDING_CODES,
) -> np.ndarray:
    """codes (c,) without the stop, as upstream repairs them: (total,) int32.

    Silence from the stop on, and `ending` in the last three places, where a late stop loses a code or two. Codes that
    fill `total` never stopped and stay as they are.
    """
    fixed = np.concatenate([codes, np.full(total - len(codes), silence)]).astype(np.int32)
    if len(codes) < total:
        fixed[-3:] = ending
    return fixed


def check_diffusion_inputs(
    config: UnifiedVoiceConfig, total: int = DIFFUSION_CODES, highest: int = max(ENDING_CODES)
) -> None:
    """Raises UserError for a model whose codes or room TorToiSe's decoder cannot have been trained for."""
    if highest >= config.codes:
        raise UserError(
            f"this model has {config.codes} codes, but TorToiSe's decoder was trained with 8192 and is handed code "
            f"{highest}: it does not fit this model"
        )
    if total > max_codes(config):
        raise UserError(f"the model has room for {max_codes(config)} codes, TorToiSe's decoder is handed {total}")


def silent_from(codes: np.ndarray, silence: int) -> int:
    """The index of the ninth silent code in a row, or the number of codes (c,)."""
    run = 0
    for index, code in enumerate(codes.tolist()):
        run = run + 1 if code == silence else 0
        if run == SILENCE_RUN:
            return index
    return len(codes)
