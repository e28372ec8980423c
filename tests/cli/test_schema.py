"""What `--json` prints has the fields that the page about the command line lists, and no others."""

import pathlib
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cli.conftest import MODEL, PROGRAMS

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "command_line.md"


def _documented(command: str) -> set[str]:
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


def _found(value: Any, free: set[str], path: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        if f"{path}{{}}" in free:
            yield f"{path}{{}}"
            return
        for key, part in value.items():
            below = f"{path}.{key}" if path else key
            yield from _found(part, free, below)
        if not path or "error" in path:
            return
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for part in value:
            yield from _found(part, free, f"{path}[]")
    elif path:
        yield path


@pytest.mark.parametrize("command", ["tree", "plan", "plan, fits", "suggest", "diff", "convert", "verify"])
def test_each_command_prints_the_fields_that_are_documented(cli, root, auto_named, tmp_path, command) -> None:
    words = {
        "tree": (root,),
        "plan": (root, f"{MODEL}:make(layers=4)"),
        "plan, fits": (root, f"{MODEL}:make"),
        "suggest": (auto_named, f"{MODEL}:make_named"),
        "diff": (root / "100", root / "200", "--values"),
        "convert": (root, tmp_path / "new" / "default", "--dtype", "bfloat16", "--weights-only"),
        "verify": (auto_named, f"{MODEL}:make_named", f"{PROGRAMS}:PAIR", "--rules", PROGRAMS),
    }[command]
    name = command.partition(",")[0]
    documented = _documented(name)

    said = cli(name, *words, "--json")

    assert said.status in (0, 1), said.out
    found = set(_found(said.json, documented))
    lists = {field.removesuffix("[]") for field in documented if field.endswith("[]")}
    unknown = found - documented - lists - {field.removesuffix("{}") for field in documented}
    assert unknown == set()
    tops = {field.partition(".")[0].removesuffix("[]").removesuffix("{}") for field in documented}
    assert set(said.json) == tops
    assert len(found) > 5
