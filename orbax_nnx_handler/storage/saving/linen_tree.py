"""From NNX state to the tree that a Linen program would have stored.

Structure alone: values pass through untouched, abstract ones too.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, cast

from flax import nnx

from orbax_nnx_handler.planning.core.containers import Nested, nest, nest_as_is
from orbax_nnx_handler.planning.core.paths import Path, canonical
from orbax_nnx_handler.planning.layouts.linen import AUX
from orbax_nnx_handler.planning.mapping.modules import in_linen_wrappers, is_scale
from orbax_nnx_handler.planning.target.roles import collection_of
from orbax_nnx_handler.planning.target.train_state import Leaves, Parts, holds_nnx, take_apart
from orbax_nnx_handler.storage.saving.optax_tree import (
    OptaxTree,
    Transformation,
    keeps_containers,
    with_containers,
)

Flavour = Literal["linen", "maxtext"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinenTree:
    """An item as a Linen program stores it.

    Attributes:
        tree: Nested dicts and lists of the item's values.
        random: Random state that a Linen program would not store and whose
            structure check it would fail, by path below `nnx_aux`; empty for
            MaxText, which stores it in the tree.
        certain: Whether the optimizer's empty states are known, and with them the
            lengths of its lists. A bare `nnx.State` does not tell.
    """

    tree: Nested
    random: Mapping[Path, Any]
    certain: bool


def is_nnx(item: Any) -> bool:
    """Tells whether an item holds NNX state; anything else is stored as it is."""
    return holds_nnx(item)


def to_linen_tree(item: Any, flavour: Flavour = "linen", tx: Transformation | None = None) -> Nested:
    """Returns the tree that a Linen program would have stored; see `arrange`."""
    return arrange(item, flavour, tx).tree


def arrange(
    item: Any, flavour: Flavour = "linen", tx: Transformation | None = None, like: Any = None
) -> LinenTree:
    """Arranges NNX state as a Linen program stores it.

    Caches and intermediates are left out: the program computes them again.

    Args:
        item: An `nnx.State`, `nnx.Module`, `nnx.Optimizer`, or a tuple or dict of
            these.
        flavour: `linen`: a Flax `TrainState`, or a variables dict where there is no
            optimizer. `maxtext`: MaxText's train state.
        tx: The optimizer's transformation. Needed for the empty states of a bare
            `nnx.State`; modules carry theirs.
        like: Where the item is a tree of save args, what they are for: `tx` sees the
            shapes of its parameters.

    Raises:
        ValueError: The item holds two optimizers, two leaves of it would get one
            name, or `tx` does not fit.
    """
    parts = take_apart(item)
    write_model = _maxtext_model if flavour == "maxtext" else _linen_model
    tree, leftovers = write_model(parts.model)
    leftovers = {("model", *path): leaf for path, leaf in leftovers.items()} | _lasting(parts.outside)
    random = (
        {} if flavour == "maxtext" else {p: v for p, v in leftovers.items() if isinstance(v, nnx.RngState)}
    )
    kept = {path: _value(leaf) for path, leaf in leftovers.items() if path not in random}
    if tx is not None and parts.opt_state is not None:
        model = parts.model if like is None else take_apart(like).model
        parts = dataclasses.replace(parts, opt_state=with_containers(parts.opt_state, tx, model))
    tree |= _optimizer(parts, flavour)
    if kept:
        tree[AUX] = nest_as_is(kept)
    certain = parts.opt_state is None or keeps_containers(parts.opt_state)
    return LinenTree(tree=tree, random={path: _value(leaf) for path, leaf in random.items()}, certain=certain)


def _linen_model(leaves: Leaves) -> tuple[Nested, Leaves]:
    """Returns one subtree for each collection, and what belongs to none."""
    collections: dict[str, Leaves] = {}
    leftovers: Leaves = {}
    wrapped = in_linen_wrappers(leaves)
    for path, leaf in _lasting(leaves).items():
        place = wrapped.get(path, path)
        collection = _collection(leaf) if path not in wrapped or not is_scale(place) else "params"
        if collection is None:
            leftovers[path] = leaf
        else:
            collections.setdefault(collection, {})[place] = _value(leaf)
    return {name: nest(part.items()) for name, part in collections.items()}, leftovers


def _collection(leaf: Any) -> str | None:
    return None if isinstance(leaf, nnx.RngState) else collection_of(cast("type[Any]", type(leaf)))


def _maxtext_model(leaves: Leaves) -> tuple[Nested, Leaves]:
    """Returns the weights below `params/params`; MaxText keeps everything else aside."""
    lasting = _lasting(leaves)
    weights = _of_kind(lasting, nnx.Param)
    leftovers = {path: leaf for path, leaf in lasting.items() if path not in weights}
    tree = {"params": {"params": nest((p, _value(leaf)) for p, leaf in weights.items())}} if weights else {}
    return tree, leftovers


def _optimizer(parts: Parts, flavour: Flavour) -> Nested:
    tree: Nested = {}
    if parts.opt_state is not None:
        # MaxText's optimizer runs on the variables dict, so its moments have the collection's level.
        writer = OptaxTree(
            parameters=frozenset(canonical(path) for path in parts.model),
            wrap=(lambda like: {"params": like}) if flavour == "maxtext" else (lambda like: like),
        )
        tree["opt_state"] = writer.write(parts.opt_state)
    if parts.step is not None:
        tree["step"] = _value(parts.step)
    return tree


def _lasting(leaves: Leaves) -> Leaves:
    return {path: leaf for path, leaf in leaves.items() if not isinstance(leaf, nnx.Cache | nnx.Intermediate)}


def _of_kind(leaves: Leaves, kind: type[Any]) -> Leaves:
    return {path: leaf for path, leaf in leaves.items() if isinstance(leaf, kind)}


def _value(leaf: Any) -> Any:
    return cast(Any, leaf).get_raw_value() if isinstance(leaf, nnx.Variable) else leaf
