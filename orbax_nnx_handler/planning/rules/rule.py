"""What every rule is: a value that rewrites the stored model, leaf by leaf or several leaves into one.

A rule says which leaves by patterns on paths: whole segments, with places for the parts that vary.
"""

import abc
import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from orbax_nnx_handler.planning.core.errors import RuleError
from orbax_nnx_handler.planning.core.folding import Row
from orbax_nnx_handler.planning.core.leaves import Shape, derived, with_fields
from orbax_nnx_handler.planning.core.lines import aligned, counted
from orbax_nnx_handler.planning.core.paths import Path, parse
from orbax_nnx_handler.planning.core.recipes import RecipeError, render_reads
from orbax_nnx_handler.planning.rules.entries import Called, Entries, Entry, PathIndex, whole_of

Bindings = Mapping[str, str]
"""What each place of a pattern stood for; the nth star is `__star<n>`."""

_PLACE, _ESCAPED = (re.compile(text) for text in (r"\{([A-Za-z_]\w*)\}", r"\{(\{[A-Za-z_]\w*\})\}"))
_NOTHING: Bindings = {}


class Span(NamedTuple):
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

    @derived
    def templates(self) -> tuple[str, ...]:
        """The segments with every star as a named place."""
        stars = iter(range(len(self.text)))
        return tuple(f"{{__star{next(stars)}}}" if part == "*" else part for part in parse(self.text))

    @derived
    def places(self) -> frozenset[str]:
        """The names of its places, stars included."""
        return frozenset(name for part in self.templates for name in _PLACE.findall(part))

    @derived
    def _open(self) -> frozenset[str]:
        """The segments that have places."""
        return frozenset(part for part in self.templates if _PLACE.search(part))

    @derived
    def _is_repeated(self) -> bool:
        """Whether several segments have one place."""
        return sum(len({*_PLACE.findall(part)}) for part in self.templates) > len(self.places)

    @derived
    def _literal(self) -> tuple[str, ...]:
        """The segments without places."""
        return tuple(part for part in self.templates if part not in self._open)

    @derived
    def _formats(self) -> tuple[str, ...]:
        """The segments as `str.format` fills them."""
        escaped = (part.replace("{", "{{").replace("}", "}}") for part in self.templates)
        return tuple(_ESCAPED.sub(r"\1", part) for part in escaped)

    @derived
    def width(self) -> int:
        """How many segments it has."""
        return len(self.templates)

    def candidates(self, paths: Iterable[Sequence[str]]) -> list[int]:
        """Returns the positions of the paths that may match; quick, as 50 rules meet 20,000 leaves."""
        every = list(paths)
        found: Iterable[int] = range(len(every))
        for part in reversed(self._literal):  # Nearly every path lacks one of them.
            found = [at for at in found if part in every[at]]
        if not self._literal:
            first = self.templates[0]
            found = [at for at in found if any(_bound(first, name) is not None for name in every[at])]
        return list(found)

    def among(self, entries: Sequence[Entry], called: Called = whole_of) -> Sequence[int]:
        """Returns the places of the entries that may match by what they are called."""
        index = entries.index_of(called) if isinstance(entries, Entries) else None
        return self.candidates(map(called, entries)) if index is None else self.within(index)

    def within(self, index: PathIndex) -> Sequence[int]:
        """Returns the places of the paths that may match."""
        if self._literal:
            return index.holding_all(self._literal)
        return index.holding_any(lambda name: _bound(self.templates[0], name) is not None)

    def spans(self, names: Sequence[str], accepts: Callable[[Span], bool] | None = None) -> Iterator[Span]:
        """Yields the matches in a path, from left to right, that are accepted; none overlaps another."""
        at, width, first = 0, self.width, self.templates[0]
        is_open, last = first in self._open, len(names) - width
        while at <= last:
            bindings = _bound(first, names[at]) if is_open else _NOTHING if names[at] == first else None
            if bindings is not None and width > 1:  # Nearly everywhere the first segment differs.
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
        if len(names) == 1:  # Most renames.
            return _bound(self.templates[0], names[0])
        found: dict[str, str] = {}
        for part, name in zip(self.templates, names, strict=True):
            if part not in self._open:
                if part != name:
                    return None
                continue
            places = _bound(part, name)
            is_other = self._is_repeated and any(found.get(at, x) != x for at, x in (places or {}).items())
            if places is None or is_other:
                return None
            found.update(places)
        return found

    def fill(self, bindings: Bindings) -> tuple[str, ...]:
        """Returns the segments with every place replaced by its text."""
        return tuple([part.format_map(bindings) for part in self._formats]) if self._open else self.templates


@functools.lru_cache(maxsize=16384)
def compiled(text: str) -> Pattern:
    """Returns a pattern; each is asked for many leaves."""
    return Pattern(text)


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Applied:
    """What one rule made of the stored model.

    Attributes:
        entries: All entries after the rule.
        matched: How many entries the rule matched.
        changed: Those of `entries` that it made.
        discarded: The stored leaves that it takes away.
    """

    entries: Sequence[Entry]
    matched: int
    changed: Sequence[Entry] = ()
    discarded: Sequence[Path] = ()


class Rule(abc.ABC):
    """One thing that a user says about stored leaves; a frozen, printable value."""

    @abc.abstractmethod
    def apply(self, entries: Sequence[Entry]) -> Applied:
        """Applies the rule.

        Raises:
            RuleError: The rule does not fit a leaf that it matches.
        """

    @derived
    def quoted(self) -> str:
        """The rule as its user wrote it; asked for once a leaf."""
        return str(self)

    def inverse(self) -> "Rule":
        """Returns the rule that undoes this one.

        Raises:
            RuleError: Nothing undoes it.
        """
        raise RuleError(f"{self} cannot be undone, so it cannot save: {self._loss}.")

    @property
    def _loss(self) -> str:
        return "what it changes is not known afterwards"


@dataclasses.dataclass(frozen=True)
class Match:
    """An entry and the segments of it that a pattern matches."""

    entry: Entry
    span: Span

    def renamed(self, pattern: Pattern, bindings: Bindings | None = None) -> Entry:
        """Returns the entry with the matched segments replaced by a filled pattern."""
        names = self.entry.whole
        written = pattern.fill(self.span.bindings if bindings is None else bindings)
        return self.entry.called((*names[: self.span.start], *written, *names[self.span.stop :]))

    def made_by(
        self, rule: Rule, pattern: Pattern, bindings: Bindings | None = None, **changes: Any
    ) -> Entry:
        """Returns the entry under a filled pattern and with other changes, as what a rule has made."""
        reason = reason_of(rule, self.entry)
        name = self.renamed(pattern, bindings)
        return with_fields(name, fixed=(), named=True, reason=reason, **changes)


def find(
    pattern: Pattern,
    entries: Iterable[Entry],
    *,
    weights_only: bool = True,
    accepts: Callable[[Span], bool] | None = None,
) -> dict[int, Match]:
    """Returns the entries that a pattern matches anywhere in their whole path, by position.

    Args:
        pattern: The pattern.
        entries: All entries.
        weights_only: Leave out optimizers and steps, which no rule on values is for.
        accepts: Tells which segments that match are meant.
    """
    listed = entries if isinstance(entries, Sequence) else list(entries)
    found: dict[int, Match] = {}
    for at in pattern.among(listed):
        entry = listed[at]
        if weights_only and entry.section in ("optimizer", "step"):
            continue
        span = next(pattern.spans(entry.whole, accepts), None)
        if span is not None:
            found[at] = Match(entry, span)
    return found


def replace_each(
    rule: Rule, pattern: Pattern, entries: Sequence[Entry], make: Callable[[Match], Sequence[Entry]]
) -> Applied:
    """Puts what a rule makes of an entry in its place, for every entry that a pattern matches.

    `make` returns what comes of a match; the entry itself where it stays.

    Raises:
        RuleError: The rule does not fit some of them; quotes it and their shapes.
    """
    matches = find(pattern, entries)
    after, changed, bad = list[Entry](), list[Entry](), dict[Row, Sequence[Entry]]()
    for at, entry in enumerate(entries):
        if at not in matches:
            after.append(entry)
            continue
        try:
            made = make(matches[at])
        except RecipeError as error:
            row = Row(entry.segments, (f"{entry.shape}: {error}",), render_reads(entry.recipe))
            bad[row] = [entry]
        else:
            after += made
            changed += [one for one in made if one is not entry]
    if bad:
        _refuse(rule, bad)
    return Applied(entries=after, matched=len(matches), changed=changed)


def reason_of(rule: Rule, *before: Entry) -> str:
    """Returns the reason of what a rule makes: the rule, after those before it."""
    said = tuple([entry.reason for entry in before if entry.reason])
    return _after(said, rule.quoted) if said else rule.quoted


@functools.lru_cache(maxsize=4096)  # Asked of each leaf that two rules are for.
def _after(reasons: tuple[str, ...], rule: str) -> str:
    return "; ".join((*dict.fromkeys(part for reason in reasons for part in reason.split("; ")), rule))


_HINT = (
    "a rule meets leaves as the rules before it made them; correct it, or write more of the path "
    "in its pattern to leave others out."
)


def _refuse(rule: Rule, bad: Mapping[Row, Sequence[Entry]]) -> NoReturn:
    """Raises the error of a rule whose shapes do not come out, with a row for whatever it would make."""
    entries = [entry for each in bad.values() for entry in each]
    leaves = counted(len(entries), "stored leaf", "stored leaves")
    what = f"{rule} does not fit {leaves}:\n{aligned(bad, limit=20)}"
    raise RuleError(what, paths=[path for entry in entries for path in entry.sources], hints=[_HINT])


def normal_axis(axis: int, rank: int, shape: Shape) -> int:
    """Returns an axis counted from the front.

    Raises:
        RecipeError: A value of that rank has no such axis.
    """
    if not -rank <= axis < rank:
        raise RecipeError(f"shape {shape} has no axis {axis}")
    return axis % rank


def check_pattern(rule: Rule, *patterns: Pattern) -> None:
    """Raises where a pattern is empty.

    Raises:
        RuleError: Quotes the rule.
    """
    if any(not pattern.width for pattern in patterns):
        raise RuleError(f"{rule} has an empty pattern: it would match every leaf.")


def check_places(rule: Rule, pattern: Pattern, result: Pattern) -> None:
    """Raises where a result uses a place that its pattern does not bind.

    Raises:
        RuleError: Names the places.
    """
    unbound = sorted(result.places - pattern.places)
    if unbound:
        listed = ", ".join("*" if place.startswith("__star") else f"{{{place}}}" for place in unbound)
        raise RuleError(
            f"{rule} writes {listed}, which {pattern.text!r} does not hold.",
            hints=["* is a whole segment; a part of one has a name, as in ('Block_{i}', 'blocks/{i}')."],
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Join:
    """Entries to become one.

    Attributes:
        name: The result's entry, as far as names go.
        members: Their positions among all entries, in the order of the parts.
        fault: Why they cannot be joined, as far as names tell; empty if they can.
        make: Makes recipe and shape from the parts.
    """

    name: Entry
    members: tuple[int, ...]
    fault: str
    make: Callable[[Sequence[Entry]], Entry]


def join(rule: Rule, entries: Sequence[Entry], joins: Iterable[Join]) -> Applied:
    """Replaces the members of each join by its result, at the first member's place.

    Raises:
        RuleError: Parts do not fit together; quotes the rule and their shapes.
    """
    listed = list(joins)
    made, bad = dict[int, Entry](), dict[Row, Sequence[Entry]]()
    uses = Counter(at for item in listed for at in item.members)
    for item in listed:
        parts = [entries[at] for at in item.members]
        try:
            made[min(item.members)] = _joined(rule, item, parts, any(uses[at] > 1 for at in item.members))
        except RecipeError as error:
            sources = ", ".join(f"{render_reads(part.recipe)} {part.shape}" for part in parts)
            bad[Row(item.name.segments, (str(error),), sources)] = parts
    if bad:
        _refuse(rule, bad)
    gone = {at for item in listed for at in item.members}
    after = [made.get(at, entry) for at, entry in enumerate(entries) if at in made or at not in gone]
    return Applied(entries=after, matched=len(gone), changed=list(made.values()))


def _joined(rule: Rule, item: Join, parts: Sequence[Entry], twice: bool) -> Entry:
    fault = item.fault or ("it is a part of two results" if twice else "") or _difference(parts)
    if fault:
        raise RecipeError(fault)
    made = item.make(parts)
    return dataclasses.replace(
        item.name,
        recipe=made.recipe,
        shape=made.shape,
        dtype=made.dtype,
        cast=made.cast,
        fixed=(),
        named=True,
        reason=reason_of(rule, *parts),
    )


def _difference(parts: Sequence[Entry]) -> str:
    """Returns what keeps entries apart besides their shapes."""
    kinds = {(part.collection, part.prefix) for part in parts}
    if len(kinds) > 1:
        return "the parts come from different collections"
    dtypes = {str(part.cast or part.dtype) for part in parts}
    return f"the parts have different dtypes: {', '.join(sorted(dtypes))}" if len(dtypes) > 1 else ""


def patterns_of(rule: Rule) -> tuple[str, ...]:
    """Returns the patterns of the stored leaves that a rule is for."""
    fields: Mapping[str, object] = vars(rule)
    one, several = fields.get("pattern"), fields.get("patterns")
    if fields.get("regex"):
        return ()
    if isinstance(one, str):
        return (one,)
    return tuple(map(str, several)) if isinstance(several, tuple) else ()  # pyright: ignore[reportUnknownArgumentType]
