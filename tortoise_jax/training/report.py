"""What a run leaves for people and programs: `report.html`, one file with everything in it, and `summary.json`."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tortoise_jax.checkpoints.pretrained import SUMMARY
from tortoise_jax.files import read_json, write_atomically
from tortoise_jax.training.run_directory import History, best_evaluation, remark

REPORT = "report.html"
EVALUATION = "evaluation/section.html"  # of the report, where a run was evaluated

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h2 { margin-top: 2rem } table { border-collapse: collapse } td, th { padding: .2rem .8rem .2rem 0; text-align: left;
vertical-align: top } th { font-weight: 600 } svg { max-width: 100%; height: auto } code { background: #f3f3f3 }
.remark { background: #fff4d6; padding: .6rem 1rem }
"""


@dataclasses.dataclass(frozen=True)
class Subject:
    """What a report is about. panels: curve -> its title, the first one the headline's; axis: what the values are.

    samples: a sentence about what can be listened to. use: what to do with a run's folder, as html.
    """

    panels: dict[str, str]
    axis: str
    samples: str
    use: Callable[[str], list[str]]


AR_MODEL = Subject(
    panels={"mel": "mel (codes)", "text": "text", "stop": "stop token"},
    axis="cross-entropy, nats per token",
    samples="Drafts go through the dVAE and Griffin-Lim: rough, but words, pace and stops can be judged.",
    use=lambda folder: [
        f"Use it in TorToiSe: <code>python convert/flax_to_torch.py {folder} --out voice.pth</code>, and put the file "
        "in the place of <code>autoregressive.pth</code>. Conditioning vectors made with the old weights are stale.",
        f'Hear it: <code>python -m tortoise_jax.speak --checkpoint {folder} --text "…" --voice clips/ '
        "--out draft.wav</code>",
    ],
)
CODEC = Subject(
    panels={"recon": "reconstruction", "commit": "commitment", "perplexity": "perplexity of codes"},
    axis="mean error, or codes",
    samples="Both of a pair went through Griffin-Lim, so only what the codes lose is heard between them.",
    use=lambda folder: [
        f"Prepare data sets with it: <code>python -m tortoise_jax.prepare --checkpoint {folder} …</code>. Those "
        "prepared with another dVAE hold other codes and are refused.",
        f"To train an AR model with it: <code>python convert/flax_to_torch.py {folder} --out dvae.pth</code>, then "
        "<code>python convert/torch_to_flax.py --dvae dvae.pth --ar autoregressive.pth --out …</code>. An AR model "
        "trained with other codes must be trained on these before it speaks again.",
    ],
)


def summary(
    history: History, ended: str, settings: dict[str, Any], data: dict[str, Any], subject: Subject = AR_MODEL
) -> dict[str, Any]:
    """How a run went, in numbers; curves are lists of (step, value), None in place of values that are not finite."""
    validation = {name: history.curve("validation", name) for name in (*subject.panels, "total")}
    training = history.curve("train", "total")
    best = best_evaluation(validation["total"]) or (None, None)
    return {
        "ended": ended,
        "steps": training[-1][0] if training else 0,
        "best_step": best[0],
        "best_validation": best[1],
        **{f"validation_{name}": [(s, finite(v)) for s, v in curve] for name, curve in validation.items()},
        "samples": [entry for entry in history.lines if entry["kind"] == "sample"],
        "remark": remark(validation["total"], training),
        "settings": settings,
        "data": data,
    }


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def write(
    run: Path,
    history: History,
    ended: str,
    settings: dict[str, Any],
    data: dict[str, Any],
    subject: Subject = AR_MODEL,
) -> None:
    facts = summary(history, ended, settings, data, subject)
    write_atomically(run / SUMMARY, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    write_atomically(run / REPORT, page(run, history, facts, subject))


def rewrite(run: Path) -> bool:
    """Writes the report of a run of the AR model anew, with what was found since; whether the run had one."""
    if not (run / SUMMARY).exists():
        return False
    write_atomically(run / REPORT, page(run, History.to_read(run), read_json(run / SUMMARY), AR_MODEL))
    return True


def page(run: Path, history: History, facts: dict[str, Any], subject: Subject) -> str:
    name = html.escape(run.name)
    warning = f"<p class=remark>{html.escape(facts['remark'])}</p>" if facts["remark"] else ""
    sections = {
        "Losses": curves(history, subject),
        "Drafts": drafts(run, facts["samples"], subject),
        "Which step sounds best": evaluation(run),
        "What to do next": "<ul>" + "".join(f"<li>{line}</li>" for line in next_steps(run, facts, subject)) + "</ul>",
        "Data": table(facts["data"]),
        "Settings": table(facts["settings"]),
    }
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{name}</title><style>{STYLE}</style>"
    return (
        f"{head}<h1>{name}</h1>"
        + table(headline(facts, subject))
        + warning
        + "".join(f"\n<h2>{k}</h2>\n{v}" for k, v in sections.items() if v)
        + "\n"
    )


def headline(facts: dict[str, Any], subject: Subject) -> dict[str, Any]:
    lines, name = {"ended": facts["ended"], "steps": facts["steps"]}, next(iter(subject.panels))
    curve = facts[f"validation_{name}"]
    if not curve:
        return lines | {f"held-out {name} loss": "none: no clip was held out"}
    (_, first), (_, last) = curve[0], curve[-1]
    first, last = ("not finite" if loss is None else f"{loss:.4f}" for loss in (first, last))
    best = "none: no evaluation was finite"
    if facts["best_step"] is not None:
        start = ", the start: no step was better" if facts["best_step"] == 0 else ""
        best = f"step {facts['best_step']}{start} (total loss {facts['best_validation']:.4f})"
    return lines | {f"held-out {name} loss": f"{first} at the start, {last} at the end", "best checkpoint": best}


def table(values: dict[str, Any]) -> str:
    rows = (f"<tr><th>{html.escape(str(k))}<td>{html.escape(str(v))}" for k, v in values.items())
    return "<table>" + "".join(rows) + "</table>"


def curves(history: History, subject: Subject) -> str:
    """Training and held-out losses over steps, as an inline SVG; one panel a stream, since their scales differ."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = figure.subplots(1, len(subject.panels))
    for axes, (name, title) in zip(panels, subject.panels.items(), strict=True):
        for kind, label, style in (("train", "training", {"alpha": 0.5}), ("validation", "held out", {"marker": "o"})):
            points = history.curve(kind, name)
            if points:
                axes.plot(*zip(*points, strict=True), label=label, linewidth=1.5, markersize=4, **style)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(frameon=False)
    panels[0].set_ylabel(subject.axis)
    return svg(figure)


def svg(figure: Any) -> str:
    """A picture that stands inside a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def drafts(run: Path, samples: list[dict[str, Any]], subject: Subject) -> str:
    """Players for the first and the last drafts; those between are in the run's samples/."""
    if not samples:
        return "<p>None were made.</p>"
    ends = {min(sample["step"] for sample in samples), max(sample["step"] for sample in samples)}
    shown = sorted((s for s in samples if s["step"] in ends), key=lambda s: (s["prompt"], s["voice"], s["step"]))
    rows = []
    for sample in shown:
        ending = ""
        if "stopped" in sample:
            silence = f"stopped, {sample['trailing_silence']:.1f} s of silence"
            ending = silence if sample["stopped"] else "did not stop"
        rows.append(
            f"<tr><td>{html.escape(sample['prompt'])}<td>{html.escape(sample['voice'])}<td>step {sample['step']}"
            f"<td>{player(run / sample['file'])}<td>{ending}"
        )
    return (
        f"<p>{subject.samples}</p>"
        + "<table><tr><th>text<th>voice<th>when<th>draft<th>ending"
        + "".join(rows)
        + "</table>"
    )


def player(path: Path) -> str:
    """Plays a wav file, which is inside the page."""
    if not path.exists():
        return "the file is gone"
    return f'<audio controls src="data:audio/wav;base64,{base64.b64encode(path.read_bytes()).decode()}"></audio>'


def evaluation(run: Path) -> str:
    """What `python -m tortoise_jax.evaluate` says of the run, "" where it was not asked."""
    return (run / EVALUATION).read_text(encoding="utf-8") if (run / EVALUATION).exists() else ""


def next_steps(run: Path, facts: dict[str, Any], subject: Subject) -> list[str]:
    if facts["best_step"] == 0 or facts["remark"].startswith("diverged"):
        again = "Begin another run with a lower <code>optimizer.learning_rate</code>, or with more recordings."
        if not facts["best_step"]:
            return ["There is nothing to use: the run is no better than its start.", again]
        return [f"Use step {facts['best_step']}, from before it diverged: it is what every command takes.", again]
    lines = subject.use(html.escape(str(run)))
    totals = [math.inf if loss is None else loss for _, loss in facts["validation_total"]]
    if facts["remark"]:
        lines.append("It overfits: add recordings, or train again with a lower <code>optimizer.learning_rate</code>.")
    elif len(totals) > 1 and totals[-1] == min(totals) and facts["ended"] == "finished":
        more = f"<code>--config.steps={2 * facts['steps']}</code>"
        lines.append(f"The held-out loss was still falling: the same command with {more} goes on.")
    return lines
