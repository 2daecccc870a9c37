"""Fine-tuning for the TorToiSe text-to-speech model in JAX/Flax.

`load` gives the models of a converted checkpoint or of a run as one object:

```python
import tortoise_jax as tj

model = tj.load("checkpoints/tortoise")
waveform = tj.read_audio("data/wavs/clip.wav")
text_ids, codes = model.text_ids("Hello there."), model.encode_clip(waveform)
voice = model.conditioning([waveform])
print(model.losses(voice[None], model.batch([(text_ids, codes)])))
```

What the commands do is here with their options as arguments: `prepare` makes a data set of recordings, `train` trains,
`Tortoise.export` writes what TorToiSe loads. Whatever is wrong with what is given raises `UserError`, one line that
says what, where, and what to do.

```python
report = tj.check("data", workers=0)  # what prepare would keep and reject, and why
print(report["kept"], report["reasons"])
config = tj.get_config(data="data", **{"optimizer.learning_rate": 5e-6})
print(config.steps, config.batch_size)  # None: chosen by how much there is to train on
```

Shapes are written with axis letters: b rows, s positions, t frames, m bands, c codes, d width; samples are spelled out.
"""

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
    "Voice": "synthesis.voices",
    "read_audio": "audio",
    "write_wav": "synthesis.drafts",
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
