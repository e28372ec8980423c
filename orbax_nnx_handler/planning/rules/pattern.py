"""The patterns by which rules name leaves: whole segments, with places for the parts that vary."""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property

from orbax_nnx_handler.planning.core.paths import Tokens, parse

Bindings = Mapping[str, str]
"""What each place of a pattern stood for; the nth star is `__star<n>`."""


_PLACE = re.compile(r"\{([A-Za-z_]\w*)\}")


_NOTHING: Bindings = {}


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
    def places(self) -> frozenset[str]:
        """The names of its places, stars included."""
        return frozenset(name for part in self.templates for name in _PLACE.findall(part))

    @cached_property
    def _open(self) -> frozenset[str]:
        """The segments that have places."""
        return frozenset(part for part in self.templates if _PLACE.search(part))

    @property
    def width(self) -> int:
        """How many segments it has."""
        return len(self.templates)

    def candidates(self, paths: Iterable[Sequence[str]]) -> list[int]:
        """Returns the positions of the paths that may match; quick, as 50 rules meet 20,000 leaves."""
        every = list(paths)
        found: Iterable[int] = range(len(every))
        literal = [part for part in self.templates if part not in self._open]
        for part in reversed(literal):  # Nearly every path lacks one of them.
            found = [at for at in found if part in every[at]]
        if not literal:
            first = self.templates[0]
            found = [at for at in found if any(_bound(first, name) is not None for name in every[at])]
        return list(found)

    def spans(self, names: Sequence[str], accepts: Callable[[Span], bool] | None = None) -> Iterator[Span]:
        """Yields the matches in a path, from left to right, that are accepted; none overlaps another."""
        at, width, first = 0, self.width, self.templates[0]
        while at + width <= len(names):
            if names[at] != first and first not in self._open:  # Nearly everywhere.
                at += 1
                continue
            bindings = self.match(names[at : at + width])
            span = None if bindings is None else Span(at, at + width, bindings)
            if span is None or (accepts is not None and not accepts(span)):
                at += 1
            else:
                yield span
                at += width

    def match(self, names: Sequence[str]) -> Bindings | None:
        """Returns what the places stand for if the segments match, all of them."""
        if len(names) != self.width:
            return None
        if not self._open:
            return _NOTHING if tuple(names) == self.templates else None
        found: dict[str, str] = {}
        for part, name in zip(self.templates, names, strict=True):
            if part not in self._open:
                if part != name:
                    return None
                continue
            places = _bound(part, name)
            if places is None or any(found.get(place, text) != text for place, text in places.items()):
                return None
            found.update(places)
        return found

    def fill(self, bindings: Bindings) -> tuple[str, ...]:
        """Returns the segments with every place replaced by its text."""
        if not self._open:
            return self.templates
        return tuple(_PLACE.sub(lambda place: bindings[place[1]], part) for part in self.templates)


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


_PLACES = ("{i}", "{j}", "{k}", "{l}")


def with_places(names: Tokens, seats: Iterable[int]) -> Tokens:
    """Returns a path with a place for the number in each of some segments."""
    found = list(names)
    for place, seat in zip(_PLACES, seats, strict=False):
        head = found[seat].rstrip("0123456789")
        found[seat] = head + place
    return tuple(found)


@functools.lru_cache(maxsize=65536)
def _bound(part: str, name: str) -> Bindings | None:
    """Returns what the places of a segment stand for in a name; a model has few names and many leaves."""
    hit = _compiled(part).fullmatch(name)
    return hit.groupdict() if hit is not None else None


@functools.lru_cache(maxsize=1024)
def _compiled(part: str) -> re.Pattern[str]:
    seen: set[str] = set()
    text = ""
    for position, bit in enumerate(_PLACE.split(part)):
        if position % 2 == 0:
            text += re.escape(bit)
        else:
            text += f"(?P={bit})" if bit in seen else f"(?P<{bit}>.+)"
            seen.add(bit)
    return re.compile(text, re.DOTALL)
