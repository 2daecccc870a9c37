"""Files and folders of somebody else: one line, or one rejected clip; nothing is left out without a word."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import runs
from tests.support.recordings import RECORDINGS

# Root may read everything, so it becomes somebody else; after a first run, for Python's own files may be root's alone.
# Each command line is a child of one process, which has imported what takes long.
PROGRAM = """
import contextlib, importlib, io, json, os, sys, tempfile
from tortoise_jax.errors import exit_with_one_line

def run(module, *arguments):
    sys.argv = [module, *arguments]
    try:
        exit_with_one_line(importlib.import_module(module).main)
    except SystemExit as end:
        return end.code or 0
    return 0

def as_somebody_else(words, *streams):
    for number, stream in enumerate(streams, 1):
        os.dup2(stream.fileno(), number)
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
    return run(*words)

with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    run("tortoise_jax.prepare", "--data", sys.argv[1], "--check", "--workers", "0")
    run("tortoise_jax.speak")
for line in sys.stdin:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        child = os.fork()
        if not child:
            code = as_somebody_else(json.loads(line), out, errors)
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0), errors.seek(0)
        print(json.dumps([code, out.read(), errors.read()]), flush=True)
"""
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def run(voices: Path) -> Iterator[Run]:
    """A command line of the package, by a user who is not root."""
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(voices)], stdin=pipe, stdout=pipe, text=True)
    assert process.stdin
    assert process.stdout
    stdin, stdout = process.stdin, process.stdout

    def command(*words: object) -> subprocess.CompletedProcess[str]:
        print(json.dumps([str(word) for word in words]), file=stdin, flush=True)
        return subprocess.CompletedProcess(words, *json.loads(stdout.readline()))

    with process:  # which closes its stdin, and waits
        yield command


@pytest.fixture(scope="module")
def voices() -> Iterator[Path]:
    """Two speakers' folders, which the other user may read."""
    with tempfile.TemporaryDirectory() as name:  # not tmp_path, which only its owner may enter
        for speaker, first in (("ann", 0), ("bob", 4)):
            folder = Path(name) / "voices" / speaker
            folder.mkdir(parents=True)
            for recording in RECORDINGS[first : first + 4]:
                (folder / recording.name).write_bytes(recording.read_bytes())
                (folder / f"{recording.stem}.txt").write_text(f"Some words of {recording.stem.replace('-', ' ')}")
        for path in [Path(name), *Path(name).rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)
        yield Path(name) / "voices"


@pytest.fixture
def check(run: Run, voices: Path) -> Run:
    return functools.partial(run, "tortoise_jax.prepare", "--data", voices, "--check", "--workers", 0)


@pytest.fixture
def closed(request: pytest.FixtureRequest, voices: Path) -> Iterator[Path]:
    path: Path = voices / request.param
    mode = path.stat().st_mode
    path.chmod(0)
    yield path
    path.chmod(mode)


@pytest.mark.parametrize("closed", ["bob", "."], indirect=True)
def test_a_folder_that_may_not_be_read_is_named(check: Run, closed: Path) -> None:
    """The clips of a speaker's folder vanished without a word."""
    done = check()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {closed}")
    assert done.stderr.endswith(": cannot be read (Permission denied)\n")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("closed", ["bob/voice-05.flac", "bob/voice-05.txt"], indirect=True)
def test_a_file_that_may_not_be_read_is_one_rejected_clip(check: Run, voices: Path, closed: Path) -> None:
    done = check()
    assert done.returncode == 0, done.stderr
    assert f"{voices}/bob/voice-05.txt:1: " in done.stdout
    assert "cannot be read (Permission denied)" in done.stdout
    assert "kept                                    7" in done.stdout


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(run: Run, voices: Path) -> None:
    checkpoint = runs.write_checkpoint(voices.parent / "checkpoint")
    for path in (checkpoint, *checkpoint.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    what = ("--checkpoint", checkpoint, "--text", "Hi", "--voice", voices / "ann", "--out", "/dev/shm/a.wav")
    for name in ("ar", "tortoise.json"):
        (checkpoint / name).chmod(0)
        done = run("tortoise_jax.speak", *what)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {checkpoint / name} cannot be read: "), done.stderr
        assert done.stderr.count("\n") == 1
        (checkpoint / name).chmod(0o755)


def test_a_place_that_may_not_be_written_is_named_before_the_work(run: Run, voices: Path) -> None:
    what = ("--checkpoint", "x", "--text", "Hi", "--voice", voices)
    done = run("tortoise_jax.speak", *what, "--out", voices / "bob" / "a.wav")
    assert done.returncode == 2
    assert done.stderr == f"error: --out {voices}/bob/a.wav: cannot be written: {voices}/bob: Permission denied\n"
