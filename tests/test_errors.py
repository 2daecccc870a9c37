"""Errors of other libraries are shown by one line of theirs."""

from __future__ import annotations

from tortoise_jax.errors import first_line


def test_the_first_line_that_says_something_is_shown():
    assert first_line(ValueError("\n  \n  shape (2,) is wrong  \nat 0x7f")) == "shape (2,) is wrong"
    assert first_line(RuntimeError("x" * 1000)) == "x" * 300
    assert first_line(KeyError()) == "KeyError"
