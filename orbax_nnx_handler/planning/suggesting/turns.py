"""Square matrices: transposed or not, as their siblings are or as conventions say."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Sequence

from orbax_nnx_handler.planning.suggesting.links import Link
from orbax_nnx_handler.planning.suggesting.parts import Leaf, Names, levels
from orbax_nnx_handler.planning.suggesting.shapes import Way


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
        for leaf, ways in zip(_stored(link), link.ways, strict=True):
            if len(ways) == 1 and _is_matrix(leaf):
                for key in _keys(link, leaf):
                    evidence[key].add(ways[0].turned)
    settled: list[Link] = []
    left: list[Link] = []
    for link in links:
        chosen = tuple(
            _chosen(link, leaf, ways, evidence) for leaf, ways in zip(_stored(link), link.ways, strict=True)
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
    if leaf.names[-1] == "kernel":
        return next((way for way in ways if not way.turned), None)
    return None


def _is_matrix(leaf: Leaf) -> bool:
    return sum(length != 1 for length in leaf.shape) > 1 and leaf.names[-1] != "embedding"


def _keys(link: Link, leaf: Leaf) -> Iterable[tuple[object, ...]]:
    """Yields what a matrix shares its arrangement with: its module, its block, its model."""
    bases = _bases(leaf.names)
    rank = len(leaf.shape)
    seat = link.levels[-1][0] + 1 if link.levels else 0
    if link.layers is not None:
        seat = max(seat, len(link.layers.stored))
    yield "module", bases[:-2], leaf.names[-1], rank
    yield "block", _bases(leaf.names[:seat]), leaf.names[-1], rank
    yield "model", leaf.names[-1], rank


def _bases(names: Names) -> Names:
    return tuple(level.base for level in levels(names))
