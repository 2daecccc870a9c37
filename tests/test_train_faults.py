"""What befalls train.py on two hosts: a signal, a kill, a damaged checkpoint, a full disk. No run hangs, none is lost.

All happen to one run in the quick test, and each ten times at random moments in the slow ones.
"""

from __future__ import annotations

import random
import re
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
TEN_TIMES = pytest.mark.parametrize("seed", range(1, 11))
GOING_ON = re.compile(r"going on from step (\d+)")


@pytest.fixture(scope="session")
def four_steps(project: Path) -> Path:
    """A run to copy, of two hosts: checkpoints of steps 2 and 4."""
    return runs.made_once(project / "four-steps", lambda run: train_on(project, run, 4))


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


def resumed_from(project: Path, run: Path, steps: int) -> int:
    [step] = GOING_ON.findall(train_on(project, run, steps)[0][1])
    return int(step)


def signalled(project: Path, run: Path, moment: random.Random, within: int = 40) -> tuple[int, str]:
    """A signal to one host saves the same step on all, and ends them. Gives that step, and what the main host said."""
    hosts = start(project, run, LONG)
    runs.wait_for_steps(run, len(runs.history(run)) + moment.randint(1, within))
    hosts[moment.randrange(2)].send_signal(signal.SIGTERM)
    for code, out, errors in (ended := runs.outputs(hosts, SECONDS)):
        assert code == 0, out + errors
        assert "Traceback" not in errors
    stopped = int(ended[0][1].split("stopped and saved at step ")[1].split(";")[0])
    assert saved(run)[-1] == stopped
    return stopped, ended[0][1]


def killed(project: Path, run: Path, moment: random.Random, within: int = 40) -> None:
    """The other host ends, and says why."""
    before, victim = len(runs.history(run)), moment.randrange(2)
    hosts = start(project, run, LONG)
    runs.wait_for_steps(run, before + moment.randint(4, within))
    hosts[victim].kill()
    ended = runs.outputs(hosts, SECONDS)
    assert ended[victim][0] == -signal.SIGKILL
    code, _, errors = ended[1 - victim]
    assert code == parallel.LOST_HOST, errors
    line = one_line(errors)
    assert "was lost" in line
    assert "run the same command again on all hosts" in line


def on_a_full_disk(project: Path, run: Path, moment: random.Random) -> None:
    """Where the host that writes cannot, all end, and what was saved before is whole."""
    before = saved(run)
    hosts = start(project, run, before[-1] + 6, largest_file=moment.randint(50_000, 100_000))
    (code, _, errors), (other, _, other_errors) = runs.outputs(hosts, SECONDS)
    assert code == 2, errors
    assert "could not be written" in one_line(errors)
    assert other in (2, parallel.LOST_HOST), other_errors
    one_line(other_errors)
    assert saved(run) == before
    shutil.rmtree(run / "tensorboard", ignore_errors=True)


def damage(params: Path, seed: int) -> None:
    damaged = [params / "manifest.ocdbt"] if seed % 2 else [path for path in params.rglob("d/*") if path.is_file()]
    assert damaged
    for path in damaged:
        path.write_bytes(path.read_bytes()[: int(random.Random(seed).random() * path.stat().st_size)])


@pytest.mark.timeout(900)  # six process starts, each as long as a machine is busy
def test_a_run_that_meets_every_fault_goes_on(project: Path, tmp_path: Path) -> None:
    """After a kill, a full disk and a damaged checkpoint, until a signal. Slow tests take each of them to its end."""
    run, moment = tmp_path / "run", random.Random(0)
    killed(project, run, moment, within=8)
    on_a_full_disk(project, run, moment)
    whole, newest = saved(run)[-2:]
    damage(run / "steps" / str(newest) / "params", seed=0)
    stopped, said = signalled(project, run, moment, within=8)
    assert GOING_ON.findall(said) == [str(whole)]
    assert stopped > whole
    assert [e["step"] for e in runs.history(run) if e["kind"] == "train"] == list(range(1, stopped + 1))


@pytest.mark.slow
@TEN_TIMES
def test_a_signal_to_one_host_saves_the_same_step_on_all_and_ends_them(
    project: Path, tmp_path: Path, seed: int
) -> None:
    stopped, _ = signalled(project, tmp_path / "run", random.Random(seed))
    assert resumed_from(project, tmp_path / "run", stopped + 2) == stopped


@pytest.mark.slow
@TEN_TIMES
def test_a_killed_host_ends_the_other_and_the_run_goes_on(project: Path, tmp_path: Path, seed: int) -> None:
    run = tmp_path / "run"
    killed(project, run, random.Random(seed))
    newest = saved(run)[-1]
    assert resumed_from(project, run, newest + 2) == newest


@pytest.mark.slow
@TEN_TIMES
def test_a_damaged_newest_checkpoint_is_skipped_by_all(project: Path, run: Path, seed: int) -> None:
    damage(run / "steps" / "4" / "params", seed)
    assert resumed_from(project, run, 6) == 2


@pytest.mark.slow
@TEN_TIMES
def test_a_full_disk_of_the_host_that_writes_ends_all(project: Path, run: Path, seed: int) -> None:
    on_a_full_disk(project, run, random.Random(seed))
    assert resumed_from(project, run, 8) == 4
