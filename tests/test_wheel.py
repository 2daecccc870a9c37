"""A built wheel, installed where the project's folder is not, does what the README promises."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from tests.support import runs
from tests.support.torch_reference import tiny_dvae, tiny_unified_voice

ROOT = Path(__file__).parent.parent
PACKED = ("tortoise_jax", "convert", "configs")
SOURCES = (*PACKED, "train.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE")
QUICK = [f"--config.{field}" for field in ("steps=2", "eval_every=2", "batch_size=2", "conditioning_clips=1")]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what git holds, so that nothing built before can slip into it."""
    copy = tmp_path_factory.mktemp("source")
    tracked = subprocess.run(["git", "ls-files", *SOURCES], cwd=ROOT, capture_output=True, text=True).stdout.split()
    for name in tracked:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    built = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", built, copy)
    [file] = built.iterdir()
    return file


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that has the wheel, and of this project nothing else.

    The packages the wheel needs are lent by the tests' own environment: a path file adds its folder, but does not read
    the path files in it, by which the project itself is installed there.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    [site_packages] = folder.glob("lib/*/site-packages")
    (site_packages / "lent.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    pip("install", "--no-deps", "--target", site_packages, wheel)
    return folder / "bin" / "python"


def pip(*arguments: object) -> None:
    words = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_file_with_code_and_the_assets_are_packed(wheel: Path) -> None:
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    code = {str(path.relative_to(ROOT)) for top in PACKED for path in (ROOT / top).rglob("*.py")}
    assets = {f"tortoise_jax/assets/{name}" for name in ("mel_norms.txt", "tokenizer_merges.txt")}
    assert packed == code | assets | {"train.py"}


def test_the_wheel_converts_prepares_trains_exports_and_speaks(python: Path, tmp_path: Path) -> None:
    ar = tiny_unified_voice(seed=1, max_text_tokens=60, max_mel_tokens=70)
    torch.save(ar.state_dict(), tmp_path / "autoregressive.pth")
    torch.save(tiny_dvae(seed=1).state_dict(), tmp_path / "dvae.pth")
    runs.write_recordings(tmp_path / "data", clips=6)

    where = run(python, tmp_path, "-c", "import tortoise_jax, train; print(tortoise_jax.__file__, train.__file__)")
    assert all(str(python.parents[1]) in path for path in where.split()), where
    files = ["--dvae", "dvae.pth", "--ar", "autoregressive.pth"]
    run(python, tmp_path, "-m", "convert.torch_to_flax", *files, "--heads", "4", "--out", "checkpoint")
    run(python, tmp_path, "-m", "tortoise_jax.prepare", "--data", "data", "--checkpoint", "checkpoint", "--out", "set")
    fields = [*QUICK, "--config.checkpoint=checkpoint", "--config.data=set", "--config.sample_every=0"]
    run(python, tmp_path, "-m", "train", "--config", "configs/ar.py", *fields, "--workdir=run")
    tiny_unified_voice(seed=2, max_text_tokens=60, max_mel_tokens=70).load_state_dict(
        torch.load(tmp_path / "run" / "voice.pth", weights_only=True), strict=True
    )
    speak = ["--checkpoint", "run", "--text", "Hello.", "--voice", "data/wavs", "--out", "draft.wav"]
    run(python, tmp_path, "-m", "tortoise_jax.speak", *speak, "--max_codes", "12")
    assert (tmp_path / "draft.wav").stat().st_size > 44
    assert json.loads((tmp_path / "run" / "summary.json").read_text())


@pytest.mark.slow
def test_the_wheels_other_commands_of_the_readme(python: Path, tmp_path: Path) -> None:
    """Those of a checkout, `python convert/NAME.py`, are `python -m convert.NAME` here."""
    (tmp_path / "checkpoints").mkdir()
    ar = [tiny_unified_voice(seed, max_text_tokens=60, max_mel_tokens=70) for seed in (1, 2)]
    torch.save(ar[0].state_dict(), tmp_path / "checkpoints" / "autoregressive.pth")
    torch.save(tiny_dvae(seed=1).state_dict(), tmp_path / "checkpoints" / "dvae.pth")
    runs.write_recordings(tmp_path / "data", clips=6)
    shown = run(python, tmp_path, "-m", "convert.inspect_checkpoint", "checkpoints/dvae.pth")
    assert "dvae" in shown.lower()
    run(python, tmp_path, "-m", "convert.torch_to_flax", "--heads", "4", "--out", "checkpoints/tortoise")
    checked = run(python, tmp_path, "-m", "tortoise_jax.prepare", "--data", "data", "--check")
    assert "data: 6 lines, read as ljspeech" in checked
    run(python, tmp_path, "-m", "tortoise_jax.tokenizer", "--data", "data", "--out", "own.json", "--size", "100")
    files = ["--data", "data", "--checkpoint", "checkpoints/tortoise", "--out", "data-own"]
    run(python, tmp_path, "-m", "tortoise_jax.prepare", *files, "--cleaner", "basic", "--tokenizer", "own.json")
    run(python, tmp_path, "-m", "convert.flax_to_torch", "checkpoints/tortoise", "--out", "voice.pth")
    ar[1].load_state_dict(torch.load(tmp_path / "voice.pth", weights_only=True), strict=True)
    for module in ("train", "tortoise_jax.speak", "tortoise_jax.evaluate", "convert.verify", "convert.voices"):
        assert run(python, tmp_path, "-m", module, "--help").startswith("usage: ")


def run(python: Path, folder: Path, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true", "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    done = subprocess.run([python, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_what_the_code_imports_is_declared() -> None:
    """The tests' environment has more than a user's: a package that only the tests declare must not be needed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    optional = [
        line
        for extra in ("convert", "download", "av", "datasets", "transcribe", "wandb", "evaluate")
        for line in extras[extra]
    ]
    declared = {name_of(line) for line in project["dependencies"] + optional}
    imported = set()
    for top in (*PACKED, "train.py"):
        for path in [ROOT / top] if top.endswith(".py") else (ROOT / top).rglob("*.py"):
            imported |= {line.split()[1].split(".")[0] for line in path.read_text().splitlines() if is_import(line)}
    in_another_python = {"tortoise", "torchaudio"}  # convert/tortoise_reference.py
    others = imported - set(sys.stdlib_module_names) - {*PACKED, "train", "tests"} - in_another_python
    modules = {"absl": "absl-py", "orbax": "orbax-checkpoint", "jaxlib": "jax", "text_unidecode": "text-unidecode"}
    assert {modules.get(name, name).replace("_", "-").lower() for name in others} <= declared


def test_extras_that_are_named_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    places = [ROOT / "README.md", ROOT / "Makefile", *(path for top in PACKED for path in (ROOT / top).rglob("*.py"))]
    named = re.findall(r"(?:tortoise_jax|'\.)\[([a-z0-9,]+)\]", "".join(path.read_text() for path in places))
    assert len(named) > 15
    assert {extra for several in named for extra in several.split(",")} <= set(extras)


def name_of(requirement: str) -> str:
    return requirement.split(">")[0].split("[")[0].replace("_", "-").lower()


def is_import(line: str) -> bool:
    words = line.split()
    return len(words) > 1 and (words[0] == "import" or (words[0] == "from" and "import" in words))
