"""Writes a converted checkpoint or a run back as a .pth that TorToiSe loads, and a small .json beside it.

  python convert/flax_to_torch.py runs/voice --out voice.pth
  python convert/flax_to_torch.py runs/voice --out voice.pth --source autoregressive.pth
                                  adds the tensors of the original file that the conversion dropped
  python convert/flax_to_torch.py runs/voice --out voice.npz
                                  of a run with LoRA the adapters alone, a small file, which
  python convert/flax_to_torch.py checkpoints/tortoise --adapters voice.npz --out voice.pth
                                  merges into the model that the run began with

The .json says what the tensors cannot tell: heads, tokenizer, mel norms, how it was trained. Keep it beside the .pth.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert import families, hub, mapping
from convert.source import metadata_beside
from convert.tables import MODELS, TorchModel
from convert.torch_files import OUT_DTYPES, cast, load, write_state_dict
from tortoise_jax import __version__
from tortoise_jax.checkpoints.adapters import SUFFIX, merge, save
from tortoise_jax.checkpoints.parts import AR, PART_TYPES
from tortoise_jax.checkpoints.pretrained import (
    SUMMARY,
    TOKENIZER,
    Pretrained,
    load_pretrained,
    mel_norms_digest,
    read_metadata,
    trained_part,
)
from tortoise_jax.checkpoints.run_checkpoints import is_run
from tortoise_jax.errors import Parser, UserError, exit_with_one_line
from tortoise_jax.files import check_writable, read_json, write_json
from tortoise_jax.text.cleaners import recorded
from tortoise_jax.text.tokenizer import Tokenizer


def export(
    checkpoint: Path,
    out: Path,
    part: str | None = None,
    step: int | None = None,
    source: Path | None = None,
    dtype: str = "float32",
    attn_masks: bool | None = None,
    adapters: Path | None = None,
) -> list[str]:
    """Writes one model of a checkpoint on disk, as `write`. step: of a run; None takes the best.

    adapters: a file of them, merged into the model first.
    """
    check_names(out, source)
    part = part or first_part(read_metadata(checkpoint))
    check_step(checkpoint, part, step)
    pretrained = load_pretrained(checkpoint, (part,), step)
    if adapters:
        if part != AR:
            raise UserError(f"--adapters are of the AR model, not of the {PART_TYPES[part].title}")
        pretrained = merge(pretrained, adapters)
    return write(pretrained, out, part, source, dtype, attn_masks)


def write(
    pretrained: Pretrained,
    out: Path,
    part: str | None = None,
    source: Path | None = None,
    dtype: str = "float32",
    attn_masks: bool | None = None,
) -> list[str]:
    """Writes one model of a checkpoint as `out` with its metadata in a .json beside it; returns the lines to print.

    part: "ar", "dvae", …; None takes the first that the checkpoint has, the AR model before any other.
    source: a torch file; its tensors that conversion dropped are added. dtype: a key of OUT_DTYPES. attn_masks: with
    the constant masks that transformers up to 4.29 saved; None: if `source` has them. Raises UserError.
    """
    check_names(out, source)
    if dtype not in OUT_DTYPES:
        raise UserError(f"dtype is {dtype!r}, expected one of {', '.join(OUT_DTYPES)}")
    part = part or first_part(pretrained.parts)
    model, config, step = MODELS[part], pretrained.part(part).config, pretrained.step
    state = mapping.to_torch(model.table, pretrained.part(part).tree)
    own = len(state)
    masks = model.masks(config) if model.masks else {}
    if attn_masks and not masks:
        raise UserError(f"--attn_masks is about the AR model; a {PART_TYPES[part].title} has no causal masks")
    added = dropped_tensors(state, source, model) if source else {}
    if attn_masks is not None:
        added = {key: value for key, value in added.items() if key not in masks}
    if attn_masks:
        added |= masks
    state = cast(mapping.in_upstream_order(model.table, state | added), dtype, str(pretrained.path))

    facts = facts_of(pretrained, model)
    metadata = export_metadata(pretrained, model, facts, dtype)
    # The .json first: by it the next export knows a file for ours, wherever this one is killed.
    write_state_dict(out, state, model.wrapper, before=lambda: write_json(out.with_suffix(".json"), metadata))
    at = f" of step {step}" if step is not None else ""
    beside = out.with_suffix(".json").name
    lines = [f"{out}: {own} tensors{at}, {dtype}, read back and equal bit for bit; keep {beside} beside it"]
    if step == 0:
        lines.append("  step 0 is the start of the run, before any training")
    reasons = Counter(mapping.match(model.table, key).row.reason for key in added)
    lines += [f"  added {count} tensors: {reason}" for reason, count in reasons.items()]
    lines += model.how_to_use(config, facts, out)
    if part == AR and pretrained.tokenizer.digest != Tokenizer.default().digest:
        basic = recorded(pretrained.source) == "basic"
        lines.append(
            f"it reads text by its own tokenizer: TextToSpeech(tokenizer_vocab_file='{pretrained.path / TOKENIZER}', "
            f"tokenizer_basic={basic})"
        )
    return lines


def check_names(out: Path, source: Path | None) -> None:
    """Raises UserError for a name that is no .pth, or if a file that is no export of ours would be overwritten."""
    if out.suffix not in (".pth", ".pt"):
        raise UserError(f"--out {out}: expected a name ending in .pth")
    if out.is_dir():
        raise UserError(f"--out {out} is a directory, expected the name of a file")
    check_writable(out, "--out")
    if source and out.exists() and out.resolve() == source.resolve():
        raise UserError(f"--out {out} is the --source itself; keep the original and choose another name")
    beside = out.with_suffix(".json")
    if (out.exists() or beside.exists()) and not metadata_beside(out):
        taken = out if out.exists() else beside
        raise UserError(
            f"--out {out}: {taken} exists already and was not exported by tortoise_jax, so it is kept; "
            "choose another name"
        )


def first_part(metadata: Mapping[str, Any]) -> str:
    """The AR model if the checkpoint has one, else the first model that it has."""
    return next((part for part in PART_TYPES if metadata.get(part)), AR)


def check_step(checkpoint: Path, part: str, step: int | None) -> None:
    """Raises UserError for a step of a converted checkpoint, or of a model that the run does not train."""
    of_run = is_run(checkpoint)
    if step is not None and (not of_run or part != trained_part(read_metadata(checkpoint))):
        unchanged = f"the {PART_TYPES[part].title} is the same at every step"
        raise UserError(
            f"--step {step}: {unchanged if of_run else f'{checkpoint} is a converted checkpoint, not a run'}"
        )


def dropped_tensors(state: dict[str, np.ndarray], source: Path, model: TorchModel) -> dict[str, np.ndarray]:
    """The tensors of `source` that conversion drops, by key, except copies: these would repeat the old weights.

    state: the exported tensors, for which `source` must have the same keys and shapes. Raises UserError.
    """
    found = families.find(load(source), source)
    families.require(found, model.part)
    original = found.state
    for key, value in state.items():
        if key not in original or original[key].shape != value.shape:
            there = f"has shape {original[key].shape} there" if key in original else "is missing there"
            raise UserError(f"--source {source} is another model: {key} {there}, here it is {value.shape}")
    dropped = {key: mapping.match(model.table, key) for key in original if key not in state}
    for key, match in dropped.items():
        if match.row.flax:
            raise UserError(f"--source {source} is another model: it has {key}, this one has not")
    return {key: original[key] for key, match in dropped.items() if not match.original}


# --- the .json beside the tensors -------------------------------------------------------------------------------------


def facts_of(pretrained: Pretrained, model: TorchModel) -> dict[str, int]:
    """The numbers that tensors do not tell, as the checkpoint's metadata has them; else those of the released model."""
    origin = pretrained.source.get(model.part, {})
    return {name: int(origin.get(name, released)) for name, released in model.facts.items()}


def export_metadata(pretrained: Pretrained, model: TorchModel, facts: dict[str, int], dtype: str) -> dict[str, Any]:
    """What shapes cannot tell, for whoever converts the file again or builds the torch model."""
    config, checkpoint, step = pretrained.part(model.part).config, pretrained.path, pretrained.step
    content: dict[str, Any] = {
        "tortoise_jax": __version__,
        "model": model.part,
        "dtype": dtype,
        "dimensions": dataclasses.asdict(config),
        "mel_norms_digest": mel_norms_digest(pretrained.mel_norms),
        "source": pretrained.source,
    }
    content |= model.stated(config, facts)
    if model.part == AR:
        content["tokenizer_digest"] = pretrained.tokenizer.digest
    if step is not None:
        content["training"] = {"step": step} | (
            {"config": read_json(checkpoint / "config.json")} if (checkpoint / "config.json").exists() else {}
        )
        if (checkpoint / SUMMARY).exists():
            summary = read_json(checkpoint / SUMMARY)
            kept = ("ended", "best_validation", "validation_mel", "data")
            content["training"] |= {name: summary[name] for name in kept if name in summary}
    return content


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("checkpoint", type=Path, help="a converted checkpoint or a run")
    parser.add_argument("--out", type=Path, metavar="FILE", required=True, help="the .pth to write, or .npz")
    parser.add_argument("--part", choices=sorted(MODELS), help="which model (default: ar if the checkpoint has it)")
    parser.add_argument("--step", type=int, metavar="N", help="which step of a run (default: the best)")
    parser.add_argument(
        "--source", type=Path, metavar="FILE", help="the original file; its tensors that conversion dropped are added"
    )
    parser.add_argument("--adapters", type=Path, metavar="FILE", help="the .npz of a run with LoRA, to be merged in")
    parser.add_argument("--dtype", choices=list(OUT_DTYPES), default="float32", help="of the weights (%(default)s)")
    parser.add_argument(
        "--attn_masks",
        choices=("true", "false"),
        nargs="?",
        const="true",
        help="true: with the masks that strict loaders on transformers 4.29 and older ask for; false: without those of "
        "--source, which strict loaders on later ones reject (TorToiSe itself takes either)",
    )
    parser.add_argument(
        "--push_to_hub", metavar="USER/NAME", help="upload it with a model card; private unless --public"
    )
    parser.add_argument("--public", action="store_true", help="with --push_to_hub: for everybody to see")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.push_to_hub:
        hub.check(args.push_to_hub)
    elif args.public:
        raise UserError("--public is about --push_to_hub")
    if args.out.suffix == SUFFIX:
        if args.source or args.adapters or args.push_to_hub:
            raise UserError(
                f"--out {args.out}: a {SUFFIX} holds a run's adapters alone; --source, --adapters and "
                "--push_to_hub are about a .pth"
            )
        print("\n".join(save(args.checkpoint, args.out, args.step)))
        return
    attn_masks = None if args.attn_masks is None else args.attn_masks == "true"
    lines = export(args.checkpoint, args.out, args.part, args.step, args.source, args.dtype, attn_masks, args.adapters)
    print("\n".join(lines))
    if args.push_to_hub:
        print(hub.push(args.out, args.checkpoint, args.push_to_hub, args.public, lines[1:]))


if __name__ == "__main__":
    exit_with_one_line(main)
