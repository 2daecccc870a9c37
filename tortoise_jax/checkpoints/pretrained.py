"""Converted checkpoints on disk, and the same files of a run.

A converted checkpoint is a directory that needs nothing beside it:
  tortoise.json    metadata: format, dimensions of the models, digests, where they came from
  tokenizer.json   the BPE          mel_norms.txt    the 80 constants
  ar/, dvae/, …    a tree per part, written by orbax
A run's directory has the same files with its own copy of the parts it needs and does not train, and `steps/N/` instead
of the one it trains ("trains" in the metadata; the AR model where nothing is said).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tortoise_jax.audio import default_mel_norms
from tortoise_jax.checkpoints.parts import AR, DVAE, PART_TYPES, Part, abstract_tree, abstract_variables, in_collections
from tortoise_jax.checkpoints.run_checkpoints import RunCheckpoints, is_run
from tortoise_jax.checkpoints.trees import Tree, checksum, digest, restore_tree, save_tree
from tortoise_jax.errors import UserError, first_line
from tortoise_jax.files import locked, read_json, remove_unfinished, sync, write_json, written_whole
from tortoise_jax.models import dvae, unified_voice
from tortoise_jax.models.lora import LoraConfig, merged, with_adapters
from tortoise_jax.text.tokenizer import Tokenizer

FORMAT = 1
METADATA = "tortoise.json"
TOKENIZER = "tokenizer.json"
MEL_NORMS = "mel_norms.txt"
SUMMARY = "summary.json"  # how a run went, with `DIVERGED` in place of "finished" where it came to nothing
DIVERGED = "diverged"
RUN_CONFIG = "config.json"  # of a run; its "checkpoint" is what the run began with


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """What a checkpoint holds. mel_norms (m,) float32; source: where each part came from, by its name.

    parts: by name ("ar", "dvae"); those that were not asked for have shapes in place of weights.
    path: names the checkpoint in errors. step: of a run, where its weights were read.
    """

    parts: dict[str, Part]
    tokenizer: Tokenizer
    mel_norms: np.ndarray
    source: dict[str, Any]
    path: Path = Path("the checkpoint")
    step: int | None = None

    def part(self, name: str) -> Part:
        """Raises UserError where the checkpoint has no such part."""
        if name not in self.parts:
            raise UserError(f"{self.path} holds no {PART_TYPES[name].title}; convert one with --{name}")
        return self.parts[name]

    @property
    def ar(self) -> Part:
        return self.part(AR)

    @property
    def dvae(self) -> Part:
        return self.part(DVAE)

    @property
    def identity(self) -> dict[str, Any]:
        """What tells its weights from others: a digest by part, and a run's step."""
        return {name: part.digest for name, part in self.parts.items()} | {"step": self.step}

    def only(self, *names: str) -> Pretrained:
        """The same without the parts that are not named."""
        kept = {name: part for name, part in self.parts.items() if name in names}
        source = {name: origin for name, origin in self.source.items() if name in names or name not in PART_TYPES}
        return dataclasses.replace(self, parts=kept, source=source)

    def with_part(self, name: str, part: Part) -> Pretrained:
        """The same with one part added or in another's place."""
        return dataclasses.replace(self, parts=self.parts | {name: part})


def released_shapes() -> Pretrained:
    """The released models without weights, to plan for."""
    configs = {AR: unified_voice.RELEASED, DVAE: dvae.RELEASED}
    parts = {name: Part(config, abstract_variables(config)) for name, config in configs.items()}
    return Pretrained(parts, Tokenizer.default(), default_mel_norms(), {})


def mel_norms_digest(mel_norms: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(mel_norms, np.float32).tobytes()).hexdigest()


def undamaged(path: Path, tree: Tree, metadata: dict[str, Any]) -> Tree:
    """The tree, if it is what the metadata was written with; else a UserError."""
    stated = metadata.get("checksums", {}).get(path.name)
    if stated not in (None, checksum(tree)):
        raise UserError(f"{path} is damaged: its checksum is not what {METADATA} says; convert again")
    return tree


def metadata_of(pretrained: Pretrained, trains: str = "") -> dict[str, Any]:
    """What METADATA says of a checkpoint. trains: which part a run's steps are of."""
    parts = pretrained.parts
    checksum_of = lambda part: checksum(part.tree) if part.checksum is None else part.checksum
    return {
        "format": FORMAT,
        **{name: dataclasses.asdict(parts[name].config) if name in parts else None for name in PART_TYPES},
        "digests": {name: part.digest for name, part in parts.items()},
        "dvae_digest": parts[DVAE].digest if DVAE in parts else "",  # what versions before "digests" read
        "tokenizer_digest": pretrained.tokenizer.digest,
        "mel_norms_digest": mel_norms_digest(pretrained.mel_norms),
        "checksums": {name: checksum_of(part) for name, part in parts.items()},
        "source": pretrained.source,
    } | ({"trains": trains} if trains else {})


def write_metadata(folder: Path, pretrained: Pretrained, trains: str = "") -> None:
    """Everything of a checkpoint but its weights, of which it holds the checksums.

    trains: which part a run's steps are of.
    """
    (folder / TOKENIZER).write_text(pretrained.tokenizer.to_json(), encoding="utf-8")
    np.savetxt(folder / MEL_NORMS, pretrained.mel_norms, fmt="%.9g")
    write_json(folder / METADATA, metadata_of(pretrained, trains))


def save_pretrained(pretrained: Pretrained, target: Path) -> None:
    """Writes a converted checkpoint, whole or not at all."""
    with written_whole(target) as folder:
        for name, part in pretrained.parts.items():
            save_tree(folder / name, part.tree)
        write_metadata(folder, pretrained)


@contextlib.contextmanager
def added_whole(checkpoint: Path) -> Iterator[tuple[Path, Callable[[Pretrained], None]]]:
    """A folder to write more parts of a checkpoint into, and what adds them: all of them, or none if anything fails.

    What adds them is given the checkpoint as it then is. Raises UserError where another process writes it.
    """
    partial = checkpoint / "added.partial"
    with locked(checkpoint, "--out"):
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed

        def add(pretrained: Pretrained) -> None:
            sync(partial)
            for part in partial.iterdir():
                shutil.rmtree(checkpoint / part.name, ignore_errors=True)  # likewise: no metadata names it
                part.rename(checkpoint / part.name)
            write_json(checkpoint / METADATA, metadata_of(pretrained))  # from here on they are its parts

        try:
            partial.mkdir()
            yield partial, add
        except OSError as error:
            raise UserError(f"--out {checkpoint}: cannot be written: {error.strerror or error}") from None
        finally:
            remove_unfinished(partial)


def read_metadata(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        raise UserError(
            f"{path} {found}; expected a converted checkpoint (made by python convert/torch_to_flax.py) or a run"
        )
    if not (path / METADATA).exists():
        raise UserError(
            f"{path} holds no {METADATA}: it is neither a converted checkpoint nor a run; "
            "make one with python convert/torch_to_flax.py"
        )
    metadata = read_json(path / METADATA)
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        stated = metadata.get("format") if isinstance(metadata, dict) else "none"
        raise UserError(f"{path / METADATA}: format {stated}, this version reads {FORMAT}")
    return metadata


def load_pretrained(path: str | Path, parts: Sequence[str] | None = None, step: int | None = None) -> Pretrained:
    """Reads a converted checkpoint or a run.

    parts: whose weights to read, each of which must be in it; None reads all it holds.
    step: which of a run's steps; None takes the best by validation loss, else the newest.
    """
    path = Path(path)
    metadata = read_metadata(path)
    found = read_parts(path, metadata)
    pretrained = Pretrained(found, *read_front_end(path, metadata), metadata.get("source", {}), path)
    for name in found if parts is None else parts:
        part = pretrained.part(name)
        now = part.digest
        if name == trained_part(metadata) and is_run(path):
            if step is None:
                check_result(path)
            found_step, saved, adapters = saved_params(path, part.config, step)
            tree = merged(saved, adapters)
            pretrained = dataclasses.replace(pretrained, step=found_step)
            # The codes of a data set are those of one dVAE: a trained one must not pass for the one it began as.
            now = digest(tree) if name == DVAE else now
        else:
            tree = undamaged(path / name, restore_tree(path / name, abstract_tree(part.config)), metadata)
        pretrained = pretrained.with_part(name, Part(part.config, in_collections(part.config, tree), now))
    return pretrained


def saved_params(run: Path, config: Any, step: int | None) -> tuple[int, Tree, LoraConfig]:
    """(step, the trained part's parameters as the run saved them, adapters apart; these). step: None takes the best."""
    adapters = adapters_of(run)
    shapes = jax.eval_shape(functools.partial(with_adapters, config=adapters, seed=0), abstract_tree(config))
    return *RunCheckpoints.to_read(run).restore_params(shapes, step), adapters


def adapters_of(run: Path) -> LoraConfig:
    """How a run's parameters have adapters, if at all."""
    settings = read_json(run / RUN_CONFIG) if (run / RUN_CONFIG).exists() else {}
    try:
        return LoraConfig(int(settings.get("lora.rank", 0)), float(settings.get("lora.alpha", 1)))
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{run / RUN_CONFIG} is damaged: {first_line(error)}") from None


def check_result(run: Path) -> None:
    """Raises UserError for a run that diverged with nothing to tell a better step by: none is known to be any good."""
    summary = read_json(run / SUMMARY) if (run / SUMMARY).exists() else {}
    if (summary.get("ended"), summary.get("best_step")) == (DIVERGED, None):
        raise UserError(f"{run} diverged, and no held-out loss tells which step is good; --step N takes one anyway")


def trained_part(metadata: dict[str, Any]) -> str:
    """The part that a run's steps are of."""
    return str(metadata.get("trains", AR))


def with_parts_of_origin(pretrained: Pretrained, names: Sequence[str]) -> Pretrained:
    """The same with the named parts that it lacks: a run's from the checkpoint it began with, which may be a run too.

    Raises UserError that lists what is missing still, and how to get it.
    """
    looked_in = [pretrained.path]
    while (looked_in[-1] / RUN_CONFIG).exists():
        origin = Path(str(read_json(looked_in[-1] / RUN_CONFIG).get("checkpoint", "")))
        if origin in looked_in or not (origin / METADATA).exists():
            break
        looked_in.append(origin)
        has = read_metadata(origin)
        lacking = [name for name in names if name not in pretrained.parts and has.get(name)]
        found = load_pretrained(origin, lacking)
        for name in lacking:
            pretrained = pretrained.with_part(name, found.part(name))
    missing = [PART_TYPES[name].title for name in names if name not in pretrained.parts]
    if missing:
        raise UserError(
            f"{' and '.join(map(str, looked_in))}: without {', '.join(missing)}; convert all files of TorToiSe's "
            "models folder into a checkpoint: python convert/torch_to_flax.py --models DIR"
        )
    return pretrained


def read_parts(path: Path, metadata: dict[str, Any]) -> dict[str, Part]:
    """Every part of a checkpoint without its weights."""
    try:
        digests = metadata.get("digests", {DVAE: metadata["dvae_digest"]})
        configs = {name: kind.config(**metadata[name]) for name, kind in PART_TYPES.items() if metadata.get(name)}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {first_line(error)}") from None
    stated = metadata.get("checksums", {})
    return {
        name: Part(config, abstract_variables(config), digests.get(name, ""), stated.get(name))
        for name, config in configs.items()
    }


def read_front_end(path: Path, metadata: dict[str, Any]) -> tuple[Tokenizer, np.ndarray]:
    """The tokenizer and the mel norms (m,)."""
    tokenizer = Tokenizer.from_file(path / TOKENIZER)
    try:
        mel_norms = np.loadtxt(path / MEL_NORMS, dtype=np.float32)
        stated = metadata["tokenizer_digest"], metadata["mel_norms_digest"]
    except (KeyError, ValueError, OSError) as error:
        raise UserError(f"{path} is damaged: {first_line(error)}") from None
    if (tokenizer.digest, mel_norms_digest(mel_norms)) != stated:
        raise UserError(f"{path}: {TOKENIZER} or {MEL_NORMS} is not what {METADATA} was written with; convert again")
    return tokenizer, mel_norms
