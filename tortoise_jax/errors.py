"""The one family of errors a user is meant to read, and how command lines show them."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable


class UserError(Exception):
    """Something the user gave is wrong. The message is one line: what, where, expected and found, what to do."""


def exit_with_one_line(main: Callable[[], None]) -> None:
    """Runs a command line's main: a UserError becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""
    try:
        main()
    except UserError as error:
        sys.stderr.write("error: " + " ".join(str(error).split()) + "\n")  # in one piece, whatever threads print
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def first_line(error: BaseException) -> str:
    """The first line of an error that says something, at most 300 characters; else the error's type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' (did you mean "x"?)' for the nearest known name, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f' (did you mean "{near[0]}"?)' if near else ""
