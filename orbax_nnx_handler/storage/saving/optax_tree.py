"""Optimizer state in the containers in which a Linen program stores it.

On disk a tuple of optax is a list, a named tuple a dict, an empty state None
(`orbax.checkpoint`'s tree metadata). An `nnx.Optimizer` keeps optax's own
containers; an `nnx.State` keeps an int-keyed mapping without the empty states.
"""

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Set
from typing import Any, Protocol, cast

import jax
from flax import nnx

from orbax_nnx_handler.planning.core.containers import Nested, nest
from orbax_nnx_handler.planning.core.paths import Path, canonical, render
from orbax_nnx_handler.planning.target.train_state import Leaves, children, flatten

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
    """Writes one optimizer's state.

    Attributes:
        parameters: Canonical paths of the model's leaves; empty where the item has
            no model.
        wrap: Puts a tree like the parameters under its collection, if any.
    """

    parameters: Set[tuple[str, ...]]
    wrap: Callable[[Nested], Any]

    def write(self, node: Any, key: Hashable = "opt_state") -> Any:
        """Returns a node of an optimizer state as it is stored."""
        if isinstance(node, nnx.Variable):
            return self.write(cast(Any, node).get_raw_value(), key)
        entries = children(node)
        if entries is None:
            return node
        if not entries:
            return _empty(node)
        if isinstance(node, Mapping) and self._mirrors_parameters(cast(Mapping[Hashable, Any], node), key):
            return self.wrap(nest((path, _value(leaf)) for path, leaf in flatten(node).items()))
        written = {name: self.write(child, name) for name, child in entries}
        if _is_sequence(node, written):
            return [written.get(at) for at in range(max(cast(int, name) for name in written) + 1)]
        # A named tuple's fields without a leaf (`MultiSteps.skip_state`) are stored as empty, not left out.
        return {str(name): value for name, value in written.items()}

    def _mirrors_parameters(self, node: Mapping[Hashable, Any], key: Hashable) -> bool:
        leaves = flatten(node)
        if self.parameters:
            return bool(leaves) and all(canonical(path) in self.parameters for path in leaves)
        # Without the model, Flax's own mark of a moment tells: it is made from a Variable.
        named = isinstance(key, str) and key not in _NESTING
        return named and bool(leaves) and all(isinstance(leaf, nnx.OptVariable) for leaf in leaves.values())


def _value(leaf: Any) -> Any:
    value = cast(Any, leaf).get_raw_value() if isinstance(leaf, nnx.Variable) else leaf
    # `optax.MaskedNode`: a parameter that this optimizer leaves alone.
    return None if children(value) == [] else value


def _empty(node: Any) -> Any:
    if node is None or hasattr(node, "_fields"):
        return None
    return {} if isinstance(node, Mapping) else ()


def _is_sequence(node: Any, written: Mapping[Hashable, Any]) -> bool:
    if hasattr(node, "_fields"):
        return False
    return isinstance(node, tuple | list) or all(isinstance(name, int) for name in written)


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
    absent = [path for path, leaf in expected.items() if path not in leaves and _value(leaf) is not None]
    if strange or absent:
        raise ValueError(_misfit(strange, absent))
    filled = iter([leaves.get(path, leaf) for path, leaf in expected.items()])

    def fill(_: Any) -> Any:
        return next(filled)

    return jax.tree.map(fill, template, is_leaf=lambda node: isinstance(node, nnx.Variable))


def _trained(model: Leaves, moments: Leaves) -> Leaves:
    """Returns the parameters that an optimizer was built for: those with a moment, else all."""
    ends = {canonical(path)[at:] for path in moments for at in range(len(path))}
    trained = {path: leaf for path, leaf in model.items() if canonical(path) in ends}
    return trained or {path: leaf for path, leaf in model.items() if issubclass(type(leaf), nnx.Param)}


def _misfit(strange: list[Path], absent: list[Path]) -> str:
    lines = [f"  {render(path)}: in the item, not in tx's state" for path in strange]
    lines += [f"  {render(path)}: in tx's state, not in the item" for path in absent]
    return "\n".join(["tx is not the transformation of this optimizer state:", *lines])
