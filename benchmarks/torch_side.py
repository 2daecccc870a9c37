"""Where the torch side of a benchmark runs: on the NVIDIA card where there is one, else on all cores."""

from __future__ import annotations

import torch


def take_device(threads: int) -> torch.device:
    """Makes it the default of everything created from here on, and multiplies float32 there as XLA does, in TF32."""
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_default_device(device)
    torch.backends.cuda.matmul.allow_tf32 = True
    return device


def best_dtype() -> torch.dtype:
    """What `config.dtype = "auto"` comes to on the same machine."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0):
        return torch.bfloat16
    return torch.float32


def wait() -> None:
    """Until the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory() -> int | None:
    """Bytes that tensors took on the card at most; None without a card."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
