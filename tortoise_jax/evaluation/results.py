"""What an evaluation leaves in a run: its clips as wav files, evaluation.json, and a section of the report."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tortoise_jax.evaluation.judges import WORDS
from tortoise_jax.evaluation.sounds import COPIES, OTHERS, RECORDINGS, Sounds
from tortoise_jax.evaluation.table import COLUMNS, Opinions, Row, cells, shown_columns
from tortoise_jax.files import write_atomically, write_json
from tortoise_jax.synthesis.drafts import write_wav
from tortoise_jax.training import report

RESULT = "evaluation.json"
PLAYED = 4  # sentences in the report; the wav files of the others are beside it
LINES = {
    RECORDINGS: {"color": "green", "linewidth": 1},
    COPIES: {"color": "green", "linestyle": "--", "linewidth": 1},
    OTHERS: {"color": "red", "linestyle": ":", "linewidth": 1},
}
PANELS = 4  # side by side


@dataclasses.dataclass(frozen=True)
class Findings:
    """rows of the table, a line of advice, and notes on who judged what."""

    rows: list[Row]
    advice: str
    notes: list[str]


def leave(run: Path, found: Findings, evaluated: Sequence[Sounds], opinions: Opinions) -> str:
    """Writes all of it, evaluation.json last but for the report; returns a line that says where."""
    clips = write_clips(run, evaluated, opinions)
    write_atomically(run / report.EVALUATION, section(run, found, clips))
    rows = [{"name": row.name, "step": row.step, **row.values} for row in found.rows]
    write_json(run / RESULT, {"advice": found.advice, "rows": rows, "notes": found.notes, "clips": clips})
    reported = report.rewrite(run)
    rest = f"{run / report.REPORT} plays them" if reported else "the report comes when the run has ended"
    return f"{run / RESULT}; {len(clips)} clips in {(run / report.EVALUATION).parent}; {rest}"


def write_clips(run: Path, evaluated: Sequence[Sounds], opinions: Opinions) -> list[dict[str, Any]]:
    """A wav file of each clip that says a sentence; returns what is known of each."""
    heard = iter(opinions.answers[WORDS].of_clips if WORDS in opinions.answers else ())
    clips = []
    for one in evaluated:
        for i, (sentence, waveform) in enumerate(zip(one.sentences, one.waveforms, strict=True)):
            words = next(heard, None)
            if not sentence.text:
                continue
            file = f"{Path(report.EVALUATION).parent}/{one.name.replace(' ', '-')}-{i + 1:02d}.wav"
            write_wav(run / file, waveform)
            stopped = one.stopped[i] if one.stopped is not None else None
            clips.append({"row": one.name, "text": sentence.text, "file": file, "stopped": stopped, "heard": words})
    return clips


def section(run: Path, found: Findings, clips: Sequence[dict[str, Any]]) -> str:
    columns = shown_columns(found.rows)
    titles = ["", *(COLUMNS[name].title for name in columns)]
    lines = [[row.name, *cells(row, columns)] for row in found.rows]
    notes = "".join(f"<li>{html.escape(note)}" for note in found.notes)
    advice = f"<p class=remark>{html.escape(found.advice)}</p>"
    return f"{advice}{table([titles, *lines])}<ul>{notes}</ul>{plots(found.rows)}{players(run, clips)}"


def table(lines: Sequence[Sequence[str]]) -> str:
    """The first line and the first cell of each are titles."""
    return (
        "<div class=wide><table>"
        + "".join(f"<tr><th>{first}" + "".join(f"<td>{cell}" for cell in rest) for first, *rest in lines)
        + "</table></div>"
    )


def plots(rows: Sequence[Row]) -> str:
    """Each column over steps, with lines where the recordings and their codes are."""
    from matplotlib.figure import Figure

    steps = [row for row in rows if row.step is not None]
    columns = shown_columns(steps)
    height = -(-len(columns) // PANELS)
    figure = Figure(figsize=(11, 2.6 * height), layout="constrained")
    for axes, name in zip(figure.subplots(height, PANELS, squeeze=False).flat, columns, strict=False):
        points = [(row.step, row.values[name]) for row in steps if row.values.get(name) is not None]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label="drafts")
        for row in rows:
            if row.name in LINES and row.values.get(name) is not None:
                axes.axhline(row.values[name], label=row.name, **LINES[row.name])
        axes.set(title=COLUMNS[name].title, xlabel="step")
        axes.grid(alpha=0.3)
    for axes in figure.axes[len(columns) :]:
        axes.remove()
    fullest = max(figure.axes, key=lambda axes: len(axes.lines))
    figure.legend(*fullest.get_legend_handles_labels(), loc="outside lower center", ncols=len(LINES) + 1, frameon=False)
    return report.svg(figure)


def players(run: Path, clips: Sequence[dict[str, Any]]) -> str:
    """The sentences that most rows say, first of all those that the recordings say too."""
    files: dict[str, dict[str, str]] = {}
    for clip in clips:
        files.setdefault(clip["text"], {})[clip["row"]] = clip["file"]
    played = sorted(files, key=lambda text: -len(files[text]))[:PLAYED]
    rows = list(dict.fromkeys(clip["row"] for clip in clips))
    lines = [
        [html.escape(text), *(report.player(run / files[text][row]) if row in files[text] else "" for row in rows)]
        for text in played
    ]
    return table([["", *rows], *lines])
