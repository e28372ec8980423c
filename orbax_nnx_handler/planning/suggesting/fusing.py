"""Parts that one side keeps in one array and the other apart: query, key and value; gate and up."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

from orbax_nnx_handler.planning.rules import Fuse, Rule, Split
from orbax_nnx_handler.planning.suggesting.parts import Leaf, Link, ModulePart, Names
from orbax_nnx_handler.planning.suggesting.roles import Role
from orbax_nnx_handler.planning.suggesting.shapes import Joint, joints
from orbax_nnx_handler.planning.suggesting.words import MARGIN, exclude, likeness


def joined_parts(wanted: Sequence[Role], stored: Sequence[Role]) -> tuple[list[Link], list[Role], list[Role]]:
    """Returns the links of parts that one side keeps in one array, and what is left of both sides."""
    links: list[Link] = []
    left, right = list(wanted), list(stored)
    for split in (False, True):
        wholes, singles = (right, left) if split else (left, right)
        before = -1
        while before < len(links):  # What one whole takes may tell the parts of another.
            before = len(links)
            for whole in [role for role in wholes if role.fused]:
                links += _joined_once(whole, wholes, singles, split)
    return links, left, right


def _joined_once(whole: Role, wholes: list[Role], singles: list[Role], split: bool) -> list[Link]:
    """Returns the links of a fused part, and takes what they are about from both sides."""
    parts = _single_parts(whole, singles)
    found = [] if parts is None else _links_of(whole, parts, split)
    if parts is not None and found:
        wholes.remove(whole)
        used = {id(leaf) for link in found for leaf in (link.wanted if split else link.stored)}
        for part in parts:
            singles.remove(part)
            singles += _rest(part, used)
    return found


def _rest(role: Role, used: Collection[int]) -> list[Role]:
    """Returns what a part holds beside what is fused: a bias of queries where keys have none."""
    left = {kind: leaf for kind, leaf in role.part.leaves.items() if id(leaf) not in used}
    return [dataclasses.replace(role, part=ModulePart(role.part.names, left))] if left else []


def _single_parts(whole: Role, singles: Sequence[Role]) -> list[Role] | None:
    """Returns the parts that a fused one holds, where one module alone has them all."""
    modules: dict[Any, list[Role]] = {}
    for role in singles:
        if not role.fused:
            modules.setdefault(role.part.module, []).append(role)
    found: list[tuple[float, list[Role]]] = []
    for members in modules.values():
        chosen = [
            [role for role in members if name in role.said and not role.part.is_norm] for name in whole.fused
        ]
        if all(len(each) == 1 for each in chosen):
            parts = [each[0] for each in chosen]
            rest = whole.said - set(whole.fused)
            if not any(exclude(rest, part.said - set(whole.fused)) for part in parts):
                found.append((max(likeness(rest, part.said) for part in parts), parts))
    found.sort(key=lambda item: -item[0])
    if not found or (len(found) > 1 and found[0][0] - found[1][0] < MARGIN):
        return None
    return found[0][1]


def _links_of(whole: Role, parts: Sequence[Role], split: bool) -> list[Link]:
    """Returns the links of a fused part, leaf by leaf; nothing where shapes do not come out."""
    found: list[Link] = []
    for kind, leaf in whole.part.leaves.items():
        singles = [part.part.leaves[kind] for part in parts if kind in part.part.leaves]
        if not singles and kind != "main":
            continue
        joint = _joint(leaf, singles, split, whole.fact == "Gemma") if len(singles) == len(parts) else None
        if joint is None:
            return []
        found.append(
            Link(
                wanted=tuple(singles) if split else (leaf,),
                stored=(leaf,) if split else tuple(singles),
                grounds="fact" if whole.fact else "names",
                ways=joint.parts,
                joint=joint,
                fact=whole.fact,
            )
        )
    return found


def _joint(whole: Leaf, parts: Sequence[Leaf], split: bool, is_first: bool) -> Joint | None:
    options = list(joints([part.shape for part in parts], whole.shape, split=split))
    kept = [joint for joint in options if joint.is_new] or options
    if is_first:
        kept = [joint for joint in kept if joint.axis == 0]
    return kept[0] if len(kept) == 1 else None


def joining_rule(
    link: Link, stored: Sequence[Names], wanted: Sequence[Names], kept: int = 0
) -> tuple[Rule, Sequence[Names]]:
    """Returns the rule of a fuse or a split, and the paths of what comes out of it.

    Args:
        link: What is fused or split.
        stored: The paths of its stored leaves, as the rules before it have left them.
        wanted: The paths that its wanted leaves are to have in the end.
        kept: How many of the names above all of them the rule repeats.
    """
    assert link.joint is not None
    axis, sizes, is_new = link.joint.axis, link.joint.sizes, link.joint.is_new
    if link.is_split:
        intos = [(*stored[0][:-2], *aim[-2:]) for aim in wanted]
        pieces, whole = _cut_alike(intos, stored[0], kept)
        return Split("/".join(whole), tuple(map("/".join, pieces)), axis, sizes, drop_axis=is_new), intos
    shared = _common(stored)
    into = (*shared, *wanted[0][len(shared) - len(stored[0]) :])
    pieces, whole = _cut_alike(stored, into, kept)
    return Fuse(tuple(map("/".join, pieces)), "/".join(whole), axis, sizes, new_axis=is_new), [into]


def _common(paths: Sequence[Names]) -> Names:
    shortest = min(map(len, paths))
    same = next((at for at in range(shortest) if len({path[at] for path in paths}) > 1), shortest)
    return paths[0][:same]


def _cut_alike(parts: Sequence[Names], whole: Names, kept: int) -> tuple[list[Names], Names]:
    """Cuts what all paths share at their beginning; a kernel and a bias lie along other axes."""
    before = max(len(_common([*parts, whole])) - kept, 0)
    return [path[before:] for path in parts], whole[before:]
