"""Files and folders that are either whole or not there, whenever the process ends; who may write them; arrays, JSON."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import fnmatch
import functools
import glob
import hashlib
import io
import json
import os
import shutil
import socket
import stat
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from tortoise_jax.errors import UserError

# What is being written has the project's name in its own: nothing else is ever taken for ours and removed.
PARTIAL = ".{name}.{process}.tortoise_jax-partial"
LOCK = ".tortoise_jax-lock"
LFS_POINTER, LFS_SIZE = b"version https://git-lfs", 1024  # how a pointer begins, and the bytes that it has at most


# --- one writer at a time ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(folder: Path, flag: str = "") -> Iterator[None]:
    """Keeps a folder for this process alone, and makes it if it is missing. flag: by which the user named it.

    Raises UserError that says which process has it. The operating system ends a lock with its process, however that
    ends, so none is ever stale; storage that hosts share (NFS, Lustre) knows those of other hosts.
    """
    path, named, is_new = folder / LOCK, f"{flag} {folder}".strip(), not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _opened_alone(path)
    except OSError as error:
        raise UserError(f"{named}: cannot be written: {error.strerror or error}") from None
    except _Taken as taken:
        other = f", or choose another {flag}" if flag else ""
        raise UserError(f"{named} is being written by {taken}; wait until it ends{other}") from None
    with file:
        try:
            now = datetime.datetime.now().isoformat(" ", "seconds")
            program = Path(sys.argv[0]).name or "python"
            file.write(f"{program}, process {os.getpid()} on {socket.gethostname()}, since {now}\n")
            file.flush()
            yield
        finally:
            path.unlink(missing_ok=True)
            if is_new:
                with contextlib.suppress(OSError):
                    folder.rmdir()  # nothing was written


class _Taken(Exception):
    """Names the process that has a lock."""


def _opened_alone(path: Path) -> IO[str]:
    """The file, opened and locked. Raises _Taken."""
    while True:
        file = path.open("a+")
        if not _lock(file):
            with file:
                file.seek(0)
                raise _Taken(file.readline().strip() or "another process")
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.truncate(0)  # of a process that was killed
                return file
        file.close()  # the process that had it has just removed it


def _lock(file: IO[Any]) -> bool:
    """Locks an open file until it is closed; whether no other process has. Storage that knows no locks is told of."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL):
            raise
        _say_unlocked(Path(file.name).parent)
    return True


@functools.cache
def _say_unlocked(folder: Path) -> None:
    print(f"{folder}: its storage knows no locks; see to it that only one command writes there", file=sys.stderr)


# --- whole or not at all ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replaced_whole(path: Path) -> Iterator[Path]:
    """A file beside `path` to write into; synced and renamed to it at the end, removed if anything fails.

    Two writers of the same content may race; either wins whole.
    """
    beside = path.with_name(PARTIAL.format(name=path.name, process=os.getpid()))
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with beside.open("wb") as held:
            _lock(held)
            yield beside
            sync(beside)
            beside.replace(path)
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


def write_atomically(path: Path, content: bytes | str) -> None:
    """Writes a file whole or not at all. Raises UserError where it cannot be written (no space, no permission)."""
    try:
        with replaced_whole(path) as beside:
            beside.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); nothing was changed there") from error


def is_partial(path: Path) -> bool:
    """Whether a name is one of `replaced_whole`'s."""
    return fnmatch.fnmatch(path.name, PARTIAL.format(name="*", process="*"))


def remove_partials(folder: Path, name: str = "*") -> None:
    """Removes what killed writers of files of this name left in `folder`; what is still being written stays."""
    for path in folder.glob(PARTIAL.format(name=name if name == "*" else glob.escape(name), process="*")):
        with contextlib.suppress(OSError), path.open("rb") as file:
            if _lock(file):
                path.unlink()


def check_new(target: Path, flag: str = "") -> Path:
    """Where `written_whole` writes meanwhile. Raises UserError where it would replace anything. flag: see `locked`."""
    named = f"{flag} {target}".strip()
    if target.exists():
        raise UserError(f"{named} exists already; remove it or choose another name")
    partial = target.with_name(f"{target.name}.partial")
    ours = (partial / LOCK).is_file() or (partial.is_dir() and not any(partial.iterdir()))
    if partial.exists() and not ours:
        raise UserError(f"{named}: {partial} is needed to write it and holds something else; move that away")
    check_writable(target, flag)
    return partial


@contextlib.contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A directory beside `target` to write into; renamed to it at the end, removed if anything fails.

    What a killed writer left there is removed first, and nothing else: it is known by its lock.
    """
    partial = check_new(target)
    with locked(partial):
        try:
            for left in partial.iterdir():
                if left.is_dir():
                    shutil.rmtree(left)
                elif left.name != LOCK:
                    left.unlink()
            yield partial
            sync(partial)
            partial.rename(target)
            (target / LOCK).unlink()
            sync(target.parent)
        except OSError as error:
            remove_unfinished(partial)
            raise UserError(f"{target}: cannot be written: {error.strerror or error}") from None
        except BaseException:
            remove_unfinished(partial)
            raise


def remove_unfinished(folder: Path) -> None:
    """Removes a folder whose writing failed.

    Several threads write a checkpoint: when the first one fails, the others still write, and make the folder again.
    """
    quiet_since, deadline = time.monotonic(), time.monotonic() + 10
    while time.monotonic() < min(quiet_since + 0.3, deadline):
        if folder.exists():
            shutil.rmtree(folder, ignore_errors=True)
            quiet_since = time.monotonic()
        time.sleep(0.02)


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


def check_readable(path: Path) -> None:
    """Raises UserError for a pipe or a device, which may never end, and for what Git LFS leaves in a file's place."""
    try:
        mode, size = path.stat().st_mode, path.stat().st_size
        small = path.read_bytes() if stat.S_ISREG(mode) and size <= LFS_SIZE else b""
    except (OSError, ValueError):  # missing, not allowed, no possible name: whoever opens it says so
        return
    if small.startswith(LFS_POINTER):
        raise UserError(f"{path}: is a Git LFS pointer, not the file itself; fetch the file with: git lfs pull")
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        kind = "a named pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
        raise UserError(f"{path}: is {kind}, expected a file")


def check_writable(path: Path, flag: str = "") -> None:
    """Raises UserError if `path` cannot be made, before the work whose result it is to hold.

    Nothing is left behind, folders that are still missing included. flag: how the user named it, "--out".
    """
    path = path.absolute()
    folder = path
    try:
        folder = next(one for one in (path, *path.parents) if one.is_dir() or (one != path and one.exists()))
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be written: {folder}: {error.strerror}".strip()) from None


# --- arrays -----------------------------------------------------------------------------------------------------------


def save_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **arrays)
    write_atomically(path, content.getvalue())


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a .npz; nothing in it is executed."""
    check_readable(path)
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            if not hasattr(file, "files"):
                raise ValueError("not a .npz")
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        reason = "there is no such file" if not path.exists() else f"not a readable .npz ({error})"
        raise UserError(f"{path}: {reason}") from None


# --- JSON -------------------------------------------------------------------------------------------------------------


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    check_readable(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from None


def digest_of(value: Any) -> str:
    """A short digest of anything JSON can hold."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()
