"""From clips and what judges say of them to rows of a table, and from the rows to advice."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tortoise_jax.evaluation import measures
from tortoise_jax.evaluation.judges import JUDGES, LIKENESS, QUALITY, WORDS, Answers, UnavailableError
from tortoise_jax.evaluation.sounds import COPIES, OTHERS, RECORDINGS, Sounds
from tortoise_jax.training.run_directory import History


@dataclasses.dataclass(frozen=True)
class Column:
    """form: how its numbers are printed."""

    title: str
    form: str


COLUMNS = {
    "loss": Column("held-out loss", "{:.3f}"),
    "stops": Column("stop", "{:.0%}"),
    "silence": Column("silence, s", "{:.2f}"),
    WORDS: Column("word errors", "{:.0%}"),
    LIKENESS: Column("likeness", "{:.2f}"),
    QUALITY: Column("quality", "{:.2f}"),
    "pitch": Column("pitch, Hz", "{:.0f}"),
    "pace": Column("letters/s", "{:.1f}"),
}
# What the advice goes by, in this order, and how much worse than the best is as good, for the differences that chance
# makes between a few dozen words and clips.
COUNTED = {"stops": 0.05, WORDS: 0.05, QUALITY: 0.2, LIKENESS: 0.02}
LESS_IS_BETTER = (WORDS, "loss")
DEAF = 0.5  # of the words of true recordings: a recogniser that gets more of them wrong is not believed


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table. step: of a checkpoint; values: by column, None where unknown."""

    name: str
    values: dict[str, float | None]
    step: int | None = None


@dataclasses.dataclass(frozen=True)
class Opinions:
    """What judges say of all clips that are evaluated, by judge; why the others say nothing."""

    answers: dict[str, Answers]
    missing: dict[str, str]

    def of(self, judge: str, first: int, end: int) -> list[Any]:
        """Of the clips number `first` to `end`; nothing where the judge is missing."""
        return self.answers[judge].of_clips[first:end] if judge in self.answers else []


def ask_all(ask: Callable[[str, Sequence[np.ndarray]], Answers], waveforms: Sequence[np.ndarray]) -> Opinions:
    """Asks each judge once, for all clips (samples,)."""
    answers, missing = {}, {}
    for judge in JUDGES:
        try:
            answers[judge] = ask(judge, waveforms)
        except UnavailableError as error:
            missing[judge] = str(error)
    return Opinions(answers, missing)


def notes(opinions: Opinions) -> list[str]:
    """A line on each judge."""
    present = [f"{judge}: {answers.by}" for judge, answers in opinions.answers.items()]
    return present + [f"{judge}: left out: {why}" for judge, why in opinions.missing.items()]


def held_out_losses(run: Path) -> dict[int, float]:
    """By step, of those of a run's evaluations that were finite."""
    return {step: loss for step, loss in History.to_read(run).curve("validation", "total") if math.isfinite(loss)}


def rows_of(sounds: Sequence[Sounds], opinions: Opinions, cleaner: str, losses: Mapping[int, float]) -> list[Row]:
    """A row for each of sounds, of which the speaker's recordings are the first."""
    rows, first = [], 0
    of_recordings = opinions.of(LIKENESS, 0, len(sounds[0].waveforms))
    for one in sounds:
        end = first + len(one.waveforms)
        judged = {
            WORDS: error_rate(one, opinions.of(WORDS, first, end), cleaner),
            LIKENESS: mean(likeness(one, opinions.of(LIKENESS, first, end), of_recordings)),
            QUALITY: mean(opinions.of(QUALITY, first, end)),
        }
        loss = losses.get(one.step) if one.step is not None else None
        rows.append(Row(one.name, {"loss": loss} | measured(one, cleaner) | judged, one.step))
        first = end
    return rows


def measured(sounds: Sounds, cleaner: str) -> dict[str, float | None]:
    """What needs no judge."""
    texts = [" ".join(measures.words_of(sentence.text, cleaner)) for sentence in sounds.sentences]
    paces = [measures.pace(text, waveform) for text, waveform in zip(texts, sounds.waveforms, strict=True) if text]
    return {
        "stops": mean(sounds.stopped) if sounds.stopped is not None else None,
        "silence": mean([measures.trailing_silence(waveform) for waveform in sounds.waveforms]),
        "pitch": middle([measures.pitch(waveform) for waveform in sounds.waveforms]),
        "pace": middle(paces),
    }


def error_rate(sounds: Sounds, said: Sequence[str | None], cleaner: str) -> float | None:
    """Wrong words of all clips over the words of their texts; None where nobody recognised any, or there is no text."""
    expected = [measures.words_of(sentence.text, cleaner) for sentence in sounds.sentences]
    if not said or not any(expected):
        return None
    heard = [measures.words_of(one or "", cleaner) for one in said]
    wrong = sum(measures.word_errors(one, right) for one, right in zip(heard, expected, strict=True))
    return wrong / sum(map(len, expected))


def likeness(sounds: Sounds, embeddings: Sequence[Any], of_recordings: Sequence[Any]) -> list[float]:
    """Of each clip to the speaker's recordings that say something else."""
    known = [i for i, one in enumerate(of_recordings) if one is not None]
    clips = [i for i, one in enumerate(embeddings) if one is not None]
    if not clips or not known:
        return []
    says = [sounds.sentences[i].recording for i in clips]
    same = [known.index(recording) if recording in known else -1 for recording in says]
    references = np.array([of_recordings[i] for i in known])
    return measures.mean_likeness(np.array([embeddings[i] for i in clips]), references, same).tolist()


def mean(values: Sequence[float | None]) -> float | None:
    finite = finite_ones(values)
    return float(np.mean(finite)) if finite else None


def middle(values: Sequence[float | None]) -> float | None:
    finite = finite_ones(values)
    return float(np.median(finite)) if finite else None


def finite_ones(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


def shown_columns(rows: Sequence[Row]) -> list[str]:
    """Those of which something is known."""
    return [name for name in COLUMNS if any(row.values.get(name) is not None for row in rows)]


def cells(row: Row, columns: Sequence[str]) -> list[str]:
    values = [row.values.get(name) for name in columns]
    return ["" if v is None else COLUMNS[name].form.format(v) for name, v in zip(columns, values, strict=True)]


def as_text(rows: Sequence[Row]) -> str:
    columns = shown_columns(rows)
    lines = [["", *(COLUMNS[name].title for name in columns)], *([row.name, *cells(row, columns)] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        ).rstrip()
        for line in lines
    )


# --- advice -----------------------------------------------------------------------------------------------------------


def advice(rows: Sequence[Row], run: str) -> str:
    """One line: which step to export. rows: as `rows_of` makes them, the recordings' first."""
    steps = [row for row in rows if row.step is not None]
    counted, doubts = believable(rows)
    best = sounds_best(steps, counted)
    of_loss = [row for row in steps if row.values.get("loss") is not None]
    lowest = min(of_loss, key=lambda row: (row.values["loss"], -(row.step or 0)), default=best)
    if best.step == 0:
        found = "no step sounds better than the start: nothing to export"
    else:
        found = (
            f"step {best.step} sounds best: python convert/flax_to_torch.py {run} --step {best.step} --out voice.pth"
        )
    if lowest is not best:
        found += f" (the held-out loss is lowest at step {lowest.step})"
    return "; ".join([found, *doubts])


def believable(rows: Sequence[Row]) -> tuple[dict[str, float], list[str]]:
    """The columns that count; and why others do not, by what a judge says of the recordings or of their codes."""
    named = {row.name: row.values for row in rows}
    missed, others = named[RECORDINGS].get(WORDS), named.get(OTHERS, {}).get(LIKENESS)
    doubts = {}
    if missed is not None and missed > DEAF:
        doubts[WORDS] = f"word errors were not counted, {missed:.0%} of the true recordings' are wrong"
    for name in (RECORDINGS, COPIES):
        own = named.get(name, {}).get(LIKENESS)
        if own is not None and others is not None and own - others < COUNTED[LIKENESS]:
            doubts.setdefault(LIKENESS, f"likeness was not counted, {name} have {own:.2f} and {OTHERS} {others:.2f}")
    return {name: margin for name, margin in COUNTED.items() if name not in doubts}, list(doubts.values())


def sounds_best(steps: Sequence[Row], counted: dict[str, float]) -> Row:
    """Column after column keeps those about as good as the best; then the lowest loss decides, then the first step."""
    left = list(steps)
    for name, margin in counted.items():
        values = {row.step: goodness(row, name) for row in left}
        best = max(values.values())
        left = [row for row in left if values[row.step] >= best - margin] if math.isfinite(best) else left
    return max(left, key=lambda row: (goodness(row, "loss"), -(row.step or 0)))


def goodness(row: Row, name: str) -> float:
    value = row.values.get(name)
    return -math.inf if value is None else -value if name in LESS_IS_BETTER else value
