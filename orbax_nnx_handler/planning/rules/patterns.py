"""Patterns on paths: whole segments, with places for the parts that vary."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property

from orbax_nnx_handler.planning.core.paths import parse

Bindings = Mapping[str, str]
"""What each place of a pattern stood for; the nth star is `__star<n>`."""

_PLACE = re.compile(r"\{([A-Za-z_]\w*)\}")


@dataclasses.dataclass(frozen=True)
class Span:
    """Segments `start` to `stop` of a path match, with the places bound so."""

    start: int
    stop: int
    bindings: Bindings


@dataclasses.dataclass(frozen=True)
class Pattern:
    """One or more segments: `Dense_0`, `encoder/Block_{i}`, `*/kernel`.

    `*` is any one segment, `{name}` any part of one; a place that occurs twice
    stands for the same text.
    """

    text: str

    @cached_property
    def templates(self) -> tuple[str, ...]:
        """The segments with every star as a named place."""
        stars = iter(range(len(self.text)))
        return tuple(f"{{__star{next(stars)}}}" if part == "*" else part for part in parse(self.text))

    @cached_property
    def _parts(self) -> tuple["str | re.Pattern[str]", ...]:
        return tuple(_compile(part) for part in self.templates)

    @cached_property
    def places(self) -> frozenset[str]:
        """The names of its places, stars included."""
        return frozenset(name for part in self.templates for name in _PLACE.findall(part))

    @property
    def width(self) -> int:
        """How many segments it has."""
        return len(self._parts)

    def candidates(self, paths: Iterable[Sequence[str]]) -> list[int]:
        """Returns the positions of the paths that may match; quick, as 50 rules meet 20,000 leaves."""
        anchor, known = self._anchor, dict[str, bool]()
        if isinstance(anchor, str):
            return [at for at, names in enumerate(paths) if anchor in names]
        found: list[int] = []
        for at, names in enumerate(paths):
            for name in names:
                if name not in known:
                    known[name] = anchor.fullmatch(name) is not None
                if known[name]:
                    found.append(at)
                    break
        return found

    def spans(self, names: Sequence[str], accepts: Callable[[Span], bool] | None = None) -> Iterator[Span]:
        """Yields the matches in a path, from left to right, that are accepted; none overlaps another."""
        at, width = 0, self.width
        while at + width <= len(names):
            bindings = self.match(names[at : at + width])
            span = None if bindings is None else Span(at, at + width, bindings)
            if span is None or (accepts is not None and not accepts(span)):
                at += 1
            else:
                yield span
                at += width

    def match(self, names: Sequence[str]) -> Bindings | None:
        """Returns what the places stand for if the segments match, all of them."""
        if len(names) != len(self._parts):
            return None
        found: dict[str, str] = {}
        for part, name in zip(self._parts, names, strict=True):
            if isinstance(part, str):
                if part != name:
                    return None
                continue
            hit = part.fullmatch(name)
            places = hit.groupdict() if hit is not None else {}
            if hit is None or any(found.get(place, text) != text for place, text in places.items()):
                return None
            found.update(places)
        return found

    def fill(self, bindings: Bindings) -> tuple[str, ...]:
        """Returns the segments with every place replaced by its text."""
        return tuple(_PLACE.sub(lambda place: bindings[place[1]], part) for part in self.templates)

    @cached_property
    def _anchor(self) -> "str | re.Pattern[str]":
        literal = [part for part in self._parts if isinstance(part, str)]
        return literal[-1] if literal else self._parts[0]


def shared_ends(one: Sequence[str], other: Sequence[str], least: int = 0) -> tuple[int, int]:
    """Returns how many segments two paths share at their beginning, and at their end of what is left.

    Args:
        one: A path.
        other: Another path.
        least: How many segments of the shorter path are in neither, the same or not.
    """
    shortest = max(min(len(one), len(other)) - least, 0)
    before = next((at for at in range(shortest) if one[at] != other[at]), shortest)
    rest = shortest - before
    return before, next((at for at in range(rest) if one[-1 - at] != other[-1 - at]), rest)


def _compile(part: str) -> "str | re.Pattern[str]":
    if not _PLACE.search(part):
        return part
    seen: set[str] = set()
    text = ""
    for position, bit in enumerate(_PLACE.split(part)):
        if position % 2 == 0:
            text += re.escape(bit)
        else:
            text += f"(?P={bit})" if bit in seen else f"(?P<{bit}>.+)"
            seen.add(bit)
    return re.compile(text, re.DOTALL)
