"""train.py itself on several hosts: the same run as on one, started, taken up again, exported, or refused."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

from tests.support import runs
from tortoise_jax.checkpoints.pretrained import load_pretrained
from tortoise_jax.data.preparation import Options, prepare

STEPS = 20
# A batch that four devices can share; DLAS's rate, at which what floating point rounds stays what it is.
FIELDS: dict[str, Any] = {
    "steps": STEPS,
    "eval_every": 4,
    "sample_every": STEPS,
    "prompts": "('Yes.',)",
    "export": "voice.pth",
    "optimizer__learning_rate": 1e-5,
}
SAME_LOSS, SAME_WEIGHTS = 1e-6, 1e-5


@pytest.fixture(scope="session")
def one_host(project: Path) -> Path:
    """Four devices of one host."""
    return runs.made_once(project / "one-host", lambda run: runs.succeed(runs.train(project, run, devices=4, **FIELDS)))


def losses(run: Path) -> dict[tuple[str, int], float]:
    return {(e["kind"], e["step"]): e["total"] for e in runs.history(run) if e["kind"] != "sample"}


def assert_same_run(run: Path, other: Path) -> None:
    """Loss curves, final weights and the exported file agree to what summing in another order rounds."""
    ours, theirs = losses(run), losses(other)
    assert ours.keys() == theirs.keys()
    assert {step for kind, step in ours if kind == "train"} == set(range(1, STEPS + 1))
    for key, value in theirs.items():
        assert abs(ours[key] - value) <= SAME_LOSS * abs(value), key
    weights = [jax.tree.leaves(load_pretrained(path, ("ar",), STEPS).ar.params) for path in (run, other)]
    for a, b in zip(*weights, strict=True):
        assert np.max(np.abs(a - b)) <= SAME_WEIGHTS * np.max(np.abs(b))
    exported = [torch.load(path / "voice.pth", weights_only=True) for path in (run, other)]
    assert list(exported[0]) == list(exported[1])
    for key, value in exported[1].items():
        assert (exported[0][key] - value).abs().max() <= SAME_WEIGHTS * value.abs().max(), key


def assert_all_ended(ended: list[tuple[int, str, str]]) -> None:
    for code, out, errors in ended:
        assert code == 0, out + errors
        assert "Traceback" not in errors


@pytest.mark.parametrize(("hosts", "devices"), [(2, 2), pytest.param(4, 1, marks=pytest.mark.slow)])
def test_hosts_train_the_same_run_and_take_it_up_again(project: Path, one_host: Path, hosts: int, devices: int) -> None:
    run = project / f"{hosts}x{devices}"
    ended = runs.outputs(runs.start_hosts(project, run, hosts, devices, **FIELDS))
    assert_all_ended(ended)
    assert f"devices: 4 x cpu on {hosts} hosts" in ended[0][1]
    assert "finished; report: " in ended[0][1]
    for host, (_, out, _) in enumerate(ended):
        assert f"host {host} of {hosts}: {devices} of 4 devices" in out
        lines = [line for line in out.splitlines() if not line.startswith("[Gloo]")]  # of a library in C++
        assert host == 0 or len(lines) == 1  # the main host says everything else
    assert (run / "report.html").exists()
    assert len(list((run / "samples").glob("step-*.wav"))) == 2
    assert_same_run(run, one_host)
    again = runs.outputs(runs.start_hosts(project, run, hosts, devices, **FIELDS))
    assert_all_ended(again)
    assert f"going on from step {STEPS}" in again[0][1]
    assert_same_run(run, one_host)


@pytest.mark.slow
def test_taken_up_by_other_numbers_of_hosts_it_is_the_same_run(project: Path, one_host: Path) -> None:
    """2 hosts of 2 devices, then 1 of 4, then 4 of 1."""
    run, before = project / "handed-on", 0
    for hosts, devices, steps in ((2, 2, 8), (1, 4, 12), (4, 1, STEPS)):
        ended = runs.outputs(runs.start_hosts(project, run, hosts, devices, **FIELDS | {"steps": steps}))
        assert_all_ended(ended)
        assert not before or f"going on from step {before}" in ended[0][1]
        before = steps
    assert_same_run(run, one_host)


@pytest.mark.slow
def test_hosts_stop_early_together(project: Path, tmp_path: Path) -> None:
    fields = FIELDS | {"patience": 2, "optimizer__learning_rate": 1e-12, "export": ""}  # nothing gets better
    ended = runs.outputs(runs.start_hosts(project, tmp_path / "run", 2, 1, **fields))
    assert_all_ended(ended)
    assert "stopped early; report: " in ended[0][1]
    assert max(step for kind, step in losses(tmp_path / "run") if kind == "train") == 8


def test_hosts_with_other_settings_are_refused_by_name(project: Path, tmp_path: Path) -> None:
    hosts = runs.start_hosts(project, tmp_path / "run", 2, 1, **FIELDS, of_second={"seed": 1})
    for code, _, errors in runs.outputs(hosts):
        assert code == 2, errors
        assert "the configuration differs between hosts" in errors
        assert "seed: 0 on host 0, 1 on host 1" in errors


@pytest.fixture(scope="session")
def folders(project: Path) -> list[Path]:
    """Two hosts' own storage: the checkpoint is the same, the data sets differ by a clip."""

    def make(folder: Path, clips: int) -> None:
        folder.mkdir()
        (folder / "checkpoint").symlink_to(project / "checkpoint")
        recordings = runs.write_recordings(folder / "recordings", clips)
        prepare([recordings], folder / "checkpoint", folder / "data", Options(workers=1))

    made = {"first": runs.CLIPS, "second": runs.CLIPS - 1}
    return [runs.made_once(project / name, functools.partial(make, clips=clips)) for name, clips in made.items()]


OWN = {"checkpoint": "checkpoint", "data": "data"}


def test_hosts_with_other_data_under_the_same_name_are_refused(project: Path, folders: list[Path]) -> None:
    hosts = runs.start_hosts(project, folders[0] / "refused", 2, 1, folders=folders, **FIELDS | OWN)
    for code, _, errors in runs.outputs(hosts):
        assert code == 2, errors
        assert "the data set differs between hosts: [1] do not have what host 0 has" in errors
    assert not (folders[0] / "refused").exists()


def test_a_run_folder_that_hosts_do_not_share_is_refused(project: Path, folders: list[Path]) -> None:
    for folder in folders:
        (folder / "run").mkdir()
    own = OWN | {"data": project / "data"}
    hosts = runs.start_hosts(project, Path("run"), 2, 1, folders=folders, **FIELDS | own)
    for code, _, errors in runs.outputs(hosts):
        assert code == 2, errors
        assert "run must be on storage that all hosts share; hosts [1] do not see host 0's folder" in errors
    assert [list((folder / "run").iterdir()) for folder in folders] == [[], []]
