"""What a configuration's own comments say of each field: --help and the documentation have no other source."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import shlex
import textwrap
import tokenize
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

WIDTH = 112


@dataclasses.dataclass(frozen=True)
class FieldHelp:
    """group: the heading above a field, "" where it is that of the field before. comment: what the field is for."""

    group: str
    comment: str


def fields_help(get_config: Callable[[], ConfigDict]) -> dict[str, FieldHelp]:
    """The comments of `get_config` by dotted field name, in the order of its lines.

    A comment at the end of a field's lines is the field's, and one above it a heading; where there is none at the end,
    the one above is the field's.
    """
    source = textwrap.dedent(inspect.getsource(get_config))
    at_end, alone = _comments(source)
    (function,) = ast.parse(source).body
    assert isinstance(function, ast.FunctionDef)
    found: dict[str, FieldHelp] = {}
    group = ""
    for node in function.body:
        name = _field(node)
        if not name:
            continue
        above = _above(alone, node.lineno)
        own = next((at_end[line] for line in range(node.lineno, (node.end_lineno or 0) + 1) if line in at_end), "")
        is_group = isinstance(node, ast.Assign) and ast.unparse(node.value) == "ConfigDict()"
        group = above if above and (own or is_group) else group
        if not is_group:
            found[name] = FieldHelp(group, own or above)
            group = ""
    return found


def _comments(source: str) -> tuple[dict[int, str], dict[int, str]]:
    """Comments by line: those after code, and those with a line of their own."""
    at_end: dict[int, str] = {}
    alone: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            of = alone if token.line.strip().startswith("#") else at_end
            of[token.start[0]] = token.string.lstrip("# ")
    return at_end, alone


def _field(node: ast.stmt) -> str:
    """ "optimizer.name" for `config.optimizer.name = …`, else ""."""
    if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Attribute):
        return ""
    return ast.unparse(node.targets[0]).partition(".")[2]


def _above(alone: dict[int, str], line: int) -> str:
    first = line
    while first - 1 in alone:
        first -= 1
    return " ".join(alone[number] for number in range(first, line))


def page(get_config: Callable[[], ConfigDict], values: dict[str, Any], example: dict[str, Any], clips: int) -> str:
    """Every field as it is typed, with its comment. values: defaults by field; example: with those that are None filled
    for so many clips."""
    lines = []
    for name, about in fields_help(get_config).items():
        chosen = f" Chosen by the data set; here for {clips} clips." if values[name] is None else ""
        lines += ["", about.group] if about.group else []
        lines.append("  " + shlex.quote(f"--config.{name}={example[name]}"))
        lines += [" " * 6 + line for line in textwrap.wrap(_sentence(about.comment) + chosen, WIDTH)]
    return "\n".join(lines).strip("\n")


def _sentence(comment: str) -> str:
    return comment if comment.endswith(".") else f"{comment}."
