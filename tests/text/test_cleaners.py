"""Text is cleaned as upstream cleans it, quirks included."""

from __future__ import annotations

import pytest

from tortoise_jax.errors import UserError
from tortoise_jax.text.cleaners import (
    CLEANERS,
    clean,
    clean_basic,
    clean_english,
    clean_tortoise,
    letters_changed,
    record,
    recorded,
)
from tortoise_jax.text.tokenizer import Tokenizer


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  A\t\n b  ", " a b "),
        ('Say "hi"', "say hi"),
        ("£20", "pstwenty"),
        ("$20 $1 $0 $0.01", "twenty dollars one dollar zero dollars one cent"),
        ("$3.5 and $.5", "three dollars, five cents and five cents"),
        ("$1.2.3", "one point two.three dollars"),
        ("$,5", "five dollars"),
        ("1,234,567", "one million, two hundred thirty-four thousand, five hundred sixty-seven"),
        ("3.05", "three point five"),
        ("1st 22nd 103rd", "first twenty-second one hundred and third"),
        ("1000 1001 1905 1999", "one thousand ten oh one nineteen oh five nineteen ninety-nine"),
        ("1900 2000 2001 2009", "nineteen hundred two thousand two thousand one two thousand nine"),
        ("2010 2100 2999 3000", "twenty ten twenty-one hundred twenty-nine ninety-nine three thousand"),
        ("Mr. Fox, Mrs. Fox and Dr. Owl", "mister fox, misess fox and doctor owl"),
        ("the col. and his col", "the colonel and his col"),
        ("maj.gen. Grey", "majorgen. grey"),
        ("½ a cup, 20℃, № 7", " one/two a cup, twentydegc, no. seven"),
        ("’tis “quoted” … naïve—Ærø", "'tis quoted ... naive--aero"),
        ("тест", "test"),
        ("left 🎉 out", "left out"),
        ("[?] ₾5", "[?] five"),
    ],
)
def test_the_released_models_cleaner(text, cleaned):
    assert clean_tortoise(text) == cleaned


def test_numbers_without_a_name_are_read_digit_by_digit():
    assert clean_tortoise("1" * 36).startswith("one hundred eleven decillion")
    assert clean_tortoise("10" * 19) == " ".join(["one", "zero"] * 19)
    assert clean_tortoise("1" * 36 + "2nd") == "one " * 36 + "two"
    assert clean_tortoise("7" * 5000).count("seven") == 5000  # more digits than int() takes


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("R&B, AT&T & more", "r and b, at and t and more"),
        ("50%. (100 %)", "fifty percent. (one hundred percent)"),
        ("2+2=4, a == b", "two plus two equals four, a equals b"),
        ("C++, C#, #1 and #tag", "c plus plus, c sharp, number one and hash tag"),
        ("me@x.com", "me at x.com"),
        ("£20, £3.50, £1.01, £0.50", "twenty pounds, three pounds, fifty pence, one pound, one penny, fifty pence"),
        ("€5, 20 €, € 1,000.50", "five euros, twenty euros, one thousand euros, fifty cents"),
        ("$20, $1, $3.5, US$ 5, 20$", "twenty dollars, one dollar, three dollars, fifty cents, five dollars, "
         "twenty dollars"),
        ("$5 million, £2bn, $3k, $1.999", "five million dollars, two billion pounds, three thousand dollars, "
         "one point nine hundred ninety-nine dollars"),
        ("$0 and $.5, in $", "zero dollars and fifty cents, in dollars"),
        ("20°C, 1 °F, 45°, 20 ℃", "twenty degrees celsius, one degree fahrenheit, forty-five degrees, "
         "twenty degrees celsius"),
        ("① 𝐁𝐨𝐥𝐝 ℝ ５０％", "one bold r fifty percent"),
        (" Mr. Fox’s “naïve”\ttest\n", "mister fox's naive test"),
        ("12,345 in 1999 on the 3rd", "twelve thousand, three hundred forty-five in nineteen ninety-nine on the third"),
    ],
)  # fmt: skip
def test_english_cleaner_says_signs_and_amounts(text, cleaned):
    assert clean_english(text) == cleaned
    assert Tokenizer.default().unknown_characters(text, "english") == []


def test_what_a_file_of_before_calls_english_is_the_released_models_cleaner():
    assert recorded({"cleaner": "english"}) == "tortoise"
    assert recorded({"cleaner": "basic"}) == "basic"
    assert recorded({}) == "tortoise"
    for name in CLEANERS:
        assert recorded({"cleaner": "none"} | record(name)) == name


def test_basic_cleaner_keeps_the_letters():
    assert clean_basic(" Ünder\n DER  Brücke 3 ") == " ünder der brücke 3 "


def test_an_unknown_cleaner_is_refused_with_a_suggestion():
    with pytest.raises(
        UserError, match=r'unknown cleaner "englsh".*did you mean "english".*tortoise, english, basic, none'
    ):
        clean("x", "englsh")


def test_letters_of_another_language_are_reported():
    assert letters_changed("Plain English, “quoted” — £20 for 2½ kilos!") == {}
    assert letters_changed("ÜBER die Brücke") == {"Ü": "u", "ü": "u"}
    assert letters_changed("cafe\u0301") == {"é": "e"}  # composed first
    assert letters_changed("नमस्ते")["न"] == "n"
    assert letters_changed("Über", cleaner="basic") == {}


def test_signs_that_stand_for_letters_and_are_dropped_are_reported():
    """Upstream's transliteration reads them; ours has no table for them."""
    assert letters_changed("① ℝ 𝐁𝐨 🅰 🎉 ½ ™") == dict.fromkeys("①ℝ𝐁𝐨🅰", "")
    assert letters_changed("① ℝ 𝐁𝐨 🅰 🎉 ½ ™", "english") == {"🅰": ""}
