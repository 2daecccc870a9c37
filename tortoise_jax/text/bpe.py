"""A tokenizer for a language of one's own: byte pair encoding learnt from transcripts, in the form TorToiSe reads."""

from __future__ import annotations

import string
from collections.abc import Sequence

import tokenizers

from tortoise_jax.errors import UserError
from tortoise_jax.text.cleaners import clean
from tortoise_jax.text.tokenizer import SPECIAL_TOKENS, UNKNOWN, Tokenizer

SIZE = 255  # tokens of the released models
LARGEST = 20_000
# Known however few transcripts there are: what any text may hold, prompts and names too.
ALPHABET = string.ascii_lowercase + string.digits + ".,;:!?'\"()-"


def train(texts: Sequence[str], cleaner: str, size: int = SIZE) -> Tokenizer:
    """At most `size` tokens: the special ones, every character of the cleaned texts, and the most frequent merges.

    Raises UserError for texts without a letter, and where the characters alone are more than `size`.
    """
    cleaned = [clean(text, cleaner) for text in texts]
    characters = dict.fromkeys([*ALPHABET, *sorted({c for text in cleaned for c in text if not c.isspace()})])
    if not any(c.isalpha() for text in cleaned for c in text):
        raise UserError("there is no letter in the transcripts to train a tokenizer from")
    least = len(SPECIAL_TOKENS) + len(characters)
    if not least <= size <= LARGEST:
        raise UserError(f"--size {size}: expected {least} ({len(characters)} characters are known) to {LARGEST}")
    model = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=UNKNOWN))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=list(characters),
        show_progress=False,
    )
    model.train_from_iterator(cleaned, trainer)
    return Tokenizer(model, "the new tokenizer")
