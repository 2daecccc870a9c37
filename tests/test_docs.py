"""The page that `make docs` makes of the docstrings: whole, without a warning; links lead somewhere, code runs."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import tortoise_jax as tj
from tests.support import runs

ROOT = Path(__file__).parents[1]


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name == "id" and value:
                self.anchors.add(value)
            if (tag, name) == ("a", "href") and value:
                self.links.add(value)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Made by the Makefile's own command."""
    (line,) = [line for line in (ROOT / "Makefile").read_text().splitlines() if "docs/build.py" in line]
    out = tmp_path_factory.mktemp("docs")
    words = line.strip().replace("docs-output", str(out)).split()[1:]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "Warn" not in done.stderr
    return (out / "tortoise_jax.html").read_text(encoding="utf-8")


def test_everything_public_is_on_the_page(page: str) -> None:
    found = Links()
    found.feed(page)
    assert set(tj.__all__) <= found.anchors
    assert {"Tortoise.export", "Tortoise.loss", "Tortoise.conditioning"} <= found.anchors


def test_links_lead_somewhere(page: str) -> None:
    found = Links()
    found.feed(page)
    inside = {link.removeprefix("#") for link in found.links if link.startswith("#")}
    assert len(inside) > 30
    assert inside <= found.anchors
    outside = {link for link in found.links if not link.startswith("#")}
    assert outside <= {"https://pdoc.dev"}, "pages elsewhere may vanish"


def public() -> list[tuple[str, Any]]:
    """Everything public with its methods."""
    found: list[tuple[str, Any]] = []
    for name in tj.__all__:
        member = getattr(tj, name)
        found.append((name, member))
        if inspect.isclass(member) and member.__module__ == "tortoise_jax.api":
            found += [(f"{name}.{own}", inner) for own, inner in vars(member).items() if not own.startswith("_")]
    return [(name, member) for name, member in found if callable(member)]


def test_every_function_says_what_it_does() -> None:
    undocumented = [name for name, member in public() if not (member.__doc__ or "").strip()]
    assert undocumented == []


def code_of(docstring: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", docstring, re.DOTALL)


def test_code_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    runs.write_checkpoint(tmp_path / "checkpoints" / "tortoise")
    recordings = runs.write_recordings(tmp_path / "data")
    clip = sorted((recordings / "wavs").iterdir())[0]
    blocks = [code for text in (tj.__doc__ or "", *(m.__doc__ or "" for _, m in public())) for code in code_of(text)]
    assert len(blocks) >= 2
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block.replace("clip.wav", clip.name), names)
    assert "'stop': " in capsys.readouterr().out
