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

SUFFIX = ".arrow"


def file_of(recording: Path) -> Path:
    """The file on disk that holds a recording: an Arrow file, or that of the recording itself."""
    return next((path for path in recording.parents if path.suffix == SUFFIX and path.is_file()), recording)


def content(recording: Path) -> bytes | None:
    """The bytes of a recording inside an Arrow file, None for any other. Raises UserError."""
    file = file_of(recording)
    row = "" if file == recording else recording.relative_to(file).parts[0]
    if not row.isdecimal() or not 0 < int(row) <= len(_table(file)):
        return None
    return _table(file)[audio_column(file)][int(row) - 1].as_py()["bytes"]


def recordings(file: Path) -> list[Path | None]:
    """The path of each row's recording; None for a row without one.

    A row may hold a path in the place of a recording: of a file that lies there, beside the Arrow file if relative.
    """
    sounds = _table(file)[audio_column(file)]
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


def audio_column(file: Path) -> str:
    """The column that holds recordings by the library's own description. Raises UserError where it is not one."""
    schema = _table(file).schema
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        found = [name for name, about in features.items() if about.get("_type") == "Audio" and _holds(schema, name)]
    except (KeyError, ValueError, TypeError, AttributeError):  # another program's, or damaged
        found = []
    if len(found) != 1:
        raise UserError(f"{file}: {_listed(found)} of Audio, expected one; its columns are {', '.join(columns(file))}")
    return found[0]


def _holds(schema: Any, name: str) -> bool:
    """Whether a column is there and is laid out as the library lays out sounds."""
    return name in schema.names and str(schema.field(name).type) == "struct<bytes: binary, path: string>"


def _listed(names: Sequence[str]) -> str:
    return f"{len(names)} columns ({', '.join(names)})" if names else "no column"


def _table(file: Path) -> Any:
    """A file's rows as a table of pyarrow, which reads from disk what is asked for."""
    try:
        stat = file.stat()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    return _opened(file, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=16)
def _opened(file: Path, size: int, changed: int) -> Any:
    """size, changed: of the file, so that another one of its name is opened anew."""
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
