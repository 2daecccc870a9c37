"""Which model a checkpoint file holds, seen by the names in it: one that can be converted, or one to refuse."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from convert.tables import MODELS
from convert.torch_files import Loaded, tensors
from tortoise_jax.errors import UserError

WRAPPERS = ("state_dict", "model", "model_g")
PREFIXES = ("module.", "_orig_mod.")


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of checkpoint, with plain names.

    marks: each of these patterns matches the beginning of one of its keys. advice: why it is refused, and what to do;
    "" if it is converted. parts: what it can become in a checkpoint; none if it is refused.
    """

    name: str
    marks: tuple[str, ...]
    advice: str = ""
    parts: tuple[str, ...] = ()


NOT_FINE_TUNED = "TorToiSe uses it unchanged beside a fine-tuned AR model; give autoregressive.pth or dvae.pth"
REFUSED: list[Family] = [
    Family(
        "an XTTS checkpoint (Coqui)",
        (r"xtts\.|gpt\.gpt\.|gpt\.conditioning_perceiver|conditioning_perceiver|hifigan_decoder\.|mel_stats$",),
        "XTTS is another model with other layers; this project fine-tunes TorToiSe's autoregressive.pth",
    ),
    Family(
        "a UnifiedVoice with StableEmbedding (bitsandbytes)",
        (r"(text|mel)_embedding\.norm\.",),
        "its embeddings are normalised, which TorToiSe's model does not do; start from a file with plain embeddings",
    ),
    Family(
        "a UnifiedVoice on raw mels (use_mel_codes_as_input=False)",
        (r"mel_embedding\.encoder\.",),
        "it reads mel frames through an encoder instead of codes, another architecture than TorToiSe speaks with",
    ),
    Family("TorToiSe's CVVP", (r"to_conditioning_latent\.", r"to_speech_latent\."), NOT_FINE_TUNED),
    Family("TorToiSe's classifier", (r"enc\.", r"head\."), NOT_FINE_TUNED),
]
# The refused ones first: an XTTS file has keys of our models too.
FAMILIES = [
    *REFUSED,
    *(
        Family(
            model.title, model.marks, parts=tuple(part for part, other in MODELS.items() if other.marks == model.marks)
        )
        for model in MODELS.values()
    ),
]


@dataclasses.dataclass(frozen=True)
class Found:
    """A file whose family is known. Wrappers and prefixes are removed from its keys."""

    path: Path
    family: Family
    state: dict[str, np.ndarray]
    format: str
    variant: list[str]  # what was removed, for people


def find(loaded: Loaded, path: Path) -> Found:
    """Unwraps a file's content and names its family. Raises UserError for what is no checkpoint of tensors."""
    content, variant = unwrap(loaded.content, path)
    state, prefixes = strip_prefixes(tensors(content, path))
    variant += [f'prefix "{prefix}" removed from every key' for prefix in prefixes]
    return Found(path, family_of(state, path), state, loaded.format, variant)


def unwrap(content: Any, path: Path) -> tuple[dict[str, Any], list[str]]:
    """The dictionary of tensors inside {"state_dict": …} and the like, and lines about what was unwrapped."""
    notes: list[str] = []
    while True:
        refuse_other_content(content, path)
        inner = [name for name in WRAPPERS if isinstance(content.get(name), Mapping)]
        if not inner:
            return dict(content), notes
        if len(inner) > 1:
            raise UserError(f"{path} holds several models ({', '.join(inner)}); save the one that is meant by itself")
        ignored = [str(name)[:40] for name in content if name != inner[0]]
        notes.append(f'inside "{inner[0]}"' + (f", beside {', '.join(ignored[:8])} (ignored)" if ignored else ""))
        content = content[inner[0]]


def refuse_other_content(content: Any, path: Path) -> None:
    """Raises UserError for other things that people keep in .pth files; it names what the file holds."""
    if isinstance(content, torch.Tensor):
        norms = " (TorToiSe's mel norms)" if tuple(content.shape) == (80,) else ""
        raise UserError(f"{path} holds a single tensor of shape {tuple(content.shape)}{norms}, expected a state dict")
    if isinstance(content, tuple | list) and content and all(isinstance(item, torch.Tensor) for item in content):
        shapes = ", ".join(str(tuple(item.shape)) for item in content[:4])
        raise UserError(f"{path} holds {len(content)} tensors without names ({shapes}): a voice's latents, not a model")
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, expected a dictionary of tensors (a state dict)")
    if "optimizers" in content and "schedulers" in content:
        raise UserError(
            f"{path} is a DL-Art-School training state: optimiser and schedule, no weights at all; "
            "the weights are in the models folder beside it, as STEP_gpt.pth"
        )


def strip_prefixes(state: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Removes the prefixes that data parallelism and torch.compile add to every key."""
    removed: list[str] = []
    while prefix := next((p for p in PREFIXES if all(key.startswith(p) for key in state)), ""):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
        removed.append(prefix)
    return state, removed


def family_of(keys: Iterable[str], path: Path) -> Family:
    keys = list(keys)
    for family in FAMILIES:
        if all(any(re.match(mark, key) for key in keys) for mark in family.marks):
            return family
    shown = ", ".join(key[:60] for key in keys[:3])
    return Family(
        "a checkpoint of no known model",
        (),
        f"none of its {len(keys)} keys is one of TorToiSe's models; its first keys are {shown}",
    )


def require(found: Found, part: str) -> None:
    """Raises UserError, naming what the file is and what to do, unless it is the wanted model."""
    option = f"--{part}"
    if found.family.advice:
        raise UserError(f"{option} {found.path} is {found.family.name}: {found.family.advice}")
    if part not in found.family.parts:
        options = " or ".join(f"--{other}" for other in found.family.parts)
        raise UserError(f"{option} {found.path} is a {found.family.name}: give it as {options}")


def likely_part(found: Found) -> str:
    """Which part a file that can be converted becomes: where its names fit several, that of its published name."""
    named = [part for part in found.family.parts if MODELS[part].file == found.path.name]
    return (named or list(found.family.parts))[0]
