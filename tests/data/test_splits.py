"""Held-out texts are nowhere trained on, every speaker has his part, and the seed decides."""

from __future__ import annotations

from collections import Counter

import hypothesis
from hypothesis import strategies as st

from tortoise_jax.data.splits import TRAIN, VALIDATION, assign_splits, moved_to_validation

CLIPS = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 40).map(str)), min_size=1, max_size=120)


def split(clips: list[tuple[str, str]], given: list[str] | None = None, seed: int = 0, part: float = 0.1) -> list[str]:
    return assign_splits([s for s, _ in clips], [t for _, t in clips], given or [""] * len(clips), seed, part)


@hypothesis.given(CLIPS, st.integers(0, 9), st.sampled_from([0.05, 0.3]))
@hypothesis.settings(max_examples=200)
def test_no_text_is_in_both_and_nobody_is_left_without_training(clips, seed, part):
    found = split(clips, seed=seed, part=part)
    texts = {
        name: {text for (_, text), s in zip(clips, found, strict=True) if s == name} for name in (TRAIN, VALIDATION)
    }
    assert not texts[TRAIN] & texts[VALIDATION]
    trained = {speaker for (speaker, _), s in zip(clips, found, strict=True) if s == TRAIN}
    assert trained == {speaker for speaker, _ in clips}


@hypothesis.given(CLIPS, st.lists(st.sampled_from(["", TRAIN, VALIDATION]), min_size=120, max_size=120))
def test_lines_that_ask_are_held_out(clips, given):
    given = given[: len(clips)]
    found = split(clips, given)
    assert all(s == VALIDATION for s, wanted in zip(found, given, strict=True) if wanted == VALIDATION)
    held = {text for (_, text), wanted in zip(clips, given, strict=True) if wanted == VALIDATION}
    if held:
        assert found == [VALIDATION if text in held else TRAIN for _, text in clips]


def test_every_speaker_has_his_part():
    clips = [(speaker, f"{speaker}{i}") for speaker, count in (("a", 1000), ("b", 100), ("c", 3)) for i in range(count)]
    held = Counter(speaker for (speaker, _), s in zip(clips, split(clips), strict=True) if s == VALIDATION)
    assert held == {"a": 100, "b": 10, "c": 1}


def test_texts_read_by_everyone_are_held_out_for_everyone():
    clips = [(speaker, str(i)) for speaker in "abcd" for i in range(50)]
    found = split(clips)
    assert Counter(found) == {TRAIN: 180, VALIDATION: 20}


def test_the_seed_decides_and_more_clips_move_few():
    clips = [("a", str(i)) for i in range(500)]
    assert split(clips) == split(clips) != split(clips, seed=1)
    shuffled = list(reversed(clips))
    assert list(reversed(split(shuffled))) == split(clips)
    more = split([*clips, *(("a", f"new {i}") for i in range(50))])[:500]
    assert sum(a != b for a, b in zip(split(clips), more, strict=True)) <= 10


def test_without_a_part_nothing_is_held_out():
    clips = [("a", str(i)) for i in range(20)]
    assert set(split(clips, part=0)) == {TRAIN}
    assert split([("a", "same")] * 5) == [TRAIN] * 5


def test_train_lines_of_a_held_out_text_are_counted():
    given = [TRAIN, TRAIN, VALIDATION, ""]
    found = split([("a", "x"), ("a", "y"), ("a", "x"), ("a", "x")], given)
    assert found == [VALIDATION, TRAIN, VALIDATION, VALIDATION]
    assert moved_to_validation(found, given) == 1
