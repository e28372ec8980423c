"""Layers of a group stacked into one leaf, or taken apart, without a target to compare with."""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from orbax_nnx_handler.planning.aligning import aligned
from orbax_nnx_handler.planning.conversion import Written
from orbax_nnx_handler.planning.errors import RestoreError
from orbax_nnx_handler.planning.folding import Row
from orbax_nnx_handler.planning.numbered import ranges
from orbax_nnx_handler.planning.paths import Path, render, segments
from orbax_nnx_handler.planning.recipes import Index, Stack

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
            f"the leaves of {'/'.join(group)} do not agree on a number of layers on axis {axis}:\n{rows}\n"
            "hint: another --axis, or --weights-only where the odd ones are an optimizer's.",
            paths=[leaf.path for leaf in inside],
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
        f"no parameter lies under {looked_for}.\n"
        f"hint: a group is a path below the collection; there are: {', '.join(tops[:20])}."
    )
