"""Long text, split into parts that the model can say at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from tortoise_jax.errors import UserError

# A sentence ends after a full stop, question or exclamation mark and the closing quotes after it, or at an empty line.
_SENTENCE_END = re.compile(r"""(?<=[.!?…])["'”’)\]]*\s+|\s*\n\s*\n\s*""")
# "Dr. Smith", "3.5 m": a full stop after a title or an initial ends no sentence.
_TITLES = r"(?i:mrs?|drs?|st|jr|gen|maj|rev|lt|hon|sgt|capt|col|ltd|co|ft|esq|e\.g|i\.e)"
_NO_END = re.compile(rf"""(?:^|[\s("'])(?:{_TITLES}|[A-Z])\.$""")


def sentences(text: str) -> list[str]:
    """The sentences of a text, stripped, with their marks."""
    parts: list[str] = []
    start = 0
    for end in _SENTENCE_END.finditer(text):
        sentence = text[start : end.end()].strip()
        if _NO_END.search(sentence) and "\n\n" not in end.group():
            continue
        if sentence:
            parts.append(sentence)
        start = end.end()
    rest = text[start:].strip()
    return [*parts, rest] if rest else parts


def split(text: str, encode: Callable[[str], Sequence[int]], comfortable: int, limit: int) -> list[str]:
    """The sentences, neighbours joined while they have at most `comfortable` tokens together; a longer sentence
    stays alone.

    encode: gives the token ids of a text. Raises UserError for a sentence of more than `limit` tokens.
    """
    parts: list[str] = []
    for sentence in sentences(text):
        tokens = len(encode(sentence))
        if tokens > limit:
            raise UserError(
                f'the sentence "{sentence[:40]}…" has {tokens} tokens, the model has room for {limit}; '
                "split it with a full stop"
            )
        if parts and len(encode(f"{parts[-1]} {sentence}")) <= comfortable:
            parts[-1] = f"{parts[-1]} {sentence}"
        else:
            parts.append(sentence)
    return parts
