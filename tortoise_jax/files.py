"""Files that are either whole or not there, whenever the process ends."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from tortoise_jax.errors import UserError

PARTIAL = ".{name}.{process}.partial"


def write_atomically(path: Path, content: bytes | str) -> None:
    """Writes beside `path`, syncs and renames. Two writers of the same content may race; either wins whole.

    Raises UserError where it cannot be written (no space, no permission); `path` is then as it was.
    """
    beside = path.with_name(PARTIAL.format(name=path.name, process=os.getpid()))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise UserError(f"{path}: cannot be written ({error.strerror}); nothing was changed there") from error


def remove_partials(folder: Path) -> None:
    """Removes what writers that were killed left in `folder`; nobody may be writing there."""
    for path in folder.glob(PARTIAL.format(name="*", process="*")):
        path.unlink(missing_ok=True)
