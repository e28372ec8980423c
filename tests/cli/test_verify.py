"""`orbax-nnx verify`: two programs from one checkpoint, run from the command line."""

import pathlib

import pytest

from tests.cli.conftest import MODEL

PROGRAMS = """
import numpy as np

from tests.cli.conftest import AutoNamed

X = np.linspace(-1, 1, 32, dtype="f").reshape(2, 16)
RULES = [("Dense_0", "embed"), ("LayerNorm_0", "norm"), ("Dense_1", "head")]


def linen_apply(variables, x):
    return AutoNamed().apply({"params": variables["params"]}, x)


def nnx_apply(model, x):
    return model(x)


inputs = (X,)
PAIR = (linen_apply, nnx_apply, inputs)
WRONG = (linen_apply, lambda model, x: 2 * model(x), inputs)
NAMED = {"linen_apply": linen_apply, "nnx_apply": nnx_apply, "inputs": [X]}


def pair():
    return PAIR


def broken():
    raise OSError("no such weights")


def fails(model, x):
    raise ValueError("wants rngs")


FAILS = (linen_apply, fails, inputs)
NO_PAIR = (linen_apply, inputs)
"""


@pytest.fixture
def programs(tmp_path: pathlib.Path) -> pathlib.Path:
    file = tmp_path / "programs.py"
    file.write_text(PROGRAMS)
    return file


@pytest.mark.parametrize("pair", ["PAIR", "NAMED", "pair"])
def test_programs_that_compute_the_same_give_status_0(cli, auto_named, programs, pair) -> None:
    said = cli("verify", auto_named, f"{MODEL}:make_named", f"{programs}:{pair}", "--rules", programs)

    assert said.status == 0, said.err
    assert said.out.startswith("Verification: equal: outputs ")


def test_programs_that_differ_give_status_1_and_json_says_where(cli, auto_named, programs) -> None:
    words = ("verify", auto_named, f"{MODEL}:make_named", f"{programs}:WRONG", "--rules", programs)

    said = cli(*words, "--json")

    assert said.status == 1
    assert said.json["equal"] is False
    assert said.json["first"] is None
    assert {module["differs"] for module in said.json["modules"]} == {False}


def test_a_tolerance_is_taken(cli, auto_named, programs) -> None:
    words = ("verify", auto_named, f"{MODEL}:make_named", f"{programs}:WRONG", "--rules", programs)

    assert cli(*words, "--tolerance", "10").status == 0
    assert cli(*words, "--tolerance", "no").status == 2


def test_a_program_that_fails_is_a_refusal_with_its_place(cli, auto_named, programs) -> None:
    said = cli("verify", auto_named, f"{MODEL}:make_named", f"{programs}:FAILS", "--rules", programs)

    assert said.status == 1
    assert "nnx_apply fails: ValueError: wants rngs" in said.err
    assert f"at {programs}:" in said.err


@pytest.mark.parametrize(
    ("pair", "message"), [("NO_PAIR", "two functions"), ("broken", "no such weights"), ("X", "two functions")]
)
def test_what_is_no_pair_is_a_mistake_in_the_command(cli, auto_named, programs, pair, message) -> None:
    said = cli("verify", auto_named, f"{MODEL}:make_named", f"{programs}:{pair}", "--rules", programs)

    assert said.status == 2
    assert message in said.err


def test_suggest_settles_what_is_open_by_running_both(cli, auto_named, programs) -> None:
    said = cli("suggest", auto_named, f"{MODEL}:make_named", "--verify", f"{programs}:PAIR", "--json")

    assert said.status == 0
    assert said.json["proof"].startswith("proved by outputs")
    assert said.json["confidence"] == "certain"
