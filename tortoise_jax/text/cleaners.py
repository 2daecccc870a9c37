"""Transcripts to cleaned text, as TorToiSe does it, or with signs and amounts said in words.

The released models were trained on text that was cleaned first (`clean_tortoise`), so text must be cleaned the same
way, quirks included. What their tokenizer does not know ("&", "%") may be said in words nevertheless (`clean_english`).
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

import text_unidecode

from tortoise_jax.errors import UserError, did_you_mean


def clean_tortoise(text: str) -> str:
    """The cleaner the released models were trained with: plain lower-case ASCII, numbers and titles spelled out.

    The order and the quirks are upstream's: "£20" is "pstwenty" (the sign is transliterated before amounts are
    read), "$3.5" is "three dollars, five cents", white space at the ends stays. Unlike upstream's it never raises an
    error: commas that separate no thousands ("$,5") are ignored, and numbers of more than 36 digits are read digit by
    digit.
    """
    return _spelled(_to_ascii(text))


def _spelled(ascii_text: str) -> str:
    text = _spell_numbers(ascii_text.lower())
    text = _spell_abbreviations(text)
    text = _fold_white_space(text)
    return text.replace('"', "")


def clean_english(text: str) -> str:
    """The same, but what an English speaker says of signs and amounts is spelled out first.

    "R&B" is "r and b", "50%" "fifty percent", "£3.50" "three pounds, fifty pence", "$5 million" "five million dollars",
    "20°C" "twenty degrees celsius"; characters that only look different (①, 𝐁) are the usual ones; no white space stays
    at the ends.
    """
    text = "".join(_usual(c) for c in text)
    return _spelled(_to_ascii(_say_signs(_say_degrees(_say_amounts(text))))).strip()


def clean_basic(text: str) -> str:
    """Lower case and single spaces, every letter kept: for a tokenizer of another language."""
    return _fold_white_space(text.lower())


def clean_none(text: str) -> str:
    """The text as it is."""
    return text


CLEANERS: dict[str, Callable[[str], str]] = {
    "tortoise": clean_tortoise,
    "english": clean_english,
    "basic": clean_basic,
    "none": clean_none,
}
DEFAULT = "tortoise"
RECORDED = "text_cleaner"


def record(cleaner: str) -> dict[str, str]:
    """How a data set and a checkpoint say which cleaner their texts need."""
    return {RECORDED: cleaner}


def recorded(about: Mapping[str, Any]) -> str:
    """The cleaner that a data set's header, or what a checkpoint came from, says; else the released models'."""
    before = {"english": "tortoise"}  # in files of before there was a second cleaner for English
    stated = str(about.get("cleaner", DEFAULT))
    return str(about.get(RECORDED, before.get(stated, stated)))


def check_cleaner(cleaner: str, flag: str) -> None:
    """Raises UserError for a name that is no cleaner's. flag: by which the user gave it."""
    if cleaner not in CLEANERS:
        near = did_you_mean(cleaner, CLEANERS)
        raise UserError(f"{flag} {cleaner}: there is none{near}, choose {', '.join(CLEANERS)}")


def clean(text: str, cleaner: str) -> str:
    """`text`, cleaned by the cleaner of this name; UserError if there is no such cleaner."""
    if cleaner not in CLEANERS:
        raise UserError(f'unknown cleaner "{cleaner}"{did_you_mean(cleaner, CLEANERS)}, choose {", ".join(CLEANERS)}')
    return CLEANERS[cleaner](text)


def letters_changed(text: str, cleaner: str = DEFAULT) -> dict[str, str]:
    """The letters and accents outside ASCII that the cleaner replaces, each with its replacement ("" if dropped), and
    the signs that stand for a letter or number (①, 🅰) and are dropped.

    Empty for plain English. A few entries come from loan words ("café": {"é": "e"}); many mean another language, which
    the English cleaners damage silently, so callers should warn.
    """
    foreign = dict.fromkeys(c for c in unicodedata.normalize("NFC", text) if not c.isascii())
    cleaned = {c: clean(c, cleaner) for c in foreign if _is_letter(c) or _stands_for_text(c)}
    usual = lambda c: unicodedata.normalize("NFKC", c).lower()
    return {c: after for c, after in cleaned.items() if (after != usual(c) if _is_letter(c) else not after)}


def _is_letter(character: str) -> bool:
    return unicodedata.category(character)[0] in "LM"


def _stands_for_text(character: str) -> bool:
    name = unicodedata.name(character, "")
    return unicodedata.category(character)[0] in "NS" and any(word in name for word in ("LETTER", "DIGIT", "NUMBER"))


# --- what an English speaker says of signs ----------------------------------------------------------------------------

_SIGNS = [
    (re.compile(pattern), words)
    for pattern, words in {
        r"&": " and ",
        r"%": " percent ",
        r"‰": " per mille ",
        r"\+": " plus ",
        r"=+": " equals ",
        r"@": " at ",
        r"(?:#|№)\s*(?=\d)": " number ",
        r"(?<=\w)#(?!\w)": " sharp ",
        r"#": " hash ",
    }.items()
]
_CURRENCIES = {
    "$": ("dollar", "dollars", "cent", "cents"),
    "£": ("pound", "pounds", "penny", "pence"),
    "€": ("euro", "euros", "cent", "cents"),
}
_MAGNITUDES = {"k": "thousand", "m": "million", "bn": "billion"}
_AMOUNT = r"(\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?:\s?(thousand|million|billion|trillion|bn|[km])\b)?"
_AMOUNT_AFTER = re.compile(rf"(?:\bUS)?([$£€])\s?{_AMOUNT}", re.IGNORECASE)
_AMOUNT_BEFORE = re.compile(rf"{_AMOUNT}\s?([$£€])(?!\w)", re.IGNORECASE)
_CURRENCY = re.compile(r"[$£€]")
_DEGREES = re.compile(r"(?:(\d[\d,.]*)\s?)?(?:[°º]\s?([CF])\b|°|([℃℉]))", re.IGNORECASE)


def _usual(character: str) -> str:
    """The usual form of a character that has none in ASCII: A of the full-width, bold or circled one."""
    if character.isascii() or _ascii_of(character):
        return unicodedata.normalize("NFKC", character) if "\uff01" <= character <= "\uffe6" else character
    return unicodedata.normalize("NFKC", character)


def _say_amounts(text: str) -> str:
    text = _AMOUNT_AFTER.sub(lambda match: _amount_in_words(match[1], match[2], match[3]), text)
    text = _AMOUNT_BEFORE.sub(lambda match: _amount_in_words(match[3], match[1], match[2]), text)
    return _CURRENCY.sub(lambda match: f" {_CURRENCIES[match[0]][1]} ", text)


def _amount_in_words(sign: str, number: str, magnitude: str | None) -> str:
    """("£", "3.5", None) to " 3 pounds, 50 pence "; the numbers themselves are spelled out later."""
    one, many, small_one, small_many = _CURRENCIES[sign]
    if magnitude:
        return f" {number} {_MAGNITUDES.get(magnitude.lower(), magnitude)} {many} "
    whole, _, part = number.replace(",", "").partition(".")
    if len(part) > 2:
        return f" {number} {many} "
    counted = [(whole.lstrip("0"), one, many), (part.ljust(2, "0").lstrip("0"), small_one, small_many)]
    said = [f"{count} {single if count == '1' else plural}" for count, single, plural in counted if count]
    return f" {', '.join(said) or f'0 {many}'} "


def _say_degrees(text: str) -> str:
    def words(match: re.Match[str]) -> str:
        number = f"{match[1]} " if match[1] else " "
        scale = (match[2] or {"℃": "C", "℉": "F"}.get(match[3] or "", "")).upper()
        unit = "degree" if match[1] == "1" else "degrees"
        return f"{number}{unit}{ {'C': ' celsius', 'F': ' fahrenheit'}.get(scale, '') } "

    return _DEGREES.sub(words, text)


def _say_signs(text: str) -> str:
    for sign, words in _SIGNS:
        text = sign.sub(words, text)
    # "50%." was given a space before its full stop.
    return re.sub(r" +(?=[.,;:!?)])", "", text)


# --- transliteration --------------------------------------------------------------------------------------------------


# Upstream transliterates with Unidecode, which is GPL. text-unidecode (Artistic License) is a port of the same tables,
# those of Perl's Text::Unidecode; anyascii (ISC) has its own tables. How many of the assigned characters each of them
# turns into other lower-case text than Unidecode 1.4 does:
#
#   range                  assigned   text-unidecode   with `_ascii_of` (below)      anyascii
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
# So `_ascii_of` takes text-unidecode's answer, but nothing where that answer is "[?]", and knows the symbols that may
# occur in a transcript. What still differs are three medieval Latin letters and nine currencies that few people use.
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
    # Upstream has a rule for pounds here. It never applies: transliteration has already replaced the sign.
    text = _DOLLARS.sub(lambda match: _dollars_in_words(match[1].replace(",", "")), text)
    text = _DECIMAL.sub(r"\1 point \2", text)
    text = _ORDINAL.sub(lambda match: _ordinal_in_words(match[0], digits=match[1]), text)
    return _NUMBER.sub(lambda match: _number_in_words(match[0]), text)


@functools.cache
def _words() -> Any:
    """inflect's engine, loaded on first use because that takes seconds."""
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


# Replaced one after another, in upstream's order: "maj.gen. x" becomes "majorgen. x", as "gen" then starts no word.
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
