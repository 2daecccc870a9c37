"""What the commands share beside the parser of errors.py."""

from __future__ import annotations


def positive(text: str) -> int:
    """A whole number of at least 1; argparse turns the ValueError into its message."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


positive.__name__ = "number (expected 1, 2, 3 …)"  # argparse says: invalid NAME value
