"""What a converted checkpoint holds: every leaf, and the stored leaves it is made from.

There is no target to compare with: layers are stacked or taken apart as the arguments say, and a
tree of bare weights is searched for what shows that an NNX program saved it.
"""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Literal, cast

import jax.numpy as jnp
import numpy as np

from orbax_nnx_handler.planning import layouts
from orbax_nnx_handler.planning.core.dtypes import cast_between, is_key, scales_of
from orbax_nnx_handler.planning.core.errors import DtypeMismatchError, Hint, RestoreError
from orbax_nnx_handler.planning.core.folding import Row, ranges
from orbax_nnx_handler.planning.core.leaves import StoredLeaf
from orbax_nnx_handler.planning.core.lines import aligned
from orbax_nnx_handler.planning.core.paths import Path, canonical, render, segments
from orbax_nnx_handler.planning.core.recipes import Index, Read, Stack, reads
from orbax_nnx_handler.planning.layouts.layout import Placement, Section, Stored
from orbax_nnx_handler.planning.mapping.optimizers.states import parameter_paths
from orbax_nnx_handler.planning.plan import RestorePlan
from orbax_nnx_handler.planning.rules.entries import model_entries
from orbax_nnx_handler.planning.target.roles import roles_of
from orbax_nnx_handler.storage.converting.written import Written

# What stands side by side in NNX and never among the parameters of a Linen program: the fused gates of
# a cell, the statistics of a normalisation.
_TOGETHER = (("dense_i", "dense_h"), ("mean", "var"))


def marks_of_nnx(paths: Iterable[Path]) -> list[Path]:
    """Returns the paths that only NNX gives; a Linen program has other names or other collections.

    Args:
        paths: The paths of a model's leaves below any collection.
    """
    listed = {path: segments(path) for path in paths}
    names: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for keys in listed.values():
        for depth, key in enumerate(keys):
            names[keys[:depth]].add(key)
    return [path for path, keys in listed.items() if _is_marked(keys, names)]


def _is_marked(keys: tuple[str, ...], names: dict[tuple[str, ...], set[str]]) -> bool:
    # Linen numbers modules in the name, NNX lists in the path.
    return any(
        key.isdecimal() or any(key in pair and names[keys[:depth]] >= set(pair) for pair in _TOGETHER)
        for depth, key in enumerate(keys)
    )


Flavour = Literal["linen", "maxtext"]

# Layouts whose optimizer state has the shape that optax gives it.
_OPTAX = frozenset({"train_state", "maxtext", "variables", "params"})

WITHOUT_COLLECTIONS = frozenset({"nnx_state", "nnx_pure_dict"})
"""Layouts under NNX's names, which keep variables of all types together."""


def every_leaf(stored: Stored, layout: str = "auto") -> list[Written]:
    """Returns the leaves of a checkpoint as they are.

    Raises:
        UnknownLayoutError: The tree is in no known layout.
        RestoreError: A leaf is no array.
    """
    odd = [leaf.path for leaf in stored.values() if leaf.dtype is None]
    if odd:
        raise _refusal("leaves are strings, which cannot be converted", odd)
    placements = layouts.candidates(stored, layout)[0].place(stored)
    parameters = set(parameter_paths(model_entries(placements), ()))
    return [_written(placement, parameters) for placement in placements]


def _written(placement: Placement, parameters: set[tuple[str, ...]]) -> Written:
    leaf = placement.leaf
    return Written(
        path=leaf.path,
        recipe=Read(leaf.path),
        shape=leaf.shape,
        dtype=cast("np.dtype[Any]", leaf.dtype),
        section=placement.section,
        collection=placement.collection,
        parameter=_parameter(placement, parameters),
    )


def _parameter(placement: Placement, parameters: set[tuple[str, ...]]) -> Path | None:
    if placement.section == "model":
        return placement.path
    if placement.section != "optimizer" or placement.slot is not None:
        return None
    path = placement.path
    return next((path[at:] for at in range(len(path)) if canonical(path[at:]) in parameters), None)


def planned_leaves(plan: RestorePlan) -> list[Written]:
    """Returns the leaves that a plan restores, under their wanted paths."""
    sections: dict[str, Section] = {"optimizer": "optimizer", "step": "step"}
    roles = {item.leaf.path: item.role for item in roles_of({p: i.wanted for p, i in plan.restored.items()})}
    return [
        Written(
            path=path,
            recipe=item.recipe,
            shape=item.wanted.shape,
            dtype=item.dtype,
            section=sections.get(roles[path], "model"),
        )
        for path, item in plan.restored.items()
    ]


def weights_only(leaves: Iterable[Written]) -> list[Written]:
    """Returns the leaves of the model: no optimizer, no step."""
    return [leaf for leaf in leaves if leaf.section == "model"]


def with_dtype(leaves: Iterable[Written], dtype: np.dtype[Any] | None) -> list[Written]:
    """Returns the leaves with floating-point weights in another dtype; moments and counts keep theirs."""
    return [
        dataclasses.replace(leaf, dtype=dtype)
        if dtype is not None and takes_dtype(leaf.section, leaf.dtype)
        else leaf
        for leaf in leaves
    ]


def check_codes(leaves: Iterable[Written], stored: Stored) -> None:
    """Raises where codes of a quantised leaf would become floats of another type.

    Raises:
        DtypeMismatchError: Names the leaves.
    """
    scales = scales_of(stored.values())
    bad = [leaf for leaf in leaves if _changed(leaf, stored) & scales.keys()] if scales else []
    if bad:
        rows = aligned(Row(leaf.path, (str(leaf.shape), str(leaf.dtype))) for leaf in bad)
        beside = render(next(scales[path][0] for path in reads(bad[0].recipe) if path in scales))
        raise DtypeMismatchError(
            f"{len(bad)} leaves are quantised, with scales such as {beside} beside them:\n{rows}",
            paths=[leaf.path for leaf in bad],
            hints=["leave --dtype out: codes of another dtype are no weights either."],
        )


def rounded(leaves: Iterable[Written], stored: Stored) -> list[Path]:
    """Returns the leaves that are written in a narrower floating-point type than they are stored in."""
    return [
        leaf.path
        for leaf in leaves
        if any(
            not is_key(leaf.dtype) and cast_between(_dtype(stored[path]), leaf.dtype, False) == "narrower"
            for path in _changed(leaf, stored)
        )
    ]


def _changed(leaf: Written, stored: Stored) -> set[Path]:
    """Returns the stored leaves that a leaf is made from and that have another dtype."""
    return {path for path in reads(leaf.recipe) if stored[path].dtype not in (None, leaf.dtype)}


def _dtype(leaf: StoredLeaf) -> np.dtype[Any]:
    return cast("np.dtype[Any]", leaf.dtype)


def takes_dtype(section: Section, dtype: np.dtype[Any]) -> bool:
    """Tells a floating-point weight."""
    return section == "model" and not is_key(dtype) and jnp.issubdtype(dtype, jnp.floating)


def in_layout(leaves: Iterable[Written], layout: str, flavour: Flavour) -> list[Written]:
    """Returns the leaves where another family of Linen programs keeps them.

    Args:
        leaves: What `every_leaf` returned.
        layout: Name of the layout that they are in.
        flavour: `linen` (Flax TrainState) or `maxtext`.

    Raises:
        RestoreError: The layout does not tell what Linen needs to know.
    """
    leaves = list(leaves)
    if layout in WITHOUT_COLLECTIONS:
        raise RestoreError(
            "a saved NNX state does not tell parameters from statistics, so its layout cannot change alone.",
            hints=[
                Hint(
                    "give the factory of the model too (SRC DST MODULE:FACTORY --to linen); its Variable "
                    "types tell the collections, and its modules what Linen stores in another form."
                )
            ],
        )
    foreign = [leaf.path for leaf in leaves if leaf.section == "optimizer" and layout not in _OPTAX]
    if foreign:
        raise _refusal(
            "optimizer leaves are not arranged as optax arranges them", foreign, "pass --weights-only."
        )
    return [_moved(leaf, ("params",) if flavour == "maxtext" else ()) for leaf in leaves]


def check_linen_names(leaves: Iterable[Written]) -> None:
    """Raises where bare weights are under names that NNX gives.

    Raises:
        RestoreError: Names the leaves.
    """
    marked = marks_of_nnx(leaf.parameter for leaf in leaves if leaf.parameter and leaf.section == "model")
    if marked:
        raise _refusal(
            "leaves are named as NNX names them, so parameters and statistics cannot be told apart",
            marked,
            "give the factory of the model too (SRC DST MODULE:FACTORY --to linen); "
            "--layout params where a Linen program wrote this all the same.",
        )


def _moved(leaf: Written, level: Path) -> Written:
    if leaf.parameter is None:
        return leaf
    if leaf.section == "model":
        path = (*level, leaf.collection or "params", *leaf.parameter)
    else:
        # The optimizer of MaxText runs on the whole variables dict: `mu/params/...`.
        slot = leaf.above[:-1] if leaf.above[-1:] == ("params",) else leaf.above
        path = (*slot, *level, *leaf.parameter)
    return dataclasses.replace(leaf, path=path)


def check_distinct(leaves: Iterable[Written]) -> None:
    """Raises where two leaves would be written to one path.

    Raises:
        RestoreError: Names the paths.
    """
    seen: set[Path] = set()
    twice: list[Path] = []
    for leaf in leaves:
        (twice.append if leaf.path in seen else seen.add)(leaf.path)
    if twice:
        raise _refusal("leaves would be written to a path that another leaf has", twice)


def _refusal(what: str, paths: list[Path], hint: str = "") -> RestoreError:
    shown = "\n".join(f"  {render(path)}" for path in paths[:20])
    rest = f"\n  ... and {len(paths) - 20} more" if len(paths) > 20 else ""
    return RestoreError(f"{len(paths)} {what}:\n{shown}{rest}", paths=paths, hints=[hint] if hint else [])


_Group = tuple[str, ...]


def unscan(leaves: Iterable[Written], group: _Group, axis: int) -> list[Written]:
    """Returns the leaves with a stacked group taken apart: `layers/...` becomes `layers_0/...`.

    Args:
        leaves: The leaves.
        group: The group's path below the collection, such as `("decoder", "layers")`.
        axis: The axis that counts the layers.

    Raises:
        RestoreError: There is no such group, or its leaves hold different numbers of layers.
    """
    leaves = list(leaves)
    inside = [leaf for leaf in leaves if _starts_with(leaf, group)]
    if not inside:
        raise _no_group(leaves, group, "/".join(group))
    thin = [leaf for leaf in inside if len(leaf.shape) <= axis]
    if thin or len({leaf.shape[axis] for leaf in inside}) > 1:
        rows = aligned(Row(leaf.path, (str(leaf.shape),)) for leaf in inside)
        raise RestoreError(
            f"the leaves of {'/'.join(group)} do not agree on a number of layers on axis {axis}:\n{rows}",
            paths=[leaf.path for leaf in inside],
            hints=["another --axis, or --weights-only where the odd ones are an optimizer's."],
        )
    return [part for leaf in leaves for part in (_layers(leaf, group, axis) if leaf in inside else [leaf])]


def _layers(leaf: Written, group: _Group, axis: int) -> list[Written]:
    shape = (*leaf.shape[:axis], *leaf.shape[axis + 1 :])
    return [
        dataclasses.replace(
            _renamed(leaf, len(group) - 1, f"{group[-1]}_{number}"),
            recipe=Index(leaf.recipe, axis, number),
            shape=shape,
        )
        for number in range(leaf.shape[axis])
    ]


def scan(leaves: Iterable[Written], group: _Group, axis: int) -> list[Written]:
    """Returns the leaves with the layers of a group stacked: `layers_0/...` becomes `layers/...`.

    Args:
        leaves: The leaves.
        group: The group's path below the collection, such as `("decoder", "layers")`.
        axis: Where the axis that counts the layers goes.

    Raises:
        RestoreError: There is no such group, a layer is missing, or layers differ.
    """
    leaves = list(leaves)
    found: dict[Path, dict[int, Written]] = defaultdict(dict)
    for leaf in leaves:
        number = _number(leaf, group)
        if number is not None:
            found[_renamed(leaf, len(group) - 1, group[-1]).path][number] = leaf
    if not found:
        raise _no_group(leaves, group, "/".join(group) + "_0")
    stacked = {path: _stacked(path, layers, group, axis) for path, layers in found.items()}
    kept: list[Written] = []
    for leaf in leaves:
        number = _number(leaf, group)
        if number is None:
            kept.append(leaf)
        elif number == 0:
            kept.append(stacked[_renamed(leaf, len(group) - 1, group[-1]).path])
    return kept


def _stacked(path: Path, layers: dict[int, Written], group: _Group, axis: int) -> Written:
    parts = [layers[number] for number in sorted(layers)]
    if sorted(layers) != list(range(len(layers))):
        raise RestoreError(f"{render(path)} is stored for the layers {ranges(layers)} only.", paths=[path])
    kinds = {(part.shape, str(part.dtype)) for part in parts}
    if len(kinds) > 1 or axis > len(parts[0].shape):
        rows = aligned(Row(part.path, (str(part.shape), str(part.dtype))) for part in parts)
        raise RestoreError(f"layers cannot be stacked on axis {axis}:\n{rows}", paths=[path])
    shape = parts[0].shape
    return dataclasses.replace(
        _renamed(parts[0], len(group) - 1, group[-1]),
        recipe=Stack(tuple(part.recipe for part in parts), axis),
        shape=(*shape[:axis], len(parts), *shape[axis:]),
    )


def _starts_with(leaf: Written, group: _Group) -> bool:
    keys = segments(leaf.parameter or ())
    return len(keys) > len(group) and keys[: len(group)] == group


def _number(leaf: Written, group: _Group) -> int | None:
    """Returns which layer of the group a leaf belongs to."""
    keys = segments(leaf.parameter or ())
    if len(keys) <= len(group) or keys[: len(group) - 1] != group[:-1]:
        return None
    match = re.fullmatch(rf"{re.escape(group[-1])}_(\d+)", keys[len(group) - 1])
    return int(match[1]) if match else None


def _renamed(leaf: Written, at: int, name: str) -> Written:
    parameter = leaf.parameter or ()
    parameter = (*parameter[:at], name, *parameter[at + 1 :])
    return dataclasses.replace(leaf, path=(*leaf.above, *parameter), parameter=parameter)


def _no_group(leaves: Sequence[Written], group: _Group, looked_for: str) -> RestoreError:
    tops = sorted({"/".join(segments(leaf.parameter)[: len(group)]) for leaf in leaves if leaf.parameter})
    return RestoreError(
        f"no parameter lies under {looked_for}.",
        hints=[f"a group is a path below the collection; there are: {', '.join(tops[:20])}."],
    )
