"""Reading and writing torch checkpoint files: tensors only, nothing in a file is ever executed."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tortoise_jax.errors import UserError


def read_state_dict(path: Path) -> dict[str, np.ndarray]:
    """A .pth file's tensors as numpy arrays, memory-mapped where the format allows. Raises UserError naming the file."""
    loaded = _load(path)
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds a {type(loaded).__name__}, expected a dictionary of tensors (a state dict)")
    state: dict[str, np.ndarray] = {}
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise UserError(f"{path}: entry {key!r} is a {type(value).__name__}, expected a tensor")
        state[key] = as_numpy(value, f"{path}: {key}")
    if not state:
        raise UserError(f"{path} holds no tensors")
    return state


def as_numpy(tensor: torch.Tensor, where: str) -> np.ndarray:
    """A view for float32 and integers; half precisions become float32, exactly."""
    if tensor.dtype in (torch.float16, torch.bfloat16):
        tensor = tensor.float()
    elif tensor.dtype not in (torch.float32, torch.bool, torch.uint8, torch.int64, torch.int32):
        raise UserError(f"{where} is {tensor.dtype}, expected float32, float16 or bfloat16")
    return tensor.detach().numpy()


def _load(path: Path) -> Any:
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if path.is_dir():
        raise UserError(f"{path} is a directory, expected a torch checkpoint file (.pth)")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty (0 bytes); download it again")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} is not a torch checkpoint of tensors alone: it is damaged, another kind of file, or holds code, "
            "which is never run"
        ) from None
    except (RuntimeError, ValueError, OSError, EOFError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UserError(f"{path} cannot be read as a torch checkpoint: {reason}") from None


def write_state_dict(path: Path, state: dict[str, np.ndarray]) -> None:
    """Writes a flat float32 .pth: beside, synced, renamed; then reads it back and compares every tensor bit for bit."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save({key: torch.from_numpy(value) for key, value in state.items()}, file)
            file.flush()
            os.fsync(file.fileno())
        written = read_state_dict(partial)
        if list(written) != list(state):
            raise UserError(f"{path}: the keys read back are not those written; the disk may be failing")
        for key, value in state.items():
            if written[key].shape != value.shape or not np.array_equal(_bits(written[key]), _bits(value)):
                raise UserError(f"{path}: {key} read back differs from what was written; the disk may be failing")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)


def _bits(array: np.ndarray) -> np.ndarray:
    """Bytes, so that NaNs compare equal to themselves and -0.0 not to 0.0."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
