"""notebooks/finetune.ipynb: what its commands are, and every cell run as a person runs it, on the demo's pair."""

from __future__ import annotations

import re
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
NOTEBOOK = nbformat.read(ROOT / "notebooks" / "finetune.ipynb", as_version=4)
# What makes it quick; none changes what a cell does.
QUICK = {
    '"runs/notebook"': '"{folder}/out"',
    'RECORDINGS = ""': 'RECORDINGS = "{folder}/voice/metadata.csv"',  # a few of the demo's
    'TRAINING = ""': 'TRAINING = "--config.steps=1 --config.eval_every=1 --config.sample_every=1"',
}
CLIPS = 12


def test_it_is_small_and_runs_the_readmes_commands() -> None:
    nbformat.validate(NOTEBOOK)
    assert (ROOT / "notebooks" / "finetune.ipynb").stat().st_size < 12_000
    assert not any(cell.get("outputs") for cell in NOTEBOOK.cells)
    commands = [found for cell in NOTEBOOK.cells for found in re.findall(r'"(python \S+(?: \w+\.\w+)?)', cell.source)]
    assert len(commands) == 6
    for command in commands:
        assert command in README, command


def test_without_recordings_it_takes_the_demos() -> None:
    (default,) = re.findall(r'RECORDINGS = RECORDINGS or "(.+)"', "\n".join(cell.source for cell in NOTEBOOK.cells))
    assert (ROOT / default).is_file()


def test_every_cell_runs_and_shows_what_it_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "voice").mkdir()
    lines = (ROOT / "demo" / "voice" / "metadata.csv").read_text(encoding="utf-8").splitlines()[:CLIPS]
    (tmp_path / "voice" / "metadata.csv").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "voice" / "wavs").symlink_to(ROOT / "demo" / "voice" / "wavs")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")  # for the kernel and its commands
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    notebook = NOTEBOOK.copy()
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    for found, replacement in QUICK.items():
        assert parameters.source.count(found) == 1, found
        parameters.source = parameters.source.replace(found, replacement.format(folder=tmp_path))
    where = {"metadata": {"path": str(ROOT / "notebooks")}}
    nbclient.NotebookClient(notebook, timeout=600, resources=where).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    kinds = [kind for output in shown for kind in output.get("data", {})]
    assert kinds.count("image/png") == 2, "the data set and the curve"
    sounds = [output for output in shown if "<audio" in output.get("data", {}).get("text/html", "")]
    assert len(sounds) == 7, "three sentences before and after, and the last one"
    printed = "".join(output.text for output in shown if output.output_type == "stream")
    assert "sounds best" in printed or "no step sounds better" in printed
    assert (tmp_path / "out" / "voice.pth").is_file()
