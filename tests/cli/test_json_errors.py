"""Under `--json` whatever goes wrong is JSON too: a program reads one stream and one form."""

import numpy as np
import pytest

from tests.cli.conftest import MODEL
from tests.gallery.models import save

MAKE = f"{MODEL}:make"
NOWHERE = "no/such/checkpoint"
COMMANDS = {
    "tree": ("tree", NOWHERE),
    "plan": ("plan", NOWHERE, MAKE),
    "suggest": ("suggest", NOWHERE, MAKE),
    "diff": ("diff", NOWHERE, NOWHERE),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_restore_error_is_json_with_the_status_of_plain_text(cli, command) -> None:
    plain = cli(*COMMANDS[command])
    said = cli(*COMMANDS[command], "--json")

    assert said.status == plain.status == 1
    assert said.err == ""
    assert list(said.json) == ["error"]
    error = said.json["error"]
    assert plain.err == f"{error['type']}: {error['message']}\n"
    assert error["type"] == "NotACheckpointError"


def test_a_hint_is_json_with_the_arguments_that_it_proposes(cli, tmp_path) -> None:
    for item in ("ema", "weights"):
        save(tmp_path / "1" / item, {"params": {"w": np.zeros(3, np.float32)}})

    said = cli("tree", tmp_path, "--json")

    words = "pass item='ema', or the path of one of them."
    assert said.json["error"]["hints"] == [{"words": words, "arguments": {"item": "'ema'"}}]


def test_a_plan_that_does_not_fit_is_json_with_causes_facts_and_hints(cli, root) -> None:
    said = cli("plan", root, f"{MODEL}:make(layers=4)", "--json").json

    (cause,) = said["causes"]
    assert (cause["kind"], cause["facts"]) == (
        "LayerCount",
        {"group": "hidden", "stored": 3, "wanted": 4, "unit": "layer"},
    )
    policy = '{nnx.All(nnx.PathContains("hidden"), nnx.PathContains(3)): "init", ...: "error"}'
    assert [hint["arguments"] for hint in said["hints"]] == [{}, {"policy": policy}, {}]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("plan", "{root}", f"{MODEL}:nothing"), "{model} has no nothing; it has: "),
        (("suggest", "{root}", "model"), "'model' is no MODULE:FACTORY"),
        (("tree", "{root}", "--depth", "deep"), "argument --depth: 'deep' is no whole number from 1 on"),
        (("diff", "{root}"), "the following arguments are required: PATH_B"),
        (("tree", "{root}", "--nonsense"), "unrecognized arguments: --nonsense"),
        (("wood",), "argument COMMAND: invalid choice: 'wood'"),
    ],
)
@pytest.mark.parametrize("flag", ["--json", "--js"])
def test_a_mistake_in_the_command_is_json_with_status_2(cli, root, words, message, flag) -> None:
    said = cli(*(word.format(root=root) for word in words), flag)

    assert said.status == 2
    assert said.err == ""
    assert list(said.json) == ["error"]
    assert said.json["error"]["type"] == "UsageError"
    assert said.json["error"]["message"].startswith(message.format(model=MODEL))


def test_what_the_system_refuses_is_json(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "/somewhere")

    monkeypatch.setattr("orbax_nnx_handler.commands.tree.read_contents", refuse)

    said = cli("tree", "run", "--json")

    assert said.status == 1
    assert said.json == {
        "error": {"type": "PermissionError", "message": "[Errno 13] Permission denied: '/somewhere'"}
    }


def test_an_interrupt_is_json(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("orbax_nnx_handler.commands.tree.read_contents", interrupt)
    monkeypatch.setattr("orbax_nnx_handler.cli._say_no_more", lambda: None)

    said = cli("tree", "run", "--json")

    assert said.status == 130
    assert said.json == {"error": {"type": "KeyboardInterrupt", "message": "nothing was changed"}}


def test_help_is_help_even_with_json(cli) -> None:
    said = cli("tree", "--json", "--help")

    assert said.status == 0
    assert said.out.startswith("usage: orbax-nnx tree ")


def test_what_the_factory_s_own_module_prints_is_no_part_of_the_json(cli, root, tmp_path) -> None:
    program = tmp_path / "chatty.py"
    program.write_text(
        "print('loading')\n" + MODEL.read_text().replace("return Mlp(", "print('made'); return Mlp(")
    )

    said = cli("plan", root, f"{program}:make", "--json")

    assert said.status == 0
    assert said.json["fits"] is True
    assert said.err == "loading\nmade\n"


def test_what_a_file_of_rules_prints_is_no_part_of_it(cli, tmp_path) -> None:
    (tmp_path / "rules.py").write_text("print('loading')\nRULES = []\n")
    said = cli("plan", NOWHERE, MAKE, "--rules", f"{tmp_path / 'rules.py'}:RULES", "--json")

    assert list(said.json) == ["error"]
    assert said.err == "loading\n"
