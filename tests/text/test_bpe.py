"""A tokenizer of one's own language: every letter of its transcripts comes out of it unchanged."""

from __future__ import annotations

import pytest

from tortoise_jax.errors import UserError
from tortoise_jax.text import bpe
from tortoise_jax.text.cleaners import clean
from tortoise_jax.text.tokenizer import SPECIAL_TOKENS, Tokenizer

GERMAN = [
    "Über sieben Brücken musst du gehn,",
    "sieben dunkle Jahre überstehn.",
    "Größe, Maß und Füße: zwölf süße Äpfel!",
    "Fünf schöne grüne Züge führen über die Brücke.",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return bpe.train(GERMAN, "basic", 90)


def test_letters_of_the_language_come_out_unchanged(tokenizer: Tokenizer) -> None:
    for text in [*GERMAN, "ß", 'Züge 12 x: (quer) - "ja"?']:
        assert tokenizer.unknown_characters(text, "basic") == []
        assert tokenizer.decode(tokenizer.encode(text, "basic")) == clean(text, "basic")
    assert tokenizer.unknown_characters("Ñandú", "basic") == ["ñ", "ú"]


def test_frequent_pieces_are_one_token(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 90
    assert [tokenizer.token(id_) for id_ in range(3)] == list(SPECIAL_TOKENS)
    assert len(tokenizer.encode("über", "basic")) < 4
    assert tokenizer.token(1000) == ""


def test_the_same_transcripts_give_the_same_tokenizer(tokenizer: Tokenizer) -> None:
    assert bpe.train(GERMAN, "basic", 90).digest == tokenizer.digest
    assert Tokenizer.from_json(tokenizer.to_json()).encode(GERMAN[0]) == tokenizer.encode(GERMAN[0])
    assert bpe.train(GERMAN, "basic").vocab_size < 255  # so few transcripts have no more pieces


def test_sizes_that_cannot_be_are_said() -> None:
    with pytest.raises(UserError, match=r"--size 40: expected 54 \(51 characters are known\) to 20000"):
        bpe.train(GERMAN, "basic", 40)
    with pytest.raises(UserError, match="there is no letter in the transcripts"):
        bpe.train(["12", "?"], "basic", 255)
