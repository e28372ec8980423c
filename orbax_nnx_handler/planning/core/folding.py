"""Rows that differ in one number become one: `layers/{0..31}/mlp/kernel`.

Last: the levels that count, and the modules around parts.
"""

import dataclasses
import functools
import itertools
import operator
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from orbax_nnx_handler.planning.core.paths import (
    MAX_DIGITS,
    Level,
    Path,
    Tokens,
    levels,
    module_of,
    natural_key,
    printable,
    render,
    shared_levels,
)

# A number as `str(int)` writes it: folding `Conv_01` and `Conv_1` would print a name that nobody has.
NUMBER = re.compile(rf"(?<!\d)(0|[1-9][0-9]{{0,{MAX_DIGITS - 1}}})(?!\d)")
_Numbers = frozenset[int]


class NumberedText(NamedTuple):
    """A text split at its numbers: fixed text and a set of numbers in turn."""

    texts: tuple[str, ...]
    numbers: tuple[_Numbers, ...]

    @classmethod
    def of(cls, text: str, number: re.Pattern[str] = NUMBER) -> "NumberedText":
        """Returns a text split at what is a number in it."""
        if not text:
            return NO_TEXT
        bits = number.split(text)
        return cls(tuple(bits[::2]), tuple(map(_only, bits[1::2])))

    @classmethod
    def united(cls, texts: Sequence["NumberedText"]) -> "NumberedText":
        """Returns texts that differ in their numbers alone as one."""
        columns = zip(*(text.numbers for text in texts), strict=True)
        return cls(texts[0].texts, tuple(frozenset[int]().union(*column) for column in columns))

    def __str__(self) -> str:
        parts = [self.texts[0]]
        for numbers, text in zip(self.numbers, self.texts[1:], strict=True):
            parts += [ranges(numbers), text]
        return "".join(parts)

    def moves_on(self, later: "NumberedText") -> bool:
        """Tells whether every number stays as it is or rises from here to `later`."""
        if self.numbers == later.numbers:
            return True
        pairs = zip(self.numbers, later.numbers, strict=True)
        return all(before == after or max(before) < min(after) for before, after in pairs)


@functools.lru_cache(maxsize=65536)  # A model has few numbers and many leaves.
def _only(number: str) -> _Numbers:
    return frozenset({int(number)})


NO_TEXT = NumberedText(("",), ())


def ranges(numbers: Iterable[int]) -> str:
    """Returns numbers as a person writes them: `3`, `{0..31}`, `{0..3,7}`."""
    ordered = sorted(set(numbers))
    if len(ordered) == 1:
        return str(ordered[0])
    runs: list[list[int]] = []
    for number in ordered:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "{" + ",".join(f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) + "}"


FROM = "<- "
# In a short list every name stands in full: people search messages for the name they know.
_FEW = 12
# What is nested deeper, or has more numbers, a stranger made up; it is listed unfolded.
_DEEPEST = 32
_INDEX = re.compile(rf"(?<=\[)([0-9]{{1,{MAX_DIGITS}}})(?=\])")


class Row(NamedTuple):
    """One line of a list.

    Attributes:
        path: The leaf.
        columns: What must be equal for two lines to fold.
        source: A path whose numbers may run along with the leaf's.
        transform: A text of which `[3]` may run along with the leaf's numbers.
    """

    # A named tuple, as `Text` and `_Pattern` are: they are made quickly, and a model has 20,000 of each.

    path: Path
    columns: tuple[str, ...] = ()
    source: str = ""
    transform: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folded:
    """Some rows as one: the text of their paths, their columns, and how many they are."""

    text: str
    columns: tuple[str, ...]
    count: int


class _Pattern(NamedTuple):
    """Rows that were folded so far; `last` is the newest of them, for what comes next.

    `is_whole` says that all rows which differ in a number only are folded.
    """

    path: NumberedText
    columns: tuple[str, ...]
    source: NumberedText
    transform: NumberedText
    last: tuple[NumberedText, NumberedText]
    is_whole: bool = False

    @classmethod
    def joined(cls, run: Sequence["_Pattern"]) -> "_Pattern":
        if len(run) == 1:
            return run[0]
        return run[0]._replace(
            path=NumberedText.united([pattern.path for pattern in run]),
            source=NumberedText.united([pattern.source for pattern in run]),
            transform=NumberedText.united([pattern.transform for pattern in run]),
            last=run[-1].last,
        )

    def leads_to(self, later: "_Pattern") -> bool:
        """Tells whether a later row is the next of this sequence, and no jump back in its sources."""
        source, transform = self.last
        return source.moves_on(later.last[0]) and transform.moves_on(later.last[1])

    @property
    def leaves(self) -> int:
        total = 1
        for numbers in self.path.numbers:
            total *= len(numbers)
        return total


def fold(rows: Iterable[Row]) -> list[Folded]:
    """Returns the rows in natural order, folded; rows with different columns stay apart.

    Numbers fold to ranges (`layers_{0..31}`); where many lines are left, names fold to lists
    (`{key,query,value}`).
    """
    patterns = _patterns(sorted(rows, key=lambda row: natural_key(row.path)))
    depth = max((len(pattern.path.numbers) for pattern in patterns), default=0)
    for position in range(min(depth, _DEEPEST)):
        patterns = _merge(patterns, position)
    lines = [_folded(pattern) for pattern in patterns]
    return lines if len(lines) <= _FEW else fold_names(lines)


def list_paths(paths: Iterable[Path]) -> str:
    """Returns every path in full where they are few; else what `fold_paths` makes of them."""
    few = list(dict.fromkeys(paths))
    return ", ".join(map(render, few)) if len(few) <= _FEW else fold_paths(few)


def fold_paths(paths: Iterable[Path]) -> str:
    """Returns paths as one short text: `a/layers_{0..3}/kernel`, several apart by commas."""
    return ", ".join(line.text for line in fold(Row(path=path) for path in dict.fromkeys(paths)))


def fold_in_order(paths: Iterable[Path]) -> str:
    """Returns paths as `fold_paths` does, and never one before another that comes before it."""
    runs: list[list[Path]] = []
    for path in dict.fromkeys(paths):
        if runs and natural_key(runs[-1][-1]) < natural_key(path):
            runs[-1].append(path)
        else:
            runs.append([path])
    return ", ".join(map(fold_paths, runs))


_Numbered = tuple[int, tuple[int, ...]]
"""The only number of a row's path, and the numbers of its source."""


def _patterns(rows: Iterable[Row]) -> list[_Pattern]:
    """Returns rows as patterns; those whose path has a single number, nearly all of a model's, folded."""
    groups: dict[object, tuple[Row, list[_Numbered]]] = {}
    for at, row in enumerate(rows):
        path, source = NUMBER.split(render(row.path)), NUMBER.split(row.source)
        if len(path) != 3 or row.transform:
            groups[at] = (row, [])
            continue
        texts = (path[0], path[2], row.columns, *source[::2])
        found = groups.get(texts)
        if found is None:
            found = groups[texts] = (row, [])
        found[1].append((int(path[1]), tuple(map(int, source[1::2]))))
    return [pattern for row, numbered in groups.values() for pattern in _folded_runs(row, numbered)]


def _folded_runs(row: Row, numbered: Sequence[_Numbered]) -> list[_Pattern]:
    first = _pattern(row)
    if not numbered:
        return [first]
    runs: list[list[_Numbered]] = []
    for number, sources in numbered:
        # As in `_Pattern.leads_to`: no number of the source may jump back.
        if not runs or any(map(operator.gt, runs[-1][-1][1], sources)):
            runs.append([])
        runs[-1].append((number, sources))
    return [_run(first, run) for run in runs]


def _run(first: _Pattern, run: Sequence[_Numbered]) -> _Pattern:
    sources = tuple(map(frozenset, zip(*(sources for _, sources in run), strict=True)))
    return first._replace(
        path=NumberedText(first.path.texts, (frozenset(number for number, _ in run),)),
        source=NumberedText(first.source.texts, sources),
        is_whole=True,
    )


def _pattern(row: Row) -> _Pattern:
    source, transform = NumberedText.of(row.source), NumberedText.of(row.transform, _INDEX)
    return _Pattern(NumberedText.of(render(row.path)), row.columns, source, transform, (source, transform))


def _folded(pattern: _Pattern) -> Folded:
    transform = str(pattern.transform).replace("[{", "[").replace("}]", "]")
    source = f"{FROM}{pattern.source}" if pattern.source.texts != ("",) else ""
    columns = tuple(map(printable, (*pattern.columns, source, transform)))
    return Folded(text=str(pattern.path), columns=columns, count=pattern.leaves)


def _merge(patterns: Sequence[_Pattern], position: int) -> list[_Pattern]:
    groups: dict[object, list[_Pattern]] = defaultdict(list)
    for at, pattern in enumerate(patterns):
        is_done = pattern.is_whole or position >= len(pattern.path.numbers)
        groups[at if is_done else _key(pattern, position)].append(pattern)
    return [run for group in groups.values() for run in _runs(group)]


def _key(pattern: _Pattern, position: int) -> object:
    numbers = pattern.path.numbers
    others = (*numbers[:position], *numbers[position + 1 :])
    return pattern.path.texts, others, pattern.columns, pattern.source.texts, pattern.transform.texts


def _runs(group: Sequence[_Pattern]) -> list[_Pattern]:
    runs: list[list[_Pattern]] = []
    for pattern in group:
        if runs and runs[-1][-1].leads_to(pattern):
            runs[-1].append(pattern)
        else:
            runs.append([pattern])
    return [_Pattern.joined(run) for run in runs]


def fold_names(lines: Sequence[Folded]) -> list[Folded]:
    """Returns lines that differ in one name, and in nothing else, as one: `{key,query}/kernel`."""
    depth = max((line.text.count("/") for line in lines), default=0) + 1
    for position in range(min(depth, _DEEPEST)):
        groups: dict[object, list[Folded]] = {}
        for line in lines:
            groups.setdefault(_but_for_name(line, position), []).append(line)
        lines = [_with_names(group, position) for group in groups.values()]
    return list(lines)


def _but_for_name(line: Folded, position: int) -> object:
    names = line.text.split("/")
    if position >= len(names):
        return line
    return (*names[:position], "*", *names[position + 1 :]), _swapped(line.columns, names[position], "*")


def _swapped(columns: tuple[str, ...], name: str, other: str) -> tuple[str, ...]:
    """Returns the columns with a name replaced in the source: there it changes along with the leaf's."""
    return tuple(
        "/".join(other if part == name else part for part in column.split("/"))
        if column[:3] == FROM
        else column
        for column in columns
    )


def _with_names(group: Sequence[Folded], position: int) -> Folded:
    first = group[0]
    if len(group) == 1:
        return first
    names = first.text.split("/")
    every = "{" + ",".join(line.text.split("/")[position] for line in group) + "}"
    columns = _swapped(first.columns, names[position], every)
    text = "/".join([*names[:position], every, *names[position + 1 :]])
    return Folded(text=text, columns=columns, count=sum(line.count for line in group))


# The levels of a path that count.

PLACE = "{i}"
Numbered = tuple[tuple[str, ...], tuple[str, ...]]
"""The names that lead into a layer, with a place for its number; the names without numbers."""


@functools.lru_cache(maxsize=1 << 18)  # Asked several times of each part.
def around(names: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """Returns the modules around a part."""
    return tuple(names[:at] for at in itertools.accumulate(level.width for level in levels(names)[:-1]))


@functools.lru_cache(maxsize=1 << 18)  # Asked several times of each part.
def numbered(names: tuple[str, ...], above: int) -> Sequence[tuple[Numbered, int]]:
    """Returns the numbered levels of a path below a context, each as the key of its group and its number."""
    at, base, found = 0, list[str](), list[tuple[Numbered, int]]()
    for level in levels(names):
        at += level.width
        base.append(level.base)
        if level.number is not None and at > above and at < len(names):
            last = names[at - 1]
            template = PLACE.join(last.rsplit(str(level.number), 1)) if not last.isdecimal() else PLACE
            found.append((((*names[: at - 1], template), tuple(base)), level.number))
    return found


@functools.lru_cache(maxsize=1 << 18)  # Asked of either side of each link.
def _numbered_segments(names: tuple[str, ...], above: int) -> Sequence[tuple[int, Level]]:
    """Returns the segments with a number below a context, and what they count."""
    ends = itertools.accumulate(level.width for level in levels(names))
    both = zip(ends, levels(names), strict=True)
    return [(at - 1, level) for at, level in both if level.number is not None and at > above]


def same_numbers(
    wanted: tuple[str, ...], stored: tuple[str, ...], above: tuple[int, int]
) -> tuple[tuple[int, int], ...]:
    """Returns the segments below a context in which two paths count the same, stored and wanted.

    Numbers of one name, or those of the parts themselves: `Dense_3` and `layers/3`.
    """
    left, right = _numbered_segments(wanted, above[0]), _numbered_segments(stored, above[1])
    alone, ends = len(left) == len(right), (len(wanted) - 2, len(stored) - 2)
    found = list[tuple[int, int]]()
    for seat, level in right:
        for at, (other, against) in enumerate(left):
            are_last = alone and (other, seat) == ends
            if level.number == against.number and (level.base == against.base or are_last):
                found.append((seat, other))
                left = left[at + 1 :]
                break
    return tuple(found)


@functools.lru_cache(maxsize=65536)
def plain_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the names that lead to a part, but for the numbers of layers."""
    said = (at.base if at.style or at.number is None else f"{at.base}{at.number}" for at in levels(names))
    return tuple(filter(None, said))


class Homes:
    """The modules around the parts of two sides, by their paths."""

    def __init__(self, wanted: Sequence[Tokens], stored: Sequence[Tokens]) -> None:
        self._sides = wanted, stored
        self.held = [
            Counter(names[:depth] for names in side for depth in range(len(names))) for side in self._sides
        ]

    def of(self, at: int, to: int) -> tuple[Tokens, Tokens]:
        """Returns the modules around two parts: lists, where both sides hold as many parts there."""
        one, other = self._sides[0][at], self._sides[1][to]
        are_equal = self.held[0][one[:-1]] == self.held[1][other[:-1]]
        return (one[:-1], other[:-1]) if are_equal else (module_of(one), module_of(other))

    def shared(self, group: Iterable[tuple[int, int]]) -> tuple[Tokens, Tokens]:
        """Returns the modules around all parts of a group; nothing where one side has more of them."""
        ours, theirs = map(set[int], zip(*group, strict=True))
        if not 1 < len(ours) == len(theirs):
            return (), ()
        one = shared_levels([module_of(self._sides[0][at]) for at in ours])
        return one, shared_levels([module_of(self._sides[1][to]) for to in theirs])

    def strays(
        self,
        pairs: Sequence[tuple[int, int]],
        possible: Iterable[tuple[int, int]],
        partial: Sequence[Collection[Tokens]],
    ) -> set[tuple[int, int]]:
        """Returns pairs that take a part out of a module whose every other part is that of another one.

        Where that has a part to give: free, to exchange, or of a pair alone in its modules; not of `partial`.
        """
        homes = [self.of(*pair) for pair in pairs]
        takes, taken, known = dict(pairs), {to: at for at, to in pairs}, Counter[object](homes)
        free = defaultdict[tuple[int, int], list[Tokens]](list)
        found = {pair: self.of(*pair) for pair in possible}
        for (at, to), home in found.items():
            now, then = (taken.get(to, -1), to), (at, takes.get(at, -1))
            is_lone = all(known[found.get(pair)] == 1 for pair in (now, then))
            exchanged = known[home] > 1 and (is_lone or known[found.get((now[0], then[1]))] > 1)
            free[0, at] += home[1:] if to not in taken or exchanged else ()
            free[1, to] += home[:1] if at not in takes or exchanged else ()
        below = defaultdict[tuple[int, Tokens], list[tuple[Tokens, Tokens]]](list)
        for home, side in ((home, side) for home in homes for side in (0, 1)):
            for depth in range(len(home[side])):
                below[side, home[side][: depth + 1]].append(home)
        return {
            pair
            for pair, home in zip(pairs, homes, strict=True)
            for side in (0, 1)
            if (places := free.get((side, pair[side]))) and home[side] not in partial[side]
            for other in [
                _counterpart(home[side], side, [each for each in below[side, home[side]] if each is not home])
            ]
            if other and not _lies_in(home[1 - side], other)
            if any(_lies_in(place, other) for place in places)
        }


def lies_within(module: Tokens, other: Tokens, known: Mapping[Tokens, Tokens]) -> bool:
    """Tells whether all modules around a part that are known lie around the other part too."""
    around = (known.get(module[:depth], ()) for depth in range(1, len(module) + 1))
    return all(_lies_in(other, found) for found in around)


def _lies_in(names: Tokens, module: Tokens) -> bool:
    return names[: len(module)] == module


def _counterpart(module: Tokens, side: int, pairs: Sequence[tuple[Tokens, Tokens]]) -> Tokens:
    """Returns the other side's module that all parts of one belong to, not by one of them alone."""
    below = Counter(home[side][len(module) : len(module) + 1] for home in pairs)
    is_whole = all(len(below) - (count == 1) > 1 or below[()] > (not x) for x, count in below.items())
    return shared_levels([home[1 - side] for home in pairs]) if is_whole and len(pairs) > 1 else ()
