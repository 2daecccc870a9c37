"""Writes a converted checkpoint or a run back as a .pth that TorToiSe loads.

  python convert/flax_to_torch.py runs/voice --out voice.pth
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from convert.torch_files import read_state_dict, write_state_dict
from tortoise_jax import __version__, state_dict
from tortoise_jax.checkpoint import Pretrained, load_pretrained, mel_norms_digest, write_json
from tortoise_jax.errors import UserError, exit_with_one_line

TORTOISE_TEXT_TOKENS = 256
TABLES = {"ar": state_dict.UNIFIED_VOICE, "dvae": state_dict.DVAE}


def export(checkpoint: Path, out: Path, part: str = "ar", step: int | None = None, source: Path | None = None) -> list[str]:
    """Writes one model of a checkpoint as `out` and its card beside it; returns the lines to print.

    source: a torch file whose tensors that conversion dropped are carried over.
    """
    if out.suffix not in (".pth", ".pt"):
        raise UserError(f"--out {out}: expected a name ending in .pth")
    pretrained = load_pretrained(checkpoint, (part,), step)
    params = pretrained.params if part == "ar" else pretrained.dvae_params
    state = state_dict.to_torch(TABLES[part], params)
    carried = carry_over(state, source, TABLES[part]) if source else {}
    write_state_dict(out, state | carried)
    write_json(out.with_suffix(".json"), card(pretrained, part))
    lines = [f"{out}: {len(state)} tensors, read back and equal bit for bit; its card is {out.with_suffix('.json')}"]
    if carried:
        lines.append(f"  carried over from {source}: {len(carried)} tensors")
    return lines + (how_to_use(pretrained, out) if part == "ar" else [])


def carry_over(state: dict[str, np.ndarray], source: Path, table: list[state_dict.Row]) -> dict[str, np.ndarray]:
    """The tensors of `source` that the table drops, after checking that the rest is the same model."""
    original = read_state_dict(source)
    missing = [key for key in state if key not in original or original[key].shape != state[key].shape]
    if missing:
        raise UserError(f"--source {source} is another model: {missing[0]} is not there in the same shape")
    return {key: value for key, value in original.items() if not state_dict.match(table, key)[0].flax}


def card(pretrained: Pretrained, part: str) -> dict[str, Any]:
    """What shapes cannot tell."""
    config = pretrained.config if part == "ar" else pretrained.dvae_config
    assert config is not None
    content: dict[str, Any] = {"tortoise_jax": __version__, "model": part, "dimensions": dataclasses.asdict(config)}
    if pretrained.config and part == "ar":
        content |= {"heads": pretrained.config.heads, "tokenizer_digest": pretrained.tokenizer.digest}
    return content | {"mel_norms_digest": mel_norms_digest(pretrained.mel_norms), "source": pretrained.source}


def how_to_use(pretrained: Pretrained, out: Path) -> list[str]:
    config = pretrained.config
    assert config is not None
    lines = [
        f"to speak with it: copy {out} over autoregressive.pth in TorToiSe's models folder "
        "(~/.cache/tortoise/models, or what TORTOISE_MODELS_DIR says) after keeping the original"
    ]
    if config.text_tokens != TORTOISE_TEXT_TOKENS:
        lines.append(
            f"its text table has {config.text_tokens} rows, TorToiSe builds {TORTOISE_TEXT_TOKENS}: construct "
            f"UnifiedVoice with number_text_tokens={config.text_tokens - 1}, start_text_token={config.start_text}"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a converted checkpoint or a run")
    parser.add_argument("--out", type=Path, required=True, help="the .pth to write")
    parser.add_argument("--part", choices=sorted(TABLES), default="ar", help="which model (default: %(default)s)")
    parser.add_argument("--step", type=int, help="which step of a run (default: the best)")
    parser.add_argument("--source", type=Path, help="the original .pth, to carry over what conversion dropped")
    args = parser.parse_args()
    for line in export(args.checkpoint, args.out, args.part, args.step, args.source):
        print(line)


if __name__ == "__main__":
    exit_with_one_line(main)
