"""Converts TorToiSe's torch checkpoints (dvae.pth, autoregressive.pth, clvp2.pth, …) into a Flax checkpoint directory.

  python convert/torch_to_flax.py --dvae dvae.pth --ar autoregressive.pth --out checkpoints/tortoise
  python convert/torch_to_flax.py --models DIR        takes every file in DIR that has its published name
  python convert/torch_to_flax.py --models DIR --add --out checkpoints/tortoise     adds those that it lacks
  python convert/torch_to_flax.py --download          fetches all these files into checkpoints/ first
  python convert/torch_to_flax.py                     takes the files in checkpoints/

Dimensions are read from the tensors, never from a configuration. Files are only read, never run.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convert import download, mapping
from convert.command_line import positive
from convert.progress import byte_bar
from convert.source import Source, describe, metadata_beside, nonfinite, number_beside, open_source, sha256
from convert.tables import MODELS
from convert.tables.dvae import PUBLIC_CODEBOOK_DIM
from tortoise_jax.audio import default_mel_norms
from tortoise_jax.checkpoints.parts import AR, DVAE, PART_TYPES, Part
from tortoise_jax.checkpoints.pretrained import (
    MEL_NORMS,
    TOKENIZER,
    Pretrained,
    added_whole,
    load_pretrained,
    mel_norms_digest,
    write_metadata,
)
from tortoise_jax.checkpoints.run_checkpoints import is_run
from tortoise_jax.checkpoints.trees import save_tree
from tortoise_jax.errors import Parser, UserError, bytes_in_words, exit_with_one_line, first_line
from tortoise_jax.files import check_new, check_readable, written_whole
from tortoise_jax.models.dvae import DVAEConfig
from tortoise_jax.models.unified_voice import RELEASED, UnifiedVoiceConfig
from tortoise_jax.text.tokenizer import Tokenizer

LOOK_IN = Path("checkpoints")
TRAINED_WITH = (DVAE, AR)  # the parts that training needs


def convert(
    files: Mapping[str, Path],
    out: Path,
    heads: int | None = None,
    *,
    add: bool = False,
    codebook_dim: int | None = None,
    tokenizer: Path | None = None,
    mel_norms: Path | None = None,
    allow_nonfinite: bool = False,
    checksums: bool = True,
) -> list[str]:
    """Converts the given files into the directory `out`, whole or not at all; returns the lines of the summary.

    One part after another is converted and written, so that no more memory is needed than for the largest.

    files: torch files by part ("ar", "dvae", …). heads: of the AR model, where its .json or width / 64 is wrong.
    add: `out` is a checkpoint already, which lacks these parts. codebook_dim: only compared with the dVAE's. tokenizer,
    mel_norms: files, where they are not the released ones. allow_nonfinite: convert NaN and infinite values too.
    checksums: verify those of .pth files. Raises UserError.
    """
    before = to_add_to(out, files, tokenizer, mel_norms) if add else None
    if before is None:
        check_new(out, "--out")
    sources = {part: open_with_bar(files[part], part, heads, checksums) for part in MODELS if part in files}
    if not sources:
        raise UserError(f"nothing to convert: give a file, as {options(TRAINED_WITH)}")
    check_codebook_dim(sources.get(DVAE), codebook_dim)
    check_fit(sources, before)
    check_room(out, 4 * sum(source.parameters for source in sources.values()))
    norms = choose_mel_norms(sources, out / MEL_NORMS if before else mel_norms)
    bpe = choose_tokenizer(sources.get(AR), out / TOKENIZER if before else tokenizer)

    if before is None:
        with written_whole(out) as folder:
            parts, origin, lines = convert_all(sources, folder, allow_nonfinite)
            write_metadata(folder, Pretrained(parts, bpe, norms, origin))
    else:
        with added_whole(out) as (folder, add_parts):
            parts, origin, lines = convert_all(sources, folder, allow_nonfinite)
            add_parts(dataclasses.replace(before, parts=before.parts | parts, source=before.source | origin))
    size = sum(4 * leaf.size for part in parts.values() for leaf in jax.tree.leaves(part.variables))
    return [*lines, f"{'added' if add else 'written'} to {out} ({bytes_in_words(size)}, float32)"]


def convert_all(
    sources: dict[str, Source], folder: Path, allow_nonfinite: bool
) -> tuple[dict[str, Part], dict[str, Any], list[str]]:
    """Writes each model into `folder`; the parts without their weights, where they came from, lines of the summary."""
    lines: list[str] = []
    parts: dict[str, Part] = {}
    origin: dict[str, Any] = {}
    with concurrent.futures.ThreadPoolExecutor(1) as hashing:  # on another core while this one converts
        for name in list(sources):
            source = sources.pop(name)  # so that its memory-mapped file is closed before the next one is read
            checksum = hashing.submit(sha256, source.path)
            part, remarks = convert_part(source, allow_nonfinite)
            origin[name] = origin_of(source, checksum.result())
            lines += describe(source, checksum.result()) + remarks
            del source
            save_tree(folder / name, part.tree)
            parts[name] = part.on_disk()
            del part
    return parts, origin, lines


def to_add_to(out: Path, files: Mapping[str, Path], tokenizer: Path | None, mel_norms: Path | None) -> Pretrained:
    """The checkpoint without its weights. Raises UserError for what nothing can be added to, and for what it has."""
    before = load_pretrained(out, ())
    if is_run(out):
        raise UserError(f"--add: {out} is a run; add to the checkpoint that it began with, where it looks for parts")
    for part in files:
        if part in before.parts:
            raise UserError(
                f"--add: {out} has a {PART_TYPES[part].title} already; leave {files[part]} out, or convert to another "
                "--out"
            )
    for name, given in (("tokenizer", tokenizer), ("mel_norms", mel_norms)):
        if given:
            raise UserError(f"--{name} does not go with --add: {out} keeps its own")
    # An older checkpoint may state no checksums: they are taken of its weights.
    return load_pretrained(out, [name for name, part in before.parts.items() if part.checksum is None])


# --- reading ----------------------------------------------------------------------------------------------------------


def check_room(out: Path, size: int) -> None:
    """Raises UserError, before anything is converted, if the disk has no room for `size` bytes."""
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"--out {out} will take {bytes_in_words(size)}, {folder} has {bytes_in_words(free)} left; make room"
        )


def open_with_bar(path: Path, part: str, heads: int | None, checksums: bool) -> Source:
    size = path.stat().st_size if path.is_file() else 0
    with byte_bar(f"checking {path.name}", size) as bar:
        return open_source(path, part, heads, checksums, bar.update)


def convert_part(source: Source, allow_nonfinite: bool) -> tuple[Part, list[str]]:
    """The model as a part of a checkpoint, and lines of warnings.

    Raises UserError for values that are NaN or infinite, unless they are allowed.
    """
    broken: dict[str, int] = {}
    with byte_bar(f"converting {source.path.name}", 4 * source.parameters) as bar:

        def each(key: str, tensor: np.ndarray) -> None:
            if count := nonfinite(tensor):
                broken[key] = count
            bar.update(4 * tensor.size)

        tree = mapping.to_flax(source.plan, source.found.state, each)
    part = Part.of_tree(source.config, tree)
    if not broken:
        return part, []
    key, count = next(iter(broken.items()))
    more = f" and {len(broken) - 1} more tensors" if len(broken) > 1 else ""
    remark = f"{source.path}: {key} has {count} values that are NaN or infinite{more}"
    if not allow_nonfinite:
        raise UserError(f"{remark}; such a model computes nothing. --allow_nonfinite converts it nevertheless")
    return part, [f"  warning: {remark} (allowed by --allow_nonfinite)"]


def origin_of(source: Source, checksum: str) -> dict[str, Any]:
    """What the checkpoint's metadata keeps of the file and of the .json beside it."""
    metadata = metadata_beside(source.path)
    facts = {name: number_beside(source.path, name) or released for name, released in source.model.facts.items()}
    training = {"training": metadata["training"]} if "training" in metadata else {}
    return {"file": source.path.name, "sha256": checksum, **facts, **training}


# --- what belongs together --------------------------------------------------------------------------------------------


def check_codebook_dim(dvae: Source | None, stated: int | None) -> None:
    """Raises UserError if the stated codebook_dim is not the file's; it names the tensor that decides."""
    if stated is None:
        return
    if dvae is None:
        raise UserError(f"--codebook_dim {stated} is about a dVAE, and no --dvae is given")
    assert isinstance(dvae.config, DVAEConfig)
    if stated != dvae.config.codebook_dim:
        shape = tuple(dvae.found.state["codebook.embed"].shape)
        public = ""
        if stated == PUBLIC_CODEBOOK_DIM:
            public = f" (the public configs say {stated}, which does not apply to the released file)"
        raise UserError(
            f"--codebook_dim {stated}, but {dvae.path} has {dvae.config.codebook_dim}: its tensor codebook.embed has "
            f"shape {shape}, codebook_dim first{public}; leave --codebook_dim out, or give the dVAE that has it"
        )


def check_fit(sources: dict[str, Source], before: Pretrained | None = None) -> None:
    """Raises UserError if a dVAE and an AR model that come together have other codes or mels.

    before: the checkpoint to which they are added.
    """
    known = {part: (one.config, before.path) for part, one in before.parts.items()} if before else {}
    known |= {part: (source.config, source.path) for part, source in sources.items()}
    if not {AR, DVAE} <= known.keys():
        return
    (dvae, dvae_path), (ar, ar_path) = known[DVAE], known[AR]
    assert isinstance(dvae, DVAEConfig)
    assert isinstance(ar, UnifiedVoiceConfig)
    if ar.codes != dvae.codes:
        raise UserError(
            f"{dvae_path} and {ar_path} do not belong together: codebook.embed has {dvae.codes} "
            f"codes, mel_embedding.weight has room for {ar.codes} (its {ar.mel_tokens} rows less start and stop)"
        )
    if ar.mel_channels != dvae.channels:
        raise UserError(
            f"{dvae_path} and {ar_path} do not belong together: encoder.0.0.weight reads mels of "
            f"{dvae.channels} bands, conditioning_encoder.init.weight of {ar.mel_channels}"
        )


def choose_tokenizer(ar: Source | None, given: Path | None) -> Tokenizer:
    """The given tokenizer, else the released one. Raises UserError if the AR model was trained with another one."""
    tokenizer = Tokenizer.from_file(given) if given else Tokenizer.default()
    if ar is None:
        return tokenizer
    assert isinstance(ar.config, UnifiedVoiceConfig)
    rows = ar.config.text_tokens
    if given is None and rows != RELEASED.text_tokens:
        raise UserError(
            f"{ar.path}: its text table (text_embedding.weight) has {rows} rows, the released model's "
            f"{RELEASED.text_tokens}: it was trained with a tokenizer of its own; give it: --tokenizer tokenizer.json"
        )
    if tokenizer.vocab_size > rows - 1:
        raise UserError(
            f"{given or 'the bundled tokenizer'} has {tokenizer.vocab_size} tokens, but {ar.path} has room for "
            f"{rows - 1} (text_embedding.weight has {rows} rows, the last is the start token)"
        )
    stated = metadata_beside(ar.path).get("tokenizer_digest", tokenizer.digest)
    if stated != tokenizer.digest:
        raise UserError(
            f"{ar.path} was exported with another tokenizer than {given or 'the bundled one'}, says its .json; give "
            "the tokenizer.json of the run or checkpoint it was exported from: --tokenizer tokenizer.json"
        )
    return tokenizer


def choose_mel_norms(sources: dict[str, Source], given: Path | None) -> np.ndarray:
    """The constants (m,) by which mels are divided: the given ones, else the released ones.

    Raises UserError if they do not fit a model, or if a model was trained with other ones.
    """
    norms = read_mel_norms(given) if given else default_mel_norms()
    for part, source in sources.items():
        if source.model.mel_bands is None:
            continue
        bands = source.model.mel_bands(source.config)
        if bands != len(norms):
            raise UserError(
                f"--{part} {source.path} reads mels of {bands} bands, the mel norms are {len(norms)}; --mel_norms FILE"
            )
        stated = metadata_beside(source.path).get("mel_norms_digest")
        if stated not in (None, mel_norms_digest(norms)):
            raise UserError(
                f"{source.path} was exported with other mel norms, says its .json; give the mel_norms.txt of the run "
                "or checkpoint it was exported from: --mel_norms mel_norms.txt"
            )
    return norms


def read_mel_norms(path: Path) -> np.ndarray:
    check_readable(path)
    try:
        norms = np.loadtxt(path, dtype=np.float32, ndmin=1)
    except (OSError, ValueError) as error:
        raise UserError(f"--mel_norms {path}: {first_line(error)}; expected one number per line") from None
    if norms.ndim != 1 or not np.isfinite(norms).all() or not norms.all():
        raise UserError(f"--mel_norms {path}: expected one number per line, none of them 0")
    return norms


# --- command line -----------------------------------------------------------------------------------------------------


def find_inputs(args: argparse.Namespace) -> dict[str, Path]:
    """The files by part: those that were named, and those of a folder that have their published names.

    The folder is that of --models, else checkpoints/ where nothing was named or --download filled it. With --add, of
    the folder only what the checkpoint lacks.
    """
    has = load_pretrained(args.out, ()).parts if args.add else {}
    named: dict[str, Path] = {part: getattr(args, part) for part in MODELS if getattr(args, part)}
    if named and not args.models and not args.download:
        return named
    folder = args.models or LOOK_IN
    lacking = {part: model for part, model in MODELS.items() if part not in has}
    if args.download:
        for line in download.fetch([model.file for part, model in lacking.items() if part not in named], folder):
            print(line, flush=True)
    files = {part: folder / model.file for part, model in lacking.items()} | named
    existing = {part: path for part, path in files.items() if part in named or path.exists()}
    if not existing:
        raise UserError(f"which files? {options(TRAINED_WITH)}; or put them into {folder}/, or use --download")
    for part in TRAINED_WITH:
        if part not in existing and part not in has:
            others = ", ".join(str(other) for other in existing.values())
            print(
                f"{files[part]} does not exist: only {others} is converted; training needs both (--{part} FILE, or "
                "--download)"
            )
    return existing


def options(parts: Iterable[str]) -> str:
    return " ".join(f"--{part} {MODELS[part].file}" for part in parts)


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    for part, model in MODELS.items():
        what = f"the {PART_TYPES[part].title}, .pth or .safetensors (default: {LOOK_IN / model.file})"
        parser.add_argument(f"--{part}", type=Path, metavar="FILE", help=what)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", default=LOOK_IN / "tortoise", help="what to write (default: %(default)s)"
    )
    parser.add_argument("--add", action="store_true", help="--out is a checkpoint: add what is given to it")
    parser.add_argument(
        "--heads", type=positive, metavar="N", help="attention heads, where the file's .json or width / 64 is wrong"
    )
    parser.add_argument(
        "--codebook_dim", type=positive, metavar="N", help="only compared: what the dVAE is expected to have"
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="tokenizer.json of a model with its own text table"
    )
    parser.add_argument(
        "--mel_norms", type=Path, metavar="FILE", help="one number per line, where they are not the released ones"
    )
    parser.add_argument("--allow_nonfinite", action="store_true", help="convert weights that are NaN or infinite")
    parser.add_argument("--ignore_checksums", action="store_true", help="for .pth files that were saved without them")
    parser.add_argument(
        "--models", type=Path, metavar="DIR", help="take every file in it that has its published name (see above)"
    )
    size = sum(model.size for model in MODELS.values())
    parser.add_argument(
        "--download",
        action="store_true",
        help=f"fetch what is missing into {LOOK_IN}/ or --models ({size / 1e9:.1f} GB)",
    )
    return parser.parse_args()


def main() -> None:
    args = parse()
    if not args.add:
        check_new(args.out, "--out")
    lines = convert(
        find_inputs(args),
        args.out,
        args.heads,
        add=args.add,
        codebook_dim=args.codebook_dim,
        tokenizer=args.tokenizer,
        mel_norms=args.mel_norms,
        allow_nonfinite=args.allow_nonfinite,
        checksums=not args.ignore_checksums,
    )
    print("\n".join(lines))


if __name__ == "__main__":
    exit_with_one_line(main)
