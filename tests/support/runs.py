"""A tiny checkpoint, data set and command line to test whole runs with, quick enough for many of them."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from absl.testing import flagsaver

import train as train_command
from tests.support import small
from tests.support.host_processes import free_port
from tortoise_jax.audio import default_mel_norms
from tortoise_jax.checkpoints.parts import Part, abstract_tree
from tortoise_jax.checkpoints.pretrained import Pretrained, save_pretrained
from tortoise_jax.checkpoints.trees import save_tree
from tortoise_jax.data.preparation import Options, prepare
from tortoise_jax.errors import exit_with_one_line
from tortoise_jax.models.dvae import DVAEConfig
from tortoise_jax.text.tokenizer import Tokenizer
from tortoise_jax.training.config import FLAGS

ROOT = Path(__file__).parents[2]
VOICE = ROOT / "examples/voice"
AR = dataclasses.replace(
    small.CONFIG, text_tokens=256, mel_tokens=18, text_positions=60, mel_positions=70, mel_channels=80
)
DVAE = DVAEConfig(codebook_dim=8, codes=16, hidden=8, layers=2, res_blocks=1)
SECONDS = 280  # for a run to end, on a busy machine
CLIPS = 10  # few of which are short, so that they are padded like the long ones: a step has one shape to compile
TWO_LENGTHS = 12  # so many clips have two
NOT_KEPT = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9"}  # no half programs, where a file may not grow
# DLAS's recipe at a size and rate at which a few steps matter; drafts only where a test asks for them.
FIELDS = {
    "steps": 6,
    "batch_size": 4,
    "gradient_accumulation_steps": 1,
    "eval_every": 3,
    "log_every": 1,
    "sample_every": 0,
    "conditioning_clips": 1,
    "remat": "none",
    "export": "",
    "optimizer.learning_rate": 1e-3,
    "optimizer.schedule": "constant",  # else runs of other lengths have other rates, and each compiles its own step
}

DVAE_FIELDS = {
    "steps": 6,
    "batch_size": 4,
    "crop_codes": 8,
    "eval_every": 3,
    "log_every": 1,
    "sample_every": 0,
    "export": "",
    "optimizer.learning_rate": 1e-3,
}


def random_params(shapes: Any, seed: int) -> Any:
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: 0.1 * random.standard_normal(leaf.shape, np.float32), shapes)


def write_checkpoint(target: Path, seed: int = 0) -> Path:
    dvae = random_params(abstract_tree(DVAE), seed + 1)
    ar = random_params(abstract_tree(AR), seed)
    parts = {"ar": Part.of_tree(AR, ar), "dvae": Part.of_tree(DVAE, dvae)}
    save_pretrained(Pretrained(parts, Tokenizer.default(), default_mel_norms(), {"made": "by tests"}), target)
    return target


def write_recordings(folder: Path, clips: int = CLIPS) -> Path:
    """The first clips of the bundled voice."""
    (folder / "wavs").mkdir(parents=True)
    lines = (VOICE / "metadata.csv").read_text().splitlines()[:clips]
    for line in lines:
        name = next((VOICE / "wavs").glob(line.split("|")[0] + ".*"))
        (folder / "wavs" / name.name).symlink_to(name)
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


def write_project(folder: Path, clips: int = CLIPS) -> Path:
    """`checkpoint/`, `recordings/` and `data/` in a folder, which is made if it is missing."""
    folder.mkdir(exist_ok=True)
    checkpoint = write_checkpoint(folder / "checkpoint")
    prepare(write_recordings(folder / "recordings", clips), checkpoint, folder / "data", Options(workers=1))
    return folder


def made_once(folder: Path, make: Callable[[Path], object]) -> Path:
    """A folder that the workers of the suite have in common: the first to need it makes it, the others wait."""
    made = folder.with_name(f"{folder.name}.made")
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
            make(folder)
            made.touch()
    return folder


def succeed(done: subprocess.CompletedProcess[str]) -> str:
    """What a command printed that came to its end."""
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def command(project: Path, run: Path, *more: str, kind: str = "ar", **fields: Any) -> list[str]:
    """kind: of the run, the name of its configuration."""
    chosen = {"checkpoint": project / "checkpoint", "data": project / "data"} | (
        FIELDS if kind == "ar" else DVAE_FIELDS
    )
    chosen |= {name.replace("__", "."): value for name, value in fields.items()}
    flags = [f"--config.{name}={value}" for name, value in chosen.items() if value is not None]
    return [sys.executable, "train.py", "--config", f"configs/{kind}.py", *flags, f"--workdir={run}", *more]


def environment(devices: int = 1) -> dict[str, str]:
    """So many simulated CPU devices; programs compiled quickly, and all of them kept, as users' are."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        "JAX_NUM_CPU_DEVICES": str(devices),
    }


def train(project: Path, run: Path, *more: str, devices: int = 1, **fields: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(project, run, *more, **fields),
        cwd=ROOT,
        env=environment(devices),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


@contextlib.contextmanager
def fresh_flags() -> Iterator[None]:
    """absl's flags as at the start of a process, where it takes each override of a configuration once."""
    with flagsaver.flagsaver():
        forget_overrides()
        yield
    forget_overrides()


def forget_overrides() -> None:
    for name in [name for name in FLAGS if name.startswith("config.")]:
        delattr(FLAGS, name)
    FLAGS.unparse_flags()


@contextlib.contextmanager
def programs_kept(seconds: float = 0.2) -> Iterator[None]:
    """Whatever takes so long to compile meanwhile is kept for other tests and processes, as commands keep it."""
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
    try:
        yield
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


def train_here(project: Path, run: Path, *more: str, **fields: Any) -> subprocess.CompletedProcess[str]:
    """The same command in this process, on its eight devices: quick where a run is refused before its first step."""
    words = command(project, run, *more, **fields)[1:]
    code, out, err = 0, io.StringIO(), io.StringIO()
    with (
        fresh_flags(),
        mock.patch.object(sys, "argv", words),
        mock.patch.object(sys, "unraisablehook"),
        mock.patch.dict(os.environ),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        programs_kept(),
    ):
        try:
            exit_with_one_line(train_command.main)
        except SystemExit as stop:
            code = int(stop.code or 0)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def start(project: Path, run: Path, *more: str, **fields: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(project, run, *more, **fields),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_hosts(
    project: Path,
    run: Path,
    hosts: int,
    devices: int,
    of_second: dict[str, Any] | None = None,
    folders: Sequence[Path] = (),
    largest_file: int | None = None,
    **fields: Any,
) -> list[subprocess.Popen[str]]:
    """The command as a user types it on every host of a run, here as processes of one machine.

    of_second: fields that the second host is given in the place of those of all. folders: where each host starts the
    command, as storage that they do not share; relative paths then lead elsewhere on each. largest_file: bytes to which
    a file of host 0 may grow, as where its disk is full.
    """
    coordinator = f"127.0.0.1:{free_port()}"
    limits = {"TORTOISE_JAX_JOIN_SECONDS": "120", "TORTOISE_JAX_LOST_SECONDS": "15"}
    started = []
    for host in range(hosts):
        where = ["--coordinator", coordinator, "--num_processes", str(hosts), "--process_id", str(host)]
        own = of_second if of_second and host == 1 else {}
        full = largest_file is not None and host == 0
        limited = ["bash", "-c", f'ulimit -f {largest_file // 1024}; exec "$@"', "-"] if full else []
        reading = NOT_KEPT if full else {}
        python, script, *flags = command(project, run, *where, **fields | own)
        started.append(
            subprocess.Popen(
                [*limited, python, str(ROOT / script if folders else script), *flags],
                cwd=folders[host] if folders else ROOT,
                env=environment(devices) | limits | reading,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return started


def assert_one_line(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Exit code 2 and one line on stderr, with all of these in it."""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert len(errors) == 1
    assert not [part for part in parts if part not in errors[0]], errors[0]


def own_lines(stderr: str) -> list[str]:
    """What the program itself wrote: XLA's plugin for NVIDIA says, while it loads, that the machine has no card."""
    native = re.compile(r"WARNING: All log messages before|[IWEF]\d{4} ")
    return [line for line in stderr.splitlines() if not native.match(line)]


def outputs(hosts: list[subprocess.Popen[str]], limit: float = 240) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of every host; all are killed where one does not end within `limit` seconds."""
    until = time.monotonic() + limit
    try:
        ended = [host.communicate(timeout=max(1.0, until - time.monotonic())) for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    return [(host.returncode, *printed) for host, printed in zip(hosts, ended, strict=True)]


def wait_for_steps(run: Path, steps: int, limit: float = 300) -> None:
    until = time.monotonic() + limit
    while sum(entry["kind"] == "train" for entry in history(run)) < steps:
        assert time.monotonic() < until, "the run never came so far"
        time.sleep(0.02)


def history(run: Path) -> list[dict[str, Any]]:
    file = run / "history.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []


def flip_one_bit(folder: Path, params: Any) -> None:
    """Writes `params` there with one bit another one: whole, as far as the file format can tell."""
    changed = jax.tree.map(np.array, params)
    jax.tree.leaves(changed)[0].reshape(-1).view(np.uint32)[0] ^= 1
    shutil.rmtree(folder)
    save_tree(folder, changed)
