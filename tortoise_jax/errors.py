"""The one family of errors a user is meant to read, and how command lines show them."""

from __future__ import annotations

import difflib
import sys
import traceback
from collections.abc import Callable, Iterable


class UserError(Exception):
    """Something the user gave is wrong. The message is one line: what, where, expected and found, what to do."""


def exit_with_one_line(main: Callable[[], None]) -> None:
    """Runs a command line's main; what a user is meant to read ends it with one line."""
    try:
        main()
    except (UserError, KeyboardInterrupt) as error:
        sys.exit(report(error))


def report(error: BaseException) -> int:
    """Prints what ended a program to stderr and returns its exit code.

    A UserError: one line and 2; Ctrl-C: one line and 130; sys.exit: nothing and its code; else: the traceback and 1.
    """
    if isinstance(error, UserError):
        sys.stderr.write("error: " + " ".join(str(error).split()) + "\n")  # in one piece, whatever threads print
        return 2
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 130
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    traceback.print_exception(error)
    return 1


def first_line(error: BaseException) -> str:
    """The first line of an error that says something, at most 300 characters; else the error's type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' (did you mean "x"?)' for the nearest known name, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f' (did you mean "{near[0]}"?)' if near else ""
