"""Puts an export on the Hugging Face hub with a model card, which needs a network, a token and the extra `download`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tortoise_jax import __version__
from tortoise_jax.checkpoints.pretrained import TOKENIZER
from tortoise_jax.errors import UserError, first_line
from tortoise_jax.files import read_json

CARD = "README.md"
NAME = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")


def check(repository: str) -> None:
    """Raises UserError for a name that is no repository's, or where huggingface_hub is not installed."""
    if not NAME.fullmatch(repository):
        raise UserError(f"--push_to_hub {repository}: expected USER/NAME")
    try:
        import huggingface_hub  # noqa: F401
    except ImportError:
        raise UserError("huggingface_hub is not installed: pip install 'tortoise_jax[download]'") from None


def push(out: Path, checkpoint: Path, repository: str, public: bool, how_to_use: list[str]) -> str:
    """Uploads an export, its .json, the tokenizer, the voices and a model card as one commit; returns a line to print.

    A missing repository is created, private unless `public`. Names of this machine's folders are not uploaded. Raises
    UserError for what the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    metadata = without_folders(read_json(out.with_suffix(".json")))
    contents: dict[str, Path | bytes] = {
        out.name: out,
        out.with_suffix(".json").name: json.dumps(metadata, indent=2, ensure_ascii=False).encode(),
        TOKENIZER: checkpoint / TOKENIZER,
        CARD: card(repository, metadata, how_to_use).encode(),
        **{f"voices/{voice.name}": voice for voice in sorted((checkpoint / "voices").glob("*.npz"))},
    }
    added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in contents.items()]
    api = HfApi()
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        made = api.create_commit(
            repository, added, commit_message=f"{out.name}, exported by tortoise_jax {__version__}"
        )
    except Exception as error:  # of the hub, of HTTP, of tokens: each library has its own
        raise UserError(f"--push_to_hub {repository}: {first_line(error)}; {out} is whole") from None
    return f"{made.commit_url}: {', '.join(contents)}"


def card(repository: str, metadata: dict[str, Any], how_to_use: list[str]) -> str:
    """The model card, in Markdown."""
    training = metadata.get("training", {})
    facts = {name: value for name, value in training.items() if name not in ("config", "data")}
    facts |= training.get("data", {}) | training.get("config", {})
    rows = "".join(f"| {name} | {value} |\n" for name, value in facts.items() if value not in ("", None, [], {}))
    use = "\n".join(f"- {line}" for line in how_to_use)
    table = f"\n## How it was made\n\n| | |\n|---|---|\n{rows}" if rows else ""
    return f"""---
library_name: tortoise-tts
pipeline_tag: text-to-speech
tags: [tortoise-tts, text-to-speech, tortoise_jax]
---

# {repository.partition("/")[2]}

A model of [TorToiSe](https://github.com/neonbjb/tortoise-tts) (`{metadata.get("model", "ar")}`), fine-tuned and
exported with tortoise_jax {__version__}.

Use it only with the consent of the person whose voice it speaks in, and say that speech is synthetic where it could be
taken for real.

## How to use it

{use}
{table}"""


def without_folders(value: Any) -> Any:
    """The same, with every path of this machine shortened to its last name."""
    if isinstance(value, dict):
        return {name: without_folders(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [without_folders(inner) for inner in value]
    if isinstance(value, str) and re.match(r"(/|~|\.\.?/)", value):
        return Path(value).name
    return value
