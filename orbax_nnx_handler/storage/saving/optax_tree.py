"""Optimizer state in the containers in which a Linen program stores it.

On disk a tuple of optax is a list, a named tuple a dict, an empty state None
(`orbax.checkpoint`'s tree metadata). An `nnx.Optimizer` keeps optax's own
containers; an `nnx.State` keeps an int-keyed mapping without the empty states.
"""

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Set
from typing import Any, Protocol, cast

import jax
from flax import nnx

from orbax_nnx_handler.planning.core.containers import linen_path
from orbax_nnx_handler.planning.core.paths import Path, canonical, render
from orbax_nnx_handler.planning.target.nodes import children, flatten
from orbax_nnx_handler.storage.saving.item import Leaf, Leaves

# Named-tuple fields of optax under which another optimizer's state lies.
_NESTING = frozenset({"opt_state", "inner_state", "inner_opt_state", "inner_states"})


class Transformation(Protocol):
    """An `optax.GradientTransformation`, as far as it is needed here."""

    @property
    def init(self) -> Callable[[Any], Any]:
        """Returns the initial state for a tree of parameters."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptaxTree:
    """Says where each leaf of one optimizer's state is stored.

    Attributes:
        parameters: Canonical paths of the model's leaves; empty where the item has
            no model.
        level: The collection's level above a tree like the parameters, if any.
    """

    parameters: Set[tuple[str, ...]]
    level: Path = ()

    def places(self, node: Any, at: Path, path: Path) -> Iterator[tuple[Path, Leaf]]:
        """Yields the stored path of each leaf and each empty node.

        Args:
            node: A part of the optimizer's state.
            at: Where it is stored.
            path: Its path in the item.
        """
        value = cast(Any, node).get_raw_value() if isinstance(node, nnx.Variable) else node
        entries = children(value)
        if not entries:
            yield at, Leaf(path, node)
        elif isinstance(value, Mapping) and self._mirrors_parameters(flatten(value), path[-1]):
            for below, leaf in flatten(value).items():
                yield (*at, *self.level, *linen_path(below)), Leaf((*path, *below), leaf)
        else:
            # A named tuple's fields without a leaf (`MultiSteps.skip_state`) are stored too, as empty.
            listed = _is_sequence(value, [name for name, _ in entries])
            for name, child in entries:
                yield from self.places(child, (*at, name if listed else str(name)), (*path, name))

    def _mirrors_parameters(self, leaves: Mapping[Path, Any], key: Hashable) -> bool:
        if self.parameters:
            return bool(leaves) and all(canonical(path) in self.parameters for path in leaves)
        # Without the model, Flax's own mark of a moment tells: it is made from a Variable.
        named = isinstance(key, str) and key not in _NESTING
        return named and bool(leaves) and all(isinstance(leaf, nnx.OptVariable) for leaf in leaves.values())


def _is_sequence(node: Any, names: Iterable[Hashable]) -> bool:
    if hasattr(node, "_fields"):
        return False
    return isinstance(node, tuple | list) or all(isinstance(name, int) for name in names)


def keeps_containers(opt_state: Any) -> bool:
    """Tells whether optax's own containers are left, with the empty states among them."""
    return not isinstance(opt_state, Mapping)


def with_containers(opt_state: Any, tx: Transformation, model: Leaves) -> Any:
    """Puts the leaves of an optimizer state into optax's own containers.

    Args:
        opt_state: The state, maybe as an `nnx.State` keeps it.
        tx: The transformation whose state it is.
        model: The leaves of the model that it was made for.

    Raises:
        ValueError: The state is not one of this transformation; lists what differs.
    """
    leaves = flatten(opt_state)
    parameters = cast(Any, nnx.from_flat_state(cast(Any, _trained(model, leaves))))
    template: Any = jax.eval_shape(tx.init, parameters)
    expected = flatten(template)
    strange = [path for path in leaves if path not in expected]
    absent = [
        path for path, node in expected.items() if path not in leaves and Leaf(path, node).value is not None
    ]
    if strange or absent:
        raise ValueError(_misfit(strange, absent))
    filled = iter([leaves.get(path, leaf) for path, leaf in expected.items()])

    def fill(_: Any) -> Any:
        return next(filled)

    return jax.tree.map(fill, template, is_leaf=lambda node: isinstance(node, nnx.Variable))


def _trained(model: Leaves, moments: Mapping[Path, Any]) -> Mapping[Path, Any]:
    """Returns the parameters that an optimizer was built for: those with a moment, else all."""
    ends = {canonical(path)[at:] for path in moments for at in range(len(path))}
    trained = {path: leaf.node for path, leaf in model.items() if canonical(path) in ends}
    return trained or {
        path: leaf.node for path, leaf in model.items() if issubclass(type(leaf.node), nnx.Param)
    }


def _misfit(strange: list[Path], absent: list[Path]) -> str:
    lines = [f"  {render(path)}: in the item, not in tx's state" for path in strange]
    lines += [f"  {render(path)}: in tx's state, not in the item" for path in absent]
    return "\n".join(["tx is not the transformation of this optimizer state:", *lines])
