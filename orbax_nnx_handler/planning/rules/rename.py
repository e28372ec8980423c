"""Renames: whole path segments of a stored path become segments of a wanted path."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from functools import cached_property

from orbax_nnx_handler.planning.entries import Entry
from orbax_nnx_handler.planning.paths import parse

_PLACE = re.compile(r"\{(\w+)\}")
_Match = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Rename:
    """Segments that match `pattern` become `replacement`.

    A pattern is one or more segments (`"Dense_0"`, `"encoder/Block_{i}"`). `*`
    is any one segment, `{name}` any part of one; the replacement repeats them:
    `Rename("Block_{i}", "blocks/{i}")`. It applies wherever it matches, to the
    path below the collection, or from the root of the stored path if it begins
    there (`"params/params/logits_dense"`). Rules apply in order; a segment that
    one rule wrote is not rewritten by a later one, so two names can be swapped.

    Attributes:
        pattern: Stored segments, joined by slashes.
        replacement: Wanted segments, joined by slashes; empty to take them away.
    """

    pattern: str
    replacement: str

    def __str__(self) -> str:
        return f"({self.pattern!r}, {self.replacement!r})"

    @cached_property
    def _parts(self) -> tuple["str | re.Pattern[str]", ...]:
        stars = iter(range(len(self.pattern)))
        return tuple(_compile(part, stars) for part in parse(self.pattern))

    @cached_property
    def _result(self) -> tuple[str, ...]:
        stars = iter(range(len(self.replacement)))
        return tuple(f"{{_{next(stars)}}}" if part == "*" else part for part in parse(self.replacement))

    def apply(self, entries: Sequence[Entry]) -> tuple[list[Entry], list[Entry]]:
        """Returns all entries after the rule, and those that it changed."""
        after = [self._rewrite(entry) for entry in entries]
        changed = [new for old, new in zip(entries, after, strict=True) if new is not old]
        if not changed:
            after = [self._rewrite_from_root(entry) for entry in entries]
            changed = [new for old, new in zip(entries, after, strict=True) if new is not old]
        return after, changed

    def _rewrite(self, entry: Entry) -> Entry:
        first, width = self._parts[0], len(self._parts)
        names = entry.segments
        if isinstance(first, str) and first not in names:
            return entry
        written: list[tuple[str, bool]] = []
        at, hit = 0, False
        while at < len(names):
            match = None if any(entry.fixed[at : at + width]) else self._match(names[at : at + width])
            if match is None:
                written.append((names[at], bool(entry.fixed) and entry.fixed[at]))
                at += 1
            else:
                written.extend((part, True) for part in self._fill(match))
                at, hit = at + width, True
        return _renamed(entry, written, self) if hit else entry

    def _rewrite_from_root(self, entry: Entry) -> Entry:
        width, depth = len(self._parts), len(entry.prefix)
        if width <= depth:
            return entry
        match = self._match((entry.prefix + entry.segments)[:width])
        if match is None:
            return entry
        rest = [(name, False) for name in entry.segments[width - depth :]]
        return _renamed(entry, [(part, True) for part in self._fill(match)] + rest, self)

    def _match(self, names: tuple[str, ...]) -> _Match | None:
        if len(names) < len(self._parts):
            return None
        found: _Match = {}
        for part, name in zip(self._parts, names, strict=True):
            if isinstance(part, str):
                if part != name:
                    return None
                continue
            hit = part.fullmatch(name)
            if hit is None:
                return None
            found.update(hit.groupdict())
        return found

    def _fill(self, found: _Match) -> list[str]:
        return [_PLACE.sub(lambda place: found.get(place[1], place[0]), part) for part in self._result]


def _compile(part: str, stars: Iterator[int]) -> "str | re.Pattern[str]":
    if part == "*":
        return re.compile(rf"(?P<_{next(stars)}>.+)")
    if not _PLACE.search(part):
        return part
    bits = _PLACE.split(part)
    return re.compile("".join(re.escape(b) if i % 2 == 0 else f"(?P<{b}>.+)" for i, b in enumerate(bits)))


def _renamed(entry: Entry, written: list[tuple[str, bool]], rule: Rename) -> Entry:
    return dataclasses.replace(
        entry,
        segments=tuple(name for name, _ in written),
        fixed=tuple(fixed for _, fixed in written),
        reason=f"rename {rule}",
    )
