"""What a proposal that fits leaves in doubt: another part may be meant, or have the source as well.

Such links are rather asked about: others of their lists say otherwise, or what is dropped fits by chance.
"""

import functools
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set

from orbax_nnx_handler.planning.core.folding import plain_names
from orbax_nnx_handler.planning.core.paths import Path, levels
from orbax_nnx_handler.planning.layouts.layout import follows, is_copy_level
from orbax_nnx_handler.planning.likeness import (
    Couples,
    companions,
    have_other_purposes,
    in_list,
    lists_around,
    misnumbered,
    purposes,
)
from orbax_nnx_handler.planning.likeness.arrangements import shifted
from orbax_nnx_handler.planning.likeness.assignment import fit_of, may_be, sizes_of_few
from orbax_nnx_handler.planning.likeness.counted_modules import by_level
from orbax_nnx_handler.planning.likeness.linked_modules import (
    by_parts,
    of_other_lists,
    of_other_roles,
    telling_words,
    torn_modules,
)
from orbax_nnx_handler.planning.likeness.links import Findings, Link, Tie
from orbax_nnx_handler.planning.likeness.module_parts import Leaf, ModulePart, part_of
from orbax_nnx_handler.planning.likeness.named_parts import NamedPart, named_parts
from orbax_nnx_handler.planning.likeness.vocabulary import (
    MARGIN,
    Names,
    concepts,
    counts_of,
    may_hold_otherwise,
    meanings,
    words,
)
from orbax_nnx_handler.planning.mapping.roots import PLAIN_LEVELS
from orbax_nnx_handler.planning.suggesting.link_groups import tie_of
from orbax_nnx_handler.planning.suggesting.unlike_names import unlike_names


def wanted_twice(
    found: Findings, wanted: Sequence[Leaf], parts: Sequence[ModulePart], stored: Sequence[ModulePart]
) -> Iterator[Link]:
    """Yields links whose source a part that stays open might have as well: its own may be what is absent.

    Where that is a part of a module that Linen numbered, all parts of both modules are doubted. Of what is
    asked about, only names tell that it might.

    Args:
        found: What is known.
        wanted: All wanted leaves.
        parts: Their parts.
        stored: All stored ones.
    """
    known = {part_of(leaf) for link in found.links for leaf in link.wanted}
    read = itertools.chain(*(each for tie in found.ties for each in tie.readings))
    asked = {part_of(leaf) for link in read if link.joint is None for leaf in link.wanted}
    known |= {part_of(leaf) for link in found.every if link.joint is not None for leaf in link.wanted}
    is_whole = all(part_of(leaf) in known for leaf in wanted)
    lacking = [part for part in parts if not is_whole and part.names not in known]
    if not (sizes := {part.main_size for part in lacking}):
        return
    sides = [named_parts(side, sizes=sizes) for side in (parts, stored)]
    ours, theirs = ({role.part.names: role for role in side} for side in sides)
    plain = [(link, part_of(link.target), part_of(link.source)) for link in found.links if link.joint is None]
    roles = {(x, y): (ours[x], theirs[y]) for _, x, y in plain if x in ours and y in theirs}
    near = defaultdict[int, list[tuple[tuple[int, ...], NamedPart]]](list)
    for part in lacking:
        near[part.main_size].append((_numbers(ours[part.names], end=-1), ours[part.names]))
    counts = Counter(part.main_size for part in lacking), Counter(x.part.main_size for x, _ in roles.values())
    few = sizes_of_few(counts)
    doubted, modules = set[tuple[Names, Names]](), set[Names]()
    for pair, (one, other) in roles.items():
        is_counted = any(level.is_automatic for level in other.part.levels[-2:-1])
        # What is stored in no layer is none of another layer's; of many parts, those of one are compared.
        layers, size = {_numbers(one, end=-1), ()}, one.part.main_size
        is_any = size in few and bool(_numbers(other, end=-1))
        for its, role in near[size]:
            is_near = is_any or its in layers
            may_have = _is_called_so if role.part.names in asked else _may_have
            if is_near and may_have(role, one, other):
                doubted.add(pair)
                if is_counted and pair[0][-1] == role.part.names[-1]:
                    modules |= {pair[0][:-1], role.part.names[:-1]}
    yield from (link for link, *pair in plain if tuple(pair) in doubted or pair[0][:-1] in modules)


def _numbers(role: NamedPart, end: int | None = None) -> tuple[int, ...]:
    return tuple(level.number for level in role.part.levels[:end] if level.number is not None)


def _may_have(role: NamedPart, one: NamedPart, other: NamedPart) -> bool:
    """Tells whether a stored part may be made into another part as well as into the one it is known to be."""
    now, then = fit_of(one, other), fit_of(role, other)
    if now is None or then is None:
        return False
    numbers = _numbers(other)
    is_its = _numbers(one)[: len(numbers)] == numbers != _numbers(role)[: len(numbers)]
    if then.score + MARGIN >= now.score and may_be(then, role, other) and not is_its:
        return True
    untold = one.said & other.said - other.part.own
    if role.part.module == one.part.module and "gate" in role.said and "up" in untold:
        return True  # Numbers tell which layer leads up in a network without a gate.
    ours, own, theirs = (telling_words(each.part.names) for each in (role, one, other))
    return bool(theirs & ours - own) and not theirs & own - ours


def _is_called_so(role: NamedPart, one: NamedPart, other: NamedPart) -> bool:
    """Tells whether a stored part lies in a module of another part's name, and not its own part."""
    ours, theirs = (telling_words(x.part.names[:-1]) for x in (role, other))
    left, against = theirs & ours - (own := telling_words(one.part.names)), theirs & own - ours
    return any(map(meanings, left)) and not against and fit_of(role, other) is not None


# What may be a copy.


def apart_from_copies(links: Sequence[Link], stored: Sequence[Leaf]) -> tuple[list[Link], list[Tie]]:
    """Returns the links, and as questions those of what may be a copy, or may hold its parts otherwise.

    A copy is what is called one, `unet_ema`, and a module of one name that is wanted twice and stored once.
    Neither is made of the other where one is called a copy of the other, `actor` and `target_actor`, nor a
    network of one that follows another, `critic` of `target_q`, though nothing else is stored.
    Further questions are whether a network is one that is called after another thing, and which levels on
    the way up of a U-Net are which.
    """
    links, levels = by_level(links)
    called = {
        name for x in itertools.chain(stored, *(y.wanted for y in links)) for name in (*x.names, *x.source)
    }
    copies = {name for name in called if _is_copied(str(name))}  # Nearly always none.
    followers = {name for name in called if follows(str(name))}
    if followers and not _COUNTERPARTS.isdisjoint(concepts(map(str, called))):
        followers = set[str]()
    leading = {link.source.part for link in links if followers and followers.isdisjoint(link.target.names)}

    def is_copied(names: Iterable[object]) -> bool:
        return not copies.isdisjoint(names)

    doubled, used = _doubled(links), {leaf.part for link in links for leaf in link.stored}
    free = {x.names[-2:] for x in stored if x.part not in used and not is_copied(x.names)}
    plain = {names for link in links if not is_copied(names := link.source.names)} if copies else ()
    originals = {tuple(map(meanings, names[:at])) for names in plain for at in range(len(names))}

    def has_original(names: Names) -> bool:
        """Tells whether what a module is called a copy of is used too: `actor` of `actor_target`."""
        at = next((at for at, name in enumerate(names) if is_copied([name])), 0)
        return (*map(meanings, names[:at]), _without_copies(names[at])) in originals

    def is_copy_of(one: Names, other: Names) -> bool:
        """Tells whether a module around one part is called a copy of one around the other part."""
        left = {_without_copies(name) for name in one if name in copies} - {()}
        return not left.isdisjoint(map(meanings, other if left else ()))

    networks = [[*map(id, held)] for held in of_other_roles(links)]
    others = {link: f"network {at}" for at, held in enumerate(networks) for link in held}
    kinds: dict[str, list[Link]] = defaultdict(list)
    for link in links:
        names, is_stored = link.target.names[:-1], any(is_copied(x.called or x.source) for x in link.stored)
        sides = names, link.source.names[:-1]
        said_copies = [name for name in names if name in copies and is_copy_level(name)]
        said = words("/".join(link.source.names)) if said_copies else ()  # RAFT's `mask` is a `mask_head`.
        is_copy = not is_stored and any(not {*words(name)} <= {*said} for name in said_copies)
        is_copy |= not is_stored and is_copy_of(*sides)
        is_beside = link.source.names[-2:] in free or has_original(link.source.names)
        is_taken = is_stored and not is_copied(names) and (is_beside or is_copy_of(*sides[::-1]))
        says = any(not followers.isdisjoint((x.called or x.source)[:-2]) for x in link.stored)
        is_taken |= says and followers.isdisjoint(names)
        is_copy |= not says and not followers.isdisjoint(names[:-1]) and link.source.part not in leading
        kind = "lent" if is_copy or link.target.source in doubled else "taken" if is_taken else ""
        kind = kind or others.get(id(link), "")
        kinds["held" if may_hold_otherwise(names, link.source.names[:-1]) else kind].append(link)
    return kinds.pop("", []), [*map(tie_of, levels), *(tie_of([some]) for some in kinds.values())]


_COUNTERPARTS = frozenset(("src", "fast", "next", "question"))
"""Beside these `target`, `slow`, `prev` and `key` say nothing of a copy: the two are of equal rank."""


@functools.lru_cache(maxsize=65536)
def _is_copied(name: str) -> bool:
    return is_copy_level(name) or "tgt" in meanings(name)


def _without_copies(name: str) -> tuple[str, ...]:
    """Returns what a name means without the words for a copy: what `target_value` is one of."""
    left = [word for word in words(name) if not _is_copied(word)]
    return meanings("_".join(left)) if len(left) < len(words(name)) else words(name)


def _doubled(links: Iterable[Link]) -> set[Path]:
    """Returns the wanted leaves that have module, name and source of another one; not the model's."""
    found: dict[tuple[tuple[Path, Names], Names], list[Link]] = defaultdict(list)
    for link in links:
        if link.joint is None and link.layers is None and len(link.target.names) > 2:
            found[link.source.part, link.target.names[-2:]].append(link)
    alike = (x for x in found.values() if len(x) > 1 and x[0].source.names[-2:] == x[0].target.names[-2:])
    every = itertools.chain.from_iterable(alike)
    return {x.target.source for x in every if not PLAIN_LEVELS.issuperset(x.target.names[:-2])}


# What goes elsewhere than what lies beside it.


def contradicted(links: Iterable[Link]) -> Mapping[Path, Link]:
    """Returns links in which a stored name, no number, means another part than in most blocks of its list."""
    said: dict[object, dict[Names, list[Link]]] = defaultdict(lambda: defaultdict(list))
    for link in (x for x in links if x.layers is None and len(x.wanted) == len(x.stored) == 1):
        (list_, inside), (others, name) = in_list(link.target.names), in_list(link.source.names)
        path = levels(name) if len(inside) > 1 < len(name) else ()
        if path and not any(level.is_automatic or level.style in ("/", ".") for level in path):
            said[list_, others, name][plain_names(inside)].append(link)
    counted = ([*x.values()] for x in said.values() if len(x) > 1 and not _are_of_a_list(x))
    few = (some for each in counted for some in each if 2 * len(some) <= sum(map(len, each)))
    return {link.target.source: link for some in few for link in some}


def _are_of_a_list(meanings: Mapping[Names, Sequence[Link]]) -> bool:
    """Tells whether each block's part is another block's: `stage1_block0/fc` is `stage1/block0/fc`."""
    names = {(*(name.rstrip("0123456789") for name in each[:-2]), *each[-2:]) for each in meanings}
    return len(names) == 1 and all(len(links) == 1 for links in meanings.values())


def coincidences(
    links: Sequence[Link],
    left: Set[Names],
    missing: Set[Names],
    sides: Sequence[Sequence[ModulePart]],
) -> Mapping[Path, Link]:
    """Returns links rather asked about: one of stored parts that are left may fit a missing one by chance.

    Args:
        links: What is found.
        left: The stored parts that nothing is made of.
        missing: The wanted parts that are made of nothing.
        sides: All wanted parts, and all stored ones.
    """
    plain = [link for link in links if link.joint is None and link.layers is None]
    odd = [link for link in plain if have_other_purposes(part_of(link.target), part_of(link.source))]
    parts = by_parts(links)
    odd += (*misnumbered(plain, left, missing), *shifted(plain), *torn_modules(links, parts, sides))
    norms = [companions(_not_counted(side)) for side in sides]
    odd += (*unlike_names(links, parts, sides[0], norms), *_without_norms(plain, norms))
    odd += (*_half_used(links, plain, left, missing), *_passing_over(plain, left, missing))
    odd += (*_of_another_role(plain, left), *_unlike_as_a_whole(plain, sides))
    pairs = {(part_of(link.target), part_of(link.source)): link for link in plain}
    every = ([part.names for part in side] for side in sides)
    others = of_other_lists(pairs, *every)
    odd += [x for x in plain if (part_of(x.target), part_of(x.source)) in others]
    return {**{x.target.source: x for x in odd}, **_torn(links, left), **_from_elsewhere(links, left)}


def _without_norms(links: Sequence[Link], norms: Sequence[Couples]) -> Iterator[Link]:
    """Yields links of layers, and of batch norms, where names say that the norm of one is another layer's."""
    ours, theirs = ({at: norm.names for at, norm in side.items()} for side in norms)
    ours |= {norm.names: at for at, norm in norms[0].items() if "mean" in norm.leaves}
    theirs |= {norm: at for at, norm in theirs.items()}
    made = {part_of(link.target): part_of(link.source) for link in links if ours}
    for link in links if theirs else ():
        one, other = ours.get(part_of(link.target)), theirs.get(part_of(link.source))
        if one and other and made.get(one, other) != other:
            yield link


def _not_counted(parts: Sequence[ModulePart]) -> list[ModulePart]:
    """Returns the parts without those that Linen counted by class, but for a layer alone with its norm."""
    held = Counter(part.module for part in parts)
    return [x for x in parts if held[x.module] == 2 or not any(y.is_automatic for y in x.levels[-1:])]


def _half_used(
    links: Iterable[Link], plain: Iterable[Link], left: Iterable[Names], missing: Iterable[Names]
) -> Iterator[Link]:
    """Yields links of a module that is not all used, into one of another name that is not its alone."""
    held = {part[:at] for part in left for at in range(1, len(part) + 1)}
    some = dict[tuple[Names, Names], list[Link]]()
    for link in plain if held else ():
        part = part_of(link.source)
        module = next((part[:at] for at in range(len(part) - 1, 0, -1) if part[:at] in held), ())
        if (into := part_of(link.target)[:-1]) and module and not counts_of("/".join(module)):
            some.setdefault((into, module), []).append(link)
    intos, modules = ({pair[side] for pair in some} for side in (0, 1))
    homes, sources = defaultdict[Names, set[Names]](set), defaultdict[Names, set[Names]](set)
    for one, other in (
        (part_of(x), part_of(y)) for link in (links if some else ()) for x in link.wanted for y in link.stored
    ):
        for above in (one[:at] for at in range(1, len(one)) if one[:at] in intos):
            sources[above].add(other)
        for above in (other[:at] for at in range(1, len(other)) if other[:at] in modules):
            homes[above].add(one[:-1])
    lacking = {part[:-1] for part in missing}
    for into, module in some:
        is_other = into in lacking or any(each[: len(module)] != module for each in sources[into])
        if homes[module] == {into} and is_other and not purposes(into) & purposes(module):
            own = concepts(module) - {"head", "norm"}
            yield from (x for x in some[into, module] if not concepts(part_of(x.target)) & own)


def _passing_over(links: Iterable[Link], left: Iterable[Names], missing: Iterable[Names]) -> Iterator[Link]:
    """Yields links of a layer of another number, of a list that has more layers and all that are wanted.

    One that lacks a part is no reason to give its place to the next one, nor to one of another list: what a
    list is made of is all of several lists, as layers in turns, or one of them. Nor do a few layers tell
    which of many they are.
    """
    held = defaultdict[tuple[Names, Names], list[tuple[int, int, Link]]](list)
    used, nested = defaultdict[Names, set[int]](set), set[Names]()
    for link in links:
        ours, theirs = (lists_around(part_of(x)[:-1]) for x in (link.target, link.source))
        for (one, at, _), (other, to, _) in zip(ours[:1], theirs[:1], strict=False):
            held[one, other].append((at, to, link))
            used[other].add(to)
            nested |= {one} if len(ours) != len(theirs) else set()
    counts = [Counter(pair[side] for pair in held) for side in (0, 1)]
    rest = defaultdict[Names, set[int]](set), defaultdict[Names, set[int]](set)
    for side, parts in enumerate((missing, left)):
        for list_, number, _ in itertools.chain(*(lists_around(names[:-1])[:1] for names in parts)):
            rest[side][list_].add(number)
    torn = {one for one, other in held if counts[0][one] > 1 and not rest[1][other] <= used[other]}
    for (one, other), some in held.items():
        wanted, stored = {at for at, *_ in some} | rest[0][one], used[other] | rest[1][other]
        is_one = counts[0][one] == counts[1][other] == 1 and one not in nested
        pairs = {(at, to) for at, to, _ in some}
        is_one = is_one and all(len({*side}) == len(pairs) for side in zip(*pairs, strict=True))
        # Of twice as many wanted ones they may be any, as the rest of a list is its last layers.
        is_any = is_one and stored < wanted and 1 < len(stored) <= len(wanted) / 2
        is_any |= one in torn
        yield from (x for at, to, x in some if is_any or (is_one and wanted < stored and at != to))


def _of_another_role(links: Iterable[Link], left: Iterable[Names]) -> Iterator[Link]:
    """Yields links of parts to what is no such part in other layers, where something like theirs is left."""
    free = {plain_names(names) for names in left}
    roles = defaultdict[Names, dict[Names, list[Link]]](lambda: defaultdict(list))
    for link in links if free else ():
        if in_list(link.target.names)[0]:
            roles[plain_names(part_of(link.target))][plain_names(part_of(link.source))].append(link)
    for role in (role for role in roles.values() if len(role) > 1):
        usual = max(role, key=lambda source: len(role[source]))
        if usual in free:
            yield from itertools.chain(*(some for source, some in role.items() if source != usual))


def _unlike_as_a_whole(links: Iterable[Link], sides: Sequence[Sequence[ModulePart]]) -> Iterator[Link]:
    """Yields links of modules that cannot be each other's as a whole, while others can be either's.

    As many parts of other sizes: what the names of both say is not so, or they are torn.
    """
    held = [defaultdict[Names, list[int]](list) for _ in sides]
    for modules, parts in zip(held, sides, strict=True):
        for part in parts:
            for at in range(1, len(part.names)):
                modules[part.names[:at]].append(part.main_size)
    kinds = dict[tuple[int, ...], int]()  # Numbered, since no tuple keeps its hash.
    alike = [
        {names: (len(x), kinds.setdefault(tuple(sorted(x)), len(kinds))) for names, x in side.items()}
        for side in held
    ]
    every = [frozenset(side.values()) for side in alike]
    for link in links:
        ours, theirs = (
            {side.get(names[:at], (0, 0)) for at in range(1, len(names))}
            for side, names in zip(alike, (part_of(link.target), part_of(link.source)), strict=True)
        )
        pairs = itertools.product(ours & every[1], theirs & every[0])
        if any(x != y and x[0] == y[0] > 1 for x, y in pairs):
            yield link


def _from_elsewhere(links: Sequence[Link], left: Iterable[Names]) -> Mapping[Path, Link]:
    """Returns links of the only part that is used of a list: a decoder's, where its encoder is wanted.

    And those of a list of which something is left, where another one that is left has most of what is used.
    """
    used = defaultdict[Names, set[Names]](set)
    for names in {part_of(leaf) for link in links for leaf in link.stored}:
        used[in_list(names)[0]].add(names)
    # By what leads into each layer: one layer alone is no list.
    lists = defaultdict[Names, dict[Names, set[Names]]](lambda: defaultdict(set))
    for names in left:
        list_, inside = in_list(names)
        if list_:
            lists[list_][names[: len(names) - len(inside)]].add(plain_names(inside))
    doubted = {x for x, layers in lists.items() if len(layers) > 1 == len(used.get(x, ()))}
    others = [set[Names]().union(*layers.values()) for x, layers in lists.items() if x not in used]
    for list_ in lists.keys() & used.keys() if others else ():
        own = {plain_names(in_list(names)[1]) for names in used[list_]}
        if any(2 * len(own & other) >= len(own) for other in others):
            doubted.add(list_)
    both = ((link, in_list(part_of(link.source))[0]) for link in (links if doubted else ()))
    odd = (x for x, at in both if at in doubted and (len(used[at]) > 1 or not in_list(x.target.names)[0]))
    return {link.target.source: link for link in odd}


def _torn(links: Iterable[Link], left: Set[Names]) -> Mapping[Path, Link]:
    """Returns links that nothing but shapes tell, of parts of a head of which something else is not wanted.

    Of a network whose layers are counted, the first ones may be all that is wanted, and not the last alone.

    Args:
        links: What is found.
        left: The stored parts that nothing is made from.
    """

    def head(name: Names) -> object:
        # `vocab_transform` beside `vocab_layer_norm`, in a model that has no module for its head.
        return name[:-1] or words(*name)[:1] if name else name

    def is_apart(link: Link) -> bool:
        one, part = part_of(link.target), part_of(link.source)
        name = (last := "".join(part[-1:])).rstrip("0123456789")
        before = ((*part[:-1], f"{name}{at}") for at in range(int(last[len(name) :] or 0)))
        is_counted = any(level.number is not None for level in levels(part[:-1]))
        is_counted |= last != name and left.isdisjoint(before)
        return not is_counted and concepts(one[-2:]) & concepts(part[-2:]) <= {"head"}  # As every head.

    known = {head(name) for name in left if name}
    plain = (x for x in links if known and x.joint is None and x.layers is None and x.grounds == "shapes")
    return {x.target.source: x for x in plain if head(part_of(x.source)) in known and is_apart(x)}
