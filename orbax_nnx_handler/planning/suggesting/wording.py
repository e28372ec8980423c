"""Rules out of pairs of leaves: as few and as general as the pairs allow."""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from orbax_nnx_handler.planning.paths import canonical
from orbax_nnx_handler.planning.rules import Rename
from orbax_nnx_handler.planning.suggesting.pairing import Grounds, Pair, weakest

_NUMBERED = re.compile(r"(.*_)?(\d+)")
_PLACES = "ijkl"

Names = tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proposal:
    """One proposed rule.

    Attributes:
        rule: The rule.
        grounds: What it rests on.
    """

    rule: Rename
    grounds: Grounds


def proposals_of(pairs: Iterable[Pair], above: int) -> tuple[Proposal, ...]:
    """Returns rules that take every stored leaf of the pairs to its wanted path.

    Longer patterns come first: a segment that one rule wrote is safe from later ones.

    Args:
        pairs: The pairs.
        above: How many segments of the wanted paths stand above the model.
    """
    grounds: dict[tuple[Names, Names], Grounds] = {}
    for pair in pairs:
        names = _names(pair, above)
        if names is not None:
            grounds[names] = weakest(grounds.get(names, "shapes"), pair.grounds)
    merged = _merged(grounds)
    ordered = sorted(merged, key=lambda names: (-len(names[0]), list(merged).index(names)))
    return tuple(
        Proposal(rule=Rename("/".join(stored), "/".join(wanted)), grounds=merged[stored, wanted])
        for stored, wanted in ordered
    )


def _names(pair: Pair, above: int) -> tuple[Names, Names] | None:
    """Returns what of the stored path becomes what of the wanted one; None where the paths are equal."""
    stored, wanted = pair.stored.names, _wanted_names(pair)[above:]
    while len(stored) > 1 and len(wanted) > 1 and canonical(stored[-1:]) == canonical(wanted[-1:]):
        stored, wanted = stored[:-1], wanted[:-1]
    # Linen keeps a list's number in the name.
    return None if canonical(stored) == canonical(wanted) else (stored, wanted)


def _wanted_names(pair: Pair) -> Names:
    names = pair.wanted.names
    if pair.unstacked is not None:
        return (*names[: pair.unstacked], *names[pair.unstacked + 1 :])
    if pair.stacked is None:
        return names
    number = pair.stored.tokens[pair.stacked].removeprefix("#")
    at = _stack_name(pair)
    return (*names[:at], number, *names[at:])


def _stack_name(pair: Pair) -> int:
    """Returns where the layer's number goes: after the name that the stack has in the wanted path.

    Below the layer both paths have equally many segments, unless a wrapper
    differs; then the layer is the first module of the two.
    """
    below = len(canonical(pair.stored.tokens)) - (pair.stacked or 0) - 1
    return max(1, len(pair.wanted.names) - below)


def _merged(grounds: dict[tuple[Names, Names], Grounds]) -> dict[tuple[Names, Names], Grounds]:
    """Writes a place where pairs of names differ in one number that both sides count."""
    current = grounds
    for place in _PLACES:
        templates: dict[tuple[Names, Names], list[tuple[Names, Names]]] = defaultdict(list)
        for names in current:
            for template in _templates(names, place):
                templates[template].append(names)
        best = {names: _best(names, templates, place) for names in current}
        after: dict[tuple[Names, Names], Grounds] = {}
        for names, template in best.items():
            after[template] = weakest(after.get(template, "shapes"), current[names])
        if after == current:
            break
        current = after
    return current


def _best(
    names: tuple[Names, Names],
    templates: dict[tuple[Names, Names], list[tuple[Names, Names]]],
    place: str,
) -> tuple[Names, Names]:
    found = [template for template in _templates(names, place) if len(templates[template]) > 1]
    return max(found, key=lambda template: len(templates[template]), default=names)


def _templates(names: tuple[Names, Names], place: str) -> Sequence[tuple[Names, Names]]:
    stored, wanted = names
    found: list[tuple[Names, Names]] = []
    for at, name in enumerate(stored):
        number = _NUMBERED.fullmatch(name)
        if number is None:
            continue
        for to, other in enumerate(wanted):
            same = _NUMBERED.fullmatch(other)
            if same is not None and same[2] == number[2]:
                left = (*stored[:at], f"{number[1] or ''}{{{place}}}", *stored[at + 1 :])
                right = (*wanted[:to], f"{same[1] or ''}{{{place}}}", *wanted[to + 1 :])
                found.append((left, right))
    return found
