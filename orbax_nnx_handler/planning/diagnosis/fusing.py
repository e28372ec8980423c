"""Several weights of one module that are one array on the other side: queries, keys and values, gates."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from orbax_nnx_handler.planning.diagnosis.arrangement_causes import Fused
from orbax_nnx_handler.planning.diagnosis.causes import Cause
from orbax_nnx_handler.planning.diagnosis.scene import Scene, Tokens
from orbax_nnx_handler.planning.leaves import Shape
from orbax_nnx_handler.planning.paths import Path, is_number

Siblings = Mapping[str, Path]
"""Weights of one kind below one parent, by the name of their module."""


@dataclasses.dataclass(frozen=True)
class _Join:
    """How several arrays make one.

    Attributes:
        whole: The name of the one.
        parts: The names of the several, in order.
        leaf: What all of them end in (`kernel`).
        axis: Along which axis.
        shape: The shape of the one.
        shapes: Those of the several.
    """

    whole: str
    parts: tuple[str, ...]
    leaf: str
    axis: int
    shape: Shape
    shapes: tuple[Shape, ...]


def find_fused(scene: Scene) -> Iterable[Cause]:
    """Yields weights that are one array on one side and several on the other."""
    wanted = _siblings({path: scene.below[path] for path in scene.missing_weights})
    stored = _siblings({path: scene.stored_below(item) for path, item in scene.free_weights.items()})
    found: dict[tuple[_Join, str], list[Path]] = defaultdict(list)
    for place in wanted.keys() & stored.keys():
        sides = (("checkpoint", stored[place], wanted[place]), ("target", wanted[place], stored[place]))
        for side, wholes, parts in sides:
            for join, path in _joins(scene, place[1], wholes, parts):
                found[join, side] += [path, *(parts[name] for name in join.parts)]
    for (join, side), paths in found.items():
        yield _cause(scene, join, side, paths)


def _joins(scene: Scene, leaf: str, wholes: Siblings, parts: Siblings) -> Iterable[tuple[_Join, Path]]:
    for whole, path in wholes.items():
        names = _spelled(whole, parts) or sorted(parts)
        shape, shapes = scene.shape(path), tuple(scene.shape(parts[name]) for name in names)
        axes = [
            axis
            for axis in range(len(shape))
            if _end_to_end(shape, shapes, axis) or _side_by_side(shape, shapes, axis)
        ]
        # Along which of two axes, no shape tells.
        if len(names) > 1 and len(axes) == 1:
            yield _Join(whole, tuple(names), leaf, axes[0], shape, shapes), path


def _siblings(leaves: Mapping[Path, Tokens]) -> Mapping[tuple[Tokens, str], Siblings]:
    found: dict[tuple[Tokens, str], dict[str, Path]] = defaultdict(dict)
    for path, tokens in leaves.items():
        if len(tokens) > 1 and not is_number(tokens[-2]):
            found[tokens[:-2], tokens[-1]][tokens[-2]] = path
    return found


def _spelled(whole: str, names: Iterable[str]) -> list[str]:
    """Returns the parts that a name spells, in its order (`qkv`, `gate_up`); empty if it spells none."""
    every = sorted(names)
    for beginnings in (whole.split("_"), list(whole)):
        found = [[name for name in every if name.startswith(part)] for part in beginnings]
        if len(found) > 1 and all(len(each) == 1 for each in found):
            return [each[0] for each in found]
    return []


def _end_to_end(whole: Shape, parts: Sequence[Shape], axis: int) -> bool:
    if any(len(part) != len(whole) for part in parts):
        return False
    others = {(*part[:axis], *part[axis + 1 :]) for part in parts}
    return (
        others == {(*whole[:axis], *whole[axis + 1 :])} and sum(part[axis] for part in parts) == whole[axis]
    )


def _side_by_side(whole: Shape, parts: Sequence[Shape], axis: int) -> bool:
    return whole[axis] == len(parts) and set(parts) == {(*whole[:axis], *whole[axis + 1 :])}


def _cause(scene: Scene, join: _Join, side: str, paths: Sequence[Path]) -> Fused:
    lost = [path for path in paths if path in scene.missing]
    return Fused(
        paths=(*scene.with_moments(lost), *(path for path in paths if path not in scene.missing)),
        whole=join.whole,
        parts=join.parts,
        side=side,
        shape=join.shape,
        part_shape=join.shapes[0],
        count=len(paths) // (len(join.parts) + 1),
        rules=_rules(join, side),
        ordered=bool(_spelled(join.whole, join.parts)),
    )


def _rules(join: _Join, side: str) -> tuple[str, ...]:
    whole, parts = f"{join.whole}/{join.leaf}", tuple(f"{name}/{join.leaf}" for name in join.parts)
    part, axis = join.shapes[0], join.axis
    stacked = len(part) < len(join.shape)
    if side == "checkpoint":
        sizes = tuple(shape[axis] for shape in join.shapes) if len(set(join.shapes)) > 1 else None
        by = f", sizes={sizes}" if sizes else ""
        split = f"Split({whole!r}, {parts!r}, axis={axis}{by})"
        return (split, *(f"Reshape({name!r}, {part})" for name in parts if stacked))
    one = (*part[:axis], 1, *part[axis:])
    fuse = f"Fuse({parts!r}, {whole!r}, axis={axis})"
    return (*(f"Reshape({name!r}, {one})" for name in parts if stacked), fuse)
