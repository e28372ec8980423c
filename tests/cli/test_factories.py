"""What may stand for MODULE:FACTORY, and what is said of everything else."""

import pathlib

import jax
import pytest
from flax import nnx

from orbax_nnx_handler.commands.user_code import UsageError, load_factory
from tests.cli.conftest import MODEL

FUNCTIONS = ["Mlp", "Named", "make", "make_train", "make_abstract", "make_named", "make_broken", "make_other"]


@pytest.mark.parametrize("text", [f"{MODEL}:make", "tests.cli.nnx_program:make", f"{MODEL}:make_abstract"])
def test_a_file_a_module_and_an_abstract_factory_give_the_same_target(text: str) -> None:
    target = load_factory(text).target()

    kernel = target.hidden[2].kernel.get_value()
    assert isinstance(kernel, jax.ShapeDtypeStruct)
    assert kernel.shape == (8, 8)


def test_arguments_are_handed_to_the_factory() -> None:
    target = load_factory(f"{MODEL}:make(5, width=4)").target()

    assert len(target.hidden) == 5
    assert target.up.kernel.get_value().shape == (16, 4)


def test_no_array_is_made() -> None:
    target = load_factory(f"{MODEL}:make_train").target()

    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(target))


def test_weights_only_leaves_optimizer_and_step_out() -> None:
    target = load_factory(f"{MODEL}:make_train").target(weights_only=True)

    names = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(target)}
    assert "0/up/kernel" in names
    assert not [name for name in names if name.startswith("1/")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("make", "'make' is no MODULE:FACTORY, such as model.py:make or 'model:make(layers=12)'."),
        ("no/such.py:make", "there is no file no/such.py."),
        ("no_such_module:make", "no_such_module cannot be imported: No module named 'no_such_module'"),
        (
            f"{MODEL}:A_NUMBER",
            (
                f"{MODEL}:A_NUMBER is no function, but of type int; a target is what a function returns: "
                "def make(): return ..."
            ),
        ),
        (
            f"{MODEL}:nothing",
            f"{MODEL} has no nothing; it has: {', '.join(FUNCTIONS)}.",
        ),
        (f"{MODEL}:make(layers=1", f"'{MODEL}:make(layers=1' is no Python: '(' was never closed."),
        (f"{MODEL}:make(**x)", "'make(**x)' is no function, nor a call with literal arguments."),
        (f"{MODEL}:make()()", "'make()()' is no function, nor a call with literal arguments."),
    ],
)
def test_what_is_no_factory_is_named_with_the_reason(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_factory(text)

    assert str(caught.value) == message


def test_arguments_are_never_evaluated(tmp_path: pathlib.Path) -> None:
    trace = tmp_path / "trace"
    text = f"{MODEL}:make(layers=__import__('pathlib').Path({str(trace)!r}).touch())"

    with pytest.raises(UsageError, match="are not all literals"):
        load_factory(text)

    assert not trace.exists()


def test_a_factory_that_fails_says_where() -> None:
    with pytest.raises(UsageError) as caught:
        load_factory(f"{MODEL}:make_broken").target()

    line = MODEL.read_text().splitlines().index('    raise KeyError("no such size")') + 1
    assert str(caught.value) == (
        f"{MODEL}:make_broken fails under nnx.eval_shape: KeyError: 'no such size'\nat {MODEL}:{line}"
    )


def test_a_state_that_is_abstract_already_stays_what_it_is(tmp_path) -> None:
    file = tmp_path / "model.py"
    file.write_text(
        "import jax\nfrom flax import nnx\n"
        "LEAF = jax.ShapeDtypeStruct((2, 3), 'bfloat16')\n"
        "def make(more=()):\n"
        "    return nnx.State({'w': nnx.Param(LEAF, note='mine'), **{name: nnx.Param(jax.numpy.ones(4))"
        " for name in more}})\n"
    )

    abstract = load_factory(f"{file}:make").target()
    mixed = load_factory(f"{file}:make(more=('v',))").target()

    assert abstract["w"].get_metadata("note") == "mine"
    for state in (abstract, mixed):
        assert type(state["w"]) is nnx.Param
        assert state["w"].get_raw_value() == jax.ShapeDtypeStruct((2, 3), "bfloat16")
    assert isinstance(mixed["v"].get_raw_value(), jax.ShapeDtypeStruct)
