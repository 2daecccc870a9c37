"""Whole runs of dVAE training: from scratch and from a checkpoint, taken up again, on several hosts; its dangers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from tests.support import runs
from tests.support.runs import assert_one_line
from tests.support.torch_reference import DiscreteVAE
from tortoise_jax.audio import log_mel
from tortoise_jax.checkpoints.pretrained import load_pretrained, save_pretrained
from tortoise_jax.data.dataset import Dataset
from tortoise_jax.training import dvae_run

STEPS = runs.DVAE_FIELDS["steps"]
TINY = {"model__codebook_dim": 8, "model__codes": 16, "model__hidden": 8, "model__res_blocks": 1}
SAME_LOSS, SAME_WEIGHTS = 1e-6, 1e-5


@pytest.fixture(scope="session")
def tuned(project: Path) -> Path:
    """The project's dVAE, fine-tuned from start to end."""

    def make(run: Path) -> None:
        before = contents(project / "checkpoint")
        said = runs.succeed(runs.train(project, run, kind="dvae", sample_every=3, export="dvae.pth"))
        assert "unchanged: " in said
        assert "prepare data sets again" in said
        assert contents(project / "checkpoint") == before

    return runs.made_once(project / "tuned", make)


def contents(folder: Path) -> dict[Path, str]:
    return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def weights(run: Path) -> list[np.ndarray]:
    return jax.tree.leaves(load_pretrained(run, ("dvae",), STEPS).dvae.tree)


def losses(run: Path) -> dict[tuple[str, int], float]:
    return {(e["kind"], e["step"]): e["total"] for e in runs.history(run) if e["kind"] != "sample"}


def test_a_run_leaves_a_dvae_and_says_what_changed(project: Path, tuned: Path) -> None:
    assert {path.name for path in tuned.iterdir()} >= {"steps", "tensorboard", "report.html", "dvae.pth", "samples"}
    assert not (tuned / "dvae").exists()
    page = (tuned / "report.html").read_text()
    assert "codes unchanged" in page
    assert "<th>recording<th>step 0<th>" in page
    assert page.count("<audio") == 4  # the one held-out clip, and its codes' sound at steps 0, 3 and 6
    first, last = (losses(tuned)["validation", step] for step in (0, STEPS))
    assert last < first
    summary = json.loads((tuned / "summary.json").read_text())
    before, after = load_pretrained(project / "checkpoint", ("dvae",)), load_pretrained(tuned, ("dvae",))
    dataset = Dataset.open(project / "data")
    same = [
        np.mean(encoded(before, dataset.waveform(int(i))) == encoded(after, dataset.waveform(int(i))))
        for i in dataset.split("train")
    ]
    assert float(summary["data"]["codes unchanged"].split("%")[0]) == pytest.approx(100 * np.mean(same), abs=2)
    assert np.mean(same) < 1


def encoded(checkpoint: object, waveform: np.ndarray) -> np.ndarray:
    found = dvae_run.CodeEncoder(checkpoint.dvae.config, checkpoint.dvae.variables, checkpoint.mel_norms)  # type: ignore[attr-defined]
    return found.encode([waveform])[0]


def test_the_export_is_the_trained_dvae_in_torch(project: Path, tuned: Path) -> None:
    reference = DiscreteVAE(hidden_dim=8, num_resnet_blocks=1, codebook_dim=8, num_tokens=16)
    reference.load_state_dict(torch.load(tuned / "dvae.pth", weights_only=True), strict=True)
    trained = load_pretrained(tuned, ("dvae",))
    waveform = Dataset.open(project / "data").waveform(0)
    mel = np.asarray(log_mel(waveform, trained.mel_norms))
    assert np.array_equal(
        encoded(trained, waveform), reference.encode(torch.tensor(mel.T[None]))[1][0, : len(waveform) // 1024 + 1]
    )


def test_tensorboard_holds_the_codes_and_the_bands(tuned: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tuned / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert tags >= {"loss/recon", "loss/commit", "codes/perplexity", "codes/used", "loss/bands_from_70"}
    assert tags >= {"validation/recon", "validation/perplexity", "grad_norm/encoder", "rate/speech_per_second"}
    assert {tag.split("/")[0] for tag in events.Tags()["audio"]} == {"original", "codes"}


def test_data_sets_of_the_old_dvae_are_refused_with_the_reason(project: Path, tuned: Path, tmp_path: Path) -> None:
    """An AR model with the tuned dVAE, on the data set that was prepared before."""
    checkpoint = tmp_path / "both"
    start = load_pretrained(project / "checkpoint")
    save_pretrained(start.with_part("dvae", load_pretrained(tuned).dvae), checkpoint)
    done = runs.train_here(project, tmp_path / "run", checkpoint=checkpoint)
    assert_one_line(done, "another dVAE", "its codes stand for other sounds", "prepare it again")


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit(project: Path, tmp_path: Path) -> None:
    """From scratch, with dead codes revived, cut in two."""
    fields = TINY | {"checkpoint": None, "kind": "dvae", "optimizer__schedule": "constant"}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = runs.train(project, whole, **fields)
    assert done.returncode == 0, done.stderr
    assert "checkpoint: none, random weights" in done.stdout
    assert "unchanged" not in done.stdout
    for steps in (3, STEPS):
        again = runs.train(project, cut, **fields | {"steps": steps})
        assert again.returncode == 0, again.stderr
    assert "going on from step 3" in again.stdout
    assert losses(cut) == losses(whole)
    for ours, theirs in zip(weights(cut), weights(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
def test_two_hosts_train_the_dvae_of_one(project: Path, tmp_path: Path) -> None:
    """2 x 2 processes x devices against 1 x 4, from scratch, from recordings, with dead codes revived."""
    fields = TINY | {"checkpoint": None, "kind": "dvae", "optimizer__learning_rate": 1e-5, "sample_every": 6}
    ended = runs.outputs(runs.start_hosts(project, tmp_path / "two", 2, 2, **fields))
    for code, out, errors in ended:
        assert code == 0, out + errors
    done = runs.train(project, tmp_path / "one", devices=4, **fields)
    assert done.returncode == 0, done.stderr
    ours, theirs = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert abs(ours[key] - value) <= SAME_LOSS * abs(value), key
    for a, b in zip(weights(tmp_path / "two"), weights(tmp_path / "one"), strict=True):
        assert np.max(np.abs(a - b)) <= SAME_WEIGHTS * max(np.max(np.abs(b)), 1e-6)


def test_recordings_are_enough_to_begin_from_nothing(project: Path, tmp_path: Path) -> None:
    recordings = runs.write_recordings(tmp_path / "recordings", clips=6)
    fields = TINY | {"checkpoint": None, "kind": "dvae", "steps": 1, "eval_every": 1}
    done = runs.train(project, tmp_path / "run", data=recordings, **fields)
    assert done.returncode == 0, done.stderr
    assert len(Dataset.open(tmp_path / "recordings-prepared")) == 6


def test_a_plan_of_dvae_training(project: Path, tmp_path: Path) -> None:
    done = runs.train(project, tmp_path / "run", "--plan", kind="dvae", **TINY, checkpoint=None)
    assert done.returncode == 0, done.stderr
    for part in ("of which 272 are frozen", "rows of 8192 samples per device", "it fits", "the run: 6 steps"):
        assert part in done.stdout, done.stdout
    assert not (tmp_path / "run").exists()


def test_what_users_get_wrong_ends_in_one_line(project: Path, tuned: Path, tmp_path: Path) -> None:
    train = lambda run, **fields: runs.train_here(project, run, kind="dvae", **fields)
    before = contents(project / "checkpoint")
    assert_one_line(train(project / "checkpoint"), "is a converted checkpoint", "another folder")
    assert contents(project / "checkpoint") == before
    assert_one_line(runs.train_here(project, tuned), "trains the dVAE, not the AR model")
    assert_one_line(train(tmp_path / "run", optimizer__freeze="nothing.*"), "matches no parameter")
    assert_one_line(train(tmp_path / "run", reconstruction="l1"), "one of mse, smooth_l1")
    assert_one_line(train(tmp_path / "run", conditioning_clips=2), "conditioning_clips")
    assert_one_line(train(tmp_path / "run", data=tmp_path / "none"), "does not exist")
    assert not (tmp_path / "run").exists()
