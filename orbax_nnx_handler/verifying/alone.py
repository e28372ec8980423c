"""One module of the target by itself: on recorded inputs, with weights made in one way or another."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from orbax_nnx_handler.planning.core import recipes
from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.core.recipes import (
    Add,
    Concat,
    Index,
    Recipe,
    Reshape,
    Scale,
    Stack,
    Transpose,
    shape_of,
    simplify,
)
from orbax_nnx_handler.storage.arithmetic import evaluate
from orbax_nnx_handler.storage.checkpoint.metadata import Checkpoint
from orbax_nnx_handler.storage.reading import read_values
from orbax_nnx_handler.verifying.comparing import ROUNDING, distance
from orbax_nnx_handler.verifying.recording import Array, Call, Held


def layer_of(recipe: Recipe, axis: int, layer: int, shapes: recipes.Shapes) -> Recipe:
    """Returns the recipe of one element of a leaf along an axis."""
    match recipe:
        case Stack(sources, at) if at == axis:
            return sources[layer]
        case Stack(sources, at):
            inner = axis - (at < axis)
            parts = tuple(layer_of(source, inner, layer, shapes) for source in sources)
            return Stack(parts, at - (axis < at))
        case Transpose(source, permutation):
            inner = permutation[axis]
            rest = tuple(at - (at > inner) for at in permutation if at != inner)
            return Transpose(layer_of(source, inner, layer, shapes), rest)
        case Reshape(source, shape) if axis == 0 and shape_of(source, shapes)[:1] == shape[:1]:
            return Reshape(layer_of(source, 0, layer, shapes), shape[1:])
        case Concat(sources, at) if at != axis:
            parts = tuple(layer_of(source, axis, layer, shapes) for source in sources)
            return Concat(parts, at - (axis < at))
        case Scale(source, factor):
            return Scale(layer_of(source, axis, layer, shapes), factor)
        case Add(source, constant):
            return Add(layer_of(source, axis, layer, shapes), constant)
        case _:
            return Index(recipe, axis, layer)


def scanned_axes(calls: Mapping[Path, Sequence[Call]], wanted: Mapping[Path, Shape]) -> dict[Path, int]:
    """Returns the axis of each leaf that the module did not see when it was called."""
    axes: dict[Path, int] = {}
    for module, found in calls.items():
        for name, seen in found[0].shapes.items():
            whole = wanted.get((*module, name))
            if whole is not None and len(whole) == len(seen) + 1:
                fits = [axis for axis in range(len(whole)) if (*whole[:axis], *whole[axis + 1 :]) == seen]
                axes |= {(*module, name): fits[0]} if fits else {}
    return axes


@dataclasses.dataclass(kw_only=True)
class Workbench:
    """Runs modules of a restored model by themselves.

    Attributes:
        model: The restored target.
        checkpoint: Where other weights are read from.
        recipes: How each leaf of the model is made.
        axes: The scanned axis of each leaf that has one.
        calls: The calls of the NNX program, by module.
        values: The stored arrays that were read so far.
    """

    model: Any
    checkpoint: Checkpoint
    recipes: Mapping[Path, Recipe]
    axes: Mapping[Path, int]
    calls: Mapping[Path, Sequence[Call]]
    values: dict[Path, Array] = dataclasses.field(default_factory=dict[Path, Array])

    @functools.cached_property
    def shapes(self) -> dict[Path, Shape]:
        """The shapes of the stored leaves."""
        return {path: leaf.shape for path, leaf in self.checkpoint.leaves.items()}

    def recipe(self, leaf: Path, layer: int | None) -> Recipe:
        """Returns how one layer of a leaf is made, or the whole leaf where it is not scanned."""
        recipe, axis = self.recipes[leaf], self.axes.get(leaf)
        if layer is None or axis is None:
            return recipe
        return simplify(layer_of(recipe, axis, layer, self.shapes), self.shapes)

    def layer_at(self, module: Path, call: Call) -> int | None:
        """Returns the layer that a call of a module belongs to; None where it is not scanned.

        Raises:
            LookupError: The calls do not come out.
        """
        count = self._count(module)
        if count is None:
            return None
        calls = self.calls[module]
        if len(calls) % count:
            raise LookupError(f"{len(calls)} calls of {count} layers")
        return [one is call for one in calls].index(True) // (len(calls) // count)

    def layers(self, module: Path, near: int | None) -> list[int | None]:
        """Returns the layers of a module, those near a given one first; None where it is not scanned."""
        middle = near or 0
        count = self._count(module)
        if count is None:
            return [None]
        found: list[int | None] = []
        for away in range(count):
            found += [at for at in dict.fromkeys((middle - away, middle + away)) if 0 <= at < count]
        return found

    def _count(self, module: Path) -> int | None:
        """Returns how many layers a scan around a module has."""
        leaf = next((leaf for leaf in self.axes if leaf[: len(module)] == module), None)
        if leaf is None or any(
            self.axes.get(other) is None for other in self.recipes if other[: len(module)] == module
        ):
            return None
        return shape_of(self.recipes[leaf], self.shapes)[self.axes[leaf]]

    def value(self, recipe: Recipe) -> jax.Array:
        """Returns what a recipe gives, in float32."""
        missing = [path for path in recipes.reads(recipe) if path not in self.values]
        if missing:
            self.values |= read_values(self.checkpoint, dict.fromkeys(missing))
        return jnp.asarray(evaluate(recipe, self.values, np.float32))

    def run(
        self,
        module: Path,
        layer: int | None,
        call: Call,
        inputs: Sequence[Any],
        changed: Mapping[Path, Recipe],
    ) -> list[Array]:
        """Calls a module by itself.

        Args:
            module: Keys to the module.
            layer: The layer, where it is scanned.
            call: The recorded call, whose other arguments are taken.
            inputs: The arrays among its arguments.
            changed: Leaves that are made in another way, with the recipe of the layer.

        Returns:
            The arrays that it returns.
        """
        made = self._module(module, layer, {leaf: self.value(recipe) for leaf, recipe in changed.items()})
        held = [jnp.asarray(array) for array in inputs]

        def put_back(leaf: Any) -> Any:
            return held[leaf.number] if isinstance(leaf, Held) else leaf

        args, kwargs = cast(
            "tuple[Any, Any]",
            jax.tree.map(put_back, call.arguments, is_leaf=lambda leaf: isinstance(leaf, Held | nnx.Pytree)),
        )
        with jax.disable_jit(), jax.default_matmul_precision("highest"):
            result = made(*args, **kwargs)
        return [np.asarray(leaf) for leaf in jax.tree.leaves(result) if isinstance(leaf, jax.Array)]

    def _module(self, path: Path, layer: int | None, values: Mapping[Path, jax.Array]) -> Any:
        node = self.model
        for key in path:
            node = getattr(node, key) if isinstance(key, str) and hasattr(node, key) else node[key]
        graphdef, state = cast("tuple[Any, Any]", nnx.split(node))
        flat: list[tuple[Any, Any]] = []
        for keys, variable in cast("Iterable[tuple[Path, Any]]", nnx.to_flat_state(state)):
            leaf = (*path, *keys)
            value: Any = values.get(leaf)
            if value is None:
                value = variable.get_raw_value() if hasattr(variable, "get_raw_value") else variable
                axis = self.axes.get(leaf, None if leaf in self.recipes else 0)
                if layer is not None and axis is not None and np.ndim(value) > axis:
                    value = value[(*[slice(None)] * axis, layer)]
            flat.append((keys, variable.replace(value) if hasattr(variable, "replace") else value))
        return nnx.merge(graphdef, nnx.from_flat_state(flat))


def lent(own: Sequence[Array], reference: Sequence[Array]) -> list[Array]:
    """Returns a call's inputs with Linen's numbers, where they are the same ones but for their digits."""
    lent: list[Array] = []
    for array in own:
        near = [
            other
            for other in reference
            if other.size == array.size and other.dtype.kind == array.dtype.kind == "f"
        ]
        nearest = min(near, key=lambda other: distance(other, array)[0], default=None)
        close = nearest is not None and distance(nearest, array)[0] <= ROUNDING * 1000
        lent.append(
            nearest.reshape(array.shape).astype(array.dtype) if nearest is not None and close else array
        )
    return lent
