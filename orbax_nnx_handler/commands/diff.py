"""`orbax-nnx diff`: how two checkpoints differ."""

import argparse
import dataclasses
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from orbax_nnx_handler.commands.arguments import (
    add_item,
    add_json,
    add_memory,
    add_path,
    add_rules,
    described,
    rules_of,
)
from orbax_nnx_handler.commands.screen import Screen, count
from orbax_nnx_handler.planning.core.dtypes import common_dtype
from orbax_nnx_handler.planning.core.folding import Row
from orbax_nnx_handler.planning.core.leaves import StoredLeaf
from orbax_nnx_handler.planning.core.lines import aligned
from orbax_nnx_handler.planning.core.paths import Path, segments, sort_paths, spelled
from orbax_nnx_handler.planning.core.recipes import Read
from orbax_nnx_handler.planning.layouts.layout import FLAX_COLLECTIONS
from orbax_nnx_handler.planning.rules import Rule, apply_rules
from orbax_nnx_handler.planning.rules.entries import Entry, model_entries
from orbax_nnx_handler.planning.verdict.leaf_verdicts import check_readable
from orbax_nnx_handler.storage.checkpoint.find import find_item
from orbax_nnx_handler.storage.checkpoint.metadata import Checkpoint, read_metadata
from orbax_nnx_handler.storage.converting.blocks import Difference, Written, as_stored, differences, window_of
from orbax_nnx_handler.storage.converting.planned_leaves import reading_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two checkpoints side by side; leaves are matched by their paths.

    A last level `value` is left out, and first ones that name a collection where the other side has none.
    """

    left: Checkpoint
    right: Checkpoint
    count: int
    only_left: tuple[StoredLeaf, ...]
    only_right: tuple[StoredLeaf, ...]
    changed: tuple[tuple[StoredLeaf, StoredLeaf], ...]
    values: Mapping[Path, Difference]

    @property
    def is_same(self) -> bool:
        """Whether nothing differs, as far as was looked."""
        unequal = any(difference.unequal for difference in self.values.values())
        return not (self.only_left or self.only_right or self.changed or unequal)

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain values."""
        return {
            "a": str(self.left.directory),
            "b": str(self.right.directory),
            "same": self.is_same,
            "only_a": [_leaf(leaf) for leaf in self.only_left],
            "only_b": [_leaf(leaf) for leaf in self.only_right],
            "changed": [
                {"path": spelled(one.path), "a": _kind(one), "b": _kind(other)} for one, other in self.changed
            ],
            "values": [
                {"path": spelled(path), "unequal": item.unequal, "largest": item.largest}
                for path, item in self.values.items()
            ],
        }


def add_to(commands: Any) -> None:
    """Declares the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "diff",
        help="how two checkpoints differ",
        **described(
            "Compares paths, shapes and dtypes of two checkpoints, and their values if asked to. "
            "Rules are for PATH_A. Exit status: 0 nothing differs, 1 something does.",
            "orbax-nnx diff run/1200 run/1300 --values",
        ),
    )
    add_path(parser, "path_a")
    add_path(parser, "path_b")
    add_rules(parser)
    add_item(parser)
    parser.add_argument("--values", action="store_true", help="read both and compare every value")
    add_memory(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, screen: Screen) -> int:
    """Shows the differences."""
    paths = (arguments.path_a, arguments.path_b)
    with screen.waiting("reading metadata"):
        sides = [read_metadata(find_item(path, arguments.item)) for path in paths]
    for side in sides:
        check_readable(side.broken)
    rules = rules_of(arguments)
    compared = compare(sides[0], sides[1], rules)
    if arguments.values:
        window = window_of(arguments.memory)
        compared = dataclasses.replace(compared, values=_values(sides[0], sides[1], rules, window, screen))
    if arguments.json:
        screen.json(compared.to_dict())
    else:
        _show(compared, screen, with_values=arguments.values, with_rules=bool(rules))
    return 0 if compared.is_same else 1


def compare(left: Checkpoint, right: Checkpoint, rules: Sequence[Rule] = ()) -> Comparison:
    """Compares two checkpoints by their metadata, the first one's model as rules make it."""
    ours, theirs = _by_segments(left, rules), _by_segments(right)
    paired = _paired(ours, theirs)
    pairs = [(ours[key], theirs[paired[key]]) for key in sort_paths(paired)]
    return Comparison(
        left=left,
        right=right,
        count=len(ours),
        only_left=tuple(ours[key] for key in sort_paths(ours.keys() - paired.keys())),
        only_right=tuple(theirs[key] for key in sort_paths(theirs.keys() - {*paired.values()})),
        changed=tuple((one, other) for one, other in pairs if _kind(one) != _kind(other)),
        values={},
    )


def _by_segments(checkpoint: Checkpoint, rules: Sequence[Rule] = ()) -> dict[Path, StoredLeaf]:
    return {
        _key(leaf.path): leaf
        for leaf in (
            *_untouched(checkpoint, rules).values(),
            *(
                StoredLeaf(path=entry.whole, shape=entry.shape, dtype=entry.cast or entry.dtype)
                for entry in _entries(checkpoint, rules)
            ),
        )
    }


def _paired(ours: Collection[Path], theirs: Collection[Path]) -> Mapping[Path, Path]:
    """Returns their path of each of ours: the same, or with a collection in front that the other side lacks.

    Linen variables have it, and an `nnx.State` does not; a train state has a level for its model (`model`).
    No two paths become one.
    """
    found = {key: key for key in ours if key in theirs}
    left = [[key for key in side if key not in found] for side in (ours, theirs)]
    inside = [_without_collection(keys) for keys in left]
    plain = [{key: key for key in keys} for keys in left]
    for one, other in ((inside[0], plain[1]), (plain[0], inside[1])):
        found |= {one[key]: other[key] for key in one.keys() & other.keys() if key not in found}
    if not found:
        found |= {inside[0][key]: path for key, path in _below_level(left[1], inside[0]).items()}
        found |= {path: inside[1][key] for key, path in _below_level(left[0], inside[1]).items()}
    return found


def _below_level(paths: Iterable[Path], others: Collection[Path]) -> Mapping[Path, Path]:
    """Returns paths by what they are below the one first key under which the most are the other side's."""
    levels = Counter(path[0] for path in paths if path[1:] in others)
    level = max(levels, key=levels.__getitem__, default=None)
    return {path[1:]: path for path in paths if path[0] == level and path[1:] in others}


def _without_collection(paths: Iterable[Path]) -> Mapping[Path, Path]:
    """Returns paths by what they are without the collections in front, where that is theirs alone."""
    found: dict[Path, list[Path]] = defaultdict(list)
    for path in paths:
        depth = next((at for at, key in enumerate(path) if key not in FLAX_COLLECTIONS), 0)
        if depth:
            found[path[depth:]].append(path)
    return {key: held[0] for key, held in found.items() if len(held) == 1}


def _key(path: Path) -> Path:
    """Returns what a leaf is matched by: its path without the last level of a box or of an NNX Variable.

    A list's index is an int for one writer and a string for another.
    """
    names = segments(path)
    return names[:-1] if len(names) > 1 and names[-1] == "value" else names


def _entries(checkpoint: Checkpoint, rules: Sequence[Rule]) -> Sequence[Entry]:
    """Returns the model's leaves after the rules; none without any rule."""
    if not rules:
        return ()
    layout = reading_of(checkpoint.leaves)
    return apply_rules(model_entries(layout.place(checkpoint.leaves)), rules).entries


def _untouched(checkpoint: Checkpoint, rules: Sequence[Rule]) -> Mapping[Path, StoredLeaf]:
    """Returns the leaves that rules say nothing about: what is no model's."""
    if not rules:
        return checkpoint.leaves
    layout = reading_of(checkpoint.leaves)
    placed = layout.place(checkpoint.leaves)
    return {item.leaf.path: item.leaf for item in placed if item.section != "model"}


def _written(checkpoint: Checkpoint, rules: Sequence[Rule]) -> dict[Path, Written]:
    stored = as_stored(checkpoint)
    found: dict[Path, Written] = {
        path: stored[path] for path in _untouched(checkpoint, rules) if path in stored
    }
    for entry in _entries(checkpoint, rules):
        recipe, dtype = entry.recipe, entry.cast or entry.dtype
        if isinstance(recipe, Read) and recipe.path in stored and entry.cast is None:
            found[entry.whole] = dataclasses.replace(stored[recipe.path], path=entry.whole)
        elif dtype is not None:
            found[entry.whole] = Written(path=entry.whole, recipe=recipe, shape=entry.shape, dtype=dtype)
    return {_key(path): item for path, item in found.items()}


def _values(
    left: Checkpoint, right: Checkpoint, rules: Sequence[Rule], window: int, screen: Screen
) -> Mapping[Path, Difference]:
    """Compares the values of all leaves that have one shape, in the wider of their dtypes."""
    ours = _written(left, rules)
    theirs: dict[Path, Written] = {_key(path): item for path, item in as_stored(right).items()}
    paired = ((ours[key], theirs[other]) for key, other in _paired(ours, theirs).items())
    pairs = [(one, other) for one, other in paired if one.shape == other.shape]
    dtypes = [common_dtype(one.dtype, other.dtype) for one, other in pairs]
    sides = [
        [dataclasses.replace(side, dtype=dtype) for side, dtype in zip(some, dtypes, strict=True)]
        for some in zip(*pairs, strict=True)
    ] or [[], []]
    with screen.progress(sum(leaf.nbytes for leaf in sides[0]), "comparing") as (progress,):
        return differences((left, sides[0]), (right, sides[1]), window, progress)


def _show(compared: Comparison, screen: Screen, *, with_values: bool, with_rules: bool) -> None:
    screen.facts([("A", str(compared.left.directory)), ("B", str(compared.right.directory))])
    _list(screen, "only in A", ((leaf.path, _columns(leaf)) for leaf in compared.only_left))
    _list(screen, "only in B", ((leaf.path, _columns(leaf)) for leaf in compared.only_right))
    pairs = ((one.path, ("A", *_columns(one), "B", *_columns(other))) for one, other in compared.changed)
    _list(screen, "of another shape or dtype", pairs)
    unequal = {path: item for path, item in compared.values.items() if item.unequal}
    _list(screen, "of other values", ((path, _apart(item)) for path, item in unequal.items()))
    screen.say()
    what = "values" if with_values else "paths, shapes and dtypes"
    if compared.is_same:
        leaves = count(compared.count, "leaf", "leaves")
        screen.say(f"Nothing differs in {what}: {leaves}.", "bold green")
    elif with_values and not compared.values:
        way = " under these rules." if with_rules else "; with --rules, A's leaves have B's names."
        screen.say(f"No path has leaves of one shape on both sides: no values were compared{way}")
    elif with_values:
        equal = len(compared.values) - len(unequal)
        screen.say(f"{count(equal, 'leaf has', 'leaves have')} equal values, {len(unequal)} differ.")
    else:
        changed = len(compared.changed)
        agree = count(compared.count - len(compared.only_left) - changed, "leaf agrees", "leaves agree")
        screen.say(f"{agree} in path, shape and dtype; --values compares their values.")


def _list(screen: Screen, title: str, rows: Iterable[tuple[Path, tuple[str, ...]]]) -> None:
    listed = [Row(path, columns) for path, columns in rows]
    if listed:
        screen.say()
        screen.head(f"{count(len(listed), 'leaf', 'leaves')} {title}")
        screen.say(aligned(listed))


def _apart(item: Difference) -> tuple[str, str]:
    return count(item.unequal, "value"), f"largest difference {item.largest:.3g}"


def _columns(leaf: StoredLeaf) -> tuple[str, str]:
    return str(leaf.shape), _dtype(leaf)


def _dtype(leaf: StoredLeaf) -> str:
    return str(leaf.dtype) if leaf.dtype is not None else "string"


def _kind(leaf: StoredLeaf) -> dict[str, Any]:
    return {"shape": list(leaf.shape), "dtype": _dtype(leaf)}


def _leaf(leaf: StoredLeaf) -> dict[str, Any]:
    return {"path": spelled(leaf.path)} | _kind(leaf)
