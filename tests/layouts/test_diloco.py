"""A DiLoCo state: a train state for each replica, stacked, and the outer weights with their momentum."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from orbax_nnx_handler import RestoreError, plan_restore, restore, save

REPLICAS = 2


class DiLoCo(flax.struct.PyTreeNode):
    """The state as MaxText holds it."""

    inner_state: Any
    params: Any
    outer_opt_state: Any
    step: Any


class Training(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.model = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs))
        self.optimizer = nnx.Optimizer(self.model, optax.adam(1e-3), wrt=nnx.Param)


def target() -> DiLoCo:
    training = nnx.eval_shape(lambda: Training(nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.state(training.model, nnx.Param))
    outer = optax.sgd(0.1, momentum=0.9, nesterov=True)
    return DiLoCo(
        inner_state=jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((REPLICAS, *leaf.shape), leaf.dtype), nnx.state(training)
        ),
        params=params,
        outer_opt_state=jax.eval_shape(outer.init, params),
        step=jax.ShapeDtypeStruct((), jnp.int32),
    )


def stored() -> dict[str, Any]:
    """Returns the tree on disk, no two numbers of it alike."""
    numbers = iter(np.random.default_rng(0).permutation(10_000).astype(np.float32))

    def array(*shape: int) -> np.ndarray[Any, Any]:
        return np.array([next(numbers) for _ in range(int(np.prod(shape)))], np.float32).reshape(shape)

    def net(*replicas: int) -> dict[str, Any]:
        return {
            "layers_0": {"kernel": array(*replicas, 3, 4), "bias": array(*replicas, 4)},
            "layers_1": {"kernel": array(*replicas, 4, 2), "bias": array(*replicas, 2)},
        }

    moments = {name: {"params": net(REPLICAS)} for name in ("mu", "nu")}
    steps = np.full(REPLICAS, 5, np.int32)
    return {
        "inner_state": {
            "params": {"params": net(REPLICAS)},
            "opt_state": [{"count": steps, **moments}, None, None],
            "step": steps,
        },
        "params": {"params": net()},
        "outer_opt_state": [{"trace": net()}, None],
        "step": np.int32(5),
    }


def write(path: Any, tree: Any) -> Any:
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
    return path


def test_inner_and_outer_states_go_where_they_belong(tmp_path):
    tree = stored()

    found = restore(write(tmp_path / "item", tree), target(), unexpected="error")

    for layer in (0, 1):
        name = f"layers_{layer}"
        inner = found.inner_state
        for ours, theirs in (
            (inner["model"]["layers"][layer], tree["inner_state"]["params"]["params"]),
            (
                inner["optimizer"]["opt_state"][0]["mu"]["layers"][layer],
                tree["inner_state"]["opt_state"][0]["mu"]["params"],
            ),
            (
                inner["optimizer"]["opt_state"][0]["nu"]["layers"][layer],
                tree["inner_state"]["opt_state"][0]["nu"]["params"],
            ),
        ):
            np.testing.assert_array_equal(ours["kernel"][...], theirs[name]["kernel"])
        np.testing.assert_array_equal(
            found.params["layers"][layer]["kernel"], tree["params"]["params"][name]["kernel"]
        )
        trace = found.outer_opt_state[0].trace["layers"][layer]
        np.testing.assert_array_equal(trace["bias"], tree["outer_opt_state"][0]["trace"][name]["bias"])
    assert found.inner_state["optimizer"]["step"][...].tolist() == [5, 5]
    assert int(found.step) == 5


@pytest.mark.parametrize("layout", ["linen", "maxtext"])
def test_what_is_saved_comes_back(tmp_path, layout):
    state = restore(write(tmp_path / "item", stored()), target())
    save(tmp_path / "again", state, layout=layout)

    again = restore(tmp_path / "again", target())

    assert jax.tree.structure(again) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, again, state)


def test_the_plan_of_the_restore_puts_every_leaf_back_to_its_place(tmp_path):
    tree = stored()
    item = write(tmp_path / "item", tree)

    save(tmp_path / "again", restore(item, target()), renames=plan_restore(item, target()))

    with ocp.PyTreeCheckpointer() as checkpointer:
        again = checkpointer.restore(tmp_path / "again")
    for left, right in (("inner_state", "params"), ("params", "params")):
        jax.tree.map(np.testing.assert_array_equal, again[left][right], tree[left][right])


def test_an_outer_momentum_that_is_not_stored_is_never_taken_from_the_replicas(tmp_path):
    tree = {name: value for name, value in stored().items() if name != "outer_opt_state"}

    with pytest.raises(RestoreError) as error:
        restore(write(tmp_path / "item", tree), target())

    assert {path[0] for path in error.value.paths} >= {"outer_opt_state"}


def test_weights_alone_are_the_outer_ones_and_each_replica_begins_as_a_copy_of_them(tmp_path):
    tree = {"params": stored()["params"]}
    item = write(tmp_path / "item", tree)

    with pytest.raises(RestoreError) as error:
        restore(item, target())
    # One stored weight is never two wanted ones: that the replicas begin alike, the program says.
    assert {path[0] for path in error.value.paths} == {"inner_state", "outer_opt_state", "step"}

    params = restore(item, target().params, unexpected="error")
    training = nnx.eval_shape(lambda: Training(nnx.Rngs(0)))
    nnx.replace_by_pure_dict(weights := nnx.state(training.model), params)
    replicas = jax.tree.map(lambda leaf: jnp.stack([leaf] * REPLICAS), weights)
    state = target().replace(params=params, inner_state={"model": replicas})

    kernel = tree["params"]["params"]["layers_1"]["kernel"]
    np.testing.assert_array_equal(state.params["layers"][1]["kernel"], kernel)
    np.testing.assert_array_equal(
        state.inner_state["model"]["layers"][1]["kernel"][...], np.stack([kernel, kernel])
    )
