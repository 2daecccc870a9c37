"""What conversion knows of one model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.mapping import Row, Shapes

HUB = "https://huggingface.co"
Facts = Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Location:
    """A file of a repository on the Hugging Face hub."""

    repository: str
    path: str
    revision: str = "main"

    def url(self, hub: str = HUB) -> str:
        return f"{hub}/{self.repository}/resolve/{self.revision}/{self.path}"


def mirrors(file: str) -> tuple[Location, ...]:
    """The two repositories that hold the released files under their own names."""
    return Location("Manmay/tortoise-tts", file), Location("jbetker/tortoise-tts-v2", f".models/{file}")


@dataclasses.dataclass(frozen=True)
class TorchModel:
    """One model's names in torch, and how they become a part of a checkpoint.

    The fields that have a default are for models that need them.
    """

    part: str  # the part of a checkpoint that it becomes, and the option of the command line: "ar" for --ar
    title: str  # for people
    marks: tuple[str, ...]  # a file is this model if each pattern matches the beginning of one of its keys
    file: str  # the name under which it was published
    size: int  # of that file in bytes, roughly: what --download says before it begins
    locations: tuple[Location, ...]  # where it was published; the first that answers is taken
    table: list[Row]
    # (shapes of the torch tensors, name of the file for errors, heads or None) -> the config; raises UserError
    config: Callable[[Shapes, str, int | None], Any]
    summary: Callable[[Any], str]  # config -> its dimensions in one line
    wrapper: str = ""  # the key under which the published file holds its tensors, where it does
    sha256: str = ""  # of the published file, where all copies of it are the same
    # (config, where its heads come from) -> lines about a torch file; its summary where None
    describe: Callable[[Any, str], list[str]] | None = None
    mel_bands: Callable[[Any], int] | None = None  # config -> bands of the mels that it reads
    # Numbers that the tensors do not tell, with those of the released model. The .json of an export states them.
    facts: Facts = dataclasses.field(default_factory=dict)
    # (config, facts) -> what else the .json of an export states
    stated: Callable[[Any, Facts], dict[str, Any]] = lambda config, facts: {}
    # (config, facts, exported file) -> lines that say how TorToiSe loads it
    how_to_use: Callable[[Any, Facts, Path], list[str]] = lambda config, facts, out: []
    masks: Callable[[Any], dict[str, np.ndarray]] | None = None  # config -> the buffers of its causal attention

    def lines(self, config: Any, heads_from: str) -> list[str]:
        """What a summary says of a torch file with this config. heads_from: where its heads come from."""
        return self.describe(config, heads_from) if self.describe else [self.summary(config)]
