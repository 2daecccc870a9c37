"""Reading and writing checkpoint files: tensors only, nothing in a file is ever executed.

Formats are told apart by their first bytes, never by their names: torch's zip (mapped into memory, its checksums
verified), torch's older pickle stream, safetensors.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch

from convert.mapping import same_bits
from tortoise_jax.checkpoints.pretrained import METADATA
from tortoise_jax.errors import UserError, first_line
from tortoise_jax.files import check_readable, remove_partials, replaced_whole

ZIP, LEGACY, SAFETENSORS = "torch zip", "torch pickle (before 1.6)", "safetensors"
CHUNK = 1 << 23
TORCH_DTYPES = {
    torch.float32: np.dtype(np.float32),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
    torch.bool: np.dtype(np.bool_),
    torch.uint8: np.dtype(np.uint8),
    torch.int32: np.dtype(np.int32),
    torch.int64: np.dtype(np.int64),
}
OUT_DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": TORCH_DTYPES[torch.bfloat16],
}
# Shared storages are legitimate (an attached inference model doubles every tensor); far more bytes are invented.
CLAIM_LIMIT = 4

Progress = Callable[[int], None]  # called with the number of bytes just done


def silent(count: int) -> None:
    """Shows no progress."""


@dataclasses.dataclass(frozen=True)
class Loaded:
    """The content of a file as it was saved: mostly a dictionary of tensors, wrapped or not."""

    format: str
    content: Any


# --- reading ----------------------------------------------------------------------------------------------------------


def load(path: Path, checksums: bool = True, progress: Progress = silent) -> Loaded:
    """Reads a file's tensors, mapped into memory where the format allows it. Raises UserError for any other file.

    checksums: compare a zip's records with their CRC-32, which torch.load does not. progress: called meanwhile.
    """
    kind = format_of(path)
    try:
        if kind == ZIP:
            check_zip(path, checksums, progress)
        if kind == SAFETENSORS:
            return Loaded(kind, _load_safetensors(path))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Loaded(kind, torch.load(path, map_location="cpu", weights_only=True, mmap=kind == ZIP))
    except UserError:
        raise
    except Exception as error:  # damaged files make the parsers raise errors of any type
        raise UserError(_why_unreadable(path, error)) from None


def format_of(path: Path) -> str:
    """The format that a file's first bytes show. Raises UserError for what cannot be a checkpoint."""
    check_readable(path)
    try:
        if path.is_dir():
            ours = f", converted already (it holds {METADATA})" if (path / METADATA).exists() else ""
            raise UserError(f"{path} is a directory{ours}, expected a checkpoint file (.pth or .safetensors)")
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(64)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    if size == 0:
        raise UserError(f"{path} is empty (0 bytes); download it again")
    if start.startswith(b"PK\x03\x04"):
        return ZIP
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < size:
        return SAFETENSORS
    if start[:1] == b"\x80":
        return LEGACY
    looks = "a web page" if start.lstrip()[:1] == b"<" else "text" if _is_text(start) else "of an unknown format"
    raise UserError(f"{path} is not a checkpoint: it is {looks}; expected a .pth of torch or a .safetensors file")


def _is_text(start: bytes) -> bool:
    return all(byte >= 32 or byte in b"\t\r\n\f" for byte in start)


def check_zip(path: Path, checksums: bool, progress: Progress = silent) -> None:
    """Raises UserError unless torch could have written the archive and its records are undamaged."""
    try:
        opened = zipfile.ZipFile(path)
    except zipfile.BadZipFile:
        raise UserError(
            f"{path} is cut off: it begins like a torch checkpoint, but its end is missing; get it again"
        ) from None
    with opened as archive:
        records = archive.infolist()
        if not any(record.filename.endswith("/data.pkl") for record in records):
            raise UserError(f"{path} is a zip archive, but not of torch (no data.pkl); must it be unpacked first?")
        # torch stores tensors as they are; a compressed record could unpack to any size.
        packed = [record.filename for record in records if record.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise UserError(f"{path} is not of torch: its record {packed[0]} is compressed; save it again with torch")
        if sum(record.file_size for record in records) > path.stat().st_size:
            raise UserError(f"{path} is damaged: its records claim more bytes than the file has; get it again")
        for record in records if checksums else ():
            try:
                with archive.open(record) as stream:
                    while chunk := stream.read(CHUNK):
                        progress(len(chunk))
            except zipfile.BadZipFile:
                raise UserError(
                    f"{path} is damaged: its record {record.filename} does not match its checksum; get the file again "
                    "(--ignore_checksums if it was saved without them)"
                ) from None


def _load_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        from safetensors import safe_open
    except ImportError:
        raise UserError(f"{path} is a safetensors file: pip install safetensors") from None
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dictionary)


def _why_unreadable(path: Path, error: Exception) -> str:
    reason = str(error)
    named = re.search(r"GLOBAL ([\w.]+)", reason)
    if named:
        state = ' A ".state" file holds an optimiser, no weights.' if path.suffix == ".state" else ""
        return (
            f"{path} holds Python objects beside tensors ({named.group(1)}), which would have to be run to be read; "
            f"this is never done.{state} A file saved by torch.save(model.state_dict(), …) holds tensors alone"
        )
    if "Weights only load failed" in reason:
        return f"{path} is damaged or not a checkpoint of tensors; get it again"
    return f"{path} is damaged or not a checkpoint: {first_line(error)}"


def tensors(content: Any, path: Path) -> dict[str, np.ndarray]:
    """The tensors of a flat dictionary as arrays, without a copy. Raises UserError for an entry that is no tensor."""
    state: dict[str, np.ndarray] = {}
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise UserError(f"{path}: entry {str(key)[:100]!r} is a {type(value).__name__}, expected a tensor")
        state[key] = as_numpy(value, f"{path}: {key[:200]}")
    if not state:
        raise UserError(f"{path} holds no tensors")
    claimed, size = sum(array.nbytes for array in state.values()), path.stat().st_size
    if claimed > CLAIM_LIMIT * size:
        raise UserError(f"{path} is damaged: its tensors claim {claimed:,} bytes, the file has {size:,}")
    return state


def as_numpy(tensor: torch.Tensor, where: str) -> np.ndarray:
    """The tensor's own memory as an array of the same dtype (bfloat16 of ml_dtypes). Raises UserError for others."""
    if tensor.dtype not in TORCH_DTYPES or tensor.layout != torch.strided or tensor.device.type != "cpu":
        kind = str(tensor.dtype if tensor.dtype not in TORCH_DTYPES else tensor.layout).removeprefix("torch.")
        raise UserError(f"{where} is {kind} on {tensor.device.type}, expected dense float32, float16 or bfloat16")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        held = tensor.untyped_storage().nbytes()
        raise UserError(f"{where} claims the shape {tuple(tensor.shape)}, but holds {held:,} bytes: damaged")
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def read_state_dict(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file that holds one flat dictionary, wrapped or not, by its keys. Raises UserError."""
    content = load(path).content
    while isinstance(content, dict) and len(content) == 1 and isinstance(next(iter(content.values())), dict):
        content = next(iter(content.values()))
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected a dictionary of tensors (a state dict)")
    return tensors(content, path)


# --- writing ----------------------------------------------------------------------------------------------------------


def cast(state: dict[str, np.ndarray], dtype: str, where: str) -> dict[str, np.ndarray]:
    """Floating-point arrays in `dtype` (a key of OUT_DTYPES), others unchanged. Raises UserError for an overflow."""
    target = OUT_DTYPES[dtype]
    done: dict[str, np.ndarray] = {}
    for key, value in state.items():
        floating = value.dtype in OUT_DTYPES.values()
        with np.errstate(over="ignore"):
            done[key] = value.astype(target, copy=False) if floating else value
        if target.itemsize < value.itemsize and floating and np.isinf(done[key]).sum() > np.isinf(value).sum():
            raise UserError(f"{where}: {key} has values too large for {dtype}; write float32 or bfloat16")
    return done


def write_state_dict(
    path: Path, state: dict[str, np.ndarray], wrapper: str = "", before: Callable[[], None] = lambda: None
) -> None:
    """Writes a flat .pth. It appears whole or not at all, after it was read back and compared bit for bit.

    wrapper: a key under which the whole is put. before: called just before it appears. Raises UserError.
    """
    try:
        remove_partials(path.parent, path.name)
        with replaced_whole(path) as partial:
            with partial.open("wb") as file:
                content = {key: as_torch(value) for key, value in state.items()}
                torch.save({wrapper: content} if wrapper else content, file)
            check_written(partial, path, state)
            before()
    except (OSError, RuntimeError) as error:  # torch's writer reports a full disk as a RuntimeError
        reason = error.strerror if isinstance(error, OSError) else first_line(error)
        raise UserError(f"{path}: cannot be written: {reason}") from None


def check_written(partial: Path, path: Path, state: dict[str, np.ndarray]) -> None:
    written = read_state_dict(partial)
    if list(written) != list(state):
        raise UserError(f"{path}: the keys read back are not those written; the disk may be failing")
    for key, value in state.items():
        if not same_bits(written[key], value):
            raise UserError(f"{path}: {key} read back differs from what was written; the disk may be failing")


def as_torch(array: np.ndarray) -> torch.Tensor:
    """The inverse of `as_numpy`."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about read-only arrays: nothing here writes to them
        return torch.from_numpy(array)
