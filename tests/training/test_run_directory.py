"""What a run keeps: history, remarks, checkpoints on full and failing disks, non-finite steps to replay."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax.traverse_util import flatten_dict

from tests.support import runs, small
from tortoise_jax import parallel
from tortoise_jax.checkpoints import run_checkpoints
from tortoise_jax.checkpoints.pretrained import load_pretrained
from tortoise_jax.checkpoints.run_checkpoints import Manager, RunCheckpoints, steps_folder
from tortoise_jax.checkpoints.trees import checksum
from tortoise_jax.errors import UserError
from tortoise_jax.training import replay, report, run_directory
from tortoise_jax.training.run_directory import History

PARAMS = {"a": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}}
STATE = {"count": np.int32(0), "mu": {"a": {"kernel": np.ones((2, 3), np.float32)}}}


def saved(folder: Path, losses: dict[int, float | None], keep_last: int = 2) -> RunCheckpoints:
    checkpoints = RunCheckpoints(folder, keep_last)
    for step, loss in losses.items():
        params = jax.tree.map(lambda leaf, step=step: leaf + np.float32(step), PARAMS)
        checkpoints.save(step, params, STATE, {"step": step, "skipped": 0}, loss)
    checkpoints.finish()
    return RunCheckpoints(folder, keep_last)


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: 2.5})
    assert sorted(checkpoints.manager.all_steps()) == [2, 4, 5]
    assert (checkpoints.best(), checkpoints.newest()) == (2, 5)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), PARAMS)
    step, params = checkpoints.restore_params(shapes, None)
    assert step == 2
    np.testing.assert_array_equal(params["a"]["kernel"], PARAMS["a"]["kernel"] + 2)
    with pytest.raises(UserError, match=r"holds no step 3, only \[2, 4, 5\]"):
        checkpoints.restore_params(shapes, 3)


def test_no_more_are_kept_than_asked_for(tmp_path: Path) -> None:
    """Most have no validation loss, or one that is not a number; the best may be the start."""
    losses = dict.fromkeys(range(17)) | {0: 1.0, 4: 3.0, 8: float("nan"), 12: float("inf")}
    checkpoints = saved(tmp_path, losses)
    assert checkpoints.steps() == [0, 15, 16]
    assert (checkpoints.best(), checkpoints.newest()) == (0, 16)


def test_saves_that_were_killed_are_removed(tmp_path: Path) -> None:
    saved(tmp_path, {1: None})
    half = tmp_path / "steps" / "7.orbax-checkpoint-tmp"
    half.mkdir()
    RunCheckpoints.to_read(tmp_path)
    assert half.exists(), "a run may be writing it"
    RunCheckpoints(tmp_path)
    assert not half.exists()


@pytest.mark.parametrize("killed_at", ["config.json", "steps.txt", "tortoise.json"])
def test_a_start_that_is_killed_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: str) -> None:
    """Its steps go where they were meant to go, whichever file it did not come to write."""
    pretrained = load_pretrained(runs.write_checkpoint(tmp_path / "checkpoint"))
    run, settings = tmp_path / "run", {"save_to": str(tmp_path / "bucket"), "data_digest": ""}
    run.mkdir()
    write_atomically, write_metadata = run_directory.write_atomically, run_directory.write_metadata

    def killed(path: Path, *content: object, **more: object) -> None:
        raise KeyboardInterrupt

    write_until = lambda path, content: (killed if path.name == killed_at else write_atomically)(path, content)
    monkeypatch.setattr(run_directory, "write_atomically", write_until)
    monkeypatch.setattr(run_directory, "write_metadata", killed)
    with pytest.raises(KeyboardInterrupt):
        run_directory.write_beginning(run, settings, pretrained, "ar")
    monkeypatch.setattr(run_directory, "write_atomically", write_atomically)
    monkeypatch.setattr(run_directory, "write_metadata", write_metadata)
    run_directory.check_folder(run)
    run_directory.write_beginning(run, settings, pretrained, "ar")
    assert str(steps_folder(run)) == str(tmp_path / "bucket")
    assert (run / "tortoise.json").exists()


def test_a_background_save_that_fails_by_a_lost_host_is_known_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it is one line more, which says to make room on the disk."""
    ended: list[UserError] = []
    monkeypatch.setattr(parallel, "end_for_all", ended.append)
    lost = jax.errors.JaxRuntimeError("Barrier timed out: connection closed by peer")
    checkpoints = RunCheckpoints(tmp_path)
    checkpoints.manager.failed(lost)
    checkpoints.manager.failed(OSError("no space left"))
    assert [parallel.by_lost_host(error) for error in ended] == [lost, None]


def test_one_flipped_bit_is_refused_by_name(tmp_path: Path) -> None:
    saved(tmp_path, {1: 2.0, 2: 1.0})
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), PARAMS)
    runs.flip_one_bit(tmp_path / "steps" / "2" / "params", {"a": {"kernel": PARAMS["a"]["kernel"] + 2}})
    reader = RunCheckpoints.to_read(tmp_path)
    for step in (None, 2):
        with pytest.raises(UserError, match=r"steps/2/params is damaged: its checksum .* other steps: \[1\]"):
            reader.restore_params(shapes, step)
    assert reader.restore_params(shapes, 1)[0] == 1
    progress = next((tmp_path / "steps" / "2").glob("progress/m*"))
    progress.write_text(json.dumps({"step": 2, "skipped": 0, "crc32": 1}))  # as an older version wrote it
    assert RunCheckpoints.to_read(tmp_path).restore_params(shapes, 2)[0] == 2
    progress.write_text("{")
    with pytest.raises(UserError, match="steps/2/progress is damaged"):
        RunCheckpoints.to_read(tmp_path).restore_params(shapes, 2)


def test_a_checkpoint_that_a_running_run_removes_meanwhile_is_not_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes after the folder was listed, before it was looked at, when opened and when looked at again."""
    saved(tmp_path, {1: 2.0, 2: 3.0, 3: 1.0}, keep_last=3)
    look = Manager.metrics
    gone = [1, 2]

    def just_removed(self: Manager, step: int) -> Any:
        if gone and step == gone[0]:
            shutil.rmtree(tmp_path / "steps" / str(gone.pop(0)))
            raise FileNotFoundError(step)
        return look(self, step)

    monkeypatch.setattr(Manager, "metrics", just_removed)
    monkeypatch.setattr(run_checkpoints, "REMOVAL_SECONDS", 0)
    reader = RunCheckpoints.to_read(tmp_path)
    assert 1 not in reader.steps()
    reader.manager.reload()
    assert (reader.steps(), gone) == ([3], [])


def test_a_checkpoint_that_a_running_run_removes_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best is replaced by a better one while it is read."""
    run = saved(tmp_path, {1: 2.0, 2: 3.0})
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), PARAMS)
    reader = RunCheckpoints.to_read(tmp_path)
    read = RunCheckpoints.verified_params

    def slowly(self: RunCheckpoints, step: int, shapes: Any) -> Any:
        if step == 1:
            params = jax.tree.map(lambda leaf: leaf + np.float32(3), PARAMS)
            run.save(3, params, STATE, {"step": 3, "skipped": 0}, 1.0)
            run.manager.wait_until_finished()
        return read(self, step, shapes)

    monkeypatch.setattr(RunCheckpoints, "verified_params", slowly)
    step, params = reader.restore_params(shapes, None)
    assert step == 3
    np.testing.assert_array_equal(params["a"]["kernel"], PARAMS["a"]["kernel"] + 3)
    run.finish()


def test_what_is_restored_is_what_was_saved(tmp_path: Path) -> None:
    params, opt_state, progress = saved(tmp_path, {7: None}).restore(7, PARAMS, STATE)
    np.testing.assert_array_equal(params["a"]["kernel"], PARAMS["a"]["kernel"] + 7)
    np.testing.assert_array_equal(opt_state["mu"]["a"]["kernel"], STATE["mu"]["a"]["kernel"])
    assert (progress["step"], progress["skipped"]) == (7, 0)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says there what a process has held at most")
def test_a_save_takes_no_memory_of_its_own(tmp_path: Path) -> None:
    """Neither a copy of the state, which may be half of the memory there is, nor what compressing it would take."""
    size = 200_000_000
    program = f"""
import re, numpy as np
from pathlib import Path
from tortoise_jax.checkpoints.run_checkpoints import RunCheckpoints
noise = np.random.default_rng(0).standard_normal({size} // 4, np.float32)
checkpoints = RunCheckpoints(Path({str(tmp_path)!r}))
progress = {{"step": 1, "skipped": 0}}
checkpoints.save(1, {{"a": noise[:9]}}, {{"b": noise[:9]}}, progress, None)  # libraries loaded, threads started
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
before = peak()
checkpoints.save(2, {{"a": noise}}, {{"b": noise[:9]}}, progress, None)
print(peak() - before)
checkpoints.finish()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=280, check=True)
    assert int(done.stdout) < size / 4


def test_a_compressed_checkpoint_of_versions_before_is_resumed_from(tmp_path: Path) -> None:
    items = ocp.args.Composite(
        params=ocp.args.StandardSave(PARAMS),
        opt_state=ocp.args.StandardSave(STATE),
        progress=ocp.args.JsonSave({"step": 3, "skipped": 0, "crc32": checksum((PARAMS, STATE))}),
    )
    with ocp.CheckpointManager(tmp_path / "steps") as before:
        before.save(3, args=items)
    params, opt_state, progress = RunCheckpoints(tmp_path).restore(3, PARAMS, STATE)
    jax.tree.map(np.testing.assert_array_equal, (params, opt_state), (PARAMS, STATE))
    assert progress["step"] == 3


def test_on_cpu_a_save_has_ended_when_the_next_step_begins(tmp_path: Path) -> None:
    """Else that step would need a copy of the state, which is being written."""
    checkpoints = RunCheckpoints(tmp_path)
    checkpoints.save(1, PARAMS, STATE, {"step": 1, "skipped": 0}, None)
    assert not checkpoints.manager.is_saving_in_progress()
    checkpoints.finish()


def test_a_checksum_that_differs_is_not_resumed_from(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, {1: None, 2: None})
    file = next((tmp_path / "steps" / "2").glob("progress/*"))
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"crc32": content["crc32"] ^ 1}))
    said: list[str] = []
    found = checkpoints.restore_newest(PARAMS, STATE, said.append)
    assert found is not None
    assert found[2]["step"] == 1
    assert len(said) == 1
    assert "2 cannot be resumed from: its checksum is not what was written" in said[0]
    (tmp_path / "steps" / "1" / "progress" / file.name).write_text("{}")
    with pytest.raises(UserError, match="no checkpoint is whole"):
        RunCheckpoints(tmp_path).restore_newest(PARAMS, STATE, said.append)


def test_a_full_disk_leaves_the_older_checkpoint_and_says_so(tmp_path: Path) -> None:
    """The disk is full where a file may not grow beyond a few kilobytes."""
    saved(tmp_path, {1: None}).finish()
    program = f"""
import resource, numpy as np
from pathlib import Path
from tortoise_jax.checkpoints.run_checkpoints import RunCheckpoints
from tortoise_jax.errors import exit_with_one_line
def main():
    checkpoints = RunCheckpoints(Path({str(tmp_path)!r}))
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    noise = np.random.default_rng(0).standard_normal(100_000, np.float32)
    checkpoints.save(2, {{"a": noise}}, {{"b": noise}}, {{"step": 2, "skipped": 0}}, None)
    checkpoints.finish()
exit_with_one_line(main)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=280)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr, "tensorstore's threads printed theirs beside the line"
    line = next(line for line in done.stderr.splitlines() if "error: " in line and "could not be written" in line)
    assert "the checkpoints of steps [1] are whole" in line
    assert sorted(RunCheckpoints(tmp_path).manager.all_steps()) == [1]


def test_history_is_cut_back_to_where_a_run_goes_on(tmp_path: Path) -> None:
    history = History(tmp_path, 0, writes=True)
    for step in range(1, 6):
        history.add("train", step, {"mel": float(step)})
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # killed while writing
    again = History(tmp_path, 3, writes=True)
    assert again.curve("train", "mel") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    again.add("validation", 3, {"total": 2.0})
    assert again.has("validation", 3)
    assert not again.has("validation", 2)
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 4
    silent = History(tmp_path, 1, writes=False)
    silent.add("train", 2, {"mel": 0.0})
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    "line", [b"not json}", b"[1]", b'{"step": 1}', b'{"kind": "train", "step": "1"}', b"\xff}", b"", b"[" * 100_000]
)
def test_a_damaged_line_of_the_history_is_named(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "history.jsonl").write_bytes(b'{"kind": "train", "step": 1}\n' + line + b"\n")
    with pytest.raises(UserError, match=r"history.jsonl:2: the line is damaged, .*; remove it or put it right"):
        History(tmp_path, 3, writes=False)


def test_a_run_whose_folder_is_removed_says_so(tmp_path: Path) -> None:
    history = History(tmp_path / "run", 0, writes=True)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(UserError, match=r"history.jsonl: cannot be written: No such file .*: the run's folder is gone"):
        history.add("train", 1, {})


@pytest.mark.parametrize(("losses", "waited"), [([], 0), ([1.0], 0), ([3, 2, 1], 0), ([1, 2, 3], 2), ([2, 1, 1], 1)])
def test_patience_counts_evaluations_without_gain(losses: list[float], waited: int) -> None:
    assert run_directory.evaluations_without_gain(losses) == waited


def test_overfitting_is_said_only_where_both_curves_show_it() -> None:
    falling = [(step, 5.0 - 0.1 * step) for step in range(1, 21)]
    steady = [(step, 5.0) for step in range(1, 21)]
    worse = [(0, 5.0), (4, 4.0), (8, 4.1), (12, 4.2), (16, 4.3)]
    better = [(0, 5.0), (4, 4.5), (8, 4.3), (12, 4.2), (16, 4.1)]
    assert "since step 4" in run_directory.overfitting_remark(worse, falling)
    assert not run_directory.overfitting_remark(worse, steady)
    assert not run_directory.overfitting_remark(better, falling)
    assert not run_directory.overfitting_remark(worse[:3], falling)
    assert not run_directory.overfitting_remark([], falling)


def test_divergence_is_said_and_is_a_failure_only_from_the_start() -> None:
    """Numbers of a run with a rate of 1; loss by step of training is of the parameters before the step."""
    nan, inf = float("nan"), float("inf")
    growing = [(step, 4.0 + 20 * step) for step in range(1, 13)]
    for worse in ([(0, 4.39), (3, 73.8), (6, 176.0)], [(0, 4.39), (3, nan)], [(0, nan), (3, inf)]):
        assert run_directory.remark(worse, growing).startswith("diverged: ")
        assert run_directory.failure(worse, growing) == run_directory.remark(worse, growing)
    late = [(0, 4.39), (3, 4.0), (6, 70.0), (9, 176.0)]
    later = [(1, 4.4), (2, 4.3), (3, 4.2), (4, 4.1), *growing[4:]]
    assert "since step 3 (4, now 176)" in run_directory.remark(late, later)
    assert not run_directory.failure(late, later), "step 3 is better than the start"
    assert run_directory.failure([], growing), "no clip is held out"
    assert run_directory.failure([], [(step, nan if step > 6 else 4.0) for step in range(1, 13)])
    steady = [(step, 4.0 + 0.5 * (step % 2)) for step in range(1, 13)]
    for harmless in ([], [(0, 4.0), (3, 4.1), (6, 3.9)], [(0, 4.0), (3, 4.1), (6, 4.2)]):
        assert not run_directory.remark(harmless, steady)
        assert not run_directory.failure(harmless, steady)
    falling = [(step, 5.0 - 0.3 * step) for step in range(1, 13)]
    assert run_directory.remark([(0, 4.0), (3, 4.5), (6, 5.0), (9, 6.0)], falling).startswith("overfitting: ")


def test_the_best_is_the_checkpoints_best(tmp_path: Path) -> None:
    nan = float("nan")
    for number, losses in enumerate(({0: 2.0, 1: 1.0, 2: 1.0}, {0: nan, 1: 3.0, 2: 4.0}, {0: 1.0, 1: nan, 2: 2.0})):
        best = run_directory.best_evaluation(list(losses.items()))
        assert best is not None
        assert best[0] == saved(tmp_path / str(number), losses).best()
    assert run_directory.best_evaluation([(0, nan)]) is run_directory.best_evaluation([]) is None


def test_a_report_of_a_run_without_a_finite_loss_is_json_and_offers_nothing(tmp_path: Path) -> None:
    history = History(tmp_path, 0, writes=True)
    for step in range(1, 7):
        history.add("train", step, dict.fromkeys(("mel", "text", "stop", "total"), float("inf")))
    for step in (0, 3, 6):
        history.add("validation", step, dict.fromkeys(("mel", "text", "stop", "total"), float("nan")))
    report.write(tmp_path, history, "diverged", {}, {})
    facts = json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)
    assert facts["validation_total"] == [[0, None], [3, None], [6, None]]
    page = (tmp_path / "report.html").read_text()
    assert "none: no evaluation was finite" in page
    assert "There is nothing to use" in page
    assert "flax_to_torch" not in page


def test_a_report_names_what_to_do(tmp_path: Path) -> None:
    history = History(tmp_path, 0, writes=True)
    for step in range(1, 21):
        history.add("train", step, dict.fromkeys(("mel", "text", "stop", "total"), 5.0 - 0.1 * step))
    for step, loss in ((0, 5.0), (4, 4.0), (8, 4.1), (12, 4.2), (16, 4.3)):
        history.add("validation", step, dict.fromkeys(("mel", "text", "stop", "total"), loss))
    report.write(tmp_path, history, "finished", {"steps": 20, "data": "<voice>"}, {"speakers": 1})
    page = (tmp_path / "report.html").read_text()
    assert "overfitting" in page
    assert "add recordings" in page
    assert "&lt;voice&gt;" in page
    assert "None were made" in page
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["best_step"], summary["steps"]) == (4, 20)


def test_a_report_shows_epochs_the_rate_and_every_draft(tmp_path: Path) -> None:
    history = History(tmp_path, 0, writes=True)
    (tmp_path / "samples").mkdir()
    for step in range(1, 41):
        losses = dict.fromkeys(("mel", "text", "stop", "total"), 5.0 - 0.1 * step)
        history.add("train", step, losses | {"learning_rate": 1e-5})
        history.add("validation", step, dict.fromkeys(("mel", "text", "stop", "total"), 5.0 - 0.05 * step))
        for prompt in ("Yes.", "<No>."):
            file = f"samples/{step}-{len(prompt)}.wav"
            (tmp_path / file).write_bytes(b"RIFF" + bytes([step]))
            sample = {"prompt": prompt, "voice": "ann", "recording": "samples/ann.wav", "file": file}
            history.add("sample", step, sample | {"stopped": step > 20, "trailing_silence": 0.5})
    (tmp_path / "samples" / "ann.wav").write_bytes(b"RIFF of the recording")
    (tmp_path / "voices").mkdir()
    (tmp_path / "voices" / "ann.npz").touch()
    data = {"train hours": "0:12:34", "steps per epoch": 5}
    report.write(tmp_path, history, "finished", {}, data)
    page = (tmp_path / "report.html").read_text()
    (table,) = re.findall(r"<div class=wide><table>(.*?)</table>", page)
    head, *rows = table.split("<tr>")[1:]
    steps = [int(step) for step in re.findall(r"step (\d+)", head)]
    assert head.startswith("<th>text<th>voice<th>recording<th>step 1<th>")
    assert (len(steps), steps[-1], steps) == (report.MOST_STEPS, 40, sorted(set(steps)))
    assert "Shown are 12 of 40 steps; all are in samples/." in page
    assert [row.split("<td>")[1] for row in rows] == ["&lt;No&gt;.", "Yes."]
    recording = base64.b64encode(b"RIFF of the recording").decode()
    assert all(row.count("<audio") == 13 and row.count(recording) == 1 for row in rows)
    assert rows[0].count("did not stop") == sum(step <= 20 for step in steps)
    assert "0:12:34" in page
    assert f"<span class=flag>--voice</span> {tmp_path}/voices/ann.npz" in page
    assert "Held-out and training losses part: the gap between them has grown by" in page
    (svg,) = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert svg.count("<!-- epoch -->") == 4
    assert "<!-- learning rate -->" in svg


def test_losses_that_part_are_mentioned_and_others_are_not() -> None:
    training = [(step, 4.0 - 0.1 * step) for step in range(1, 13)]
    together = [(step, 4.3 - 0.1 * step) for step in (0, 3, 6, 9, 12)]
    apart = [(0, 4.3), (3, 4.0), (6, 3.9), (9, 3.85), (12, 3.83)]
    assert run_directory.parting(together, training) == ""
    assert run_directory.parting(apart[:3], training) == "", "two gaps are no trend"
    line = run_directory.parting(apart, training)
    assert line.startswith("Held-out and training losses part: the gap between them has grown by 0.73 since step 3.")
    assert run_directory.parting([(0, 4.3), (3, math.nan), (6, 3.9), (9, 3.8)], training) == ""
    assert run_directory.parting([], training) == run_directory.parting(apart, []) == ""


def test_a_step_that_was_not_finite_is_replayed_from_its_file(tmp_path: Path) -> None:
    params = jax.tree.map(np.array, small.params())
    clips = {name: value[None, None] for name, value in small.clips(0, rows=3).items()}
    clips["conditioning_mel"][0, 0, 1] = np.nan
    file = replay.save(tmp_path, 12, clips, params)
    step, batch, kept = replay.load(file)
    assert step == 12
    for name, value in flatten_dict(params, sep="/").items():
        np.testing.assert_array_equal(flatten_dict(kept, sep="/")[name], value)
    names = [f"clip-{i}" for i in range(1000)]
    step_config = dataclasses.replace(small.step_config(), axis=None)
    lines = replay.explain(step_config, step, batch, kept, names)
    guilty = names[int(clips["example"][0, 0, 1])]
    assert f"clip {guilty}: its own loss is not finite" in lines
    assert sum(line.startswith("clip ") for line in lines) == 1
    assert any(line.startswith("gradient of ") for line in lines)
    assert not [line for line in lines if line.startswith("parameter ")]


@pytest.mark.parametrize("content", [b"", b"not a file of ours", b"PK\x03\x04"])
def test_replay_refuses_other_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(UserError, match="not a file a non-finite step left"):
        replay.load(tmp_path / "x.npz")
    with pytest.raises(UserError, match="not a file a non-finite step left"):
        replay.load(tmp_path / "none.npz")
