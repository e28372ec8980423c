"""What is known of one block, for others of its kind."""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from orbax_nnx_handler.planning.core.folding import around
from orbax_nnx_handler.planning.core.paths import levels
from orbax_nnx_handler.planning.likeness.links import Findings, Link
from orbax_nnx_handler.planning.likeness.module_parts import Leaf, part_of
from orbax_nnx_handler.planning.likeness.vocabulary import (
    Names,
    is_alone,
    kinds_of_modules,
    meanings,
    words,
)
from orbax_nnx_handler.planning.suggesting.matching_layers import Context, match_context


def match_model(context: Context) -> Findings:
    """Matches a model; blocks of one kind, of which shapes or names tell some, tell the others."""
    found = match_context(context)
    count = len(found.ties) + 1
    while found.ties and len(found.ties) < count:
        count, known = len(found.ties), _Precedents(context.wanted, context.stored, found.links).speak_for
        found = match_context(dataclasses.replace(context, known=known))
    return found


class _Precedents:
    """Which parts of two modules are each other's, as far as all that is known of such modules agrees.

    Modules are of one kind if only numbers tell their paths apart, or if they are called alike and hold
    parts of the same names: the layers of an encoder tell nothing of those of a decoder that hold more.
    """

    def __init__(self, wanted: Iterable[Leaf], stored: Iterable[Leaf], links: Iterable[Link]) -> None:
        self._wanted, self._stored = (
            kinds_of_modules({part_of(leaf) for leaf in leaves}) for leaves in (wanted, stored)
        )
        self._counted = [_lists({part_of(leaf) for leaf in leaves}) for leaves in (wanted, stored)]
        self._forth: dict[object, set[object]] = defaultdict(set)
        self._back: dict[object, set[object]] = defaultdict(set)
        self._takers: dict[object, set[object]] = defaultdict(set)
        self._numbers: dict[object, set[tuple[int | None, ...]]] = defaultdict(set)
        told = [link for link in links if link.grounds != "order"]
        for one, other in {(part_of(link.target), part_of(link.source)) for link in told}:
            for kinds, left, right in self._views(one, other):
                self._forth[kinds, left].add(right)
                self._back[kinds, right].add(left)
                self._takers[kinds, right[:2] if isinstance(right, tuple) else ()].add(left)
                self._numbers[kinds, left].add(tuple(level.number for level in levels(one)))

    def speak_for(self, wanted: Names, stored: Names) -> int:
        """Returns how much tells that a part is made from another one: lists, modules of each kind."""
        told = {
            "list" if kinds in ("list", "modules") else len(one)
            for kinds, one, other in self._views(wanted, stored)
            if self._forth.get((kinds, one)) == {other}
            and self._back[kinds, other] == {one}
            # One of modules, or of two lists of one class, does not tell where the others are.
            and (len(self._numbers[kinds, one]) > 1 or not self._is_unsure(kinds, other))
        }
        return len(told)

    def _is_unsure(self, kinds: object, other: object) -> bool:
        is_list = kinds == "list" and isinstance(other, tuple) and len(self._takers[kinds, other[:2]]) > 1
        return is_list or kinds == "modules"

    def _views(self, wanted: Names, stored: Names) -> Iterator[tuple[object, tuple[object, ...], object]]:
        """Yields two parts as those of the modules around them, of lists, and by their first or last word."""
        for one, other in itertools.product(around(wanted), around(stored)):
            if _count(one) != _count(other) and _count(wanted) == _count(stored):
                continue  # `down/1` and `down_1_block_0`: below them only one side still counts blocks.
            ours, theirs = self._wanted.get(one, ()), self._stored.get(other, ())
            for kinds in zip(ours, theirs, strict=False):
                yield kinds, wanted[len(one) :], stored[len(other) :]
        ours, theirs = levels(wanted), levels(stored)
        if not ours or not theirs:
            return
        modules = wanted[: -ours[-1].width], stored[: -theirs[-1].width]
        are_alone = is_alone(wanted, self._wanted) and is_alone(stored, self._stored)
        for kind, one, other in (("list", wanted, stored), ("modules", *modules))[: 1 + are_alone]:
            if told := self._place_in_list(one, other):
                yield kind, *told
        left, right = (words("".join(names[-1:])) for names in (wanted, stored))
        for at in (0, -1):
            rest = [
                frozenset(meanings("_".join(each[1:] if at == 0 else each[:-1]))) for each in (left, right)
            ]
            if rest[0] == rest[1] and rest[0] and not left[at].isdecimal():
                yield modules, (at, left[at]), right[at]

    def _place_in_list(self, one: Names, other: Names) -> tuple[tuple[object, ...], object] | None:
        """Returns the lists that two parts are in, where one counts as the other, from another number on.

        That they count as far tells that no other part stands between those of one of them.
        """
        here, there = levels(one)[-1:], levels(other)[-1:]
        if not here or not there or (at := here[0].number) is None or (to := there[0].number) is None:
            return None
        ours, theirs = (one[: -here[0].width], here[0].base), (other[: -there[0].width], there[0].base)
        is_one = {number + to - at for number in self._counted[0][ours]} == self._counted[1][theirs]
        return (ours, (*theirs, to - at)) if is_one else None


def _lists(parts: Iterable[Names]) -> Mapping[tuple[Names, str], set[int]]:
    """Returns the numbers of each list, by where it is and what it is called."""
    found: dict[tuple[Names, str], set[int]] = defaultdict(set)
    for part in parts:
        at = 0
        for level in levels(part):
            if level.number is not None:
                found[part[:at], level.base].add(level.number)
            at += level.width
    return found


def _count(names: Names) -> int:
    """Returns how many numbers a path has."""
    return sum(map(str.isdecimal, words("/".join(names))))
