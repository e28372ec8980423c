"""The fields of `--json`: those that the page about the command line lists, and those of a printed value."""

import pathlib
import re
from collections.abc import Iterator
from typing import Any

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "command_line.md"


def documented(command: str) -> set[str]:
    (row,) = re.findall(rf"^\| `{command}` \| (`directory`.*|`[a-z_]+` .*) \|$", PAGE.read_text(), re.M)
    fields, above = set(), ""
    for field, mark in re.findall(r"`([^`]+)`([:;]?)", row):
        fields.add(f"{above}{field}" if above else field)
        if mark == ":":
            above = f"{field}."
        elif mark == ";":
            above = ""
        elif above and field.endswith(("[]", "{}")):
            above = above if f"{above}{field}" in fields else ""
    return fields


def found(value: Any, free: set[str], path: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        if f"{path}{{}}" in free:
            yield f"{path}{{}}"
            return
        for key, part in value.items():
            below = f"{path}.{key}" if path else key
            yield from found(part, free, below)
        if not path or "error" in path:
            return
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for part in value:
            yield from found(part, free, f"{path}[]")
    elif path:
        yield path
