"""Rules from a file and renames of nothing, wherever a command takes rules; a proposal written to a file."""

import pathlib
import runpy
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest

from orbax_nnx_handler import Rename, Suggestion, Transpose, plan_restore
from orbax_nnx_handler.commands.suggest import written
from orbax_nnx_handler.commands.user_code import load_factory
from orbax_nnx_handler.planning.rules import Rule, as_rules
from orbax_nnx_handler.planning.suggesting import Proposal, Question
from tests.cli.conftest import MODEL

RULES = """
from orbax_nnx_handler import Transpose

RULES = [("Dense_0", "embed"), ("LayerNorm_0", "norm"), ("Dense_1", "head")]
TURNED = [Transpose("Dense_0/kernel", (1, 0))]
NOTHING = 3
"""


@pytest.fixture
def rules(tmp_path: pathlib.Path) -> pathlib.Path:
    file = tmp_path / "rules.py"
    file.write_text(RULES)
    return file


def test_rules_of_a_file_bring_linen_s_own_names_home(cli, auto_named, rules) -> None:
    named = cli("plan", auto_named, f"{MODEL}:make_named", "--rules", f"{rules}:RULES")
    unnamed = cli("plan", auto_named, f"{MODEL}:make_named", "--rules", rules)

    assert (named.status, unnamed.status) == (0, 0), named.out + unnamed.err
    assert named.out == unnamed.out


def test_rules_come_before_renames(cli, auto_named, tmp_path) -> None:
    file = tmp_path / "some.py"
    file.write_text('SOME = [("Dense_0", "embed"), ("LayerNorm_0", "norm")]')

    said = cli(
        "plan", auto_named, f"{MODEL}:make_named", "--rules", f"{file}:SOME", "--rename", "Dense_1=head"
    )

    assert said.status == 0, said.out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{file}:NOTHING", "is no list of rules: RuleError"),
        ("{file}:ABSENT", "has no ABSENT; it has: RULES, TURNED."),
        ("{file}:1x", "is no FILE.py:NAME"),
        ("absent.py:RULES", "there is no file absent.py"),
        (".", ". is a directory, and no Python file or module."),
    ],
)
def test_what_is_no_list_of_rules_is_a_mistake_in_the_command(cli, auto_named, rules, text, message) -> None:
    said = cli("plan", auto_named, f"{MODEL}:make_named", "--rules", text.format(file=rules))

    assert said.status == 2
    assert message in said.err


@pytest.fixture
def wrapped(tmp_path: pathlib.Path) -> pathlib.Path:
    """A model's weights one level too deep, under names of its own."""
    leaf = {"kernel": np.ones((4, 4), "f"), "bias": np.ones(4, "f")}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(
            tmp_path / "wrapped", {"params": {"outer": {"up": leaf, "down": leaf}, "critic": {"up": leaf}}}
        )
    return tmp_path / "wrapped"


def test_a_rename_to_nothing_takes_a_level_away(cli, wrapped, tmp_path) -> None:
    model = tmp_path / "net.py"
    model.write_text(
        "from flax import nnx\n\n\n"
        "class Net(nnx.Module):\n"
        "    def __init__(self, rngs):\n"
        "        self.up, self.down = (nnx.Linear(4, 4, rngs=rngs) for _ in range(2))\n"
        "        self.critic = nnx.Dict(up=nnx.Linear(4, 4, rngs=rngs))\n\n\n"
        "def make():\n"
        "    return Net(nnx.Rngs(0))\n"
    )

    assert cli("plan", wrapped, f"{model}:make").status == 1
    said = cli("plan", wrapped, f"{model}:make", "--rename", "outer=", "--json")
    assert said.status == 0
    assert {item["stored"][0] for item in said.json["restored"] if item["path"] == "up/kernel"} == {
        "params/outer/up/kernel"
    }


def test_convert_takes_rules_and_diff_compares_through_them(cli, auto_named, rules, tmp_path) -> None:
    there = tmp_path / "there"

    assert (
        cli("convert", auto_named, there, f"{MODEL}:make_named", "--rules", rules, "--to", "linen").status
        == 0
    )

    apart = cli("diff", auto_named, there, "--values")
    said = cli("diff", auto_named, there, "--values", "--rules", rules, "--json")
    assert apart.status == 1
    assert said.json["changed"] == []
    assert {item["unequal"] for item in said.json["values"]} == {0}
    assert {item["path"] for item in said.json["values"]} >= {"params/embed/kernel", "params/norm/scale"}


def test_diff_sees_a_transpose(cli, auto_named, rules) -> None:
    said = cli("diff", auto_named, auto_named, "--values", "--rules", f"{rules}:TURNED", "--json")

    other = {item["path"] for item in said.json["values"] if item["unequal"]}
    assert other <= {"params/Dense_0/kernel"}
    assert other or said.json["changed"]


def test_a_proposal_is_written_as_a_file_that_runs_and_that_the_commands_take(
    cli, auto_named, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "proposed.py"

    said = cli("suggest", auto_named, f"{MODEL}:make_named", "--write", file)

    found = runpy.run_path(str(file))
    assert said.status == 0
    assert plan_restore(auto_named, load_factory(f"{MODEL}:make_named").target(), renames=found["RULES"]).fits
    assert cli("plan", auto_named, f"{MODEL}:make_named", "--rules", file).status == 0
    again = cli("suggest", auto_named, f"{MODEL}:make_named", "--write", file)
    assert again.status == 2
    assert "nothing is overwritten" in again.err


def test_a_written_file_escapes_names_and_holds_every_kind_of_rule() -> None:
    strange = 'a"""b\\\n\x1b[31m'
    settled = as_rules(
        [(strange, "w"), Transpose("w/kernel", (1, 0)), Rename(r"\.(\w)", r"/\1", regex=True), ("model", "")]
    )
    proposal = Suggestion(proposals=(), questions=(), unmatched_wanted=(), unmatched_stored=())

    text = written(proposal, settled, f"{strange} model.py:make", "file.py")

    found: dict[str, Any] = {}
    exec(compile(text, "file.py", "exec"), found)
    assert as_rules(found["RULES"]) == settled
    assert all(line.isprintable() for line in text.splitlines())


def test_a_question_says_how_it_is_settled_at_a_prompt(cli, tmp_path) -> None:
    model = tmp_path / "model.py"
    model.write_text(
        "from flax import nnx\n\n\ndef make():\n"
        "    red, blue = (nnx.Linear(4, 4, rngs=nnx.Rngs(0)) for _ in range(2))\n"
        "    return nnx.Dict(red=red, blue=blue)\n"
    )
    dense = {"kernel": np.ones((4, 4), "f"), "bias": np.ones(4, "f")}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", {"params": {"one": dense, "two": dense}})

    said = cli("suggest", tmp_path / "c", f"{model}:make", "--write", tmp_path / "rules.py")

    for text in (said.out, (tmp_path / "rules.py").read_text()):
        assert "# to settle a question, run both: --verify FILE.py:PAIR." in text
        assert "suggest(" not in text
        assert "answered(" not in text
    (question,) = cli("suggest", tmp_path / "c", f"{model}:make", "--json").json["questions"]
    assert len(question["alternatives"]) == len(question["choices"]) == 2
    lines = (tmp_path / "rules.py").read_text().splitlines()
    at = lines.index(f"    # question 1, 1: {question['choices'][1]}")
    chosen = tmp_path / "chosen.py"
    lines[at + 1 : at + 3] = [line.replace("# ", "", 1) for line in lines[at + 1 : at + 3]]
    chosen.write_text("\n".join(lines))
    assert cli("plan", tmp_path / "c", f"{model}:make", "--rules", chosen).status == 0


def test_answers_stand_where_their_rules_apply_and_those_that_change_others_behind_them() -> None:
    rules = as_rules([("a", "b"), ("c", "d")])

    def settle(answer: int) -> tuple[Rule, ...]:
        return as_rules([("a", "b"), ("x", "y"), ("c", "d"), ("z", "w")] if answer == 0 else [("c", "e")])

    question = Question(
        wanted=(), stored=(), parts=((), ()), about="which", choices=("this", "that"), settle=settle
    )
    proposals = tuple(Proposal(rule=rule, grounds="names") for rule in rules)
    found = Suggestion(proposals=proposals, questions=(question,), unmatched_wanted=(), unmatched_stored=())

    text = written(found, (), "c m.py:make", "file.py")

    assert text.partition("RULES = [\n")[2].partition("]\n")[0].splitlines() == [
        "    ('a', 'b'),  # by names",
        "    # question 1, 0: this",
        "    # ('x', 'y'),",
        "    ('c', 'd'),  # by names",
        "    # question 1, 0 too",
        "    # ('z', 'w'),",
        "    # question 1, 1: that (with all rules, instead of those above)",
        "    # ('c', 'e'),",
    ]


@pytest.mark.parametrize("command", ["plan", "suggest", "diff", "convert", "verify"])
def test_the_help_of_a_command_shows_an_example(cli, command) -> None:
    said = cli(command, "--help")

    assert "--rules FILE.py:NAME" in said.out
    assert f"example:\n  orbax-nnx {command} " in said.out


def test_rules_are_not_searched_for_a_folder_that_is_not_there(cli, auto_named, tmp_path) -> None:
    said = cli("suggest", auto_named, f"{MODEL}:make_named", "--write", tmp_path / "absent" / "rules.py")

    assert said.status == 2
    assert f"there is no folder {tmp_path / 'absent'}." in said.err
