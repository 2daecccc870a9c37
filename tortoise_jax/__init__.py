"""Fine-tuning for the TorToiSe text-to-speech model in JAX/Flax. `load` is the way in; see api.py."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Loaded on first use, so that `import tortoise_jax` and the command lines' --help stay quick.
_PUBLIC = {
    "prepare": "commands",
    "check": "commands",
    "get_config": "commands",
    "train": "commands",
    "Options": "data.preparation",
    "load": "api",
    "Tortoise": "api",
    "read_audio": "audio",
    "log_mel": "audio",
    "DiscreteVAE": "models.dvae",
    "UnifiedVoice": "models.unified_voice",
    "Tokenizer": "text.tokenizer",
    "Dataset": "data.dataset",
    "loss_sums": "training.losses",
    "UserError": "errors",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
