"""Folds rows that differ in one number: `layers/{0..31}/mlp/kernel`."""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from orbax_nnx_handler.planning.paths import Path, natural_key, render

_NUMBER = re.compile(r"(\d+)")
_Numbers = frozenset[int]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a list: a path and what must be equal for two lines to fold."""

    path: Path
    columns: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Folded:
    """Some rows as one: the text of their paths, the columns, and how many they are."""

    text: str
    columns: tuple[str, ...]
    count: int


@dataclasses.dataclass(frozen=True)
class _Pattern:
    """A path split at its numbers: fixed text and a set of numbers in turn."""

    texts: tuple[str, ...]
    numbers: tuple[_Numbers, ...]
    columns: tuple[str, ...]


def fold(rows: Iterable[Row]) -> list[Folded]:
    """Returns the rows in natural order, folded; rows with different columns stay apart."""
    patterns = [_pattern(row) for row in sorted(rows, key=lambda row: natural_key(row.path))]
    depth = max((len(pattern.numbers) for pattern in patterns), default=0)
    for position in range(depth):
        patterns = _merge(patterns, position)
    return [Folded(_text(p), p.columns, _count(p)) for p in patterns]


def _pattern(row: Row) -> _Pattern:
    bits = _NUMBER.split(render(row.path))
    return _Pattern(tuple(bits[::2]), tuple(frozenset({int(bit)}) for bit in bits[1::2]), row.columns)


def _merge(patterns: Sequence[_Pattern], position: int) -> list[_Pattern]:
    groups: dict[object, list[_Pattern]] = defaultdict(list)
    for at, pattern in enumerate(patterns):
        others = (*pattern.numbers[:position], *pattern.numbers[position + 1 :])
        foldable = position < len(pattern.numbers)
        groups[(pattern.texts, others, pattern.columns) if foldable else at].append(pattern)
    merged: list[_Pattern] = []
    for group in groups.values():
        first = group[0]
        if len(group) == 1:
            merged.append(first)
            continue
        union: _Numbers = frozenset().union(*(pattern.numbers[position] for pattern in group))
        numbers = (*first.numbers[:position], union, *first.numbers[position + 1 :])
        merged.append(dataclasses.replace(first, numbers=numbers))
    return merged


def _count(pattern: _Pattern) -> int:
    total = 1
    for numbers in pattern.numbers:
        total *= len(numbers)
    return total


def _text(pattern: _Pattern) -> str:
    parts = [pattern.texts[0]]
    for numbers, text in zip(pattern.numbers, pattern.texts[1:], strict=True):
        parts += [ranges(numbers), text]
    return "".join(parts)


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


def aligned(rows: Iterable[Row], limit: int = 60, indent: str = "  ") -> str:
    """Returns folded rows as lines with aligned columns, cut with a count after `limit` lines."""
    lines = fold(rows)
    shown = lines[:limit]
    width = min(max((len(line.text) for line in shown), default=0), 72)
    texts = [f"{indent}{line.text:<{width}}   {'   '.join(line.columns)}".rstrip() for line in shown]
    if len(lines) > limit:
        rest = sum(line.count for line in lines[limit:])
        texts.append(f"{indent}… and {rest} more")
    return "\n".join(texts)
