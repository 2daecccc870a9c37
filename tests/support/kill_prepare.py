"""Prepares a data set again and again, killed at random moments.

  python -m tests.support.kill_prepare VOICE CHECKPOINT OUT KILLS

Prints how often a run was killed and how often one finished, and fails where one finishes with anything else than an
undisturbed run does. Runs are forked before JAX starts any thread, so that each costs no import.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tortoise_jax.data.preparation import Options, prepare


def forked(work: Callable[[], object]) -> int:
    """The process id of a child that does `work` and nothing else."""
    child = os.fork()
    if child:
        return child
    try:
        with (
            Path(os.devnull).open("w") as nowhere,
            contextlib.redirect_stderr(nowhere),
            contextlib.redirect_stdout(nowhere),
        ):
            work()
        os._exit(0)
    finally:
        os._exit(1)


def snapshot(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def main() -> None:
    voice, checkpoint, out, kills = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    options = Options(workers=0, group=2, max_rejected=1.0)
    run = lambda folder: forked(lambda: prepare(voice, checkpoint, folder, options))
    assert os.waitpid(run(out / "undisturbed"), 0)[1] == 0
    want = snapshot(out / "undisturbed")
    start = time.monotonic()  # of a run that finds its programs compiled, as those to be killed do
    assert os.waitpid(run(out / "again"), 0)[1] == 0
    longest = time.monotonic() - start
    assert snapshot(out / "again") == want
    killed = finished = half_done = 0
    rng = random.Random(0)
    while killed < kills or not finished:
        child = run(out / "killed")
        if killed < kills:
            time.sleep(rng.uniform(0, longest))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL), f"a run after {killed} kills failed by itself: status {status}"
        if status == 0:
            finished += 1
            found = snapshot(out / "killed")
            differing = sorted(name for name in {*found, *want} if found.get(name) != want.get(name))
            assert not differing, f"a run that was killed before differs from an undisturbed one: {differing}"
            shutil.rmtree(out / "killed")
        else:
            killed += 1
            half_done += (out / "killed" / "finished").is_dir()
    print(f"{killed} killed, {half_done} of them with work done, {finished} finished alike, {len(want)} files")


if __name__ == "__main__":
    main()
