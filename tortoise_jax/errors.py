"""The one family of errors a user is meant to read, and how command lines show them."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import Any, NoReturn


class UserError(Exception):
    """Something the user gave is wrong. The message is one line: what, where, expected and found, what to do."""


class Parser(argparse.ArgumentParser):
    """argparse, with a command line's docstring as help and mistakes as UserError."""

    def __init__(self, description: str | None, prog: str | None = None, epilog: str | None = None) -> None:
        super().__init__(
            prog,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def exit_with_one_line(main: Callable[[], None]) -> None:
    """Runs a command line's main; what a user is meant to read ends it with one line."""
    sys.unraisablehook = _without_echoes
    try:
        main()
        sys.stdout.flush()
    except (UserError, KeyboardInterrupt, OSError, MemoryError) as error:
        sys.exit(report(error))


def _without_echoes(unraisable: Any) -> None:
    """After a write that failed, tensorstore's threads call an event loop that is closed: no news, many tracebacks."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def report(error: BaseException) -> int:
    """Prints what ended a program to stderr and returns its exit code.

    A UserError, a file or folder that cannot be used, no memory left: one line and 2; Ctrl-C: one line and 130; a
    reader that closed the pipe: nothing and 141; sys.exit: nothing and its code; else: the traceback and 1.
    """
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that Python does not flush into the pipe
        return 141
    line = line_for_user(error)
    if line:
        sys.stderr.write(f"error: {line}\n")  # in one piece, whatever threads print
        return 2
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 130
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    traceback.print_exception(error)
    return 1


def line_for_user(error: BaseException) -> str:
    """What a user is told of an error that is not the program's own; "" for all others."""
    if isinstance(error, UserError):
        return printable(str(error))
    if isinstance(error, MemoryError):
        return "there is not enough memory"
    if isinstance(error, OSError) and error.filename is not None:
        return printable(f"{os.fsdecode(error.filename)}: cannot be read or written ({error.strerror})")
    return ""


def printable(text: str) -> str:
    """One line: white space folded, and characters that could steer a terminal, or have no shape, as escapes."""
    return escaped(" ".join(text.split()))


def escaped(line: str) -> str:
    """A line whose spaces stay, with what could steer a terminal, or has no shape, as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def count_of(number: int, noun: str) -> str:
    """ "1 draft", "2 drafts"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def hours_in_words(hours: float) -> str:
    """ "0:12:34", hours, minutes and seconds."""
    minutes, seconds = divmod(round(hours * 3600), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def bytes_in_words(size: int) -> str:
    """ "1.69 GB", "420 kB"."""
    unit, name = next(((u, n) for u, n in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")) if size >= u), (1, "bytes"))
    return f"{size / unit:.3g} {name}"


def first_line(error: BaseException) -> str:
    """The first line of an error that says something, at most 300 characters; else the error's type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' (did you mean "x"?)' for the nearest known name, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f' (did you mean "{near[0]}"?)' if near else ""
