"""`python -m tortoise_jax.evaluate`: a table, files and a section of the report, of a run with random weights."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import soundfile

from tests.support import runs
from tortoise_jax import evaluate
from tortoise_jax.audio import SAMPLE_RATE
from tortoise_jax.checkpoints.parts import Part, abstract_tree
from tortoise_jax.checkpoints.pretrained import load_pretrained, save_pretrained
from tortoise_jax.checkpoints.run_checkpoints import RunCheckpoints
from tortoise_jax.data.dataset import Dataset
from tortoise_jax.errors import UserError
from tortoise_jax.evaluation import judges, subject
from tortoise_jax.evaluation.judges import Answers, UnavailableError
from tortoise_jax.files import locked
from tortoise_jax.synthesis import drafts
from tortoise_jax.training import report, run_directory
from tortoise_jax.training.run_data import digests_of
from tortoise_jax.training.run_directory import History

LOSSES = {0: 3.0, 2: 2.0, 4: 2.5}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run/`, which has kept steps 2 and 4, beside its checkpoint and data."""
    project = runs.write_project(tmp_path_factory.mktemp("evaluate"))
    pretrained = load_pretrained(project / "checkpoint")
    settings = {"checkpoint": str(project / "checkpoint"), "data": str(project / "data"), "save_to": ""}
    settings |= {"prompts": ["Yes."], **digests_of(Dataset.open(project / "data"))}
    run = project / "run"
    run.mkdir()
    run_directory.write_beginning(run, settings, pretrained, "ar")
    checkpoints, history = RunCheckpoints(run), History(run, 0, writes=True)
    for step, loss in LOSSES.items():
        history.add("validation", step, dict.fromkeys(("mel", "text", "stop", "total"), loss))
        if step:
            params = jax.tree.map(lambda leaf, step=step: leaf * np.float32(1 + step / 20), pretrained.ar.params)
            checkpoints.save(step, params, {"count": np.int32(0)}, {"step": step, "skipped": 0}, loss)
    checkpoints.finish()
    report.write(run, history, "finished", settings, {})
    smaller = dataclasses.replace(runs.AR, layers=1)
    part = Part.of_tree(smaller, runs.random_params(abstract_tree(smaller), 0))
    save_pretrained(pretrained.with_part("ar", part), project / "other")
    return project


@pytest.fixture
def run(project: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be written to."""
    return Path(shutil.copytree(project / "run", tmp_path / "run"))


@pytest.fixture(autouse=True)
def quick_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tone of the right length: random mels are no work for Griffin-Lim."""
    tone = lambda mel, norms: np.sin(np.arange((len(mel) - 1) * 256, dtype=np.float32) / 20) / 2
    monkeypatch.setattr(drafts, "griffin_lim", tone)


def test_a_run_is_heard(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[tuple[str, int, dict[str, Any]]] = []

    def ask(judge: str, waveforms: Sequence[np.ndarray], options: dict[str, Any], python: str) -> Answers:
        asked.append((judge, len(waveforms), options))
        if judge == "likeness":
            raise UnavailableError("No module named 'resemblyzer'")
        return Answers(["yes" if judge == "words" else 2.5] * len(waveforms), f"a stand-in for {judge}")

    monkeypatch.setattr(judges, "ask", ask)
    evaluate.main(["--run", str(run), "--clips", "2"])
    printed = capsys.readouterr().out

    head, *lines = printed.split("\n\n")[1].splitlines()
    assert re.split(r"  +", head.strip()) == [
        "held-out loss", "stop", "silence, s", "word errors", "quality", "pitch, Hz", "letters/s",
    ]  # fmt: skip
    assert [re.split(r"  +", line)[0] for line in lines] == ["recordings", "their codes", "step 0", "step 2", "step 4"]
    assert "likeness: left out: No module named 'resemblyzer'" in printed
    assert "words: a stand-in for words" in printed

    result = json.loads((run / "evaluation.json").read_text())
    rows = {row["name"]: row for row in result["rows"]}
    assert [rows[f"step {step}"]["loss"] for step in LOSSES] == list(LOSSES.values())
    assert rows["step 2"]["words"] < 1 == rows["recordings"]["words"], "only the prompt says yes"
    assert result["advice"] in printed
    assert "likeness" not in printed.split("\n\n")[1]

    dataset = Dataset.open(settings(run)["data"])
    texts = {dataset.clips[i].text for i in dataset.split("validation")}
    drawn = [clip for clip in result["clips"] if clip["row"] == "step 4"]
    assert {clip["text"] for clip in drawn} == {"Yes.", *texts}
    for clip in drawn:
        waveform, rate = soundfile.read(run / clip["file"])
        assert rate == SAMPLE_RATE
        assert len(waveform) > 0
        assert clip["heard"] == "yes"
    assert [judge for judge, _, _ in asked] == ["words", "likeness", "quality"]
    assert {count for _, count, _ in asked} == {2 + 2 + 3 * len(drawn)}

    page = (run / "report.html").read_text()
    assert "Which step sounds best" in page
    assert page.count("<audio") == len(result["clips"])
    # What the end of a run writes keeps it.
    report.write(run, History.to_read(run), "finished", {}, {})
    assert "Which step sounds best" in (run / "report.html").read_text()


def settings(run: Path) -> dict[str, Any]:
    return json.loads((run / "config.json").read_text())


@pytest.mark.parametrize(
    ("change", "arguments", "said"),
    [
        ({}, ["--clips", "0"], "--clips is 0, expected at least 1"),
        ({}, ["--whisper", "nowhere"], "--whisper nowhere holds no model.bin"),
        ({}, ["--judges", "words"], "--judges words: No such file or directory; expected a Python"),
        ({}, ["--speaker", "nobody"], "--speaker nobody: the speakers of .*/data are"),
        ({}, ["--text", "missing.txt"], "--text missing.txt: cannot be read"),
        ({}, ["--others", "nowhere"], "voice nowhere does not exist"),
        ({}, ["--temperature", "-1"], "temperature is -1.0, expected at least 0"),
        ({"data": "/moved"}, [], "/moved, which .*/run was trained on, is not there; give --data"),
        ({"data_digest": "0"}, [], "is not what .*/run was trained on"),
        ({"prompts": ["this & that"]}, [], "holds characters the tokenizer does not know"),
        ({"prompts": ["no " * 60]}, [], "text tokens, the model has room for 1 to 57"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_nothing_is_left(
    run: Path, change: dict[str, Any], arguments: list[str], said: str
) -> None:
    (run / "config.json").write_text(json.dumps(settings(run) | change))
    before = sorted(run.rglob("*"))
    with pytest.raises(UserError, match=said):
        evaluate.main(["--run", str(run), "--clips", "1", *arguments])
    assert sorted(run.rglob("*")) == before


def test_what_is_no_run_of_the_ar_model_is_refused(project: Path, run: Path) -> None:
    with pytest.raises(UserError, match="is a converted checkpoint, not a run"):
        evaluate.main(["--run", str(project / "checkpoint")])
    metadata = json.loads((run / "tortoise.json").read_text())
    (run / "tortoise.json").write_text(json.dumps(metadata | {"trains": "dvae"}))
    with pytest.raises(UserError, match="trains the dVAE"):
        evaluate.main(["--run", str(run)])


def test_one_evaluation_of_a_run_at_a_time(run: Path) -> None:
    with locked(run / "evaluation"), pytest.raises(UserError, match="is being written by"):
        evaluate.main(["--run", str(run), "--clips", "1"])


def test_the_start_is_what_the_run_began_with(project: Path, run: Path, tmp_path: Path) -> None:
    common = load_pretrained(run, ("dvae",))
    start = subject.checkpoint(run, settings(run), 0, common).ar.params
    jax.tree.map(np.testing.assert_array_equal, start, load_pretrained(project / "checkpoint", ("ar",)).ar.params)
    assert subject.steps_of(run) == [0, 2, 4]
    for origin, said in ((tmp_path / "gone", "is not there"), (project / "other", "no longer what the run began with")):
        with pytest.raises(UserError, match=said):
            subject.checkpoint(run, {"checkpoint": str(origin)}, 0, common)


def test_steps_that_cannot_be_heard_are_left_out(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that diverged keeps its last steps, which are not finite; the checkpoint it began with may be gone."""
    (run / "config.json").write_text(json.dumps(settings(run) | {"checkpoint": "/gone"}))
    checkpoint = subject.checkpoint

    def diverged(folder: Path, fields: dict[str, Any], step: int, common: Any) -> Any:
        found = checkpoint(folder, fields, step, common)
        part = found.ar
        tree = jax.tree.map(lambda leaf: leaf * np.float32("nan"), part.tree) if step == 4 else part.tree
        return found.with_part("ar", type(part).of_tree(part.config, tree))

    def nobody(*_: Any) -> Answers:
        raise UnavailableError("away")

    monkeypatch.setattr(subject, "checkpoint", diverged)
    monkeypatch.setattr(judges, "ask", nobody)
    evaluate.main(["--run", str(run), "--clips", "1"])
    printed = capsys.readouterr().out
    assert "step 0 is left out: /gone, which the run began with, is not there" in printed
    assert "step 4 is left out: the model's outputs are not finite" in printed
    assert [row["name"] for row in json.loads((run / "evaluation.json").read_text())["rows"]][2:] == ["step 2"]
    assert "step 2 sounds best" in printed
