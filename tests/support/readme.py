"""What the README tells a user to type: commands, blocks of Python, options."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCK = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
STARTS = ("python ", "pip ", "make ", "whisper ", "train.py ", "convert/", "benchmarks/")
OPTION = re.compile(r"(?<![\w-])--\w[\w.-]*")


def marked(name: str) -> str:
    """The one block after `<!-- tested: name -->`."""
    (found,) = re.findall(rf"<!-- tested: {name} -->\n```\w+\n(.*?)```", README, re.DOTALL)
    return str(found)


def blocks(language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(README) if kind == language]


def inline() -> list[str]:
    """What stands in the text between backticks, on one line each."""
    return [" ".join(found.split()) for found in re.findall(r"`([^`]+)`", BLOCK.sub("", README))]


def lines(block: str) -> list[str]:
    """The commands of a block, without comments, on one line each."""
    joined = block.replace("\\\n", " ")
    return [" ".join(line.split("#")[0].split()) for line in joined.splitlines() if line.split("#")[0].strip()]


def commands() -> list[str]:
    """Of the blocks and of the text."""
    return [line for block in blocks("sh") for line in lines(block)] + [
        found for found in inline() if found.startswith(STARTS)
    ]


def options(text: str) -> set[str]:
    """The options of commands by name, as `--config.data` of `--config.data=DIR`."""
    return set(OPTION.findall(text))


@dataclasses.dataclass(frozen=True)
class Command:
    """What a user types. text: as the README has it; here: what some of it is in this test; more: what is added.

    leaves: a file that it makes. says: a part of what it prints.
    """

    text: str
    more: str = ""
    here: Mapping[str, str] = dataclasses.field(default_factory=dict)
    leaves: str = ""
    says: str = ""

    def words(self, **here: str) -> list[str]:
        """After `python`. What is `python convert/NAME.py` in a checkout is `python -m convert.NAME` from a wheel."""
        line = replaced(self.text, {**self.here, **here})
        line = re.sub(r"^(?:python )?convert/(\w+)\.py", r"python -m convert.\1", line)
        return shlex.split(f"{re.sub(r'^python train.py', 'python -m train', line)} {self.more}")[1:]


def replaced(text: str, here: Mapping[str, str]) -> str:
    for given, own in here.items():
        assert given in text, f"{given!r} is not in {text!r}"
        text = text.replace(given, own)
    return text
