"""Writes a converted checkpoint or a run back as a .pth that TorToiSe loads, and a small .json beside it.

  python convert/flax_to_torch.py runs/voice --out voice.pth
  python convert/flax_to_torch.py runs/voice --out voice.pth --source autoregressive.pth
                                  also carries over what the conversion dropped from the original

The .json says what the tensors cannot tell: heads, tokenizer, mel norms, how it was trained. Keep it beside the .pth.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from convert import families, mapping
from convert.command_line import Parser
from convert.families import AR, DVAE
from convert.source import RELEASED_TEXT_TOKENS, TABLES, card_beside
from convert.torch_files import OUT_DTYPES, cast, load, write_state_dict
from tortoise_jax import __version__
from tortoise_jax.checkpoints.pretrained import Pretrained, load_pretrained, mel_norms_digest, read_metadata
from tortoise_jax.checkpoints.run_checkpoints import STEPS, RunCheckpoints
from tortoise_jax.errors import UserError, exit_with_one_line
from tortoise_jax.files import read_json, write_json
from tortoise_jax.models.unified_voice import UnifiedVoiceConfig

CONDITIONING_INPUTS = 2  # of the released model
MASKED_BIAS = -1e4


def export(
    checkpoint: Path,
    out: Path,
    part: str | None = None,
    step: int | None = None,
    source: Path | None = None,
    dtype: str = "float32",
    attn_masks: bool | None = None,
) -> list[str]:
    """Writes one model of a checkpoint as `out` and its card beside it; returns the lines to print.

    part: "ar" or "dvae"; None takes the AR model where there is one. step: of a run; None takes the best.
    source: a torch file whose tensors that conversion dropped are carried over. dtype: a key of OUT_DTYPES.
    attn_masks: with the constant masks that transformers up to 4.29 saved; None: if `source` has them.
    Raises UserError.
    """
    check_names(out, source)
    present = read_metadata(checkpoint)
    part = part or (AR if present.get(AR) else DVAE)
    step = chosen_step(checkpoint, part, step)
    pretrained = load_pretrained(checkpoint, (part,), step)
    config = pretrained.part(part).config
    state = mapping.to_torch(TABLES[part], pretrained.part(part).tree)
    own = len(state)
    extra = carried_over(state, source, part) if source else {}
    if attn_masks is False or (attn_masks and part == AR):
        extra = {key: value for key, value in extra.items() if not is_mask(part, key)}
    if attn_masks:
        if not isinstance(config, UnifiedVoiceConfig):
            raise UserError("--attn_masks is about the AR model; a dVAE has no attention")
        extra |= masks(config)
    state = cast(mapping.in_upstream_order(TABLES[part], state | extra), dtype, str(checkpoint))

    write_state_dict(out, state)
    write_json(out.with_suffix(".json"), card(pretrained, part, checkpoint, step, dtype))
    at = f" of step {step}" if step is not None else ""
    beside = out.with_suffix(".json").name
    lines = [f"{out}: {own} tensors{at}, {dtype}, read back and equal bit for bit; keep {beside} beside it"]
    lines += [f"  added {len(keys)} tensors: {reason}" for reason, keys in by_reason(part, extra).items()]
    return lines + (how_to_use(config, pretrained, out) if isinstance(config, UnifiedVoiceConfig) else [])


def check_names(out: Path, source: Path | None) -> None:
    """Raises UserError for a name that is no .pth, or one under which somebody else's file would be written over."""
    if out.suffix not in (".pth", ".pt"):
        raise UserError(f"--out {out}: expected a name ending in .pth")
    if out.is_dir():
        raise UserError(f"--out {out} is a directory, expected the name of a file")
    if source and out.exists() and out.resolve() == source.resolve():
        raise UserError(f"--out {out} is the --source itself; keep the original and choose another name")
    beside = out.with_suffix(".json")
    if (out.exists() or beside.exists()) and not card_beside(out):
        taken = out if out.exists() else beside
        raise UserError(f"--out {out}: {taken} is there and is no export of ours, so it is kept; choose another name")


def chosen_step(checkpoint: Path, part: str, step: int | None) -> int | None:
    """The step of a run that is exported; None for a converted checkpoint, and for a dVAE, which is not trained."""
    is_run = (checkpoint / STEPS).is_dir()
    if step is not None and (not is_run or part == DVAE):
        what = "the dVAE is the same at every step" if is_run else f"{checkpoint} is a converted checkpoint, not a run"
        raise UserError(f"--step {step}: {what}")
    if not is_run or part == DVAE:
        return None
    return step if step is not None else RunCheckpoints(checkpoint).best()


# --- what the table drops ---------------------------------------------------------------------------------------------


def carried_over(state: dict[str, np.ndarray], source: Path, part: str) -> dict[str, np.ndarray]:
    """The tensors of `source` that conversion drops, except copies: those would repeat the weights before training."""
    found = families.find(load(source), source)
    families.require(found, part)
    original = found.state
    for key, value in state.items():
        if key not in original or original[key].shape != value.shape:
            there = f"has shape {original[key].shape} there" if key in original else "is missing there"
            raise UserError(f"--source {source} is another model: {key} {there}, here it is {value.shape}")
    dropped = {key: mapping.match(TABLES[part], key) for key in original if key not in state}
    for key, match in dropped.items():
        if match.row.flax:
            raise UserError(f"--source {source} is another model: it has {key}, this one has not")
    return {key: original[key] for key, match in dropped.items() if not match.original}


def is_mask(part: str, key: str) -> bool:
    return mapping.match(TABLES[part], key).row.reason == mapping.MASK


def masks(config: UnifiedVoiceConfig) -> dict[str, np.ndarray]:
    """The buffers `gpt.h.N.attn.bias` and `.masked_bias` as transformers up to 4.29 makes them."""
    positions = config.text_positions + config.mel_positions
    causal = np.tril(np.ones((positions, positions), np.uint8))[None, None]
    state: dict[str, np.ndarray] = {}
    for layer in range(config.layers):
        state[f"gpt.h.{layer}.attn.bias"] = causal
        state[f"gpt.h.{layer}.attn.masked_bias"] = np.array(MASKED_BIAS, np.float32)
    return state


def by_reason(part: str, extra: dict[str, np.ndarray]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for key in extra:
        grouped.setdefault(mapping.match(TABLES[part], key).row.reason, []).append(key)
    return grouped


# --- what a person needs beside the tensors ---------------------------------------------------------------------------


def card(pretrained: Pretrained, part: str, checkpoint: Path, step: int | None, dtype: str) -> dict[str, Any]:
    """What shapes cannot tell, for whoever converts the file again or builds the torch model."""
    config = pretrained.part(part).config
    content: dict[str, Any] = {
        "tortoise_jax": __version__,
        "model": part,
        "dtype": dtype,
        "dimensions": dataclasses.asdict(config),
        "mel_norms_digest": mel_norms_digest(pretrained.mel_norms),
        "source": pretrained.source,
    }
    if isinstance(config, UnifiedVoiceConfig):
        content |= {
            "heads": config.heads,
            "conditioning_inputs": conditioning_inputs(pretrained),
            "tokenizer_digest": pretrained.tokenizer.digest,
            "constructor": constructor(config, pretrained),
        }
    if step is not None:
        content["training"] = {"step": step} | (
            {"config": read_json(checkpoint / "config.json")} if (checkpoint / "config.json").exists() else {}
        )
        if (checkpoint / "summary.json").exists():
            summary = read_json(checkpoint / "summary.json")
            kept = ("ended", "best_validation", "validation_mel", "data")
            content["training"] |= {name: summary[name] for name in kept if name in summary}
    return content


def conditioning_inputs(pretrained: Pretrained) -> int:
    return int(pretrained.source.get(AR, {}).get("conditioning_inputs", CONDITIONING_INPUTS))


def constructor(config: UnifiedVoiceConfig, pretrained: Pretrained) -> dict[str, int]:
    """The arguments of TorToiSe's UnifiedVoice with which it has these tables."""
    inputs = conditioning_inputs(pretrained)
    return {
        "layers": config.layers,
        "model_dim": config.width,
        "heads": config.heads,
        "max_text_tokens": config.text_positions - 2,
        "max_mel_tokens": config.mel_positions - 2 - inputs,
        "max_conditioning_inputs": inputs,
        "number_text_tokens": config.text_tokens - 1,
        "start_text_token": config.start_text,
        "number_mel_codes": config.mel_tokens,
        "start_mel_token": config.start_mel,
        "stop_mel_token": config.stop_mel,
    }


RELEASED = UnifiedVoiceConfig(
    layers=30, width=1024, heads=16, text_tokens=256, mel_tokens=8194, text_positions=404, mel_positions=608
)


def how_to_use(config: UnifiedVoiceConfig, pretrained: Pretrained, out: Path) -> list[str]:
    lines = [
        f"to speak with it: keep TorToiSe's own autoregressive.pth (in ~/.cache/tortoise/models, or where "
        f"TORTOISE_MODELS_DIR says) under another name and copy {out} there in its place"
    ]
    if config == RELEASED:
        return lines
    arguments = ", ".join(f"{name}={value}" for name, value in constructor(config, pretrained).items())
    if config.text_tokens != RELEASED_TEXT_TOKENS:
        lines.append(
            f"its text table has {config.text_tokens} rows, TorToiSe's code builds {RELEASED_TEXT_TOKENS}: "
            "it does not load there as it is; it needs the tokenizer.json of this checkpoint and the constructor below"
        )
    return [*lines, f"its size is not the released model's; TorToiSe's code must build it as UnifiedVoice({arguments})"]


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("checkpoint", type=Path, help="a converted checkpoint or a run")
    parser.add_argument("--out", type=Path, metavar="FILE", required=True, help="the .pth to write")
    parser.add_argument("--part", choices=sorted(TABLES), help="which model (default: ar where there is one)")
    parser.add_argument("--step", type=int, metavar="N", help="which step of a run (default: the best)")
    parser.add_argument(
        "--source", type=Path, metavar="FILE", help="the original file, to carry over what conversion dropped"
    )
    parser.add_argument("--dtype", choices=list(OUT_DTYPES), default="float32", help="of the weights (%(default)s)")
    parser.add_argument(
        "--attn_masks",
        choices=("true", "false"),
        nargs="?",
        const="true",
        help="true: with the masks that strict loaders on transformers 4.29 and older ask for; false: without those of "
        "--source, which strict loaders on later ones reject (TorToiSe itself takes either)",
    )
    args = parser.parse_args()
    attn_masks = None if args.attn_masks is None else args.attn_masks == "true"
    for line in export(args.checkpoint, args.out, args.part, args.step, args.source, args.dtype, attn_masks):
        print(line)


if __name__ == "__main__":
    exit_with_one_line(main)
