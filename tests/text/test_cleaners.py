"""Text is cleaned as upstream cleans it, quirks included."""

from __future__ import annotations

import pytest

from tortoise_jax.errors import UserError
from tortoise_jax.text.cleaners import clean, clean_basic, clean_english, letters_changed


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
def test_english_cleaner(text, cleaned):
    assert clean_english(text) == cleaned


def test_numbers_without_a_name_are_read_digit_by_digit():
    assert clean_english("1" * 36).startswith("one hundred eleven decillion")
    assert clean_english("10" * 19) == " ".join(["one", "zero"] * 19)
    assert clean_english("1" * 36 + "2nd") == "one " * 36 + "two"
    assert clean_english("7" * 5000).count("seven") == 5000  # more digits than int() takes


def test_basic_cleaner_keeps_the_letters():
    assert clean_basic(" Ünder\n DER  Brücke 3 ") == " ünder der brücke 3 "


def test_an_unknown_cleaner_is_refused_with_a_suggestion():
    with pytest.raises(UserError, match=r'unknown cleaner "englsh".*did you mean "english".*english, basic, none'):
        clean("x", "englsh")


def test_letters_of_another_language_are_reported():
    assert letters_changed("Plain English, “quoted” — £20 for 2½ kilos!") == {}
    assert letters_changed("ÜBER die Brücke") == {"Ü": "u", "ü": "u"}
    assert letters_changed("cafe\u0301") == {"é": "e"}  # composed first
    assert letters_changed("नमस्ते")["न"] == "n"
    assert letters_changed("Über", cleaner="basic") == {}
