"""`orbax-nnx verify`: two programs from one checkpoint, run from the command line."""

import pytest

from tests.cli.conftest import MODEL, PROGRAMS


@pytest.mark.parametrize("pair", ["PAIR", "NAMED", "pair"])
def test_programs_that_compute_the_same_give_status_0(cli, auto_named, pair) -> None:
    said = cli("verify", auto_named, f"{MODEL}:make_named", f"{PROGRAMS}:{pair}", "--rules", PROGRAMS)

    assert said.status == 0, said.err
    assert said.out.startswith("Verification: equal: relative difference ")


def test_programs_that_differ_give_status_1_and_json_says_where(cli, auto_named) -> None:
    words = ("verify", auto_named, f"{MODEL}:make_named", f"{PROGRAMS}:WRONG", "--rules", PROGRAMS)

    said = cli(*words, "--json")

    assert said.status == 1
    assert said.json["equal"] is False
    assert said.json["first"] is None
    assert {module["differs"] for module in said.json["modules"]} == {False}


def test_a_tolerance_is_taken(cli, auto_named) -> None:
    words = ("verify", auto_named, f"{MODEL}:make_named", f"{PROGRAMS}:WRONG", "--rules", PROGRAMS)

    assert cli(*words, "--tolerance", "10").status == 0
    assert cli(*words, "--tolerance", "no").status == 2


def test_a_program_that_fails_is_a_refusal_with_its_place(cli, auto_named) -> None:
    said = cli("verify", auto_named, f"{MODEL}:make_named", f"{PROGRAMS}:FAILS", "--rules", PROGRAMS)

    assert said.status == 1
    assert "nnx_apply fails: ValueError: wants rngs" in said.err
    assert f"at {PROGRAMS}:" in said.err


@pytest.mark.parametrize(
    ("pair", "message"), [("NO_PAIR", "two functions"), ("broken", "no such weights"), ("X", "two functions")]
)
def test_what_is_no_pair_is_a_mistake_in_the_command(cli, auto_named, pair, message) -> None:
    said = cli("verify", auto_named, f"{MODEL}:make_named", f"{PROGRAMS}:{pair}", "--rules", PROGRAMS)

    assert said.status == 2
    assert message in said.err


def test_suggest_settles_what_is_open_by_running_both(cli, auto_named) -> None:
    said = cli("suggest", auto_named, f"{MODEL}:make_named", "--verify", f"{PROGRAMS}:PAIR", "--json")

    assert said.status == 0
    assert said.json["proof"].startswith("proved by outputs")
    assert said.json["confidence"] == "certain"


def test_suggest_takes_a_tolerance_for_what_it_verifies(cli, auto_named) -> None:
    words = ("suggest", auto_named, f"{MODEL}:make_named", "--json")
    wrong = cli(*words, "--verify", f"{PROGRAMS}:WRONG")
    allowed = cli(*words, "--verify", f"{PROGRAMS}:WRONG", "--tolerance", "10")

    assert "tolerance 1e-05" in wrong.json["proof"]
    assert "both programs return the same within" in allowed.json["proof"]
    assert cli(*words, "--tolerance", "10").status == 2
