"""As a new user would: from a checkpoint whose modules Linen named to a running NNX model."""

import ast
import re
import shlex
import shutil

import jax.numpy as jnp
import numpy as np
from flax import nnx

from orbax_nnx_handler import restore
from tests.cli import nnx_program
from tests.cli.conftest import MODEL, AutoNamed, stock

TARGET = f"{MODEL}:make_named"


def test_tree_plan_suggest_plan_lead_from_linen_s_own_names_to_a_running_model(cli, auto_named) -> None:
    x = jnp.linspace(-1, 1, 32).reshape(2, 16)

    seen = cli("tree", auto_named)
    before = cli("plan", auto_named, TARGET)
    proposed = cli("suggest", auto_named, TARGET)
    options = re.findall(r"--rename (\S+)", proposed.out)
    after = cli("plan", auto_named, TARGET, *(word for option in options for word in ("--rename", option)))
    pasted = ast.literal_eval(re.search(r"renames=(\[.*?^\])", proposed.out, re.DOTALL | re.MULTILINE)[1])
    model = restore(auto_named, nnx.eval_shape(nnx_program.make_named), renames=pasted)

    assert "params/Dense_0/kernel" in seen.out
    assert before.status == 1
    assert "orbax-nnx suggest" in before.out
    assert proposed.status == 0
    assert after.status == 0
    np.testing.assert_array_equal(model(x), AutoNamed().apply(stock(auto_named), x))


def test_the_examples_of_the_help_do_what_they_say_when_typed_as_they_stand(
    cli, auto_named, tmp_path, monkeypatch
) -> None:
    for step in ("1200", "1300"):
        shutil.copytree(auto_named, tmp_path / "run" / step / "default")
    model = (
        "from tests.cli.nnx_program import make_named\n\n\ndef make(layers=12):\n    return make_named()\n"
    )
    (tmp_path / "model.py").write_text(model)
    (tmp_path / "programs.py").write_text("from tests.cli.both_programs import PAIR\n")
    monkeypatch.chdir(tmp_path)

    commands = ("tree", "suggest", "plan", "convert", "diff", "verify")
    examples = [shlex.split(cli(command, "--help").out.splitlines()[-1]) for command in commands]

    assert [words[:2] for words in examples] == [["orbax-nnx", command] for command in commands]
    assert [cli(*words[1:]).status for words in examples] == [0] * len(commands)
    assert (tmp_path / "rules.py").exists()
    assert (tmp_path / "new" / "1200" / "items").exists()


def test_the_proposal_as_json_holds_what_the_text_holds(cli, auto_named) -> None:
    said = cli("suggest", auto_named, TARGET, "--json")
    lines = cli("suggest", auto_named, TARGET).out.splitlines()

    assert said.status == 0
    assert len(said.json["grounds"]) == len(said.json["renames"])
    for rule, why in zip(said.json["renames"], said.json["grounds"], strict=True):
        assert f"    {rule}," + (f"  # {why}" if why else "") in lines
    assert any(said.json["grounds"])
    assert said.json["resized"] == []
    assert said.json["unmatched_wanted"] == []
    assert said.json["unmatched_stored"] == []
    assert said.json["problem"] == ""
    assert sorted(map(ast.literal_eval, said.json["renames"])) == [
        ("Dense_0", "embed"),
        ("Dense_1", "head"),
        ("LayerNorm_0", "norm"),
    ]
    rules = map(ast.literal_eval, said.json["renames"])
    assert said.json["options"] == " ".join(f"--rename {stored}={wanted}" for stored, wanted in rules)


def test_a_target_that_nothing_stored_can_become_is_status_1(cli, auto_named) -> None:
    said = cli("suggest", auto_named, f"{MODEL}:make")

    assert said.status == 1
