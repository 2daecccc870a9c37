"""The tokenizer against ids that TorToiSe's own tokenizer gave, and on any text at all."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from tortoise_jax.errors import UserError
from tortoise_jax.text.cleaners import CLEANERS, clean, clean_tortoise
from tortoise_jax.text.tokenizer import STOP_ID, Tokenizer

REFERENCE = json.loads((Path(__file__).parent / "tokenizer.json").read_text(encoding="utf-8"))
MERGES = "characters abc\na b\nab c\n"
TOKENIZER = Tokenizer.default()

any_text = st.text(st.characters(exclude_categories=()), max_size=60)  # lone surrogates too
english_text = st.text(st.sampled_from("abcxyz AZ 0123456789 $£.,-'\"!?:;()/—é\t\n"), max_size=60)


@pytest.mark.parametrize("row", REFERENCE, ids=lambda row: row["text"][:20])
def test_ids_equal_upstreams(row):
    assert TOKENIZER.encode(row["text"]) == row["ids"]


def test_the_default_table():
    assert TOKENIZER.vocab_size == 255
    assert TOKENIZER.decode([3, 13, 14, 39, 2, 40]) == "!?az th"
    assert TOKENIZER.unknown_id == 1


def test_unknown_characters_come_in_order_and_once():
    assert TOKENIZER.unknown_characters("100% of e-mail @home #1 & 5%") == ["%", "@", "#", "&"]
    assert TOKENIZER.unknown_characters("Plain text, £20!") == []
    assert TOKENIZER.unknown_characters("a\tB", "none") == ["\t", "B"]


@example(text="\ud800 half a surrogate pair", cleaner="none")
@given(text=any_text, cleaner=st.sampled_from(sorted(CLEANERS)))
def test_any_text_can_be_encoded(text, cleaner):
    ids = TOKENIZER.encode(text, cleaner)
    assert STOP_ID not in ids
    assert all(0 < id_ < TOKENIZER.vocab_size for id_ in ids)
    unknown = TOKENIZER.unknown_characters(text, cleaner)
    assert unknown or TOKENIZER.unknown_id not in ids
    assert unknown or TOKENIZER.decode(ids) == clean(text, cleaner)


@given(text=english_text)
def test_english_text_survives_encoding(text):
    known = clean_tortoise(text).replace("$", "")
    assert TOKENIZER.decode(TOKENIZER.encode_cleaned(known)) == known


@pytest.mark.parametrize("token", ["[STOP]", "[UNK]", "[SPACE]"])
def test_special_tokens_in_a_text_are_text(token):
    ids = TOKENIZER.encode(token, "none")
    assert ids == [TOKENIZER.unknown_id] * len(token)
    assert Tokenizer.from_json(TOKENIZER.to_json()).encode(token, "none") == ids


def test_decoding_shows_unknown_characters_and_hides_stops():
    assert TOKENIZER.decode([*TOKENIZER.encode("a#b"), STOP_ID]) == "a[UNK]b"
    for bad in (255, -1):
        with pytest.raises(UserError, match=f"text id {bad} is not in the tokenizer, which has ids 0 to 254"):
            TOKENIZER.decode([14, bad])


def test_json_is_what_tortoise_reads():
    upstream = tokenizers.Tokenizer.from_str(TOKENIZER.to_json())
    for row in REFERENCE:
        assert upstream.encode(clean_tortoise(row["text"]).replace(" ", "[SPACE]")).ids == row["ids"]


def test_saved_copied_and_shipped_to_a_worker(tmp_path):
    (tmp_path / "tokenizer.json").write_text(TOKENIZER.to_json(), encoding="utf-8")
    for other in (Tokenizer.from_file(tmp_path / "tokenizer.json"), pickle.loads(pickle.dumps(TOKENIZER))):
        assert other.digest == TOKENIZER.digest
        assert other.encode("[STOP] the end", "none") == TOKENIZER.encode("[STOP] the end", "none")


def test_digest_follows_everything_that_decides_ids():
    base = Tokenizer.from_merges(MERGES)
    content = json.loads(base.to_json())
    changed = [
        Tokenizer.from_merges(MERGES.replace("abc", "abd").replace("ab c", "ab d")),
        Tokenizer.from_merges("characters abc\nb c\na b\n"),
        Tokenizer.from_merges("characters abc\na b\nb c\n"),
        Tokenizer.from_json(json.dumps(content | {"normalizer": {"type": "Lowercase"}})),
        Tokenizer.from_json(json.dumps(content | {"pre_tokenizer": {"type": "WhitespaceSplit"}})),
    ]
    assert len({base.digest, *(tokenizer.digest for tokenizer in changed)}) == 1 + len(changed)
    # Older versions of the library write a merge as one string.
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    assert Tokenizer.from_json(json.dumps(content)).digest == base.digest


def test_digest_of_the_default_tokenizer_does_not_change():
    # Data sets are keyed by it: a new value makes every prepared one stale.
    assert TOKENIZER.digest == "db1206f16ebb87e997641251483a3d1550f7c8272c90910ae6d5af5cc78d5ea9"


def _bpe(tokens: list[str]) -> str:
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="[UNK]")).to_str()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", 't.txt:1: not a tokenizer: expected tokenizers JSON, or .* found ""'),
        ("some prose", 't.txt:1: not a tokenizer: .* found "some prose"'),
        ("characters abc\na b\na d\n", 't.txt:3: expected two earlier tokens to merge, found "a d"'),
        ("characters abc\na b c\n", 't.txt:2: expected two earlier tokens to merge, found "a b c"'),
        ("characters abc\na [STOP]\n", "t.txt:2: expected two earlier tokens"),
        ("characters abc\na b\na b\n", 't.txt:3: the merge "a b" makes a token that exists already'),
        ("{}", "t.txt: not a tokenizer of the tokenizers library: "),
        ('{"model": ', "t.txt: not a tokenizer of the tokenizers library: "),
        (_bpe(["[STOP]", "[UNK]", "a"]), r"t.txt: the token \[SPACE\] is missing"),
        (_bpe(["[UNK]", "[STOP]", "[SPACE]"]), r"t.txt: \[STOP\] has id 1, expected 0"),
    ],
)
def test_a_bad_tokenizer_file_is_named(tmp_path, content, message):
    path = tmp_path / "t.txt"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        Tokenizer.from_file(path)


def test_an_unreadable_tokenizer_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.json: cannot be read as a tokenizer: No such file"):
        Tokenizer.from_file(tmp_path / "nowhere.json")
    (tmp_path / "latin").write_bytes(b"characters \xe9\n")
    with pytest.raises(UserError, match="latin: cannot be read as a tokenizer: not UTF-8"):
        Tokenizer.from_file(tmp_path / "latin")


def test_a_merges_file_of_another_language(tmp_path):
    (tmp_path / "merges.txt").write_text("characters éàb\né b\n", encoding="utf-8")
    tokenizer = Tokenizer.from_file(tmp_path / "merges.txt")
    assert tokenizer.vocab_size == 7
    assert tokenizer.encode("Éb À", "basic") == [6, 2, 4]
    assert tokenizer.decode([6, 2, 4]) == "éb à"
