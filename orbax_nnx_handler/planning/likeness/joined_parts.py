"""How several parts lie in one array, by which recipe; last, what else a table makes."""

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from orbax_nnx_handler.planning.core.leaves import permuted
from orbax_nnx_handler.planning.core.paths import shared_levels
from orbax_nnx_handler.planning.likeness import in_list
from orbax_nnx_handler.planning.likeness.assignment import ways_of_heads
from orbax_nnx_handler.planning.likeness.links import Findings, Link, Tie
from orbax_nnx_handler.planning.likeness.module_parts import Leaf, ModulePart, module_parts, part_of, prefixes
from orbax_nnx_handler.planning.likeness.named_parts import NamedPart
from orbax_nnx_handler.planning.likeness.shapes import (
    Joint,
    Step,
    Way,
    arrangements,
    joints,
    several_times,
    transposed,
    ways,
    without_axis,
)
from orbax_nnx_handler.planning.likeness.vocabulary import (
    MARGIN,
    PYTORCHS,
    Concepts,
    Names,
    concepts,
    counts_of,
    exclude,
    likeness,
    words,
)
from orbax_nnx_handler.planning.rules import Fuse, Rule, Split
from orbax_nnx_handler.planning.rules.split_and_fuse import cut_alike

_Roles = Sequence[NamedPart]
_READINGS = 6


def joined_parts(
    wanted: Sequence[NamedPart], stored: Sequence[NamedPart]
) -> tuple[list[Link], list[Tie], list[NamedPart], list[NamedPart]]:
    """Returns the links of parts that one side keeps in one array, what they leave open, and what is left."""
    ties, left, right = list[Tie](), list(wanted), list(stored)
    links = [*_heads_apart(left, right, split=False), *_heads_apart(right, left, split=True)]
    for split in (False, True):
        wholes, singles = (right, left) if split else (left, right)
        before = -1
        while before < len(links) + len(ties):  # What one whole takes may tell the parts of another.
            before = len(links) + len(ties)
            for whole, parts, found, tie in _claims(wholes, singles, split):
                links += found
                ties += [tie] if tie is not None else []
                wholes.remove(whole)
                about = tie.readings[0] if tie is not None else found
                used = {id(leaf) for link in about for leaf in (link.wanted if split else link.stored)}
                for part in parts:
                    singles.remove(part)
                    singles += _rest(part, used)
    return links, ties, left, right


def either_way(
    wanted: Sequence[NamedPart], stored: Sequence[NamedPart], modules: Collection[tuple[Names, Names]]
) -> Iterator[Tie]:
    """Yields an array of all parts on both sides that one of them may keep head by head.

    The only one, or one in modules that are each other's.
    """
    held = defaultdict[tuple[bool, tuple[str, ...]], list[NamedPart]](list)
    for part in stored:
        held[bool(part.untold), part.untold or part.fused].append(part)
    # Only one of the two says how its parts lie.
    pairs = [(one, other) for one in wanted for other in held[not one.untold, one.untold or one.fused]]
    for one, other in pairs:
        is_one = len(pairs) == 1 or (one.part.module, other.part.module) in modules
        shapes = ({kind: leaf.shape for kind, leaf in x.part.leaves.items()} for x in (one, other))
        if is_one and next(shapes) == next(shapes):
            links = [
                Link(wanted=(leaf,), stored=(other.part.leaves[kind],), grounds="names", ways=((Way(()),),))
                for kind, leaf in one.part.leaves.items()
            ]
            readings = _by_head(links, one.untold or other.untold, split=bool(other.untold))
            yield Tie(wanted=(one.part.names,), stored=(other.part.names,), readings=readings)


_Claim = tuple[NamedPart, list[NamedPart], list[Link], Tie | None]


def _claims(wholes: Sequence[NamedPart], singles: Sequence[NamedPart], split: bool) -> list[_Claim]:
    """Returns fused parts with what they hold, where no other is as like the same parts; links or a tie."""
    claims, scores = list[tuple[float, _Claim]](), defaultdict[int, list[float]](list)
    kinds = [[(role.fused, role.part.main_size) for role in side if role.fused] for side in (wholes, singles)]
    for whole in wholes:
        named = dataclasses.replace(whole, fused=whole.fused or whole.untold)
        # What the other side holds in one array as well, is that.
        is_there = 0 < kinds[0].count(kind := (whole.fused, whole.part.main_size)) <= kinds[1].count(kind)
        score, parts = _single_parts(named, singles, wholes) if named.fused and not is_there else (0.0, [])
        found, tie = links_of(named, parts, split) if parts else [], None
        readings = _by_head(found, whole.untold, split=split) if whole.untold else ()
        if parts and not found:
            readings = _along_either(named, parts, split)
        if parts and not (found or readings) and split:
            readings, score = _repeated(whole, parts), score - 100  # What fits as it is goes first.
        if readings:
            ours = tuple(part.part.names for part in parts)
            found, tie = [], Tie(wanted=ours, stored=(whole.part.names,), readings=readings)
        if found or tie is not None:
            claims.append((score, (whole, parts, found, tie)))
            for part in parts:
                scores[id(part)].append(score)

    def stands(score: float, parts: Sequence[NamedPart]) -> bool:
        return all(sum(other > score - MARGIN for other in scores[id(part)]) == 1 for part in parts)

    return [claim for score, claim in claims if stands(score, claim[1])]


def _by_head(links: Sequence[Link], roles: Sequence[str], *, split: bool) -> tuple[tuple[Link, ...], ...]:
    """Returns fused parts side by side, and head by head; the number of heads may be open too."""
    joints = [link.joint for link in links if link.joint is not None]
    if not links or any(joint.is_new for joint in joints):
        return ()
    if any(joint.sizes for joint in joints):
        # Of fewer keys than queries: in groups, one for each head of the keys, where these have several.
        parts = [leaf.shape for link in links for leaf in (link.wanted if split else link.stored)]
        lengths = {shape[-1] for shape in parts if len(shape) > 2}
        is_one = any(1 in shape[1:-1] or (len(shape) == 2 and shape[-1] in lengths) for shape in parts)
        return () if is_one else (tuple(dataclasses.replace(link, told="side by side") for link in links),)
    wholes = [(link.source if split else link.target).shape for link in links]
    axes = [link.joint.axis if link.joint is not None else len(link.target.shape) - 1 for link in links]
    singles = [leaf.shape for link in links for leaf in (link.wanted if split else link.stored) if joints]
    return tuple(
        tuple(
            dataclasses.replace(link, told=told, **{"after": steps} if joints else {"ways": ((Way(steps),),)})
            for link, steps in zip(links, found, strict=True)
        )
        for told, found in itertools.islice(
            arrangements(wholes, axes, roles, singles, split=split), _READINGS
        )
    )


def _heads_apart(wholes: list[NamedPart], singles: list[NamedPart], *, split: bool) -> Iterator[Link]:
    """Yields links of queries, keys or values that the other side has in a list, those of a head in each.

    `heads/{0..7}/q` are the outputs of `q_lin`, one head after the other. What is linked is taken away.
    """
    lists = defaultdict[tuple[Names, Names], dict[int, NamedPart]](dict)
    for role in singles:
        for at, level in prefixes(role.part)[:-1]:
            is_of_heads = bool(concepts((*at, level.base)) & {"attn", "head"}) and not role.part.is_norm
            if level.number is not None and is_of_heads and len(role.said & {*"qkv"}) == 1:
                lists[at, role.part.names[len(at) + level.width :]][level.number] = role
    for held in lists.values():
        heads = [held[at] for at in sorted(held)]
        size, said = heads[0].part.main_size * len(heads), heads[0].said
        near = [x for x in wholes if x.part.main_size == size and not (x.fused or x.part.is_norm)]
        near = [x for x in near if x.said & {*"qkv"} == said & {*"qkv"} and not exclude(x.said, said)]
        links = _links_of_heads(near[0], heads, split) if len(near) == 1 < len(heads) else []
        if links:
            wholes.remove(near[0])
            for role in heads:
                singles.remove(role)
            yield from links


def _links_of_heads(whole: NamedPart, heads: Sequence[NamedPart], split: bool) -> list[Link]:
    """Returns the links of heads that are a layer's outputs; none where it is no kernel, inputs first."""
    links = list[Link]()
    for kind, leaf in whole.part.leaves.items():
        parts = tuple(head.part.leaves[kind] for head in heads if kind in head.part.leaves)
        options = list(joints([part.shape for part in parts], leaf.shape, split=split))
        found = [x for x in options if x.axis == (kind == "main")]
        found = [x for x in found if x.is_new] or found
        if len(parts) < len(heads) or len(found) != 1 or (kind == "main" and leaf.names[-1] != "kernel"):
            return []
        ends = (parts, (leaf,)) if split else ((leaf,), parts)
        links.append(
            Link(wanted=ends[0], stored=ends[1], grounds="names", ways=found[0].parts, joint=found[0])
        )
    return links


def _rest(role: NamedPart, used: Collection[int]) -> list[NamedPart]:
    """Returns what a part holds beside what is fused: a bias of queries where keys have none."""
    left = {kind: leaf for kind, leaf in role.part.leaves.items() if id(leaf) not in used}
    return [dataclasses.replace(role, part=ModulePart(role.part.names, left))] if left else []


def _single_parts(whole: NamedPart, singles: _Roles, wholes: _Roles) -> tuple[float, list[NamedPart]]:
    """Returns the parts that a fused one holds, where one module alone has them, and the likeness.

    Of `h0_attn` and `h1_attn` only one has the numbers of `h/1/attn`, where both sides count alike.
    """
    modules: dict[Any, list[NamedPart]] = {}
    for role in [role for role in singles if not role.fused]:
        modules.setdefault(role.part.module, []).append(role)
    found: list[tuple[float, list[NamedPart]]] = []
    rest, marks = whole.said - set(whole.fused), whole.part.own - set(whole.fused)
    for members in modules.values():
        for marked, parts in _by_mark(whole, members):
            if not any(exclude(rest, part.said - set(whole.fused)) for part in parts):
                is_told = marked == marks or not marked.isdisjoint(rest)
                found.append((max(likeness(rest, part.said) for part in parts) + is_told, parts))
    own = counts_of("/".join(whole.part.module))
    every = {counts_of("/".join(x.part.module)) for x in wholes if (x.fused or x.untold) == whole.fused}
    numbers = [counts_of("/".join(parts[0].part.module)) for _, parts in found]
    if len(every) > 1 and whole.way_up is None and every == {*numbers}:
        found = [each for each, held in zip(found, numbers, strict=True) if held == own]
    found.sort(key=lambda item: -item[0])
    if not found or (len(found) > 1 and found[0][0] - found[1][0] < MARGIN):
        return 0.0, []
    return found[0]


def _by_mark(whole: NamedPart, members: Sequence[NamedPart]) -> Iterator[tuple[Concepts, list[NamedPart]]]:
    """Yields parts that together are a fused one, with what else their names say: `to_q`, `add_q_proj`."""
    alike = [role for role in members if whole.part.leaves.keys() & role.part.leaves.keys()]
    chosen = [[role for role in alike if name in role.said and not role.part.is_norm] for name in whole.fused]
    if "gate" in whole.fused:  # The router of experts is called a gate too, and is smaller than one.
        largest = [max((role.part.main_size for role in each), default=0) for each in chosen]
        chosen = [
            [role for role in each if role.part.main_size == size]
            for each, size in zip(chosen, largest, strict=True)
        ]
    marks = [{role.part.own - set(whole.fused): role for role in each} for each in chosen]
    if all(len(each) == 1 for each in chosen) and len({*itertools.chain(*marks)}) == 1:
        yield next(iter(marks[0])), [each[0] for each in chosen]
    elif all(len(each) == len(marked) for each, marked in zip(chosen, marks, strict=True)):
        for mark in marks[0]:
            if all(mark in marked for marked in marks):
                yield mark, [marked[mark] for marked in marks]


def _along_either(whole: NamedPart, parts: Sequence[NamedPart], split: bool) -> tuple[tuple[Link, ...], ...]:
    """Returns how parts lie in an array with two axes as long as they are many, as three heads have."""
    made = [[(x, x.joint) for x in links_of(whole, parts, split, nth)] for nth in (0, 1)]
    told = (tuple(dataclasses.replace(x, told=f"along axis {y.axis}") for x, y in each if y) for each in made)
    return tuple(told) if all(made) else ()


def links_of(whole: NamedPart, parts: Sequence[NamedPart], split: bool, nth: int | None = None) -> list[Link]:
    """Returns the links of a fused part, along the only axis that shapes allow, or along the `nth` of two."""
    found: list[Link] = []
    for kind, leaf in whole.part.leaves.items():
        singles = [part.part.leaves[kind] for part in parts if kind in part.part.leaves]
        if len(singles) < len(parts) and kind != "main":
            continue  # A bias of queries and values, where keys have none.
        joints = _joints(leaf, singles, split, whole.fact == "Gemma") if len(singles) == len(parts) else []
        if len(joints) != (1 if nth is None else 2):
            return []
        joint = joints[nth or 0]
        if joint.is_new:
            joint = _with_named_axes(joint, leaf, parts, singles, split)
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


def _joints(whole: Leaf, parts: Sequence[Leaf], split: bool, is_first: bool) -> list[Joint]:
    options = list(joints([part.shape for part in parts], whole.shape, split=split))
    # As many layers as parts: both may be stacks of them, and then each part lies in its layer as it is.
    layers = [joint for joint in options if all(Way(()) in found for found in joint.parts)]
    kept = [joint for joint in layers or options if joint.is_new] or layers or options
    if is_first and parts[0].shape[:1] != whole.shape[:1]:  # Else both may be stacks of layers.
        kept = [joint for joint in kept if joint.axis == 0]
    return kept


def _with_named_axes(joint: Joint, whole: Leaf, roles: _Roles, parts: Sequence[Leaf], split: bool) -> Joint:
    """Returns how parts lie in a whole, where their names tell the order of axes."""
    piece = whole, without_axis(whole.shape, joint.axis)
    both = [(part.said, (leaf, leaf.shape)) for part, leaf in zip(roles, parts, strict=True)]
    made = (ways_of_heads(*((piece, one) if split else (one, piece)), said) for said, one in both)
    return dataclasses.replace(joint, parts=tuple(made))


def _repeated(whole: NamedPart, parts: Sequence[NamedPart]) -> tuple[tuple[Link, ...], ...]:
    """Returns how parts may be made of fewer heads: each several times in a row, or all of them together."""
    leaf, singles = whole.part.leaves.get("main"), [part.part.leaves.get("main") for part in parts]
    wanted = [single for single in singles if single is not None]
    if leaf is None or not {*whole.fused} <= {"k", "v"} or len({single.shape for single in wanted}) != 1:
        return ()
    shape, size = wanted[0].shape, sum(math.prod(single.shape) for single in wanted)
    times, rest = divmod(size, math.prod(leaf.shape))
    readings: list[tuple[Link, ...]] = []
    for axis, length in enumerate(shape) if times > 1 and not rest and len(wanted) == len(parts) else ():
        fewer = (*shape[:axis], length // times, *shape[axis + 1 :])
        options = joints([fewer] * len(wanted), leaf.shape, split=True) if length % times == 0 else ()
        for joint, together in itertools.product(options, (False, True)):
            made = tuple((several_times(way[0], fewer, axis, times, together),) for way in joint.parts)
            link = Link(wanted=tuple(wanted), stored=(leaf,), grounds="names", ways=made, joint=joint)
            readings += [(link,)] if joint.is_new else []
    return tuple(readings[:_READINGS])


def gated(wholes: list[NamedPart], singles: list[NamedPart], split: bool) -> Iterator[Tie]:
    """Yields arrays that by shape alone hold a gate and what it gates, in an order that nothing tells."""
    modules: dict[Names, list[NamedPart]] = {}
    for role in singles:
        if {"gate", "up"} & role.said and not (role.fused or role.part.is_vector):
            modules.setdefault(role.part.module, []).append(role)
    sized: dict[int, list[NamedPart]] = defaultdict(list)
    for whole in wholes if modules else ():
        sized[whole.part.main_size].append(whole)
    apart = {(word, whole.part.main_size) for whole in wholes for word in {"gate", "up"} & whole.said}
    for parts in modules.values():
        roles = [{"gate", "up"} & part.said for part in parts]
        here = {(word, part.part.main_size) for part in parts for word in {"gate", "up"} & part.said}
        are_gates = roles == [{"gate"}, {"gate"}]  # KerasHub's `ffw_gating` and `ffw_gating_2`.
        if not are_gates and (sorted(map(sorted, roles)) != [["gate"], ["up"]] or here <= apart):
            continue  # What both sides keep apart lies in no array.
        gate_first = sorted(parts, key=lambda part: "up" in part.said)
        near = sized[sum(part.part.main_size for part in parts)]
        held = [(x, _gate_orders(x, gate_first, split)) for x in near if are_gates or not x.fused]
        held = [(whole, readings) for whole, readings in held if readings]
        for whole, readings in held if len(held) == 1 else ():
            wholes.remove(whole)
            near.remove(whole)
            for part in parts:
                singles.remove(part)
            one, several = (whole.part.names,), tuple(part.part.names for part in gate_first)
            yield Tie(wanted=several if split else one, stored=one if split else several, readings=readings)


def _gate_orders(whole: NamedPart, parts: Sequence[NamedPart], split: bool) -> tuple[tuple[Link, ...], ...]:
    if exclude(whole.said - {"up"}, parts[0].said - {"gate"}):
        return ()
    return tuple(tuple(links) for order in (parts, parts[::-1]) if (links := links_of(whole, order, split)))


def joining_rule(
    link: Link, stored: Sequence[Names], wanted: Sequence[Names], kept: int = 0
) -> tuple[Rule, Sequence[Names]]:
    """Returns the rule of a fuse or a split, and the paths of what comes out of it.

    `stored` are paths as the rules before it have left them, `wanted` those in the end; the rule repeats
    `kept` of the names above all of them.
    """
    assert link.joint is not None
    axis, sizes, is_new = link.joint.axis, link.joint.sizes, link.joint.is_new
    if link.is_split:
        # Heads of a list are called alike behind their numbers.
        width = next(
            at for at in range(2, len(wanted[0]) + 2) if len({aim[-at:] for aim in wanted}) == len(wanted)
        )
        width += any(aim[-width:][0].isdecimal() for aim in wanted)
        intos = [(*stored[0][:-2], *aim[-width:]) for aim in wanted]
        pieces, whole = cut_alike(intos, stored[0], kept)
        return Split("/".join(whole), tuple(map("/".join, pieces)), axis, sizes, drop_axis=is_new), intos
    shared = shared_levels(stored, own=1)
    into = (*shared, *wanted[0][len(shared) - len(stored[0]) :])
    pieces, whole = cut_alike(stored, into, kept)
    return Fuse(tuple(map("/".join, pieces)), "/".join(whole), axis, sizes, new_axis=is_new), [into]


def kept_by_head(link: Link) -> tuple[Link, Link] | None:
    """Returns how a flat array of queries, keys and values may be one that has an axis of heads before them.

    Head by head, as its elements lie, or side by side, as most programs keep flat ones.
    """
    short, long = sorted((link.source.shape, link.target.shape), key=len)
    if len(long) < 3:
        return None  # Nearly every array.
    names = [part_of(leaf)[-1:] for leaf in (link.source, link.target)]
    roles = [concepts(last) & {"q", "k", "v"} for last in names]
    count = len(roles[0]) if roles[0] == roles[1] else 0
    for at in range(len(long) - 2) if count > 1 else ():
        heads, parts, width = long[at : at + 3]
        if parts != count or heads == 1 or (*long[:at], heads * parts * width, *long[at + 3 :]) != short:
            continue
        order = (*range(at), at + 1, at, *range(at + 2, len(long)))
        moved = permuted(long, order)
        steps = (
            (transposed(long, order), Step("reshape", moved, short))
            if link.source.shape == long
            else (Step("reshape", short, moved), transposed(moved, order))
        )
        plain = dataclasses.replace(link, told="head by head")
        return plain, dataclasses.replace(link, ways=((Way(steps),),), told="side by side")
    return None


# What else a table of tokens makes.

_OUTPUTS = frozenset(("output", "out", "projection", "proj", "generator"))
"""Words of the layer that leads to tokens, beside those of heads."""


def is_table(part: ModulePart) -> bool:
    """Tells whether a part is a table of tokens."""
    said = part.said
    return bool(said & {"embed", "token"}) and not said & {"pos", "type", "patch", "cls", "vision"}


def tied(wanted: Sequence[Leaf], stored: Sequence[Leaf], found: Findings) -> Findings:
    """Returns what makes an output layer of which only the embedding is stored: they are tied.

    What is not called a head or, beside all lists, an output is only asked about.
    """
    covered = {leaf.source for link in found.every for leaf in link.wanted}
    used = {leaf.source for link in found.every for leaf in link.stored}
    settled = {leaf.source for link in found.links for leaf in link.stored}
    left = module_parts(leaf for leaf in wanted if leaf.source not in covered)
    layers = [x for x in left if {"main"} <= x.leaves.keys() <= {"main", "bias"} and not x.is_vector]
    called = [part for part in layers if "head" in part.said] or [*filter(_is_output, layers)]
    heads = called or layers
    if len(heads) != 1:
        return Findings()
    tables = filter(is_table, module_parts(leaf for leaf in stored if leaf.source in used))
    head, free = heads[0].leaves["main"], [leaf for leaf in stored if leaf.source not in settled]
    made = ((leaf, _as_head(leaf, head)) for part in tables for leaf in part.leaves.values())
    options = [(leaf, possible) for leaf, possible in made if possible]
    if any(ways(leaf.shape, head.shape) for leaf in free) or len(options) != 1 or len(options[0][1]) != 1:
        return Findings()
    leaf, way = options[0]
    links = [Link(wanted=(head,), stored=(leaf,), grounds="names", ways=(way,), copied=True)]
    bias = heads[0].leaves.get("bias")
    fitting = [(one, how) for one in free if bias is not None and (how := ways(one.shape, bias.shape))]
    if bias is not None and len(fitting) == 1:
        links.append(Link(wanted=(bias,), stored=fitting[0][:1], grounds="names", ways=fitting[0][1:]))
    if called and len(links) == len(heads[0].leaves):  # Else it is a new one.
        return Findings(links=links)
    return Findings(ties=[Tie(wanted=(heads[0].names,), stored=(part_of(leaf),), readings=(tuple(links),))])


def _is_output(part: ModulePart) -> bool:
    return not (in_list(part.names)[0] or _OUTPUTS.isdisjoint(words("".join(part.names[-1:]))))


def _as_head(table: Leaf, head: Leaf) -> tuple[Way, ...]:
    """Returns how an embedding becomes the matrix of an output layer; a convolution's kernel is none."""
    found = ways(table.shape, head.shape) if len(table.shape) == len(head.shape) else ()
    may_be_kept = table.names[-1] != "embedding" or head.names[-1] in PYTORCHS
    return tuple(way for way in found if way.turned or may_be_kept)
