"""Files and folders that are either whole or not there, whenever the process ends; JSON."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


@contextlib.contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A directory beside `target` to write into; renamed to it at the end, removed if anything fails."""
    if target.exists():
        raise UserError(f"{target} exists already; remove it or choose another name")
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


def copy_folder(source: Path, target: Path) -> None:
    """A copy of a folder, whole or not there at all. Raises UserError."""
    with written_whole(target) as partial:
        shutil.copytree(source, partial, dirs_exist_ok=True)


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
