"""Errors of other libraries are shown by one line of theirs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tortoise_jax.errors import UserError, bytes_in_words, count_of, first_line, report

PROGRAM = "from tortoise_jax.errors import UserError, exit_with_one_line\ndef main():\n"


def ended(body: str, **options: object) -> subprocess.CompletedProcess[str]:
    program = f"{PROGRAM}    {body}\nexit_with_one_line(main)"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, **options)


def test_the_first_line_that_says_something_is_shown():
    assert first_line(ValueError("\n  \n  shape (2,) is wrong  \nat 0x7f")) == "shape (2,) is wrong"
    assert first_line(RuntimeError("x" * 1000)) == "x" * 300
    assert first_line(KeyError()) == "KeyError"


def test_control_characters_are_shown_not_sent(capsys: pytest.CaptureFixture[str]):
    assert report(UserError("key \x1b[2J\x07 and \ud800\nare odd, café is not")) == 2
    assert capsys.readouterr().err == "error: key \\x1b[2J\\x07 and \\ud800 are odd, café is not\n"


def test_a_file_that_cannot_be_used_and_a_full_memory_are_one_line():
    done = ended("open('/nowhere/x')")
    assert (done.returncode, done.stderr) == (
        2,
        "error: /nowhere/x: cannot be read or written (No such file or directory)\n",
    )
    assert ended("raise MemoryError").stderr == "error: there is not enough memory\n"
    assert "Traceback" in ended("raise OSError('a fault of our own')").stderr


def test_a_reader_that_leaves_ends_a_program_without_a_word():
    read, write = os.pipe()
    os.close(read)
    program = f"{PROGRAM}    print('x' * 100_000)\nexit_with_one_line(main)"
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=write, stderr=subprocess.PIPE, text=True, check=False, timeout=280
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_numbers_in_words():
    assert [bytes_in_words(size) for size in (0, 999, 52_400, 1_000_000, 1_686_107_144)] == [
        "0 bytes", "999 bytes", "52.4 kB", "1 MB", "1.69 GB",
    ]  # fmt: skip
    assert (count_of(1, "draft"), count_of(0, "draft"), count_of(2, "draft")) == ("1 draft", "0 drafts", "2 drafts")
