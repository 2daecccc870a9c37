"""Progress bars over bytes, shown on a terminal only."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

POLL_SECONDS = 0.2


def byte_bar(what: str, total: int) -> tqdm:
    return tqdm(desc=what, total=total, unit="B", unit_scale=True, leave=False, disable=None)


@contextlib.contextmanager
def growing(folder: Path, what: str, total: int) -> Iterator[None]:
    """A bar that follows the size of a folder that someone else fills."""
    done = threading.Event()

    def follow(bar: tqdm) -> None:
        while not done.wait(POLL_SECONDS):
            bar.update(max(0, size_of(folder) - bar.n))  # in the end the folder is renamed

    with byte_bar(what, total) as bar:
        watcher = threading.Thread(target=follow, args=(bar,), daemon=True)
        if not bar.disable:
            watcher.start()
        try:
            yield
        finally:
            done.set()
            if not bar.disable:
                watcher.join()


def size_of(folder: Path) -> int:
    """Bytes of the files under a folder; what vanishes meanwhile counts as nothing."""
    total = 0
    with contextlib.suppress(OSError):
        for path in folder.rglob("*"):
            total += path.stat().st_size
    return total
