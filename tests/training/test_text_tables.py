"""Text tables for another tokenizer: what both know keeps its rows, start stays start, and nothing else moves."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from tests.support import runs
from tortoise_jax.api import Tortoise
from tortoise_jax.audio import default_mel_norms
from tortoise_jax.checkpoints.parts import Part, abstract_tree
from tortoise_jax.checkpoints.pretrained import Pretrained
from tortoise_jax.text import bpe
from tortoise_jax.text.tokenizer import STOP_ID, Tokenizer
from tortoise_jax.training import text_tables

OLD = Tokenizer.default()
NEW = bpe.train(["zwölf große Äpfel über die Brücke", "ich fühle den Wind"], "basic", 70)


@pytest.fixture(scope="module")
def before() -> Pretrained:
    params = runs.random_params(abstract_tree(runs.AR), 3)
    return Pretrained({"ar": Part.of_tree(runs.AR, params)}, OLD, default_mel_norms(), {})


@pytest.fixture(scope="module")
def after(before: Pretrained) -> Pretrained:
    return text_tables.with_tokenizer(before, NEW)


def row(pretrained: Pretrained, id_: int) -> np.ndarray:
    """All that the tables say of a token: its vector, the head's column and bias."""
    vectors, head = pretrained.ar.params["text_embedding"]["embedding"], pretrained.ar.params["text_head"]
    return np.concatenate([vectors[id_], head["kernel"][:, id_], head["bias"][id_ : id_ + 1]])


def test_known_tokens_keep_their_rows_and_start_stays_start(before: Pretrained, after: Pretrained) -> None:
    assert after.tokenizer is NEW
    assert after.ar.config == dataclasses.replace(runs.AR, text_tokens=NEW.vocab_size + 1)
    old_ids = {OLD.token(id_): id_ for id_ in range(OLD.vocab_size)}
    new_ids = {NEW.token(id_): id_ for id_ in range(NEW.vocab_size)}
    shared = old_ids.keys() & new_ids.keys()
    assert {"[STOP]", "[UNK]", "[SPACE]", "e", "z"} <= shared
    assert text_tables.kept(OLD, NEW) == len(shared)
    moved = 0
    for token in shared:
        np.testing.assert_array_equal(row(before, old_ids[token]), row(after, new_ids[token]))
        moved += old_ids[token] != new_ids[token]
    assert moved > 10
    np.testing.assert_array_equal(row(before, runs.AR.start_text), row(after, after.ar.config.start_text))
    np.testing.assert_array_equal(row(before, STOP_ID), row(after, STOP_ID))


def test_a_new_letter_begins_as_what_it_was_read_as(before: Pretrained, after: Pretrained) -> None:
    ids = {NEW.token(id_): id_ for id_ in range(NEW.vocab_size)}
    np.testing.assert_allclose(row(after, ids["ü"]), row(before, OLD.encode("u")[0]), rtol=1e-6)
    np.testing.assert_allclose(
        row(after, ids["ß"]), np.mean([row(before, id_) for id_ in OLD.encode("ss")], axis=0), rtol=1e-5, atol=1e-7
    )


def test_everything_else_is_untouched_and_known_texts_sound_the_same(before: Pretrained, after: Pretrained) -> None:
    of_tables = ("text_embedding", "text_head")
    rest = [{k: v for k, v in one.ar.params.items() if k not in of_tables} for one in (before, after)]
    jax.tree.map(np.testing.assert_array_equal, *rest)
    letters = [OLD.encode(letter)[0] for letter in "hallo"], [NEW.encode(letter)[0] for letter in "hallo"]
    codes, voice = [3, 1, 4, 1, 5], 0.1 * np.ones((1, runs.AR.width), np.float32)
    models = [Tortoise(before), Tortoise(after)]
    losses = [model.losses(voice, model.batch([(ids, codes)])) for model, ids in zip(models, letters, strict=True)]
    assert losses[0]["mel"] == pytest.approx(losses[1]["mel"], rel=1e-6)


def test_a_second_tokenizer_follows_the_first(after: Pretrained) -> None:
    """A run that speaks German already goes on with more letters."""
    larger = bpe.train(["zwölf große Äpfel", "Ñandú"], "basic", 120)
    grown = text_tables.with_tokenizer(after, larger)
    ids = {larger.token(id_): id_ for id_ in range(larger.vocab_size)}
    german = {NEW.token(id_): id_ for id_ in range(NEW.vocab_size)}
    np.testing.assert_array_equal(row(grown, ids["ö"]), row(after, german["ö"]))
    np.testing.assert_array_equal(row(grown, grown.ar.config.start_text), row(after, after.ar.config.start_text))
