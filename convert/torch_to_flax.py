"""Converts TorToiSe's torch checkpoints (dvae.pth, autoregressive.pth) into a Flax checkpoint directory.

  python convert/torch_to_flax.py --dvae dvae.pth --ar autoregressive.pth --out checkpoints/tortoise
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

from convert.torch_files import read_state_dict
from tortoise_jax import state_dict
from tortoise_jax.audio import default_mel_norms
from tortoise_jax.checkpoint import (
    Pretrained,
    digest,
    dvae_shapes,
    parameter_count,
    read_json,
    save_pretrained,
    unified_voice_shapes,
)
from tortoise_jax.dvae import DVAEConfig
from tortoise_jax.errors import UserError, exit_with_one_line
from tortoise_jax.text import Tokenizer
from tortoise_jax.unified_voice import UnifiedVoiceConfig

RELEASED_DVAE_SHA256 = "a990825371506c16bcf0e8167bf24ccf82f65bb6a1dbcbfcf058d76f9b197e35"
LOOK_IN = Path("checkpoints")


def convert_ar(path: Path, heads: int | None) -> tuple[UnifiedVoiceConfig, dict[str, Any], dict[str, str]]:
    """An AR checkpoint -> dimensions, Flax parameters, dropped keys with reasons."""
    state = read_state_dict(path)
    shapes = {key: value.shape for key, value in state.items()}
    config = state_dict.unified_voice_config(shapes, str(path), heads or heads_beside(path))
    converted = state_dict.to_flax(
        state_dict.UNIFIED_VOICE, state, flat_shapes(unified_voice_shapes(config)), str(path)
    )
    return config, converted.params, converted.dropped


def convert_dvae(path: Path) -> tuple[DVAEConfig, dict[str, Any], dict[str, str]]:
    """A dVAE checkpoint -> dimensions, Flax parameters, dropped keys with reasons."""
    state = read_state_dict(path)
    config = state_dict.dvae_config({key: value.shape for key, value in state.items()}, str(path))
    converted = state_dict.to_flax(state_dict.DVAE, state, flat_shapes(dvae_shapes(config)), str(path))
    return config, converted.params, converted.dropped


def flat_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in state_dict.flatten(tree).items()}


def heads_beside(path: Path) -> int | None:
    """Heads from the .json our exporter writes beside a .pth, or None."""
    card = path.with_suffix(".json")
    if not card.exists():
        return None
    content = read_json(card)
    heads = content.get("heads") if isinstance(content, dict) else None
    if not isinstance(heads, int) or heads < 1:
        raise UserError(f'{card}: "heads" is {heads!r}, expected a number of attention heads; or give --heads')
    return heads


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def convert(dvae: Path | None, ar: Path | None, out: Path, heads: int | None = None) -> list[str]:
    """Converts what is given into the directory `out`; returns the summary's lines."""
    if out.exists():
        raise UserError(f"{out} exists already; remove it or give another --out")
    lines: list[str] = []
    source: dict[str, Any] = {}
    config = params = dvae_config = dvae_params = None
    if dvae:
        dvae_config, dvae_params, dropped = convert_dvae(dvae)
        source["dvae"] = {"file": dvae.name, "sha256": sha256(dvae)}
        lines += describe_dvae(dvae, dvae_config, dvae_params, source["dvae"]["sha256"]) + describe_dropped(dropped)
    if ar:
        config, params, dropped = convert_ar(ar, heads)
        source["ar"] = {"file": ar.name, "sha256": sha256(ar)}
        assumed = not heads and heads_beside(ar) is None
        lines += describe_ar(ar, config, params, assumed) + describe_dropped(dropped)
    if config and dvae_config and config.codes != dvae_config.codes:
        raise UserError(
            f"{dvae} and {ar} do not belong together: codebook.embed has {dvae_config.codes} codes, "
            f"mel_embedding.weight has room for {config.codes} (its {config.mel_tokens} rows less start and stop)"
        )
    tokenizer, mel_norms = Tokenizer.default(), default_mel_norms()
    if config and tokenizer.vocab_size > config.text_tokens:
        raise UserError(f"{ar}: text table of {config.text_tokens} rows, the tokenizer has {tokenizer.vocab_size}")
    dvae_digest = digest(dvae_params) if dvae_params else ""
    save_pretrained(
        Pretrained(config, params, dvae_config, dvae_params, dvae_digest, tokenizer, mel_norms, source), out
    )
    return [*lines, f"written to {out}"]


def describe_dvae(path: Path, config: DVAEConfig, params: dict[str, Any], checksum: str) -> list[str]:
    lines = [
        f"dVAE {path}: {config.layers} strided layers, {config.res_blocks} residual blocks, hidden {config.hidden}, "
        f"{config.codes} codes, {parameter_count(params):,} parameters and buffers",
        f"  codebook_dim {config.codebook_dim}, read from codebook.embed",
    ]
    if config.codebook_dim != 256:
        lines[1] += " (the public configs say 256: that does not apply to this file)"
    if checksum == RELEASED_DVAE_SHA256:
        lines.append("  sha256 is that of the released dvae.pth")
    return lines


def describe_ar(path: Path, config: UnifiedVoiceConfig, params: dict[str, Any], assumed: bool) -> list[str]:
    heads = f"{config.heads} heads" + (" (assumed: width / 64)" if assumed else "")
    return [
        f"AR model {path}: {config.layers} layers, width {config.width}, {heads}, {config.codes} codes, "
        f"{config.text_tokens} text tokens, {parameter_count(params):,} parameters",
        f"  room for {config.mel_positions - 2} codes and {config.text_positions - 2} text tokens a row",
    ]


def describe_dropped(dropped: dict[str, str]) -> list[str]:
    reasons = sorted(set(dropped.values()))
    return [f"  dropped {list(dropped.values()).count(reason)} tensors: {reason}" for reason in reasons]


def find_inputs(args: argparse.Namespace) -> tuple[Path | None, Path | None]:
    """What was named, or checkpoints/dvae.pth and checkpoints/autoregressive.pth."""
    if args.dvae or args.ar:
        return args.dvae, args.ar
    dvae, ar = LOOK_IN / "dvae.pth", LOOK_IN / "autoregressive.pth"
    if not dvae.exists() and not ar.exists():
        raise UserError(f"give --dvae dvae.pth and --ar autoregressive.pth, or put them into {LOOK_IN}/")
    return (dvae if dvae.exists() else None), (ar if ar.exists() else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dvae", type=Path, help="the dVAE (default: checkpoints/dvae.pth)")
    parser.add_argument("--ar", type=Path, help="the AR model (default: checkpoints/autoregressive.pth)")
    parser.add_argument("--out", type=Path, default=LOOK_IN / "tortoise", help="directory to write (default: %(default)s)")
    parser.add_argument("--heads", type=int, help="attention heads, where the file's .json or width / 64 is wrong")
    args = parser.parse_args()
    dvae, ar = find_inputs(args)
    for line in convert(dvae, ar, args.out, args.heads):
        print(line)


if __name__ == "__main__":
    exit_with_one_line(main)
