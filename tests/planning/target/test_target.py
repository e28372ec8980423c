"""What is wanted: the leaves of a target, their roles, and the target built again around other values."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from orbax_nnx_handler import RestoreError
from orbax_nnx_handler.planning.target import flatten_target
from orbax_nnx_handler.planning.target.roles import collection_of, roles_of


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.dense = nnx.Linear(2, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.seen = nnx.Cache(jnp.zeros(4))


class Training(nnx.Module):
    def __init__(self) -> None:
        self.model = Net(nnx.Rngs(0))
        self.optimizer = nnx.Optimizer(self.model, optax.adam(1e-3), wrt=nnx.Param)


@pytest.fixture(scope="module")
def training() -> Any:
    return nnx.eval_shape(Training)


def roles(target: Any) -> dict[str, tuple[str, str | None]]:
    found = roles_of(flatten_target(target).leaves)
    return {"/".join(map(str, item.leaf.path)): (item.role, item.collection) for item in found}


def test_the_type_of_a_variable_tells_its_role_and_its_collection(training):
    assert roles(training.model) == {
        "dense/kernel": ("model", "params"),
        "dense/bias": ("model", "params"),
        "norm/scale": ("model", "params"),
        "norm/bias": ("model", "params"),
        "norm/mean": ("model", "batch_stats"),
        "norm/var": ("model", "batch_stats"),
        "drop/rngs/key": ("random", "RngKey"),
        "drop/rngs/count": ("random", "RngCount"),
        "seen": ("transient", "cache"),
    }


def test_a_leaf_of_an_optimizer_has_its_path_below_opt_state_and_its_owner_above(training):
    found = {item.leaf.path: item for item in roles_of(flatten_target(training).leaves)}

    moment = found["optimizer", "opt_state", 0, "mu", "dense", "kernel"]
    assert (moment.role, moment.owner, moment.path) == (
        "optimizer",
        ("optimizer",),
        (0, "mu", "dense", "kernel"),
    )
    step = found["optimizer", "step"]
    assert (step.role, step.owner, step.is_count) == ("step", ("optimizer",), True)


def test_a_weight_that_is_called_step_is_a_models():
    state = nnx.State({"step": nnx.Param(jnp.zeros(())), "opt_state": {"w": nnx.Param(jnp.zeros(2))}})

    assert {role for role, _ in roles(state).values()} == {"model"}


def test_a_type_that_nobody_has_registered_is_called_as_its_class_is():
    class Adapter(nnx.Variable):
        pass

    assert collection_of(Adapter) == "Adapter"
    assert collection_of(None) is None


def test_leaves_have_the_shapes_and_dtypes_of_the_target_in_its_order(training):
    leaves = flatten_target(training).leaves

    expected = {path: leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(training))}
    assert leaves.keys() == expected.keys()
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in leaves.items()} == {
        path: (value.shape, value.dtype) for path, value in expected.items()
    }


def test_the_target_is_built_again_around_other_values_and_stays_as_it_was():
    item = {"model": nnx.State({"w": nnx.Param(jnp.zeros(2))}), "steps": (np.zeros((), np.int32),)}
    target = flatten_target(item)

    built = target.assemble({("model", "w"): jnp.ones(2), ("steps", 0): np.int32(7)})

    assert type(built["model"]) is nnx.State
    np.testing.assert_array_equal(built["model"]["w"].get_value(), [1, 1])
    assert built["steps"] == (7,)
    np.testing.assert_array_equal(item["model"]["w"].get_value(), [0, 0])


def test_a_variable_at_two_paths_is_wanted_once():
    class Tied(nnx.Module):
        def __init__(self) -> None:
            self.embed = nnx.Embed(3, 2, rngs=nnx.Rngs(0))
            self.head = self.embed

    target = flatten_target(nnx.eval_shape(Tied))

    assert list(target.leaves) == [("embed", "embedding")]
    assert target.aliases() == {("head", "embedding"): ("embed", "embedding")}


def test_a_leaf_without_shape_and_an_override_of_no_leaf_are_refused():
    with pytest.raises(RestoreError, match="name"):
        flatten_target({"name": "x"})
    with pytest.raises(RestoreError, match="other"):
        flatten_target({"w": jax.ShapeDtypeStruct((2,), "float32")}, {("other",): object()})
