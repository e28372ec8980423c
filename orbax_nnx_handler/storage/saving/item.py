"""An NNX item taken apart: its model, its optimizer, its step, and what lies beside them."""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, cast

import jax
import numpy as np
from flax import nnx

from orbax_nnx_handler.planning.core.leaves import derived
from orbax_nnx_handler.planning.core.paths import Path, canonical, render
from orbax_nnx_handler.planning.layouts.layout import is_copy_level
from orbax_nnx_handler.planning.mapping.roots import PLAIN_LEVELS
from orbax_nnx_handler.planning.target import (
    aliases_of,
    children,
    flatten,
    is_graph,
    names_of_shared,
    numbers_beside,
    renamed,
)
from orbax_nnx_handler.planning.target.roles import collection_of

_OPT_STATE, _FIELDS = "opt_state", PLAIN_LEVELS | {"params"}


@dataclasses.dataclass(frozen=True)
class ItemLeaf:
    """One leaf of an item: an `nnx.Variable`, or an array outside any, at its path in the item."""

    path: Path
    node: Any

    @derived
    def value(self) -> Any:
        """Its array; an empty container where it holds none, None for an empty state of optax."""
        value = cast(Any, self.node).get_raw_value() if isinstance(self.node, nnx.Variable) else self.node
        if _is_array_to_orbax(value):
            return np.asarray(value)
        if hasattr(value, "shape") or children(value) != []:
            return value
        if value is None or hasattr(value, "_fields"):
            return None
        return {} if isinstance(value, Mapping) else ()


def _is_array_to_orbax(value: Any) -> bool:
    """Tells a Python complex and scalars such as NumPy's bool, of which Orbax stores arrays alone."""
    return isinstance(value, complex | np.generic) and not isinstance(value, np.number)


ItemLeaves = Mapping[Path, ItemLeaf]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """A train state taken apart.

    Attributes:
        model: The model's leaves, by path below the model.
        outside: Leaves beside model and optimizer (averaged weights, a program's
            own random streams), by path in the item.
        opt_state: The optimizer's state: optax's own containers where the item is
            an `nnx.Optimizer` or holds one, nested mappings where it is a State;
            None without an optimizer.
        owner: The keys above `opt_state`.
        parent: The keys above the optimizer, or above the fields of a functional train state.
        step: The number of steps done, or None.
        root: The keys that it is stored below, where the item holds several train states.
        trained: Other leaves that the optimizer trains, by path below its model: all of a model that is a
            part of its own, and what the model shares with another one, which has it among its leaves.
    """

    model: ItemLeaves
    outside: ItemLeaves
    opt_state: Any = None
    owner: Path = ()
    parent: Path = ()
    step: ItemLeaf | None = None
    root: Path = ()
    trained: ItemLeaves = dataclasses.field(default_factory=dict[Path, ItemLeaf])

    @property
    def parameters(self) -> ItemLeaves:
        """The leaves of the optimizer's model, by path below that."""
        return {**self.model, **self.trained}


def take_apart(item: Any, model_key: Hashable = "model") -> Sequence[Parts]:
    """Finds model, optimizer and step of each train state of an item.

    Args:
        item: An `nnx.State`, `nnx.Module`, `nnx.Optimizer`, or a tuple, list, dict or
            dataclass of these.
        model_key: The key under which a model sits where nothing else tells.

    Returns:
        One train state, or several with the keys that each is below; what lies beside them all is outside
        the first. Of models and optimizers side by side, each is one by itself.

    Raises:
        ValueError: One of several optimizers has no model beside it, or the item is a lone Variable.
    """
    if isinstance(item, nnx.Variable):
        raise ValueError(
            f"a lone {type(cast(Any, item)).__name__} has no name to be stored under.\n"
            "hint: put it into a dict: {'name': variable}."
        )
    nodes = flatten(_state_of(item)) | _abstract_arrays(item)
    nodes = renamed(nodes, names_of_shared(item, nodes))
    optimizers = dict(_optimizers(item, nodes))
    nodes |= numbers_beside(item) if is_graph(item) else {}
    leaves = {path: ItemLeaf(path, node) for path, node in nodes.items()}
    if not optimizers:
        return (_without_optimizer(item, leaves, model_key),)
    shared = {alias: leaves[path] for alias, path in aliases_of(item, leaves).items()}
    roots = {_parent(leaves, owner): owner for owner in optimizers}
    others = _weights({path: leaf for path, leaf in leaves.items() if not _is_below_any(path, optimizers)})
    apart = [root for root in roots if not any(_are_nested(root, path) for path in others)]
    moments = list(itertools.chain.from_iterable(map(_moments, optimizers.values())))
    if len(optimizers) == 1 and not (apart and others):
        ((owner, opt_state),) = optimizers.items()
        return _one_train_state(leaves, owner, opt_state, model_key, (), shared)
    if apart:
        # Of a list of networks and a list of their optimizers, all lie side by side.
        kinds = list, tuple, dict, nnx.List, nnx.Dict
        lists = {(key,) for key, child in children(item) or () if isinstance(child, kinds)}
        lists = {at for at in lists if not _matches(others, at, moments)}  # Else one trains all of a list.
        return _side_by_side(leaves, optimizers, (), shared, lists)
    if len(roots) == 1:
        return _side_by_side(leaves, optimizers, next(iter(roots)), shared)
    if len(roots) < len(optimizers) or any(_are_nested(a, b) for a in roots for b in roots if a != b):
        raise _several_optimizers(optimizers)
    states: list[Parts] = []
    for root, owner in roots.items():
        own = {path: leaf for path, leaf in leaves.items() if _are_nested(root, path)}
        leaves = {path: leaf for path, leaf in leaves.items() if path not in own}
        states += _one_train_state(own, owner, optimizers[owner], model_key, root, shared)
    return _with_outside(states, leaves)


def _with_outside(states: Sequence[Parts], leaves: ItemLeaves) -> Sequence[Parts]:
    return (dataclasses.replace(states[0], outside={**states[0].outside, **leaves}), *states[1:])


def _several_optimizers(optimizers: Collection[Path]) -> ValueError:
    return ValueError(
        f"the item holds {len(optimizers)} optimizers ({', '.join(map(render, optimizers))}), a Linen train "
        "state just one.\n"
        "hint: put each beside its model, below a key of their own ({'gen': {'model': ..., 'optimizer': "
        "...}, ...}), or save each with its model as an item of its own (ocp.args.Composite)."
    )


def _side_by_side(
    leaves: ItemLeaves,
    optimizers: Mapping[Path, Any],
    parent: Path,
    shared: ItemLeaves,
    lists: Set[Path] = frozenset(),
) -> Sequence[Parts]:
    """Returns each model and each optimizer of `{gen, disc, g_opt, d_opt}` as a part of its own.

    Which optimizer trains which model need not be known: each is stored under its own name. Its moments
    are told from its scalars by the names of any model that has them all.
    """
    below: dict[Path, dict[Path, ItemLeaf]] = defaultdict(dict)
    for path, leaf in leaves.items():
        depth = len(parent) + (2 if path[:1] in lists else 1)
        if len(path) > depth and _are_nested(parent, path) and not _is_below_any(path, optimizers):
            below[path[:depth]][path[depth:]] = leaf
    models = {key: model for key, model in below.items() if any(map(is_weight, model.values()))}
    states = [Parts(model=model, outside={}, root=key) for key, model in models.items()]
    models = {key: {**model, **_below(shared, key)} for key, model in models.items()}
    for owner, opt_state in optimizers.items():
        moments = _moments(opt_state)
        trained = _trained_by(moments, models) if below else dict[Path, ItemLeaf]()
        if trained is None:
            raise _several_optimizers(optimizers)
        step = leaves.get((*owner, "step"))
        places = {"owner": owner, "parent": parent, "root": owner}
        states.append(Parts(model={}, outside={}, opt_state=opt_state, step=step, trained=trained, **places))
    return _with_outside(states, _left(leaves, states))


def _trained_by(
    moments: Sequence[tuple[str, ...]], models: Mapping[Path, Mapping[Path, ItemLeaf]]
) -> ItemLeaves | None:
    """Returns the model that has the names of the moments, or a module within one; None where none has."""
    while models:
        names = {key: {canonical(path) for path in model} for key, model in models.items()}
        # By the longest names: a `head/kernel` ends as every `layers/0/kernel` does.
        scores = {
            key: sum(len(_longest_end(moment, own)) for moment in moments) for key, own in names.items()
        }
        best = max(scores, key=scores.__getitem__)
        if scores[best] or not moments:
            return models[best]
        inside: dict[Path, dict[Path, ItemLeaf]] = defaultdict(dict)
        for key, model in models.items():
            for path, leaf in model.items():
                if len(path) > 1:
                    inside[*key, path[0]][path[1:]] = leaf
        models = inside
    return None


def _left(leaves: ItemLeaves, states: Sequence[Parts]) -> ItemLeaves:
    taken = {leaf.path for parts in states for leaf in parts.model.values()}
    taken |= {parts.step.path for parts in states if parts.step is not None}
    above = {(*parts.owner, _OPT_STATE) for parts in states if parts.opt_state is not None}
    return {p: leaf for p, leaf in leaves.items() if p not in taken and not _is_below_any(p, above)}


def is_weight(leaf: ItemLeaf) -> bool:
    """Tells whether a leaf is a Variable other than random state."""
    return isinstance(leaf.node, nnx.Variable) and not isinstance(leaf.node, nnx.RngState)


def _weights(leaves: ItemLeaves) -> Sequence[Path]:
    own = [path for path, leaf in leaves.items() if is_weight(leaf)]
    return own or [path for path, leaf in leaves.items() if not isinstance(leaf.node, nnx.RngState)]


def _is_below_any(path: Path, above: Iterable[Path]) -> bool:
    return any(_are_nested(at, path) for at in above)


def _are_nested(one: Path, other: Path) -> bool:
    return other[: len(one)] == one


def _below(leaves: ItemLeaves, root: Path) -> dict[Path, ItemLeaf]:
    return {path[len(root) :]: leaf for path, leaf in leaves.items() if path[: len(root)] == root}


def _one_train_state(
    leaves: ItemLeaves, owner: Path, opt_state: Any, model_key: Hashable, root: Path, shared: ItemLeaves
) -> Sequence[Parts]:
    """Returns model and optimizer as one part below `root`; else model and optimizer as parts of their own.

    That is where no name says which of several models it trains, where only the model is called a copy (what
    is stored below no `ema` says of itself that it is no average), and where it is a list with its own name.
    """
    above, parent = (*owner, _OPT_STATE), _parent(leaves, owner)
    # A program's own count beside the optimizer is the train state's step; the optimizer's is kept aside.
    step = _count(leaves, parent) or leaves.get((*owner, "step"))
    rest = {path: leaf for path, leaf in leaves.items() if path[: len(above)] != above and leaf is not step}
    model = _root(rest, parent, opt_state, model_key)
    copies = [at for at, level in enumerate(model or ()) if at >= len(root) and is_copy_level(str(level))]
    own, outside = _divide(rest, model or ())
    named = not _FIELDS.issuperset((model or ())[len(parent) :]) and all(isinstance(p[0], int) for p in own)
    if model is None or named or (copies and copies[-1] >= len(parent)):
        return _side_by_side(leaves, {owner: opt_state}, parent, shared)
    if model[-1:] == ("params",):
        # A functional train state keeps its other collections beside `params`.
        beside = {
            path: leaf for path, leaf in outside.items() if _is_in_collection(path[len(model) - 1 :], leaf)
        }
        own = {**own, **{path[len(model) :]: leaf for path, leaf in beside.items()}}
        outside = {path: leaf for path, leaf in outside.items() if path not in beside}
    places = {"owner": owner, "parent": parent, "root": model[: copies[-1] + 1] if copies else root}
    trained = _below(shared, model)
    return (Parts(model=own, outside=outside, opt_state=opt_state, step=step, trained=trained, **places),)


def _parent(leaves: ItemLeaves, owner: Path) -> Path:
    """Returns what the model of an optimizer lies below: a functional train state holds both itself."""
    depth, own = len(owner) + 1, (_OPT_STATE, "step")
    below = (path for path in leaves if len(path) > depth and path[: depth - 1] == owner)
    return owner if any(path[depth - 1] not in own for path in below) else owner[:-1]


def _count(leaves: ItemLeaves, owner: Path) -> ItemLeaf | None:
    """Returns the number called `step` that a program keeps below some keys, in no Variable."""
    leaf = leaves.get((*owner, "step"))
    return None if leaf is None or isinstance(leaf.node, nnx.Variable) else leaf


def _state_of(item: Any) -> Any:
    return cast(Any, nnx.split(item)[1]) if is_graph(item) else item


def _abstract_arrays(item: Any) -> dict[Path, Any]:
    """Returns the arrays outside any Variable of an abstract module, which `nnx.split` takes for settings."""
    nodes = cast(Iterable[tuple[Path, Any]], nnx.iter_graph(item)) if is_graph(item) else ()
    return {tuple(path): node for path, node in nodes if isinstance(node, jax.ShapeDtypeStruct)}


def _optimizers(item: Any, nodes: Mapping[Path, Any]) -> Iterator[tuple[Path, Any]]:
    """Yields each optimizer's path in the item with its state, in optax's containers where they are left."""
    found = {**dict(_in_modules(item)), **dict(_opt_states(item, ()))}
    inside = {(*owner, _OPT_STATE) for owner in found}
    alone = {
        owner: state
        for owner, state in _without_state(nodes)
        if owner not in found and not any(owner[: len(above)] == above for above in inside)
    }
    yield from {**alone, **found}.items()


def _in_modules(item: Any) -> Iterator[tuple[Path, Any]]:
    nodes = cast(Iterable[tuple[Path, Any]], nnx.iter_graph(item)) if is_graph(item) else ()
    for path, node in nodes:
        if isinstance(node, nnx.Pytree | nnx.Module) and _is_opt_state(vars(node).get(_OPT_STATE)):
            yield path, getattr(node, _OPT_STATE)


def _is_opt_state(node: Any) -> bool:
    """Tells an optimizer's state, empty or not, from a part of the model that has its name.

    Optax's own containers are one, also where one has a field of that name (`optax.contrib.sam`), whatever
    Variables are in them: in a functional train state, `nnx.Param`s. Else all Variables are `nnx.OptState`s.
    """
    if _is_container(node):
        return True
    if node is None or (hasattr(node, _OPT_STATE) and hasattr(node, "step")):
        return False  # An `nnx.Optimizer` that an item keeps under that key.
    leaves = flatten(_state_of(node)).values()
    of_model = (isinstance(leaf, nnx.Variable) and not isinstance(leaf, nnx.OptState) for leaf in leaves)
    return not any(of_model) and bool(leaves or not is_graph(node))


def _is_container(node: Any) -> bool:
    """Tells a container of optax's, of which a named field may be a module, from a list of modules."""
    if not isinstance(node, tuple | list):
        return False
    parts = cast(Iterable[Any], node)
    return hasattr(parts, "_fields") or not any(isinstance(part, nnx.Pytree | nnx.Module) for part in parts)


def _without_state(nodes: Mapping[Path, Any]) -> Iterator[tuple[Path, Any]]:
    """Yields optimizers of which a State keeps the step alone, as of plain `sgd`."""
    for path, leaf in nodes.items():
        if path[-1:] == ("step",) and isinstance(leaf, nnx.OptState):
            yield path[:-1], nnx.State({})


def _opt_states(node: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    if isinstance(node, nnx.Pytree | nnx.Module):
        return
    for key, child in children(node) or ():
        if key == _OPT_STATE and _is_opt_state(child):
            yield path, child
        elif not issubclass(type(child), nnx.Variable):
            yield from _opt_states(child, (*path, key))


def _without_optimizer(item: Any, leaves: ItemLeaves, model_key: Hashable) -> Parts:
    if step := _count(leaves, ()):
        rest = {path: leaf for path, leaf in leaves.items() if leaf is not step}
        return dataclasses.replace(_without_optimizer(item, rest, model_key), step=step)
    keys = {path[0] for path in leaves}
    if isinstance(item, tuple | list) and _is_split(cast(Iterable[Any], item)):
        return Parts(
            model={path: ItemLeaf(path, leaf.node) for path, leaf in _merge(leaves).items()}, outside={}
        )
    if isinstance(item, tuple | list) and len(keys) == 1:
        return Parts(model=_merge(leaves), outside={})
    container = isinstance(item, Mapping) and not isinstance(item, nnx.State)
    if model_key in keys and (container or (keys == {model_key} and _names_its_model(item))):
        model, outside = _divide(leaves, (model_key,))
        return Parts(model=model, outside=outside)
    typed = {path: leaf for path, leaf in leaves.items() if isinstance(leaf.node, nnx.Variable)}
    if container and typed and all(_is_in_collection(path, leaf) for path, leaf in typed.items()):
        outside = {path: leaf for path, leaf in leaves.items() if path not in typed}
        return Parts(model={path[1:]: leaf for path, leaf in typed.items()}, outside=outside)
    return Parts(model=leaves, outside={})


def _is_split(item: Iterable[Any]) -> bool:
    """Tells what `nnx.split` returns, several states of one model, from models that lie side by side."""
    return all(isinstance(part, nnx.State | nnx.GraphDef) for part in item)


def _is_in_collection(path: Path, leaf: ItemLeaf) -> bool:
    """Tells whether the first key above a Variable is the collection of its type, as in a variables dict."""
    return len(path) > 1 and path[0] == collection_of(cast("type[Any]", type(leaf.node)))


def _names_its_model(item: Any) -> bool:
    """Tells whether an item is a train state without an optimizer, as for inference."""
    return isinstance(item, nnx.Pytree) and "optimizer" in vars(item)


def _merge(leaves: ItemLeaves) -> ItemLeaves:
    merged: dict[Path, ItemLeaf] = {}
    for path, leaf in leaves.items():
        if path[1:] in merged:
            raise ValueError(
                f"two parts of the item hold {render(path[1:])}.\n"
                "hint: name the parts with a dict: {'model': ..., 'ema': ...}."
            )
        merged[path[1:]] = leaf
    return merged


def _divide(leaves: ItemLeaves, root: Path) -> tuple[ItemLeaves, ItemLeaves]:
    return _below(leaves, root), {p: leaf for p, leaf in leaves.items() if p[: len(root)] != root}


def _root(leaves: ItemLeaves, parent: Path, opt_state: Any, model_key: Hashable) -> Path | None:
    """Returns the path of the model that an optimizer was built for; None where it may be several.

    Optimizer leaves end with their parameter's path, so the model is where the
    most of them find a parameter; without moments, its name decides.
    """
    moments = _moments(opt_state)
    below = [path for path in _weights(leaves) if path[: len(parent)] == parent and len(path) > len(parent)]
    keys = dict.fromkeys(path[len(parent)] for path in below)
    scores = {root: _matches(below, root, moments) for root in [parent, *((*parent, key) for key in keys)]}
    best = [root for root, score in scores.items() if score == max(scores.values())]
    if not scores[best[0]]:
        return _root_by_name(parent, list(keys), model_key)
    if parent in best or len(best) == 1:
        return best[0]
    # `params` is the field of Flax's own `TrainState`.
    named = next((root for key in (model_key, "params") if (root := (*parent, key)) in best), None)
    originals = [root for root in best if not is_copy_level(str(root[-1]))]
    return named or (originals[0] if len(originals) == 1 else None)


def _root_by_name(parent: Path, keys: list[Hashable], model_key: Hashable) -> Path:
    if model_key in keys:
        return (*parent, model_key)
    # The place in a tuple is no name of the model's own.
    return (*parent, keys[0]) if len(keys) == 1 and isinstance(keys[0], int) else parent


def _moments(opt_state: Any) -> list[tuple[str, ...]]:
    """Returns the canonical paths of an optimizer's leaves but its counts, which name no parameter."""
    return [canonical(path) for path, leaf in flatten(opt_state).items() if not is_count(leaf)]


def is_count(leaf: Any) -> bool:
    """Tells a number that an `nnx.Optimizer` keeps beside its moments."""
    return isinstance(leaf, nnx.OptArray) and not np.shape(cast(Any, leaf).get_value())


def _matches(paths: Iterable[Path], root: Path, moments: Iterable[tuple[str, ...]]) -> int:
    names = {canonical(path[len(root) :]) for path in paths if path[: len(root)] == root}
    return sum(bool(_longest_end(moment, names)) for moment in moments)


def _longest_end(moment: tuple[str, ...], names: Set[tuple[str, ...]]) -> tuple[str, ...]:
    return next((moment[at:] for at in range(len(moment)) if moment[at:] in names), ())
