"""What a compiled program's text says of the communication between devices."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
COLLECTIVES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
OPERATION = re.compile(rf"^\s+(?:ROOT )?%?\S+ = (.*?) ({COLLECTIVES})(?:-start)?\(")
ARRAY = re.compile(r"\b([a-z]+\d+|pred)\[([\d,]*)\]")
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
CALLED = re.compile(r"(?:body|condition|calls|to_apply|\w+_computations)=\{?(%?[\w.\-]+(?:, %?[\w.\-]+)*)")
LOOP = re.compile(r"(?:body|condition)=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One operation between devices. size: bytes of what it gives; in_loop: whether a loop repeats it."""

    kind: str
    dtypes: tuple[str, ...]
    size: int
    in_loop: bool


def computations(text: str) -> dict[str, list[str]]:
    """Lines of each computation of a program, by its name."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if start := COMPUTATION.match(line):
            lines = found.setdefault(start[1], [])
        elif line.startswith(" "):
            lines.append(line)
    return found


def called(lines: Iterable[str], pattern: re.Pattern[str]) -> set[str]:
    return {name.strip().lstrip("%") for line in lines for names in pattern.findall(line) for name in names.split(",")}


def repeated(program: dict[str, list[str]]) -> set[str]:
    """The computations that are in a loop, or are called from one."""
    inside: set[str] = set()
    waiting = {name for lines in program.values() for name in called(lines, LOOP)}
    while waiting:
        name = waiting.pop()
        inside.add(name)
        waiting |= called(program.get(name, ()), CALLED) - inside
    return inside


def collectives(text: str) -> Iterator[Collective]:
    """All operations between devices of a compiled program (`compiled.as_text()`)."""
    program = computations(text)
    loops = repeated(program)
    for name, lines in program.items():
        for line in lines:
            if operation := OPERATION.match(line):
                arrays = ARRAY.findall(operation[1])
                sizes = [
                    BYTES[dtype] * math.prod(int(side) for side in sides.split(",") if side) for dtype, sides in arrays
                ]
                dtypes = tuple(sorted({dtype for dtype, _ in arrays}))
                yield Collective(operation[2], dtypes, sum(sizes), name in loops)
