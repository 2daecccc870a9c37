"""Small random files of the released ones' names and formats that fit each other, so that presets run with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support import checkpoint_files as files
from tests.support.torch_reference import (
    tiny_clvp,
    tiny_diffusion,
    tiny_dvae,
    tiny_hifigan,
    tiny_random_voice,
    tiny_unified_voice,
    tiny_vocoder,
)
from tests.support.torch_reference.builders import (
    TINY_CLVP,
    TINY_DIFFUSION,
    TINY_HIFIGAN,
    TINY_UNIFIED_VOICE,
    TINY_VOCODER,
)

CODES = 256  # TorToiSe hands its decoder codes up to 248, whatever the model's
WIDTH = TINY_UNIFIED_VOICE["model_dim"]
AR: dict[str, Any] = {
    "max_mel_tokens": 604,
    "max_text_tokens": 402,
    **{"number_mel_codes": CODES + 2, "start_mel_token": CODES, "stop_mel_token": CODES + 1},
}
# As tortoise-tts's constructors are given them.
SIZES: dict[str, dict[str, Any]] = {
    "autoregressive": {**TINY_UNIFIED_VOICE, **AR},
    "clvp2": {
        **TINY_CLVP,
        "num_text_tokens": 256,
        "num_speech_tokens": CODES,
        "text_seq_len": 350,
        "speech_seq_len": 430,
    },
    "diffusion_decoder": {**TINY_DIFFUSION, "in_latent_channels": WIDTH},
    "vocoder": {**TINY_VOCODER, "n_mel_channels": 100, "strides": [8, 8, 4], "kpnet_width": 64},
    "hifidecoder": {
        "in_channels": WIDTH,
        "cond_channels": WIDTH,
        "upsample_initial_channel": TINY_HIFIGAN["upsample_initial_channel"],
        "resblock_kernel_sizes": TINY_HIFIGAN["resblock_kernel_sizes"],
    },
    "rlg_auto": {"channels": WIDTH},
    "rlg_diffuser": {"channels": 2 * TINY_DIFFUSION["model_channels"]},
}


def write(folder: Path) -> Path:
    """All eight, and the .json that says how many heads the AR model has."""
    folder.mkdir(parents=True, exist_ok=True)
    built = {
        "autoregressive": tiny_unified_voice(seed=1, **AR),
        "dvae": tiny_dvae(seed=1, num_tokens=CODES),
        "clvp2": tiny_clvp(**{name: SIZES["clvp2"][name] for name in ("num_text_tokens", "num_speech_tokens")}),
        "diffusion_decoder": tiny_diffusion(in_latent_channels=WIDTH),
        "vocoder": tiny_vocoder(n_mel_channels=100, strides=(8, 8, 4), kpnet_width=64),
        "hifidecoder": tiny_hifigan(in_channels=WIDTH, cond_channels=WIDTH, upsample_kernel_sizes=(16, 16, 4, 4)),
        "rlg_auto": tiny_random_voice(**SIZES["rlg_auto"]),
        "rlg_diffuser": tiny_random_voice(seed=1, **SIZES["rlg_diffuser"]),
    }
    for name, model in built.items():
        state = files.state_of(model)
        files.save(folder / f"{name}.pth", {"model_g": state} if name == "vocoder" else state)
    (folder / "autoregressive.json").write_text(json.dumps({"tortoise_jax": "0.1.0", "heads": 4}))
    return folder
