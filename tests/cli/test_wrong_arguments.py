"""What is not quite right on a command line: rules, groups, layouts and factories, each told in two lines."""

import pathlib

import numpy as np
import pytest

from tests.laws.worlds import Numbers, write

PROGRAM = """\
import jax.numpy as jnp
from flax import nnx
from orbax_nnx_handler import Rename


class Thing:
    pass


def make():
    return {"up": {"kernel": jnp.zeros((4, 8))}, "down": {"kernel": jnp.zeros((8, 4))}}


def thing():
    return Thing()


def words():
    return "a model"


async def later():
    return make()


MODEL = nnx.Linear(2, 3, rngs=nnx.Rngs(0))


def rules():
    return [("fc", "up")]


def fails():
    raise ValueError("no rules today")
"""


@pytest.fixture
def program(tmp_path: pathlib.Path) -> pathlib.Path:
    file = tmp_path / "wrong_program.py"
    file.write_text(PROGRAM)
    return file


@pytest.fixture
def item(tmp_path: pathlib.Path) -> pathlib.Path:
    numbers = Numbers()
    return write(tmp_path, {"params": {"fc": {"kernel": numbers(4, 8)}, "down": {"kernel": numbers(8, 4)}}})


@pytest.mark.parametrize(("factory", "kind"), [("thing", "Thing"), ("words", "str"), ("later", "coroutine")])
@pytest.mark.filterwarnings("error")
def test_a_factory_that_returns_no_target_is_told_with_what_it_returns(
    cli, item, program, factory, kind
) -> None:
    said = cli("plan", item, f"{program}:{factory}")

    assert said.status == 2
    assert said.err == (
        f"usage: {program}:{factory} fails under nnx.eval_shape: TypeError: it returns a value of type "
        f"{kind}, no module, state or tree of arrays\n"
    )


def test_a_model_in_the_place_of_a_factory_is_told(cli, item, program) -> None:
    said = cli("plan", item, f"{program}:MODEL")

    assert said.status == 2
    assert said.err == (
        f"usage: {program}:MODEL is no function, but of type Linear; a target is what a function returns: "
        "def make(): return ...\n"
    )


def test_rules_may_be_what_a_function_returns(cli, item, program) -> None:
    assert cli("plan", item, f"{program}:make", "--rules", f"{program}:rules").status == 0
    said = cli("plan", item, f"{program}:make", "--rules", f"{program}:fails")

    assert said.status == 2
    assert said.err == (
        f"usage: --rules {program}:fails is no list of rules: ValueError: no rules today\nat {program}:34\n"
    )


def test_a_rule_that_is_none_is_told_with_its_line(cli, item, program) -> None:
    file = program.with_name("wrong_rules.py")
    file.write_text("from orbax_nnx_handler import Rename\n\nRULES = [Rename('(fc', 'up', regex=True)]\n")

    said = cli("plan", item, f"{program}:make", "--rules", file)

    assert said.status == 2
    assert said.err.endswith(f"at {file}:3\n")


@pytest.mark.parametrize("rule", ["fc=upp", "params/fc=params/upp"])
def test_a_wanted_name_that_is_nearly_right_is_written_as_the_target_spells_it(
    cli, item, program, rule
) -> None:
    said = cli("plan", item, f"{program}:make", "--rename", rule)

    meant = rule.replace("upp", "up")
    assert said.status == 1
    assert f"hint: if that is meant, write {tuple(meant.split('='))}." in said.out
    assert cli("plan", item, f"{program}:make", "--rename", meant).status == 0


def test_a_wanted_name_that_nothing_is_called_like_is_not_guessed(cli, item, program) -> None:
    said = cli("plan", item, f"{program}:make", "--rename", "fc=encoder")

    assert said.status == 1
    assert "hint: a rule writes the wanted path as the target spells it" in said.out


@pytest.mark.parametrize("way", ["--scan", "--unscan"])
@pytest.mark.parametrize("group", ["", "params", "/"])
def test_a_group_without_a_name_is_refused(cli, item, tmp_path, way, group) -> None:
    said = cli("convert", item, tmp_path / "out", way, group, "--axis", 0)

    assert said.status == 1
    assert said.err == (
        f"RestoreError: {group.strip('/')!r} names no group of layers.\n"
        "hint: a group is a path below a collection or a train state; there are: down, fc.\n"
    )


def test_a_layout_that_the_checkpoint_has_not_is_no_way_to_another_one(cli, item, tmp_path) -> None:
    said = cli("convert", item, tmp_path / "out", "--to", "maxtext", "--layout", "t5x")

    assert said.status == 1
    assert said.err == (
        f"RestoreError: {item} does not have the form of T5X, as --layout t5x asks: it looks like Linen "
        "variables.\nhint: leave --layout out: it is found out from the metadata.\n"
    )
    assert not (tmp_path / "out").exists()


def test_a_config_without_weights_says_which_files_are_not_there(cli, tmp_path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")

    said = cli("convert", tmp_path / "model", tmp_path / "out")

    assert said.status == 1
    assert said.err.endswith(
        "hint: config.json is there without weights: download or copy flax_model.msgpack or "
        "model.safetensors too.\n"
    )


def test_layers_that_end_elsewhere_than_asked_are_named_with_the_group(cli, tmp_path) -> None:
    layers = {f"h_{at}": {"w": np.ones(3, np.float32)} for at in (0, 1)}
    path = write(tmp_path, {"params": {"decoder": layers}})

    said = cli("convert", path, tmp_path / "out", "--scan", "layers", "--axis", 0)

    assert said.err.endswith("there are: decoder/h.\n")
