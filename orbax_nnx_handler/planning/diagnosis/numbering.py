"""Layers that are stacked on one side only, or numbered from another beginning."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from orbax_nnx_handler.planning.diagnosis.causes import Cause
from orbax_nnx_handler.planning.diagnosis.depth import name_of_group
from orbax_nnx_handler.planning.diagnosis.name_causes import LayersShifted
from orbax_nnx_handler.planning.diagnosis.scene import Scene
from orbax_nnx_handler.planning.diagnosis.size_causes import ScannedOnOneSide
from orbax_nnx_handler.planning.layers import Group, flat_seats, seats
from orbax_nnx_handler.planning.paths import Path, segments


def find_scanned(scene: Scene) -> Iterable[Cause]:
    """Yields groups that are stacked on one side only and were not rearranged."""
    wanted = {path: scene.below[path] for path in scene.missing_weights}
    stored = {path: scene.stored_below(item) for path, item in scene.free_weights.items()}
    for side, stacked, flat in (("checkpoint", stored, wanted), ("target", wanted, stored)):
        stacks = {
            (s.group, s.rest): p
            for p, tokens in stacked.items()
            for s in seats(tokens)
            if s.form == "stacked"
        }
        found: dict[Group, list[tuple[Path, Path]]] = defaultdict(list)
        for path, tokens in flat.items():
            for seat in flat_seats(tokens):
                if (seat.group, seat.rest) in stacks:
                    found[seat.group].append((stacks[seat.group, seat.rest], path))
        for group, pairs in found.items():
            explained = [path for pair in pairs for path in pair]
            lost = [path for path in dict.fromkeys(explained) if path in wanted]
            rest = [path for path in dict.fromkeys(explained) if path not in wanted]
            yield ScannedOnOneSide(
                paths=(*scene.with_moments(lost), *rest),
                group=name_of_group(group),
                stacked=side,
                why=_why(scene, *pairs[0]),
            )


def _why(scene: Scene, stacked: Path, flat: Path) -> str:
    whole, layer = scene.shape(stacked), scene.shape(flat)
    slices = {(*whole[:axis], *whole[axis + 1 :]) for axis in range(len(whole))}
    if layer not in slices:
        return f"{whole} without any one axis is not {layer}"
    return "the layers of other leaves of the group do not come out"


def find_shifted(scene: Scene) -> Iterable[Cause]:
    """Yields groups of as many layers on both sides that are numbered from another beginning."""
    if not scene.missing_weights or not scene.free_weights:
        return
    wanted = _numbers(scene.below)
    stored = _numbers({path: scene.stored_below(item) for path, item in scene.stored_weights.items()})
    for group in wanted.keys() & stored.keys():
        ours, theirs = wanted[group], stored[group]
        lost = [path for at in ours.keys() - theirs.keys() for path in ours[at] if path in scene.missing]
        free = [path for at in theirs.keys() - ours.keys() for path in theirs[at] if path in scene.unexpected]
        if lost and free and len(ours) == len(theirs) and _is_run(ours) and _is_run(theirs):
            pattern = _pattern(free[0], group)
            if pattern:
                yield LayersShifted(
                    paths=(*scene.with_moments(lost), *free),
                    group=name_of_group(group),
                    pattern=pattern,
                    stored=min(theirs),
                    wanted=min(ours),
                    count=len(ours),
                )


def _numbers(leaves: Mapping[Path, tuple[str, ...]]) -> Mapping[Group, Mapping[int, list[Path]]]:
    found: dict[Group, dict[int, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for path, tokens in leaves.items():
        for seat in flat_seats(tokens):
            found[seat.group][seat.position].append(path)
    return found


def _is_run(numbers: Iterable[int]) -> bool:
    ordered = sorted(numbers)
    return ordered == list(range(ordered[0], ordered[0] + len(ordered)))


def _pattern(path: Path, group: Group) -> str:
    """Returns how the checkpoint writes one layer of a group, `layers_{}`; empty for a number alone."""
    names = [part for part in segments(path) if re.fullmatch(re.escape(group.name) + r"_\d+", part)]
    return f"{group.name}_{{}}" if names else ""
