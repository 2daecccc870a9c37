"""What became of every line of the inputs: a table for the terminal, and two files and a picture."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tortoise_jax.audio import SAMPLE_RATE
from tortoise_jax.data.clips import Clip
from tortoise_jax.data.filters import Reason
from tortoise_jax.data.manifests import Input
from tortoise_jax.data.splits import SPLITS, VALIDATION
from tortoise_jax.errors import count_of, escaped, hours_in_words
from tortoise_jax.files import write_atomically
from tortoise_jax.text.cleaners import letters_changed

REPORT, REJECTED, PICTURE = "report.json", "rejected.tsv", "report.png"
EXAMPLES = 3
KEPT, GONE = "#4878a8", "#c44e52"
MUCH_MORE = 1.5  # held out than asked for: so many times


Changed = list[tuple[Clip, dict[str, str]]]  # clips, each with the letters of its text that the cleaner changed


def make_report(
    inputs: Sequence[Input],
    kept: Sequence[Clip],
    rejected: Sequence[Clip],
    moved: int,
    alone: int,
    part: float | None,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Everything counted, as JSON.

    moved: kept clips that the inputs put into the train split, but whose text is held out; alone: train clips without
    another clip of their speaker in that split; part: of the clips to hold out, None where their lines say which.
    """
    changed = [(clip, letters) for clip in kept if (letters := letters_changed(clip.text, settings["cleaner"]))]
    by_reason = {reason: [clip for clip in rejected if clip.reason == reason] for reason in Reason}
    return {
        "inputs": [{"path": str(i.path), "format": i.format, "lines": len(i.clips)} for i in inputs],
        "lines": len(kept) + len(rejected),
        "kept": _amount(kept),
        "rejected": _amount(rejected),
        "reasons": {reason.value: _amount(clips) for reason, clips in by_reason.items() if clips},
        "trimmed": _amount_of([clip.sound.trimmed / SAMPLE_RATE for clip in kept if clip.sound.trimmed]),
        "splits": {name: _amount([clip for clip in kept if clip.split == name]) for name in SPLITS},
        "speakers": _speakers(kept),
        "seconds": _spread([clip.seconds for clip in kept]),
        "text_tokens": _spread([clip.text_tokens for clip in kept]),
        "loudness_db": _spread([clip.sound.loudness_db for clip in kept]),
        "changed_letters": _changed(changed),
        "conditioned_on_themselves": alone,
        "warnings": warnings(inputs, kept, changed, moved, alone, part, settings["cleaner"]),
        "settings": settings,
    }


def warnings(
    inputs: Sequence[Input],
    kept: Sequence[Clip],
    changed: Changed,
    moved: int,
    alone: int,
    part: float | None,
    cleaner: str,
) -> list[str]:
    """What a user should know although no clip is rejected for it, one sentence each."""
    found = [warning for one in inputs for warning in one.warnings]
    if changed:
        found.append(_foreign(changed, len(kept), cleaner))
    cut = [clip for clip in kept if clip.sound.ends_abruptly]
    if cut:
        found.append(
            f"{_clips(len(cut))} end{'s' if len(cut) == 1 else ''} while somebody still speaks, e.g. {cut[0].where}: "
            "a last syllable may be cut off, and the model would learn that; listen to some"
        )
    if moved:
        found.append(f"{_clips(moved)} of the train split moved to validation: the same text is held out there")
    held_out = sum(clip.split == VALIDATION for clip in kept)
    if part is not None and held_out > max(1, MUCH_MORE * part * len(kept)):
        found.append(
            f"{held_out / len(kept):.0%} of the clips are held out ({held_out} of {len(kept)}), --validation asks for "
            f"{part:.0%}: every speaker gives at least one clip, and a held-out text all its clips; give fewer "
            "speakers, say in a column split which, or --validation 0"
        )
    if kept and not held_out:
        found.append("nothing is held out for validation: some speaker would have no text left to train on")
    if alone:
        found.append(f"{_clips(alone)} with no other of the speaker: conditioned on themselves in training")
    return found


def _foreign(changed: Changed, clips: int, cleaner: str) -> str:
    letters: dict[str, str] = {}
    for _, of_clip in changed:
        letters |= of_clip
    shown = ", ".join(f'{before} to "{after}"' for before, after in list(letters.items())[:8])
    examples = "; ".join(f'"{_short(clip.text)}" becomes "{_short(clip.cleaned)}"' for clip, _ in changed[:EXAMPLES])
    return (
        f"the {cleaner} cleaner changes letters in {len(changed)} of {clips} texts ({shown}): {examples}. "
        "If this is not English: --cleaner basic and a --tokenizer for the language"
    )


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:59] + "…"


def _clips(count: int) -> str:
    return count_of(count, "clip")


def _amount(clips: Sequence[Clip]) -> dict[str, Any]:
    return _amount_of([clip.seconds for clip in clips])


def _amount_of(seconds: Sequence[float]) -> dict[str, Any]:
    return {"lines": len(seconds), "hours": _hours(seconds)}


def _hours(seconds: Sequence[float]) -> float:
    return round(sum(seconds) / 3600, 6)


def _speakers(kept: Sequence[Clip]) -> dict[str, Any]:
    clips: dict[str, list[Clip]] = {}
    for clip in kept:
        clips.setdefault(clip.speaker, []).append(clip)
    return {
        name: {
            "lines": len(clips[name]),
            "validation": sum(clip.split == VALIDATION for clip in clips[name]),
            "hours": _hours([clip.seconds for clip in clips[name]]),
        }
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


def _changed(changed: Changed) -> dict[str, Any]:
    examples = [{"where": clip.where, "before": clip.text, "after": clip.cleaned} for clip, _ in changed[:EXAMPLES]]
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
    return "\n".join(escaped(line) for text in lines for line in text.split("\n"))


def _cells(amount: dict[str, Any]) -> tuple[str, str]:
    return f"{amount['lines']}", hours_in_words(amount["hours"])


def _inputs(report: dict[str, Any]) -> str:
    return "\n".join(f"{i['path']}: {count_of(i['lines'], 'line')}, read as {i['format']}" for i in report["inputs"])


def _spreads(report: dict[str, Any]) -> str:
    names = {"seconds": "seconds", "text_tokens": "text tokens", "loudness_db": "loudness (dB)"}
    spreads = [f"{label} {report[key]['min']:g} to {report[key]['max']:g}" for key, label in names.items()]
    count = len(report["speakers"])
    return f"{'; '.join(spreads)}; {count_of(count, 'speaker')}"


def listing(rejected: Sequence[Clip]) -> str:
    """Every rejected clip, one per line."""
    return "\n".join(escaped(f"{clip.where}: {clip.reason}: {clip.detail}") for clip in rejected)


# --- to keep ----------------------------------------------------------------------------------------------------------


def write_report(
    out: Path, report: dict[str, Any], kept: Sequence[Clip], rejected: Sequence[Clip], limits: dict[str, float]
) -> None:
    """Three files. limits: of "seconds", "text_tokens" and "loudness_db", drawn into the picture as lines."""
    write_atomically(out / REPORT, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    write_atomically(out / REJECTED, rejected_tsv(rejected))
    write_atomically(out / PICTURE, picture(kept, rejected, limits))


def is_report(file: Path) -> bool:
    """Whether a file is a REPORT, as `make_report` makes it."""
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and {"inputs", "kept", "rejected", "reasons", "settings"} <= found.keys()


def rejected_tsv(rejected: Sequence[Clip]) -> str:
    """Every rejected clip: file, line, reason, detail, recording, text."""
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(("file", "line", "reason", "detail", "recording", "text"))
    for clip in rejected:
        writer.writerow((clip.file, clip.number, clip.reason, clip.detail, clip.audio, clip.text))
    return text.getvalue()


def picture(kept: Sequence[Clip], rejected: Sequence[Clip], limits: dict[str, float]) -> bytes:
    """Histograms of duration, text length and loudness of the kept clips, as png."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    values: dict[str, tuple[str, list[Any], tuple[float, float]]] = {
        "seconds": ("duration (s)", [clip.seconds for clip in kept], (0.0, 1.25 * limits["seconds"])),
        "text_tokens": ("text (tokens)", [clip.text_tokens for clip in kept], (0.0, 1.25 * limits["text_tokens"])),
        "loudness_db": ("loudness (dB of full scale)", [clip.sound.loudness_db for clip in kept], (-72.0, 0.0)),
    }
    durations = [clip.seconds for clip in rejected if clip.seconds]
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
