"""At a prompt a hint comes as the options that do it, and following them works."""

import shlex
import shutil

import numpy as np
import pytest
from flax import nnx

from orbax_nnx_handler import Drop, Transpose
from orbax_nnx_handler.commands.arguments import as_options
from orbax_nnx_handler.planning.core.errors import Hint
from orbax_nnx_handler.planning.rules import as_rules
from tests.cli.conftest import MODEL, PROGRAMS
from tests.gallery.models import save


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ({"item": "default"}, "--item default"),
        ({"layout": "maxtext"}, "--layout maxtext"),
        ({"policy": {nnx.PathContains("a"): "init", ...: "error"}}, "--policy a=init"),
        ({"policy": {nnx.OptState: "init", nnx.PathContains("a"): "init", ...: "error"}}, ""),
        ({"policy": {nnx.All(nnx.PathContains("a"), nnx.PathContains(4)): "init"}}, "--policy a/4=init"),
        ({"policy": {nnx.All(nnx.PathContains("a"), nnx.BatchStat): "init"}}, ""),
        ({"policy": "init"}, "--policy init"),
        ({"renames": [("blocks", "layers")]}, "--rename blocks=layers"),
        ({"renames": [("a b", "c")]}, "--rename 'a b=c'"),
        ({"renames": [Transpose("head/kernel", (1, 0))]}, ""),
        ({"renames": [("a", "b"), Transpose("head/kernel", (1, 0))]}, ""),
        ({"renames": [Drop("head", "new")], "policy": {nnx.PathContains("head"): "init", ...: "error"}}, ""),
        ({"renames": [(f"layers_{at + 1}", f"layers_{at}") for at in range(48)]}, ""),
        ({"unexpected": "warn"}, ""),
        ({}, ""),
    ],
)
def test_a_hint_is_said_in_options_where_all_of_it_can_be(arguments, options) -> None:
    assert as_options([Hint("do it", arguments)]) == options


def test_options_of_several_hints_come_once_each() -> None:
    hints = [
        Hint("one", {"policy": "init"}),
        Hint("two", {"layout": "t5x"}),
        Hint("three", {"policy": "init"}),
    ]

    assert as_options(hints) == "--policy init --layout t5x"


def test_a_missing_layer_is_initialised_by_the_options_that_the_verdict_ends_with(cli, root) -> None:
    target = f"{MODEL}:make(layers=4)"

    refused = cli("plan", root, target)

    last = refused.out.splitlines()[-1]
    assert last == "on the command line: --policy hidden/3=init"
    assert cli("plan", root, target, *shlex.split(last.partition(": ")[2])).status == 0


def test_a_policy_of_several_keys_may_be_given_twice_and_not_in_two_ways(cli, root) -> None:
    target = f"{MODEL}:make(layers=4)"

    said = ("--policy", "hidden/3=init", "--policy", "hidden/3=init")
    assert cli("plan", root, target, *said).status == 0
    assert "given twice for hidden/3" in cli("plan", root, target, *said, "--policy", "hidden/3=warn").err


def test_rules_that_were_passed_are_not_among_the_options_of_a_hint() -> None:
    hint = Hint("do it", {"renames": [("a", "b"), ("c", "d")]})

    assert as_options([hint], as_rules([("a", "b")])) == "--rename c=d"


def test_an_item_is_named_as_an_option(cli, tmp_path) -> None:
    for item in ("ema", "weights"):
        save(tmp_path / "1" / item, {"params": {"w": np.zeros(3, np.float32)}})

    refused = cli("tree", tmp_path)

    assert refused.err.splitlines()[-1] == "on the command line: --item ema"
    assert cli("tree", tmp_path, "--item", "ema").status == 0


def test_the_search_for_rules_is_the_command_that_a_verdict_on_other_names_ends_with(cli, auto_named) -> None:
    refused = cli("plan", auto_named, f"{MODEL}:make_named")

    last = refused.out.splitlines()[-1]
    assert last == f"on the command line: orbax-nnx suggest {auto_named} {MODEL}:make_named"
    found = cli(*shlex.split(last.partition(": ")[2])[1:])
    rules = found.out.splitlines()[-1]
    assert found.status == 0
    assert rules.startswith("# on the command line: --rename ")
    options = shlex.split(rules.partition(": ")[2])
    assert cli("plan", auto_named, f"{MODEL}:make_named", *options).status == 0


def test_json_has_no_such_line(cli, root) -> None:
    said = cli("plan", root, f"{MODEL}:make(layers=4)", "--json")

    assert "on the command line" not in said.out


@pytest.mark.parametrize("command", ["convert", "verify"])
def test_whatever_command_refuses_ends_with_the_search_for_rules(cli, auto_named, tmp_path, command) -> None:
    more = {"convert": [tmp_path / "out"], "verify": []}[command]
    pair = {"convert": [], "verify": [f"{PROGRAMS}:PAIR"]}[command]

    refused = cli(command, auto_named, *more, f"{MODEL}:make_named", *pair)

    last = refused.err.splitlines()[-1]
    assert refused.status == 1
    assert last == f"on the command line: orbax-nnx suggest {auto_named} {MODEL}:make_named"
    assert cli(*shlex.split(last.partition(": ")[2])[1:]).status == 0


def test_the_search_is_asked_about_the_same_target_and_item(cli, tmp_path, auto_named) -> None:
    shutil.copytree(auto_named, tmp_path / "1" / "weights")
    shutil.copytree(auto_named, tmp_path / "1" / "ema")
    same = ("--weights-only", "--layout", "variables", "--item", "ema")

    refused = cli("plan", tmp_path, f"{MODEL}:make_named", *same)

    asked = shlex.split(refused.out.splitlines()[-1].partition(": ")[2])
    assert asked == ["orbax-nnx", "suggest", str(tmp_path), f"{MODEL}:make_named", *same]
    assert cli(*asked[1:]).status == 0


def test_options_that_were_passed_are_not_proposed_again(cli, root) -> None:
    target = f"{MODEL}:make(layers=5)"
    first = cli("plan", root, target, "--policy", "hidden/4=init")

    last = first.out.splitlines()[-1]
    assert last == "on the command line: --policy hidden/3=init"
    more = shlex.split(last.partition(": ")[2])
    assert cli("plan", root, target, "--policy", "hidden/4=init", *more).status == 0


def test_another_model_is_looked_at_under_its_path(cli, root) -> None:
    refused = cli("plan", root, f"{MODEL}:make_other")

    last = refused.out.splitlines()[-1]
    assert last == f"on the command line: orbax-nnx tree {root}"
    assert cli(*shlex.split(last.partition(": ")[2])[1:]).status == 0


def test_the_search_beside_rules_is_asked_with_the_same_rules(cli, auto_named) -> None:
    refused = cli("plan", auto_named, f"{MODEL}:make_named", "--rename", "Dense_0=embed")

    last = refused.out.splitlines()[-1]
    asked = shlex.split(last.partition("on the command line: ")[2])
    assert asked == ["orbax-nnx", "suggest", str(auto_named), f"{MODEL}:make_named", "--rename=Dense_0=embed"]
    found = cli(*asked[1:])
    assert found.status == 0
    options = shlex.split(found.out.splitlines()[-1].partition(": ")[2])
    assert cli("plan", auto_named, f"{MODEL}:make_named", asked[-1], *options).status == 0
