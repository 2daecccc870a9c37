"""The whole way of a language whose letters the released models do not know: German."""

from __future__ import annotations

import ast
import dataclasses
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from convert import flax_to_torch
from tests.support import runs
from tests.support.torch_reference import UnifiedVoice
from tortoise_jax.checkpoints.pretrained import load_pretrained
from tortoise_jax.commands import get_config
from tortoise_jax.data.dataset import Dataset
from tortoise_jax.data.preparation import Options, prepare
from tortoise_jax.errors import UserError
from tortoise_jax.text.cleaners import clean
from tortoise_jax.text.tokenizer import Tokenizer
from tortoise_jax.tokenizer import main
from tortoise_jax.training import ar_run

NUMBERS = ("null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun")
WORDS = (*NUMBERS, "rot", "blau", "grün", "weiß", "schwarz", "gelb", "köln", "münchen")


def sentences(count: int) -> list[str]:
    draw = random.Random(0)
    return [" ".join(draw.sample(WORDS, 3)).capitalize() + "." for _ in range(count)]


def german_metadata(folder: Path) -> Path:
    """The bundled voice's recordings, with German texts."""
    runs.write_recordings(folder)
    names = [line.split("|")[0] for line in (folder / "metadata.csv").read_text().splitlines()]
    rows = [f"{name}|{text}\n" for name, text in zip(names, sentences(len(names)), strict=True)]
    (folder / "metadata.csv").write_text("".join(rows), encoding="utf-8")
    return folder


def tokenizer_command(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["tokenizer", *map(str, words)])
    main()


def built_as_printed(lines: str) -> UnifiedVoice:
    """The torch model with the constructor that an export prints."""
    (arguments,) = re.findall(r"must build it as UnifiedVoice\((.*?)\)", lines)
    values = dict(pair.split("=") for pair in arguments.split(", "))
    return UnifiedVoice(**{name: ast.literal_eval(value) for name, value in values.items()})


def test_german_is_prepared_and_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What train.py begins with, as an export: `make test-slow` has the training."""
    whole = dataclasses.replace(runs.AR, conditioning_layers=6)  # as many as TorToiSe's constructor makes
    monkeypatch.setattr(runs, "AR", whole)
    checkpoint, data = runs.write_checkpoint(tmp_path / "checkpoint"), german_metadata(tmp_path / "anna")
    own = tmp_path / "own.json"
    tokenizer_command(monkeypatch, "--data", data, "--out", own, "--size", 80)
    assert f"{own}: 80 tokens from {runs.CLIPS} transcripts" in capsys.readouterr().out
    tokenizer = Tokenizer.from_file(own)
    prepare(data, checkpoint, tmp_path / "data", Options(workers=0, cleaner="basic", tokenizer=own))
    assert "tokenizer: " in capsys.readouterr().out
    made = Dataset.open(tmp_path / "data")
    texts = [line.partition("|")[2] for line in (data / "metadata.csv").read_text(encoding="utf-8").splitlines()]
    assert {tokenizer.decode(made.text_ids(i)) for i in range(len(made))} == {clean(text, "basic") for text in texts}

    settings = get_config(checkpoint=str(checkpoint), data=str(tmp_path / "data"))
    _, grown = ar_run.find_data(settings, load_pretrained(checkpoint))
    assert "its text tables have 81 rows, the checkpoint's 256" in capsys.readouterr().out
    assert grown.tokenizer.digest == tokenizer.digest
    assert grown.ar.config.text_tokens == 81
    lines = "\n".join(flax_to_torch.write(grown, tmp_path / "voice.pth"))
    built_as_printed(lines).load_state_dict(torch.load(tmp_path / "voice.pth", weights_only=True), strict=True)
    assert "tokenizer_vocab_file='" in lines
    assert "tokenizer_basic=True" in lines


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--out", "own.txt"], "--out own.txt: expected a name ending in .json"),
        (["--out", "own.json", "--cleaner", "german"], "--cleaner german: there is none"),
        (["--out", "own.json", "--size", "10"], r"--size 10: expected \d+ \(\d+ characters are known\) to 20000"),
    ],
)
def test_what_the_tokenizers_command_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.txt").write_text("a.wav|Über\n", encoding="utf-8")
    with pytest.raises(UserError, match=line):
        tokenizer_command(monkeypatch, "--data", "list.txt", *words)
    assert [path.name for path in tmp_path.iterdir()] == ["list.txt"]


@pytest.mark.slow
def test_a_german_voice_is_learnt(tmp_path: Path) -> None:
    """espeak-ng's German, by the demo's pair, whose English letters are all it knows at first."""
    from demo.make_speech import RATE, Espeak, trimmed

    (tmp_path / "anna" / "wavs").mkdir(parents=True)
    speaker, texts = Espeak(), sentences(100)
    for i, text in enumerate(texts):
        waveform = trimmed(speaker.say(text, "de+f1", 52, 155))
        soundfile.write(tmp_path / "anna" / "wavs" / f"{i}.flac", np.asarray(waveform), RATE, subtype="PCM_16")
    rows = "".join(f"{i}|{text}\n" for i, text in enumerate(texts))
    (tmp_path / "anna" / "metadata.csv").write_text(rows, encoding="utf-8")

    def run(*words: object) -> str:
        command = [sys.executable, *map(str, words)]
        done = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, done.stderr
        return done.stdout

    pair, own, data = tmp_path / "pair", tmp_path / "own.json", tmp_path / "data"
    files = ("--dvae", "demo/dvae.pth", "--ar", "demo/autoregressive.pth")
    run("convert/torch_to_flax.py", *files, "--out", pair)
    run("-m", "tortoise_jax.tokenizer", "--data", tmp_path / "anna", "--out", own, "--size", 100)
    run(
        "-m", "tortoise_jax.prepare", "--data", tmp_path / "anna", "--checkpoint", pair, "--out", data,
        "--cleaner", "basic", "--tokenizer", own, "--validation", "0.2",
    )  # fmt: skip
    fields = {"checkpoint": pair, "data": data, "prompts": "('grün fünf köln',)", "steps": 80, "eval_every": 40}
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    printed = run("train.py", "--config", "configs/ar_demo.py", *flags, f"--workdir={tmp_path / 'run'}")
    losses = [entry for entry in runs.history(tmp_path / "run") if entry["kind"] == "validation"]
    assert losses[-1]["mel"] < 0.7 * losses[0]["mel"], losses
    assert losses[-1]["text"] < 0.7 * losses[0]["text"], losses
    state = torch.load(tmp_path / "run" / "voice.pth", weights_only=True)
    built_as_printed(printed).load_state_dict(state, strict=True)
    assert json.loads((tmp_path / "run" / "voice.json").read_text())["constructor"]["number_text_tokens"] == 100
