"""Names in a checkpoint are data: in every output of every command, and in what is printed to be pasted."""

import json
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orbax_nnx_handler import RestoreError, cli, plan_restore, suggest
from orbax_nnx_handler.planning.core.errors import as_python
from orbax_nnx_handler.planning.rules import Rename, Split
from tests.storage.checkpoints import DiskFormat, save

ESCAPES = "a\x1b]0;owned\x07\x1b[2J\x9bb"
LINES = "x\nINJECTED = 1\r\x85#"
BIDI = "a\u202eb\u2066c\u200b"
NAMES = [ESCAPES, LINES, BIDI]
OPTIONS = ["-rf", "a=b", "-a=b", "--item", "a b", "$(id)", "it's", "a\\b", "ü", "*", "=", "a\\=b", "a\\"]
PROGRAM = """
from flax import nnx
class Model(nnx.Module):
    def __init__(self): self.hidden = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
def make(): return Model()
"""


def stored(tmp_path, name):
    tree = {"params": {name: {"kernel": np.ones((4, 3), np.float32), "bias": np.ones(3, np.float32)}}}
    return save(tmp_path / "item", tree, DiskFormat(True, True, False))


@pytest.fixture
def target(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    return f"{tmp_path / 'program.py'}:make"


def assert_harmless(text):
    hidden = [letter for letter in text if not letter.isprintable() and letter != "\n"]
    assert not hidden
    assert not [line for line in text.splitlines() if line.lstrip().startswith("INJECTED")]


@pytest.mark.parametrize("name", NAMES, ids=["escapes", "lines", "bidi"])
@pytest.mark.parametrize("as_json", [False, True])
def test_no_command_prints_a_control_character(tmp_path, capsys, caplog, target, name, as_json):
    path = str(stored(tmp_path, name))
    other = str(save(tmp_path / "other", {"params": {"w": np.ones(3)}}, DiskFormat(True, True, False)))
    made = str(tmp_path / "made")

    for words in (
        ["tree", path],
        ["plan", path, target],
        ["plan", path, target, "--policy", "warn"],
        ["plan", path, target, "--rename", f"{name}=other"],
        ["suggest", path, target],
        ["diff", path, other],
        ["convert", path, made, target],
        ["tree", f"{path}/{name}"],
    ):
        assert cli.main([*words, *(["--json"] if as_json and words[0] != "convert" else [])]) in (0, 1)
        said = capsys.readouterr()
        assert_harmless(said.out + said.err + caplog.text)
        if as_json and words[0] == "tree" and len(words) == 2 and words[1] == path:
            assert json.loads(said.out)["leaves"][0]["path"] == f"params/{name}/bias"


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_suggest_prints_work_whatever_the_name(tmp_path, capsys, target, name):
    path = str(stored(tmp_path, name))

    assert cli.main(["suggest", path, target]) == 0
    said = capsys.readouterr().out
    _, there, options = said.partition("# on the command line: ")

    if there:
        assert cli.main(["plan", path, target, *shlex.split(options)]) == 0
    else:
        assert name in ("a\\=b", "a\\")


@pytest.mark.parametrize("name", NAMES, ids=["escapes", "lines", "bidi"])
def test_what_suggest_prints_is_python_and_has_the_name_as_data(tmp_path, name):
    path = stored(tmp_path, name)
    wanted = {"hidden": {"kernel": np.ones((4, 3), np.float32), "bias": np.ones(3, np.float32)}}

    text = str(suggest(path, wanted))

    assert_harmless(text)
    found = {}
    exec(text, {}, found)
    assert found == {"renames": [(name, "hidden")]}


def test_a_filter_that_is_printed_to_be_pasted_holds_the_name_as_data():
    from flax import nnx

    for name in (*NAMES, 'a"b\\', "\ud800"):
        text = as_python({nnx.PathContains(name): "init", ...: "error"})
        assert_harmless(text)
        assert next(iter(eval(text, {"nnx": nnx}))).key == name


@pytest.mark.parametrize("name", NAMES, ids=["escapes", "lines", "bidi"])
def test_no_error_or_page_has_a_control_character(tmp_path, name, caplog):
    f32 = jnp.float32
    tree = {
        "params": {
            **{f"{name}_{at}": {"w": np.ones((4, 3), np.float32)} for at in range(3)},
            name: {"kernel": np.ones((4, 4), np.float32), name: np.ones(4, np.int8), "scale": np.ones(4)},
        },
        name: np.ones(3, np.float32),
    }
    path = save(tmp_path / "item", tree, DiskFormat(True, True, False))
    sds = jax.ShapeDtypeStruct
    targets = {
        "another shape": {name: {"kernel": sds((4, 5), f32)}},
        "transposed": {name: {"kernel": sds((4, 4), f32), name: sds((5,), f32)}},
        "a stack": {name: {"w": sds((3, 4, 3), f32)}},
        "more layers": {f"{name}_{at}": {"w": sds((4, 3), f32)} for at in range(5)},
        "codes": {name: {name: sds((4,), f32)}},
        "another name": {f"{name}y": {"kernel": sds((4, 4), f32)}, "z": {"kernel": sds((4, 4), f32)}},
        "nothing": {"q": sds((7,), f32)},
    }
    rules = [
        (),
        [(name, "z")],
        [(f"{name}z", "a")],
        [(f"{name}_{{i}}", "z")],
        [Split(name, ("a", "b"), axis=0)],
    ]
    said = 0
    for wanted in targets.values():
        for renames in rules:
            for policy in ("error", "warn"):
                try:
                    plan = plan_restore(path, wanted, renames=renames, policy=policy)
                    texts = [str(plan), plan._repr_html_(), *map(str, plan.to_dict()["hints"])]
                    plan.check()
                except RestoreError as error:
                    texts = [str(error), *(hint.words for hint in error.hints)]
                    said += 1
                for text in texts[:2]:
                    assert_harmless(text)
    assert said > 20
    assert_harmless(caplog.text)


def test_rules_are_printed_as_python_whatever_the_name():
    for name in NAMES:
        assert_harmless(str(Rename(name, "b")))
        assert_harmless(str(Split(name, ("a", name), axis=0)))
