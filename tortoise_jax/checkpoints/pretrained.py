"""Weights on disk: converted checkpoints, and the checkpoints of a run.

A converted checkpoint is a directory that needs nothing beside it:
  tortoise.json    format, dimensions of both models, digests, where they came from
  tokenizer.json   the BPE          mel_norms.txt    the 80 constants
  ar/, dvae/       parameters, written by orbax
A run's directory has the same files with its own dVAE copy, and `steps/N/` instead of `ar/`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from tortoise_jax import parallel
from tortoise_jax.checkpoints.state_dict import flatten
from tortoise_jax.errors import UserError, first_line
from tortoise_jax.files import write_atomically
from tortoise_jax.models.dvae import DiscreteVAE, DVAEConfig
from tortoise_jax.models.unified_voice import UnifiedVoice, UnifiedVoiceConfig
from tortoise_jax.text.tokenizer import Tokenizer

FORMAT = 1
CARD = "tortoise.json"
TOKENIZER = "tokenizer.json"
MEL_NORMS = "mel_norms.txt"
STEPS = "steps"
Tree = Any

# orbax narrates every save through absl's logger, and failures by tracebacks; what users should know is said by us.
logging.getLogger("absl").setLevel(logging.CRITICAL)


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Everything a later step needs; params of a part that was not asked for or is not there are None."""

    config: UnifiedVoiceConfig | None
    params: Tree | None
    dvae_config: DVAEConfig | None
    dvae_params: Tree | None
    dvae_digest: str
    tokenizer: Tokenizer
    mel_norms: np.ndarray
    source: dict[str, Any]


def digest(tree: Tree) -> str:
    """sha256 over paths, shapes and float32 bytes of a parameter tree."""
    total = hashlib.sha256()
    for path, value in sorted(flatten(tree).items()):
        array = np.ascontiguousarray(value, np.float32)
        total.update(f"{path} {array.shape}\n".encode())
        total.update(array.reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def mel_norms_digest(mel_norms: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(mel_norms, np.float32).tobytes()).hexdigest()


def unified_voice_shapes(config: UnifiedVoiceConfig) -> Tree:
    """The AR model's parameter tree as shapes, without computing anything."""
    mel = jnp.zeros((1, 1, 8, config.mel_channels))
    row = jnp.zeros((1, 4), jnp.int32)
    return jax.eval_shape(lambda: UnifiedVoice(config).init(jax.random.key(0), mel, row, row, row))["params"]


def dvae_shapes(config: DVAEConfig) -> Tree:
    """The dVAE's parameter tree as shapes."""
    mel = jnp.zeros((1, 2 * config.frames_per_code, config.channels))
    return jax.eval_shape(lambda: DiscreteVAE(config).init(jax.random.key(0), mel))["params"]


def parameter_count(tree: Tree) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


@contextlib.contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A directory beside `target` to write into; renamed to it at the end, removed if anything fails."""
    if target.exists():
        raise UserError(f"{target} exists already; remove it or choose another place")
    partial = target.with_name(f"{target.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        sync(partial)
        partial.rename(target)
        sync(target.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{target}: cannot be written: {error.strerror or error}") from None
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def sync(folder: Path) -> None:
    """Makes a directory and the files in it survive a power cut."""
    for path in [folder, *(p for p in folder.rglob("*"))] if folder.is_dir() else [folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}") from None


def save_tree(path: Path, tree: Tree) -> None:
    """Uncompressed: float32 weights hardly compress, and it would double both the time and the memory."""
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False)) as checkpointer:
            checkpointer.save(path.absolute(), args=ocp.args.PyTreeSave(tree))
    except Exception as error:  # orbax and tensorstore raise many kinds where a disk is full or not writable
        raise UserError(f"{path}: cannot be written: {first_line(error)}") from None


def restore_tree(path: Path, shapes: Tree) -> Tree:
    """Numpy arrays of exactly these shapes; anything else on disk is a UserError."""
    if not path.is_dir():
        raise UserError(f"{path} is missing: the checkpoint is incomplete")
    target = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(path.absolute(), target)
    except Exception as error:  # orbax and tensorstore raise many kinds for damaged files
        raise UserError(f"{path} is damaged: {first_line(error)}") from None


def undamaged(path: Path, tree: Tree, card: dict[str, Any]) -> Tree:
    """The tree, if it is what the card was written with; else a UserError."""
    stated = card.get("checksums", {}).get(path.name)
    if stated not in (None, checksum(tree)):
        raise UserError(f"{path} is damaged: its checksum is not what {CARD} says; convert again")
    return tree


def checksum(tree: Tree) -> int:
    """crc32 over the bytes of all arrays in order, which the file format does not check."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        total = zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data, total)
    return total


def write_card(folder: Path, pretrained: Pretrained) -> None:
    """Everything of a checkpoint but its weights, of which it holds the checksums."""
    trees = {"ar": pretrained.params, "dvae": pretrained.dvae_params}
    card = {
        "format": FORMAT,
        "ar": pretrained.config and dataclasses.asdict(pretrained.config),
        "dvae": pretrained.dvae_config and dataclasses.asdict(pretrained.dvae_config),
        "dvae_digest": pretrained.dvae_digest,
        "tokenizer_digest": pretrained.tokenizer.digest,
        "mel_norms_digest": mel_norms_digest(pretrained.mel_norms),
        "checksums": {part: checksum(tree) for part, tree in trees.items() if tree is not None},
        "source": pretrained.source,
    }
    (folder / TOKENIZER).write_text(pretrained.tokenizer.to_json(), encoding="utf-8")
    np.savetxt(folder / MEL_NORMS, pretrained.mel_norms, fmt="%.9g")
    write_json(folder / CARD, card)


def save_pretrained(pretrained: Pretrained, target: Path) -> None:
    """Writes a converted checkpoint, whole or not at all."""
    with written_whole(target) as folder:
        if pretrained.params is not None:
            save_tree(folder / "ar", pretrained.params)
        if pretrained.dvae_params is not None:
            save_tree(folder / "dvae", pretrained.dvae_params)
        write_card(folder, pretrained)


def read_card(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        found = "is a file" if path.exists() else "does not exist"
        raise UserError(
            f"{path} {found}; expected a converted checkpoint (made by python convert/torch_to_flax.py) or a run"
        )
    if not (path / CARD).exists():
        raise UserError(
            f"{path} holds no {CARD}: it is neither a converted checkpoint nor a run; "
            "make one with python convert/torch_to_flax.py"
        )
    card = read_json(path / CARD)
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        stated = card.get("format") if isinstance(card, dict) else "none"
        raise UserError(f"{path / CARD}: format {stated}, this version reads {FORMAT}")
    return card


def load_pretrained(path: str | Path, parts: Sequence[str] = ("ar", "dvae"), step: int | None = None) -> Pretrained:
    """Reads a converted checkpoint or a run. parts: which weights ("ar", "dvae"); a part that is not there is an error.

    step: which of a run's steps; None takes the best by validation loss, else the newest.
    """
    path = Path(path)
    card = read_card(path)
    for part in parts:
        if not card.get(part):
            raise UserError(f"{path} holds no {'AR model' if part == 'ar' else 'dVAE'}; convert one with --{part}")
    try:
        config = UnifiedVoiceConfig(**card["ar"]) if card["ar"] else None
        dvae_config = DVAEConfig(**card["dvae"]) if card["dvae"] else None
        mel_norms = np.loadtxt(path / MEL_NORMS, dtype=np.float32)
        stated = card["dvae_digest"], card["tokenizer_digest"], card["mel_norms_digest"]
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(f"{path} is damaged: {first_line(error)}") from None
    tokenizer = Tokenizer.from_file(path / TOKENIZER)
    if (tokenizer.digest, mel_norms_digest(mel_norms)) != stated[1:]:
        raise UserError(f"{path}: {TOKENIZER} or {MEL_NORMS} is not what {CARD} was written with; convert again")
    params = dvae_params = None
    if "ar" in parts:
        assert config is not None
        shapes = unified_voice_shapes(config)
        is_run = (path / STEPS).is_dir()
        restored = RunCheckpoints(path).restore_params(shapes, step) if is_run else restore_tree(path / "ar", shapes)
        params = restored if is_run else undamaged(path / "ar", restored, card)
    if "dvae" in parts:
        assert dvae_config is not None
        dvae_params = undamaged(path / "dvae", restore_tree(path / "dvae", dvae_shapes(dvae_config)), card)
    source = card.get("source", {})
    return Pretrained(config, params, dvae_config, dvae_params, stated[0], tokenizer, mel_norms, source)


class RunCheckpoints:
    """The steps of a run under `RUN/steps`: params and optimiser state apart, so that weights alone can be read."""

    def __init__(self, run: Path, keep_last: int = 2) -> None:
        from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

        self.folder = run / STEPS
        policy = keep.AnyPreservationPolicy(
            [keep.LatestN(keep_last), keep.BestN(get_metric_fn=lambda m: m["loss"], reverse=True, n=1)]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy, best_fn=lambda metrics: metrics["loss"], best_mode="min"
        )
        self.manager = ocp.CheckpointManager(self.folder.absolute(), options=options)

    def newest(self) -> int | None:
        return self.manager.latest_step()

    def best(self) -> int | None:
        """The step of the lowest validation loss, or the newest where none was evaluated."""
        return self.manager.best_step() or self.newest()

    def save(self, step: int, params: Tree, opt_state: Tree, progress: dict[str, Any], loss: float | None) -> None:
        """Starts writing in the background; every host must call it with the same step.

        A step that is there already is kept. Old checkpoints go only after the new one is whole.
        """
        if step in self.manager.all_steps():
            return
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(params),
            opt_state=ocp.args.StandardSave(opt_state),
            progress=ocp.args.JsonSave(progress | {"crc32": checksum((params, opt_state))}),
        )
        with self.failing_as_one_line():
            self.manager.save(step, args=items, metrics=None if loss is None else {"loss": loss})

    @contextlib.contextmanager
    def failing_as_one_line(self) -> Iterator[None]:
        """A write that failed, now or in the background, as a UserError that says what is still whole."""
        try:
            yield
        except Exception as error:
            whole = [step for step in self.manager.all_steps(read=True) if (self.folder / str(step)).is_dir()]
            rest = f"the checkpoints of steps {whole} are whole" if whole else "there is no older one"
            raise UserError(
                f"{self.folder}: a checkpoint could not be written ({first_line(error)}); {rest}; "
                "make room and run the same command again"
            ) from None

    def restore(self, step: int, params: Tree, opt_state: Tree) -> tuple[Tree, Tree, dict[str, Any]]:
        """Arrays shaped like the given trees, as numpy, exactly as they were saved; else a UserError."""
        blank = lambda tree: jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), tree)
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(blank(params)),
            opt_state=ocp.args.StandardRestore(blank(opt_state)),
            progress=ocp.args.JsonRestore(),
        )
        try:
            restored = self.manager.restore(step, args=items)
            found = checksum((restored["params"], restored["opt_state"]))
            if found != restored["progress"]["crc32"]:
                raise ValueError("its checksum is not what was written")
        except Exception as error:
            raise UserError(f"{self.folder / str(step)} cannot be resumed from: {first_line(error)}") from None
        return restored["params"], restored["opt_state"], restored["progress"]

    def restore_newest(
        self, params: Tree, opt_state: Tree, say: Callable[[str], None]
    ) -> tuple[Tree, Tree, dict[str, Any]] | None:
        """The newest checkpoint that is whole, or None where there is none at all.

        A damaged one is put aside as `N.damaged` and the one before it taken, which `say` is told.
        """
        for step in sorted(self.manager.all_steps(), reverse=True):
            try:
                return self.restore(step, params, opt_state)
            except UserError as error:
                say(f"{error}; put aside as {step}.damaged, trying the one before it")
                self.put_aside(step)
        if any(self.folder.glob("*.damaged")):
            raise UserError(f"{self.folder}: no checkpoint is whole; remove the folder to start the run anew")
        return None

    def put_aside(self, step: int) -> None:
        parallel.wait_for_all(f"putting aside {step}")
        if parallel.is_main():
            (self.folder / str(step)).rename(self.folder / f"{step}.damaged")
        parallel.wait_for_all(f"put aside {step}")
        self.manager.reload()

    def restore_params(self, shapes: Tree, step: int | None) -> Tree:
        chosen = self.best() if step is None else step
        if chosen is None:
            raise UserError(f"{self.folder} holds no finished checkpoint yet")
        if chosen not in self.manager.all_steps():
            raise UserError(f"{self.folder} holds no step {chosen}, only {sorted(self.manager.all_steps())}")
        return restore_tree(self.folder / str(chosen) / "params", shapes)

    def finish(self) -> None:
        """Waits for what is being written; nothing is complete before this returns."""
        with self.failing_as_one_line():
            self.manager.wait_until_finished()
            self.manager.close()
