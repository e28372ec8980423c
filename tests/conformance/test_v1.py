"""`orbax.checkpoint.v1`: what holds no NNX object goes through this package's context unchanged."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from tests.conformance.items import ITEMS, params, train_state
from tests.conformance.kits import OURS, STOCK, Kit, outcome
from tests.conformance.programs import Program

if not hasattr(ocp, "load_checkpointables") or not hasattr(ocp, "save"):
    pytest.skip("this version of orbax-checkpoint has another v1", allow_module_level=True)


def _abstract(tree: Any) -> Any:
    return jax.tree.map(
        lambda leaf: jax.eval_shape(lambda: leaf) if isinstance(leaf, jax.Array) else leaf, tree
    )


def comes_back(make: Any) -> Program:
    """Saves an item and loads it without a target, into one like it, and into an abstract one."""

    def program(kit: Kit, path: Any) -> Any:
        with kit.context():
            ocp.save(path, make())
            described = ocp.metadata(path)
            return [
                ocp.load(path),
                ocp.load(path, make()),
                ocp.load(path, _abstract(make())),
                repr(described.metadata),
                sorted(str(file.relative_to(path)) for file in path.glob("*/*")),
            ]

    return program


def loaded(target: Any, make: Any = params, **options: Any) -> Program:
    """Saves a tree and loads it into a target, under settings of the context."""

    def program(kit: Kit, path: Any) -> Any:
        base = ocp.Context()
        for name, value in options.items():
            setattr(base.pytree.loading if name == "partial_load" else base.array.saving, name, value)
        with kit.context(base):
            ocp.save(path, make())
            return ocp.load(path, target())

    return program


def _checkpointables(kit: Kit, path: Any) -> Any:
    with kit.context():
        ocp.save_checkpointables(path, {"state": train_state(), "tree": params(), "note": {"text": "x"}})
        return [
            ocp.load_checkpointables(path),
            ocp.load_checkpointables(path, {"tree": _abstract(params()), "note": None}),
        ]


def _in_the_background(kit: Kit, path: Any) -> Any:
    values = np.arange(4.0)
    with kit.context():
        response = ocp.save_async(path, {"w": values, "n": 3})
        values[:] = -1
        response.result()
        return ocp.load(path, {"w": np.zeros(4), "n": 0})


def _training(kit: Kit, path: Any) -> Any:
    with kit.context(), ocp.training.Checkpointer(path) as checkpointer:
        for step in range(3):
            checkpointer.save(step, params(float(step)))
        return checkpointer.latest.step, checkpointer.load(1, _abstract(params()))


def _training_in_the_background(kit: Kit, path: Any) -> Any:
    policies = ocp.training.preservation_policies
    with (
        kit.context(),
        ocp.training.Checkpointer(path, preservation_policy=policies.LatestN(2)) as checkpointer,
    ):
        for step in range(4):
            checkpointer.save_async(step, params(float(step)), metrics={"loss": 1.0 - step / 10}).result()
        left = [found.step for found in checkpointer.checkpoints]
        return left, checkpointer.load(), repr(checkpointer.metadata(3).metadata)


def _a_place_that_is_taken(kit: Kit, path: Any) -> Any:
    with kit.context():
        ocp.save(path, params())
        ocp.save(path, params(2.0), overwrite=True)
        assert float(ocp.load(path)["dense"]["kernel"][0, 0]) == 2.0
        return ocp.save(path, params(3.0))


def _nothing_there(kit: Kit, path: Any) -> Any:
    with kit.context():
        return ocp.load(path, params())


def _metadata_of_the_user(kit: Kit, path: Any) -> Any:
    with kit.context():
        ocp.save(path, params(), custom_metadata={"by": "me"})
        found = ocp.metadata(path)
        return found.custom_metadata, ocp.load(path, found)


def _one_of_several(kit: Kit, path: Any) -> Any:
    with kit.context():
        ocp.save_checkpointables(path, {"state": train_state(), "tree": params()})
        return ocp.load(path, _abstract(params()), checkpointable_name="tree")


def _one_that_is_not_there(kit: Kit, path: Any) -> Any:
    with kit.context():
        ocp.save_checkpointables(path, {"tree": params()})
        return ocp.load_checkpointables(path, {"other": None})


def _in_two_contexts(kit: Kit, path: Any) -> Any:
    with kit.context():
        ocp.save(path, {"w": np.ones(2, np.complex64)})
    with ocp.Context():
        return ocp.load(path)


PROGRAMS: dict[str, Program] = {
    "training in the background": _training_in_the_background,
    "a place that is taken": _a_place_that_is_taken,
    "nothing there": _nothing_there,
    "metadata of the user": _metadata_of_the_user,
    "one of several": _one_of_several,
    "one that is not there": _one_that_is_not_there,
    "complex numbers, read by stock": _in_two_contexts,
    **{f"item: {name}": comes_back(make) for name, make in ITEMS.items()},
    "placeholder": loaded(lambda: {"dense": {**params()["dense"], "bias": ...}}),
    "a type for a leaf": loaded(lambda: {"n": int}, lambda: {"n": 3}),
    "a part": loaded(lambda: {"dense": {"bias": jnp.zeros(2)}}, partial_load=True),
    "a part that is not asked for": loaded(lambda: {"dense": {"bias": jnp.zeros(2)}}),
    "another shape": loaded(lambda: {"dense": {**params()["dense"], "bias": jnp.zeros(3)}}),
    "another dtype": loaded(lambda: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params())),
    "a leaf of an unknown type": loaded(lambda: {"a": object()}),
    "zarr 2": loaded(params, use_zarr3=False),
    "file by file": loaded(params, use_ocdbt=False),
    "several checkpointables": _checkpointables,
    "a save in the background": _in_the_background,
    "a training checkpointer": _training,
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_without_nnx_sees_what_it_sees_in_orbaxs_own_context(tmp_path, name) -> None:
    (tmp_path / "stock").mkdir()
    (tmp_path / "ours").mkdir()

    stock = outcome(PROGRAMS[name], STOCK, tmp_path / "stock" / "item")
    ours = outcome(PROGRAMS[name], OURS, tmp_path / "ours" / "item")

    assert ours == stock
