"""What the caller wants filled, as flat leaves, and how to put it together again."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import numpy as np
from flax import nnx

from orbax_nnx_handler.planning.anatomy import children
from orbax_nnx_handler.planning.dtypes import held_dtype
from orbax_nnx_handler.planning.errors import RestoreError
from orbax_nnx_handler.planning.leaves import WantedLeaf
from orbax_nnx_handler.planning.paths import Path, render
from orbax_nnx_handler.planning.shardings import Placer

Flat = dict[Path, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A target taken apart; nothing of the caller's is ever written to.

    Attributes:
        leaves: Every wanted leaf by path, in the target's order.
        variables: The target's own Variable (or bare array) behind each leaf.
        assemble: Builds the target's own type from values by path.
    """

    leaves: Mapping[Path, WantedLeaf]
    variables: Mapping[Path, Any]
    assemble: Callable[[Mapping[Path, Any]], Any]


def flatten_target(item: Any, overrides: Mapping[Path, Any] | None = None) -> Target:
    """Takes a target apart.

    Args:
        item: An `nnx.State`, `nnx.Module`, `nnx.Optimizer`, a pure dict of
            arrays or `jax.ShapeDtypeStruct`, or a tuple, list, dict or other
            container of these that JAX knows, such as a Linen `TrainState`.
        overrides: Restore args by path; `sharding` and `dtype` attributes that
            are set win over the leaf's own.

    Raises:
        RestoreError: A leaf has neither shape nor dtype, an override names no
            leaf of the target, or the target is nested too deep.
    """
    try:
        flat, rebuild = _take_apart(item)
    except RecursionError as error:
        raise RestoreError("the target is nested deeper than Python can follow.") from error
    overrides = overrides or {}
    _check_overrides(overrides, flat)
    placer = Placer.of(flat.values())
    leaves = {path: _wanted(path, node, overrides.get(path), placer) for path, node in flat.items()}

    def assemble(values: Mapping[Path, Any]) -> Any:
        return rebuild({path: _with_value(node, values[path]) for path, node in flat.items()})

    return Target(leaves=leaves, variables=flat, assemble=assemble)


def flatten_like(tree: Any) -> Flat:
    """Returns the leaves of a tree that mirrors a target, such as restore args."""
    flat, _ = _take_apart(tree)
    return {path: value_of(node) for path, node in flat.items()}


def value_of(node: Any) -> Any:
    """Returns the value inside a Variable, or the bare leaf itself."""
    return cast(Any, node).get_value() if isinstance(node, nnx.Variable) else node


def _take_apart(item: Any) -> tuple[Flat, Callable[[Flat], Any]]:
    if _has_graph_node(item):
        return _take_apart_graph(item)
    return dict(_walk(item, ())), lambda nodes: _rebuild(item, (), nodes)


def _take_apart_graph(item: Any) -> tuple[Flat, Callable[[Flat], Any]]:
    graphdef, state = cast("tuple[Any, Any]", nnx.split(item))
    flat, rebuild = _take_apart(state)
    bare = _bare_leaves(item)

    def merge(nodes: Flat) -> Any:
        merged = nnx.merge(graphdef, rebuild(nodes))
        for path in bare:
            _set_bare(merged, path, nodes[path])
        return merged

    return flat | bare, merge


def _bare_leaves(item: Any) -> Flat:
    """Returns abstract arrays that sit in modules outside any Variable.

    `nnx.split` sees bare arrays but takes a bare `jax.ShapeDtypeStruct` for a
    static attribute (`nnx.WeightNorm.scales` under `nnx.eval_shape`): left
    alone, it would come back unmaterialised.
    """
    return {
        tuple(path): node for path, node in nnx.iter_graph(item) if isinstance(node, jax.ShapeDtypeStruct)
    }


def _set_bare(root: Any, path: Path, value: Any) -> None:
    parent = root
    for key in path[:-1]:
        parent = getattr(parent, cast(str, key)) if isinstance(parent, nnx.Pytree) else parent[key]
    if isinstance(parent, nnx.Pytree):
        setattr(parent, cast(str, path[-1]), nnx.data(value))
    else:
        parent[path[-1]] = value


def _has_graph_node(item: Any) -> bool:
    if isinstance(item, nnx.State | nnx.Variable):
        return False
    if isinstance(item, nnx.Pytree | nnx.Module):
        return True
    return any(_has_graph_node(part) for _, part in _entries(item) or ())


def _entries(item: Any) -> list[tuple[Any, Any]] | None:
    """Returns the children of a container by key; None for a leaf."""
    if isinstance(item, nnx.Variable):
        return None
    if type(item) is dict or isinstance(item, nnx.State):
        return list(cast(Mapping[Any, Any], item).items())
    if _is_named_tuple(item):
        return [(name, getattr(item, name)) for name in item._fields]
    if isinstance(item, tuple | list):
        return list(enumerate(cast(list[Any], item)))
    # Whatever else JAX knows as a container: a Linen `TrainState`, a `Partitioned` box, a `FrozenDict`.
    known = children(item)
    if not known and isinstance(item, Mapping):
        return list(cast(Mapping[Any, Any], item).items())
    return known or None


def _is_named_tuple(item: Any) -> bool:
    return isinstance(item, tuple) and hasattr(cast(Any, item), "_fields")


def _is_empty(item: Any) -> bool:
    """Tells whether a leaf holds no value: None, or `optax.MaskedNode` inside a Variable."""
    return not jax.tree.leaves(value_of(item))


def _walk(item: Any, prefix: Path) -> list[tuple[Path, Any]]:
    entries = _entries(item)
    if entries is None:
        return [] if _is_empty(item) else [(prefix, item)]
    return [pair for key, part in entries for pair in _walk(part, (*prefix, key))]


def _rebuild(item: Any, prefix: Path, nodes: Flat) -> Any:
    entries = _entries(item)
    if entries is None:
        return item if _is_empty(item) else nodes[prefix]
    if isinstance(item, nnx.State):
        return nnx.State(_rebuild_state(cast("nnx.State[Any, Any]", item), prefix, nodes))
    parts = {key: _rebuild(part, (*prefix, key), nodes) for key, part in entries}
    if type(item) is dict:
        return parts
    if _is_named_tuple(item):
        return type(item)(**parts)
    if isinstance(item, tuple | list):
        return type(cast(Any, item))(parts.values())
    return jax.tree.unflatten(_structure(item), parts.values()) if children(item) else parts


def _structure(node: Any) -> Any:
    """Returns the structure of one container, its children taken for leaves."""
    return cast(Any, jax.tree.structure(node, is_leaf=lambda part: part is not node))


def _rebuild_state(state: "nnx.State[Any, Any]", prefix: Path, nodes: Flat) -> dict[Any, Any]:
    # A State hands out its inner dicts wrapped as States; stored wrapped, they would change the treedef.
    return {
        key: _rebuild_state(cast("nnx.State[Any, Any]", part), (*prefix, key), nodes)
        if isinstance(part, nnx.State)
        else _rebuild(part, (*prefix, key), nodes)
        for key, part in state.items()
    }


def _wanted(path: Path, node: Any, override: Any, placer: Placer) -> WantedLeaf:
    value = value_of(node)
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        value = _as_array(path, value)
    dtype = getattr(override, "dtype", None)
    return WantedLeaf(
        path=path,
        kind=_kind(node),
        shape=tuple(value.shape),
        dtype=held_dtype(value.dtype if dtype is None else np.dtype(dtype)),
        sharding=placer.place(node, override),
        value=None if isinstance(value, jax.ShapeDtypeStruct) else value,
        dtype_is_chosen=dtype is not None,
    )


def _kind(node: Any) -> type[Any] | None:
    return cast("type[Any]", type(cast(object, node))) if isinstance(node, nnx.Variable) else None


def _as_array(path: Path, value: Any) -> Any:
    if isinstance(value, bool | int | float | complex):
        return np.asarray(value, dtype=jax.dtypes.canonicalize_dtype(type(value)))
    raise RestoreError(
        f"target leaf {render(path)} is a {type(value).__name__}: it has no shape and dtype.\n"
        "hint: build the target with nnx.eval_shape, or give it arrays or jax.ShapeDtypeStruct leaves.",
        paths=(path,),
    )


def _with_value(node: Any, value: Any) -> Any:
    return node.replace(value) if isinstance(node, nnx.Variable) else value


def _check_overrides(overrides: Mapping[Path, Any], flat: Flat) -> None:
    strange = [path for path in overrides if path not in flat]
    if strange:
        listed = "\n".join(f"  {render(path)}" for path in strange)
        raise RestoreError(
            f"restore_args has {len(strange)} leaves that the target does not have:\n{listed}\n"
            "hint: restore_args must mirror the target, for example jax.tree.map(make_args, target).",
            paths=strange,
        )
