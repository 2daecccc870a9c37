"""Imports go one way through the layers; torch stays outside the package; devices are parallel.py's business alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A module may import from its own layer (without going round in circles) and from those above it in this list.
LAYERS = [
    "errors atomic audio text layers dvae unified_voice loss optimizer sampling stopping sentences",
    "step batches dataset checkpoint state_dict parallel config encoding judging manifests planning presets ranking "
    "recordings report run run_report shards sources splits voices watch",
    "prepare generate speak samples replay loop api __init__",
]
SCRIPTS = ("train.py", "convert", "configs")
ABOVE_THE_PACKAGE = ("train", "convert", "tests", "benchmarks")
TORCH = ("torch", "torchaudio", "transformers", "tensorflow")
MAY_IMPORT_TORCH = ("convert", "tests", "benchmarks")
# Called on `jax`: everything that asks for or names devices, hosts or a mapping over them.
DEVICE_CALLS = (
    *("devices", "local_devices", "device_count", "local_device_count", "default_backend", "device_put"),
    *("process_index", "process_count", "distributed", "experimental.multihost_utils"),
    *("pmap", "shard_map", "sharding", "make_array_from_single_device_arrays"),
)
DEVICE_MODULE = "parallel"


def violations(root: Path) -> list[str]:
    """Every breach of the rules in the tree at `root`, as "file: what"."""
    package = {path.stem: path for path in (root / "tortoise_jax").glob("*.py")}
    imported = {name: set(package_imports(path, package)) for name, path in package.items()}
    found = [*layer_breaches(imported), *circles(imported)]
    for path in python_files(root):
        place = path.relative_to(root).as_posix()
        if place.split("/")[0] not in MAY_IMPORT_TORCH:
            found += [f"{place}: imports {name}" for name in imports(path) if name.split(".")[0] in TORCH]
        if place.split("/")[0] in ("tortoise_jax", *SCRIPTS):
            if place.startswith("tortoise_jax/"):
                above = (name for name in imports(path) if name.split(".")[0] in ABOVE_THE_PACKAGE)
                found += [f"{place}: imports {name}, which is above it" for name in above]
            if path.stem != DEVICE_MODULE:
                found += [f"{place}: calls jax.{name}" for name in device_calls(path)]
    return found


def python_files(root: Path) -> Iterator[Path]:
    """The project's own: folders that hold Python directly, so that no run's directory is walked."""
    yield from sorted(root.glob("*.py"))
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")):
        if any(folder.glob("*.py")):
            yield from sorted(folder.rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Full names of what a file imports, those inside functions too; `from a import b` gives a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "tortoise_jax" + (f".{node.module}" if node.module else "") if node.level else node.module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def package_imports(path: Path, package: dict[str, Path]) -> Iterator[str]:
    """Modules of the package that a file imports."""
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "tortoise_jax":
            module = parts[1] if len(parts) > 1 else "__init__"
            yield module if module in package else "__init__"


def layer_breaches(imported: dict[str, set[str]]) -> Iterator[str]:
    layer_of = {name: place for place, names in enumerate(LAYERS) for name in names.split()}
    for name, others in sorted(imported.items()):
        if name not in layer_of:
            yield f"tortoise_jax/{name}.py: in no layer; give it one in tests/test_imports.py"
            continue
        for other in sorted(others & layer_of.keys()):
            # What the package's __init__ holds (its version) may be read anywhere.
            if layer_of[other] > layer_of[name] and other != "__init__":
                yield f"tortoise_jax/{name}.py: imports {other} of a later layer"


def circles(imported: dict[str, set[str]]) -> Iterator[str]:
    def reaches(name: str, goal: str, seen: set[str]) -> bool:
        new = imported.get(name, set()) - seen - {"__init__"}
        return goal in new or any(reaches(other, goal, seen | new) for other in new)

    for name in sorted(imported.keys() - {"__init__"}):
        if reaches(name, name, set()):
            yield f"tortoise_jax/{name}.py: imports itself in a circle"


def device_calls(path: Path) -> Iterator[str]:
    """jax.NAME read as an attribute or imported by name."""
    for name in imports(path):
        if name.startswith("jax."):
            yield from (call for call in DEVICE_CALLS if f"{name}.".startswith(f"jax.{call}."))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "jax":
            yield from (call for call in DEVICE_CALLS if node.attr == call)


def test_the_project_keeps_its_rules() -> None:
    assert violations(ROOT) == []


def test_the_project_is_what_was_looked_at() -> None:
    seen = {path.relative_to(ROOT).as_posix() for path in python_files(ROOT)}
    assert {"train.py", "tortoise_jax/parallel.py", "convert/torch_to_flax.py", "configs/ar.py"} <= seen
    assert "calls jax.pmap" not in str(violations(ROOT))
    assert "pmap" in set(device_calls(ROOT / "tortoise_jax" / "parallel.py"))
    assert any(name.startswith("torch") for name in imports(ROOT / "convert" / "torch_files.py"))


@pytest.mark.parametrize(
    ("file", "code", "what"),
    [
        ("tortoise_jax/layers.py", "import torch", "tortoise_jax/layers.py: imports torch"),
        ("tortoise_jax/layers.py", "def f():\n    from torch import nn", "tortoise_jax/layers.py: imports torch.nn"),
        ("train.py", "import transformers.models", "train.py: imports transformers.models"),
        ("configs/ar.py", "import torch.nn as nn", "configs/ar.py: imports torch.nn"),
        ("tortoise_jax/loss.py", "from tortoise_jax.step import x", "loss.py: imports step of a later layer"),
        ("tortoise_jax/loss.py", "from tortoise_jax import step", "loss.py: imports step of a later layer"),
        ("tortoise_jax/loss.py", "import tortoise_jax.step", "loss.py: imports step of a later layer"),
        ("tortoise_jax/loss.py", "from .step import x", "loss.py: imports step of a later layer"),
        ("tortoise_jax/loss.py", "from . import step", "loss.py: imports step of a later layer"),
        ("tortoise_jax/batches.py", "from tortoise_jax.prepare import x", "batches.py: imports prepare of a later"),
        ("tortoise_jax/audio.py", "import tortoise_jax.text", "audio.py: imports itself in a circle"),
        ("tortoise_jax/step.py", "import convert.torch_files", "step.py: imports convert.torch_files, which is above"),
        ("tortoise_jax/step.py", "from train import main", "step.py: imports train.main, which is above it"),
        ("tortoise_jax/new.py", "", "new.py: in no layer"),
        ("tortoise_jax/step.py", "import jax\nn = jax.device_count()", "step.py: calls jax.device_count"),
        ("tortoise_jax/step.py", "from jax import pmap", "step.py: calls jax.pmap"),
        ("tortoise_jax/step.py", "from jax.experimental import multihost_utils", "calls jax.experimental.multihost"),
        ("tortoise_jax/step.py", "from jax.sharding import Mesh", "step.py: calls jax.sharding"),
        ("train.py", "import jax\nif jax.process_index() == 0: ...", "train.py: calls jax.process_index"),
    ],
)
def test_a_bad_tree_is_reported(tmp_path: Path, file: str, code: str, what: str) -> None:
    good = {
        "train.py": "from tortoise_jax.step import x",
        "configs/ar.py": "",
        "convert/torch_files.py": "import torch",
        "tests/test_x.py": "import torch, jax\njax.devices()",
        "tortoise_jax/__init__.py": "from tortoise_jax.step import x",
        "tortoise_jax/audio.py": "import numpy",
        "tortoise_jax/text.py": "from tortoise_jax.audio import y",
        "tortoise_jax/layers.py": "",
        "tortoise_jax/loss.py": "from tortoise_jax import layers",
        "tortoise_jax/step.py": "import jax\nfrom tortoise_jax.loss import x\njax.grad",
        "tortoise_jax/batches.py": "from tortoise_jax import __version__",
        "tortoise_jax/prepare.py": "",
        "tortoise_jax/parallel.py": "import jax\nfrom jax.experimental import multihost_utils\njax.pmap",
    }
    for name, text in good.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert violations(tmp_path) == []
    (tmp_path / file).write_text(code)
    found = violations(tmp_path)
    assert any(what in line for line in found), found


def test_everything_but_the_converter_runs_without_torch() -> None:
    """As a core installation has it: no torch, no transformers."""
    code = f"""
import importlib, pathlib, sys
for name in {TORCH!r}:
    sys.modules[name] = None  # importing it raises
for path in sorted(pathlib.Path("tortoise_jax").glob("*.py")):
    importlib.import_module("tortoise_jax." + path.stem if path.stem != "__init__" else "tortoise_jax")
import train
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
