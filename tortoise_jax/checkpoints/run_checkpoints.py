"""The checkpoints of a run: its steps under `RUN/steps`, written in the background, the last and the best kept."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from tortoise_jax import parallel
from tortoise_jax.checkpoints.trees import Tree, checksum, on_this_host, restore_tree, tree_handler
from tortoise_jax.errors import UserError, first_line

STEPS = "steps"
TMP_DIR_SUFFIX = ".orbax-checkpoint-tmp"
ELSEWHERE = "steps.txt"  # in a run's directory: where its steps are, if not in STEPS
PARAMS_CRC32 = "params_crc32"
REMOVAL_SECONDS = 1  # longer than a run takes to remove an old checkpoint
LISTINGS = 10  # tries to list a run's checkpoints between two of its removals


def is_run(path: Path) -> bool:
    return (path / STEPS).is_dir() or (path / ELSEWHERE).is_file()


def steps_folder(run: Path) -> epath.Path:
    """Where a run's steps are: in its own directory, or elsewhere. Raises UserError where that cannot be reached."""
    if not (run / ELSEWHERE).is_file():
        return epath.Path((run / STEPS).absolute())
    return reachable((run / ELSEWHERE).read_text(encoding="utf-8").strip(), run)


def reachable(folder: str, run: Path) -> epath.Path:
    """A folder or bucket for the steps of a run. Raises UserError where it cannot be reached."""
    try:
        path = epath.Path(folder)
        path.exists()
    except Exception as error:  # of the storage's own client, which may not be installed either
        raise UserError(f"{folder}, where {run} has its steps, cannot be reached: {first_line(error)}") from None
    return path


class Manager(ocp.CheckpointManager):
    """Orbax's, which tells at once that this host's part of a save failed.

    Its own background thread would first wait twenty minutes for the other hosts, which wait for this one.
    """

    failed: Callable[[Exception], None] = staticmethod(lambda error: None)

    def _wait_for_checkpointers(self) -> None:
        try:
            super()._wait_for_checkpointers()
        except Exception as error:
            self.failed(error)
            raise

    def _load_checkpoint_infos(self, *args: Any, **kwargs: Any) -> Any:
        """Tries again where a running run removed a checkpoint between the listing of the folder and the reading."""
        for _ in range(LISTINGS - 1):
            try:
                return super()._load_checkpoint_infos(*args, **kwargs)
            except FileNotFoundError:
                time.sleep(REMOVAL_SECONDS)
        return super()._load_checkpoint_infos(*args, **kwargs)


def uncompressed(*items: str) -> ocp.handlers.CheckpointHandlerRegistry:
    """Has a manager write these trees by `tree_handler`, all else by orbax's defaults."""
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for item in items:
        registry.add(item, ocp.args.PyTreeSave, tree_handler())
    return registry


class RunCheckpoints:
    """The steps of a run in its `steps_folder`: params and optimiser state apart, so that weights alone can be read.

    Made, saved, restored and finished by every host of a run, since orbax waits for all of them at each call;
    `to_read` is for one host alone.
    """

    def __init__(self, run: Path, keep_last: int = 2, *, alone: bool = False) -> None:
        from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

        self.folder = steps_folder(run)
        if not alone and parallel.is_main():
            # Saves that were killed, each as large as a checkpoint. Orbax would remove them in the background, where
            # nothing keeps it from taking a save that has begun since for one of them.
            for left in self.folder.glob(f"*{TMP_DIR_SUFFIX}*"):
                left.rmtree()
        loss = lambda metrics: metrics["loss"]
        best = keep.BestN(get_metric_fn=loss, reverse=True, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep.AnyPreservationPolicy([keep.LatestN(keep_last), best]),
            best_fn=loss,
            best_mode="min",
            create=not alone,
            read_only=alone,
            multiprocessing_options=on_this_host() if alone else ocp.options.MultiprocessingOptions(),
        )
        self.manager = Manager(self.folder, options=options, handler_registry=uncompressed("params", "opt_state"))
        self.manager.failed = lambda error: parallel.end_for_all(self.not_written(error))

    @classmethod
    def to_read(cls, run: Path) -> RunCheckpoints:
        """Opened by this host for itself; nothing can be saved."""
        return cls(run, alone=True)

    def steps(self) -> list[int]:
        """The steps that are whole, rising."""
        return sorted(self.manager.all_steps())

    def newest(self) -> int | None:
        return self.manager.latest_step()

    def best(self) -> int | None:
        """The step of the lowest validation loss, or the newest where none was evaluated."""
        best = self.manager.best_step()
        return self.newest() if best is None else best

    def save(self, step: int, params: Tree, opt_state: Tree, progress: dict[str, Any], loss: float | None) -> None:
        """Starts writing in the background; every host must call it with the same step.

        On CPU it waits for the end: what is written is the state itself there, of which a step meanwhile would need a
        second copy. An existing step is kept. Old checkpoints go only after the new one is whole. loss: of validation,
        by which the best is found; one that is not finite counts as none.
        """
        if step in self.manager.all_steps():
            return
        of_params = checksum(params)
        progress = progress | {PARAMS_CRC32: of_params, "crc32": checksum(opt_state, of_params)}
        items = ocp.args.Composite(
            params=ocp.args.PyTreeSave(params),
            opt_state=ocp.args.PyTreeSave(opt_state),
            progress=ocp.args.JsonSave(progress),
        )
        with self.failing_as_one_line():
            known = loss is not None and math.isfinite(loss)
            self.manager.save(step, args=items, metrics={"loss": loss} if known else None)
            if parallel.on_cpu():
                self.manager.wait_until_finished()

    @contextlib.contextmanager
    def failing_as_one_line(self) -> Iterator[None]:
        """A write that failed, now or in the background, as a UserError that says what is still whole."""
        try:
            yield
        except Exception as error:
            raise self.not_written(error) from None

    def not_written(self, error: Exception) -> UserError:
        whole = sorted(int(path.name) for path in self.folder.glob("*") if path.name.isdigit())
        rest = f"the checkpoints of steps {whole} are whole" if whole else "there is no older one"
        failure = UserError(
            f"{self.folder}: a checkpoint could not be written ({first_line(error)}); {rest}; "
            "make room and run the same command again"
        )
        failure.__cause__ = error  # which may be that another host was lost: parallel.by_lost_host
        return failure

    def progress(self, step: int) -> dict[str, Any]:
        """What was saved beside the arrays of a step."""
        return self.manager.restore(step, args=ocp.args.Composite(progress=ocp.args.JsonRestore()))["progress"]

    def restore(self, step: int, params: Tree, opt_state: Tree) -> tuple[Tree, Tree, dict[str, Any]]:
        """Arrays shaped like the given trees, as numpy, exactly as they were saved; else a UserError."""
        folder = self.folder / str(step)
        try:
            progress = self.progress(step)
            restored = restore_tree(folder / "params", params), restore_tree(folder / "opt_state", opt_state)
            if checksum(restored) != progress["crc32"]:
                raise ValueError("its checksum is not what was written")
        except Exception as error:
            raise UserError(f"{folder} cannot be resumed from: {first_line(error)}") from None
        return *restored, progress

    def restore_newest(
        self, params: Tree, opt_state: Tree, say: Callable[[str], None]
    ) -> tuple[Tree, Tree, dict[str, Any]] | None:
        """The newest checkpoint that is whole, or None where there is none at all.

        A damaged one is put aside as `N.damaged` and the one before it taken, which `say` is told.
        """
        for step in reversed(self.steps()):
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
            target = self.folder / f"{step}.damaged"
            target.rmtree(missing_ok=True)  # the same step of an earlier try
            (self.folder / str(step)).rename(target)
        parallel.wait_for_all(f"put aside {step}")
        self.manager.reload()

    def restore_params(self, shapes: Tree, step: int | None) -> tuple[int, Tree]:
        """(step, its parameters), read by this host alone; None takes the best. Raises UserError for damaged ones."""
        while True:
            chosen = self.best() if step is None else step
            if chosen is None:
                raise UserError(f"{self.folder} holds no finished checkpoint yet")
            if chosen not in self.steps():
                raise UserError(f"{self.folder} holds no step {chosen}, only {self.steps()}")
            try:
                return chosen, self.verified_params(chosen, shapes)
            except UserError:
                time.sleep(REMOVAL_SECONDS)
                self.manager.reload()
                if chosen in self.steps():
                    raise
                # The run is going on, and has just removed it for a better one.

    def verified_params(self, step: int, shapes: Tree) -> Tree:
        folder = self.folder / str(step)
        params = restore_tree(folder / "params", shapes)
        try:
            progress = self.progress(step)
            stated = progress.get(PARAMS_CRC32)  # versions before did not write it
        except Exception as error:
            raise UserError(f"{folder / 'progress'} is damaged: {first_line(error)}") from None
        if stated not in (None, checksum(params)):
            rest = [other for other in self.steps() if other != step]
            others = f"; the run's other steps: {rest} (--step)" if rest else ""
            raise UserError(f"{folder / 'params'} is damaged: its checksum is not what was written{others}")
        return params

    def finish(self) -> None:
        """Waits for what is being written; nothing is complete before this returns."""
        with self.failing_as_one_line():
            self.manager.wait_until_finished()
            self.manager.close()
