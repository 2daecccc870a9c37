"""What decoders read of the AR model: its hidden states at the drawn codes, for the diffusion model at repaired ones.

As tortoise does it (its fix_autoregressive_output, and the cut before diffusion).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from tortoise_jax import parallel
from tortoise_jax.errors import UserError
from tortoise_jax.models.unified_voice import MEL, UnifiedVoiceConfig
from tortoise_jax.synthesis import reading
from tortoise_jax.synthesis.decoder import DecoderWeights
from tortoise_jax.synthesis.prompts import max_codes, prompt_arrays

Tree = Any

DIFFUSION_CODES = 500
SILENCE_CODE = 83
ENDING_CODES = (45, 45, 248)
SILENCE_RUN = 9  # the latents end where so many silent codes in a row have been seen
CODE_BUCKET = 50  # codes a row is padded to a multiple of
ROWS_AT_ONCE = 4  # that a device reads


def bucket(codes: int) -> int:
    """The length that so many codes are padded to, so that a new one is no new program."""
    return max(1, -(-codes // CODE_BUCKET)) * CODE_BUCKET


def hidden_states(
    params: Tree | DecoderWeights,
    config: UnifiedVoiceConfig,
    conditioning: np.ndarray,
    text_ids: Sequence[Sequence[int]],
    codes: Sequence[np.ndarray],
) -> list[np.ndarray]:
    """Of each row the AR model's hidden states (c, d) float32, from which it would draw its codes (c,), a stop too.

    params: a parameter tree, for which it is float32, or for many calls DecoderWeights. conditioning (d,); text_ids of
    each row without stops: texts have their extra one, as at synthesis. The states are those at the start token and at
    all codes but the last.
    """
    weights = params if isinstance(params, DecoderWeights) else DecoderWeights.of(params, config, "float32")
    prompt = prompt_arrays(config, text_ids, extra_text_stop=True)
    rows = len(codes)
    room = prompt["tokens"].shape[1] + bucket(max(map(len, codes)))
    arrays = {name: np.zeros((rows, room), np.int32) for name in ("tokens", "token_types", "positions")}
    for i, (p, row) in enumerate(zip(prompt["lengths"], codes, strict=True)):
        # The codes follow the prompt without a gap; all padding comes after them, where nothing sees it.
        c = len(row)
        read = (np.concatenate([[config.start_mel], row[:-1]]), np.full(c, MEL), np.arange(c))
        for (name, array), values in zip(arrays.items(), read, strict=True):
            array[i, :p], array[i, p : p + c] = prompt[name][i, :p], values
    voices = np.broadcast_to(np.asarray(conditioning, np.float32), (rows, 1, config.width))
    reader = functools.partial(reading.read_codes, weights, config)
    hidden = parallel.run_in_batches(reader, (voices, *arrays.values()), ROWS_AT_ONCE)
    return [hidden[i, p : p + len(row)] for i, (p, row) in enumerate(zip(prompt["lengths"], codes, strict=True))]


def diffusion_inputs(
    params: Tree | DecoderWeights,
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
    (hidden,) = hidden_states(params, config, conditioning, [text_ids], [fixed])
    return fixed, hidden[: silent_from(fixed, silence)]


def repaired(
    codes: np.ndarray,
    total: int = DIFFUSION_CODES,
    silence: int = SILENCE_CODE,
    ending: tuple[int, int, int] = ENDING_CODES,
    keep_speech: bool = False,
) -> np.ndarray:
    """codes (c,) without the stop, as upstream repairs them: (total,) int32.

    Silence from the stop on, and `ending` in the last three places, where a stop in the last two loses a code or two,
    unless `keep_speech`. Codes that fill `total` never stopped and stay as they are.
    """
    fixed = np.concatenate([codes, np.full(total - len(codes), silence)]).astype(np.int32)
    places = min(len(ending), total - len(codes)) if keep_speech else len(ending)
    if len(codes) < total:
        fixed[total - places :] = ending[len(ending) - places :]
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
