"""Runs with adapters, by the commands: stopped and taken up, read as any run, merged, kept apart, begun from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

import tortoise_jax as tj
from convert import flax_to_torch
from convert.inspect_checkpoint import inspect
from convert.mapping import to_torch
from convert.tables import MODELS
from tests.support import runs
from tests.support.conversion import run as run_command
from tortoise_jax import evaluate
from tortoise_jax.checkpoints import adapters
from tortoise_jax.checkpoints.pretrained import Pretrained, load_pretrained, saved_params
from tortoise_jax.checkpoints.trees import parameter_count
from tortoise_jax.errors import UserError
from tortoise_jax.evaluation import sounds
from tortoise_jax.models.lora import LORA, LoraConfig, merged

STEPS = runs.FIELDS["steps"]
# A rate at which six steps of so small a model move it beyond rounding.
FIELDS: dict[str, Any] = {"lora__rank": 4, "lora__alpha": 8.0, "optimizer__learning_rate": 3e-2}


@pytest.fixture(scope="session")
def lora_run(project: Path) -> Path:
    """A run stopped after three steps and taken up again, on two devices, with a draft and an export."""
    leaves: dict[str, Any] = {"sample_every": STEPS, "prompts": "('Yes.',)", "export": "voice.pth"}

    def make(run: Path) -> None:
        for more in ({"steps": 3}, leaves):
            said = runs.succeed(runs.train(project, run, devices=2, **FIELDS | more))
        assert "going on from step 3" in said
        assert "adapters of rank 4, added times 2" in said

    return runs.made_once(project / "lora", make)


@pytest.mark.slow
def test_taken_up_again_it_is_the_same_run_bit_for_bit(project: Path, lora_run: Path) -> None:
    whole = project / "whole"
    done = runs.train(project, whole, devices=2, **FIELDS)
    assert done.returncode == 0, done.stderr
    progress = [json.loads(next((run / "steps/6/progress").glob("*")).read_text()) for run in (whole, lora_run)]
    assert progress[0] == progress[1], "the checksums of parameters and optimiser state"
    curves = [[entry for entry in runs.history(run) if entry["kind"] != "sample"] for run in (whole, lora_run)]
    assert curves[0] == curves[1]


def test_a_run_holds_its_base_untouched_and_is_read_merged(project: Path, lora_run: Path) -> None:
    before = load_pretrained(project / "checkpoint", ("ar",)).ar
    found, saved, config = saved_params(lora_run, before.config, STEPS)
    assert (found, config) == (STEPS, LoraConfig(4, 8.0))
    after = load_pretrained(lora_run, ("ar",), STEPS).ar
    jax.tree.map(np.testing.assert_array_equal, after.params, merged(saved, config))
    adapters_of_run = saved.pop(LORA)
    assert parameter_count(adapters_of_run) < parameter_count(saved) / 4
    jax.tree.map(np.testing.assert_array_equal, saved, before.params)
    kernel = lambda part: part.params["gpt"]["h"]["mlp"]["c_fc"]["kernel"]
    assert np.abs(kernel(after) - kernel(before)).max() > 1e-3


def test_every_reader_of_runs_takes_it_as_any_other(lora_run: Path) -> None:
    best = tj.load(lora_run)
    exported = torch.load(lora_run / "voice.pth", weights_only=True)
    expected = to_torch(MODELS["ar"].table, best.params)
    assert exported.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(exported[key].numpy(), value, err_msg=key)
    assert any(line.startswith("  AR model: ") for line in inspect(lora_run))
    assert len(list((lora_run / "samples").glob("step-*.wav"))) == 1
    assert (lora_run / "report.html").exists()


def test_its_steps_are_heard_with_their_adapters(
    lora_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(lora_run, tmp_path / "run"))
    spoken_by: dict[int, Any] = {}

    def drafts(pretrained: Pretrained, step: int, sentences: list[Any], *_: Any) -> sounds.Sounds:
        spoken_by[step] = pretrained.ar.params
        tone = np.sin(np.arange(22050, dtype=np.float32) / 20)
        return sounds.Sounds(f"step {step}", sentences, [tone] * len(sentences), step, [True] * len(sentences))

    monkeypatch.setattr(sounds, "drafts", drafts)
    evaluate.main(["--run", str(run), "--clips", "1"])
    assert "sounds best" in capsys.readouterr().out
    assert {0, STEPS} <= spoken_by.keys()
    jax.tree.map(np.testing.assert_array_equal, spoken_by[STEPS], load_pretrained(run, ("ar",), STEPS).ar.params)
    kernel = lambda params: params["gpt"]["h"]["mlp"]["c_fc"]["kernel"]
    assert np.abs(kernel(spoken_by[STEPS]) - kernel(spoken_by[0])).max() > 1e-3


def test_adapters_kept_apart_are_merged_again(
    project: Path, lora_run: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """By the commands, in both directions."""
    command = lambda *arguments: run_command(monkeypatch, capsys, flax_to_torch.main, *arguments)
    file, out = tmp_path / "voice.npz", tmp_path / "voice.pth"
    code, said, _ = command(lora_run, "--out", file, "--step", STEPS)
    assert code == 0
    assert f"the adapters of step {STEPS}, rank 4" in said
    assert file.stat().st_size < (lora_run / "voice.pth").stat().st_size / 2
    assert command(lora_run, "--out", file)[0] == 0, "ours may be replaced"
    assert command(lora_run, "--out", file, "--step", STEPS)[0] == 0
    assert command(project / "checkpoint", "--adapters", file, "--out", out)[0] == 0
    got, want = torch.load(out, weights_only=True), to_torch(MODELS["ar"].table, tj.load(lora_run, STEPS).params)
    for key, value in want.items():
        np.testing.assert_array_equal(got[key].numpy(), value, err_msg=key)


def test_mistakes_with_adapters_are_one_line(
    project: Path, lora_run: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    file, foreign = tmp_path / "voice.npz", tmp_path / "foreign.npz"
    adapters.save(lora_run, file)
    np.savez(foreign, x=np.zeros(3))
    other = runs.write_checkpoint(tmp_path / "other", seed=5)
    for arguments, says in (
        ((project / "checkpoint", "--out", tmp_path / "a.npz"), "is no run with adapters"),
        ((lora_run, "--out", foreign), "not the adapters of a run"),
        ((lora_run, "--out", file, "--adapters", file), "holds a run's adapters alone"),
        ((project / "checkpoint", "--adapters", foreign, "--out", tmp_path / "a.pth"), "not the adapters of a run"),
        ((other, "--adapters", file, "--out", tmp_path / "a.pth"), "was trained on another AR model"),
        ((other, "--adapters", file, "--part", "dvae", "--out", tmp_path / "a.pth"), "are of the AR model"),
    ):
        code, _, err = run_command(monkeypatch, capsys, flax_to_torch.main, *arguments)
        assert (code, err.count("\n")) == (2, 1), err
        assert says in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign.npz", "other", "voice.npz"]


def test_adapters_beside_which_more_was_trained_are_not_kept_alone(lora_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("tortoise.json", "tokenizer.json", "mel_norms.txt", "steps"):
        (copy / name).symlink_to(lora_run / name)
    settings = json.loads((lora_run / "config.json").read_text()) | {"lora.also_train": "text_head/.*"}
    (copy / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"trained 'text_head/\.\*' beside its adapters"):
        adapters.save(copy, tmp_path / "voice.npz")
    (copy / "config.json").write_text(json.dumps(settings | {"lora.rank": "four"}))
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        load_pretrained(copy, ("ar",))


@pytest.mark.slow
def test_another_run_begins_from_it_and_its_rank_stays(project: Path, lora_run: Path, tmp_path: Path) -> None:
    done = runs.train(project, tmp_path / "next", checkpoint=lora_run, steps=1, eval_every=1)
    assert done.returncode == 0, done.stderr
    start, best = load_pretrained(tmp_path / "next", ("ar",), 0).ar, load_pretrained(lora_run, ("ar",)).ar
    jax.tree.map(np.testing.assert_array_equal, start.params, best.params)
    refused = runs.train(project, lora_run, devices=2, **FIELDS | {"lora__rank": 8})
    assert refused.returncode == 2
    assert "was begun with what cannot change: lora.rank: 4 -> 8" in refused.stderr


@pytest.mark.slow
def test_hosts_train_the_same_run(project: Path, tmp_path: Path) -> None:
    fields = FIELDS | {"optimizer__learning_rate": 1e-4, "lora__also_train": "text_head/.*"}
    done = runs.train(project, tmp_path / "one", devices=4, **fields)
    assert done.returncode == 0, done.stderr
    for code, out, errors in runs.outputs(runs.start_hosts(project, tmp_path / "two", 2, 2, **fields)):
        assert code == 0, out + errors
    weights = [jax.tree.leaves(load_pretrained(tmp_path / run, ("ar",), STEPS).ar.params) for run in ("one", "two")]
    for ours, theirs in zip(*weights, strict=True):
        assert np.max(np.abs(ours - theirs)) <= 1e-5 * np.max(np.abs(theirs))
