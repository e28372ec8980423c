"""A verdict as data: what becomes of every leaf, and both sides as it saw them, for whoever asks why.

The rows in which errors, plans, reports and logs list outcomes are here too, so that they look alike.
"""

import dataclasses
import functools
import itertools
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Set
from typing import Any, Literal, Self

import numpy as np

from orbax_nnx_handler.planning.core.dtypes import KEY_IMPLEMENTATIONS, CastKind, is_key, name_of, same_key
from orbax_nnx_handler.planning.core.errors import RestoreError
from orbax_nnx_handler.planning.core.folding import Row, fold_in_order, fold_paths, ranges
from orbax_nnx_handler.planning.core.leaves import Shape, StoredLeaf, WantedLeaf, derived
from orbax_nnx_handler.planning.core.paths import Path, Tokens, canonical, is_number, render
from orbax_nnx_handler.planning.core.recipes import Read, Recipe, describe, reads
from orbax_nnx_handler.planning.layouts.layout import Placement
from orbax_nnx_handler.planning.mapping.matches import GROUNDS, SAME_PATH, Discarded, Dropped, MatchEvidence
from orbax_nnx_handler.planning.mapping.moments import StuckMoment
from orbax_nnx_handler.planning.mapping.roots import Roots
from orbax_nnx_handler.planning.options import DefaultSource, Policy, UnexpectedPolicy
from orbax_nnx_handler.planning.rules import Rule
from orbax_nnx_handler.planning.rules.entries import Entry
from orbax_nnx_handler.planning.target.roles import Wanted

IN_MEMORY = "a tree in memory"
"""What stands for the directory of a checkpoint that is none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sides:
    """Both sides of a plan, leaf by leaf.

    Attributes:
        wanted: Every wanted leaf with its role.
        placements: Every stored leaf with the part of a train state it belongs to.
        roots: Where the model sits on both sides.
        stuck: Moments that cannot follow their parameters.
        copied: Stored leaves that a rule says are wanted more than once, and their moments.
        loose: The parts that rules cut out of stored leaves, and that nothing is made of.
    """

    wanted: Mapping[Path, Wanted] = dataclasses.field(default_factory=dict[Path, Wanted])
    placements: Mapping[Path, Placement] = dataclasses.field(default_factory=dict[Path, Placement])
    roots: Roots = dataclasses.field(default_factory=lambda: Roots(wanted=(), stored=(), overlap=0))
    stuck: tuple[StuckMoment, ...] = ()
    copied: frozenset[Path] = frozenset()
    loose: tuple[Entry, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restored:
    """A leaf that comes from disk.

    Attributes:
        wanted: The leaf.
        recipe: The stored leaves and the transform.
        stored_dtype: The dtype on disk.
        dtype: The dtype in the result.
        cast: What the cast does; `count` is checked to fit when it is read.
        reason: The rule or module structure behind the mapping; empty for the path itself.
        evidence: What the mapping rests on.
    """

    wanted: WantedLeaf
    recipe: Recipe
    stored_dtype: np.dtype[Any]
    dtype: np.dtype[Any]
    cast: CastKind
    reason: str = ""
    evidence: MatchEvidence = SAME_PATH

    @property
    def transform(self) -> str:
        """What is done to the stored value, in a few words; empty for nothing."""
        cast = "" if self.cast == "same" else f"cast {self.stored_dtype} to {self.dtype}"
        return ", ".join(part for part in (self.reason, describe(self.recipe), cast) if part)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Missing:
    """A weight that the checkpoint lacks, whole or in some layers.

    Attributes:
        wanted: The leaf.
        policy: What is to become of it.
        filled_by: Where an initial value comes from; None where `init` has no source.
        layers: The layers that are missing; empty if the whole leaf is.
        recipe: How to make the layers that are stored, with `Fill` for the others.
        aliases: The other paths under which the target has the same Variable.
    """

    wanted: WantedLeaf
    policy: Policy
    filled_by: DefaultSource | None = None
    layers: tuple[int, ...] = ()
    recipe: Recipe | None = None
    aliases: tuple[Path, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mismatched:
    """A leaf whose stored counterpart cannot become it.

    Attributes:
        wanted: The leaf.
        recipe: What it was mapped to.
        kind: What differs.
        stored_shape: The shape that the recipe gives.
        stored_dtype: The stored dtype; the implementation's name for keys.
        detail: One more fact where shapes and dtypes do not say it all.
        surplus: How many layers the stored group has more than the wanted one.
        reason: The rule or structure that made it what it is; empty for none.
    """

    wanted: WantedLeaf
    recipe: Recipe
    kind: Literal["shape", "dtype", "key"]
    stored_shape: Shape
    stored_dtype: str
    detail: str = ""
    surplus: int = 0
    reason: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Defaulted:
    """State that a Linen layout never holds: random state, caches, intermediates."""

    wanted: WantedLeaf
    source: DefaultSource
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """What every leaf of one target will be, given one checkpoint's metadata.

    The mappings are keyed by path: wanted paths in `restored`, `missing`,
    `mismatched` and `defaulted`, stored paths in `unexpected`, `skipped` and
    `dropped`.

    Attributes:
        directory: The item directory; `IN_MEMORY` for a tree in memory.
        layout: Title of the layout it was read under.
        stored_count: Leaves in the checkpoint.
        restored: Leaves that come from disk.
        missing: Weights that the checkpoint lacks.
        mismatched: Leaves whose shape, dtype or key differs.
        defaulted: State that a Linen layout never holds.
        unexpected: Stored leaves that the target does not want.
        skipped: Stored leaves of parts the target does not ask for (an optimizer).
        dropped: Stored values that NNX has no Variable for, and those that the user's rules drop.
        unexpected_policy: What to do about unexpected leaves.
        faults: Errors that no single leaf has: ambiguous mappings.
        sides: Both sides, leaf by leaf, for the diagnosis.
        renames: The rules that it was made under.
        read_as: The layout that was asked for.
    """

    directory: str
    layout: str
    stored_count: int
    restored: Mapping[Path, Restored]
    missing: Mapping[Path, Missing]
    mismatched: Mapping[Path, Mismatched]
    defaulted: Mapping[Path, Defaulted]
    unexpected: Mapping[Path, StoredLeaf]
    skipped: Mapping[Path, StoredLeaf]
    dropped: Mapping[Path, Dropped | Discarded]
    unexpected_policy: UnexpectedPolicy = "warn"
    faults: tuple[RestoreError, ...] = ()
    sides: Sides = dataclasses.field(default_factory=Sides, repr=False)
    renames: tuple[Rule, ...] = ()
    read_as: str = "auto"

    @property
    def wanted_count(self) -> int:
        """How many leaves the target has."""
        return len(self.restored) + len(self.missing) + len(self.mismatched) + len(self.defaulted)

    @derived
    def counted_otherwise(self) -> Set[Path]:
        """Restored leaves of lists that the other side counts otherwise."""
        return _counted_otherwise(self)

    def under(self, policy: Policy) -> Self:
        """Returns the same with every missing weight under another policy."""
        changed = {path: dataclasses.replace(item, policy=policy) for path, item in self.missing.items()}
        return dataclasses.replace(self, missing=changed)


def copies_of_model(unexpected: Mapping[Path, StoredLeaf], restored: Mapping[Path, Restored]) -> list[str]:
    """Returns the keys under which the restored leaves lie once more, with the same paths and shapes."""
    if not unexpected:
        return []
    groups: dict[str, dict[Path, Shape]] = defaultdict(dict)
    for item in restored.values():
        if isinstance(item.recipe, Read) and len(item.recipe.path) > 1:
            groups[str(item.recipe.path[0])][item.recipe.path[1:]] = item.wanted.shape
    beside: dict[Path, dict[Path, Shape]] = defaultdict(dict)
    for path, leaf in unexpected.items():
        if len(path) > 1:
            beside[path[:1]][path[1:]] = leaf.shape
    return [
        render(top)
        for top, leaves in beside.items()
        if any(own and own.items() <= leaves.items() for own in groups.values())
    ]


def look(leaf: WantedLeaf | StoredLeaf) -> str:
    """Returns shape and dtype: `(4096, 32000) bfloat16`."""
    return f"{leaf.shape} {dtype_name(leaf.dtype)}"


def dtype_name(dtype: Any) -> str:
    """Returns a dtype as a person knows it: a random key's by its implementation."""
    if dtype is None:
        return "not an array"
    return _key_name(dtype) if is_key(dtype) else name_of(dtype)


@functools.cache
def _key_name(dtype: Any) -> str:
    known = next((name for name in KEY_IMPLEMENTATIONS if same_key(name, dtype)), None)
    return f"key<{known}>" if known else name_of(dtype)


def restored_rows(items: Iterable[Restored]) -> list[Row]:
    """Returns leaf, shape, dtype, source, transform, and what says an axis that its own shape does not."""
    return [
        Row(
            item.wanted.path,
            (f"{item.wanted.shape} {dtype_name(item.dtype)}",),
            _sources(item.recipe),
            _transform(item),
        )
        for item in items
    ]


def _transform(item: Restored) -> str:
    ground = item.evidence.axis_by
    told = item.transform if ground in (None, "shape") else f"{item.transform}: {GROUNDS[ground]}"
    return told if item.transform else ""


def evidence_rows(items: Iterable[Restored]) -> list[Row]:
    """Returns leaf, and what its mapping rests on."""
    return [Row(item.wanted.path, (item.evidence.words,)) for item in items]


def missing_rows(items: Iterable[Missing], *, with_policy: bool = False) -> list[Row]:
    """Returns leaf, shape, dtype, and what becomes of it."""
    return [
        Row(
            item.wanted.path,
            (look(item.wanted), _layers(item), _aliases(item), _settled(item) if with_policy else ""),
        )
        for item in items
    ]


def _layers(item: Missing) -> str:
    return (
        f"{'layer' if len(item.layers) == 1 else 'layers'} {ranges(item.layers)} missing"
        if item.layers
        else ""
    )


def _aliases(item: Missing) -> str:
    return f"also {', '.join(map(render, item.aliases))}" if item.aliases else ""


_SOURCES = {
    "target": "its value in the target",
    "init": "computed by init",
    "zeros": "zeros",
    "seed": "derived from its path",
}


def _settled(item: Missing) -> str:
    if item.policy == "error" or item.filled_by is None:
        return "policy error" if item.policy == "error" else f"policy {item.policy}: no initial value"
    return f"policy {item.policy}: {_SOURCES[item.filled_by]}"


def mismatched_rows(items: Iterable[Mismatched]) -> list[Row]:
    """Returns leaf, both shapes and dtypes, source and transform."""
    return [
        Row(
            item.wanted.path,
            _differences(item),
            _sources(item.recipe),
            describe(item.recipe),
        )
        for item in items
    ]


def _differences(item: Mismatched) -> tuple[str, ...]:
    stored, wanted = f"{item.stored_shape} {item.stored_dtype}", look(item.wanted)
    return (
        (wanted, item.detail) if stored == wanted else (f"stored {stored}", f"wanted {wanted}", item.detail)
    )


def defaulted_rows(items: Iterable[Defaulted]) -> list[Row]:
    """Returns leaf, where its value comes from, and why."""
    return [Row(item.wanted.path, (_SOURCES[item.source], item.reason)) for item in items]


def stored_rows(leaves: Iterable[StoredLeaf]) -> list[Row]:
    """Returns stored leaf, shape and dtype."""
    return [Row(leaf.path, (look(leaf),)) for leaf in leaves]


def closest_row(wanted: WantedLeaf, held: Iterable[StoredLeaf]) -> Row:
    """Returns a wanted leaf and what it may be; stored shapes beside their own paths where one differs."""
    paths: dict[str, list[Path]] = defaultdict(list)
    for leaf in held:
        paths[look(leaf)].append(leaf.path)
    own = look(wanted)
    shapes = {shape: f" {shape}{' each' * (len(each) > 1)}" for shape, each in paths.items()}
    parts = [fold_paths(each) + shapes[shape] * (paths.keys() != {own}) for shape, each in paths.items()]
    return Row(wanted.path, (own,), ", ".join(parts))


def dropped_rows(items: Iterable[Dropped | Discarded]) -> list[Row]:
    """Returns stored leaf, shape, dtype and the reason."""
    return [Row(item.leaf.path, (look(item.leaf), item.reason)) for item in items]


def _sources(recipe: Recipe) -> str:
    if isinstance(recipe, Read):
        return render(recipe.path)  # Nearly every leaf: there is nothing to fold.
    return fold_in_order(reads(recipe))


def _counted_otherwise(verdict: Verdict) -> set[Path]:
    """Returns the restored leaves of lists of which the other side has more, and beside its list less.

    `layers_{0..2}` are `proj_in`, `layers/0` and `proj_out`: no number tells which; nor where one list counts
    what holds nothing, `flows_{0,1,3}` and `flows/{0..2}`. And those whose name is stored with a number too,
    where the target has another one beside it: `norm` and `norm2` are `norm` and `moe_norm`, or `stem/norm`.
    Last, what is left of a module of which another leaf has another shape.
    """
    torn = {path[:-1] for path, item in verdict.mismatched.items() if item.kind == "shape"}
    rest = {path for path in (verdict.restored if torn else ()) if path[:-1] in torn}
    if not (verdict.restored and verdict.missing and verdict.unexpected):
        return rest
    without = (*verdict.missing.items(), *verdict.mismatched.items())
    wanted = {path: item.wanted.shape for path, item in without}
    stored = {path: leaf.shape for path, leaf in verdict.unexpected.items()}
    (lacking, beside), (more, others) = map(_lists_and_modules, (wanted, stored))
    near = itertools.product(wanted, (2, 3))
    new = {((at := canonical(path))[:-depth], at[-1:], wanted[path]) for path, depth in near}
    # `gamma1` is the scale of a norm where `beta1` is wanted beside it, and else may scale a layer.
    norms = ((*path[:-1], f"gamma{str(path[-1])[4:]}") for path in wanted if str(path[-1])[:4] == "beta")
    found: set[Path] = {path for path in norms if path in verdict.restored}
    numbered = {(*_place(path), shape) for path, shape in stored.items()}
    for path, item in verdict.restored.items():
        source = next(iter(reads(item.recipe)), ())
        left, right = canonical(path), canonical(source)
        shape = item.wanted.shape
        if (*_place(source), shape) in numbered and (canonical(path[:-2]), left[-1:], shape) in new:
            found.add(path)
        for at, (token, other) in enumerate(zip(left[::-1], right[::-1], strict=False), 1):
            if is_number(token) and token == other:
                one, two = left[:-at], right[:-at]
                if more[two] & (beside[one[:-1]] | lacking[one]) or lacking[one] & others[two[:-1]]:
                    found.add(path)
    return found | rest | _shifted(verdict)


def _shifted(verdict: Verdict) -> set[Path]:
    """Returns the restored leaves of names that each side counts from another number.

    `block0` to `block2` are `block1` to `block3`, or else the target has lost one end and gained the other.
    """
    counted: dict[object, tuple[set[int], set[int]]] = defaultdict(lambda: (set(), set()))
    members, places = defaultdict[object, list[Path]](list), dict[Tokens, Tokens]()
    for path, item in (*verdict.restored.items(), *verdict.mismatched.items()):
        left, right = canonical(path), canonical(next(iter(reads(item.recipe)), ()))
        for (one, *rest, number), (two, *other) in zip(_numbers(left), _numbers(right), strict=False):
            if [*rest, number] == other:
                places[two] = one
                members[one, *rest].append(path)
                for numbers in counted[one, *rest]:
                    numbers.add(number)
    for side, leaves in enumerate((verdict.missing, verdict.unexpected)):
        for path in leaves:
            for place, *rest, number in _numbers(canonical(path)):
                key = (places.get(place) if side else place, *rest)
                if key in counted:
                    counted[key][side].add(number)
    runs = ((key, *map(sorted, sides)) for key, sides in counted.items() if sides[0] != sides[1])
    found = (
        key for key, ours, theirs in runs if [x - ours[0] for x in ours] == [x - theirs[0] for x in theirs]
    )
    return {path for key in found if _is_run(counted[key][0]) for path in members[key]}


def _numbers(tokens: Tokens) -> Iterator[tuple[Tokens, Tokens, str, int]]:
    """Yields the numbers in a path's names, the last first: place, what is below, the name, the number."""
    for at in reversed(range(len(tokens))):
        for match in () if is_number(tokens[at]) else _NUMBER.finditer(tokens[at]):
            base = f"{tokens[at][: match.start()]}#{tokens[at][match.end() :]}"
            yield tokens[:at], tokens[at + 1 :], base, int(match[0])


def _is_run(numbers: Collection[int]) -> bool:
    return max(numbers) - min(numbers) + 1 == len(numbers)


_DIGITS, _NUMBER = re.compile(r"\d"), re.compile(r"\d+")


def _place(path: Path) -> tuple[Path, str, Path]:
    """Returns the module around a part, the part's name without numbers, and its parameter."""
    return path[:-2], _DIGITS.sub("", str(path[-2:-1])), path[-1:]


def _lists_and_modules(
    leaves: Mapping[Path, Shape],
) -> tuple[Mapping[Tokens, set[object]], Mapping[Tokens, set[object]]]:
    """Returns what lies below the numbers of each list, and below the names in each module."""
    lists, modules = defaultdict[Tokens, set[object]](set), defaultdict[Tokens, set[object]](set)
    for path, shape in leaves.items():
        tokens = canonical(path)
        for at, token in enumerate(tokens[:-1]):
            (lists if is_number(token) else modules)[tokens[:at]].add((tokens[at + 1 :], shape))
    return lists, modules
