"""What `--json` prints has the fields that the page about the command line lists, and no others."""

import pytest

from tests.cli.conftest import MODEL, PROGRAMS
from tests.cli.schema import documented, found


@pytest.mark.parametrize(
    "command", ["tree", "plan", "plan, fits", "suggest", "diff", "convert", "verify", "verify, differs"]
)
def test_each_command_prints_the_fields_that_are_documented(cli, root, auto_named, tmp_path, command) -> None:
    words = {
        "tree": (root,),
        "plan": (root, f"{MODEL}:make(layers=4)"),
        "plan, fits": (root, f"{MODEL}:make"),
        "suggest": (auto_named, f"{MODEL}:make_named"),
        "diff": (root / "100", root / "200", "--values"),
        "convert": (root, tmp_path / "new" / "default", "--dtype", "bfloat16", "--weights-only"),
        "verify": (auto_named, f"{MODEL}:make_named", f"{PROGRAMS}:PAIR", "--rules", PROGRAMS),
        "verify, differs": (
            auto_named,
            f"{MODEL}:make_named",
            f"{PROGRAMS}:PAIR",
            "--rules",
            f"{PROGRAMS}:EXCHANGED",
        ),
    }[command]
    name = command.partition(",")[0]
    fields = documented(name)

    said = cli(name, *words, "--json")

    assert said.status in (0, 1), said.out
    shown = set(found(said.json, fields))
    lists = {field.removesuffix("[]") for field in fields if field.endswith("[]")}
    unknown = shown - fields - lists - {field.removesuffix("{}") for field in fields}
    assert unknown == set()
    tops = {field.partition(".")[0].removesuffix("[]").removesuffix("{}") for field in fields}
    assert set(said.json) == tops
    assert len(shown) > 5
