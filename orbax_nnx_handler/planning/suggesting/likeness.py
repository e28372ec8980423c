"""Which modules are more alike than any others, by the names and kinds of their leaves."""

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence

from orbax_nnx_handler.planning.suggesting.trees import Module

_Kind = tuple[str, Hashable]
_Contents = frozenset[tuple[_Kind, int]]
"""How many leaves of each name and kind a module holds."""


def lone_pairs(left: Sequence[Module], right: Sequence[Module]) -> list[tuple[float, Module, Module]]:
    """Returns pairs that share most of their leaves, and of which neither half is in another as good.

    Args:
        left: Modules of one side.
        right: Modules of the other.

    Returns:
        The share of leaves that are alike, and the pair; the best first.
    """
    ours, theirs = _by_contents(left), _by_contents(right)
    # Modules of the same contents are alike to the same others: of 5,000 layers a few kinds are compared.
    shares = {(a, b): _share(a, b) for a, b in _touching(ours, theirs)}
    rivals: Counter[tuple[int, _Contents, float]] = Counter()
    for (a, b), share in shares.items():
        rivals[0, a, share] += len(theirs[b])
        rivals[1, b, share] += len(ours[a])
    found = [
        (share, ours[a][0], theirs[b][0])
        for (a, b), share in shares.items()
        if share > 0.5 and rivals[0, a, share] == rivals[1, b, share] == 1
    ]
    return sorted(found, key=lambda pair: -pair[0])


def _by_contents(modules: Iterable[Module]) -> Mapping[_Contents, list[Module]]:
    found: dict[_Contents, list[Module]] = defaultdict(list)
    for module in modules:
        leaves = Counter((leaf.tokens[-1], leaf.kind) for leaf in module.every_leaf)
        found[frozenset(leaves.items())].append(module)
    return found


def _touching(
    ours: Iterable[_Contents], theirs: Mapping[_Contents, object]
) -> Iterable[tuple[_Contents, _Contents]]:
    """Yields the contents of both sides that have a leaf in common, in the order of the modules."""
    places = {contents: at for at, contents in enumerate(theirs)}
    holders: dict[_Kind, list[_Contents]] = defaultdict(list)
    for contents in theirs:
        for kind, _ in contents:
            holders[kind].append(contents)
    for contents in ours:
        near = {other for kind, _ in contents for other in holders.get(kind, ())}
        yield from ((contents, other) for other in sorted(near, key=places.__getitem__))


def _share(one: _Contents, other: _Contents) -> float:
    left, right = Counter(dict(one)), Counter(dict(other))
    return (left & right).total() / max(left.total(), right.total(), 1)
