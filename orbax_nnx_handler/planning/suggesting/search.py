"""The search for a whole conversion: structure, shapes and names on both sides; last, the parts left over."""

import dataclasses
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from orbax_nnx_handler.planning.core.leaves import Shape, StoredLeaf
from orbax_nnx_handler.planning.core.paths import Path, Tokens, canonical, segments
from orbax_nnx_handler.planning.core.recipes import Read, reads, shape_of
from orbax_nnx_handler.planning.mapping.modules import derive
from orbax_nnx_handler.planning.rules.entries import Entry
from orbax_nnx_handler.planning.suggesting.blocks import Context, Findings, match_context
from orbax_nnx_handler.planning.suggesting.matching import MOST_PAIRS, Fit, fit_of, main_size, may_be
from orbax_nnx_handler.planning.suggesting.parts import Leaf, Link, Names, levels, parts_of
from orbax_nnx_handler.planning.suggesting.roles import Role, roles_of
from orbax_nnx_handler.planning.suggesting.shapes import Way, ways
from orbax_nnx_handler.planning.suggesting.words import concepts
from orbax_nnx_handler.planning.target.roles import Wanted

_QKV = frozenset("qkv")


def settle_turns(links: Sequence[Link]) -> tuple[list[Link], list[Link]]:
    """Decides for each square matrix whether it is transposed, where there is evidence.

    Matrices of the same block that are not square, and whose parameter has the same name, tell
    first; then those of the same model. Where there is none, two `kernel` are arranged alike:
    inputs before outputs is the convention of Linen and of NNX.

    Returns:
        The links that are decided, and those that are not.
    """
    evidence: dict[tuple[object, ...], set[bool]] = defaultdict(set)
    for link in links:
        for leaf, possible in zip(_stored(link), link.ways, strict=True):
            if len(possible) == 1 and _is_matrix(leaf):
                for key in _keys(link, leaf):
                    evidence[key].add(possible[0].turned)
    settled: list[Link] = []
    left: list[Link] = []
    for link in links:
        chosen = tuple(
            _chosen(link, leaf, possible, evidence)
            for leaf, possible in zip(_stored(link), link.ways, strict=True)
        )
        if any(ways is None for ways in chosen):
            left.append(link)
        else:
            settled.append(dataclasses.replace(link, ways=tuple((way,) for way in chosen if way is not None)))
    return settled, left


def readings_of(link: Link) -> tuple[Link, ...]:
    """Returns a link with its square matrices as they are, and turned."""
    return tuple(
        dataclasses.replace(
            link,
            ways=tuple(
                tuple(way for way in ways if way.turned == turned)[:1] or ways[:1] for ways in link.ways
            ),
        )
        for turned in (False, True)
    )


def _stored(link: Link) -> Iterable[Leaf]:
    return link.stored if len(link.stored) > 1 else link.stored * len(link.ways)


def _chosen(
    link: Link, leaf: Leaf, ways: tuple[Way, ...], evidence: dict[tuple[object, ...], set[bool]]
) -> Way | None:
    if len(ways) == 1:
        return ways[0]
    for key in _keys(link, leaf):
        turned = evidence.get(key)
        if turned is not None:
            if len(turned) == 1:
                return next((way for way in ways if way.turned in turned), None)
            if key[0] == "model":
                return None
    if leaf.names[-1] == "kernel" or _keeps_its_name(link, leaf):
        return next((way for way in ways if not way.turned), None)
    return None


def _keeps_its_name(link: Link, leaf: Leaf) -> bool:
    """Tells whether a matrix has a name of its own on both sides; `weight` and `w` may be PyTorch's."""
    last = leaf.names[-1]
    return last == link.target.names[-1] and last not in ("weight", "weights", "w")


def _is_matrix(leaf: Leaf) -> bool:
    return sum(length != 1 for length in leaf.shape) > 1 and leaf.names[-1] != "embedding"


def _keys(link: Link, leaf: Leaf) -> Iterable[tuple[object, ...]]:
    """Yields what a matrix shares its arrangement with: its module, its block, its model."""
    bases = _bases(leaf.names)
    # A part of a stack of parts has an axis less.
    rank = len(leaf.shape) - (link.is_split and link.joint is not None and link.joint.is_new)
    seat = link.levels[-1][0] + 1 if link.levels else 0
    if link.layers is not None:
        seat = max(seat, len(link.layers.stored))
    if not _QKV.isdisjoint(concepts(bases[-2:-1])):
        yield "qkv", bases[:-2], leaf.names[-1], rank  # What leads out of an attention is no evidence.
    yield "module", bases[:-2], leaf.names[-1], rank
    yield "block", _bases(leaf.names[:seat]), leaf.names[-1], rank
    yield "model", leaf.names[-1], rank


def _bases(names: Names) -> Names:
    return tuple(level.base for level in levels(names))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Searched:
    """What a search found.

    Attributes:
        links: What is decided.
        turns: Links of square matrices of which nobody knows whether they are transposed.
        found: The rest: ties, groups of layers.
    """

    links: tuple[Link, ...]
    turns: tuple[Link, ...]
    found: Findings


def search(wanted: Sequence[Leaf], stored: Sequence[Leaf], order: Mapping[Tokens, Sequence[str]]) -> Searched:
    """Searches what each wanted leaf is made from.

    Args:
        wanted: The wanted leaves of the model.
        stored: The stored ones.
        order: Wanted names in the order of their creation, by module.
    """
    found = match_context(Context(wanted=wanted, stored=stored, order=order))
    found.links.extend(_tied(wanted, stored, found.links))
    found.links.extend(match_leftovers(wanted, stored, found.links))
    settled, turns = settle_turns(found.links)
    return Searched(links=tuple(settled), turns=tuple(turns), found=found)


def wanted_leaves(items: Iterable[Wanted]) -> list[Leaf]:
    """Returns the wanted leaves of a model."""
    return [
        Leaf(
            names=segments(item.path),
            collection=item.collection,
            shape=item.leaf.shape,
            number=number_of(item.leaf.dtype),
            source=item.leaf.path,
        )
        for item in items
    ]


def stored_leaves(entries: Iterable[Entry], arranged: bool) -> list[Leaf]:
    """Returns the stored leaves of a model.

    Args:
        entries: The stored model.
        arranged: Whether the gates of recurrent cells are fused, as NNX's cells have them.
    """
    model = [entry for entry in entries if entry.section == "model"]
    return _arranged(model) if arranged else [_leaf(entry, entry.segments) for entry in model]


def _leaf(entry: Entry, names: Names) -> Leaf:
    boxed = len(names) > 1 and names[-1] == "value"
    return Leaf(
        names=names[:-1] if boxed else names,
        collection=entry.collection,
        shape=entry.shape,
        number=number_of(entry.cast or entry.dtype),
        source=entry.sources[0],
    )


def untyped_leaves(leaves: Iterable[Leaf]) -> list[Leaf]:
    """Returns leaves without their collections, for a search where the other side tells none."""
    return [dataclasses.replace(leaf, collection=None) for leaf in leaves]


def number_of(dtype: Any) -> str:
    """Returns the kind of number of a dtype; a restore casts within one kind and never between two."""
    kinds = ("floating", "complexfloating", "integer", "bool_")
    found = [kind for kind in kinds if dtype is not None and jnp.issubdtype(dtype, getattr(jnp, kind))]
    return found[0] if found else "other"


def _arranged(entries: Sequence[Entry]) -> list[Leaf]:
    """Returns the stored leaves with the gates of recurrent cells as NNX fuses them."""
    plain = {entry.tokens: entry for entry in entries if isinstance(entry.recipe, Read)}
    by_path = {entry.sources[0]: entry for entry in plain.values()}
    derived, without_variable = derive(
        {
            tokens: StoredLeaf(path=e.sources[0], shape=e.shape, dtype=e.dtype, key_impl=None)
            for tokens, e in plain.items()
        }
    )
    shapes = {path: entry.shape for path, entry in by_path.items()}
    consumed = {path for item in derived for path in reads(item.recipe)} | {
        item.leaf.path for item in without_variable
    }
    made = [_leaf(entry, entry.segments) for entry in entries if entry.sources[0] not in consumed]
    for item in derived:
        first = by_path[next(iter(reads(item.recipe)))]
        leaf = _leaf(first, (*first.segments[:-2], *item.path[-2:]))
        made.append(dataclasses.replace(leaf, shape=shape_of(item.recipe, shapes), made=True))
    return made


def _tied(wanted: Sequence[Leaf], stored: Sequence[Leaf], links: Sequence[Link]) -> list[Link]:
    """Returns a link for an output layer of which only the embedding is stored: they are tied."""
    covered = {leaf.source for link in links for leaf in link.wanted}
    used = {leaf.source for link in links for leaf in link.stored}
    heads = [
        role
        for role in roles_of(parts_of([leaf for leaf in wanted if leaf.source not in covered]))
        if "head" in role.said and len(role.part.leaves) == 1 and not role.part.is_vector
    ]
    if len(heads) != 1:
        return []
    tables = [
        role
        for role in roles_of(parts_of([leaf for leaf in stored if leaf.source in used]))
        if role.said & {"embed", "token"} and not role.said & {"pos", "type", "patch", "cls", "vision"}
    ]
    (head,) = heads[0].part.leaves.values()
    free = [leaf for leaf in stored if leaf.source not in used and ways(leaf.shape, head.shape)]
    options = [
        (leaf, found)
        for role in tables
        for leaf in role.part.leaves.values()
        if (
            found := [
                way for way in ways(leaf.shape, head.shape) if way.turned or leaf.names[-1] != "embedding"
            ]
        )
    ]
    if free or len(options) != 1 or len(options[0][1]) != 1:
        return []
    leaf, found = options[0]
    return [Link(wanted=(head,), stored=(leaf,), grounds="names", ways=(tuple(found),), copied=True)]


def by_template(links: Iterable[Link]) -> Mapping[tuple[Tokens, Tokens], list[Link]]:
    """Returns links by what they are called but for the numbers of layers."""
    found: dict[tuple[Tokens, Tokens], list[Link]] = defaultdict(list)
    for link in links:
        key = (_plain(link.target.names), _plain(link.source.names))
        found[key].append(link)
    return found


def _plain(names: Names) -> Tokens:
    return tuple(token for token in canonical(names) if not token.startswith("#"))


def paths_of(links: Iterable[Link]) -> Mapping[Path, set[Path]]:
    """Returns the stored leaves that each wanted leaf is made from."""
    found: dict[Path, set[Path]] = defaultdict(set)
    for link in links:
        for leaf in link.wanted:
            found[leaf.source] |= {stored.source for stored in link.stored}
    return found


def steps_of(links: Iterable[Link]) -> Mapping[Path, tuple[str, ...]]:
    """Returns what is done with the shape of each wanted leaf, or of the first part of it, in order."""
    found: dict[Path, tuple[str, ...]] = {}
    for link in links:
        for at, leaf in enumerate(link.wanted):
            way = link.ways[at if link.is_split else 0][0]
            if not link.source.made:
                found[leaf.source] = tuple(step.kind for step in way.steps)
    return found


_GENERAL = frozenset(("norm", "attn", "mlp", "enc", "dec", "conv", "head", "embed"))
"""Words that many parts of a model share."""


def match_leftovers(wanted: Sequence[Leaf], stored: Sequence[Leaf], links: Iterable[Link]) -> list[Link]:
    """Returns links between parts of which nothing is linked, and that fit each other alone.

    A pair shares a word of its own, no shape and name allows another one on either side, and the
    numbers above do not differ. Wanted parts of one name that only one stored part fits, which
    nothing else wants, are all made from it.
    """
    every = list(links)
    ours = _free(wanted, {leaf.source for link in every for leaf in link.wanted})
    theirs = _free(stored, {leaf.source for link in every for leaf in link.stored})
    tokens = {link.target.shape[0] for link in every if _is_of_tokens(link)}
    fits: dict[int, dict[int, Fit]] = defaultdict(dict)
    sizes: dict[int, list[int]] = defaultdict(list)
    for to, other in enumerate(theirs):
        sizes[main_size(other)].append(to)
    counts: dict[int, int] = defaultdict(int)
    alike = Counter(map(main_size, ours))
    for at, one in enumerate(ours):
        size = main_size(one)
        if alike[size] * len(sizes[size]) > MOST_PAIRS:
            continue
        for to in sizes[size]:
            fit = fit_of(one, theirs[to])
            if fit is not None and may_be(one, theirs[to]):
                fits[to][at] = fit
                counts[at] += 1
    found: list[Link] = []
    for to, options in fits.items():
        takers = [ours[at] for at in options]
        if any(counts[at] > 1 for at in options) or not _are_one(takers):
            continue
        # A vector with an element for each token is a bias of the logits.
        is_bias = theirs[to].part.is_vector and main_size(theirs[to]) in tokens
        if all(fit.is_exact and (is_bias or _is_meant(ours[at], theirs[to])) for at, fit in options.items()):
            found += _links(options.values())
    return found


def _free(leaves: Iterable[Leaf], used: set[object]) -> list[Role]:
    return roles_of(parts_of([leaf for leaf in leaves if leaf.source not in used]))


def _are_one(takers: Sequence[Role]) -> bool:
    """Tells whether several parts are one that a program holds several times."""
    return (
        len({role.part.names[-1:] for role in takers}) == 1 and len({_shapes(role) for role in takers}) == 1
    )


def _shapes(role: Role) -> tuple[object, ...]:
    return tuple(sorted((kind, leaf.shape) for kind, leaf in role.part.leaves.items()))


def _is_of_tokens(link: Link) -> bool:
    said = concepts(link.target.names) | concepts(link.source.names)
    is_table = link.target.names[-1] == "embedding" and len(link.target.shape) > 1
    return is_table and not said & {"pos", "type", "patch", "cls"}


def _is_meant(one: Role, other: Role) -> bool:
    left, right = _numbers(one), _numbers(other)
    return (not left or not right or left == right) and bool(one.part.own & other.part.own - _GENERAL)


def _numbers(role: Role) -> list[int]:
    return [level.number for level in role.part.levels if level.number is not None]


def _links(fits: Iterable[Fit]) -> Iterator[Link]:
    for number, fit in enumerate(fits):
        for one, other, how in fit.pairs:
            yield Link(wanted=(one,), stored=(other,), grounds="names", ways=(how,), copied=number > 0)


_MOST_JOINED = 4
_MOST_SIBLINGS = 12
"""Queries, keys and values with what leads out; more leaves of one module are never one array."""


def arrangeable(wanted: Sequence[Leaf], stored: Sequence[Leaf]) -> set[Path]:
    """Returns the wanted leaves that stored ones could be by their shapes, in any arrangement.

    One leaf with its axes in another order, or split, or merged; several of one size in one array,
    or one of several; or leaves of sibling modules side by side.
    """
    found: set[Path] = set()
    for collection in {leaf.collection for leaf in wanted}:
        ours = [leaf for leaf in wanted if leaf.collection == collection]
        theirs = [leaf for leaf in stored if collection is None or leaf.collection in (None, collection)]
        for number in {leaf.number for leaf in ours}:
            left, right = ([leaf for leaf in side if leaf.number == number] for side in (ours, theirs))
            found |= _arrangeable(left, right)
    return found


def _arrangeable(ours: Sequence[Leaf], theirs: Sequence[Leaf]) -> set[Path]:
    lacking, held = (Counter(math.prod(leaf.shape) for leaf in side) for side in (ours, theirs))
    shapes: dict[int, set[Shape]] = defaultdict(set)
    for leaf in theirs:
        shapes[math.prod(leaf.shape)].add(leaf.shape)
    parts = _joined(ours)
    wholes = {whole for sizes in _joined(theirs).values() for whole in sizes}
    found: set[Path] = set()
    for leaf in ours:
        size = math.prod(leaf.shape)
        if (
            any(ways(shape, leaf.shape) for shape in shapes.get(size, ()))
            or any(_makes(size, lacking[size], whole) for whole in held)
            or any(_makes(part, count, size) for part, count in held.items())
            or any(size % whole == 0 for whole in wholes)
            or any(whole % part == 0 for part in parts.get(leaf.names, ()) for whole in held)
        ):
            found.add(leaf.source)
    return found


def _makes(part: int, count: int, whole: int) -> bool:
    """Tells whether so many parts of one size suffice for a whole that is several of them."""
    return part > 1 and whole % part == 0 and 2 <= whole // part <= count


def _joined(leaves: Sequence[Leaf]) -> Mapping[Names, set[int]]:
    """Returns the sizes that leaves have side by side with those of sibling modules, of other sizes."""
    families: dict[tuple[Names, str], list[Leaf]] = defaultdict(list)
    for leaf in leaves:
        families[leaf.names[:-2], leaf.names[-1]].append(leaf)
    found: dict[Names, set[int]] = defaultdict(set)
    for family in families.values():
        sizes = [math.prod(leaf.shape) for leaf in family]
        if len(family) > _MOST_SIBLINGS or len(set(sizes)) < 2 or 0 in sizes:
            continue
        for count in range(2, min(_MOST_JOINED, len(family)) + 1):
            for some in itertools.combinations(range(len(family)), count):
                if len({sizes[at] for at in some}) > 1:
                    for at in some:
                        found[family[at].names].add(sum(sizes[each] for each in some))
    return found
