"""What became of every line of the inputs: a table to read, two files and a picture to keep."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tortoise_jax.audio import SAMPLE_RATE
from tortoise_jax.data.filters import REASONS, Changed, Kept, Rejection, Verdict
from tortoise_jax.data.manifests import Input
from tortoise_jax.data.splits import TRAIN, VALIDATION, moved_to_validation
from tortoise_jax.files import write_atomically

REPORT, REJECTED, PICTURE = "report.json", "rejected.tsv", "report.png"
EXAMPLES = 3
KEPT, GONE = "#4878a8", "#c44e52"
LISTED = 20  # rejected lines shown where no file is written


def make_report(
    inputs: Sequence[Input], verdict: Verdict, splits: Sequence[str], alone: int, settings: dict[str, Any]
) -> dict[str, Any]:
    """Everything counted, as JSON. splits: of the kept clips; alone: train clips without another of their speaker."""
    kept, rejected = verdict.kept, verdict.rejected
    return {
        "inputs": [{"path": str(i.path), "format": i.format, "lines": len(i.lines)} for i in inputs],
        "lines": len(kept) + len(rejected),
        "kept": _amount([one.sound.seconds for one in kept]),
        "rejected": _amount([one.seconds for one in rejected]),
        "reasons": {
            reason: _amount([one.seconds for one in rejected if one.reason == reason])
            for reason in REASONS
            if any(one.reason == reason for one in rejected)
        },
        "trimmed": _amount([one.sound.trimmed / SAMPLE_RATE for one in kept if one.sound.trimmed]),
        "splits": {name: _of_split(kept, splits, name) for name in (TRAIN, VALIDATION)},
        "speakers": _speakers(kept, splits),
        "seconds": _spread([one.sound.seconds for one in kept]),
        "text_tokens": _spread([len(one.text_ids) for one in kept]),
        "loudness_db": _spread([one.sound.loudness_db for one in kept]),
        "changed_letters": _changed(verdict.changed),
        "conditioned_on_themselves": alone,
        "warnings": warnings(inputs, verdict, splits, alone, settings["cleaner"]),
        "settings": settings,
    }


def warnings(inputs: Sequence[Input], verdict: Verdict, splits: Sequence[str], alone: int, cleaner: str) -> list[str]:
    """What a person should know although nothing was rejected for it, a sentence each."""
    kept = verdict.kept
    found = [note for one in inputs for note in one.notes]
    if verdict.changed:
        found.append(_foreign(verdict.changed, len(kept), cleaner))
    cut = [one.line for one in kept if one.sound.ends_abruptly]
    if cut:
        found.append(
            f"{_clips(len(cut))} end{'s' if len(cut) == 1 else ''} while somebody still speaks, e.g. {cut[0].where}: "
            "a last syllable may be cut off, and the model would learn that; listen to some"
        )
    moved = moved_to_validation(splits, [one.line.split for one in kept])
    if moved:
        found.append(f"{_clips(moved)} of the train split moved to validation: a text of it is held out")
    if kept and VALIDATION not in splits:
        found.append("nothing is held out for validation: there is no text that no speaker would miss")
    if alone:
        found.append(f"{_clips(alone)} with no other of the speaker: conditioned on themselves in training")
    return found


def _foreign(changed: Sequence[Changed], clips: int, cleaner: str) -> str:
    letters: dict[str, str] = {}
    for one in changed:
        letters |= one.letters
    shown = ", ".join(f'{before} to "{after}"' for before, after in list(letters.items())[:8])
    examples = "; ".join(f'"{_short(one.before)}" becomes "{_short(one.after)}"' for one in changed[:EXAMPLES])
    return (
        f"the {cleaner} cleaner changes letters in {len(changed)} of {clips} texts ({shown}): {examples}. "
        "If this is not English: --cleaner basic and a --tokenizer for the language"
    )


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:59] + "…"


def _clips(count: int) -> str:
    return f"{count} clip{'' if count == 1 else 's'}"


def _amount(seconds: Sequence[float]) -> dict[str, Any]:
    return {"lines": len(seconds), "hours": round(sum(seconds) / 3600, 6)}


def _of_split(kept: Sequence[Kept], splits: Sequence[str], name: str) -> dict[str, Any]:
    return _amount([one.sound.seconds for one, split in zip(kept, splits, strict=True) if split == name])


def _speakers(kept: Sequence[Kept], splits: Sequence[str]) -> dict[str, Any]:
    clips = Counter(one.line.speaker for one in kept)
    held = Counter(one.line.speaker for one, split in zip(kept, splits, strict=True) if split == VALIDATION)
    seconds = dict.fromkeys(clips, 0.0)
    for one in kept:
        seconds[one.line.speaker] += one.sound.seconds
    return {
        name: {"lines": clips[name], "validation": held[name], "hours": round(seconds[name] / 3600, 6)}
        for name in sorted(clips)
    }


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {
        "min": round(min(values), 2),
        "median": round(float(np.median(values)), 2),
        "mean": round(float(np.mean(values)), 2),
        "max": round(max(values), 2),
    }


def _changed(changed: Sequence[Changed]) -> dict[str, Any]:
    examples = [{"where": one.line.where, "before": one.before, "after": one.after} for one in changed[:EXAMPLES]]
    return {"lines": len(changed), "examples": examples}


# --- to read ----------------------------------------------------------------------------------------------------------


def table(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    rows = [("", "clips", "h:mm:ss")]
    rows += [(f"  {name}", *_cells(amount)) for name, amount in report["splits"].items()]
    rows.insert(1, ("kept", *_cells(report["kept"])))
    if report["settings"]["trim_silence"]:
        rows.append(("  silence cut off their ends", *_cells(report["trimmed"])))
    rows.append(("rejected", *_cells(report["rejected"])))
    by_count = sorted(report["reasons"].items(), key=lambda item: -item[1]["lines"])
    rows += [(f"  {reason}", *_cells(amount)) for reason, amount in by_count]
    lines = [f"{name:32}{clips:>9}{duration:>12}" for name, clips, duration in rows]
    lines[0] = f"{_inputs(report)}\n{lines[0]}"
    if report["seconds"]:
        lines.append(_spreads(report))
    lines += [f"warning: {warning}" for warning in report["warnings"]]
    return "\n".join(lines)


def _cells(amount: dict[str, Any]) -> tuple[str, str]:
    minutes, seconds = divmod(round(amount["hours"] * 3600), 60)
    return f"{amount['lines']}", f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def _inputs(report: dict[str, Any]) -> str:
    return "\n".join(f"{i['path']}: {i['lines']} lines, read as {i['format']}" for i in report["inputs"])


def _spreads(report: dict[str, Any]) -> str:
    names = {"seconds": "seconds", "text_tokens": "text tokens", "loudness_db": "loudness (dB)"}
    spreads = [f"{label} {report[key]['min']:g} to {report[key]['max']:g}" for key, label in names.items()]
    count = len(report["speakers"])
    return f"{'; '.join(spreads)}; {count} speaker{'' if count == 1 else 's'}"


def listing(rejected: Sequence[Rejection], limit: int = LISTED) -> str:
    """The first rejected lines, one a line."""
    lines = [f"{one.line.where}: {one.reason}: {one.detail}" for one in rejected[:limit]]
    if len(rejected) > limit:
        lines.append(f"… and {len(rejected) - limit} more")
    return "\n".join(lines)


# --- to keep ----------------------------------------------------------------------------------------------------------


def write_report(out: Path, report: dict[str, Any], verdict: Verdict, limits: dict[str, float]) -> None:
    """Three files. limits: of "seconds", "text_tokens" and "loudness_db", drawn into the picture as lines."""
    write_atomically(out / REPORT, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    write_atomically(out / REJECTED, rejected_tsv(verdict.rejected))
    write_atomically(out / PICTURE, picture(verdict, limits))


def rejected_tsv(rejected: Sequence[Rejection]) -> str:
    """Every rejected line: file, line, reason, detail, recording, text."""
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(("file", "line", "reason", "detail", "recording", "text"))
    for one in rejected:
        line = one.line
        writer.writerow((line.file, line.number, one.reason, one.detail, line.audio, line.text))
    return text.getvalue()


def picture(verdict: Verdict, limits: dict[str, float]) -> bytes:
    """Histograms of duration, text length and loudness of what was kept, as png."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kept = verdict.kept
    values: dict[str, tuple[str, list[Any], tuple[float, float]]] = {
        "seconds": ("duration (s)", [one.sound.seconds for one in kept], (0.0, 1.25 * limits["seconds"])),
        "text_tokens": ("text (tokens)", [len(one.text_ids) for one in kept], (0.0, 1.25 * limits["text_tokens"])),
        "loudness_db": ("loudness (dB of full scale)", [one.sound.loudness_db for one in kept], (-72.0, 0.0)),
    }
    durations = [one.seconds for one in verdict.rejected if one.seconds]
    figure = Figure(figsize=(12, 3.5))
    FigureCanvasAgg(figure)
    figure.subplots_adjust(left=0.05, right=0.99, bottom=0.15, top=0.97, wspace=0.2)
    for axes, (key, (label, numbers, (low, high))) in zip(figure.subplots(1, 3), values.items(), strict=True):
        edges = np.linspace(low, high, 51)
        count = lambda found, edges=edges: np.histogram(np.clip(found, edges[0], edges[-1]), edges)[0]  # outliers: edge
        axes.stairs(count(numbers), edges, fill=True, color=KEPT, label="kept")
        if key == "seconds" and durations:
            both = count(numbers) + count(durations)
            axes.stairs(both, edges, baseline=count(numbers), fill=True, color=GONE, label="rejected")
        axes.axvline(limits[key], color="black", linestyle="--", linewidth=1, label=f"limit {limits[key]:g}")
        axes.legend(frameon=False, fontsize=8)
        axes.set(xlabel=label, ylabel="clips")
        axes.spines[["top", "right"]].set_visible(False)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100, metadata={"Software": None})
    return content.getvalue()
