"""What the three commands share: arguments whose errors are one line."""

from __future__ import annotations

import argparse
from typing import NoReturn

from tortoise_jax.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse, with the command's docstring as help and mistakes as UserError."""

    def __init__(self, description: str | None) -> None:
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def positive(text: str) -> int:
    """A whole number of at least 1; argparse turns the ValueError into its message."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


positive.__name__ = "number (expected 1, 2, 3 …)"  # argparse says: invalid NAME value
