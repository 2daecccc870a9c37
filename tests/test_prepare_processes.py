"""Preparing survives being killed, is shared by hosts, and leaves no process behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.host_processes import LOST_SECONDS, free_port
from tests.support.kill_prepare import snapshot
from tests.support.parity import Twin
from tests.support.recordings import VOICE, checkpoint_at, write_speech
from tortoise_jax.errors import exit_with_one_line
from tortoise_jax.files import LOCK, locked
from tortoise_jax.prepare import main

ROOT = Path(__file__).parent.parent


def environment(tmp_path: Path) -> dict[str, str]:
    """One CPU device, programs compiled quickly and kept between processes."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return {**os.environ, **cache, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}


@pytest.fixture
def voice_folder(tmp_path: Path) -> Path:
    """Twelve good clips and three bad lines."""
    (tmp_path / "ann" / "wavs").mkdir(parents=True)
    for i in range(12):
        write_speech(tmp_path / "ann" / "wavs" / f"{i}.wav", i)
    lines = [f"{i}|Sentence {'abcdefghijkl'[i]} of a dozen.\n" for i in range(12)]
    (tmp_path / "ann" / "metadata.csv").write_text("".join([*lines, "x|missing\n", "0|a copy of it\n", "1\n"]))
    return tmp_path / "ann"


@pytest.mark.parametrize("kills", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_ends_as_if_undisturbed(voice_folder, tmp_path, dvae: Twin, voice: Twin, kills):
    checkpoint = checkpoint_at(tmp_path / "checkpoint", dvae, voice)
    command = [
        sys.executable,
        "-m",
        "tests.support.kill_prepare",
        voice_folder,
        checkpoint,
        tmp_path / "out",
        str(kills),
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stderr
    found = re.fullmatch(r"(\d+) killed, (\d+) of them with work done, (\d+) finished alike, \d+ files\n", done.stdout)
    assert found, done.stdout
    assert int(found[1]) == kills
    assert int(found[3]) >= 1


def test_two_hosts_share_the_work(voice_folder, tmp_path, dvae, voice):
    checkpoint = checkpoint_at(tmp_path / "checkpoint", dvae, voice)
    port = free_port()
    code = (
        "import sys; from pathlib import Path; from tortoise_jax import parallel\n"
        "from tortoise_jax.data import shards, preparation\n"
        "written = []; write = shards.write_group\n"
        "shards.write_group = lambda out, number, *rest: (written.append(number), write(out, number, *rest))[1]\n"
        "data, checkpoint, out, address, rank = sys.argv[1:]\n"
        "hosts = int(address != 'alone') + 1\n"
        "parallel.initialize(address, hosts, int(rank)) if hosts > 1 else None\n"
        "preparation.prepare(data, checkpoint, out, preparation.Options(workers=0, group=3, max_rejected=1.0))\n"
        "print('groups', written)"
    )

    def start(out: str, address: str, rank: int) -> subprocess.Popen[str]:
        arguments = [str(a) for a in (voice_folder, checkpoint, tmp_path / out, address, rank)]
        command = [sys.executable, "-c", code, *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=ROOT, env=environment(tmp_path), stdout=pipe, stderr=pipe, text=True)

    running = [start("alone", "alone", 0), *(start("shared", f"localhost:{port}", rank) for rank in (0, 1))]
    results = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], results
    groups = [re.findall(r"groups (\[.*\])", out)[0] for out, _ in results]
    assert groups == ["[0, 1, 2, 3, 4]", "[0, 2, 4]", "[1, 3]"]
    assert "kept" in results[1][0]
    assert "kept" not in results[2][0], "one host reports"
    assert snapshot(tmp_path / "alone") == snapshot(tmp_path / "shared")


def test_a_folder_in_use_is_refused_on_every_host_and_a_killed_one_is_not_in_use(voice_folder, tmp_path, dvae, voice):
    """The owner is a preparation on another host, as far as the two that are refused can tell."""
    checkpoint = checkpoint_at(tmp_path / "checkpoint", dvae, voice)
    command = [sys.executable, "-m", "tortoise_jax.prepare", "--data", voice_folder, "--checkpoint", checkpoint]
    command += ["--out", tmp_path / "out", "--max_rejected", "1", "--workers", "0"]
    pipe = subprocess.PIPE
    start = lambda *more: subprocess.Popen(
        list(map(str, [*command, *more])), cwd=ROOT, env=environment(tmp_path), stdout=pipe, stderr=pipe, text=True
    )
    with locked(tmp_path / "out"):
        owner = tmp_path / "out" / LOCK
        owner.write_text("prepare.py, process 7 on elsewhere, since 2026-01-01 00:00:00\n")
        coordinator = ("--coordinator", f"localhost:{free_port()}", "--num_processes", 2, "--process_id")
        hosts = [start(*coordinator, host) for host in (0, 1)]
        for host in hosts:
            out, errors = host.communicate(timeout=120)
            assert host.returncode == 2, errors
            [line] = [line for line in errors.splitlines() if line.startswith("error: ")]
            assert "is being written by prepare.py, process 7 on elsewhere, since 2026" in line
            assert "written:" not in out
    killed = start()
    wait_for_lock(tmp_path / "out", killed)
    killed.kill()
    killed.communicate()
    assert (tmp_path / "out" / LOCK).exists()
    done = start()
    out, errors = done.communicate(timeout=120)
    assert done.returncode == 0, errors
    assert "written: " in out
    assert not (tmp_path / "out" / LOCK).exists()


def wait_for_lock(folder: Path, preparing: subprocess.Popen[str]) -> None:
    """Until the process has begun to write."""
    while not (folder / LOCK).exists():
        assert preparing.poll() is None, preparing.communicate()
        time.sleep(0.01)


def test_sigterm_on_one_host_ends_preparing_on_all(voice_folder, tmp_path, dvae, voice):
    """The command as typed on two hosts; the second, which has nothing to encode, is told to end."""
    checkpoint = checkpoint_at(tmp_path / "checkpoint", dvae, voice)
    command = [sys.executable, "-m", "tortoise_jax.prepare", "--data", voice_folder, "--checkpoint", checkpoint]
    command += ["--out", tmp_path / "out", "--max_rejected", "1", "--workers", "0", "--num_processes", "2"]
    command += ["--coordinator", f"localhost:{free_port()}", "--process_id"]
    limits = {"TORTOISE_JAX_LOST_SECONDS": str(LOST_SECONDS), "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "none")}
    start = lambda host: subprocess.Popen(
        list(map(str, [*command, host])),
        cwd=ROOT,
        env=environment(tmp_path) | limits,
        stderr=subprocess.PIPE,
        text=True,
    )
    first, second = start(0), start(1)
    try:
        wait_for_lock(tmp_path / "out", first)
        second.terminate()
        assert second.wait(60) == -signal.SIGTERM
        _, errors = first.communicate(timeout=120)
        assert first.returncode == 3, errors
        assert "run the same command again on all hosts" in errors
    finally:
        for host in (first, second):
            host.kill()
            host.communicate()


def test_workers_end_with_their_parent(tmp_path):
    code = (
        "import multiprocessing, time\n"
        "from pathlib import Path\n"
        "from tortoise_jax.data.filters import ClipLimits\n"
        "from tortoise_jax.data.recordings import Recording, load_ahead\n"
        "if __name__ == '__main__':\n"
        "    groups = ([Recording(Path('nowhere.wav'))] for _ in range(1000))\n"
        "    loaded = load_ahead(groups, ClipLimits(10.0), frozenset(), 2); next(loaded)\n"
        "    print(*(child.pid for child in multiprocessing.active_children()), flush=True)\n"
        "    time.sleep(600)\n"
    )
    (tmp_path / "parent.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "parent.py"], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(workers) >= 1
        assert all(alive(pid) for pid in workers)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.communicate()
    end = time.monotonic() + 60
    while any(alive(pid) for pid in workers) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in workers)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat")
        return not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except ProcessLookupError:
        return False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", VOICE, "--chekc"), "unrecognized arguments: --chekc (see --help)"),
        (("--data", VOICE, "--out", "x"), "--checkpoint must be given, unless with --check"),
        (("--data", VOICE), "--checkpoint and --out must be given"),
        (("--check",), "the following arguments are required: --data"),
        (("--data", VOICE, "--check", "--max_text", "many"), "argument --max_text: invalid int value: 'many'"),
        (("--data", "nowhere", "--check"), "nowhere: there is no such file or folder"),
    ],
)
def test_what_is_wrong_on_the_command_line_is_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prepare", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        exit_with_one_line(main)
    assert end.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {message}")
    assert shown.count("\n") == 1


def test_check_from_the_command_line():
    command = [sys.executable, "-m", "tortoise_jax.prepare", "--data", VOICE, "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^kept +48 +0:01:36$", done.stdout, re.MULTILINE)
    assert done.stderr == "", "the bar is for terminals"
