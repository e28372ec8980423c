"""Layers whose scan has a name of its own: joined by order and shape, or refused."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from orbax_nnx_handler import ScanAxis, UnstackLayers
from orbax_nnx_handler.planning.core.errors import AmbiguousMappingError, MissingParamError
from orbax_nnx_handler.planning.core.leaves import StoredLeaf
from orbax_nnx_handler.planning.options import RestoreOptions
from orbax_nnx_handler.planning.plan import RestorePlan, make_plan
from orbax_nnx_handler.planning.target.target import flatten_target
from tests.planning.plans import evaluate

Array = np.ndarray[Any, Any]
Flat = dict[tuple[str, ...], Array]

LOCAL = {("attention", "query"): (3, 4), ("attention", "value"): (3, 2), ("norm", "scale"): (7,)}
GLOBAL = {("attention", "query"): (3, 6), ("norm", "scale"): (7,)}


def stack_of(count: int, *, local: int, prefix: int = 0, unlike: bool = True) -> list[Flat]:
    """Returns layers: some local ones at first, then by turns `local` local ones and one global one."""
    rng = np.random.default_rng(count)
    layers: list[Flat] = []
    for number in range(count):
        is_global = number >= prefix and (number - prefix) % (local + 1) == local
        shapes = GLOBAL if is_global and unlike else LOCAL
        layers.append({rest: rng.normal(size=shape).astype(np.float32) for rest, shape in shapes.items()})
    return layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scan:
    """How a program writes its layers where it scans blocks of `local` local layers and one global one.

    Attributes:
        axis: The axis along which every scan stacks.
        local: Local layers in a block.
        members: `named`: two members called by what they are; `numbered`: one a position.
        left_over: Where the layers after the last cycle go: `class` (modules that Flax
            names), `remainder` (a module of their own) or `numbered` (the layers' own numbers).
        prefix: Layers before the scan, under their own numbers.
        name: The scan's name.
    """

    axis: int = 1
    local: int = 2
    members: str = "named"
    left_over: str = "remainder"
    prefix: int = 0
    name: str = "scanned_blocks"

    def write(self, layers: list[Flat]) -> Flat:
        size = self.local + 1
        scanned = layers[self.prefix :]
        cycles = [scanned[at : at + size] for at in range(0, len(scanned) - size + 1, size)]
        rest = scanned[len(cycles) * size :]
        written = one_by_one(layers[: self.prefix])
        if cycles:
            written |= self._cycles(cycles)
        return written | self._left_over(rest, len(layers) - len(rest))

    def _cycles(self, cycles: list[list[Flat]]) -> Flat:
        if self.members == "numbered":
            places = {f"layers_{at}": [cycle[at] for cycle in cycles] for at in range(self.local + 1)}
        else:
            inner = [self._stack(cycle[: self.local]) for cycle in cycles]
            places = {"global_layer": [cycle[self.local] for cycle in cycles], "local_layers": inner}
        return {
            (self.name, place, *path): value
            for place, parts in places.items()
            for path, value in self._stack(parts).items()
        }

    def _left_over(self, rest: list[Flat], before: int) -> Flat:
        if not rest:
            return {}
        if self.left_over == "remainder":
            return {("layers_remainder", "local_layers", *p): v for p, v in self._stack(rest).items()}
        if self.left_over == "numbered":
            return one_by_one(rest, before)
        return {(f"DecoderLayer_{at}", *p): v for at, layer in enumerate(rest) for p, v in layer.items()}

    def _stack(self, parts: list[Flat]) -> Flat:
        return {path: np.stack([part[path] for part in parts], axis=self.axis) for path in parts[0]}


def one_by_one(layers: list[Flat], first: int = 0) -> Flat:
    """Returns layers under their own numbers."""
    return {
        (f"layers_{number}", *path): value
        for number, layer in enumerate(layers, first)
        for path, value in layer.items()
    }


def model_with(layers: Flat) -> Flat:
    """Returns a model of those layers and of an embedding."""
    return {("embedder", "table"): np.arange(11, dtype=np.float32)} | {
        ("decoder", *path): value for path, value in layers.items()
    }


def plan_of(stored_layers: Flat, wanted_layers: Flat, **options: Any) -> tuple[RestorePlan, Flat]:
    """Returns the plan of a model and its moments in MaxText's layout, and what is on disk."""
    stored, wanted = model_with(stored_layers), model_with(wanted_layers)
    moment = ("opt_state", "0", "mu", "params")
    disk: Flat = {("params", "params", *path): value for path, value in stored.items()}
    # Moments are the weights plus one, so that a swap of the two would be seen.
    disk |= {(*moment, *path): value + 1 for path, value in stored.items()}
    leaves = {path: StoredLeaf(path=path, shape=v.shape, dtype=v.dtype) for path, v in disk.items()}
    flat: list[Any] = [(("model", *path), nnx.Param(_abstract(value))) for path, value in wanted.items()]
    flat += [
        (("optimizer", "opt_state", 0, "mu", *path), nnx.optimizer.OptVariable(_abstract(value)))
        for path, value in wanted.items()
    ]
    target = flatten_target(nnx.from_flat_state(flat))
    return make_plan(target, leaves, RestoreOptions.of(**options)), disk


def _abstract(value: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(value.shape, jnp.float32)


def assert_exact(plan: RestorePlan, disk: Flat, wanted: Flat) -> None:
    plan.check()
    assert not plan.unexpected
    for path, value in model_with(wanted).items():
        weight = plan.restored["model", *path]
        np.testing.assert_array_equal(evaluate(weight.recipe, disk), value)
        moment = plan.restored["optimizer", "opt_state", 0, "mu", *path]
        np.testing.assert_array_equal(evaluate(moment.recipe, disk), value + 1)


def assert_nothing_wrong(plan: RestorePlan, disk: Flat, wanted: Flat) -> None:
    """Whatever a plan that fails would have restored is at least the right value."""
    assert not plan.fits
    wanted = model_with(wanted)
    for path, item in plan.restored.items():
        value = wanted[path[1:]] if path[0] == "model" else wanted[path[4:]] + 1
        np.testing.assert_array_equal(evaluate(item.recipe, disk), value)


SCANS = st.builds(
    Scan,
    axis=st.integers(0, 1),
    local=st.just(0),
    left_over=st.sampled_from(["class", "remainder", "numbered"]),
    members=st.sampled_from(["named", "numbered"]),
)


@given(
    left=st.none() | SCANS,
    right=st.none() | SCANS,
    local=st.integers(1, 5),
    cycles=st.integers(1, 5),
    data=st.data(),
)
def test_a_scan_of_unlike_layers_becomes_single_layers_and_back(
    left: Scan | None, right: Scan | None, local: int, cycles: int, data: st.DataObject
) -> None:
    # As many left over as there are local layers in a block would read the same from behind.
    left_over = data.draw(st.integers(0, local - 1))
    prefix = data.draw(st.integers(0, 3))
    layers = stack_of(prefix + (local + 1) * cycles + left_over, local=local, prefix=prefix)
    sides = [
        one_by_one(layers)
        if scan is None
        else dataclasses.replace(scan, local=local, prefix=prefix).write(layers)
        for scan in (left, right)
    ]

    plan, disk = plan_of(*sides)

    if plan.fits or None in (left, right):
        assert_exact(plan, disk, sides[1])
    else:
        # Two scans that stack alike but name their members otherwise have no single layer to compare with.
        assert_nothing_wrong(plan, disk, sides[1])


def test_as_many_cycles_as_local_layers_are_told_apart_by_the_global_layers() -> None:
    layers = stack_of(30, local=5)
    left, right = Scan(local=5).write(layers), one_by_one(layers)

    plan, disk = plan_of(left, right)

    assert_exact(plan, disk, right)


def test_a_remainder_alone_is_the_whole_model() -> None:
    layers = stack_of(3, local=5)
    left = {
        ("layers_remainder", f"layers_{n}", *p): v for n, layer in enumerate(layers) for p, v in layer.items()
    }
    right = one_by_one(layers)

    for stored, wanted in [(left, right), (right, left)]:
        plan, disk = plan_of(stored, wanted)

        assert_exact(plan, disk, wanted)


def test_a_remainder_whose_cycles_are_lost_is_never_taken_for_the_first_layers() -> None:
    layers = stack_of(8, local=5)
    rest = {
        ("layers_remainder", f"layers_{n}", *p): v
        for n, layer in enumerate(layers[6:])
        for p, v in layer.items()
    }

    plan, _ = plan_of(rest, one_by_one(layers))

    assert {path[-1] for path in plan.restored} == {"table"}
    assert len(plan.missing) == 2 * len(one_by_one(layers))


@pytest.mark.parametrize(
    ("stored", "wanted"), [("scanned_blocks", "local_layers"), ("scanned_blocks", "global_layer")]
)
def test_a_lost_member_is_never_filled_from_another(stored: str, wanted: str) -> None:
    layers = stack_of(8, local=2)
    left = {path: value for path, value in Scan().write(layers).items() if path[:2] != (stored, wanted)}
    right = one_by_one(layers)

    plan, disk = plan_of(left, right)

    assert_nothing_wrong(plan, disk, right)


@pytest.mark.parametrize("lost", range(7))
def test_a_lost_layer_is_never_made_up_for_by_its_neighbours(lost: int) -> None:
    layers = stack_of(7, local=2)
    left = {path: value for path, value in one_by_one(layers).items() if path[0] != f"layers_{lost}"}
    right = Scan().write(layers)

    plan, disk = plan_of(left, right)

    assert_nothing_wrong(plan, disk, right)


def test_a_lost_weight_of_one_member_is_missing_in_its_layers_and_in_no_other() -> None:
    layers = stack_of(6, local=2)
    left = {
        path: v for path, v in Scan().write(layers).items() if path[1:] != ("local_layers", "norm", "scale")
    }
    right = one_by_one(layers)

    plan, disk = plan_of(left, right)

    assert_nothing_wrong(plan, disk, right)
    assert {path[2] for path in plan.missing if path[0] == "model"} == {f"layers_{n}" for n in (0, 1, 3, 4)}


@pytest.mark.parametrize(
    ("name", "renamed"),
    [("scanned_blocks", "blocks"), ("local_layers", "local_layers_old"), ("global_layer", "global")],
)
def test_a_renamed_scan_or_member_is_a_missing_weight(name: str, renamed: str) -> None:
    layers = stack_of(6, local=2)
    left = {
        tuple(renamed if key == name else key for key in path): value
        for path, value in Scan().write(layers).items()
    }
    right = one_by_one(layers)

    plan, _ = plan_of(left, right)

    assert {path[-1] for path in plan.restored} == {"table"}
    with pytest.raises(MissingParamError):
        plan.check()


AMBIGUOUS = """\
the layers of 'decoder' can follow each other in several orders: \
the shapes of its 12 wanted leaves fit each of them.
  layers
  scanned_blocks/global_layer
  scanned_blocks/local_layers
hint: renames=[...] decides: UnstackLayers takes a stack apart or StackLayers makes one, \
and a pair of names gives a
      layer its number.
checkpoint:"""


def test_members_of_one_shape_have_no_order() -> None:
    layers = stack_of(4, local=1, unlike=False)
    left, right = Scan(local=1).write(layers), one_by_one(layers)

    plan, _ = plan_of(left, right)

    with pytest.raises(AmbiguousMappingError) as raised:
        plan.check()
    assert str(raised.value).startswith(AMBIGUOUS)


def test_rules_give_members_of_one_shape_their_order() -> None:
    layers = stack_of(4, local=1, unlike=False)
    left, right = Scan(local=1).write(layers), one_by_one(layers)
    rules: list[Any] = [
        UnstackLayers("scanned_blocks/global_layer", "global_{i}", 1),
        UnstackLayers("scanned_blocks/local_layers", "cycle_{i}", 1),
        *(UnstackLayers(f"cycle_{at}", f"local_{at}_{{i}}", 1) for at in range(2)),
        *((f"local_{at}_0", f"layers_{2 * at}") for at in range(2)),
        *((f"global_{at}", f"layers_{2 * at + 1}") for at in range(2)),
    ]

    plan, disk = plan_of(left, right, renames=rules)

    assert_exact(plan, disk, right)


def test_layers_that_flax_named_may_lie_before_the_scan_or_behind_it() -> None:
    layers = stack_of(5, local=2)
    left, right = Scan(left_over="class").write(layers), one_by_one(layers)

    plan, _ = plan_of(left, right)

    with pytest.raises(AmbiguousMappingError, match="can follow each other in several orders"):
        plan.check()


def test_the_axis_of_the_cycles_can_be_said_where_shapes_leave_it_open() -> None:
    layers: list[Flat] = [{("kernel",): np.full((2, 2), float(n), np.float32)} for n in range(4)]
    left = Scan(local=1, members="numbered", axis=1).write(layers)
    right = one_by_one(layers)

    unclear, _ = plan_of(left, right)
    plan, disk = plan_of(left, right, renames=[ScanAxis("decoder/scanned_blocks", 1)])

    with pytest.raises(AmbiguousMappingError, match="can be stacked on axis 0 or 1 or 2"):
        unclear.check()
    assert_exact(plan, disk, right)
