"""Cleaned text to token ids and back, as TorToiSe does it.

The released models know 255 tokens: [STOP], [UNK], [SPACE], the characters of English text and 215 merges.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import tokenizers

from tortoise_jax.errors import UserError
from tortoise_jax.files import check_readable
from tortoise_jax.text.cleaners import DEFAULT, clean

STOP, UNKNOWN, SPACE = SPECIAL_TOKENS = ("[STOP]", "[UNK]", "[SPACE]")
_NEEDED = ", ".join(SPECIAL_TOKENS)
STOP_ID = 0  # the models end every text with it, whatever the tokenizer


class Tokenizer:
    """Cleaned text to token ids and back, on a `tokenizers` tokenizer in which the token [SPACE] stands for a space.

    Made by `default()`, `from_file()`, `from_json()` or `from_merges()`. `to_json()` is the format to store, which
    TorToiSe reads. `digest` tells tokenizers apart.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, source: str = "tokenizer") -> None:
        """Raises UserError, naming `source`, unless [STOP] (as id 0), [UNK] and [SPACE] are in the vocabulary."""
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        for token in SPECIAL_TOKENS:
            if token not in vocabulary:
                raise UserError(f"{source}: the token {token} is missing; train it with the special tokens {_NEEDED}")
        if vocabulary[STOP] != STOP_ID:
            raise UserError(
                f"{source}: {STOP} has id {vocabulary[STOP]}, expected {STOP_ID}, which the models end a text with; "
                f"train it with the special tokens {_NEEDED}, in this order"
            )
        tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
        tokenizer.encode_special_tokens = True  # a literal "[STOP]" in a text is text
        self._tokenizer = tokenizer
        self._space_id = vocabulary[SPACE]
        self._unknown_id = vocabulary[UNKNOWN]

    @classmethod
    def default(cls) -> Tokenizer:
        """The tokenizer of the released models: 255 tokens."""
        merges = importlib.resources.files("tortoise_jax").joinpath("assets/tokenizer_merges.txt")
        return cls.from_merges(merges.read_text(encoding="utf-8"), source="the bundled tokenizer")

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """A tokenizer file: JSON of the `tokenizers` library, or characters and merges as text (`from_merges`)."""
        check_readable(Path(path))
        try:
            content = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise UserError(f"{path}: cannot be read as a tokenizer: {reason}") from error
        read = cls.from_json if content.lstrip().startswith("{") else cls.from_merges
        return read(content, source=str(path))

    @classmethod
    def from_json(cls, content: str, source: str = "tokenizer") -> Tokenizer:
        """From JSON of the `tokenizers` library, as `to_json` writes it; UserError, naming `source`, if it is not."""
        try:
            tokenizer = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{source}: not a tokenizer of the tokenizers library: {error}") from error
        return cls(tokenizer, source)

    @classmethod
    def from_merges(cls, content: str, source: str = "merges") -> Tokenizer:
        """From text: one line "characters abc…", then one merge of two tokens per line, in the order of merging.

        The ids are in the order [STOP], [UNK], [SPACE], characters, merges. UserError names `source` and the line.
        """
        first, *merge_lines = content.splitlines() or [""]
        if not first.startswith("characters "):
            raise UserError(
                f'{source}:1: not a tokenizer: expected tokenizers JSON, or "characters …" as first line of a merges '
                f'file, found "{first[:40]}"'
            )
        tokens = dict.fromkeys([*SPECIAL_TOKENS, *first.removeprefix("characters ")])
        merges = []
        for number, line in enumerate(merge_lines, start=2):
            pair = line.split()
            if len(pair) != 2 or any(piece not in tokens or piece in SPECIAL_TOKENS for piece in pair):
                raise UserError(f'{source}:{number}: expected two earlier tokens to merge, found "{line}"')
            if "".join(pair) in tokens:
                raise UserError(f'{source}:{number}: the merge "{line}" makes a token that exists already; remove it')
            merges.append((pair[0], pair[1]))
            tokens["".join(pair)] = None
        vocabulary = {token: id_ for id_, token in enumerate(tokens)}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, unk_token=UNKNOWN))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        return cls(tokenizer, source)

    @property
    def vocab_size(self) -> int:
        """Number of tokens: one more than the highest id."""
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    @property
    def unknown_id(self) -> int:
        """The id of [UNK], which must not occur in a training text."""
        return self._unknown_id

    def encode(self, text: str, cleaner: str = DEFAULT) -> list[int]:
        """The ids of the cleaned text, without the stop token that the models append."""
        return self.encode_cleaned(clean(text, cleaner))

    def encode_cleaned(self, cleaned: str) -> list[int]:
        """The ids of a text that is already clean."""
        # JSON may bring in half a surrogate pair, which the library refuses: the replacement character stands for it.
        words = re.sub("[\ud800-\udfff]", "\ufffd", cleaned).split(" ")
        first, *others = [self._tokenizer.encode(word, add_special_tokens=False).ids for word in words]
        return first + [id_ for word in others for id_ in (self._space_id, *word)]

    def decode(self, ids: Iterable[int]) -> str:
        """The cleaned text of these ids, without stop tokens; "[UNK]" stands for unknown characters."""
        return "".join(self._text_of(int(id_)) for id_ in ids)

    def _text_of(self, id_: int) -> str:
        token = self._tokenizer.id_to_token(id_) if id_ >= 0 else None
        if token is None:
            raise UserError(f"text id {id_} is not in the tokenizer, which has ids 0 to {self.vocab_size - 1}")
        return {STOP: "", SPACE: " "}.get(token, token)

    def token(self, id_: int) -> str:
        """The token of an id, specials by their names; "" where there is none."""
        return self._tokenizer.id_to_token(id_) or ""

    def unknown_characters(self, text: str, cleaner: str = DEFAULT) -> list[str]:
        """The characters of the cleaned text that no token contains, in order, each once.

        `encode` turns them into [UNK], and drops white space that is not a space.
        """
        return [c for c in dict.fromkeys(clean(text, cleaner)) if c != " " and not self._knows(c)]

    def unknown_in_words(self, text: str, cleaner: str = DEFAULT) -> str:
        """The unknown characters for a message, "& (U+0026)", with the cleaner that would say them; "" for none."""
        unknown = self.unknown_characters(text, cleaner)
        if not unknown:
            return ""
        shown = " ".join(f"{c} (U+{ord(c):04X})" if c.isprintable() else f"U+{ord(c):04X}" for c in unknown)
        helps = cleaner == DEFAULT and not self.unknown_characters(text, "english")
        return shown + ("; --cleaner english says them in words" if helps else "")

    def _knows(self, character: str) -> bool:
        ids = self.encode_cleaned(character)
        return bool(ids) and self._unknown_id not in ids

    def to_json(self) -> str:
        """The tokenizer as JSON of the `tokenizers` library, which TorToiSe reads as its tokenizer file."""
        return self._tokenizer.to_str(pretty=True)

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of all that decides the ids: tokens by id, merges, normalizer, pre-tokenizer.

        It is not of the written JSON, because that differs between versions of the library.
        """
        content = json.loads(self.to_json())
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        merges = content["model"].get("merges", [])
        decisive = {
            "tokens": sorted(vocabulary, key=lambda token: (vocabulary[token], token)),
            "merges": [merge.split(" ") if isinstance(merge, str) else merge for merge in merges],
            "normalizer": content.get("normalizer"),
            "pre_tokenizer": content.get("pre_tokenizer"),
        }
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    def __reduce__(self) -> tuple[Callable[[str], Tokenizer], tuple[str]]:
        return Tokenizer.from_json, (self.to_json(),)  # worker processes need one too
