"""A target without a leaf is a mistake that is said at once, not a restore of nothing."""

import re

import jax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from orbax.checkpoint import v1

from orbax_nnx_handler import NNXLinenHandler, NNXLinenRestore, RestoreError, plan_restore, restore, suggest
from orbax_nnx_handler.v1 import context
from tests.handler.programs import abstract_net, linen_state, save_stock

WAY_OUT = (
    "hint: pass the module, optimizer or state that is to be filled, such as nnx.eval_shape(make_model).\n"
    "hint: to read the stored tree as it is, use Orbax alone: ocp.PyTreeCheckpointer().restore(ITEM)."
)
FILTERED = "hint: a State that nnx.state(model, FILTER) made is empty where the filter matches nothing."
EMPTY = {
    "None": (lambda: None, f"the target is None: there is nothing to restore into.\n{WAY_OUT}"),
    "State": (
        lambda: nnx.State({}),
        f"the target is a State without a leaf: there is nothing to restore into.\n{WAY_OUT}\n{FILTERED}",
    ),
    "module": (
        lambda: nnx.Dropout(0.1),
        f"the target is a Dropout without a leaf: there is nothing to restore into.\n{WAY_OUT}",
    ),
    "dict": (
        lambda: {"model": {}},
        f"the target is a dict without a leaf: there is nothing to restore into.\n{WAY_OUT}",
    ),
}


@pytest.fixture
def item(tmp_path):
    return save_stock(tmp_path / "item", linen_state())


@pytest.mark.parametrize("kind", EMPTY)
@pytest.mark.parametrize("call", [restore, plan_restore, suggest])
def test_a_target_without_a_leaf_is_an_error_that_says_so(item, call, kind):
    make, words = EMPTY[kind]

    with pytest.raises(RestoreError) as error:
        call(item, make())

    assert str(error.value) == words


def test_a_handler_refuses_an_empty_state_and_leaves_no_report(item):
    handler = NNXLinenHandler()

    with pytest.raises(RestoreError, match="a State without a leaf"):
        handler.restore(item, args=NNXLinenRestore(nnx.State({})))

    assert handler.report is None


def test_the_handler_of_orbax_v1_refuses_an_empty_state(tmp_path):
    with context():
        v1.save(tmp_path / "saved", nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0))))

        with pytest.raises(RestoreError, match="a State without a leaf"):
            v1.load(tmp_path / "saved", nnx.State({}))


def test_a_handler_without_an_item_gives_the_stored_tree_as_orbax_does(item):
    stock = ocp.PyTreeCheckpointHandler().restore(item)

    ours = NNXLinenHandler().restore(item, args=NNXLinenRestore())

    assert jax.tree.structure(ours) == jax.tree.structure(stock)


def test_the_way_out_for_the_stored_tree_works(item):
    with pytest.raises(RestoreError) as error:
        restore(item, None)

    call = re.search(r"ocp\.PyTreeCheckpointer\(\)\.restore\(ITEM\)", str(error.value))
    assert call is not None
    assert "params" in eval(call[0], {"ocp": ocp, "ITEM": item})


def test_a_part_of_a_target_may_be_empty(item):
    target = {"model": abstract_net(), "nothing": nnx.State({})}

    assert set(restore(item, target)) == {"model", "nothing"}
