"""Imports go one way through the rooms; torch stays outside the package; devices are parallel.py's business alone."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# What a room (a folder of the package, or a module beside the folders) may import from, beside itself.
FOUNDATION = ("errors", "files", "arrow", "decoders", "audio", "text", "models", "parallel")
ROOMS: dict[str, tuple[str, ...]] = {
    "errors": (),
    "files": ("errors",),
    "arrow": ("errors", "files"),
    "decoders": ("errors", "files", "arrow"),
    "audio": ("errors", "decoders"),
    "text": ("errors", "files"),
    "models": ("errors",),
    "launchers": ("errors",),
    "native_errors": (),
    "parallel": ("errors", "files", "launchers", "native_errors"),
    "checkpoints": FOUNDATION,
    "data": (*FOUNDATION, "checkpoints"),
    "synthesis": (*FOUNDATION, "checkpoints"),
    "training": (*FOUNDATION, "checkpoints", "data", "synthesis"),
    "evaluation": (*FOUNDATION, "checkpoints", "data", "synthesis", "training"),
    "api": (*FOUNDATION, "checkpoints", "data", "synthesis", "training", "commands"),
    "tokenizer": (*FOUNDATION, "data"),
    "prepare": (*FOUNDATION, "checkpoints", "data", "commands"),
    "speak": (*FOUNDATION, "checkpoints", "synthesis"),
    "commands": (*FOUNDATION, "checkpoints", "data", "synthesis", "training"),
    "evaluate": (*FOUNDATION, "checkpoints", "data", "synthesis", "training", "evaluation"),
}
SCRIPTS = ("train.py", "convert", "configs")
ABOVE_THE_PACKAGE = ("train", "convert", "configs", "tests", "benchmarks")
MAY_REACH_ABOVE = {"tortoise_jax/commands.py": ("convert", "configs")}  # Python's way to what the commands do
TORCH = ("torch", "torchaudio", "transformers", "tensorflow")
MAY_IMPORT_TORCH = ("convert", "tests", "benchmarks")
# Called on `jax`: everything that asks for or names devices, hosts or a mapping over them.
DEVICE_CALLS = (
    *("devices", "local_devices", "device_count", "local_device_count", "default_backend", "device_put"),
    *("process_index", "process_count", "distributed", "experimental.multihost_utils"),
    *("pmap", "shard_map", "sharding", "make_array_from_single_device_arrays"),
)
DEVICE_MODULE = "tortoise_jax/parallel.py"


def violations(root: Path) -> list[str]:
    """Every breach of the rules in the tree at `root`, as "file: what"."""
    package = {module_name(path.relative_to(root)): path for path in sorted((root / "tortoise_jax").rglob("*.py"))}
    imported = {name: set(package_imports(path, package)) for name, path in package.items()}
    found = [*room_breaches(imported), *circles(imported)]
    for path in python_files(root):
        place = path.relative_to(root).as_posix()
        if place.startswith("tests/"):
            found += [f"{place}: imports {name}; move what is shared to tests/support" for name in others_tests(path)]
        if place.split("/")[0] not in MAY_IMPORT_TORCH:
            found += [f"{place}: imports {name}" for name in imports(path) if name.split(".")[0] in TORCH]
        if place.split("/")[0] in ("tortoise_jax", *SCRIPTS):
            if place.startswith("tortoise_jax/"):
                above = set(ABOVE_THE_PACKAGE) - set(MAY_REACH_ABOVE.get(place, ()))
                reached = (name for name in imports(path) if name.split(".")[0] in above)
                found += [f"{place}: imports {name}, which is above it" for name in reached]
            if place != DEVICE_MODULE:
                found += [f"{place}: calls jax.{name}" for name in device_calls(path)]
    return found


def module_name(path: Path) -> str:
    """tortoise_jax/data/batches.py -> tortoise_jax.data.batches; a folder's __init__.py is the folder."""
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


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
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield "a relative import"
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def others_tests(path: Path) -> Iterator[str]:
    """What a test file imports of other tests and of benchmarks."""
    for name in imports(path):
        if name.startswith("benchmarks.") or re.match(r"tests\.(\w+\.)*test_", name):
            yield name


def package_imports(path: Path, package: dict[str, Path]) -> Iterator[str]:
    """Modules of the package that a file imports: the longest known beginning of each name."""
    for name in imports(path):
        parts = name.split(".")
        beginnings = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
        known = next((beginning for beginning in beginnings if beginning in package), "")
        if known or name == "a relative import":
            yield known or name


def room_of(module: str) -> str:
    """The part of a module's name after the package's, "" for the package itself."""
    return module.partition(".")[2].partition(".")[0]


def room_breaches(imported: dict[str, set[str]]) -> Iterator[str]:
    for name, others in sorted(imported.items()):
        room = room_of(name)
        if room not in ROOMS and room:
            yield f"{name}: in no room; give it one in tests/test_imports.py"
            continue
        for other in sorted(others):
            if other == "a relative import":
                yield f"{name}: has a relative import; write the whole name"
            # What the package's own __init__ holds (its version) may be read anywhere, and it may read anything.
            elif room and room_of(other) not in ("", room, *ROOMS[room]):
                yield f"{name}: imports {other}; the room {room} may not"


def circles(imported: dict[str, set[str]]) -> Iterator[str]:
    def reaches(name: str, goal: str, seen: set[str]) -> bool:
        new = imported.get(name, set()) - seen - {"tortoise_jax"}
        return goal in new or any(reaches(other, goal, seen | new) for other in new)

    for name in sorted(imported.keys() - {"tortoise_jax"}):
        if reaches(name, name, set()):
            yield f"{name}: imports itself in a circle"


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
    assert {path.relative_to(ROOT).parts[1].removesuffix(".py") for path in (ROOT / "tortoise_jax").rglob("*.py")} == {
        *ROOMS,
        "__init__",
    }
    assert "calls jax.pmap" not in str(violations(ROOT))
    assert "pmap" in set(device_calls(ROOT / "tortoise_jax" / "parallel.py"))
    assert any(name.startswith("torch") for name in imports(ROOT / "convert" / "torch_files.py"))


@pytest.mark.parametrize(
    ("file", "code", "what"),
    [
        ("tortoise_jax/models/layers.py", "import torch", "tortoise_jax/models/layers.py: imports torch"),
        ("tortoise_jax/audio.py", "def f():\n    from torch import nn", "tortoise_jax/audio.py: imports torch.nn"),
        ("train.py", "import transformers.models", "train.py: imports transformers.models"),
        ("configs/ar.py", "import torch.nn as nn", "configs/ar.py: imports torch.nn"),
        ("tortoise_jax/models/layers.py", "from tortoise_jax.training.step import x", "the room models may not"),
        (
            "tortoise_jax/models/layers.py",
            "from tortoise_jax.training import step",
            "imports tortoise_jax.training.step",
        ),
        ("tortoise_jax/models/layers.py", "import tortoise_jax.training.step", "the room models may not"),
        ("tortoise_jax/models/layers.py", "def f():\n    import tortoise_jax.parallel", "the room models may not"),
        (
            "tortoise_jax/data/deep/er.py",
            "from tortoise_jax.training import step",
            "data.deep.er: imports",
        ),
        ("tortoise_jax/data/batches.py", "from tortoise_jax.synthesis import x", "the room data may not"),
        ("tortoise_jax/synthesis/voices.py", "from tortoise_jax.data.batches import x", "the room synthesis may not"),
        ("tortoise_jax/prepare.py", "from tortoise_jax.training import step", "the room prepare may not"),
        ("tortoise_jax/models/layers.py", "from . import dvae", "models.layers: has a relative import"),
        ("tortoise_jax/models/layers.py", "from tortoise_jax.models import dvae", "layers: imports itself in a circle"),
        ("tortoise_jax/training/step.py", "import convert.torch_files", "imports convert.torch_files, which is above"),
        ("tortoise_jax/training/step.py", "from train import main", "step.py: imports train.main, which is above it"),
        ("tortoise_jax/new.py", "", "tortoise_jax.new: in no room"),
        ("tortoise_jax/new/thing.py", "", "tortoise_jax.new.thing: in no room"),
        ("tortoise_jax/training/step.py", "import jax\nn = jax.device_count()", "step.py: calls jax.device_count"),
        ("tortoise_jax/training/parallel.py", "from jax import pmap", "training/parallel.py: calls jax.pmap"),
        (
            "tortoise_jax/data/batches.py",
            "from jax.experimental import multihost_utils",
            "calls jax.experimental",
        ),
        ("tortoise_jax/models/dvae.py", "from jax.sharding import Mesh", "dvae.py: calls jax.sharding"),
        ("tests/data/test_y.py", "from tests.test_x import run", "imports tests.test_x.run; move what is shared"),
        ("tests/test_y.py", "from benchmarks import generate", "imports benchmarks.generate; move what is shared"),
        ("train.py", "import jax\nif jax.process_index() == 0: ...", "train.py: calls jax.process_index"),
    ],
)
def test_a_bad_tree_is_reported(tmp_path: Path, file: str, code: str, what: str) -> None:
    good = {
        "train.py": "from tortoise_jax.training.step import x",
        "configs/ar.py": "",
        "convert/torch_files.py": "import torch",
        "tests/test_x.py": "import torch, jax\njax.devices()",
        "tortoise_jax/__init__.py": "from tortoise_jax.training.step import x",
        "tortoise_jax/audio.py": "import numpy",
        "tortoise_jax/parallel.py": "import jax\nfrom jax.experimental import multihost_utils\njax.pmap",
        "tortoise_jax/prepare.py": "",
        "tortoise_jax/models/layers.py": "",
        "tortoise_jax/models/dvae.py": "from tortoise_jax.models.layers import y",
        "tortoise_jax/data/__init__.py": "",
        "tortoise_jax/data/batches.py": "from tortoise_jax import __version__",
        "tortoise_jax/data/deep/er.py": "from tortoise_jax.data import batches",
        "tortoise_jax/synthesis/__init__.py": "",
        "tortoise_jax/synthesis/voices.py": "from tortoise_jax import audio",
        "tortoise_jax/training/step.py": "import jax\nfrom tortoise_jax.models import dvae\njax.grad",
    }
    for name, text in good.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert violations(tmp_path) == []
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(code)
    found = violations(tmp_path)
    assert any(what in line for line in found), found


def test_everything_but_the_converter_runs_without_torch() -> None:
    """As a core installation has it: no torch, no transformers."""
    code = f"""
import importlib, pathlib, sys
for name in {TORCH!r}:
    sys.modules[name] = None  # importing it raises
for path in sorted(pathlib.Path("tortoise_jax").rglob("*.py")):
    importlib.import_module(".".join(path.with_suffix("").parts).removesuffix(".__init__"))
import train
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stderr


def test_a_run_starts_without_what_takes_seconds_to_import() -> None:
    """tensorboardX would import torch, where that is installed; librosa's mel filters scipy.signal and numba."""
    code = """
import sys
from tortoise_jax import audio
from tortoise_jax.training import metrics, train
metrics.summary_writer(), audio.mel_filters(), audio.hann_window()
print([name for name in ("torch", "scipy.signal", "numba") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=280
    )
    assert done.stdout == "[]\n", done.stderr
