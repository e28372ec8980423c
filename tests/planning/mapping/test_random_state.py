"""Which stored stream a wanted one is: by its whole path, its path in the model, or another Flax's name."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from orbax_nnx_handler.planning.core.leaves import StoredLeaf
from orbax_nnx_handler.planning.options import RestoreOptions
from orbax_nnx_handler.planning.restore_plan import RestorePlan, make_plan
from orbax_nnx_handler.planning.target import flatten_target

KEY = jax.eval_shape(jax.random.key, 0)


def stored_key(path: str) -> StoredLeaf:
    return StoredLeaf(
        path=tuple(path.split("/")), shape=(), dtype=np.dtype(np.uint32), key_impl="threefry2x32"
    )


def stored_array(path: str, *shape: int, dtype: Any = np.float32) -> StoredLeaf:
    return StoredLeaf(path=tuple(path.split("/")), shape=shape, dtype=np.dtype(dtype))


def plan(target: Any, *leaves: StoredLeaf) -> RestorePlan:
    return make_plan(flatten_target(target), {leaf.path: leaf for leaf in leaves}, RestoreOptions.of())


def sources(made: RestorePlan) -> dict[str, str]:
    return {
        "/".join(map(str, path)): "/".join(map(str, item.recipe.path)) for path, item in made.restored.items()
    }


def stream(*path: str) -> Any:
    tree: Any = {"key": nnx.RngKey(KEY), "count": nnx.RngCount(jax.ShapeDtypeStruct((), jnp.uint32))}
    for name in reversed(path):
        tree = {name: tree}
    return tree


WEIGHT = {"w": nnx.Param(jax.ShapeDtypeStruct((3,), jnp.float32))}


@pytest.mark.parametrize("name", ["key", "rng", "dropout_rng", "dropout_key"])
def test_a_key_that_is_a_field_of_a_train_state_is_restored(name: str) -> None:
    target = {"params": {"w": jax.ShapeDtypeStruct((3,), jnp.float32)}, "step": jnp.int32(0), name: KEY}
    leaves = stored_array("params/w", 3), stored_array("step", dtype=np.int32), stored_key(name)

    made = plan(target, *leaves)

    assert sources(made)[name] == name
    assert not made.defaulted
    assert not made.skipped


@pytest.mark.parametrize(
    ("wanted", "stored"),
    [(("drop", "rngs"), "drop/rngs/default"), (("drop", "rngs", "default"), "drop/rngs")],
)
@pytest.mark.parametrize("above", ["", "nnx_aux/model/", "nnx_aux/"])
def test_a_stream_is_found_as_either_flax_writes_it(wanted: tuple[str, ...], stored: str, above: str) -> None:
    target = nnx.State({**WEIGHT, **stream(*wanted)})
    weight = "params/w" if above else "w"
    count = stored_array(f"{above}{stored}/count", dtype=np.uint32)

    made = plan(target, stored_array(weight, 3), stored_key(f"{above}{stored}/key"), count)

    assert sources(made) == {
        "w": weight,
        "/".join((*wanted, "key")): f"{above}{stored}/key",
        "/".join((*wanted, "count")): f"{above}{stored}/count",
    }


def test_one_stored_stream_is_not_given_to_two_wanted_ones() -> None:
    target = nnx.State({**WEIGHT, "a": stream("rngs"), "rngs": stream("a", "rngs")["a"]["rngs"]})

    made = plan(target, stored_array("params/w", 3), stored_key("nnx_aux/model/a/rngs/key"))

    assert sources(made) == {"w": "params/w", "a/rngs/key": "nnx_aux/model/a/rngs/key"}


def test_of_two_streams_of_one_name_the_models_own_is_below_model() -> None:
    target = nnx.State({**WEIGHT, **stream("rngs")})
    leaves = [stored_key(f"nnx_aux/{name}/key") for name in ("rngs", "model/rngs")]

    made = plan(target, stored_array("params/w", 3), *leaves)

    assert sources(made)["rngs/key"] == "nnx_aux/model/rngs/key"


def test_a_stream_that_is_not_stored_is_said_not_to_be() -> None:
    made = plan(nnx.State({**WEIGHT, **stream("rngs")}), stored_array("params/w", 3))

    assert {item.reason for item in made.defaulted.values()} == {"random state that is not stored"}
