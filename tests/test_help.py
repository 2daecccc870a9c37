"""`--help` of every command line: argparse formats help texts only when it is asked for them."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from tests.support.runs import ROOT

COMMANDS = [
    path.relative_to(ROOT)
    for folder in ("tortoise_jax", "convert", "benchmarks", "demo")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "Parser(" in (text := path.read_text(encoding="utf-8")) and "__main__" in text
]


def test_the_commands_that_users_type_are_among_them() -> None:
    assert {Path("tortoise_jax/prepare.py"), Path("tortoise_jax/speak.py"), Path("convert/torch_to_flax.py")} <= set(
        COMMANDS
    )


@pytest.mark.parametrize("path", COMMANDS, ids=str)
def test_help_is_printed(path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # put back what the command sets
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / path), run_name="__main__")
    assert ended.value.code in (0, None)
    assert "usage: " in capsys.readouterr().out
