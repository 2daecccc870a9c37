"""Long texts, split at the ends of sentences."""

from __future__ import annotations

import pytest

from tortoise_jax.errors import UserError
from tortoise_jax.text import sentences


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ('He said "Go." She went.', ['He said "Go."', "She went."]),
        (
            "Dr. Smith met Mrs. Jones at 3.5 m. Then J. R. left.",
            ["Dr. Smith met Mrs. Jones at 3.5 m.", "Then J. R. left."],
        ),
        ("First paragraph\n\nsecond one\nwith a break", ["First paragraph", "second one\nwith a break"]),
        ("Wait... what?", ["Wait...", "what?"]),
        ("  ", []),
    ],
)
def test_sentences(text: str, expected: list[str]) -> None:
    assert sentences.sentences(text) == expected


def test_splitting_joins_short_sentences_and_loses_nothing() -> None:
    text = " ".join(f"Sentence number {i}." for i in range(30))
    parts = sentences.split(text, str.split, comfortable=10, limit=40)
    assert " ".join(parts) == text
    assert all(len(part.split()) == 9 for part in parts)
    long = "word " * 20 + "end."
    assert sentences.split(f"Short. {long} Short.", str.split, comfortable=10, limit=40) == ["Short.", long, "Short."]
    with pytest.raises(UserError, match=r'"word word .*…" has 21 tokens, the model has room for 20; split it'):
        sentences.split(long, str.split, comfortable=10, limit=20)
