"""Recordings inside Arrow files, as Hugging Face's datasets library saves them: read by pyarrow, where it is installed.

Such a recording has a path of its own, as if the file were a folder: data.arrow/12/a.wav is what row 12 holds, counted
from 1. So what works on recordings needs to know nothing of tables.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tortoise_jax.errors import UserError, first_line
from tortoise_jax.files import check_readable

SUFFIX = ".arrow"


def file_of(recording: Path) -> Path:
    """The file on disk that holds a recording: an Arrow file, or that of the recording itself."""
    return next((path for path in recording.parents if path.suffix == SUFFIX and path.is_file()), recording)


def content(recording: Path) -> bytes | None:
    """The bytes of a recording inside an Arrow file, None for any other. Raises UserError."""
    file = file_of(recording)
    row = "" if file == recording else recording.relative_to(file).parts[0]
    if not row.isdecimal():
        return None
    sounds = _sounds(file)
    return sounds[int(row) - 1].as_py()["bytes"] if 0 < int(row) <= len(sounds) else None


def recordings(file: Path) -> list[Path | None]:
    """The path of each row's recording; None for a row without one.

    A row may hold a path in the place of a recording: of a file that lies there, beside the Arrow file if relative.
    """
    sounds = _sounds(file)
    from pyarrow import compute

    names = compute.struct_field(sounds, "path").to_pylist()
    held = compute.is_valid(compute.struct_field(sounds, "bytes")).to_pylist()
    inside = lambda row, name: file / str(row) / (Path(name or "").name or "recording")
    return [
        inside(row, name) if has_bytes else file.parent / name if name else None
        for row, (name, has_bytes) in enumerate(zip(names, held, strict=True), start=1)
    ]


def columns(file: Path) -> list[str]:
    """The names of a file's columns. Raises UserError where it cannot be read."""
    return list(_table(file).column_names)


def texts(file: Path, column: str) -> list[str]:
    """A column's values as text, "" for none."""
    return ["" if value is None else str(value) for value in _table(file)[column].to_pylist()]


def _audio_column(file: Path, schema: Any) -> str:
    """The column that holds recordings by the library's own description. Raises UserError where it is not one."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        found = [name for name, about in features.items() if about.get("_type") == "Audio" and _holds(schema, name)]
    except (KeyError, ValueError, TypeError, AttributeError):  # another program's, or damaged
        found = []
    if len(found) != 1:
        raise UserError(f"{file}: {_listed(found)} of Audio, expected one; its columns are {', '.join(schema.names)}")
    return found[0]


def _holds(schema: Any, name: str) -> bool:
    """Whether a column is there and is laid out as the library lays out sounds."""
    return name in schema.names and str(schema.field(name).type) == "struct<bytes: binary, path: string>"


def _listed(names: Sequence[str]) -> str:
    return f"{len(names)} columns ({', '.join(names)})" if names else "no column"


def _table(file: Path) -> Any:
    """A file's rows as a table of pyarrow, which reads from disk what is asked for."""
    return _opened(file, *_version(file))


def _sounds(file: Path) -> Any:
    """The column of recordings. Raises UserError where there is not one."""
    return _opened_sounds(file, *_version(file))


def _version(file: Path) -> tuple[int, int]:
    """Size and time of change, by which another file of its name is opened anew. Raises UserError."""
    check_readable(file)
    try:
        stat = file.stat()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    return stat.st_size, stat.st_mtime_ns


@functools.lru_cache(maxsize=16)
def _opened_sounds(file: Path, size: int, changed: int) -> Any:
    table = _opened(file, size, changed)
    return table[_audio_column(file, table.schema)]


@functools.lru_cache(maxsize=16)
def _opened(file: Path, size: int, changed: int) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise UserError(
            f"{file}: what the datasets library saved is read by pyarrow: pip install 'tortoise_jax[datasets]'"
        ) from None
    try:
        table = pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))).read_all()
        table.validate(full=True)  # a damaged file would be read beyond its end
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{file}: not a whole Arrow file of the datasets library ({first_line(error)})") from None
    return table
