"""Whole runs through the command line: learning, stopping, going on bit for bit, and what users get wrong."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree

import jax
import numpy as np
import pytest
import soundfile

import tortoise_jax as tj
from convert import flax_to_torch
from tests.support import runs
from tests.support.conversion import run as run_command
from tests.support.runs import assert_one_line
from tortoise_jax import speak
from tortoise_jax.audio import SAMPLE_RATE
from tortoise_jax.checkpoints.parts import Part, abstract_tree
from tortoise_jax.checkpoints.pretrained import load_pretrained, save_pretrained
from tortoise_jax.checkpoints.run_checkpoints import RunCheckpoints
from tortoise_jax.data.dataset import Dataset
from tortoise_jax.data.plan import BatchPlan
from tortoise_jax.data.preparation import Options, prepare
from tortoise_jax.errors import UserError
from tortoise_jax.files import locked
from tortoise_jax.training import run_data

STEPS = runs.FIELDS["steps"]
KILLS = 40
STEPPED: dict[str, Any] = {"optimizer__schedule": None}  # the recipe's own: a rate that falls


@pytest.fixture(scope="session")
def undisturbed(project: Path) -> Path:
    """A run from start to end, with drafts and an export. To be read only."""
    fields = {"sample_every": 4, "export": "voice.pth", "prompts": "('Yes.',)"}
    return runs.made_once(project / "undisturbed", lambda run: runs.succeed(runs.train(project, run, **fields)))


@pytest.fixture
def finished(undisturbed: Path, tmp_path: Path) -> Path:
    """The same run, to be written into."""
    return Path(shutil.copytree(undisturbed, tmp_path / "finished"))


def assert_same_run(run: Path, other: Path) -> None:
    """Equal final weights, optimiser state and loss curves, bit for bit."""
    ours, theirs = (load_pretrained(path, ("ar",), STEPS).ar.params for path in (run, other))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    checksums = [
        json.loads(next((path / "steps" / str(STEPS)).glob("progress/*")).read_text()) for path in (run, other)
    ]
    assert checksums[0] == checksums[1]
    curves = [[entry for entry in runs.history(path) if entry["kind"] != "sample"] for path in (run, other)]
    assert curves[0] == curves[1]


def test_a_run_leaves_what_the_readme_promises(undisturbed: Path) -> None:
    made = {path.name for path in undisturbed.iterdir()}
    assert made >= {"config.json", "history.jsonl", "report.html", "summary.json", "steps", "tensorboard", "voices"}
    assert made >= {"voice.pth", "voice.json", "tortoise.json", "tokenizer.json", "mel_norms.txt", "dvae", "samples"}
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert summary["ended"] == "finished"
    assert summary["steps"] == STEPS
    assert [step for step, _ in summary["validation_mel"]] == [0, 3, 6]
    assert summary["validation_mel"][-1][1] < summary["validation_mel"][0][1]
    assert [sample["step"] for sample in summary["samples"]] == [0, 6]
    assert all((undisturbed / sample["file"]).stat().st_size > 44 for sample in summary["samples"])


PYTHON = """
import sys
from pathlib import Path
import tortoise_jax as tj

project, fields = Path(sys.argv[1]), eval(sys.argv[2])
checkpoint, data = project / "checkpoint", project / "python" / "data"
report = tj.prepare(project / "recordings", checkpoint, data, workers=0)
settings = tj.get_config(checkpoint=str(checkpoint), data=str(data), **fields)
untouched = settings.to_json_best_effort()
run = tj.train(settings, project / "python" / "run")
assert settings.to_json_best_effort() == untouched
print(tj.load(run).export(run / "again" / "voice.pth")[0])
"""


def test_python_makes_the_same_run_bit_for_bit(undisturbed: Path, project: Path) -> None:
    """Data set, weights, losses and export of `tj.prepare`, `tj.train` and `model.export` are the commands'."""
    fields = runs.FIELDS | {"sample_every": 4, "export": "voice.pth", "prompts": ("Yes.",)}
    (project / "python" / "run" / "again").mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, "-c", PYTHON, str(project), repr(fields)],
        cwd=runs.ROOT,
        env=runs.environment(),
        capture_output=True,
        text=True,
        timeout=runs.SECONDS,
    )
    assert done.returncode == 0, done.stderr
    headers = [json.loads((project / of / "dataset.json").read_text())["sha256"] for of in ("data", "python/data")]
    assert headers[0] == headers[1]
    run = project / "python" / "run"
    assert_same_run(run, undisturbed)
    exported = [folder / "voice.pth" for folder in (undisturbed, run, run / "again")]
    assert len({path.read_bytes() for path in exported}) == 1
    assert f"{exported[2]}: " in done.stdout


def test_tensorboards_own_reader_finds_the_curves(undisturbed: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(undisturbed / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert tags >= {"loss/mel", "loss/text", "loss/stop", "loss/codes_from_0", "learning_rate", "padding_share"}
    assert tags >= {"grad_norm/decayed", "grad_norm/undecayed", "grad_norm/gpt", "rate/clips_per_second"}
    assert tags >= {"validation/mel", "validation/stop", "sample/share_that_stops", "sample/trailing_silence"}
    losses = {entry.step: entry.value for entry in events.Scalars("loss/mel")}
    curve = {entry["step"]: entry["mel"] for entry in runs.history(undisturbed) if entry["kind"] == "train"}
    assert losses == pytest.approx(curve)
    assert events.Tags()["audio"]


def test_the_report_is_whole_in_itself(undisturbed: Path) -> None:
    page = (undisturbed / "report.html").read_text()
    assert page.count("<svg") == 1
    assert page.count("<audio") == 3  # a recording and two drafts
    assert "data:audio/wav;base64,UklGR" in page  # "RIFF": the drafts are inside
    assert not [word for word in ('src="http', 'href="http', "<script", "<link") if word in page]
    for draft in re.findall(r"data:audio/wav;base64,([^\"]+)", page):
        waveform, rate = soundfile.read(io.BytesIO(base64.b64decode(draft)))
        assert rate == SAMPLE_RATE
        assert len(waveform)
    [curves] = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert ElementTree.fromstring(curves).tag.endswith("svg")


PROBE = """<script>addEventListener('load', async () => {
  const found = [document.documentElement.scrollWidth <= innerWidth];
  for (const e of document.querySelectorAll('svg, audio')) {
    const box = e.getBoundingClientRect(), seen = box.width > 100 && box.height > 20;
    const heard = e.tagName != 'AUDIO' || await new Promise(done => {
      e.onended = () => done(e.currentTime > 0.1), e.onerror = () => done('broken'), e.play().catch(done) });
    found.push(`${e.tagName} ${seen} ${heard}`);
  }
  new Image().src = 'http://127.0.0.1:PORT/?' + encodeURIComponent(found);
})</script>"""


@pytest.mark.slow
def test_the_report_in_a_browser(undisturbed: Path, tmp_path: Path) -> None:
    """Chromium, as narrow as a telephone, shows all in its width, plays every sound and says nothing on its console."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    assert browser, "this test needs chromium"
    page = (undisturbed / "report.html").read_text()
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
               "--autoplay-policy=no-user-gesture-required", "--remote-debugging-port=0", "--enable-logging=stderr",
               "--window-size=420,900", f"--user-data-dir={tmp_path / 'profile'}")  # fmt: skip
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(120)
        probe = PROBE.replace("PORT", str(server.getsockname()[1]))
        (tmp_path / "probed.html").write_text(page.replace("<style>", probe + "<style>", 1))
        command = [browser, *options, (tmp_path / "probed.html").as_uri()]
        with (tmp_path / "log").open("w") as log, subprocess.Popen(command, stderr=log, text=True) as opened:
            try:
                with server.accept()[0] as said:
                    request = unquote(said.recv(4096).decode().split()[1])
            finally:
                opened.terminate()
    assert request == f"/?true,svg true true{3 * ',AUDIO true true'}"  # a recording and two drafts
    assert "CONSOLE" not in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_a_run_with_an_average_goes_on_bit_for_bit(project: Path) -> None:
    whole, stopped, plain = (project / name for name in ("average", "average-stopped", "no-average"))
    fields = {"ema": 0.9}
    assert runs.train(project, whole, **fields).returncode == 0
    assert runs.train(project, stopped, **fields, steps=3).returncode == 0
    done = runs.train(project, stopped, **fields)
    assert "going on from step 3" in done.stdout, done.stderr
    assert_same_run(stopped, whole)
    assert runs.train(project, plain, **fields | {"ema": 0.0}).returncode == 0
    losses = [[entry["mel"] for entry in runs.history(run) if entry["kind"] == "train"] for run in (whole, plain)]
    assert losses[0] == losses[1], "the steps themselves are the same"
    params = [jax.tree.leaves(load_pretrained(run, ("ar",), STEPS).ar.params) for run in (whole, plain)]
    assert any((one != other).any() for one, other in zip(*params, strict=True)), "what is kept is the average"
    refused = runs.train(project, whole, **fields | {"ema": 0.5, "steps": 8})
    assert "was begun with what cannot change: ema: 0.9 -> 0.5" in refused.stderr


def test_finished_runs_are_left_as_they_are(project: Path, finished: Path) -> None:
    before = runs.history(finished)
    again = runs.succeed(runs.train_here(project, finished, sample_every=4, prompts="('Yes.',)"))
    assert f"going on from step {STEPS}" in again
    assert runs.history(finished) == before


@pytest.fixture(scope="session")
def two_lengths(project: Path) -> Path:
    """`data/`, whose training rows have two lengths, and `run/` on it from start to end."""

    def make(folder: Path) -> None:
        recordings = runs.write_recordings(folder / "recordings", runs.TWO_LENGTHS)
        prepare(recordings, project / "checkpoint", folder / "data", Options(workers=1))
        dataset = Dataset.open(folder / "data")
        plan = BatchPlan.for_training(dataset, dataset.split("train"), runs.FIELDS["batch_size"], seed=0, unit=1)
        assert {plan.batch(step)[0] for step in range(STEPS)} == {64, 96}
        runs.succeed(runs.train(project, folder / "run", data=folder / "data", **STEPPED))

    return runs.made_once(project / "two-lengths", make)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_the_same_command_goes_on(project: Path, two_lengths: Path, number: signal.Signals) -> None:
    run, data = two_lengths / f"stopped-by-{number}", two_lengths / "data"
    process = runs.start(project, run, data=data, **STEPPED)
    runs.wait_for_steps(run, 2)
    process.send_signal(number)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "stopped and saved at step" in output
    done = runs.train(project, run, data=data, **STEPPED)
    assert done.returncode == 0, done.stderr
    assert "going on from step" in done.stdout
    assert_same_run(run, two_lengths / "run")


@pytest.mark.slow
def test_killed_at_forty_moments_it_ends_the_same(project: Path, undisturbed: Path) -> None:
    """Forty SIGKILLs; a run that comes to its end between them is compared, and a new one begun."""
    started = time.monotonic()
    assert runs.train(project, project / "measured", save_every=1).returncode == 0
    longest = time.monotonic() - started
    moments, killed, finished, working = random.Random(0), 0, 0, 0
    while killed < KILLS or not finished:
        run = project / f"killed-{finished}"
        before = len(runs.history(run))
        process = runs.start(project, run, save_every=1)
        try:
            output, _ = process.communicate(timeout=moments.uniform(0.3, 1) * longest if killed < KILLS else None)
            assert process.returncode == 0, output
            assert_same_run(run, undisturbed)
            finished += 1
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            killed += 1
            working += len(runs.history(run)) > before
    assert working >= KILLS // 4, f"only {working} of {killed} kills came after a step: nothing to lose"


def test_killed_while_saving_and_on_a_full_disk_it_ends_the_same(project: Path, undisturbed: Path) -> None:
    run = project / "killed-once"
    process = runs.start(project, run, save_every=1)
    until = time.monotonic() + 300
    while not list(run.glob("steps/2*")) and time.monotonic() < until:  # being written, under whatever name
        time.sleep(0.005)
    process.kill()
    process.communicate()
    (run / ".history.jsonl.1.tortoise_jax-partial").write_text("half")
    (run / ".film.mp4.partial").write_text("somebody's")

    # The same command in a process that may write no file larger than 200 kB; a checkpoint has larger ones.
    limited = (
        "import resource, runpy, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, '.'); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2 * 10**5,) * 2); runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    python, *arguments = runs.command(project, run, save_every=1)
    done = subprocess.run(
        [python, "-c", limited, *arguments],
        cwd=runs.ROOT,
        env=runs.environment() | runs.NOT_KEPT,
        capture_output=True,
        text=True,
        timeout=runs.SECONDS,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, "tensorstore's threads printed theirs beside the line"
    assert [line for line in done.stderr.splitlines() if "error: " in line and "run the same command again" in line]

    again = runs.succeed(runs.train(project, run, save_every=1))
    assert "going on from step" in again
    assert_same_run(run, undisturbed)
    assert [path.name for path in run.glob(".*")] == [".film.mp4.partial"]


def test_a_run_that_overflows_stops_and_can_be_replayed(project: Path, tmp_path: Path) -> None:
    whole = load_pretrained(project / "checkpoint")
    huge = jax.tree.map(np.array, whole.ar.params)
    huge["mel_head"]["bias"][:2] = np.inf
    save_pretrained(whole.with_part("ar", Part.of_tree(whole.ar.config, huge)), tmp_path / "huge")
    fields = dict(checkpoint=tmp_path / "huge", max_nonfinite=2)
    done = runs.train_here(project, tmp_path / "run", **fields)
    assert_one_line(done, "2 steps in a row", "not finite", "optimizer.learning_rate")
    assert "the step was not applied. Clips: " in done.stderr + done.stdout
    [kept] = (tmp_path / "run" / "nonfinite").glob("step-*.npz")
    replayed = runs.train_here(project, tmp_path / "run", "--replay", str(kept), **fields)
    assert replayed.returncode == 0, replayed.stderr
    assert "its own loss is not finite" in replayed.stdout
    assert_one_line(runs.train_here(project, tmp_path / "run", "--replay", "no.npz", **fields), "--replay no.npz")


def test_flipped_bytes_fall_back_to_the_checkpoint_before(project: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "damaged"
    shutil.copytree(undisturbed, run)
    for file in (run / "steps" / str(STEPS)).rglob("d/*"):
        content = bytearray(file.read_bytes())
        for place in range(0, len(content), 97):
            content[place] ^= 0x55
        file.write_bytes(content)
    done = runs.train(project, run)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"steps/{STEPS} cannot be resumed from" in done.stdout
    assert "going on from step 3" in done.stdout
    assert (run / "steps" / f"{STEPS}.damaged").exists()
    assert_same_run(run, undisturbed)


def test_one_flipped_bit_is_refused_wherever_a_run_is_read(
    project: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run = tmp_path / "flipped"
    shutil.copytree(undisturbed, run)
    step = json.loads((run / "summary.json").read_text())["best_step"]
    runs.flip_one_bit(run / "steps" / str(step) / "params", load_pretrained(run, ("ar",), step).ar.params)
    named = f"steps/{step}/params is damaged: its checksum is not what was written"
    export = [run, "--step", step, "--out", tmp_path / "voice.pth"]
    say = ["--checkpoint", run, "--text", "Yes.", "--voice", runs.VOICE / "wavs", "--out", tmp_path / "draft.wav"]
    for main, arguments in ((flax_to_torch.main, export), (speak.main, say)):
        code, _, error = run_command(monkeypatch, capsys, main, *arguments)
        assert code == 2
        assert named in error
    assert not list(tmp_path.glob("voice.*")) + list(tmp_path.glob("draft.*"))
    assert_one_line(runs.train_here(project, tmp_path / "next", checkpoint=run), named)
    with pytest.raises(UserError, match=named):
        tj.load(run)


def test_a_diverged_run_says_so_and_offers_its_start(project: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fields = dict(steps=20, patience=2, export="voice.pth", optimizer__learning_rate=1.0)
    done = runs.train_here(project, run, **fields)
    assert_one_line(done, "diverged: held-out clips have got much worse since step 0", "nothing was exported")
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["ended"], summary["best_step"]) == ("diverged", 0)
    page = (run / "report.html").read_text()
    assert "step 0, the start: no step was better" in page
    assert "flax_to_torch" not in page
    assert not list(run.glob("voice*"))
    best, start = load_pretrained(run), load_pretrained(project / "checkpoint")
    assert best.step == 0
    jax.tree.map(np.testing.assert_array_equal, best.ar.params, start.ar.params)
    assert_one_line(
        runs.train_here(project, run, **fields), "diverged", "nothing was exported"
    )  # as often as it is run


def test_what_is_no_better_than_the_start_is_not_exported(project: Path, tmp_path: Path) -> None:
    """One step, too few to call it divergence."""
    run = tmp_path / "run"
    said = runs.succeed(runs.train_here(project, run, steps=1, export="voice.pth", optimizer__learning_rate=1.0))
    assert "no step was better than the start on held-out clips, so nothing is exported" in said
    assert not (run / "voice.pth").exists()
    lines = flax_to_torch.export(run, tmp_path / "start.pth")
    assert "of step 0" in lines[0]
    assert "the start of the run, before any training" in lines[1]


def test_a_diverged_run_without_held_out_clips_offers_nothing(project: Path, tmp_path: Path) -> None:
    run, data = tmp_path / "run", tmp_path / "data"
    prepare(project / "recordings", project / "checkpoint", data, Options(workers=1, validation=0))
    done = runs.train_here(project, run, data=data, steps=8, optimizer__learning_rate=1.0)
    assert_one_line(done, "diverged: training clips have got much worse", "no clip is held out")
    assert "the best is" not in done.stderr
    with pytest.raises(UserError, match="run diverged, and no held-out loss tells which step is good; --step N takes"):
        flax_to_torch.export(run, tmp_path / "voice.pth")
    assert not list(tmp_path.glob("voice*"))
    flax_to_torch.export(run, tmp_path / "voice.pth", step=8)


def test_a_run_into_a_real_nan_ends_as_one_that_failed(project: Path, tmp_path: Path) -> None:
    """Weights that grow fiftyfold at every step: gradients overflow after a few. The start and a report are kept."""
    run, growing = tmp_path / "run", {"optimizer__learning_rate": 1.0, "optimizer__weight_decay": 50.0}
    done = runs.train_here(project, run, steps=200, patience=0, max_nonfinite=2, export="voice.pth", **growing)
    assert_one_line(done, "2 steps in a row up to step", "not finite", "nothing was exported, the best is step 0")
    assert "NaN or Inf found" not in done.stderr
    assert list((run / "nonfinite").glob("step-*.npz"))
    summary = json.loads((run / "summary.json").read_text(), parse_constant=pytest.fail)
    assert (summary["ended"], summary["best_step"]) == ("stopped: not finite", 0)
    assert (run / "report.html").exists()
    assert not list(run.glob("voice*"))


def test_a_running_run_is_exported_and_keeps_as_many_checkpoints_as_asked(project: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = runs.start(project, run, steps=1000, eval_every=2, save_every=1, keep_last=1, patience=0)
    try:
        runs.wait_for_steps(run, 3)
        for number in range(6):  # of the best step, while others are saved and removed beside it
            flax_to_torch.export(run, tmp_path / f"{number}.pth")
            runs.wait_for_steps(run, 5 + number)
    finally:
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    kept = sorted(int(path.name) for path in (run / "steps").iterdir())
    assert len(kept) <= 2, "the best and the last, which is SIGTERM's"
    assert f"stopped and saved at step {kept[-1]}" in out


def test_one_run_at_a_time_in_a_folder(project: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with locked(run):
        done = runs.train_here(project, run)
    assert_one_line(done, f"--workdir {run} is being written by", f"process {os.getpid()} on", "another --workdir")
    assert not run.exists()


@pytest.mark.parametrize("name", ["config.json", "report.html", "ar/x"])
def test_a_folder_of_something_else_is_no_workdir(project: Path, tmp_path: Path, name: str) -> None:
    theirs = tmp_path / "theirs" / name
    theirs.parent.mkdir(parents=True)
    theirs.write_text('{"theirs": true}')
    named = f"--workdir {tmp_path / 'theirs'} holds a {name.split('/')[0]} that is no run's"
    assert_one_line(runs.train_here(project, tmp_path / "theirs"), named)
    assert [path for path in (tmp_path / "theirs").rglob("*") if path.is_file()] == [theirs]


def test_another_checkpoint_in_an_old_workdir_is_refused_by_name(project: Path, finished: Path, tmp_path: Path) -> None:
    """Of the same shapes, and of others."""
    start = load_pretrained(project / "checkpoint")
    changed = jax.tree.map(np.array, start.ar.params)
    changed["mel_head"]["bias"][0] += 1
    wider = dataclasses.replace(start.ar.config, mel_positions=start.ar.config.mel_positions + 1)
    other = {
        "weights": start.with_part("ar", Part.of_tree(start.ar.config, changed)),
        "dimensions": start.with_part("ar", Part.of_tree(wider, runs.random_params(abstract_tree(wider), 0))),
    }
    for what, checkpoint in other.items():
        save_pretrained(checkpoint, tmp_path / what)
        done = runs.train_here(project, finished, checkpoint=tmp_path / what)
        named = f"config.checkpoint ({project / 'checkpoint'} -> {tmp_path / what})"
        assert_one_line(done, named, f"its AR model had other {what}", "--workdir")


def test_recordings_that_changed_are_not_trained_on_as_they_were(project: Path, tmp_path: Path) -> None:
    recordings = runs.write_recordings(tmp_path / "recordings")
    prepared = tmp_path / "recordings-prepared"
    prepare(recordings, project / "checkpoint", prepared, Options(workers=1))
    manifest, first = recordings / "metadata.csv", next((recordings / "wavs").iterdir())
    texts, sound = manifest.read_text(), first.read_bytes()
    again = f"python -m tortoise_jax.prepare --data {recordings} --checkpoint"

    manifest.write_text(texts.rstrip() + " And more.\n")
    assert_one_line(runs.train_here(project, tmp_path / "run", data=recordings), "changed since", again)
    manifest.write_text(texts)
    first.unlink()  # a link to the bundled voice
    first.write_bytes(sound)
    assert_one_line(runs.train_here(project, tmp_path / "run", data=recordings), "changed since", again)
    prepare(recordings, project / "checkpoint", prepared, Options(workers=1))
    shutil.move(recordings, tmp_path / "moved")
    prepared.rename(tmp_path / "moved-prepared")
    header = json.loads((tmp_path / "moved-prepared" / "dataset.json").read_text())
    del header["inputs"]
    (tmp_path / "moved-prepared" / "dataset.json").write_text(json.dumps(header))  # as an older version wrote it
    said = runs.succeed(runs.train_here(project, tmp_path / "run", data=tmp_path / "moved", steps=1))
    assert "moved-prepared was made by an older version: it is used as it is" in said


def test_changed_settings_are_listed_or_refused(project: Path, finished: Path, tmp_path: Path) -> None:
    """A copy of the checkpoint elsewhere is the same one."""
    moved = shutil.copytree(project / "checkpoint", tmp_path / "moved")
    changed = {"text_weight": 0.02, "checkpoint": moved}
    listed = runs.succeed(runs.train_here(project, finished, sample_every=4, prompts="('Yes.',)", **changed))
    assert "changed since the run began: text_weight: 0.01 -> 0.02" in listed
    assert "changed since the run began: checkpoint: " in listed
    refused = runs.train_here(project, finished, batch_size=3, optimizer__name="adafactor")
    assert_one_line(refused, "batch_size: 4 -> 3", "optimizer.name: 'adamw' -> 'adafactor'", "--workdir")


def test_another_data_set_in_the_same_place_is_refused(project: Path, finished: Path, tmp_path: Path) -> None:
    recordings = runs.write_recordings(tmp_path / "recordings", clips=8)
    done = runs.train_here(project, finished, data=recordings)
    assert_one_line(done, f"data: {project / 'data'} -> {recordings}", "--workdir")
    assert "digest" not in done.stderr
    assert (tmp_path / "recordings-prepared").exists()  # given recordings, train.py prepares them itself


def test_a_data_set_without_a_clip_to_train_on_is_refused(project: Path, tmp_path: Path) -> None:
    """A table whose name says that all of it is held out."""
    recordings = runs.write_recordings(tmp_path / "recordings", clips=4)
    lines = (recordings / "metadata.csv").read_text().splitlines()
    paths = {path.stem: path for path in (recordings / "wavs").iterdir()}
    rows = [f"wavs/{paths[name].name}\t{text}" for name, text, *_ in (line.split("|") for line in lines)]
    table = recordings / "dev.tsv"
    table.write_text("\n".join(["audio\ttext", *rows]) + "\n")
    done = runs.train_here(project, tmp_path / "run", data=table, batch_size=None)
    assert_one_line(done, "no clip to train on", "all 4 are held out")


def test_a_data_set_of_another_dvae_is_refused(project: Path, tmp_path: Path) -> None:
    other = runs.write_checkpoint(tmp_path / "other", seed=5)
    assert_one_line(runs.train_here(project, tmp_path / "run", checkpoint=other), "another dVAE", "prepare it again")


def test_presets_freezing_and_adafactor(project: Path, tmp_path: Path) -> None:
    done = runs.train_here(
        project,
        tmp_path / "run",
        steps=2,
        eval_every=2,
        optimizer__learning_rate=None,
        optimizer__name="adafactor",
        optimizer__freeze="conditioning_encoder/.*",
    )
    assert "recipe for tens of clips (9), optimizer.learning_rate=2e-06" in runs.succeed(done)
    before = load_pretrained(project / "checkpoint", ("ar",)).ar.params
    after = load_pretrained(tmp_path / "run", ("ar",), 2).ar.params
    jax.tree.map(np.testing.assert_array_equal, after["conditioning_encoder"], before["conditioning_encoder"])
    assert not np.array_equal(after["mel_head"]["kernel"], before["mel_head"]["kernel"])


def test_a_run_cleans_text_as_its_data_was(project: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    prepare(project / "recordings", project / "checkpoint", data, Options(workers=0, cleaner="english"))
    prompts = "('Rock & roll.',)"
    drafted = {"steps": 1, "eval_every": 1, "sample_every": 1, "prompts": prompts}
    said = runs.succeed(runs.train_here(project, tmp_path / "run", data=data, **drafted))
    assert "2 drafts in" in said or "1 draft in" in said
    model = tj.load(tmp_path / "run")
    assert model.text_ids("R&B, 50%") == model.text_ids("r and b, fifty percent", "tortoise")
    with pytest.raises(UserError, match="does not know &"):
        tj.load(project / "checkpoint").text_ids("R&B")


def test_dot_is_a_folder_with_a_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`--config.data=.` is prepared beside the folder it stands for."""
    (tmp_path / "voice" / "wavs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "voice" / "wavs")
    assert run_data.named(Path("..")) == tmp_path / "voice"
    assert run_data.named(Path()) == tmp_path / "voice" / "wavs"
    assert run_data.named(Path("here")) == Path("here")


def test_patience_ends_a_run_that_gets_no_better(project: Path, tmp_path: Path) -> None:
    slow = {"steps": 20, "eval_every": 1, "patience": 2, "optimizer__learning_rate": 1e-12}
    assert "stopped early" in runs.succeed(runs.train_here(project, tmp_path / "run", **slow))
    assert sum(entry["kind"] == "train" for entry in runs.history(tmp_path / "run")) < 20


def test_the_plan_comes_with_and_without_a_data_set(project: Path, tmp_path: Path) -> None:
    for data, start in ((project / "data", runs.train), (tmp_path / "none", runs.train_here)):
        done = start(project, tmp_path / "run", "--plan", data=data)
        assert done.returncode == 0, done.stderr
        for part in (
            "parameters: ",
            "shapes to compile",
            "optimiser: ",
            "activations: ",
            "it fits",
            "the run: 6 steps",
            "once to compile ",
        ):
            assert part in done.stdout, done.stdout
    assert not (tmp_path / "run").exists()


def test_what_users_get_wrong_ends_in_one_line(project: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert_one_line(runs.train_here(project, run, checkpoint=tmp_path / "no"), "no does not exist", "torch_to_flax")
    assert_one_line(runs.train_here(project, run, data=tmp_path / "no"), "config.data=", "does not exist")
    assert_one_line(
        runs.train_here(project, run, data="/"), "config.data=/", "no data set, and none can be made beside it"
    )
    assert_one_line(runs.train_here(project, run, data="/dev/null"), "/dev/null: is a device, expected a file")
    assert_one_line(runs.train_here(project, run, seed=2**32), "seed is 4294967296, expected 0 to 2147483647")
    assert_one_line(runs.train_here(project, run, "--config.stepps=3"), "stepps")
    assert_one_line(runs.train_here(project, run, optimizer__freeze="nothing.*"), "matches no parameter")
    assert_one_line(
        runs.train_here(project, run, optimizer__freeze=".*"), "matches every parameter: nothing would be trained"
    )
    unknown = runs.train_here(project, run, sample_every=3, prompts="('Rock & roll.',)")
    assert_one_line(unknown, "prompts: 'Rock & roll.' holds characters the tokenizer does not know: &")
    (tmp_path / "file").write_text("")
    assert_one_line(runs.train_here(project, tmp_path / "file" / "run"), "--workdir", "cannot be written")
    assert not run.exists()


def test_steps_saved_elsewhere_are_resumed_from_and_exported(project: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Orbax's path library takes folders and buckets alike; here it is a folder."""
    run, bucket = tmp_path / "run", tmp_path / "bucket"
    runs.succeed(runs.train(project, run, save_to=bucket))
    again = runs.succeed(runs.train_here(project, run, save_to=bucket, export="voice.pth"))
    assert f"going on from step {STEPS}" in again
    assert not (run / "steps").exists()
    assert RunCheckpoints.to_read(run).steps() == RunCheckpoints.to_read(undisturbed).steps()
    ours, theirs = (load_pretrained(path, ("ar",)).ar.params for path in (run, undisturbed))
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True))
    assert (run / "voice.pth").exists()
    moved = runs.train_here(project, run, save_to=tmp_path / "other", steps=8)
    assert moved.returncode == 2
    assert "was begun with what cannot change: save_to" in moved.stderr
    another = runs.train_here(project, tmp_path / "another", save_to=bucket)
    assert another.returncode == 2
    assert f"config.save_to={bucket} holds steps of another run; choose an empty folder" in another.stderr


def test_a_bucket_that_cannot_be_reached_is_one_line(project: Path, tmp_path: Path) -> None:
    done = runs.train_here(project, tmp_path / "run", save_to="gs://nobodys/steps")
    assert done.returncode == 2
    [line] = [line for line in done.stderr.splitlines() if "error" in line]
    assert "gs://nobodys/steps, where" in line
    assert "cannot be reached" in line
    assert "Traceback" not in done.stderr
