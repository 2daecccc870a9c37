"""Every command of the README, run as it stands there (after `pip install`), at the tests' size."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support import readme, runs, stand_ins
from tests.support.torch_reference import tiny_dvae, tiny_unified_voice

ROOT = Path(__file__).parents[1]
# What makes the commands quick; none changes what they do.
QUICK = "--config.steps=2 --config.eval_every=2 --config.batch_size=2 --config.sample_every=0"
FAST = shlex.split(QUICK + " --config.gradient_accumulation_steps=1 --config.conditioning_clips=1")
RUN_ELSEWHERE = {
    "make demo": "by CI",
    "make test": "by CI",
    "make test-slow": "by hand: minutes long, gigabytes large",
    "pip install": "by the Makefile, with other extras",
    "gcloud": "needs a pod; the same train.py command is run on several processes by tests/test_train_hosts.py",
    "srun": "needs SLURM; likewise",
    "whisper": "another program",
}


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a user has it: the project, two .pth files, recordings."""
    folder = tmp_path_factory.mktemp("user")
    for name in ("convert", "configs", "tortoise_jax", "train.py"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "checkpoints").mkdir()
    # Of the sizes that test_wheel.py has: what the commands compile is found compiled there.
    torch.save(tiny_unified_voice(seed=1, **stand_ins.AR).state_dict(), folder / "checkpoints" / "autoregressive.pth")
    torch.save(tiny_dvae(seed=1, num_tokens=stand_ins.CODES).state_dict(), folder / "checkpoints" / "dvae.pth")
    card = {"tortoise_jax": "0.1.0", "heads": 4}  # what our exporter writes beside a .pth; the released size needs none
    (folder / "checkpoints" / "autoregressive.json").write_text(json.dumps(card))
    runs.write_recordings(folder / "data", clips=8)
    (folder / "clips").symlink_to(folder / "data" / "wavs")
    return folder


def run(user: Path, words: list[str]) -> subprocess.CompletedProcess[str]:
    python = [sys.executable, *words[1:]]
    environment = runs.environment() | {"PYTHONPATH": os.pathsep.join([str(user), str(ROOT)])}
    return subprocess.run(python, cwd=user, env=environment, capture_output=True, text=True, timeout=280)


def test_the_five_commands_of_real_use(user: Path) -> None:
    lines = readme.lines(readme.marked("real use"))
    assert [line.split()[1] for line in lines] == [
        "convert/torch_to_flax.py",
        "-m",
        "train.py",
        "convert/flax_to_torch.py",
    ]
    for line in lines:
        words = shlex.split(line) + (FAST if "train.py" in line else [])
        done = run(user, words)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    exported = torch.load(user / "voice.pth", weights_only=True)
    tiny_unified_voice(seed=2, **stand_ins.AR).load_state_dict(exported, strict=True)


def test_the_python_half_page(user: Path) -> None:
    test_needs = user / "checkpoints" / "tortoise"
    if not test_needs.exists():
        assert run(user, ["python", "convert/torch_to_flax.py"]).returncode == 0
    clip = next((user / "data" / "wavs").iterdir())
    code, commands = readme.marked("python"), readme.marked("python commands")
    # Another folder than the command's, whose data are not trimmed, and its size.
    commands = commands.replace('data-prepared"', 'python-prepared"').replace("runs/voice", "runs/python")
    quick = dict(word.removeprefix("--config.").split("=") for word in FAST)
    commands = commands.replace("steps=200", ", ".join(f"{name}={value}" for name, value in quick.items()))
    code = code.replace("data/wavs/clip.wav", f"data/wavs/{clip.name}")
    done = run(user, ["python", "-c", f"{code}\n{commands}"])
    assert done.returncode == 0, done.stderr
    assert "'mel': " in done.stdout
    for name in ("mine.pth", "voice.pth"):
        exported = torch.load(user / name, weights_only=True)
        tiny_unified_voice(seed=2, **stand_ins.AR).load_state_dict(exported, strict=True)


def test_inspect_and_speak_commands_of_the_text(user: Path) -> None:
    if not (user / "checkpoints" / "tortoise").exists():
        assert run(user, ["python", "convert/torch_to_flax.py"]).returncode == 0
    inline = [found for found in readme.inline() if found.startswith("python ")]
    inline.remove("python convert/torch_to_flax.py --download")  # needs a network; tests/test_download.py stands in
    inline.remove("python train.py --config configs/dvae.py --config.data=data")  # by tests/test_train_dvae.py, smaller
    inline.remove("python -m tortoise_jax.evaluate --run runs/voice")  # by tests/test_evaluate.py
    assert len(inline) == 3
    for line in inline:
        line = line.replace("FILE", "checkpoints/dvae.pth").replace("runs/voice", "checkpoints/tortoise")
        words = shlex.split(line) + (["--max_codes", "12"] if "speak" in line else [])
        done = run(user, words)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    assert (user / "draft.wav").stat().st_size > 44


def test_the_commands_of_another_language(user: Path) -> None:
    if not (user / "checkpoints" / "tortoise").exists():
        assert run(user, ["python", "convert/torch_to_flax.py"]).returncode == 0
    for line in readme.lines(readme.marked("another language")):
        done = run(user, shlex.split(line))
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    assert (user / "data-own" / "dataset.json").exists()


def test_every_other_command_is_run_somewhere() -> None:
    tested = [line for name in ("real use", "another language") for line in readme.lines(readme.marked(name))]
    for line in [line for block in readme.blocks("sh") for line in readme.lines(block)]:
        known = line in tested or "--coordinator HOST0:1234" in line or line.startswith(tuple(RUN_ELSEWHERE))
        assert known, line
