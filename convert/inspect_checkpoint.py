"""Says what a checkpoint is: which model, its dimensions, how it was saved, and whether it can be converted.

  python convert/inspect_checkpoint.py autoregressive.pth
  python convert/inspect_checkpoint.py checkpoints/tortoise        a converted checkpoint or a run
  python convert/inspect_checkpoint.py ~/.cache/tortoise/models    every checkpoint file in a folder

Nothing is written, and nothing in a file is run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from convert import families, mapping
from convert.command_line import positive
from convert.families import Found
from convert.source import Source, counted, decide, describe, metadata_beside, nonfinite, sha256
from convert.tables import MODELS
from convert.torch_files import Loaded, load
from tortoise_jax.checkpoints.parts import PART_TYPES
from tortoise_jax.checkpoints.pretrained import METADATA, load_pretrained
from tortoise_jax.checkpoints.run_checkpoints import RunCheckpoints, is_run
from tortoise_jax.checkpoints.trees import parameter_count
from tortoise_jax.errors import Parser, UserError, escaped, exit_with_one_line

SUFFIXES = (".pth", ".pt", ".safetensors", ".state", ".ckpt", ".bin")


def inspect(path: Path, heads: int | None = None) -> list[str]:
    """The lines about a file, a converted checkpoint, a run, or a folder of files.

    heads: of the attention, where a file does not tell. A file that cannot be converted is described, with the reason.
    Raises UserError for a file that is no checkpoint at all.
    """
    if not path.is_dir():
        return inspect_file(path, heads)
    if (path / METADATA).exists():
        return inspect_ours(path)
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
    if not files:
        raise UserError(f"{path} holds neither {METADATA} nor a file named *{', *'.join(SUFFIXES)}: nothing to inspect")
    lines: list[str] = []
    for file in files:
        try:
            lines += inspect_file(file, heads)
        except UserError as error:
            lines.append(str(error))
    return lines


def inspect_file(path: Path, heads: int | None) -> list[str]:
    loaded = load(path)
    found = families.find(loaded, path)
    lines = [headline(found, loaded)]
    if found.family.advice:
        return [*lines, f"  conversion: refused, {found.family.advice}"]
    try:
        source = decide(found, families.likely_part(found), heads)
        mapping.check_copies(source.plan, found.state)
        check_finite(source)
    except UserError as error:
        lines += [f"  {note}" for note in found.variant]
        return [*lines, f"  conversion: would fail, {str(error).removeprefix(f'{path}: ')}"]
    lines += describe(source, sha256(path) if source.model.sha256 else "")[1:]
    metadata = metadata_beside(path)
    if metadata:
        lines.append(f"  its .json: exported by tortoise_jax {metadata['tortoise_jax']}{trained(metadata)}")
    return [*lines, f"  conversion: would succeed, --{source.model.part} {path}"]


def headline(found: Found, loaded: Loaded) -> str:
    size = sum(tensor.size for tensor in found.state.values())
    dtypes = ", ".join(sorted({str(tensor.dtype) for tensor in found.state.values()}))
    return f"{found.path}: {found.family.name}; {loaded.format}, {len(found.state)} tensors, {size:,} numbers, {dtypes}"


def check_finite(source: Source) -> None:
    for key in source.plan.keys:
        if count := nonfinite(source.found.state[key]):
            raise UserError(f"{key} has {count} values that are NaN or infinite (--allow_nonfinite converts it)")


def trained(metadata: dict[str, Any]) -> str:
    training = metadata.get("training")
    return f", step {training['step']} of a run" if isinstance(training, dict) and "step" in training else ""


def inspect_ours(path: Path) -> list[str]:
    """The lines about a converted checkpoint or a run. Every array is read once, so that damage is found."""
    lines = [f"{path}: {'a run' if is_run(path) else 'a converted checkpoint'} of tortoise_jax"]
    whole = load_pretrained(path)
    for name, part in whole.parts.items():
        size = f"{parameter_count(part.tree):,} {counted(part.config)}"
        lines.append(f"  {PART_TYPES[name].title}: {MODELS[name].summary(part.config)}, {size}")
    if is_run(path):
        checkpoints = RunCheckpoints.to_read(path)
        lines.append(f"  steps {', '.join(map(str, checkpoints.steps()))}; the best is {checkpoints.best()}")
    origins = {name: origin for name, origin in whole.source.items() if name in PART_TYPES}
    for name, origin in origins.items():
        lines.append(f"  {name} from {json.dumps(origin.get('file'))}, sha256 {origin.get('sha256')}")
    command = f"python convert/flax_to_torch.py {path} --out voice.pth"
    return [*lines, f"  conversion back: would succeed, {command}"]


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "path", type=Path, help="a .pth or .safetensors file, a converted checkpoint, a run, or a folder"
    )
    parser.add_argument("--heads", type=positive, help="attention heads, where a file does not tell")
    args = parser.parse_args()
    for line in inspect(args.path, args.heads):
        print(escaped(line))


if __name__ == "__main__":
    exit_with_one_line(main)
