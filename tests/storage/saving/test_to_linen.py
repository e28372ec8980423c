"""The tree that a save would write, in memory, beside what stock Orbax reads of that save."""

import contextlib
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from orbax_nnx_handler import (
    Copy,
    Fuse,
    Reshape,
    RuleError,
    StackLayers,
    Transpose,
    UnstackLayers,
    from_linen,
    plan_restore,
    save,
    to_linen,
)
from tests.storage.saving.trees import flat, leaves


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(3, 3, rngs=rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.cell = nnx.GRUCell(3, 4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.mask = jnp.arange(3)


def training() -> tuple[Model, nnx.Optimizer]:
    model = Model(nnx.Rngs(0))
    tx = optax.chain(optax.clip(1.0), optax.adamw(1e-3))
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


@pytest.mark.parametrize("layout", ["linen", "maxtext"])
@pytest.mark.parametrize("renames", [(), [("stem", "layers/0")]], ids=["no rules", "rules"])
def test_the_tree_holds_what_stock_orbax_reads_of_a_save(layout: Any, renames: Any, tmp_path: Path) -> None:
    item = training()
    save(tmp_path / "saved", item, layout=layout, renames=renames)

    tree = to_linen(item, layout, renames=renames)

    stored, ours = flat(tmp_path / "saved"), leaves(tree)
    assert {key: (np.shape(x), str(x.dtype)) for key, x in ours.items()} == {
        key: (np.shape(x), str(x.dtype)) for key, x in stored.items()
    }
    for key, value in ours.items():
        bits = jax.random.key_data if jnp.issubdtype(value.dtype, jax.dtypes.prng_key) else np.asarray
        np.testing.assert_array_equal(bits(value), bits(stored[key]), "/".join(key))
    assert isinstance(tree["opt_state"], list)


def test_a_linen_program_runs_on_the_tree() -> None:
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    x = jnp.arange(6.0).reshape(2, 3)

    np.testing.assert_allclose(nn.Dense(4).apply(to_linen(model), x), model(x), rtol=1e-6)


def test_arrays_are_the_states_own_and_abstract_leaves_stay_abstract() -> None:
    item = training()
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), nnx.state(item))

    tree, shapes = to_linen(item), to_linen(abstract, tx=item[1].tx)

    assert tree["params"]["layers_1"]["kernel"] is item[0].layers[1].kernel.get_raw_value()
    described = [
        {key: (np.shape(x), x.dtype) for key, x in leaves(found).items()} for found in (tree, shapes)
    ]
    assert described[0] == described[1]
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(shapes))


def test_gates_stay_on_the_devices_of_their_cell(mesh: Mesh) -> None:
    cell = nnx.GRUCell(4, 8, rngs=nnx.Rngs(0))
    sharding = NamedSharding(mesh, PartitionSpec())
    nnx.update(cell, jax.tree.map(lambda x: jax.device_put(x, sharding), nnx.state(cell, nnx.Param)))

    tree = to_linen(cell)

    # The bias that NNX lacks too: an array on one device beside others on eight could not be saved with them.
    assert {leaf.sharding.device_set == sharding.device_set for leaf in jax.tree.leaves(tree)} == {True}
    assert set(tree["params"]) == {side + gate for side in "ih" for gate in "rzn"}


@pytest.mark.parametrize("as_state", [False, True], ids=["module", "state"])
@pytest.mark.parametrize("opaque", [False, True])
def test_a_field_of_an_optimizer_may_be_called_as_its_state_is(opaque: bool, as_state: bool) -> None:
    tx = optax.contrib.sam(optax.adam(1e-2), optax.sgd(1e-2), opaque_mode=opaque)
    params = nn.Dense(3).init(jax.random.key(0), jnp.ones((1, 2)))["params"]
    linen = {"params": params, "opt_state": tx.init(params), "step": jnp.array(3)}

    def make() -> dict[str, Any]:
        model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        return {"model": model, "optimizer": nnx.Optimizer(model, tx, wrt=nnx.Param)}

    restored = from_linen(linen, nnx.eval_shape(make))
    back = to_linen({name: nnx.state(part) for name, part in restored.items()} if as_state else restored)

    def named(tree: Any) -> dict[str, Any]:
        return {jax.tree_util.keystr(path, simple=True): x for path, x in jax.tree.leaves_with_path(tree)}

    jax.tree.map(np.testing.assert_array_equal, named(back), named(linen))


def test_equal_copies_on_a_mesh_of_explicit_axes_are_found_to_be_equal() -> None:
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    rules = [Copy("embed/embedding", "head/kernel"), Transpose("head/kernel", (1, 0))]
    table = jax.device_put(jnp.arange(64.0).reshape(8, 8), NamedSharding(mesh, PartitionSpec("x", "y")))
    tied = {"params": {"embed": {"embedding": table}}}
    target = {"embed": {"embedding": nnx.Param(table)}, "head": {"kernel": nnx.Param(table)}}

    state = from_linen(tied, nnx.State(target), renames=rules)
    tree = to_linen(state, renames=rules)

    np.testing.assert_array_equal(state["head"]["kernel"][...], table.T)
    assert [key for key, _ in jax.tree.leaves_with_path(tree)] == [
        key for key, _ in jax.tree.leaves_with_path(tied)
    ]


@pytest.mark.parametrize("in_force", [False, True], ids=["", "mesh in force"])
def test_under_jit_leaves_on_a_mesh_of_explicit_axes_are_joined_and_cut(in_force: bool) -> None:
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)

    def param(start: int, shape: tuple[int, ...], *spec: str) -> nnx.Param[Any]:
        value = jnp.arange(start, start + np.prod(shape), dtype=np.float32).reshape(shape)
        return nnx.Param(jax.device_put(value, NamedSharding(mesh, PartitionSpec(*spec))))

    state = nnx.State(
        {
            "layers": {at: {"kernel": param(64 * at, (8, 8), *"xy"[:: 1 - 2 * at])} for at in range(2)},
            "blocks": {"kernel": param(128, (4, 8, 8), "x", "y")},
            "qk": {"kernel": param(384, (8, 6), "x", "y")},
        }
    )
    rules = [
        UnstackLayers("layers", "layers/{i}", axis=0),
        StackLayers("block_{i}", "blocks", axis=0),
        Fuse(("q", "k"), "qk", axis=1),
    ]

    def run(state: Any) -> Any:
        return to_linen(state, renames=rules)

    with jax.set_mesh(mesh) if in_force else contextlib.nullcontext():
        traced, found = jax.jit(run)(state), run(state)

    assert traced["params"]["layers"]["kernel"].shape == (2, 8, 8)
    assert set(traced["params"]) == {"layers", "q", "k", *(f"block_{at}" for at in range(4))}
    jax.tree.map(np.testing.assert_array_equal, traced, found)


@pytest.mark.parametrize("by_plan", [False, True], ids=["rules", "plan"])
@pytest.mark.parametrize(
    "rules",
    [
        [Copy("one", "two")],
        [Copy("one", "other"), ("other", "two")],
        [Copy("one", "two"), Reshape("two/kernel", (2, 2), before=(2, 2))],
    ],
    ids=["copy", "renamed", "shaped as it is"],
)
def test_a_copy_that_training_changed_is_not_lost(rules: Any, by_plan: bool) -> None:
    class Two(nnx.Module):
        def __init__(self) -> None:
            self.one, self.two = (nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(0)) for _ in range(2))

    def make() -> dict[str, Any]:
        model = Two()
        return {"model": model, "optimizer": nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)}

    kernel = {"one": {"kernel": np.arange(4, dtype="float32").reshape(2, 2)}}
    linen = {"params": kernel, "opt_state": optax.adam(1e-3).init(kernel), "step": 0}
    undone = plan_restore(linen, nnx.eval_shape(make), renames=rules) if by_plan else rules

    equal = from_linen(linen, nnx.eval_shape(make), renames=rules)
    np.testing.assert_array_equal(
        to_linen(equal, renames=undone)["params"]["one"]["kernel"], kernel["one"]["kernel"]
    )
    trained = from_linen(linen, nnx.eval_shape(make), renames=rules)
    trained["model"].two.kernel[...] += 100
    moved = from_linen(linen, nnx.eval_shape(make), renames=rules)
    moved["optimizer"].opt_state[0].mu["two"]["kernel"][...] += 7

    for changed in (trained, moved):
        with pytest.raises(RuleError, match=r"is no longer .*(one|two)/kernel"):
            to_linen(changed, renames=undone)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "complex64", "float64"])
def test_copies_that_differ_in_the_sign_of_zero_alone_are_not_equal(dtype: str) -> None:
    def two(one: list[float], other: list[float]) -> nnx.State:
        values = [np.array(value).astype(jnp.dtype(dtype)) for value in (one, other)]
        arrays = values if dtype == "float64" else map(jnp.asarray, values)
        leaves = zip(("one", "two"), arrays, strict=True)
        return nnx.from_flat_state([((name, "w"), nnx.Param(value)) for name, value in leaves])

    rules = [Copy("one/w", "two/w")]

    assert to_linen(two([0.0, -0.0, np.nan], [0.0, -0.0, np.nan]), renames=rules).keys() == {"params"}
    # A NaN has no value, so its sign tells nothing.
    assert to_linen(two([0.0, -0.0, np.nan], [0.0, -0.0, -np.nan]), renames=rules).keys() == {"params"}
    with pytest.raises(RuleError, match="two/w is no longer one/w"):
        to_linen(two([0.0, -0.0, np.nan], [-0.0, 0.0, np.nan]), renames=rules)


def test_copies_that_differ_beyond_32_bits_are_not_equal() -> None:
    two = [(("one", "n"), nnx.Param(np.int64(1))), (("two", "n"), nnx.Param(np.int64(1 + 2**32)))]

    with pytest.raises(RuleError, match="two/n is no longer one/n"):
        to_linen(nnx.from_flat_state(two), renames=[Copy("one/n", "two/n")])


def test_what_holds_no_nnx_object_is_refused() -> None:
    with pytest.raises(ValueError, match="a dict without an NNX object"):
        to_linen({"params": {"w": jnp.ones(2)}})
