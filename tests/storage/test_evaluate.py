"""Recipes on whole arrays, of the host and of devices, beside an evaluator that shares no code with it."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.core.recipes import (
    Concat,
    Fill,
    Index,
    Read,
    Recipe,
    Repeat,
    Reshape,
    Scale,
    Slice,
    Stack,
    Transpose,
)
from orbax_nnx_handler.storage.arithmetic import evaluate
from tests.planning import plans

A, B = Read(("a",)), Read(("b",))
RECIPES: list[Recipe] = [
    A,
    Index(A, 1, 2),
    Slice(A, 0, 1, 3),
    Stack((A, B), 1),
    Concat((A, Slice(B, 0, 0, 2), A), 0),
    Transpose(Stack((B, A), 2), (2, 0, 1)),
    Reshape(Index(A, 0, 3), (2, 4)),
    Scale(Concat((B, A), 1), -0.5),
    Slice(Repeat(Transpose(A, (1, 0)), 0, 3), 0, 4, 7),
]
VALUES: dict[Path, Any] = {
    ("a",): np.arange(32, dtype="float32").reshape(4, 8),
    ("b",): np.ones((4, 8), "float32"),
}


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_recipe_gives_what_numpy_gives_wherever_the_arrays_are(recipe: Recipe, mesh: Mesh) -> None:
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    expected = plans.evaluate(recipe, VALUES)

    host = evaluate(recipe, VALUES, np.dtype("float32"))
    sharded = evaluate(recipe, {path: jax.device_put(x, rows) for path, x in VALUES.items()}, jnp.float32)

    assert isinstance(host, np.ndarray)
    assert sharded.sharding.device_set == rows.device_set
    np.testing.assert_array_equal(host, expected)
    np.testing.assert_array_equal(sharded, expected)


@pytest.mark.parametrize("in_force", [False, True], ids=["", "mesh in force"])
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_arrays_on_a_mesh_of_explicit_axes_are_cut_and_joined_like_others(
    recipe: Recipe, in_force: bool
) -> None:
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    specs = {("a",): PartitionSpec("x", "y"), ("b",): PartitionSpec("y", "x")}
    values = {path: jax.device_put(x, NamedSharding(mesh, specs[path])) for path, x in VALUES.items()}

    with jax.set_mesh(mesh) if in_force else contextlib.nullcontext():
        made = evaluate(recipe, values, jnp.float32)
        twice = made * 2  # What a program goes on with is on its own mesh again.

    np.testing.assert_array_equal(twice, 2 * plans.evaluate(recipe, VALUES))
    assert made.sharding.mesh == mesh


@pytest.mark.parametrize("in_force", [False, True], ids=["", "mesh in force"])
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_traced_arrays_on_a_mesh_of_explicit_axes_are_cut_and_joined_like_others(
    recipe: Recipe, in_force: bool
) -> None:
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    specs = {("a",): PartitionSpec("x", "y"), ("b",): PartitionSpec("y", "x")}
    values = {path: jax.device_put(x, NamedSharding(mesh, specs[path])) for path, x in VALUES.items()}

    def run(a: Any, b: Any) -> Any:
        return 2 * evaluate(recipe, {("a",): a, ("b",): b}, jnp.float32)

    with jax.set_mesh(mesh) if in_force else contextlib.nullcontext():
        twice = jax.jit(run)(values["a",], values["b",])

    np.testing.assert_array_equal(twice, 2 * plans.evaluate(recipe, VALUES))
    assert twice.sharding.mesh == mesh


@pytest.mark.parametrize("of", [np.asarray, jnp.asarray], ids=["host", "device"])
def test_products_are_computed_in_the_wider_type_and_cast_last(of: Any) -> None:
    fractions: dict[Path, Any] = {("a",): of(np.array([0.25, 0.5], "float32"))}
    integers: dict[Path, Any] = {("a",): of(np.array([100_000], "int32"))}

    assert evaluate(Scale(A, 127.0), fractions, np.dtype("int8")).tolist() == [31, 63]
    assert evaluate(Scale(A, 1e-3), integers, np.dtype("float16")).tolist() == [100.0]


def test_a_part_that_is_stored_nowhere_is_zeros() -> None:
    stack = evaluate(Stack((A, Fill((4, 8))), 0), VALUES, np.dtype("float32"))

    np.testing.assert_array_equal(stack, [VALUES["a",], np.zeros((4, 8))])
