"""Upstream's batch layout, for parity: text padding between text and codes, every padded position a real target.

Fills the arrays our own joined rows are described by, so the same model and loss serve both.
"""

from __future__ import annotations

import numpy as np

from tortoise_jax.models.unified_voice import CONDITIONING, MEL, TEXT, UnifiedVoiceConfig


def upstream_batch(
    config: UnifiedVoiceConfig,
    conditioning_mel: np.ndarray,
    text: np.ndarray,
    text_lengths: np.ndarray,
    codes: np.ndarray,
    wav_lengths: np.ndarray,
) -> dict[str, np.ndarray]:
    """Torch's arguments (conditioning_mel (b, n, m, t)) -> a batch without the micro-batch axis.

    Text is clipped to the longest, codes to the longest clip's wav_length // 1024 (which costs that clip one code);
    codes at or past wav_length // 1024 + 1 become stop; both get one stop behind;
    inputs have the start token in front, targets one more stop behind.
    """
    b = len(text)
    text = text[:, : int(text_lengths.max())]
    codes = codes[:, : int(wav_lengths.max()) // 1024]
    inside = np.arange(codes.shape[1]) < wav_lengths[:, None] // 1024 + 1
    codes = np.where(inside, codes, config.stop_mel)
    column = lambda value: np.full((b, 1), value, np.int32)
    text = np.concatenate([text, column(config.stop_text)], axis=1)
    codes = np.concatenate([codes, column(config.stop_mel)], axis=1)
    text_in = np.concatenate([column(config.start_text), text], axis=1)
    text_out = np.concatenate([text, column(config.stop_text)], axis=1)
    mel_in = np.concatenate([column(config.start_mel), codes], axis=1)
    mel_out = np.concatenate([codes, column(config.stop_mel)], axis=1)
    rows = lambda values: np.broadcast_to(values, (b, len(values))).astype(np.int32)
    token_types = rows(np.repeat([CONDITIONING, TEXT, MEL], [1, text_in.shape[1], mel_in.shape[1]]))
    return {
        "conditioning_mel": np.ascontiguousarray(conditioning_mel.swapaxes(2, 3)),
        "tokens": np.concatenate([column(0), text_in, mel_in], axis=1).astype(np.int32),
        "targets": np.concatenate([column(0), text_out, mel_out], axis=1).astype(np.int32),
        "token_types": token_types,
        "positions": rows(np.concatenate([[0], np.arange(text_in.shape[1]), np.arange(mel_in.shape[1])])),
        "weights": (token_types != CONDITIONING).astype(np.float32),
        "example": np.arange(b, dtype=np.int32),
    }
