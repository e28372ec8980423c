"""At a prompt a hint comes as the options that do it, and following them works."""

import shlex

import numpy as np
import pytest

from orbax_nnx_handler.commands.screen import options_of
from tests.cli.conftest import MODEL
from tests.gallery.models import save


@pytest.mark.parametrize(
    ("hint", "options"),
    [
        ("pass item='default'.", "--item default"),
        ("pass layout='maxtext' or layout='variables'.", "--layout maxtext"),
        ('or pass policy={nnx.PathContains("a"): "init",\n      ...: "error"} to', "--policy a=init"),
        ('pass policy={nnx.OptState: "init", nnx.PathContains("a"): "init", ...: "error"}.', ""),
        ('pass policy="init" to initialise all.', "--policy init"),
        ("pass renames=[('blocks', 'layers')].", "--rename blocks=layers"),
        ("pass renames=[('Block_{i}', 'a b')].", ""),
        ('pass renames=[(f"layers_{i + 1}", f"layers_{i}") for i in range(3)].', ""),
        ("pass renames=[Transpose('head/kernel', (1, 0))].", ""),
        ("leave layout=... out: it is found out from the metadata.", ""),
    ],
)
def test_a_hint_is_said_in_options_where_there_are_some(hint, options) -> None:
    assert options_of(f"something is wrong\nhint: {hint}") == options


def test_a_missing_layer_is_initialised_by_the_options_that_the_verdict_ends_with(cli, root) -> None:
    target = f"{MODEL}:make(layers=4)"

    refused = cli("plan", root, target)

    last = refused.out.splitlines()[-1]
    assert last == "on the command line: --policy hidden=init"
    assert cli("plan", root, target, *shlex.split(last.partition(": ")[2])).status == 0


def test_an_item_is_named_as_an_option(cli, tmp_path) -> None:
    for item in ("ema", "weights"):
        save(tmp_path / "1" / item, {"params": {"w": np.zeros(3, np.float32)}})

    refused = cli("tree", tmp_path)

    assert refused.err.splitlines()[-1] == "on the command line: --item ema"
    assert cli("tree", tmp_path, "--item", "ema").status == 0


def test_json_has_no_such_line(cli, root) -> None:
    said = cli("plan", root, f"{MODEL}:make(layers=4)", "--json")

    assert "on the command line" not in said.out
