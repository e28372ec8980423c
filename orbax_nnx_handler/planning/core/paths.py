"""Paths of leaves: tuples of keys, never joined strings; and the containers whose leaves have them.

A key may hold a slash (Gemma, `WeightNorm`), be an int (lists, optax chains) or
a tuple (`nnx.WeightNorm`), so a path keeps its keys apart until it is printed.
"""

import ast
import dataclasses
import functools
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

from flax import traverse_util

Tokens = tuple[str, ...]


MAX_DIGITS = 18
"""More digits than this are a name."""
_DIGITS = re.compile(rf"(\d{{1,{MAX_DIGITS}}})")

_LONGEST_TUPLE = 1000
_MOST_NUMBERS = 16  # At the end of one name: nobody nests lists so deep.

Path = tuple[Hashable, ...]
"""The keys from the root of a tree to one leaf."""

_Path = TypeVar("_Path", bound=Path)


def printable(text: str, keep: str = "") -> str:
    r"""Returns a text that a terminal, a log or a web page shows as it is.

    A name in a checkpoint is data: what would move a cursor, break a line or turn the
    direction of reading is written as in a Python string, `\x1b`, `\n`, `\u202e`.

    Args:
        text: The text.
        keep: Characters to leave alone: the line breaks of a text of several lines.
    """
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() or letter in keep else repr(letter)[1:-1] for letter in text
    )


def render(path: Path) -> str:
    """Returns a path as a person reads it: `('a', 0, 'b/c')` is `a/0/b/c`."""
    return printable(spelled(path)) or "(root)"


def spelled(path: Path) -> str:
    """Returns a path as a rule or a program spells it: as `render`, with every character as it is."""
    joined = "/".join(map(str, path))
    return joined if joined and "(" not in joined else "/".join(segments(path))


def without_box(path: _Path) -> _Path:
    """Returns a path without a last level `value`, which a Variable or a box of Linen's adds."""
    return cast(_Path, path[:-1]) if len(path) > 1 and path[-1] == "value" else path


def shared_levels(paths: Sequence[_Path], own: int = 0) -> _Path:
    """Returns the levels that all paths begin with, where each keeps some of its last ones for itself.

    Args:
        paths: Paths, or names of modules.
        own: How many levels each keeps at least.
    """
    if not paths:
        return cast(_Path, ())
    first = paths[0]
    most = max(min(map(len, paths)) - own, 0)
    same = next((at for at in range(most) if any(path[at] != first[at] for path in paths)), most)
    return cast(_Path, first[:same])


def segments(path: Path) -> tuple[str, ...]:
    """Returns the keys as strings; a tuple key or a slash gives several, and none gives nothing."""
    names = tuple(map(str, path))
    joined = "/".join(names)
    if path and "(" not in joined:  # Nearly every path: no key is a tuple, nor a tuple's text.
        return names if joined.count("/") == len(names) - 1 else tuple(joined.split("/"))
    return tuple(part for key in path for part in _parts(key))


def _parts(key: Hashable) -> tuple[str, ...]:
    key = _stored_tuple(key) if isinstance(key, str) and key[:1] == "(" else key
    if isinstance(key, tuple):
        # An empty tuple has no parts to be known by, so its own text is one.
        return segments(cast(Path, key)) or ("()",)
    return tuple(str(key).split("/"))


def _stored_tuple(key: str) -> Hashable:
    """Returns the tuple that Orbax wrote as a string, `('kernel',)`; any other key as it is."""
    if len(key) > _LONGEST_TUPLE:
        return key
    try:
        found = ast.literal_eval(key)
    # What a stranger wrote may be nested deeper than the parser goes.
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return key
    named = isinstance(found, tuple) and all(isinstance(part, str | int) for part in cast(Path, found))
    return cast(Hashable, found) if named else key


def parse(text: str) -> tuple[str, ...]:
    """Returns the segments of a path as a person writes it."""
    return tuple(part for part in text.split("/") if part)


def canonical(path: Path) -> tuple[str, ...]:
    """Returns the one spelling under which Linen and NNX paths are compared.

    Linen numbers modules in the name (`layers_0`), NNX lists in the path
    (`layers/0`); both become `layers`, `#0`. `LSTMCell` calls a gate `if`, which
    is no Python attribute, hence `if_` in NNX.
    """
    found: list[str] = []
    for key in path:
        found += _NAMES[key] if type(key) is str else _tokens_of(key)
    return tuple(found)


class _Names(dict[str, tuple[str, ...]]):
    """The tokens of each name that has been met: a model has few names and many leaves."""

    def __missing__(self, name: str) -> tuple[str, ...]:
        if len(self) >= _MOST_NAMES:
            self.clear()
        tokens = self[name] = _tokens_of(name)
        return tokens


_MOST_NAMES = 1 << 16
_NAMES = _Names()


@functools.lru_cache(maxsize=65536, typed=True)  # 1 is not True.
def _tokens_of(key: Hashable) -> tuple[str, ...]:
    parts = segments(cast(Path, (key,))) if isinstance(key, tuple) else str(key).split("/")
    return tuple(token for part in parts for token in _tokens(part))


def _tokens(part: str) -> tuple[str, ...]:
    numbers: list[str] = []
    # Nested lists: `grid_0_1` is `grid/0/1`.
    while len(numbers) < _MOST_NUMBERS and not is_index(part):
        name, _, number = part.rpartition("_")
        if not name or not is_index(number):
            break
        numbers.insert(0, f"#{int(number)}")
        part = name
    first = f"#{int(part)}" if is_index(part) else "if" if part == "if_" else part
    return (first, *numbers)


def is_number(token: str) -> bool:
    """Tells whether a canonical token counts a layer (`#3`)."""
    return token[:1] == "#" and is_index(token[1:])


def numbers_below(name: Tokens, paths: Iterable[Tokens]) -> set[int]:
    """Returns the numbers that canonical paths have right behind a name."""
    below = [path[len(name) :] for path in paths if path[: len(name)] == name]
    return {int(path[0][1:]) for path in below if path and is_number(path[0])}


def is_index(text: str) -> bool:
    """Tells digits that can number something; Python reads no integer of thousands of digits."""
    return text.isdecimal() and len(text) <= MAX_DIGITS


def natural_key(path: Path) -> tuple[tuple[tuple[int, int | str], ...], ...]:
    """Returns a sort key under which `Conv_10` comes after `Conv_2`."""
    return tuple(map(_natural, segments(path)))


@functools.lru_cache(maxsize=65536)
def _natural(part: str) -> tuple[tuple[int, int | str], ...]:
    return tuple((0, int(bit)) if bit.isdecimal() else (1, bit) for bit in _DIGITS.split(part) if bit)


def sort_paths(paths: Iterable[Path]) -> list[Path]:
    """Returns the paths in natural order."""
    return sorted(paths, key=natural_key)


def tree_of(leaves: Mapping[Path, Any], *, lists: bool) -> Any:
    """Returns nested containers with a value at each path.

    Args:
        leaves: The values; None stands for an empty node.
        lists: Whether int keys number a list, as in optax states. An `nnx.State`
            keeps them as keys.
    """
    return _contained(nested(leaves), lists)


def nested(leaves: Mapping[Path, Any]) -> dict[Any, Any]:
    """Returns nested dicts with a value at each path."""
    return cast("dict[Any, Any]", traverse_util.unflatten_dict(dict(leaves)))


def nodes_of(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yields every leaf and every empty node of nested containers."""
    if is_empty(tree) or not isinstance(tree, dict | list | tuple):
        yield path, tree
        return
    inner = (
        cast("dict[Any, Any]", tree).items() if isinstance(tree, dict) else enumerate(cast("list[Any]", tree))
    )
    for key, value in inner:
        yield from nodes_of(value, (*path, key))


def is_empty(value: Any) -> bool:
    """Tells whether a node holds nothing, as the empty states of an optax chain do."""
    return value is None or (isinstance(value, dict | list | tuple) and not value)


def _contained(node: Any, lists: bool) -> Any:
    if not isinstance(node, dict) or not node:
        return cast(Any, node)
    inner = {key: _contained(value, lists) for key, value in cast("dict[Any, Any]", node).items()}
    if inner and all(isinstance(key, int) and key >= 0 for key in inner):
        if lists:
            return [inner.get(number) for number in range(max(inner) + 1)]
        return {str(key): value for key, value in inner.items()}
    return inner


Nested = dict[str, Any]


def numbered(names: Sequence[str]) -> tuple[str, ...]:
    """Returns a path with each number in its module's name, as Linen has it: `layers_0` for `layers/0`."""
    found: list[str] = []
    for name in names:
        if name.isdecimal() and found and not found[-1].isdecimal():
            found[-1] = f"{found[-1]}_{name}"
        else:
            found.append(name)
    return tuple(found)


def linen_path(path: Path) -> tuple[str, ...]:
    """Returns an NNX path in Linen's words.

    Linen numbers modules in the name (`layers_0`), NNX lists in the path
    (`layers/0`); an `LSTMCell`'s gate is `if` in Linen, which Python does not
    allow for an attribute of NNX. Everything else keeps its name, so that reading
    the result back is the identity.
    """
    names: list[str] = []
    for key in path:
        if isinstance(key, int) and names:
            names[-1] = f"{names[-1]}_{key}"
        elif key == "if_":
            names.append("if")
        elif isinstance(key, tuple):
            names.extend(segments(cast(Path, key)))
        else:
            # With its slashes: `bridge.ToNNX` keeps the keys of `nn.WeightNorm` as Linen has them.
            names.append(str(key))
    return tuple(names)


_GENERAL_WORDS = frozenset({"optimizer", "opt", "optim", "tx", "state", "params", "model", "network", "net"})


def called_after(owner: Path, names: Iterable[Path]) -> list[Path]:
    """Returns the names that an optimizer's own holds best, short or whole: `g_opt` is called after `gen`.

    A number alone tells where no name has a word besides, and each is written so: `opt1` is called after
    `net1`, and neither after `1` beside `actor` nor after the second of a list.
    """
    words = {*_words(owner)}
    each = {name: _words(name) for name in names}
    in_list = any(map(is_number, canonical(owner)[-1:]))
    are_numbers = all(word.isdigit() for of in each.values() for word in of)
    scores: dict[Path, int] = {}
    for name, own in each.items():
        held = [2 if word in words else any(_is_short(word, one) for one in words) for word in own]
        is_told = (are_numbers and any(map(is_number, canonical(name)[-1:])) == in_list) or not all(
            map(str.isdigit, own)
        )
        scores[name] = sum(held) if all(held) and is_told else 0
    best = max(scores.values(), default=0)
    return [name for name, score in scores.items() if score == best > 0]


def trained_by(owner: Path, networks: Collection[Path]) -> list[Path]:
    """Returns the networks that an optimizer lies in, lies beside, or is called after."""
    own = [at for at in networks if at == owner]
    above = owner[:-1]
    beside = [at for at in networks if above and at[: len(above)] == above]
    if own or len(beside) == 1:
        return own or beside
    names = {at: canonical(at) for at in beside or networks}
    # What several end with tells none from another: `nets/a/core`, `nets/b/core`.
    known = Counter(name[at:] for name in names.values() for at in range(len(name)))
    starts = {at: [n for n in range(len(name)) if known[name[n:]] == 1] for at, name in names.items()}
    ends = {at: names[at][own[-1] : own[-1] + 1] if own else () for at, own in starts.items()}
    *levels, last = canonical(owner) or ("",)
    named = called_after((last,), set(ends.values()))
    # A level of a whole name says more than a short one: `opts/x/o` is the optimizer of `x`, not of `other`.
    if whole := [end for end in ends.values() if end and end[0] in levels]:
        named = [*whole, *(end for end in named if {*_words(end)} & {*_words((last,))})]
    return [at for at, end in ends.items() if end in named] or beside


def _is_short(word: str, other: str) -> bool:
    is_number = word.isdigit() or other.isdigit()
    return not is_number and (word.startswith(other) or other.startswith(word))


def _words(name: Path) -> list[str]:
    words = re.findall(r"\d+|[^\W\d_]+", "_".join(map(str, name)).lower())
    return [word for word in words if word not in _GENERAL_WORDS]


@dataclasses.dataclass(frozen=True)
class Level:
    """One name of a path, with the number that belongs to it: `layers_3`, `layers/3`, `block_3_audio`.

    Attributes:
        base: The name without its number.
        number: The number, or None.
        style: What stands between them.
        width: How many segments it takes.
    """

    base: str
    number: int | None = None
    style: str = ""
    width: int = 1

    @property
    def is_automatic(self) -> bool:
        """Whether Linen itself numbered it: a class's name and a count."""
        return self.style == "_" and self.base[:1].isupper()


_NUMBERED = re.compile(rf"(.*?(?:[A-Za-z]|\d(?=[_.-])))([_.-]?)(?<!\dx)(\d{{1,{MAX_DIGITS}}})")
_COUNTING = r"(?:.*_)?(?:layer|block)s?|.*[A-Za-z](?=_)"  # Of `layer1_ffn_in`, not `conv1_bn`.
_WITHIN = re.compile(rf"({_COUNTING})_?(\d{{1,{MAX_DIGITS}}})_([A-Za-z][A-Za-z_]*)")
_BEFORE = re.compile(rf"(\d{{1,{MAX_DIGITS}}})\.([A-Za-z_]+)")


@functools.lru_cache(maxsize=1 << 18)  # Each leaf of two models, its module and the modules around that.
def levels(names: Tokens) -> tuple[Level, ...]:
    """Returns the levels of a path; a number by itself belongs to the name before it."""
    found: list[Level] = []
    for level in map(_level, names):
        if not level.base and found and found[-1].number is None:
            found[-1] = Level(found[-1].base, level.number, "/", 2)
        else:
            found.append(level)
    return tuple(found)


@functools.lru_cache(maxsize=16384)
def _level(name: str) -> Level:
    if is_index(name) or not _DIGITS.search(name):
        return Level("", int(name), "/") if is_index(name) else Level(name)
    if within := _WITHIN.fullmatch(name):
        return Level(f"{within[1]}_{within[3]}", int(within[2]), "_")
    if before := _BEFORE.fullmatch(name):
        return Level(before[2], int(before[1]), ".")
    found = _NUMBERED.fullmatch(name)
    return Level(name) if found is None else Level(found[1], int(found[3]), found[2])


def ranks_of(paths: Sequence[Sequence[str]], like: int) -> Mapping[tuple[int, ...], int]:
    """Returns the paths that are one of them but for numbers, by the ranks of their numbers."""
    template = [_DIGITS.sub("#", name) for name in paths[like]]
    alike = [at for at, path in enumerate(paths) if [_DIGITS.sub("#", name) for name in path] == template]
    numbers = [tuple(map(int, _DIGITS.findall("/".join(paths[at])))) for at in alike]
    ranks = [
        {number: rank for rank, number in enumerate(sorted({*level}))} for level in zip(*numbers, strict=True)
    ]
    return {
        tuple(rank[number] for rank, number in zip(ranks, counted, strict=True)): at
        for at, counted in zip(alike, numbers, strict=True)
    }


def same_modules(pairs: Iterable[tuple[Tokens, Tokens]]) -> Mapping[Tokens, Tokens]:
    """Returns which wanted module is which stored one, where all that is known of both says so.

    A module that holds others is the innermost one that all of its parts come from, and no one else's.

    Args:
        pairs: The modules around parts that are each other's.
    """
    sources: dict[Tokens, list[Tokens]] = defaultdict(list)
    counts: dict[Tokens, int] = defaultdict(int)
    inside: dict[Tokens, set[Tokens]] = defaultdict(set)
    for one, other in pairs:
        for depth in range(1, len(one) + 1):
            sources[one[:depth]].append(other)
            inside[one[:depth]].add(one)
        for depth in range(1, len(other) + 1):
            counts[other[:depth]] += 1
    homes = {one: shared_levels(others) for one, others in sources.items()}
    return {
        one: home
        for one, home in homes.items()
        if counts.get(home) == len(sources[one]) and (one in inside[one] or len(inside[one]) > 1)
    }


def module_of(names: Tokens) -> Tokens:
    """Returns the path of the module around a part: a number belongs to the name before it."""
    own = levels(names)[-1:]
    return names[: len(names) - own[0].width] if own else names


def counted_apart(one: Sequence[Level], other: Sequence[Level]) -> tuple[Level, Level] | None:
    """Returns the levels in which two paths first differ, if these are numbers of one name."""
    for left, right in zip(one, other, strict=False):
        if left != right:
            is_counted = left.base == right.base and None not in (left.number, right.number)
            return (left, right) if is_counted else None
    return None


def ascend(ours: Sequence[Sequence[Level]], theirs: Sequence[Sequence[Level]]) -> bool:
    """Tells whether two paths are in the order of two that Linen numbered as it made them."""
    pair, made = (counted_apart(*side) for side in (ours, theirs))
    if pair is None or made is None or not made[0].is_automatic:
        return True
    first, second = ([level.number or 0 for level in side] for side in (pair, made))
    return (first[0] < first[1]) == (second[0] < second[1])


@functools.lru_cache(maxsize=4096)
def is_count(numbers: tuple[int, ...]) -> bool:
    """Tells whether numbers go up by one from 0 or 1, or those of tens and of ones in each do: 10 to 32."""
    stages: dict[int, list[int]] = defaultdict(list)
    for number in numbers:
        stages[number // 10].append(number % 10)
    each = (list(stages), *stages.values()) if len(stages) > 1 and 0 not in stages else ()
    runs = [[*one] == [*range(one[0], one[0] + len(one))] and one[0] in (0, 1) for one in (numbers, *each)]
    return runs[0] or (bool(each) and all(runs[1:]))
