"""A save undoes the rules that its handler restores with; random streams alone are an item."""

import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from orbax.checkpoint import v1 as ocp_v1

from orbax_nnx_handler import (
    NNXLinenHandler,
    NNXLinenRestore,
    NNXLinenSave,
    RuleError,
    Transpose,
    restore,
    save,
    v1,
)
from tests.laws.worlds import Branch, Numbers, check, flat, model_target

RULES = [("old", "new"), Transpose("new/kernel", (1, 0))]


def model(numbers):
    tree = {"new": {"kernel": numbers(2, 3)}, "head": {"kernel": numbers(3, 4)}}
    made = Branch(tree, {})
    nnx.update(made, nnx.State(jax.tree.map(nnx.Param, tree)))
    return made, tree


def test_a_manager_s_save_undoes_the_rules_of_its_handler(tmp_path):
    made, tree = model(Numbers())
    with ocp.CheckpointManager(tmp_path, item_handlers=NNXLinenHandler(renames=RULES)) as manager:
        manager.save(1, args=NNXLinenSave(made))
        manager.wait_until_finished()
        check(manager.restore(1, args=NNXLinenRestore(model_target(tree))), tree)

    with ocp.PyTreeCheckpointer() as checkpointer:
        stored = checkpointer.restore(tmp_path / "1" / "default")
    np.testing.assert_array_equal(stored["params"]["old"]["kernel"], tree["new"]["kernel"].T)


def test_a_save_that_names_no_rules_undoes_none_of_its_handler(tmp_path):
    made, tree = model(Numbers())
    with ocp.CheckpointManager(tmp_path, item_handlers=NNXLinenHandler(renames=RULES)) as manager:
        manager.save(1, args=NNXLinenSave(made, renames=()))
        manager.wait_until_finished()
        check(manager.restore(1, args=NNXLinenRestore(model_target(tree), renames=())), tree)

    with ocp.PyTreeCheckpointer() as checkpointer:
        stored = checkpointer.restore(tmp_path / "1" / "default")
    np.testing.assert_array_equal(stored["params"]["new"]["kernel"], tree["new"]["kernel"])


def test_rules_that_do_not_lead_back_to_what_was_restored_are_refused_with_two_ways_out(tmp_path):
    numbers = Numbers()
    tree = {"encoder": {"norm": {"scale": numbers(4)}}, "decoder": {"norm": {"scale": numbers(6)}}}
    stored = {"encoder": {"ln": tree["encoder"]["norm"]}, "decoder": tree["decoder"]}
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "1" / "default", {"params": stored})

    def saved(rules, **arguments):
        handler = NNXLinenHandler(renames=rules)
        with ocp.CheckpointManager(tmp_path, item_handlers=handler) as manager:
            found = manager.restore(1, args=NNXLinenRestore(model_target(tree)))
            check(found, tree)
            given = dict.fromkeys(arguments, handler.report)
            manager.save(2, args=NNXLinenSave(found, **given), force=True)
        with ocp.PyTreeCheckpointer() as checkpointer:
            made = checkpointer.restore(tmp_path / "2" / "default")
        shutil.rmtree(tmp_path / "2")
        return made["params"]

    with pytest.raises(RuleError, match="decoder/norm/scale would be stored as params/decoder/ln/scale"):
        saved([("ln", "norm")])
    for made in (saved([("encoder/ln", "encoder/norm")]), saved([("ln", "norm")], renames=True)):
        jax.tree.map(np.testing.assert_array_equal, made, stored)


def test_v1_undoes_the_rules_of_its_context(tmp_path):
    made, tree = model(Numbers())
    with v1.context(renames=RULES):
        ocp_v1.save(tmp_path / "item", made)
        check(ocp_v1.load(tmp_path / "item", model_target(tree)), tree)

    found = restore(tmp_path / "item", model_target(tree), renames=RULES)
    check(found, tree)


@pytest.mark.parametrize("through", ["save", "handler"])
def test_random_streams_alone_are_an_item(tmp_path, through):
    rngs = nnx.Rngs(3, dropout=4)
    rngs.dropout()
    if through == "save":
        save(tmp_path / "item", rngs)
    else:
        with ocp.Checkpointer(NNXLinenHandler()) as checkpointer:
            checkpointer.save(tmp_path / "item", args=NNXLinenSave(rngs))

    found = restore(tmp_path / "item", nnx.eval_shape(lambda: nnx.Rngs(0, dropout=0)))

    check(flat(nnx.state(found)), flat(nnx.state(rngs)))
