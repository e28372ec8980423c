"""Where a Linen program would have stored each leaf of an NNX item: names alone, no value is touched.

On disk a tuple of optax is a list, a named tuple a dict, an empty state None
(`orbax.checkpoint`'s tree metadata). An `nnx.Optimizer` keeps optax's own
containers; an `nnx.State` keeps an int-keyed mapping without the empty states.
"""

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Set
from typing import Any, Literal, Protocol, cast

import jax
from flax import nnx

from orbax_nnx_handler.planning.core.errors import RestoreError
from orbax_nnx_handler.planning.core.leaves import optimizer_owners, owner_of
from orbax_nnx_handler.planning.core.paths import Path, canonical, is_empty, linen_path, render, segments
from orbax_nnx_handler.planning.layouts.linen import AUX
from orbax_nnx_handler.planning.mapping.cells_and_wrappers import in_linen_wrappers, is_scale
from orbax_nnx_handler.planning.target import children, flatten, holds_nnx
from orbax_nnx_handler.planning.target.roles import collection_of
from orbax_nnx_handler.storage.saving.item import ItemLeaf, ItemLeaves, Parts, is_count, is_weight, take_apart

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

    def places(self, node: Any, at: Path, path: Path) -> Iterator[tuple[Path, ItemLeaf]]:
        """Yields the stored path of each leaf and each empty node."""
        value = cast(Any, node).get_raw_value() if isinstance(node, nnx.Variable) else node
        entries = children(value)
        if not entries:
            yield at, ItemLeaf(path, node)
        elif isinstance(value, Mapping) and self._mirrors_parameters(flatten(value), path[-1]):
            for below, leaf in flatten(value).items():
                yield (*at, *self.level, *linen_path(below)), ItemLeaf((*path, *below), leaf)
        else:
            # A named tuple's fields without a leaf (`MultiSteps.skip_state`) are stored too, as empty.
            listed = _is_sequence(value, [name for name, _ in entries])
            for name, child in entries:
                yield from self.places(child, (*at, name if listed else str(name)), (*path, name))

    def _mirrors_parameters(self, leaves: Mapping[Path, Any], key: Hashable) -> bool:
        if self.parameters:
            named = all(canonical(path) in self.parameters for path in leaves)
            return bool(leaves) and named and not any(map(is_count, leaves.values()))
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


def with_containers(opt_state: Any, tx: Transformation, model: ItemLeaves) -> Any:
    """Puts the leaves of an optimizer state into optax's own containers.

    Raises:
        ValueError: The state is not one of this transformation; lists what differs.
    """
    leaves = flatten(opt_state)
    parameters = cast(Any, nnx.from_flat_state(cast(Any, _trained(model, leaves))))
    template: Any = jax.eval_shape(tx.init, parameters)
    expected = flatten(template)
    strange = [path for path in leaves if path not in expected]
    absent = [
        path
        for path, node in expected.items()
        if path not in leaves and ItemLeaf(path, node).value is not None
    ]
    if strange or absent:
        raise ValueError(_misfit(strange, absent))
    filled = iter([leaves.get(path, leaf) for path, leaf in expected.items()])

    def fill(_: Any) -> Any:
        return next(filled)

    return jax.tree.map(fill, template, is_leaf=lambda node: isinstance(node, nnx.Variable))


def _trained(model: ItemLeaves, moments: Mapping[Path, Any]) -> Mapping[Path, Any]:
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


Flavour = Literal["linen", "maxtext"]

# Fields of a train state: a collection of that name cannot be told from them.
_FIELDS = frozenset({"opt_state", "step", AUX})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arranged:
    """An item as a Linen program stores it.

    Attributes:
        leaves: The leaves by stored path.
        empty: Nodes that hold nothing, such as the empty states of an optax chain, by stored path.
        random: Random state that a Linen program would not store and whose
            structure check it would fail, by path below `nnx_aux`; empty where it is
            stored in the tree, for MaxText and where there is nothing else.
        certain: Whether the optimizers' empty states are known, and with them the
            lengths of their lists. A bare `nnx.State` does not tell.
        steps: The paths in the item of the steps of the train states.
        several: Whether the item holds several train states.
        aside: The leaves that keep their own names under `nnx_aux`, by stored path.
        moments: The leaves of optimizer states, by stored path.
    """

    leaves: ItemLeaves
    empty: Mapping[Path, Any]
    random: ItemLeaves
    certain: bool
    steps: frozenset[Path]
    several: bool
    aside: frozenset[Path]
    moments: frozenset[Path]


def is_nnx(item: Any) -> bool:
    """Tells whether an item holds NNX state; anything else is stored as it is."""
    return holds_nnx(item)


def arrange(item: Any, flavour: Flavour = "linen", tx: Transformation | None = None) -> Arranged:
    """Says where each leaf of an item is stored.

    Caches and intermediates are left out: the program computes them again.

    Args:
        item: An `nnx.State`, `nnx.Module`, `nnx.Optimizer`, or a tuple or dict of
            these.
        flavour: `linen`: a Flax `TrainState`, or a variables dict where there is no
            optimizer. `maxtext`: MaxText's train state.
        tx: The optimizer's transformation. Needed for the empty states of a bare
            `nnx.State`; modules carry theirs.

    Raises:
        ValueError: See `take_apart`; two leaves of it would be stored at one path, or `tx` does not fit.
    """
    if not is_nnx(item):
        return _as_it_is(item)
    states = [_with_containers(parts, tx) for parts in take_apart(item)]
    several = len(states) > 1 or any(parts.root for parts in states)
    places = [place for parts in states for place in _places(parts, flavour, several)]
    placed = dict(_without_collisions(places))
    random = {at: leaf for at, leaf in placed.items() if at[0] == AUX and is_stream(leaf)}
    if flavour == "maxtext" or len(random) == len(placed):
        # MaxText keeps random state in the tree; and a tree without a leaf is none to Orbax.
        random = {}
    kept = {at: leaf for at, leaf in placed.items() if at not in random}
    values = {at: leaf.value for at, leaf in kept.items()}
    above = {(), *(segments(root) for parts in states for root in (parts.root, parts.parent))}
    return Arranged(
        leaves={at: leaf for at, leaf in kept.items() if not is_empty(values[at])},
        empty={at: value for at, value in values.items() if is_empty(value)},
        random={at[1:]: leaf for at, leaf in random.items()},
        certain=all(parts.opt_state is None or keeps_containers(parts.opt_state) for parts in states),
        steps=frozenset(parts.step.path for parts in states if parts.step is not None),
        several=several,
        aside=_below(kept, above, AUX),
        moments=_below(kept, above, "opt_state"),
    )


def _as_it_is(item: Any) -> Arranged:
    """Says where each leaf of an item without NNX state is stored: at its own path."""
    leaves = {path: ItemLeaf(path, node) for path, node in flatten(item).items()}
    optimizers = optimizer_owners(leaves)
    return Arranged(
        leaves={at: leaf for at, leaf in leaves.items() if not is_empty(leaf.value)},
        empty={at: leaf.value for at, leaf in leaves.items() if is_empty(leaf.value)},
        random={},
        certain=True,
        steps=frozenset(),
        several=False,
        aside=frozenset(),
        moments=frozenset(path for path in leaves if owner_of(path, optimizers) is not None),
    )


def _below(paths: Iterable[Path], above: Iterable[Path], field: str) -> frozenset[Path]:
    """Returns the paths that lie in a field of one of some owners."""
    fields = {(*owner, field) for owner in above}
    depths = {len(at) for at in fields}
    return frozenset(at for at in paths if field in at and any(at[:depth] in fields for depth in depths))


def is_stream(leaf: ItemLeaf) -> bool:
    """Tells whether a leaf is random state."""
    return isinstance(leaf.node, nnx.RngState)


def _with_containers(parts: Parts, tx: Transformation | None) -> Parts:
    if tx is None or parts.opt_state is None:
        return parts
    return dataclasses.replace(parts, opt_state=with_containers(parts.opt_state, tx, parts.parameters))


def _places(parts: Parts, flavour: Flavour, several: bool) -> Iterator[tuple[Path, ItemLeaf]]:
    if not any(isinstance(leaf.node, nnx.Param) for leaf in parts.parameters.values()):
        flavour = "linen"  # Without a parameter there is nothing to tell MaxText's layout by.
    model = (_maxtext_model if flavour == "maxtext" else _linen_model)(_lasting(parts.model))
    state = [*model, *_optimizer(parts, flavour)]
    outside, owner = _lasting(parts.outside), parts.parent
    clash = {path[0] for path in outside} & {at[0] for at, _ in state}
    beside = [leaf for path, leaf in outside.items() if path[: len(owner)] != owner]
    if not several and any(is_weight(leaf) or not (clash or is_stream(leaf)) for leaf in beside):
        # Something lies beside a train state below a key: the key tells the two apart.
        parts, several = dataclasses.replace(parts, root=owner), True
    if several:
        for at, leaf in state:
            # What no Linen program stores is kept aside under its own path in the item.
            yield ((AUX, *segments(leaf.path)) if at[0] == AUX else (*segments(parts.root), *at)), leaf
        for path, leaf in outside.items():
            yield (AUX, *segments(path)), leaf
        return
    # A train state below a key stays there where something beside it has the name of one of its fields, as
    # the outer weights of DiLoCo: at the root, the one would be taken for the other.
    root = owner if clash else ()
    for at, leaf in state:
        yield (*segments(root), *at), leaf
    for path, leaf in outside.items():
        own = path[: len(root)] == root
        below = segments(path[len(root) :]) if own else segments(path)
        yield ((*segments(root), AUX, *below) if own else below), leaf


def _linen_model(leaves: ItemLeaves) -> Iterator[tuple[Path, ItemLeaf]]:
    """Yields the leaves below one key a collection; what belongs to none is kept aside."""
    wrapped = in_linen_wrappers(leaves)
    for path, leaf in leaves.items():
        place = wrapped.get(path, path)
        collection = "params" if path in wrapped and is_scale(place) else _collection(leaf)
        if collection is None or collection in _FIELDS:
            yield (AUX, "model", *segments(path)), leaf
        else:
            yield (collection, *linen_path(place)), leaf


def _collection(leaf: ItemLeaf) -> str | None:
    kind = cast("type[Any]", type(leaf.node))
    return None if issubclass(kind, nnx.RngState) else collection_of(kind)


def _maxtext_model(leaves: ItemLeaves) -> Iterator[tuple[Path, ItemLeaf]]:
    """Yields the weights below `params/params`; MaxText keeps everything else aside."""
    for path, leaf in leaves.items():
        is_weight = isinstance(leaf.node, nnx.Param)
        yield ("params", "params", *linen_path(path)) if is_weight else (AUX, "model", *segments(path)), leaf


def _optimizer(parts: Parts, flavour: Flavour) -> Iterator[tuple[Path, ItemLeaf]]:
    if parts.opt_state is not None:
        # MaxText's optimizer runs on the variables dict, so its moments have the collection's level.
        tree = OptaxTree(
            parameters=frozenset(canonical(path) for path in parts.parameters),
            level=("params",) if flavour == "maxtext" else (),
        )
        yield from tree.places(parts.opt_state, ("opt_state",), (*parts.owner, "opt_state"))
    if parts.step is not None:
        yield ("step",), parts.step


def _lasting(leaves: ItemLeaves) -> ItemLeaves:
    return {path: leaf for path, leaf in leaves.items() if not _is_passing(leaf.node)}


def _is_passing(node: Any) -> bool:
    kind = cast("type[Any]", type(node))
    if issubclass(kind, nnx.Variable):  # Flax looks longer into what may be one of another kind.
        return issubclass(kind, nnx.Cache | nnx.Intermediate)
    return isinstance(node, nnx.Cache | nnx.Intermediate)


def _without_collisions(places: Iterable[tuple[Path, ItemLeaf]]) -> Iterator[tuple[Path, ItemLeaf]]:
    """Yields the places, no two of them one path nor one inside the other."""
    listed = list(places)
    check_distinct((at, leaf.path) for at, leaf in listed)
    yield from listed


def check_distinct(places: Iterable[tuple[Path, Path]]) -> None:
    """Raises where two leaves would be stored at one path, or one inside the other.

    Args:
        places: For each leaf its stored path, and its path in the item.

    Raises:
        RestoreError: Names both leaves.
    """
    places = list(places)
    whole = [tuple(map(str, at)) for at, _ in places]
    above_some = {name[:depth] for name in whole for depth in range(len(name))}
    if len(set(whole)) == len(whole) and above_some.isdisjoint(whole):
        return  # Nearly every item.
    origins: dict[Path, Path] = {}
    inner: dict[Path, Path] = {}
    for at, path in places:
        names = tuple(map(str, at))
        above = [names[:depth] for depth in range(len(names) + 1)]
        other = next((origins[name] for name in above if name in origins), inner.get(names))
        if other is not None:
            raise _collision(other, path, at)
        origins[names] = path
        for name in above[:-1]:
            inner.setdefault(name, path)


def _collision(first: Path, second: Path, at: Path) -> RestoreError:
    hint = (
        "a Linen program tells its variables apart by name; save the parts as items of their own, "
        "or rename one of the two."
    )
    what = f"{render(first)} and {render(second)} would both be stored at {render(at)}."
    return RestoreError(what, paths=[first, second], hints=[hint])
