"""What a run leaves for people and programs: `report.html`, one file with everything in it, and `summary.json`."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tortoise_jax.checkpoints.pretrained import SUMMARY
from tortoise_jax.files import read_json, write_atomically
from tortoise_jax.training.run_data import STEPS_PER_EPOCH
from tortoise_jax.training.run_directory import RATE, History, best_evaluation, parting, remark

MOST_STEPS = 12  # whose drafts are in the page: it holds their sounds

REPORT = "report.html"
EVALUATION = "evaluation/section.html"  # of the report, where a run was evaluated

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h2 { margin-top: 2rem } table { border-collapse: collapse } td, th { padding: .2rem .8rem .2rem 0; text-align: left;
vertical-align: top } th { font-weight: 600 } svg { max-width: 100%; height: auto } code { background: #f3f3f3 }
.wide { overflow-x: auto } .wide td { white-space: nowrap }
.wide td:first-child { white-space: normal; min-width: 9rem } audio { width: 14rem }
p, li, td { overflow-wrap: anywhere } .wide td { overflow-wrap: normal } .flag { white-space: nowrap }
.remark { background: #fff4d6; padding: .6rem 1rem }
"""


@dataclasses.dataclass(frozen=True)
class Subject:
    """What a report is about. panels: curve -> its title, the first one the headline's; axis: what the values are.

    samples: a sentence about what can be listened to. use: what to do with a run, its folder given, as html.
    """

    panels: dict[str, str]
    axis: str
    samples: str
    use: Callable[[Path], list[str]]


def use_ar_model(run: Path) -> list[str]:
    folder, voices = html.escape(str(run)), sorted((run / "voices").glob("*.npz"))
    voice = html.escape(str(voices[0])) if voices else "clips/"
    return [
        f"Use it in TorToiSe: <code>python convert/flax_to_torch.py {folder} --out voice.pth</code>, and put the file "
        "in the place of <code>autoregressive.pth</code>. Conditioning vectors made with the old weights are stale.",
        f'Hear it: <code>python -m tortoise_jax.speak --checkpoint {folder} --text "…" --voice {voice} '
        "--out draft.wav</code>",
    ]


def use_codec(run: Path) -> list[str]:
    folder = html.escape(str(run))
    return [
        f"Prepare data sets with it: <code>python -m tortoise_jax.prepare --checkpoint {folder} …</code>. Those "
        "prepared with another dVAE hold other codes and are refused.",
        f"To train an AR model with it: <code>python convert/flax_to_torch.py {folder} --out dvae.pth</code>, then "
        "<code>python convert/torch_to_flax.py --dvae dvae.pth --ar autoregressive.pth --out …</code>. An AR model "
        "trained with other codes must be trained on these before it speaks again.",
    ]


AR_MODEL = Subject(
    panels={"mel": "mel (codes)", "text": "text", "stop": "stop token"},
    axis="cross-entropy, nats per token",
    samples="Drafts go through the dVAE and Griffin-Lim: rough, but words, pace and stops can be judged.",
    use=use_ar_model,
)
CODEC = Subject(
    panels={"recon": "reconstruction", "commit": "commitment", "perplexity": "perplexity of codes"},
    axis="mean error, or codes",
    samples="Both of a pair went through Griffin-Lim, so only what the codes lose is heard between them.",
    use=use_codec,
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
        "parting": parting(validation["total"], training),
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
    write_page(run, history, write_summary(run, history, ended, settings, data, subject), subject)


def write_summary(
    run: Path, history: History, ended: str, settings: dict[str, Any], data: dict[str, Any], subject: Subject
) -> dict[str, Any]:
    facts = summary(history, ended, settings, data, subject)
    write_atomically(run / SUMMARY, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    return facts


def write_page(run: Path, history: History, facts: dict[str, Any], subject: Subject) -> None:
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
        "Losses": curves(history, subject, facts["data"].get(STEPS_PER_EPOCH, 0)) + sentence(facts.get("parting", "")),
        "Drafts": drafts(run, facts["samples"], subject),
        "Which step sounds best": evaluation(run),
        "What to do next": items(next_steps(run, facts, subject)),
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


def sentence(text: str) -> str:
    return f"<p>{html.escape(text)}</p>" if text else ""


def curves(history: History, subject: Subject, steps_per_epoch: int) -> str:
    """Losses and learning rate over steps, and epochs above them, as an inline SVG; a panel each: their scales differ.

    steps_per_epoch: 0 where it is not known.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.4), layout="constrained")
    *panels, rate = figure.subplots(1, len(subject.panels) + 1)
    rates = history.curve("train", RATE)
    if rates:
        rate.plot(*zip(*rates, strict=True), linewidth=1.5)
    rate.set(title="learning rate", xlabel="step", ylim=(0, None))
    rate.grid(alpha=0.3)
    for axes in (*panels, rate) if steps_per_epoch else ():
        of_epochs = (lambda step: step / steps_per_epoch, lambda epoch: epoch * steps_per_epoch)
        axes.secondary_xaxis("top", functions=of_epochs).set_xlabel("epoch")
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
    """Players in a table: a row for each text and voice, a column for each step, a recording before
    them. Of many steps MOST_STEPS, spread over the run; the others are in the run's samples/."""
    if not samples:
        return "<p>None were made.</p>"
    steps = sorted({sample["step"] for sample in samples})
    spread = {steps[round(i * (len(steps) - 1) / (MOST_STEPS - 1))] for i in range(MOST_STEPS)}
    shown = steps if len(steps) <= MOST_STEPS else sorted(spread)
    rows: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for sample in samples:
        rows.setdefault((sample["prompt"], sample["voice"]), {})[sample["step"]] = sample
    recorded = any("recording" in sample for sample in samples)
    head = ["text", "voice", *(["recording"] if recorded else []), *(f"step {step}" for step in shown)]
    lines = []
    for (prompt, voice), by_step in sorted(rows.items()):
        first = next(iter(by_step.values()))
        own = [player(run / first["recording"])] if "recording" in first else [""] * recorded
        made = [player(run / by_step[s]["file"]) + ending(by_step[s]) if s in by_step else "" for s in shown]
        lines.append([html.escape(prompt), html.escape(voice), *own, *made])
    left_out = f" Shown are {len(shown)} of {len(steps)} steps; all are in samples/." if len(shown) < len(steps) else ""
    cells = lambda tag, row: "<tr>" + "".join(f"<{tag}>{cell}" for cell in row)
    table = "".join([cells("th", head), *(cells("td", line) for line in lines)])
    return f"<p>{subject.samples}{left_out}</p><div class=wide><table>{table}</table></div>"


def ending(sample: dict[str, Any]) -> str:
    """How a draft ended, where that is known."""
    if "stopped" not in sample:
        return ""
    silence = f"stopped, {sample['trailing_silence']:.1f} s of silence"
    return f"<br>{silence if sample['stopped'] else 'did not stop'}"


def player(path: Path) -> str:
    """Plays a wav file, which is inside the page."""
    if not path.exists():
        return "the file is gone"
    return f'<audio controls src="data:audio/wav;base64,{base64.b64encode(path.read_bytes()).decode()}"></audio>'


def evaluation(run: Path) -> str:
    """What `python -m tortoise_jax.evaluate` says of the run, "" where it was not asked."""
    return (run / EVALUATION).read_text(encoding="utf-8") if (run / EVALUATION).exists() else ""


def items(lines: list[str]) -> str:
    """A list whose lines no browser breaks inside "--out", as they would after its first hyphen."""
    unbroken = (re.sub(r"--[\w.]+", r"<span class=flag>\g<0></span>", line) for line in lines)
    return "<ul>" + "".join(f"<li>{line}</li>" for line in unbroken) + "</ul>"


def next_steps(run: Path, facts: dict[str, Any], subject: Subject) -> list[str]:
    if facts["best_step"] == 0 or facts["remark"].startswith("diverged"):
        again = "Begin another run with a lower <code>optimizer.learning_rate</code>, or with more recordings."
        if not facts["best_step"]:
            return ["There is nothing to use: the run is no better than its start.", again]
        return [f"Use step {facts['best_step']}, from before it diverged: it is what every command takes.", again]
    lines = subject.use(run)
    totals = [math.inf if loss is None else loss for _, loss in facts["validation_total"]]
    if facts["remark"]:
        lines.append("It overfits: add recordings, or train again with a lower <code>optimizer.learning_rate</code>.")
    elif len(totals) > 1 and totals[-1] == min(totals) and facts["ended"] == "finished":
        more = f"<code>--config.steps={2 * facts['steps']}</code>"
        lines.append(f"The held-out loss was still falling: the same command with {more} goes on.")
    return lines
