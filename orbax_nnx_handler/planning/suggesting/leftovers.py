"""Parts that their own block holds no counterpart of: the last ones of a model that fit each other."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from orbax_nnx_handler.planning.suggesting.matching import Fit, fit_of, main_size, may_be
from orbax_nnx_handler.planning.suggesting.parts import Leaf, Link, parts_of
from orbax_nnx_handler.planning.suggesting.roles import Role, roles_of

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
    fits: dict[int, dict[int, Fit]] = defaultdict(dict)
    sizes: dict[int, list[int]] = defaultdict(list)
    for to, other in enumerate(theirs):
        sizes[main_size(other)].append(to)
    counts: dict[int, int] = defaultdict(int)
    for at, one in enumerate(ours):
        for to in sizes.get(main_size(one), ()):
            fit = fit_of(one, theirs[to])
            if fit is not None and may_be(one, theirs[to]):
                fits[to][at] = fit
                counts[at] += 1
    found: list[Link] = []
    for to, options in fits.items():
        takers = [ours[at] for at in options]
        if any(counts[at] > 1 for at in options) or not _are_one(takers):
            continue
        if all(fit.is_exact and _is_meant(ours[at], theirs[to]) for at, fit in options.items()):
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


def _is_meant(one: Role, other: Role) -> bool:
    left, right = _numbers(one), _numbers(other)
    return (not left or not right or left == right) and bool(one.part.own & other.part.own - _GENERAL)


def _numbers(role: Role) -> list[int]:
    return [level.number for level in role.part.levels if level.number is not None]


def _links(fits: Iterable[Fit]) -> Iterator[Link]:
    for number, fit in enumerate(fits):
        for one, other, ways in fit.pairs:
            yield Link(wanted=(one,), stored=(other,), grounds="names", ways=(ways,), copied=number > 0)
