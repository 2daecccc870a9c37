"""What is packed for installation: every room of the package, its assets, the converter and the configurations."""

from __future__ import annotations

import tomllib
from pathlib import Path

from setuptools import find_packages

ROOT = Path(__file__).parent.parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_folder_with_code_is_packed() -> None:
    packed = set(find_packages(str(ROOT), **SETTINGS["packages"]["find"]))
    folders = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for top in ("tortoise_jax", "convert", "configs")
        for path in (ROOT / top).rglob("*.py")
    }
    assert folders <= packed
    assert "tortoise_jax.data" in packed
    assert not [name for name in packed if name.startswith("tests")]


def test_the_assets_are_packed() -> None:
    [pattern] = SETTINGS["package-data"]["tortoise_jax"]
    assert {path.name for path in (ROOT / "tortoise_jax").glob(pattern)} == {"mel_norms.txt", "tokenizer_merges.txt"}
