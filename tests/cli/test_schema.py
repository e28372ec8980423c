"""What `--json` prints has the fields that the page about the command line lists, and no others."""

import ast

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from orbax_nnx_handler import restore
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


PAIR = """\
from flax import nnx


def make():
    return {name: nnx.Linear(3, 3, use_bias=False, rngs=nnx.Rngs(0)) for name in ("left", "right")}
"""


def test_a_question_is_printed_with_the_rules_of_each_answer(cli, tmp_path) -> None:
    kernels = {name: np.full((3, 3), at, np.float32) for at, name in enumerate(("alpha", "beta"))}
    path, program = tmp_path / "checkpoint", tmp_path / "pair.py"
    program.write_text(PAIR)
    with ocp.PyTreeCheckpointer() as stock:
        stock.save(path, {"params": {name: {"kernel": kernel} for name, kernel in kernels.items()}})

    said = cli("suggest", path, f"{program}:make", "--json")

    (question,) = said.json["questions"]
    assert question == {
        "question": "which of alpha, beta is which of left, right? The shapes allow every order.",
        "wanted": ["left/kernel", "right/kernel"],
        "stored": ["params/alpha/kernel", "params/beta/kernel"],
        "choices": ["alpha -> left, beta -> right", "beta -> left, alpha -> right"],
        "alternatives": [
            ["('alpha', 'left')", "('beta', 'right')"],
            ["('beta', 'left')", "('alpha', 'right')"],
        ],
    }
    kernel = jax.ShapeDtypeStruct((3, 3), np.float32)
    target = {name: {"kernel": nnx.Param(kernel)} for name in ("left", "right")}
    found = restore(path, target, renames=[ast.literal_eval(rule) for rule in question["alternatives"][1]])
    np.testing.assert_array_equal(found["left"]["kernel"][...], kernels["beta"])
