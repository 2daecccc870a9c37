"""Rows from clips and opinions, the printed table, and the one line of advice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tortoise_jax.evaluation import table
from tortoise_jax.evaluation.judges import Answers, UnavailableError
from tortoise_jax.evaluation.sounds import Sentence, Sounds
from tortoise_jax.evaluation.table import Opinions, Row
from tortoise_jax.training.run_directory import History

NOISE = np.random.default_rng(0).standard_normal(8192).astype(np.float32) * 0.1


def sounds(name: str, recordings: Sequence[int], texts: Sequence[str], **more: Any) -> Sounds:
    sentences = [Sentence(text, recording) for text, recording in zip(texts, recordings, strict=True)]
    return Sounds(name, sentences, [NOISE] * len(sentences), **more)


RECORDINGS = sounds("recordings", [0, 1], ["one two", "three"])
DRAFTS = sounds("step 4", [-1, 1], ["four five", "three"], step=4, stopped=[True, False])


def test_rows() -> None:
    answers = {
        "words": Answers(["one two", "tree", "four", None], "a child"),
        "likeness": Answers([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], None], "an ear"),
    }
    opinions = Opinions(answers, {"quality": "not here"})
    true, drafted = table.rows_of([RECORDINGS, DRAFTS], opinions, "tortoise", {4: 2.5})
    assert true.values["words"] == pytest.approx(1 / 3)
    assert drafted.values["words"] == pytest.approx(2 / 3), "who says nothing says no word right"
    assert true.values["likeness"] == pytest.approx(0.8), "each to the other"
    assert drafted.values["likeness"] == pytest.approx((0.6 + 0.96) / 2)
    assert (drafted.values["stops"], drafted.values["loss"], drafted.step) == (0.5, 2.5, 4)
    assert true.values["stops"] is true.values["quality"] is true.values["loss"] is None
    assert table.notes(opinions) == ["words: a child", "likeness: an ear", "quality: left out: not here"]


def test_a_judge_who_cannot_be_asked_leaves_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    def ask(judge: str, waveforms: Sequence[np.ndarray]) -> Answers:
        if judge == "likeness":
            raise UnavailableError("no ears")
        return Answers([None] * len(waveforms), judge)

    opinions = table.ask_all(ask, [NOISE, NOISE])
    assert (list(opinions.answers), opinions.missing) == (["words", "quality"], {"likeness": "no ears"})


def test_the_table_has_no_empty_column() -> None:
    rows = [
        Row("recordings", {"words": 0.02, "pitch": 186.4, "likeness": None}),
        Row("step 120", {"stops": 1.0, "words": 0.125, "pitch": 191.0, "likeness": None}, 120),
    ]
    assert table.as_text(rows).splitlines() == [
        "            stop  word errors  pitch, Hz",
        "recordings                 2%        186",
        "step 120    100%          12%        191",
    ]


def test_a_loss_that_is_not_finite_is_unknown(tmp_path: Path) -> None:
    history = History(tmp_path, 0, writes=True)
    for number, loss in ((0, 2.0), (4, float("nan")), (8, float("inf"))):
        history.add("validation", number, {"total": loss})
    assert table.held_out_losses(tmp_path) == {0: 2.0}


def step(number: int, **values: float) -> Row:
    return Row(f"step {number}", dict(values), number)


TRUE = Row("recordings", {"words": 0.05, "likeness": 0.9})
OTHERS = Row("other speakers", {"likeness": 0.6})


@pytest.mark.parametrize(
    ("rows", "best", "said"),
    [
        # One that does not stop is no good, however like the speaker it is.
        ([step(0, stops=1, likeness=0.7), step(5, stops=0.5, likeness=0.9)], 0, "no step sounds better than the start"),
        # Words come before likeness, but not by a hair.
        ([step(3, words=0.1, likeness=0.8), step(5, words=0.3, likeness=0.9)], 3, "--step 3 --out voice.pth"),
        ([step(3, words=0.1, likeness=0.8), step(5, words=0.12, likeness=0.9)], 5, "--step 5 --out voice.pth"),
        # The losses do not say it, but decide between equals.
        ([step(3, quality=3, loss=2.0), step(5, quality=2, loss=1.0)], 3, "the held-out loss is lowest at step 5"),
        ([step(3, quality=3, loss=2.0), step(5, quality=2.9, loss=1.0)], 5, "--step 5"),
        ([step(3, quality=3), step(5, quality=3)], 3, "--step 3"),
        # Nobody judged.
        ([step(0, stops=1.0, loss=2.0), step(5, stops=1.0, loss=1.0)], 5, "--step 5"),
        # What could not be judged of one step is no advantage.
        ([step(3, stops=1.0), step(5, stops=1.0, likeness=0.5)], 5, "--step 5"),
    ],
)
def test_advice(rows: list[Row], best: int, said: str) -> None:
    assert table.sounds_best(rows, table.COUNTED).step == best
    line = table.advice([TRUE, OTHERS, *rows], "runs/voice")
    assert said in line
    assert "\n" not in line


def test_judges_who_are_wrong_about_recordings_do_not_count() -> None:
    rows = [step(3, words=0.9, likeness=0.95, loss=2.0), step(5, words=0.5, likeness=0.5, loss=1.0)]
    deaf = Row("recordings", {"words": 0.6, "likeness": 0.6})
    line = table.advice([deaf, OTHERS, *rows], "run")
    assert "step 5 sounds best" in line
    assert "60% of the true recordings' are wrong" in line
    assert "likeness was not counted, recordings have 0.60 and other speakers 0.60" in line
    through_codes = [TRUE, Row("their codes", {"likeness": 0.5}), OTHERS, *rows]
    assert "likeness was not counted, their codes have 0.50" in table.advice(through_codes, "run")
    assert "step 3 sounds best" in table.advice([Row("recordings", {"words": 0.6}), *rows], "run")
