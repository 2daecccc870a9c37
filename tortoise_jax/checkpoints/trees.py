"""Trees of arrays on disk, written by orbax; what tells one tree from another, and a whole one from a damaged one."""

from __future__ import annotations

import hashlib
import logging
import os
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import flatten_dict

from tortoise_jax import parallel
from tortoise_jax.errors import UserError, first_line

Tree = Any
ALIGNMENT = 64  # bytes, at multiples of which a device on CPU reads an array where it is, and does not copy it

# orbax narrates every save through absl's logger, and failures by tracebacks; what users should know is said by us.
logging.getLogger("absl").setLevel(logging.CRITICAL)
logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # of several reads that fail, all but the one that is reported


def digest(tree: Tree) -> str:
    """sha256 over paths, shapes and float32 bytes of a parameter tree."""
    total = hashlib.sha256()
    for path, value in sorted(flatten_dict(tree, sep="/").items()):
        array = np.ascontiguousarray(value, np.float32)
        total.update(f"{path} {array.shape}\n".encode())
        total.update(array.reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def parameter_count(tree: Tree) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def tree_handler() -> ocp.PyTreeCheckpointHandler:
    """Writes trees of numpy arrays, which nobody may change meanwhile: they are neither copied first nor compressed.

    Float32 weights lose a tenth by compression, which takes five times as long and as much memory again.
    """
    handlers = ocp.type_handlers
    types = handlers.create_type_handler_registry(
        (np.ndarray, handlers.NumpyHandler(deepcopy_host_arrays=False)), (np.number, handlers.ScalarHandler())
    )
    return ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=types)


def save_tree(path: Path, tree: Tree) -> None:
    """Raises UserError where it cannot be written."""
    try:
        with ocp.Checkpointer(tree_handler()) as checkpointer:
            checkpointer.save(path.absolute(), args=ocp.args.PyTreeSave(tree))
    except Exception as error:  # orbax and tensorstore raise many kinds where a disk is full or not writable
        raise UserError(f"{path}: cannot be written: {first_line(error)}") from None


def on_this_host() -> ocp.options.MultiprocessingOptions:
    """For what one host of a run reads for itself: by default orbax waits for all hosts at every call."""
    host = parallel.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=host, active_processes={host}, barrier_sync_key_prefix=f"host{host}"
    )


def restore_tree(path: Path | epath.Path, shapes: Tree) -> Tree:
    """Numpy arrays of exactly these shapes, read by this host alone; anything else on disk is a UserError.

    They are aligned, so that devices on CPU need no copy of them.
    """
    if not path.is_dir():
        raise UserError(f"{path} is missing: the checkpoint is incomplete")
    target = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    try:
        with ocp.StandardCheckpointer(multiprocessing_options=on_this_host()) as checkpointer:
            return align(checkpointer.restore(epath.Path(path).absolute(), target))
    except Exception as error:  # orbax and tensorstore raise many kinds for damaged files
        for part in [Path(path), *Path(path).rglob("*")]:
            if part.exists() and not os.access(part, os.R_OK):  # a bucket has no such path
                raise UserError(f"{part} cannot be read: Permission denied") from None
        raise UserError(f"{path} is damaged: {first_line(error)}") from None


def align(tree: Tree) -> Tree:
    """Its arrays at multiples of ALIGNMENT, moved one by one: few are there twice if the caller keeps no `tree`."""
    leaves, structure = jax.tree.flatten(tree)
    del tree
    for i, leaf in enumerate(leaves):
        leaves[i] = aligned(leaf)
    return jax.tree.unflatten(structure, leaves)


def aligned(array: np.ndarray) -> np.ndarray:
    if array.ctypes.data % ALIGNMENT == 0:
        return array
    room = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    moved = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    moved[...] = array
    return moved


def checksum(tree: Tree, total: int = 0) -> int:
    """crc32 over the bytes of all arrays in order, which the file format does not check. total: of arrays before."""
    for leaf in jax.tree.leaves(tree):
        total = zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data, total)
    return total
