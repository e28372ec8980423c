"""What the caller wants filled, as flat leaves, and how to put it together again.

A target that asks for nothing is refused: always a mistake, which a restore of nothing would hide.
"""

import contextlib
import dataclasses
import functools
import inspect
import itertools
import operator
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from typing import Any, cast

import jax
import numpy as np
from flax import nnx

from orbax_nnx_handler.planning.core.dtypes import held_dtype, is_key
from orbax_nnx_handler.planning.core.errors import RestoreError
from orbax_nnx_handler.planning.core.leaves import OPT_STATE, WantedLeaf
from orbax_nnx_handler.planning.core.paths import Path, render
from orbax_nnx_handler.planning.target.shardings import ShardingRule, check_overrides

Leaves = dict[Path, Any]


def holds_nnx(item: Any) -> bool:
    """Tells whether any part of an item is an NNX object."""
    return any(_is_nnx(part) for part in _outermost(item))


def is_graph(item: Any) -> bool:
    """Tells whether any part of an item is an NNX module rather than a state."""
    if isinstance(item, nnx.State | nnx.Variable):
        return False
    if isinstance(item, nnx.Pytree | nnx.Module):
        return True
    return any(is_graph(part) for _, part in _entries(item) or ())


def flatten(tree: Any) -> Leaves:
    """Returns the leaves of a pytree by path; an `nnx.Variable` is a leaf."""
    return _by_path(tree, _is_variable)


def numbers_beside(item: Any) -> Leaves:
    """Returns the numbers that stand beside NNX objects, which `nnx.split` would take for settings."""
    beside = _by_path(item, _is_nnx)
    return {path: leaf for path, leaf in beside.items() if isinstance(leaf, _NUMBERS)}


def _by_path(tree: Any, is_leaf: Callable[[Any], bool]) -> Leaves:
    pairs = cast(list[tuple[Path, Any]], jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0])
    return {tuple(_key(entry) for entry in path): leaf for path, leaf in pairs}


def children(node: Any) -> list[tuple[Hashable, Any]] | None:
    """Returns the direct children of a pytree node by key; None for a leaf."""
    if (kind := cast(Any, type(node))) in (nnx.State, dict):  # Nearly every container.
        parts: Mapping[Any, Any] = node.raw_mapping if kind is nnx.State else node
        with contextlib.suppress(TypeError):  # Below, JAX says that such keys have no order.
            return sorted(parts.items(), key=operator.itemgetter(0))
    if _is_variable(node):
        return None
    if node is None:
        return []

    is_child = functools.partial(operator.is_not, node)
    pairs = cast(list[tuple[Path, Any]], jax.tree_util.tree_flatten_with_path(node, is_leaf=is_child)[0])
    if any(len(path) != 1 for path, _ in pairs):
        return None
    return [(_key(path[0]), child) for path, child in pairs]


_LEAVES = (jax.ShapeDtypeStruct, np.ndarray, nnx.Variable, jax.Array)
_PLAIN = (dict, nnx.State, jax.ShapeDtypeStruct)
_NNX = (nnx.State, nnx.Pytree, nnx.Module, nnx.Variable)
_NUMBERS = (bool, int, float, complex, np.generic)


def _outermost(item: Any) -> list[Any]:
    return jax.tree.leaves(item, is_leaf=_is_nnx)


def _is_nnx(node: Any) -> bool:
    return isinstance(node, _NNX)


def _is_variable(node: Any) -> bool:
    kind = cast("type[Any]", type(node))  # Flax answers for an instance in Python, and looks into others.
    return issubclass(kind, nnx.Variable) or (kind not in _PLAIN and isinstance(node, nnx.Variable))


def _key(entry: Any) -> Hashable:
    if type(entry) is jax.tree_util.DictKey:  # Nearly every one.
        return cast(Hashable, entry.key)
    name = next((name for name in ("key", "idx", "name") if hasattr(entry, name)), None)
    return str(entry) if name is None else cast(Hashable, getattr(entry, name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A target taken apart; nothing of the caller's is ever written to.

    Attributes:
        leaves: Every wanted leaf by path, in the target's order.
        variables: The target's own Variable (or bare array) behind each leaf.
        assemble: Builds the target's own type from values by path.
        aliases: Returns the other paths of Variables that the target shares, each with the wanted one.
        saved: Returns what a save stores by path, of which leaf and how made, in layouts with some paths.
    """

    leaves: Mapping[Path, WantedLeaf]
    variables: Mapping[Path, Any]
    assemble: Callable[[Mapping[Path, Any]], Any]
    aliases: Callable[[], Mapping[Path, Path]] = dict[Path, Path]
    saved: Callable[[Collection[Path]], Iterable[Mapping[Path, tuple[Path, Any]]]] = lambda _: ()


def flatten_target(
    item: Any, overrides: Mapping[Path, Any] | None = None, beside: Iterable[Any] = ()
) -> Target:
    """Takes a target apart.

    Args:
        item: An `nnx.State`, `nnx.Module`, `nnx.Optimizer`, a pure dict of arrays or `jax.ShapeDtypeStruct`,
            or any container of these that JAX knows, such as a Linen `TrainState`.
        overrides: Restore args by path; their `sharding` and `dtype` win over the leaf's own.
        beside: Arrays whose mesh is taken where the target names none.

    Raises:
        RestoreError: A leaf has no shape or dtype, an override fits none, or the target is nested too deep.
    """
    try:
        nodes, values, rebuild = _take_apart(item)
    except RecursionError as error:
        raise RestoreError("the target is nested deeper than Python can follow.") from error
    overrides, split = overrides or {}, dict[Path, Path]()
    if own := names_of_shared(item, nodes):
        split = {own.get(path, path): path for path in nodes}
        nodes, values, overrides = (renamed(parts, own) for parts in (nodes, values, overrides))
    check_overrides(overrides, values)
    placer, held = ShardingRule.of(itertools.chain(values.values(), beside)), functools.cache(held_dtype)
    leaves = {
        path: _wanted(path, node, values[path], overrides.get(path), placer, held)
        for path, node in nodes.items()
    }

    def assemble(restored: Mapping[Path, Any]) -> Any:
        filled = {path: _with_value(node, restored[path]) for path, node in nodes.items()}
        return rebuild(renamed(filled, split) if split else filled)

    @functools.cache
    def aliases() -> Mapping[Path, Path]:
        return aliases_of(item, nodes)

    return Target(leaves=leaves, variables=nodes, assemble=assemble, aliases=aliases)


def renamed(parts: Mapping[Path, Any], names: Mapping[Path, Path]) -> dict[Path, Any]:
    """Returns what belongs to paths under the names that some of them have."""
    return {names.get(path, path): part for path, part in parts.items()}


def names_of_shared(item: Any, nodes: Mapping[Path, Any]) -> Mapping[Path, Path]:
    """Returns the names of Variables that several models of an item hold, by the first of their paths.

    `nnx.split` gives each the first of its paths, also that of a part which the program also holds by itself
    (`self.backbone = self.model.encoder`): the whole's name is its own, and `model` of two that are the same.

    Args:
        item: The item; models are what lies beside an optimizer, or side by side in a container.
        nodes: Its Variables by the first of their paths.
    """
    states = (path for path, node in nodes.items() if isinstance(node, nnx.OptState) and OPT_STATE in path)
    owners = {path[: path.index(OPT_STATE)] for path in states} - {()}
    own: dict[Path, Path] = {}
    for above in {owner[:-1] for owner in owners} or ({()} if not _is_nnx(item) else ()):
        node = functools.reduce(lambda node, key: dict(_parts(node))[key], above, item)
        models = [((*above, key), part) for key, part in _parts(node) if (*above, key) not in owners]
        paths: dict[int, dict[Path, Path]] = defaultdict(dict)
        for at, part in models if len(models) > 1 else ():
            for path, variable in _every_variable(part, at):
                paths[id(variable)].setdefault(at, path)
        tops = {at for found in paths.values() for at in found}
        held = {at: {number for number, found in paths.items() if at in found} for at in tops}
        parts = {
            one
            for one, other in itertools.permutations(held, 2)
            if held[one] < held[other] or (held[one] == held[other] and other[-1] == "model")
        }
        for found in paths.values():
            names = [path for at, path in found.items() if at not in parts]
            own |= {path: names[0] for path in found.values() if path in nodes and path not in names}
    return own


def _parts(node: Any) -> Iterable[tuple[Any, Any]]:
    graph = isinstance(node, nnx.Pytree | nnx.Module)
    return cast(Iterable[tuple[Any, Any]], nnx.iter_children(node)) if graph else _entries(node) or ()


def aliases_of(item: Any, wanted: Collection[Path]) -> dict[Path, Path]:
    """Returns every path of a shared Variable but the one that is wanted, each with that one."""
    paths: dict[int, list[Path]] = defaultdict(list)
    for path, variable in _every_variable(item, ()) if is_graph(item) else ():
        paths[id(variable)].append(path)
    return {
        path: found[0]
        for same in paths.values()
        for found in [[path for path in same if path in wanted]]
        for path in same
        if found and path != found[0]
    }


def _every_variable(node: Any, path: Path, above: tuple[Any, ...] = ()) -> Iterator[tuple[Path, Any]]:
    """Yields each Variable under each of its paths; `nnx.iter_graph` yields it once."""
    if isinstance(node, nnx.Variable):
        yield path, node
    elif not any(node is other for other in above):
        for key, part in _parts(node):
            yield from _every_variable(part, (*path, key), (*above, node))


def flatten_like(tree: Any) -> Leaves:
    """Returns the leaves of a tree that mirrors a target, such as restore args."""
    _, values, _ = _take_apart(tree)
    return values


def value_of(node: Any) -> Any:
    """Returns the value inside a Variable, or the bare leaf itself."""
    if not _is_variable(node):
        return node
    raw = node.get_raw_value()
    # `get_value` looks for references and copies containers; of a bare description there is nothing to copy.
    if isinstance(raw, jax.ShapeDtypeStruct) and not node.has_metadata("on_get_value"):
        return raw
    return node.get_value()


_Apart = tuple[Leaves, Leaves, Callable[[Leaves], Any]]
"""The nodes of a target by path, their values, and how to put nodes together again."""


def _take_apart(item: Any) -> _Apart:
    if is_graph(item):
        return _take_apart_graph(item)
    nodes, values = dict[Path, Any](), dict[Path, Any]()
    _walk(item, (), nodes, values)
    if _is_split(item, nodes):
        own = {path: path[1:] for path in nodes}
        nodes, values = ({own[path]: part for path, part in parts.items()} for parts in (nodes, values))
        return nodes, values, lambda filled: _rebuild(item, (), {at: filled[own[at]] for at in own})
    return nodes, values, lambda filled: _rebuild(item, (), filled)


def _is_split(item: Any, nodes: Leaves) -> bool:
    """Tells several states of one model, as `nnx.split` returns them: their places are no names."""
    parts = cast("Iterable[object]", item) if isinstance(item, tuple | list) else (None,)
    if not all(isinstance(part, nnx.State | nnx.GraphDef) for part in parts):
        return False
    is_one = len({path[1:] for path in nodes}) == len(nodes)
    return is_one and not any(isinstance(node, nnx.OptState) for node in nodes.values())


def _take_apart_graph(item: Any) -> _Apart:
    if numbers_beside(item):
        item = jax.tree.map(_number_as_array, item, is_leaf=_is_nnx)
    graphdef, state = cast("tuple[Any, Any]", nnx.split(item))
    flat, values, rebuild = _take_apart(state)
    bare = _bare_leaves(item)

    def merge(nodes: Leaves) -> Any:
        merged = nnx.merge(graphdef, rebuild(nodes))
        for path in bare:
            merged = _with_bare(merged, path, nodes[path])
        return merged

    return flat | bare, values | bare, merge


def _bare_leaves(item: Any) -> Leaves:
    """Returns abstract arrays that sit in modules outside any Variable.

    `nnx.split` sees bare arrays but takes a bare `jax.ShapeDtypeStruct` for a static attribute
    (`nnx.WeightNorm.scales` under `nnx.eval_shape`): left alone, it would come back unmaterialised.
    """
    return {
        tuple(path): node for path, node in nnx.iter_graph(item) if isinstance(node, jax.ShapeDtypeStruct)
    }


def _with_bare(node: Any, path: Path, value: Any) -> Any:
    """Returns a node with a value at a path; modules, dicts and lists are changed in place."""
    if not path:
        return value
    key, rest = path[0], path[1:]
    if isinstance(node, nnx.Pytree):
        new = _with_bare(getattr(node, cast(str, key)), rest, value)
        setattr(node, cast(str, key), new if rest else nnx.data(new))
        return node
    parts = [_with_bare(part, rest, value) if name == key else part for name, part in children(node) or ()]
    return jax.tree.unflatten(_structure(node), parts)


def _entries(item: Any) -> list[tuple[Any, Any]] | None:
    """Returns the children of a container by key; None for a leaf."""
    if type(item) is dict:
        return list(cast(dict[Any, Any], item).items())
    if _is_variable(item) or isinstance(item, _LEAVES):
        return None
    if isinstance(item, nnx.State):
        # Its own dicts: asked for one by one, a State wraps each in a new State.
        return list(cast("nnx.State[Any, Any]", item).raw_mapping.items())
    if isinstance(item, tuple | list):
        named = cast(Any, item)
        if hasattr(named, "_fields"):
            return [(name, getattr(named, name)) for name in named._fields]
        return list(enumerate(cast(list[Any], item)))
    # Whatever else JAX knows as a container: a Linen `TrainState`, a `Partitioned` box, a `FrozenDict`.
    known = children(item)
    if not known and isinstance(item, Mapping):
        return list(cast(Mapping[Any, Any], item).items())
    return known or None


def _is_empty(value: Any) -> bool:
    """Tells whether a leaf's value is none: None, or `optax.MaskedNode` inside a Variable."""
    return not hasattr(value, "shape") and not jax.tree.leaves(value)


def _walk(item: Any, prefix: Path, nodes: Leaves, values: Leaves) -> None:
    """Adds every leaf below an item, and its value, by path."""
    entries = _entries(item)
    if entries is None:
        value = value_of(item)
        if not _is_empty(value):
            nodes[prefix], values[prefix] = item, value
        return
    for key, part in entries:
        _walk(part, (*prefix, key), nodes, values)


def _rebuild(item: Any, prefix: Path, nodes: Leaves) -> Any:
    entries = None if prefix in nodes else _entries(item)
    if entries is None:
        return nodes.get(prefix, item)  # A leaf without a value is none of the target's, and stays.
    if isinstance(item, nnx.State):
        return nnx.State(_rebuild_state(entries, prefix, nodes))
    parts = {key: _rebuild(part, (*prefix, key), nodes) for key, part in entries}
    if type(item) is dict:
        return parts
    if isinstance(item, tuple | list):
        kind = cast(Any, item).__class__
        return kind(**parts) if hasattr(kind, "_fields") else kind(parts.values())
    return jax.tree.unflatten(_structure(item), parts.values()) if children(item) else parts


def _structure(node: Any) -> Any:
    """Returns the structure of one container, its children taken for leaves."""
    return cast(Any, jax.tree.structure(node, is_leaf=lambda part: part is not node))


def _rebuild_state(entries: Iterable[tuple[Any, Any]], prefix: Path, nodes: Leaves) -> dict[Any, Any]:
    # A State that was put into a State counts as a dict there; left wrapped, it would change the treedef.
    return {
        key: _rebuild_state(_entries(part) or (), (*prefix, key), nodes)
        if isinstance(part, nnx.State)
        else _rebuild(part, (*prefix, key), nodes)
        for key, part in entries
    }


def _wanted(
    path: Path, node: Any, value: Any, override: Any, placer: ShardingRule, held: Callable[[Any], Any]
) -> WantedLeaf:
    # A bare leaf is its own value.
    kind = None if value is node else cast("type[Any]", type(node))
    sharding, is_default = placer.place(node, value, override)
    if not (is_abstract := isinstance(value, jax.ShapeDtypeStruct)):
        value = _as_array(path, value)
    dtype = getattr(override, "dtype", None)
    return WantedLeaf(
        path=path,
        kind=kind,
        shape=tuple(value.shape),
        dtype=held(value.dtype if dtype is None else dtype if is_key(dtype) else np.dtype(dtype)),
        sharding=sharding,
        value=None if is_abstract else value,
        dtype_is_chosen=dtype is not None,
        sharding_is_default=is_default,
    )


def _number_as_array(value: Any) -> Any:
    if not isinstance(value, _NUMBERS):
        return value
    dtype = None if isinstance(value, np.generic) else jax.dtypes.canonicalize_dtype(type(value))
    return np.asarray(cast(Any, value), dtype=dtype)


def is_unbuilt(value: Any) -> bool:
    """Tells a class or a function in the place of what it builds."""
    return isinstance(value, type) or inspect.isfunction(value)


_ARRAYS = "build the target with nnx.eval_shape, or give it arrays or jax.ShapeDtypeStruct leaves."
_SEVERAL = "a Variable is restored where it holds one array: pass the parts of the target without such ones."
_TEXTS = "leave text out of the target: keep it in an item of its own, such as ocp.args.JsonSave."


def _as_array(path: Path, value: Any) -> Any:
    if isinstance(value, np.ma.MaskedArray):
        raise RestoreError(
            f"target leaf {render(path)} is a masked array, and no array of JAX's has a mask.",
            paths=(path,),
            hints=["give the target numpy.ma.filled(array, value), or a jax.ShapeDtypeStruct."],
        )
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return value
    if isinstance(value, _NUMBERS):
        return _number_as_array(value)
    name = type(value).__name__
    what, hint = f"a {name}", {"list": _SEVERAL, "str": _TEXTS, "bytes": _TEXTS}.get(name, _ARRAYS)
    if is_unbuilt(value):
        kind, name = "class" if isinstance(value, type) else "function", getattr(value, "__name__", "")
        call = f"lambda: {name}(...)" if kind == "class" else "function"
        what, hint = f"the {kind} {name}", f"pass what it builds: nnx.eval_shape({call})."
    if isinstance(value, os.PathLike) and not path:
        hint = "the path comes first, the target second: restore(path, target)."
    words = f"target leaf {render(path)} is {what}: it has no shape and dtype."
    raise RestoreError(words, paths=(path,), hints=[hint])


def _with_value(node: Any, value: Any) -> Any:
    if not _is_variable(node):
        return value
    metadata = node.get_metadata()
    if metadata.get("ref") or metadata.get("hijax"):
        return node.replace(value)
    # As `replace` does, but for the search for references, which a restored array has none of.
    return cast(Any, type(node)).from_metadata(value, metadata)
