"""The same numbers in other arrays: axes in another order, axes merged, several weights fused into one.

Each cause comes with the rules that put it right. Fused are queries, keys and values, or the gates of a cell.
A T5X checkpoint leaves the axes of some of Adafactor's factored moments open.
"""

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from orbax_nnx_handler.planning.core.errors import Cause, Hint, as_python
from orbax_nnx_handler.planning.core.folding import list_paths
from orbax_nnx_handler.planning.core.leaves import FACTORED, Pair, Shape, moved_groups, order_after, permuted
from orbax_nnx_handler.planning.core.lines import counted, listed
from orbax_nnx_handler.planning.core.paths import Path, Tokens, is_number, render
from orbax_nnx_handler.planning.core.recipes import Read
from orbax_nnx_handler.planning.diagnosis.evidence import Evidence, spell
from orbax_nnx_handler.planning.diagnosis.ways import (
    in_any_order,
    shortest_patterns,
    tried,
)
from orbax_nnx_handler.planning.rules import Fuse, Rename, Reshape, Rule, Split, Transpose

_RULES = 8
"""Rules that a hint writes out; more of them are a matter for `suggest` or a loop."""


def _pass(rules: Sequence[Rule], before: str = "", after: str = ".") -> Hint:
    text = f"renames={as_python(list(rules))}"
    if len(rules) > _RULES:
        text = f"{len(rules)} such rules in renames, of which the first is {as_python(rules[0])}"
    return Hint(f"{before}pass {text}{after}", {"renames": list(rules)})


Permutation = tuple[int, ...]


_Explained = Mapping[tuple[int, ...], Sequence[Path]]
"""Mismatched weights by what makes the stored shape the wanted one: an order of axes, or a shape."""
_Shapes = Mapping[Path, tuple[Shape, Shape]]
"""The stored and the wanted shape of weights."""


def find_permuted(evidence: Evidence) -> Iterable[Cause]:
    """Yields weights whose stored shape is the wanted one in another order of axes, or another weight's."""
    shapes = _shapes(evidence)
    found, conditions = _by_group(evidence, shapes)
    grouped = set(_paths(found))
    alone = {
        order: [p for p in some if p not in grouped]
        for order, some in _explained(evidence, _permutation).items()
    }
    alone = {order: some for order, some in alone.items() if some}
    if not found and not alone:
        yield from _exchanged(evidence)
        return
    others: _Explained = _with_moved(evidence, alone, grouped) if alone else {}
    by_others = [path for path in _paths(others) if path not in {*_paths(alone)}]
    for order, some in others.items():
        found[order] = [*found.get(order, ()), *some]
    paths = _paths(found)
    wrong = [path for path in paths if path in evidence.mismatched]
    first = evidence.mismatched[wrong[0]]
    swapped = _swapped(evidence, wrong)
    rules = [Transpose(pattern, order) for pattern, order in _patterns(evidence, found)]
    # Both readings give the same shapes: only the writer knows.
    other = f", or {listed(map(repr, swapped))} carry each other's names" if swapped else ""
    exchange = ""
    if swapped:
        one, two = swapped
        exchange = f" for the first, renames={[(one, two), (two, one)]!r} for the second"
    if by_others:
        conditions.append(
            f"the layers of {render(by_others[0])} lie where the others' do: its own shape allows more"
        )
    condition = f" if {' and '.join(conditions)}" if conditions else ""
    more = counted(len(paths) - len(wrong), "weight", "weights") if len(paths) > len(wrong) else ""
    too = f", and {more} of their stack with them, shaped alike either way" if more else ""
    cause = Cause(
        kind="AxesPermuted",
        text=f"{counted(len(wrong), 'weight is', 'weights are')} stored with the axes in another order "
        f"({first.stored_shape} for {first.wanted.shape}){too}{other}.",
        paths=evidence.with_moments(paths),
        way=_pass(rules, after=f"{exchange}{condition}."),
        facts={"stored": first.stored_shape, "wanted": first.wanted.shape, "swapped": swapped},
    )
    if untold := _untold(evidence, shapes, others):
        # Which it is, no rule to paste may say.
        also = [Transpose(pattern, order) for pattern, order in _patterns(evidence, untold)]
        names = list_paths(_paths(untold))
        doubt = f"{names} may be stored so too, its shape is the same either way, and only its writer knows"
        then = f": then pass {as_python(also)} as well" if len(also) <= _RULES else ""
        way = tried(cause, evidence)
        way = Hint(f"{way.words} {doubt}{then}.") if way.arguments else way
        cause = dataclasses.replace(cause, way=way)
    yield cause


def _by_group(evidence: Evidence, shapes: _Shapes) -> tuple[dict[tuple[int, ...], list[Path]], list[str]]:
    """Returns the weights of groups that one move of their axis explains, by order, and what is to be so."""
    paths = list(shapes)
    pairs = [Pair(evidence.below[path], *shapes[path]) for path in paths]
    found: dict[tuple[int, ...], list[Path]] = defaultdict(list)
    conditions: list[str] = []
    for group in moved_groups(pairs):
        members = [paths[at] for at in group.members]
        if len(group.moves) != 1:
            continue
        axis, to = group.moves[0]
        for path in members:
            found[order_after(len(shapes[path][0]), (axis, to))].append(path)
        if any(path in evidence.restored or _permutation(*shapes[path]) is None for path in members):
            conditions.append(
                f"all layers of {spell(group.name)!r} lie on axis {axis} in the checkpoint "
                f"and on axis {to} in the target"
            )
    return found, conditions


def _shapes(evidence: Evidence) -> _Shapes:
    """Returns the stored and the wanted shape of weights that are one stored leaf each, as it is."""
    found: dict[Path, tuple[Shape, Shape]] = {}
    plain = _plain(evidence)
    for path in evidence.weights if plain else ():
        item = evidence.mismatched.get(path)
        if item is not None:
            if isinstance(item.recipe, Read):
                found[path] = item.stored_shape, item.wanted.shape
        elif (kept := evidence.restored.get(path)) and isinstance(kept.recipe, Read):
            found[path] = kept.wanted.shape, kept.wanted.shape
    return found


def _untold(evidence: Evidence, shapes: _Shapes, found: _Explained) -> _Explained:
    """Returns restored weights that are called as arranged ones, and have one shape arranged or not."""
    untold: dict[Permutation, list[Path]] = {}
    orders = {(path[-1], order) for order, paths in found.items() for path in paths}
    for path, (stored, wanted) in shapes.items():
        fitting = [
            order
            for name, order in orders
            if name == path[-1] and len(order) == len(stored) and permuted(stored, order) == wanted
        ]
        if path in evidence.restored and len(fitting) == 1:
            untold[fitting[0]] = [*untold.get(fitting[0], ()), path]
    return untold


def _with_moved(evidence: Evidence, found: _Explained, grouped: Collection[Path]) -> _Explained:
    """Returns the orders with those of leaves that several would explain: an axis moved as in all others.

    A stack whose layers lie on another axis: (3, 5) for (5, 3), and (3, 5, 3) for (5, 3, 3).
    """
    moves = set[tuple[int, int]].intersection(*map(_moves, found))
    every = {change: list(paths) for change, paths in found.items()}
    known = {path for paths in found.values() for path in paths}
    for path in _plain(evidence) if moves else ():
        item = evidence.mismatched[path]
        stored, wanted = item.stored_shape, item.wanted.shape
        orders = {order_after(len(stored), move) for move in moves if max(move) < len(stored)}
        fitting = [order for order in orders if permuted(stored, order) == wanted]
        if path not in known and path not in grouped and len(fitting) == 1:
            every.setdefault(fitting[0], []).append(path)
    return every


def _moves(order: Permutation) -> set[tuple[int, int]]:
    """Returns the moves of one axis to another place that an order is."""
    places = itertools.permutations(range(len(order)), 2)
    return {move for move in places if order_after(len(order), move) == order}


def _exchanged(evidence: Evidence) -> Iterable[Cause]:
    """Yields weights below two names that have each other's shapes, where no order of axes explains them."""
    paths = evidence.mismatched_weights
    if len(paths) == len(_plain(evidence)) and (names := _swapped(evidence, paths)):
        one, two = names
        rules = [(one, two), (two, one)]
        yield Cause(
            kind="NamesExchanged",
            text=f"the stored {one!r} has the shapes of the wanted {two!r}, and the other way round.",
            paths=evidence.with_moments(paths),
            way=Hint(f"if they carry each other's names, pass renames={rules!r}.", {"renames": rules}),
            facts={"names": names},
        )


def find_merged(evidence: Evidence) -> Iterable[Cause]:
    """Yields weights of which neighbouring axes are one axis on the other side."""
    found = _explained(evidence, _merged)
    if not found:
        return
    paths = _paths(found)
    first = evidence.mismatched[paths[0]]
    stored, wanted = first.stored_shape, first.wanted.shape
    side = "in the checkpoint" if len(stored) < len(wanted) else "in the target"
    rules = [Reshape(pattern, shape) for pattern, shape in _patterns(evidence, found)]
    yield Cause(
        kind="AxesMerged",
        text=f"{counted(len(paths), 'weight has', 'weights have')} neighbouring axes merged into one {side} "
        f"({stored} for {wanted}): the same number of elements.",
        paths=evidence.with_moments(paths),
        way=_pass(rules, before="if the elements are in the same order, "),
        facts={"stored": stored, "wanted": wanted},
    )


def _explained(evidence: Evidence, explain: Callable[[Shape, Shape], tuple[int, ...] | None]) -> _Explained:
    found: dict[tuple[int, ...], list[Path]] = defaultdict(list)
    for path in _plain(evidence):
        item = evidence.mismatched[path]
        change = explain(item.stored_shape, item.wanted.shape)
        if change is not None:
            found[change].append(path)
    return found


def _paths(found: _Explained) -> list[Path]:
    return [path for each in found.values() for path in each]


def _patterns(evidence: Evidence, found: _Explained) -> Iterable[tuple[str, tuple[int, ...]]]:
    for change, paths in found.items():
        for pattern in shortest_patterns(evidence, _sources(evidence, paths)):
            yield pattern, change


def _plain(evidence: Evidence) -> list[Path]:
    """Returns mismatched weights that are one stored leaf each, as it is."""
    return [
        path for path in evidence.mismatched_weights if isinstance(evidence.mismatched[path].recipe, Read)
    ]


def _sources(evidence: Evidence, paths: Iterable[Path]) -> list[Path]:
    every = (evidence.mismatched.get(path) or evidence.restored[path] for path in paths)
    recipes = [item.recipe for item in every]
    return [recipe.path for recipe in recipes if isinstance(recipe, Read)]


def _permutation(stored: Shape, wanted: Shape) -> Permutation | None:
    """Returns the order of the stored axes that gives the wanted shape; None for none, and for several."""
    if sorted(stored) != sorted(wanted) or stored == wanted or len(stored) > 6:
        return None
    orders = itertools.permutations(range(len(stored)))
    fitting = [order for order in orders if permuted(stored, order) == wanted]
    return fitting[0] if len(fitting) == 1 else None


def _merged(stored: Shape, wanted: Shape) -> Shape | None:
    """Returns the wanted shape where merging axes, or cutting one, leads there."""
    long, short = sorted((stored, wanted), key=len, reverse=True)
    return wanted if len(long) > len(short) > 0 and _merges(long, short) else None


def _merges(long: Shape, short: Shape) -> bool:
    """Tells whether products of neighbouring axes of one shape give the other."""
    rest = list(long)
    for size in short:
        product = 1
        while rest and (product < size or (product == size and rest[0] == 1 and len(rest) > 1)):
            product *= rest.pop(0)
        if product != size:
            return False
    return math.prod(rest) == 1


def _swapped(evidence: Evidence, paths: Sequence[Path]) -> tuple[str, ...]:
    """Returns two names whose weights have each other's shapes throughout."""
    modules: dict[tuple[Path, object], dict[str, tuple[Shape, Shape]]] = defaultdict(dict)
    for path in paths:
        item = evidence.mismatched[path]
        if len(path) < 2 or not isinstance(path[-2], str):
            return ()
        modules[path[:-2], path[-1]][path[-2]] = (item.stored_shape, item.wanted.shape)
    names = {tuple(sorted(shapes)) for shapes in modules.values()}
    if len(names) != 1 or not all(_crossed(shapes) for shapes in modules.values()):
        return ()
    return names.pop()


def _crossed(shapes: Mapping[str, tuple[Shape, Shape]]) -> bool:
    if len(shapes) != 2:
        return False
    (stored, wanted), (other_stored, other_wanted) = shapes.values()
    return stored == other_wanted and wanted == other_stored


Siblings = Mapping[str, Path]
"""Weights of one kind below one parent, by the name of their module."""


@dataclasses.dataclass(frozen=True)
class _Join:
    """How several arrays make one.

    Attributes:
        whole: The name of the one.
        parts: The names of the several, in order.
        leaf: What all of them end in (`kernel`).
        axis: Along which axis.
        shape: The shape of the one.
        shapes: Those of the several.
    """

    whole: str
    parts: tuple[str, ...]
    leaf: str
    axis: int
    shape: Shape
    shapes: tuple[Shape, ...]


def find_flat_keys(evidence: Evidence) -> Iterable[Cause]:
    """Yields that paths were stored as single keys with dots, as `flatten_dict(sep=".")` writes them."""
    flat = [path for path in evidence.free_weights if path and "." in str(path[-1])]
    rules = [Rename(r"\.", "/", regex=True)]
    found = evidence.restored_under([*evidence.verdict.renames, *rules]) if flat else None
    met = [path for path in evidence.missing if path in found] if found else []
    if met:
        yield Cause(
            kind="FlatKeys",
            text=f"{counted(len(flat), 'stored key')} of levels joined by dots, as {str(flat[0][-1])!r}: the "
            "tree was flattened before it was saved.",
            paths=(*met, *flat),
            way=_pass(rules),
            facts={"count": len(flat)},
        )


def find_fused(evidence: Evidence) -> Iterable[Cause]:
    """Yields weights that are one array on one side and several on the other."""
    wanted = _siblings({path: evidence.below[path] for path in evidence.missing_weights})
    stored = _siblings({path: evidence.stored_below(item) for path, item in evidence.free_weights.items()})
    found: dict[tuple[_Join, str], list[Path]] = defaultdict(list)
    for place in (place for place in wanted if place in stored):
        sides = (("checkpoint", stored[place], wanted[place]), ("target", wanted[place], stored[place]))
        for side, wholes, parts in sides:
            for join, path in _joins(evidence, place[1], wholes, parts):
                several = [parts[name] for name in join.parts]
                ours, theirs = ([path], several) if side == "target" else (several, [path])
                if not evidence.speaks_against(ours, theirs):
                    found[join, side] += [path, *several]
    for (join, side), paths in found.items():
        yield _fused_cause(evidence, join, side, paths)


def _joins(evidence: Evidence, leaf: str, wholes: Siblings, parts: Siblings) -> Iterable[tuple[_Join, Path]]:
    for whole, path in wholes.items():
        names = _spelled(whole, parts) or sorted(parts)
        shape, shapes = evidence.shape(path), tuple(evidence.shape(parts[name]) for name in names)
        axes = [
            axis
            for axis in range(len(shape))
            if _end_to_end(shape, shapes, axis) or _side_by_side(shape, shapes, axis)
        ]
        # Along which of two axes, no shape tells.
        if len(names) > 1 and len(axes) == 1:
            yield _Join(whole, tuple(names), leaf, axes[0], shape, shapes), path


def _siblings(leaves: Mapping[Path, Tokens]) -> Mapping[tuple[Tokens, str], Siblings]:
    found: dict[tuple[Tokens, str], dict[str, Path]] = defaultdict(dict)
    for path, tokens in leaves.items():
        if len(tokens) > 1 and not is_number(tokens[-2]):
            found[tokens[:-2], tokens[-1]][tokens[-2]] = path
    return found


def _spelled(whole: str, names: Iterable[str]) -> list[str]:
    """Returns the parts that a name spells, in its order (`qkv`, `gate_up`); empty if it spells none."""
    every = sorted(names)
    for beginnings in (whole.split("_"), list(whole)):
        found = [[name for name in every if name.startswith(part)] for part in beginnings]
        if len(found) > 1 and all(len(each) == 1 for each in found):
            return [each[0] for each in found]
    return []


def _end_to_end(whole: Shape, parts: Sequence[Shape], axis: int) -> bool:
    if any(len(part) != len(whole) for part in parts):
        return False
    others = {(*part[:axis], *part[axis + 1 :]) for part in parts}
    return (
        others == {(*whole[:axis], *whole[axis + 1 :])} and sum(part[axis] for part in parts) == whole[axis]
    )


def _side_by_side(whole: Shape, parts: Sequence[Shape], axis: int) -> bool:
    return whole[axis] == len(parts) and set(parts) == {(*whole[:axis], *whole[axis + 1 :])}


def _fused_cause(evidence: Evidence, join: _Join, side: str, paths: Sequence[Path]) -> Cause:
    lost = [path for path in paths if path in evidence.missing]
    count, other = len(paths) // (len(join.parts) + 1), "target" if side == "checkpoint" else "checkpoint"
    times = f", in {counted(count, 'module')}" if count > 1 else ""
    cause = Cause(
        kind="Fused",
        text=f"{listed(map(repr, join.parts))} are one array {join.whole!r} in the {side} {join.shape} and "
        f"{len(join.parts)} in the {other} {join.shapes[0]}{times}.",
        paths=(*evidence.with_moments(lost), *(path for path in paths if path not in evidence.missing)),
        way=_pass(_fused_rules(join, side)),
        facts={"whole": join.whole, "parts": join.parts, "side": side, "count": count},
    )
    names = [f"{name}/{join.leaf}" for name in join.parts]
    is_ordered = bool(_spelled(join.whole, join.parts))
    return cause if is_ordered else in_any_order(cause, evidence, names, join.shapes)


def _fused_rules(join: _Join, side: str) -> tuple[Rule, ...]:
    whole, parts = f"{join.whole}/{join.leaf}", tuple(f"{name}/{join.leaf}" for name in join.parts)
    part, axis = join.shapes[0], join.axis
    stacked = len(part) < len(join.shape)
    if side == "checkpoint":
        sizes = tuple(shape[axis] for shape in join.shapes) if len(set(join.shapes)) > 1 else None
        split = Split(whole, parts, axis=axis, sizes=sizes)
        return (split, *(Reshape(name, part) for name in parts if stacked))
    one = (*part[:axis], 1, *part[axis:])
    return (*(Reshape(name, one) for name in parts if stacked), Fuse(parts, whole, axis=axis))


def find_open_factoring(evidence: Evidence) -> Iterable[Cause]:
    """Yields the missing factored moments, where the checkpoint has some that no one can name."""
    placements = evidence.sides.placements
    stored = [
        path for path, item in placements.items() if item.section == "other" and _is_factored(item.slot)
    ]
    if not stored:
        return
    slots = {path: slot[-1:] for path, (slot, _) in evidence.moments.items() if path in evidence.missing}
    missing = [path for path, slot in slots.items() if _is_factored(slot)]
    if missing:
        yield Cause(
            kind="OpenFactoring",
            text=f"{len(stored)} stored v_row and v_col belong to parameters with two axes of one size, and "
            "T5X does not store which axis it took for the row: optax may call them the other way round.",
            paths=(*missing, *stored),
            may_be_initialised=True,
            facts={"moments": len(missing), "stored": len(stored)},
        )


def _is_factored(slot: Path | None) -> bool:
    return slot is not None and slot[-1:] in {(name,) for name in FACTORED}
