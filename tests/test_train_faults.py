"""What befalls train.py on two hosts: a signal, a kill, a damaged checkpoint, a full disk. No run hangs, none is lost.

Each happens once in the quick tests, early in the run, and ten times at random moments in the slow ones.
"""

from __future__ import annotations

import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.support import runs
from tortoise_jax import parallel

LONG = 4000  # steps, which no run here comes to
FIELDS: dict[str, Any] = {"export": "", "optimizer__learning_rate": 1e-5, "eval_every": LONG, "save_every": 2}
SECONDS = 300  # for all hosts to end: to join and compile takes long on a busy machine
EARLY, LATE = 6, 40  # steps before a fault, at most
ONCE_AND_TEN_TIMES = pytest.mark.parametrize(
    "seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 11))]
)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def four_steps(project: Path) -> Path:
    """A run to copy, of two hosts: checkpoints of steps 2 and 4."""
    train_on(project, project / "four-steps", 4)
    return project / "four-steps"


@pytest.fixture
def run(four_steps: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(four_steps, tmp_path / "run"))


def start(project: Path, run: Path, steps: int, **more: Any) -> list[Any]:
    return runs.start_hosts(project, run, 2, 1, **FIELDS | {"steps": steps} | more)


def saved(run: Path) -> list[int]:
    return sorted(int(path.name) for path in (run / "steps").glob("*") if path.name.isdigit())


def train_on(project: Path, run: Path, steps: int) -> list[tuple[int, str, str]]:
    """The same command on both hosts, which must come to the end."""
    ended = runs.outputs(start(project, run, steps), SECONDS)
    for code, out, errors in ended:
        assert code == 0, out + errors
        assert "Traceback" not in errors
    assert [e["step"] for e in runs.history(run) if e["kind"] == "train"] == list(range(1, steps + 1))
    return ended


def one_line(errors: str) -> str:
    assert "Traceback" not in errors
    [line] = [line for line in errors.splitlines() if "error: " in line and "Warning: " not in line]
    return line


@ONCE_AND_TEN_TIMES
def test_a_signal_to_one_host_saves_the_same_step_on_all_and_ends_them(
    project: Path, tmp_path: Path, seed: int
) -> None:
    moment = random.Random(seed)
    hosts = start(project, tmp_path / "run", LONG)
    runs.wait_for_steps(tmp_path / "run", moment.randint(1, LATE if seed else EARLY))
    hosts[moment.randrange(2)].send_signal(signal.SIGTERM)
    for code, out, errors in (ended := runs.outputs(hosts, SECONDS)):
        assert code == 0, out + errors
        assert "Traceback" not in errors
    stopped = int(ended[0][1].split("stopped and saved at step ")[1].split(";")[0])
    assert saved(tmp_path / "run")[-1] == stopped
    assert f"going on from step {stopped}" in train_on(project, tmp_path / "run", stopped + 2)[0][1]


@ONCE_AND_TEN_TIMES
def test_a_killed_host_ends_the_other_and_the_run_goes_on(project: Path, tmp_path: Path, seed: int) -> None:
    moment = random.Random(seed)
    run, victim = tmp_path / "run", moment.randrange(2)
    hosts = start(project, run, LONG)
    runs.wait_for_steps(run, moment.randint(4, LATE if seed else EARLY))
    hosts[victim].kill()
    ended = runs.outputs(hosts, SECONDS)
    assert ended[victim][0] == -signal.SIGKILL
    code, _, errors = ended[1 - victim]
    assert code == parallel.LOST_HOST, errors
    line = one_line(errors)
    assert "was lost" in line
    assert "run the same command again on all hosts" in line
    assert "going on from step" in train_on(project, run, saved(run)[-1] + 2)[0][1]


@ONCE_AND_TEN_TIMES
def test_a_damaged_newest_checkpoint_is_skipped_by_all(project: Path, run: Path, seed: int) -> None:
    params = run / "steps" / "4" / "params"
    damaged = [params / "manifest.ocdbt"] if seed % 2 else [path for path in params.rglob("d/*") if path.is_file()]
    for path in damaged:
        path.write_bytes(path.read_bytes()[: int(random.Random(seed).random() * path.stat().st_size)])
    ended = train_on(project, run, 6)
    assert "going on from step 2" in ended[0][1], damaged


@ONCE_AND_TEN_TIMES
def test_a_full_disk_of_the_host_that_writes_ends_all(project: Path, run: Path, seed: int) -> None:
    before = saved(run)
    limit = random.Random(seed).randint(10_000, 100_000)
    (code, _, errors), (other, _, other_errors) = runs.outputs(start(project, run, 8, largest_file=limit), SECONDS)
    assert code == 2, errors
    assert "could not be written" in one_line(errors)
    assert other in (2, parallel.LOST_HOST), other_errors
    one_line(other_errors)
    assert saved(run) == before
    shutil.rmtree(run / "tensorboard", ignore_errors=True)
    assert "going on from step 4" in train_on(project, run, 8)[0][1]
