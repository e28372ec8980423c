"""Texts split at their numbers, and numbers as a person writes them."""

import functools
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

# A number as `str(int)` writes it: folding `Conv_01` and `Conv_1` would print a name that nobody has.
NUMBER = re.compile(r"(?<!\d)(0|[1-9]\d*)(?!\d)")
_Numbers = frozenset[int]


class Text(NamedTuple):
    """A text split at its numbers: fixed text and a set of numbers in turn."""

    texts: tuple[str, ...]
    numbers: tuple[_Numbers, ...]

    @classmethod
    def of(cls, text: str, number: re.Pattern[str] = NUMBER) -> "Text":
        """Returns a text split at what is a number in it."""
        if not text:
            return NO_TEXT
        bits = number.split(text)
        return cls(tuple(bits[::2]), tuple(map(_only, bits[1::2])))

    @classmethod
    def united(cls, texts: Sequence["Text"]) -> "Text":
        """Returns texts that differ in their numbers alone as one."""
        columns = zip(*(text.numbers for text in texts), strict=True)
        return cls(texts[0].texts, tuple(frozenset[int]().union(*column) for column in columns))

    def __str__(self) -> str:
        parts = [self.texts[0]]
        for numbers, text in zip(self.numbers, self.texts[1:], strict=True):
            parts += [ranges(numbers), text]
        return "".join(parts)

    def moves_on(self, later: "Text") -> bool:
        """Tells whether every number stays as it is or rises from here to `later`."""
        if self.numbers == later.numbers:
            return True
        pairs = zip(self.numbers, later.numbers, strict=True)
        return all(before == after or max(before) < min(after) for before, after in pairs)


@functools.lru_cache(maxsize=65536)  # A model has few numbers and many leaves.
def _only(number: str) -> _Numbers:
    return frozenset({int(number)})


NO_TEXT = Text(("",), ())


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
