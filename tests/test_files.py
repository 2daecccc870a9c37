"""Who may write a folder, what a killed writer left there, and that nothing of anybody else is ever touched."""

from __future__ import annotations

import errno
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tortoise_jax import files
from tortoise_jax.errors import UserError
from tortoise_jax.files import LOCK, locked, remove_partials, replaced_whole, written_whole

HOLD = """
import sys, time
from pathlib import Path
from tortoise_jax.files import locked, replaced_whole, written_whole
with {what}(Path({path!r})) as place:
    {work}
    print("holding", flush=True)
    time.sleep(600)
"""


def holder(what: str, path: Path, work: str = "pass") -> subprocess.Popen[str]:
    """Another process that is in the middle of writing."""
    program = HOLD.format(what=what, path=str(path), work=work)
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "holding\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_a_lock_names_its_process_and_ends_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "voice"
    other = holder("locked", folder)
    try:
        named = rf"--workdir {folder} is being written by -c, process {other.pid} on \S+, since 20.*another --workdir"
        with pytest.raises(UserError, match=named), locked(folder, "--workdir"):
            pass
    finally:
        kill(other)
    assert (folder / LOCK).exists(), "what was killed left it"
    with locked(folder):
        assert f"process {os.getpid()} on" in (folder / LOCK).read_text()
        assert (folder / LOCK).read_text().count("\n") == 1
    assert not list(folder.iterdir())


def test_a_lock_leaves_no_empty_folder(tmp_path: Path) -> None:
    with locked(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/run: cannot be written: Not a directory"), locked(tmp_path / "file/run"):
        pass


def test_a_folder_of_somebody_else_beside_the_target_is_kept(tmp_path: Path) -> None:
    (tmp_path / "X.partial").mkdir()
    (tmp_path / "X.partial" / "film.mp4").write_text("half a film")
    with pytest.raises(UserError, match=r"X.partial is needed to write it and holds something else"):
        written_whole(tmp_path / "X").__enter__()
    assert (tmp_path / "X.partial" / "film.mp4").read_text() == "half a film"


def test_what_a_killed_writer_left_is_removed_and_a_living_one_is_not(tmp_path: Path) -> None:
    other = holder("written_whole", tmp_path / "X", "(place / 'half').write_text('half')")
    try:
        with pytest.raises(UserError, match=f"X.partial is being written by -c, process {other.pid}"):
            written_whole(tmp_path / "X").__enter__()
        assert (tmp_path / "X.partial" / "half").exists()
    finally:
        kill(other)
    with written_whole(tmp_path / "X") as folder:
        assert [path.name for path in folder.iterdir()] == [LOCK]
        (folder / "whole").write_text("whole")
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["X", "X/whole"]


def test_what_other_threads_still_write_after_a_failure_is_removed_too(tmp_path: Path) -> None:
    """As orbax's do on a full disk, which make the folder anew where it is gone."""

    def goes_on() -> None:
        for number in range(6):
            time.sleep(0.05)
            (tmp_path / "X.partial" / "ar").mkdir(parents=True, exist_ok=True)
            (tmp_path / "X.partial" / "ar" / str(number)).write_text("late")

    thread = threading.Thread(target=goes_on)
    thread.start()
    with pytest.raises(UserError, match="X: cannot be written: No space left"), written_whole(tmp_path / "X"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    thread.join()
    assert not list(tmp_path.iterdir())


def test_half_written_files_are_removed_unless_they_are_being_written(tmp_path: Path) -> None:
    (tmp_path / ".voice.pth.partial").write_text("somebody's")
    (tmp_path / ".voice.pth.7.partial").write_text("somebody's")
    other = holder("replaced_whole", tmp_path / "voice.pth", "place.write_text('half')")
    half = tmp_path / f".voice.pth.{other.pid}.tortoise_jax-partial"
    try:
        remove_partials(tmp_path)
        assert half.exists()
    finally:
        kill(other)
    remove_partials(tmp_path, "other.pth")
    assert half.exists()
    remove_partials(tmp_path, "voice.pth")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".voice.pth.7.partial", ".voice.pth.partial"]


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b.txt"
    with pytest.raises(OSError, match="Is a directory"), replaced_whole(target) as beside:
        (beside.parent / "b.txt").mkdir()  # so that it cannot be renamed to it
    target.rmdir()
    assert not list((tmp_path / "a").iterdir())
    with replaced_whole(target) as beside:
        beside.write_text("whole")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.txt"]


# --- what may be read, where may be written ---------------------------------------------------------------------------


def test_only_files_and_folders_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    Path("file").write_text("")
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        for path in ("file", ".", "missing", "a\0b", "x" * 300):
            files.check_readable(Path(path))
        for path, kind in (("pipe", "a named pipe"), ("socket", "a socket"), ("/dev/null", "a device")):
            with pytest.raises(UserError, match=rf"^{path}: is {kind}, expected a file$"):
                files.check_readable(Path(path))


def test_a_place_that_cannot_be_written_is_found_before_the_work(tmp_path: Path) -> None:
    files.check_writable(tmp_path / "new" / "folder" / "file")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    for path, folder in ((Path("/proc/new/file"), "/proc"), (tmp_path / "file" / "x", f"{tmp_path}/file")):
        with pytest.raises(
            UserError, match=rf"^--out {re.escape(str(path))}: cannot be written: {re.escape(folder)}: \w"
        ):
            files.check_writable(path, "--out")


def test_storage_that_knows_no_locks_is_told_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    for _ in range(2):
        with files.locked(tmp_path / "run"):
            pass
    said = f"{tmp_path / 'run'}: its storage knows no locks; see to it that only one command writes there\n"
    assert capsys.readouterr().err == said


def test_deeply_nested_json_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"a.json is damaged"):
        files.read_json(tmp_path / "a.json")
