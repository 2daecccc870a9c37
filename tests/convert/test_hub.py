"""`--push_to_hub`: what would be uploaded, by a stand-in for the hub's client."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from convert import flax_to_torch, hub
from tests.support import runs
from tortoise_jax.errors import UserError
from tortoise_jax.files import write_json


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with what a run leaves beside it."""
    folder = runs.write_checkpoint(tmp_path_factory.mktemp("hub") / "run")
    (folder / "voices").mkdir()
    (folder / "voices" / "ann.npz").write_bytes(b"a vector")
    return folder


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    done: list[Any] = []

    class Api:
        def create_repo(self, repository: str, private: bool, exist_ok: bool) -> None:
            if repository == "nobody/voice":
                raise RuntimeError("401 Unauthorized\nfor url")
            done.append((repository, private))

        def create_commit(self, repository: str, added: list[Any], commit_message: str) -> Any:
            done.append({operation.path_in_repo: operation.path_or_fileobj for operation in added})
            return SimpleNamespace(commit_url=f"https://hub/{repository}/commit/1")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return done


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["flax_to_torch.py", *map(str, words)])
    flax_to_torch.main()


def test_an_export_is_uploaded_with_a_card(
    run: Path, uploads: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "voice.pth"
    command(monkeypatch, run, "--out", out, "--push_to_hub", "ann/her-voice")
    assert uploads[0] == ("ann/her-voice", True), "private unless asked for"
    files = uploads[1]
    assert set(files) == {"voice.pth", "voice.json", "tokenizer.json", "README.md", "voices/ann.npz"}
    assert Path(files["voice.pth"]).read_bytes() == out.read_bytes()
    assert json.loads(files["voice.json"])["heads"] == runs.AR.heads
    card = files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: tortoise-tts\n")
    assert "# her-voice" in card
    assert "consent of the person" in card
    assert "must build it as UnifiedVoice(layers=" in card
    assert "https://hub/ann/her-voice/commit/1: voice.pth, voice.json" in capsys.readouterr().out
    command(monkeypatch, run, "--out", out, "--push_to_hub", "ann/her-voice", "--public")
    assert uploads[2] == ("ann/her-voice", False)


def test_the_card_tells_how_it_was_made_and_not_where(run: Path, uploads: list[Any], tmp_path: Path) -> None:
    data = {"data set": "/home/ann/data-prepared", "train clips": 95}
    config = {"data": "/home/ann/data", "optimizer.learning_rate": 5e-6, "save_to": ""}
    out = tmp_path / "voice.pth"
    out.touch()
    write_json(out.with_suffix(".json"), {"model": "ar", "training": {"step": 80, "config": config, "data": data}})
    hub.push(out, run, "ann/voice", False, ["one line"])
    uploaded = uploads[1]
    for name in ("README.md", "voice.json"):
        assert b"/home" not in uploaded[name]
    card = uploaded["README.md"].decode()
    assert "| step | 80 |" in card
    assert "| train clips | 95 |" in card
    assert "| optimizer.learning_rate | 5e-06 |" in card
    assert "| data set | data-prepared |" in card
    assert "save_to" not in card


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--push_to_hub", "voice"], "--push_to_hub voice: expected USER/NAME"),
        (["--public"], "--public is about --push_to_hub"),
        (["--push_to_hub", "nobody/voice"], r"nobody/voice: 401 Unauthorized; .*voice.pth is whole$"),
    ],
)
def test_what_is_refused(
    run: Path, uploads: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], line: str
) -> None:
    with pytest.raises(UserError, match=line):
        command(monkeypatch, run, "--out", tmp_path / "voice.pth", *words)
    assert (tmp_path / "voice.pth").exists() == ("whole" in line)
    assert not uploads


def test_without_the_hubs_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"huggingface_hub is not installed: pip install 'tortoise_jax\[download\]'"):
        hub.check("ann/voice")
