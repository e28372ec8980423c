"""Models of unlike layers, as MaxText writes them: one by one, or scanned in blocks of them."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from orbax_nnx_handler.planning.core.leaves import StoredLeaf
from orbax_nnx_handler.planning.options import RestoreOptions
from orbax_nnx_handler.planning.restore_plan import RestorePlan, make_plan
from orbax_nnx_handler.planning.target import flatten_target
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
        left_over: Where the layers after the last cycle go: `modules` (which Linen numbers), or a
            module of their own that holds them in a `scan` or under `numbers`.
        prefix: Layers before the scan, under their own numbers.
        name: The scan's name.
    """

    axis: int = 1
    local: int = 2
    members: Literal["named", "numbered"] = "named"
    left_over: Literal["modules", "scan", "numbers"] = "scan"
    prefix: int = 0
    name: str = "scanned_blocks"

    def write(self, layers: list[Flat]) -> Flat:
        """Returns the leaves of some layers."""
        size = self.local + 1
        scanned = layers[self.prefix :]
        cycles = [scanned[at : at + size] for at in range(0, len(scanned) - size + 1, size)]
        rest = scanned[len(cycles) * size :]
        written = one_by_one(layers[: self.prefix])
        if cycles:
            written |= self._cycles(cycles)
        return written | self._left_over(rest)

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

    def _left_over(self, rest: list[Flat]) -> Flat:
        if rest and self.left_over == "scan":
            return {("layers_remainder", "local_layers", *p): v for p, v in self._stack(rest).items()}
        if self.left_over == "numbers":
            return {("layers_remainder", *path): value for path, value in one_by_one(rest).items()}
        return {
            (f"Gemma4DecoderLayerToLinen_{at}", *path): value
            for at, layer in enumerate(rest)
            for path, value in layer.items()
        }

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
    """Returns a model of those layers, with what lies around them in every MaxText model."""
    around = {
        ("token_embedder", "embedding"): np.arange(11, dtype=np.float32),
        ("decoder", "decoder_norm", "scale"): np.arange(20, 33, dtype=np.float32),
    }
    return around | {("decoder", *path): value for path, value in layers.items()}


def plan_of(
    stored_layers: Flat, wanted_layers: Flat, variables: tuple[str, ...] = ("params",), **options: Any
) -> tuple[RestorePlan, Flat]:
    """Returns the plan of a model and its moments, and what is on disk.

    Args:
        stored_layers: The stored layers.
        wanted_layers: The wanted layers.
        variables: Keys above the weights in a field of the train state: MaxText's, or none.
        **options: Options of the restore.
    """
    stored, wanted = model_with(stored_layers), model_with(wanted_layers)
    moment = ("opt_state", "0", "mu", *variables)
    disk: Flat = {("params", *variables, *path): value for path, value in stored.items()}
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
