"""Any arrangement of a layer group becomes any other, weights and moments, or is refused."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from orbax_nnx_handler.planning.core.errors import AmbiguousMappingError
from orbax_nnx_handler.planning.core.leaves import StoredLeaf
from orbax_nnx_handler.planning.options import RestoreOptions
from orbax_nnx_handler.planning.restore_plan import RestorePlan, make_plan
from orbax_nnx_handler.planning.target import flatten_target
from tests.planning.plans import evaluate

Array = np.ndarray[Any, Any]
Flat = dict[tuple[str, ...], Array]

# Two kinds of layer, as in a mixture of experts: some weights exist in some layers only.
# No size is a number of layers that is tried: what such a leaf leaves open, others may not settle.
SHARED = {("attention", "kernel"): (13, 15), ("norm", "scale"): (17,)}
BY_TURNS = {("mlp", "kernel"): (13, 14), ("moe", "kernel"): (12, 13, 14)}


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """How a program writes the layers: flat, stacked, or blocks of `size` and a remainder."""

    form: str
    axis: int = 0
    size: int = 2
    inner: str = "layers"

    def write(self, layers: list[Flat], group: str) -> Flat:
        """Returns the leaves of a group of layers under this arrangement."""
        if self.form == "flat":
            return {(f"{group}_{n}", *rest): v for n, layer in enumerate(layers) for rest, v in layer.items()}
        if self.form == "list":
            return {(group, str(n), *rest): v for n, layer in enumerate(layers) for rest, v in layer.items()}
        if self.form == "stacked":
            return {(group, *rest): self._stack([layer[rest] for layer in layers]) for rest in layers[0]}
        cycles = len(layers) // self.size
        written: Flat = {}
        for position in range(self.size):
            block = [layers[cycle * self.size + position] for cycle in range(cycles)]
            for rest in block[0]:
                written[group, f"{self.inner}_{position}", *rest] = self._stack(
                    [layer[rest] for layer in block]
                )
        for position, layer in enumerate(layers[cycles * self.size :]):
            for rest, value in layer.items():
                written[f"{group}_remainder", f"{self.inner}_{position}", *rest] = value
        return written

    def _stack(self, values: list[Array]) -> Array:
        return np.stack(values, axis=self.axis)


FORMS = ["flat", "list", "stacked", "blocks"]


def _layers(count: int, *, mixed: bool, period: int) -> list[Flat]:
    rng = np.random.default_rng(count)
    made: list[Flat] = []
    for number in range(count):
        shapes = dict(SHARED)
        if mixed:
            rest = list(BY_TURNS)[0 if number % period else 1]
            shapes[rest] = BY_TURNS[rest]
        made.append({rest: rng.normal(size=shape).astype(np.float32) for rest, shape in shapes.items()})
    return made


def _plan(stored: Flat, wanted: Flat) -> tuple[RestorePlan, Flat]:
    def nested(prefix: tuple[str, ...]) -> Flat:
        # Moments are the weights plus one, so that a swap of the two would be seen.
        return {(*prefix, *path): value + (prefix != ("params", "decoder")) for path, value in stored.items()}

    disk = nested(("params", "decoder")) | nested(("opt_state", "0", "mu", "decoder"))
    leaves = {path: StoredLeaf(path=path, shape=v.shape, dtype=v.dtype) for path, v in disk.items()}
    flat = [(("model", "decoder", *path), nnx.Param(_abstract(value))) for path, value in wanted.items()]
    moments = [
        (("opt", "opt_state", 0, "mu", "decoder", *path), nnx.optimizer.OptVariable(_abstract(value)))
        for path, value in wanted.items()
    ]
    target = flatten_target(nnx.from_flat_state([*flat, *moments]))
    return make_plan(target, leaves, RestoreOptions()), disk


def _abstract(value: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(value.shape, jnp.float32)


def _assert_exact(plan: RestorePlan, disk: Flat, wanted: Flat) -> None:
    plan.check()
    assert not plan.unexpected
    for path, value in wanted.items():
        weight = plan.restored["model", "decoder", *path]
        np.testing.assert_array_equal(evaluate(weight.recipe, disk), value)
        moment = plan.restored["opt", "opt_state", 0, "mu", "decoder", *path]
        np.testing.assert_array_equal(evaluate(moment.recipe, disk), value + 1)


@given(
    stored=st.sampled_from(FORMS),
    wanted=st.sampled_from(FORMS),
    stored_axis=st.integers(0, 1),
    wanted_axis=st.integers(0, 1),
    stored_size=st.integers(2, 3),
    wanted_size=st.integers(2, 3),
    inner=st.sampled_from(["layers", "layer", "block"]),
    count=st.integers(6, 11),
)
def test_every_arrangement_becomes_every_other(
    stored: str,
    wanted: str,
    stored_axis: int,
    wanted_axis: int,
    stored_size: int,
    wanted_size: int,
    inner: str,
    count: int,
) -> None:
    layers = _layers(count, mixed=False, period=1)
    left = Arrangement(stored, stored_axis, stored_size, inner).write(layers, "layers")
    right = Arrangement(wanted, wanted_axis, wanted_size, inner).write(layers, "layers")

    plan, disk = _plan(left, right)

    stacks = {"stacked", "blocks"}
    if not plan.fits and {stored, wanted} <= stacks:
        return  # Two stacks may share the path and differ in the axis alone: a shape, not a rearrangement.
    _assert_exact(plan, disk, right)


@given(
    stored=st.sampled_from(["flat", "list", "blocks"]),
    wanted=st.sampled_from(["flat", "list", "blocks"]),
    axis=st.integers(0, 1),
    cycles=st.integers(1, 3),
    left_over=st.integers(0, 2),
)
def test_layers_of_two_kinds_keep_to_their_turns(
    stored: str, wanted: str, axis: int, cycles: int, left_over: int
) -> None:
    layers = _layers(3 * cycles + left_over, mixed=True, period=3)
    left = Arrangement(stored, axis, 3).write(layers, "layers")
    right = Arrangement(wanted, axis, 3).write(layers, "layers")

    plan, disk = _plan(left, right)

    _assert_exact(plan, disk, right)


@pytest.mark.parametrize(("stored", "wanted"), [("stacked", "flat"), ("flat", "stacked")])
def test_two_groups_in_one_model_are_kept_apart(stored: str, wanted: str) -> None:
    dense, moe = _layers(2, mixed=False, period=1), _layers(5, mixed=False, period=1)
    left = Arrangement(stored, 1).write(dense, "dense_layers") | Arrangement(stored, 1).write(
        moe, "moe_layers"
    )
    right = Arrangement(wanted, 1).write(dense, "dense_layers") | Arrangement(wanted, 1).write(
        moe, "moe_layers"
    )

    plan, disk = _plan(left, right)

    _assert_exact(plan, disk, right)


@pytest.mark.parametrize("wanted", ["flat", "list"])
def test_an_axis_that_shapes_leave_open_is_ambiguous(wanted: str) -> None:
    layers: list[Flat] = [{("kernel",): np.full((4, 4), float(n), np.float32)} for n in range(4)]
    left = Arrangement("stacked", 1).write(layers, "layers")
    right = Arrangement(wanted).write(layers, "layers")

    plan, _ = _plan(left, right)

    with pytest.raises(AmbiguousMappingError, match="axis 0 or 1 or 2"):
        plan.check()


@pytest.mark.parametrize("lost", ["layers_0", "layers_1", "layers_2"])
def test_blocks_with_a_lost_position_are_never_renumbered(lost: str) -> None:
    layers = _layers(8, mixed=False, period=1)
    left = Arrangement("blocks", 1, 3).write(layers, "layers")
    left = {path: value for path, value in left.items() if path[:2] != ("layers", lost)}
    right = Arrangement("flat").write(layers, "layers")

    plan, disk = _plan(left, right)

    assert not plan.fits
    for path, item in plan.restored.items():
        value = right[path[2:]] if path[0] == "model" else right[path[5:]] + 1
        np.testing.assert_array_equal(evaluate(item.recipe, disk), value)
