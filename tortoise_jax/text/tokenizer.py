"""Transcripts to cleaned text to token ids, as TorToiSe does it.

The released models know 255 tokens: [STOP], [UNK], [SPACE], the characters of English text and 215 merges. What they
were trained on was cleaned first (`clean_english`), so text must be cleaned the same way, quirks included.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import json
import re
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import text_unidecode
import tokenizers

from tortoise_jax.errors import UserError, did_you_mean

STOP, UNKNOWN, SPACE = SPECIAL_TOKENS = ("[STOP]", "[UNK]", "[SPACE]")
_NEEDED = ", ".join(SPECIAL_TOKENS)
STOP_ID = 0  # the models end every text with it, whatever the tokenizer


# --- cleaning ---------------------------------------------------------------------------------------------------------


def clean_english(text: str) -> str:
    """The cleaner the released models were trained with: plain lower-case ASCII, numbers and titles spelled out.

    The order and the quirks are upstream's: "£20" is "pstwenty" (the sign is transliterated before amounts are
    read), "$3.5" is "three dollars, five cents", white space at the ends stays. Unlike upstream it never raises:
    commas that are no thousands separators ("$,5") are ignored, and numbers of more than 36 digits are read digit by
    digit.
    """
    text = _to_ascii(text).lower()
    text = _spell_numbers(text)
    text = _spell_abbreviations(text)
    text = _fold_white_space(text)
    return text.replace('"', "")


def clean_basic(text: str) -> str:
    """Lower case and single spaces, every letter kept: for a tokenizer of another language."""
    return _fold_white_space(text.lower())


def clean_none(text: str) -> str:
    """The text as it is."""
    return text


CLEANERS: dict[str, Callable[[str], str]] = {"english": clean_english, "basic": clean_basic, "none": clean_none}


def clean(text: str, cleaner: str) -> str:
    """`text` through the cleaner of this name; UserError if there is none."""
    if cleaner not in CLEANERS:
        raise UserError(f'unknown cleaner "{cleaner}"{did_you_mean(cleaner, CLEANERS)}, choose {", ".join(CLEANERS)}')
    return CLEANERS[cleaner](text)


def letters_changed(text: str, cleaner: str = "english") -> dict[str, str]:
    """The letters and accents outside ASCII that the cleaner replaces, each with what it becomes ("" when dropped).

    Empty for plain English. A few entries are loan words ("café": {"é": "e"}); many are another language, which the
    English cleaner mangles silently: its caller should warn.
    """
    letters = dict.fromkeys(c for c in unicodedata.normalize("NFC", text) if not c.isascii() and _is_letter(c))
    cleaned = {letter: clean(letter, cleaner) for letter in letters}
    return {before: after for before, after in cleaned.items() if after != before.lower()}


def _is_letter(character: str) -> bool:
    return unicodedata.category(character)[0] in "LM"


# Upstream transliterates with Unidecode, which is GPL. text-unidecode (Artistic License) is a port of the same tables
# of Perl's Text::Unidecode; anyascii (ISC) has its own. Characters lower-cased to something else than by
# Unidecode 1.4, of those assigned:
#
#   range                  assigned   text-unidecode   the same with what is below   anyascii
#   Latin-1                      96                3                             0         10
#   Latin Extended-A            128                0                             0          1
#   Latin Extended-B            208                2                             0         20
#   Latin Ext. Additional       256                9                             3         10
#   Greek and Coptic            135               25                             0         59
#   Greek Extended              233                0                             0        124
#   Cyrillic                    304               69                             0        157
#   General Punctuation         111               29                             0         29
#   Currency Symbols             33               17                             9         13
#
# So: text-unidecode, nothing where it has only its "[?]" to offer, and the symbols that may occur in a transcript.
# What is left of these ranges are three medieval Latin letters and nine currencies hardly anyone has held.
_SYMBOLS = {
    **{"¼": " 1/4", "½": " 1/2", "¾": " 3/4", "−": "-", "∕": "/", "∗": "*", "∶": ":", "∼": "~", "≤": "<=", "≥": ">="},
    **{"⁇": "??", "⁊": "&", "⁎": "*", "⁒": "%", "⁓": "~", "⁗": "''''", "\u205f": " ", "№": "No. ", "™": "(tm)"},
    **{"℃": "degC", "℉": "degF", "ℓ": "l", "\u2126": "ohm", "\u212a": "K", "\u212b": "A"},
    **{"₱": "P", "₴": "UAH", "₸": "T", "₹": "Rs", "₺": "L", "₽": "R", "₿": "BTC"},
    **{"Є": "Ie", "Ъ": "'", "ъ": "'"},
}


def _to_ascii(text: str) -> str:
    return text if text.isascii() else "".join(c if c.isascii() else _ascii_of(c) for c in text)


@functools.lru_cache(maxsize=4096)
def _ascii_of(character: str) -> str:
    if character in _SYMBOLS:
        return _SYMBOLS[character]
    ascii_text = text_unidecode.unidecode(character)
    return "" if ascii_text.strip() == "[?]" else ascii_text


_THOUSANDS = re.compile(r"[0-9][0-9,]+[0-9]")
_DOLLARS = re.compile(r"\$([0-9.,]*[0-9])")
_DECIMAL = re.compile(r"([0-9]+)\.([0-9]+)")
_ORDINAL = re.compile(r"([0-9]+)(?:st|nd|rd|th)")
_NUMBER = re.compile(r"[0-9]+")
_MAX_DIGITS = 36  # inflect knows names up to decillions


def _spell_numbers(text: str) -> str:
    text = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    # Upstream has a rule for pounds here. It can never apply: the sign is no longer in a transliterated text.
    text = _DOLLARS.sub(lambda match: _dollars_in_words(match[1].replace(",", "")), text)
    text = _DECIMAL.sub(r"\1 point \2", text)
    text = _ORDINAL.sub(lambda match: _ordinal_in_words(match[0], digits=match[1]), text)
    return _NUMBER.sub(lambda match: _number_in_words(match[0]), text)


@functools.cache
def _words() -> Any:
    """inflect's engine, loaded on first use: it takes seconds."""
    import inflect

    return inflect.engine()


def _dollars_in_words(amount: str) -> str:
    """ "3.50" to "3 dollars, 50 cents"; the numbers themselves are spelled out later."""
    if amount.count(".") > 1:
        return f"{amount} dollars"
    dollars, _, cents = (part.lstrip("0") for part in amount.partition("."))
    counted = [(count, unit) for count, unit in ((dollars, "dollar"), (cents, "cent")) if count]
    return ", ".join(f"{count} {unit if count == '1' else unit + 's'}" for count, unit in counted) or "zero dollars"


def _ordinal_in_words(ordinal: str, digits: str) -> str:
    return _digits_in_words(digits) if len(digits) > _MAX_DIGITS else str(_words().number_to_words(ordinal))


def _number_in_words(digits: str) -> str:
    if len(digits) > _MAX_DIGITS:
        return _digits_in_words(digits)
    number = int(digits)
    return _year_in_words(number) if 1000 < number < 3000 else _in_words(number)


def _year_in_words(year: int) -> str:
    if year == 2000:
        return "two thousand"
    if 2000 < year < 2010:
        return f"two thousand {_in_words(year % 100)}"
    if year % 100 == 0:
        return f"{_in_words(year // 100)} hundred"
    pairs = _words().number_to_words(str(year), andword="", zero="oh", group=2)
    return str(pairs).replace(", ", " ")


def _in_words(number: int) -> str:
    # A fresh engine each time costs a microsecond; a shared one keeps state between calls and is not thread-safe.
    return str(_words().number_to_words(str(number), andword=""))


def _digits_in_words(digits: str) -> str:
    return " ".join(_in_words(int(digit)) for digit in digits)


# Replaced one after the other, in upstream's order: "maj.gen. x" is "majorgen. x", for "gen" no longer starts a word.
_ABBREVIATIONS = [
    (re.compile(rf"\b{short}\."), full)
    for short, full in {
        "mrs": "misess",
        "mr": "mister",
        "dr": "doctor",
        "st": "saint",
        "co": "company",
        "jr": "junior",
        "maj": "major",
        "gen": "general",
        "drs": "doctors",
        "rev": "reverend",
        "lt": "lieutenant",
        "hon": "honorable",
        "sgt": "sergeant",
        "capt": "captain",
        "esq": "esquire",
        "ltd": "limited",
        "col": "colonel",
        "ft": "fort",
    }.items()
]


def _spell_abbreviations(text: str) -> str:
    for short, full in _ABBREVIATIONS:
        text = short.sub(full, text)
    return text


def _fold_white_space(text: str) -> str:
    return re.sub(r"\s+", " ", text)


# --- tokens -----------------------------------------------------------------------------------------------------------


class Tokenizer:
    """Cleaned text to token ids and back, on a `tokenizers` tokenizer in which the token [SPACE] stands for a space.

    Made by `default()`, `from_file()`, `from_json()` or `from_merges()`; kept as `to_json()`, the format that TorToiSe
    reads. `digest` tells tokenizers apart.
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
        try:
            content = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise UserError(f"{path}: cannot be read as a tokenizer: {reason}") from error
        read = cls.from_json if content.lstrip().startswith("{") else cls.from_merges
        return read(content, source=str(path))

    @classmethod
    def from_json(cls, content: str, source: str = "tokenizer") -> Tokenizer:
        """From what `to_json` or any `tokenizers` tokenizer writes; UserError, naming `source`, if it is not that."""
        try:
            tokenizer = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{source}: not a tokenizer of the tokenizers library: {error}") from error
        return cls(tokenizer, source)

    @classmethod
    def from_merges(cls, content: str, source: str = "merges") -> Tokenizer:
        """Text of one line "characters abc…", then one merge of two tokens a line, first merged first.

        The ids follow: [STOP], [UNK], [SPACE], the characters, the merges. UserError with `source` and the line.
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
                raise UserError(f'{source}:{number}: the merge "{line}" makes a token that is there already; remove it')
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

    def encode(self, text: str, cleaner: str = "english") -> list[int]:
        """The ids of the cleaned text, without the stop token that the models append."""
        return self.encode_cleaned(clean(text, cleaner))

    def encode_cleaned(self, cleaned: str) -> list[int]:
        """The ids of a text that is clean already."""
        # Half a surrogate pair, which JSON can bring in, is no text to the library: the replacement character is.
        words = re.sub("[\ud800-\udfff]", "\ufffd", cleaned).split(" ")
        first, *others = [self._tokenizer.encode(word, add_special_tokens=False).ids for word in words]
        return first + [id_ for word in others for id_ in (self._space_id, *word)]

    def decode(self, ids: Iterable[int]) -> str:
        """The cleaned text of these ids; stop tokens are left out, unknown characters read "[UNK]"."""
        return "".join(self._text_of(int(id_)) for id_ in ids)

    def _text_of(self, id_: int) -> str:
        token = self._tokenizer.id_to_token(id_) if id_ >= 0 else None
        if token is None:
            raise UserError(f"text id {id_} is not in the tokenizer, which has ids 0 to {self.vocab_size - 1}")
        return {STOP: "", SPACE: " "}.get(token, token)

    def unknown_characters(self, text: str, cleaner: str = "english") -> list[str]:
        """The characters of the cleaned text that are no part of any token, in order, each once.

        `encode` makes [UNK] of them, or nothing at all of white space that is not a space.
        """
        return [c for c in dict.fromkeys(clean(text, cleaner)) if c != " " and not self._knows(c)]

    def _knows(self, character: str) -> bool:
        ids = self.encode_cleaned(character)
        return bool(ids) and self._unknown_id not in ids

    def to_json(self) -> str:
        """The tokenizer as JSON of the `tokenizers` library, which TorToiSe reads as its tokenizer file."""
        return self._tokenizer.to_str(pretty=True)

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of what decides the ids: tokens by id, merges, normalizer, pre-tokenizer.

        Not of the JSON as it is written, which differs between versions of the library.
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
