"""Key and value heads that a program keeps once and a model wants several times, there and back."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from orbax_nnx_handler import (
    Fuse,
    Repeat,
    RestoreError,
    RuleError,
    from_linen,
    invert,
    plan_restore,
    restore,
    save,
    to_linen,
)

HEADS, COUNT, WIDTH = 2, 3, 4
RULES = (Repeat("key/kernel", axis=1, count=COUNT),)
KERNEL = np.arange(5 * HEADS * WIDTH, dtype=np.float32).reshape(5, HEADS, WIDTH)
TREE = {"params": {"key": {"kernel": KERNEL}, "out": {"kernel": np.ones((3, 3), np.float32)}}}
REPEATED = np.repeat(KERNEL, COUNT, axis=1)


class Heads(nnx.Module):
    def __init__(self, count: int = HEADS * COUNT):
        self.key = nnx.Dict(kernel=nnx.Param(jnp.zeros((5, count, WIDTH))))
        self.out = nnx.Dict(kernel=nnx.Param(jnp.zeros((3, 3))))


def stored(tree: Any, path: Path) -> Path:
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
    return path


@pytest.mark.parametrize("axis", [1, -2])
def test_each_element_is_there_several_times_in_a_row_as_numpy_repeats(axis: int, tmp_path: Path) -> None:
    path = stored(TREE, tmp_path / "tree")
    rules = [Repeat("key/kernel", axis, COUNT)]

    plan = plan_restore(path, nnx.eval_shape(Heads), renames=rules)
    model = restore(path, nnx.eval_shape(Heads), renames=rules, unexpected="error")

    assert "repeat 3 times on axis 1" in str(plan)
    np.testing.assert_array_equal(model.key["kernel"].get_value(), REPEATED)
    for form in (jnp.asarray, np.asarray):
        held = from_linen(jax.tree.map(form, TREE), nnx.eval_shape(Heads), renames=rules)
        np.testing.assert_array_equal(held.key["kernel"].get_value(), REPEATED)


@pytest.mark.parametrize("spec", [(None, "fsdp"), ("tensor", None, "fsdp"), (None, None, "tensor")], ids=str)
def test_every_device_reads_the_elements_of_its_own_copies(spec: Any, mesh: Any, tmp_path: Path) -> None:
    kernel = np.arange(8 * 4 * 8, dtype=np.float32).reshape(8, 4, 8)
    path = stored({"params": {"kernel": kernel}}, tmp_path / "tree")
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    wanted = {"kernel": jax.ShapeDtypeStruct((8, 12, 8), np.float32, sharding=sharding)}

    found = restore(path, wanted, renames=[Repeat("kernel", 1, 3)])["kernel"]

    assert found.sharding == sharding
    np.testing.assert_array_equal(found, np.repeat(kernel, 3, axis=1))


@pytest.mark.parametrize("by", ["rules", "plan"])
def test_a_save_stores_one_of_equal_copies_and_refuses_others(by: str, tmp_path: Path) -> None:
    target = nnx.eval_shape(Heads)
    path = stored(TREE, tmp_path / "tree")
    model = restore(path, target, renames=RULES)
    undone = RULES if by == "rules" else plan_restore(path, target, renames=RULES)

    tree = to_linen(model, renames=undone)
    save(tmp_path / "back", model, renames=undone)

    np.testing.assert_array_equal(tree["params"]["key"]["kernel"], KERNEL)
    back = restore(tmp_path / "back", target, renames=RULES)
    np.testing.assert_array_equal(back.key["kernel"].get_value(), REPEATED)
    model.key["kernel"].set_value(jnp.asarray(REPEATED).at[0, 1, 0].add(1))
    with pytest.raises(RuleError) as error:
        to_linen(model, renames=undone)
    assert str(error.value) == (
        "the rules or the plan say that 1 leaf holds each element several times, and those differ:\n"
        "  key/kernel\n"
        "hint: save without renames or the Repeat, and restore that without it: each has its own place then."
    )
    save(tmp_path / "whole", model)
    whole = restore(tmp_path / "whole", target)
    np.testing.assert_array_equal(whole.key["kernel"].get_value(), model.key["kernel"].get_value())


def test_a_repeated_part_of_a_fused_leaf_is_looked_at_in_its_place() -> None:
    rules = [Repeat("key/kernel", 1, COUNT), Fuse(("query/kernel", "key/kernel"), "qk/kernel", 1)]
    tree = {"params": {"query": {"kernel": REPEATED + 0.5}, "key": {"kernel": KERNEL}}}
    wanted = {"qk": {"kernel": nnx.Param(jax.ShapeDtypeStruct((5, 2 * HEADS * COUNT, WIDTH), np.float32))}}

    found = from_linen(tree, wanted, renames=rules)
    back = to_linen(found, renames=rules)

    np.testing.assert_array_equal(
        found["qk"]["kernel"].get_value(), np.concatenate([REPEATED + 0.5, REPEATED], 1)
    )
    jax.tree.map(np.testing.assert_array_equal, back["params"], tree["params"])
    found["qk"]["kernel"].set_value(found["qk"]["kernel"].get_value().at[0, -1, 0].add(1))
    with pytest.raises(RuleError, match="those differ"):
        to_linen(found, renames=rules)


def training(count: int = HEADS * COUNT) -> dict[str, Any]:
    model = Heads(count)
    return {"model": model, "optimizer": nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)}


def test_moments_of_repeated_elements_are_refused_with_the_reason() -> None:
    tree = to_linen(training(HEADS))
    target = nnx.eval_shape(training)

    with pytest.raises(RestoreError) as error:
        from_linen(tree, target, renames=RULES)
    assert "the gradient of a repeated element is that of all its copies together" in str(error.value)
    begun = from_linen(
        tree, target, renames=RULES, policy={nnx.OptState: "init", ...: "error"}, init=training
    )
    assert begun["optimizer"].opt_state[0].mu["key"]["kernel"].get_value().shape == REPEATED.shape
    with pytest.raises(RuleError, match="elements of its parameter are repeated"):
        to_linen(begun, renames=RULES)


def test_a_rule_that_repeats_nothing_is_refused_and_undoing_says_what_is_kept() -> None:
    with pytest.raises(RuleError, match="count is 2 or more"):
        Repeat("key/kernel", 1, 1)
    with pytest.raises(RuleError, match="has no axis 3"):
        from_linen(TREE, nnx.eval_shape(Heads), renames=[Repeat("key/kernel", 3, 2)])
    (back,) = invert(RULES)
    with pytest.raises(RuleError, match="no multiple of 3"):
        from_linen({"key": {"kernel": np.ones((5, 4))}}, {"x": jnp.ones(1)}, renames=[back])
