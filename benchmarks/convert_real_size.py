"""Time and memory of converting the real sizes, there and back, against orbax writing the same arrays alone.

  python -m benchmarks.convert_real_size --folder /tmp/real_size

Makes random checkpoints of all released models' sizes in the folder (14 GB at the end, removed unless --keep), runs
each measurement in a process of its own and prints the ratios. The targets: peak memory at most 2.5 times the largest
file, time at most 3 times orbax alone. The exit code is 1 if one of them is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from convert.tables import MODELS
from tests.support.released import PARAMETERS, torch_model

GB = 1e9
ALL, LARGEST = (4 * choose(PARAMETERS.values()) for choose in (sum, max))  # bytes
MEMORY_TARGET, TIME_TARGET = 2.5, 3.0


def make_files(folder: Path) -> None:
    """All files, random, with the released models' names and shapes."""
    generator = torch.Generator().manual_seed(0)
    for part, parameters in PARAMETERS.items():
        shapes = {key: value.shape for key, value in torch_model(part).state_dict().items()}
        state = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
        count = sum(value.numel() for value in state.values())
        assert count == parameters, f"{part}: {count} parameters"
        torch.save(state, folder / MODELS[part].file)


def files(folder: Path) -> dict[str, Path]:
    return {part: folder / MODELS[part].file for part in PARAMETERS}


def measure(job: str, folder: Path) -> dict[str, Any]:
    """Runs one job of this script in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.convert_real_size", "--folder", str(folder), "--job", job]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


@contextlib.contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started


def orbax_alone(folder: Path, seconds: dict[str, float]) -> None:
    """The same arrays, saved with orbax as it comes, and as we call it (uncompressed)."""
    import jax
    import orbax.checkpoint as ocp
    from flax.traverse_util import unflatten_dict

    from convert.source import open_source
    from tortoise_jax.checkpoints.trees import save_tree

    rng = np.random.default_rng(0)
    shapes = {part: open_source(path, part, checksums=False).plan.shapes for part, path in files(folder).items()}
    draw = lambda shape: rng.standard_normal(shape, dtype=np.float32)
    trees = {
        part: unflatten_dict({path: draw(shape) for path, shape in paths.items()}, sep="/")
        for part, paths in shapes.items()
    }
    jax.devices()
    for name, save in (("orbax as we call it", save_tree), ("orbax by default", None)):
        with timed(seconds, name):
            for part, tree in trees.items():
                target = folder / f"orbax-{part}"
                if save:
                    save(target, tree)
                else:
                    with ocp.StandardCheckpointer() as checkpointer:
                        checkpointer.save(target.absolute(), tree)
        for part in trees:
            shutil.rmtree(folder / f"orbax-{part}")


def to_flax(folder: Path, seconds: dict[str, float]) -> None:
    """The command's own function, its steps timed."""
    from convert import torch_to_flax

    steps = {
        "opening and checksums": "open_with_bar",
        "converting and looking for NaN": "convert_part",
        "writing": "save_tree",
    }
    for label, name in steps.items():
        setattr(torch_to_flax, name, with_time(getattr(torch_to_flax, name), seconds, label))
    with timed(seconds, "all"):
        torch_to_flax.convert(files(folder), folder / "flax")


def to_torch(folder: Path, seconds: dict[str, float]) -> None:
    from convert import flax_to_torch

    steps = {"reading": "load_pretrained", "writing and reading back": "write_state_dict"}
    for label, name in steps.items():
        setattr(flax_to_torch, name, with_time(getattr(flax_to_torch, name), seconds, label))
    with timed(seconds, "all"):
        for part in PARAMETERS:
            flax_to_torch.export(folder / "flax", folder / f"{part}-back.pth", part=part)


def with_time(function: Callable[..., Any], seconds: dict[str, float], label: str) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with timed(seconds, label):
            return function(*args, **kwargs)

    return run


JOBS = {"orbax": orbax_alone, "to_flax": to_flax, "to_torch": to_torch}


def ratios(results: dict[str, dict[str, Any]]) -> tuple[float, float]:
    """Peak memory over the largest file; time over orbax saving the same arrays as we call it, the faster way."""
    memory = results["to_flax"]["peak_gb"] * GB / LARGEST
    return memory, results["to_flax"]["seconds"]["all"] / results["orbax"]["seconds"]["orbax as we call it"]


def report(results: dict[str, dict[str, Any]]) -> list[str]:
    """The lines a person reads: the two ratios, then where the time goes."""
    alone, there, back = results["orbax"]["seconds"], results["to_flax"], results["to_torch"]
    seconds = there["seconds"]
    memory, time_ratio = ratios(results)
    steps = {name: value for name, value in seconds.items() if name != "all"}
    return [
        f"float32 parameters of all models: {ALL / GB:.2f} GB, of the largest {LARGEST / GB:.2f} GB",
        f"torch to Flax: peak {there['peak_gb']:.2f} GB = {memory:.2f} x the largest file (target {MEMORY_TARGET})",
        f"torch to Flax: {seconds['all']:.1f} s = {time_ratio:.2f} x orbax alone (target {TIME_TARGET})",
        f"  orbax alone: {alone['orbax as we call it']:.1f} s uncompressed, as we call it; "
        f"{alone['orbax by default']:.1f} s by default",
        *(f"  {name}: {value:.1f} s" for name, value in steps.items()),
        f"  rest: {seconds['all'] - sum(steps.values()):.1f} s",
        f"Flax to torch: {back['seconds']['all']:.1f} s, peak {back['peak_gb']:.2f} GB",
        *(f"  {name}: {value:.1f} s" for name, value in back["seconds"].items() if name != "all"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="a new folder on a disk with 15 GB free")
    parser.add_argument("--keep", action="store_true", help="keep the files")
    parser.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        seconds: dict[str, float] = {}
        JOBS[args.job](args.folder, seconds)
        peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB
        print(json.dumps({"seconds": seconds, "peak_gb": peak_gb}))
        return
    args.folder.mkdir(parents=True)
    try:
        make_files(args.folder)
        results = {job: measure(job, args.folder) for job in JOBS}
        print("\n".join(report(results)))
        memory, time_ratio = ratios(results)
        if memory > MEMORY_TARGET or time_ratio > TIME_TARGET:
            sys.exit("a target is missed")
    finally:
        if not args.keep:
            shutil.rmtree(args.folder)


if __name__ == "__main__":
    main()
