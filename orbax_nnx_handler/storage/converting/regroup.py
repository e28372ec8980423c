"""Stacks the layers of a group, or takes them apart, where no program tells what it wants.

The tree that is asked for becomes a target: every leaf under the path and with the shape that it is
to have. Which stored leaf each of them is, the same plan decides as for a restore, under the same laws.
"""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, Literal

import numpy as np
from flax import nnx

from orbax_nnx_handler.planning.core.errors import AmbiguousMappingError, RestoreError
from orbax_nnx_handler.planning.core.folding import Row, ranges
from orbax_nnx_handler.planning.core.leaves import FACTORED, Shape, StoredLeaf, WantedLeaf
from orbax_nnx_handler.planning.core.lines import aligned
from orbax_nnx_handler.planning.core.paths import Path, render, segments
from orbax_nnx_handler.planning.core.recipes import reads, substitute
from orbax_nnx_handler.planning.layouts.layout import Layout, Stored
from orbax_nnx_handler.planning.mapping.roots import owner_of
from orbax_nnx_handler.planning.options import RestoreOptions
from orbax_nnx_handler.planning.restore_plan import make_plan
from orbax_nnx_handler.planning.rules import ScanAxis, as_rules
from orbax_nnx_handler.planning.target import Target
from orbax_nnx_handler.storage.converting.blocks import Written, check_paths_distinct, refusal

GroupPath = tuple[str, ...]
"""A group's path below the collection, such as `("decoder", "layers")`."""

Regrouping = Literal["scan", "unscan"]
_NO_MOMENTS = ("moment cannot follow its layers", "moments cannot follow their layers", "on this axis")
_WITHOUT_MOMENTS = "pass --weights-only."
_SECTIONS = frozenset({"model", "optimizer", "step"})
_Shapes = Mapping[tuple[Path, Path], Shape]
"""The shapes of parameters by owner and path."""


def regroup(
    leaves: Sequence[Written],
    stored: Stored,
    layout: Layout,
    group: GroupPath,
    axis: int,
    way: Regrouping,
    directory: str = "",
) -> list[Written]:
    """Returns the leaves with one group of layers stacked or taken apart.

    Args:
        leaves: The leaves.
        stored: The stored leaves that they are made from.
        layout: How these are read.
        group: The group; of one train state where its keys, with or without `params`, stand in front, and
            of one collection alone where its name does.
        axis: The axis of the stack that counts the layers.
        way: `scan` makes `layers/...` of `layers_0/...` or `layers/0/...` and so on; `unscan` makes
            `layers_0/...` of it again.
        directory: The item directory, for messages.

    Raises:
        RestoreError: There is no such group, its leaves do not agree, or the plan does not come out.
    """
    foreign = [leaf.path for leaf in leaves if leaf.section == "optimizer" and "opt_state" not in leaf.path]
    if foreign:
        what = ("optimizer leaf is", "optimizer leaves are", "not arranged as optax arranges them")
        raise refusal(*what, foreign, _WITHOUT_MOMENTS)
    owner, collection, below = _place_of(leaves, group)
    if not below:
        hints = _no_layers(leaves, group or ("",)).hints
        raise RestoreError(f"{'/'.join(group)!r} names no group of layers.", hints=hints)
    mine = [leaf for leaf in leaves if owner in ((), leaf.owner) and collection in (None, leaf.collection)]
    paths = {leaf.path for leaf in mine}
    wanted = [leaf for leaf in leaves if leaf.path not in paths]
    wanted += (_stacked if way == "scan" else _apart)(mine, below, axis)
    known = _parameters(leaves)
    odd = [leaf for leaf in wanted if leaf.path in paths and (leaf.owner, leaf.parameter) not in known]
    behind = [leaf.path for leaf in odd if leaf.section == "optimizer" and _is_of_old(leaf, below, way)]
    if behind:
        raise refusal(*_NO_MOMENTS, behind, _WITHOUT_MOMENTS)
    check_paths_distinct(wanted)
    # What is stacked here has the axis that is asked for in each collection. Where a stack is stored,
    # Flax may have given each collection an axis of its own, and none but the named one's is told.
    collections = {leaf.collection for leaf in mine if way == "scan" and leaf.section == "model"}
    heads = [() if collection is None else (collection,)]
    heads += [(name,) for name in sorted(collections - {None, "params", collection}, key=str)]
    rules = [ScanAxis("/".join(map(str, (*owner, *head, *below))), axis) for head in heads]
    names = _names(wanted)
    plan = make_plan(
        _target(wanted, names),
        _as_stored(leaves, stored),
        RestoreOptions.of(layout=layout.name, renames=rules, unexpected="ignore"),
        directory=directory,
    )
    lost = [path for path in plan.missing if plan.sides.wanted[path].role == "optimizer"]
    if lost and len(lost) == len(plan.missing):
        raise refusal(*_NO_MOMENTS, lost, _WITHOUT_MOMENTS)
    try:
        plan.check()
    except AmbiguousMappingError as error:
        raise _with_options(error, axis, rules, directory) from None
    made = {leaf.path: leaf.recipe for leaf in leaves}
    return [
        dataclasses.replace(leaf, recipe=substitute(plan.restored[names[leaf.path]].recipe, made.__getitem__))
        if leaf.section in _SECTIONS
        else leaf
        for leaf in wanted
    ]


def in_order(leaves: Sequence[Written], groups: Sequence[GroupPath]) -> list[GroupPath]:
    """Returns the groups as they are given, but one of a collection alone before the same in all others."""
    places = {group: _place_of(leaves, group) for group in groups}
    first = {(owner, below): at for at, (owner, _, below) in reversed([*enumerate(places.values())])}

    def rank(group: GroupPath) -> tuple[int, bool]:
        owner, collection, below = places[group]
        return first[owner, below], collection is None

    return sorted(groups, key=rank)


def _place_of(leaves: Iterable[Written], group: GroupPath) -> tuple[Path, str | None, GroupPath]:
    """Returns the train state and the collection that a group's path names, and the group below these.

    `params` is no collection alone: statistics and copies have the layers of the parameters.
    """
    owners = {segments(leaf.owner): leaf.owner for leaf in leaves}
    owner = owners.get(owner_of(group, owners) or (), ())
    below = group[len(owner) :]
    modules = {leaf.parameter[0] for leaf in leaves if leaf.parameter}
    collections = {leaf.collection for leaf in leaves if leaf.section == "model"} - modules
    if not {*below[:1]} & (collections | {"params"} - modules):
        return owner, None, below
    return owner, None if below[0] == "params" else below[0], below[1:]


def _with_options(
    error: AmbiguousMappingError, axis: int, said: Sequence[ScanAxis], directory: str
) -> AmbiguousMappingError:
    """Returns the error with groups in the place of rules about them: a conversion has no rules."""
    rules = [rule for hint in error.hints for rule in as_rules(hint.arguments.get("renames", ()))]
    asked = [rule for rule in rules if isinstance(rule, ScanAxis) and rule.axis == axis and rule not in said]
    if not asked:
        return error
    named = " ".join(f"--unscan {group}" for group in dict.fromkeys(rule.group for rule in asked))
    words = f"add {named} if the program stacked that collection on axis {axis} too; you have to know."
    message = f"{error.what}\nhint: {words}\ncheckpoint: {directory}"
    return AmbiguousMappingError(error.what, paths=error.paths, hints=[words], message=message)


def _as_stored(leaves: Sequence[Written], stored: Stored) -> dict[Path, StoredLeaf]:
    """Returns the tree that the leaves make, with what is left out of it: a layout is told by all of it."""
    made = {path for leaf in leaves for path in reads(leaf.recipe)}
    return {path: leaf for path, leaf in stored.items() if path not in made} | {
        leaf.path: StoredLeaf(
            path=leaf.path,
            shape=leaf.shape,
            dtype=leaf.dtype,
            key_impl=stored[reads(leaf.recipe)[0]].key_impl,
        )
        for leaf in leaves
    }


def _names(wanted: Sequence[Written]) -> dict[Path, Path]:
    """Returns each leaf's path in the target, where every collection lies right below its train state.

    MaxText has a level more above some of them: a model below `params/params` is none beside `ema_params`.
    """
    names = {leaf.path: _without_level(leaf) for leaf in wanted}
    return names if len(set(names.values())) == len(names) else {path: path for path in names}


def _without_level(leaf: Written) -> Path:
    at = len(leaf.path) - len(leaf.parameter or ()) - 1
    is_below = leaf.section == "model" and leaf.parameter is not None and leaf.path[at] == leaf.collection
    return (*leaf.owner, *leaf.path[at:]) if is_below else leaf.path


def _target(wanted: Iterable[Written], names: Mapping[Path, Path]) -> Target:
    """Returns the target that has those names: what is neither model nor train state stays as it is."""
    leaves = {
        names[leaf.path]: WantedLeaf(
            path=names[leaf.path], kind=_kind(leaf), shape=leaf.shape, dtype=leaf.dtype
        )
        for leaf in wanted
        if leaf.section in _SECTIONS
    }
    return Target(leaves=leaves, variables=leaves, assemble=dict)


def _kind(leaf: Written) -> type[Any]:
    """Returns a Variable type of the leaf's collection."""
    if leaf.section != "model":
        return nnx.OptState
    known: dict[str | None, type[Any]] = {"params": nnx.Param, None: nnx.Param, "batch_stats": nnx.BatchStat}
    # A type of its own for any other: a cache, too, is to be kept here.
    return known.get(leaf.collection) or type(str(leaf.collection), (nnx.Variable,), {})


def _apart(leaves: Sequence[Written], group: GroupPath, axis: int) -> list[Written]:
    """Returns what is wanted where a stack is taken apart.

    Raises:
        RestoreError: There is no such group, or its leaves hold different numbers of layers.
    """
    inside = {leaf.path: leaf for leaf in leaves if _is_in(leaf, group)}
    if not inside:
        raise _no_group(leaves, group, "/".join(group))
    parameters = _parameters(leaves)
    counted = [leaf for leaf in inside.values() if not (leaf.is_unused or _factored(leaf, parameters))]
    thin = any(len(leaf.shape) <= axis for leaf in counted)
    numbers = {leaf.shape[axis] for leaf in counted} if not thin else set[int]()
    if len(numbers) != 1:
        rows = aligned(Row(leaf.path, (str(leaf.shape),)) for leaf in inside.values())
        raise RestoreError(
            f"the leaves of {render(group)} do not agree on a number of layers on axis {axis}:\n{rows}",
            paths=list(inside),
            hints=["another --axis, or --weights-only where the odd ones are an optimizer's."],
        )
    return [
        part
        for leaf in leaves
        for part in (_layers(leaf, parameters, group, axis, *numbers) if leaf.path in inside else (leaf,))
    ]


def _layers(leaf: Written, parameters: _Shapes, group: GroupPath, axis: int, count: int) -> Iterator[Written]:
    shape = _regrouped(leaf, parameters, lambda shape: (*shape[:axis], *shape[axis + 1 :]))
    for number in range(count):
        yield dataclasses.replace(_renamed(leaf, group, 1, f"{group[-1]}_{number}"), shape=shape)


def _parameters(leaves: Iterable[Written]) -> _Shapes:
    own = [leaf for leaf in leaves if leaf.section == "model" and leaf.collection in ("params", None)]
    return {(leaf.owner, leaf.parameter): leaf.shape for leaf in own if leaf.parameter is not None}


def _factored(leaf: Written, parameters: _Shapes) -> str:
    """Returns the field of a factored moment; empty for any other leaf."""
    whole = parameters.get((leaf.owner, leaf.parameter or ()), ())
    is_short = leaf.section == "optimizer" and len(leaf.shape) == len(whole) - 1 > 0
    return next((str(key) for key in leaf.above if str(key) in FACTORED), "") if is_short else ""


def _regrouped(leaf: Written, parameters: _Shapes, change: Callable[[Shape], Shape]) -> Shape:
    """Returns the shape of a leaf whose group is changed.

    A factored moment lacks an axis of its parameter: which one, optax decides by the shape that it has
    then (optax/_src/factorized.py `_factored_dims`).
    """
    if leaf.is_unused:
        return leaf.shape  # One zero for a moment that is not kept, of a stack as of a layer.
    field = _factored(leaf, parameters)
    if not field:
        return change(leaf.shape)
    after = change(parameters[leaf.owner, leaf.parameter or ()])
    if len(after) < 2:
        # What it is of would not be factored there.
        raise refusal(*_NO_MOMENTS, [leaf.path], _WITHOUT_MOMENTS)
    lost = int(np.argsort(after)[::-1][FACTORED.index(field)])
    return (*after[:lost], *after[lost + 1 :])


def _stacked(leaves: Sequence[Written], group: GroupPath, axis: int) -> list[Written]:
    """Returns what is wanted where layers are stacked.

    Raises:
        RestoreError: There is no such group, a layer is missing or there twice, or layers differ.
    """
    found: dict[Path, dict[int, list[Written]]] = defaultdict(lambda: defaultdict(list))
    for leaf in leaves:
        if (layer := _layer(leaf, group)) is not None:
            found[_stacks_name(leaf, group).path][layer].append(leaf)
    if not found:
        raise _no_layers(leaves, group)
    _check_alone(leaves, group, found)
    every = frozenset[int]().union(*found.values())
    short = {path: layers for path, layers in found.items() if every - layers.keys()}
    if short:
        raise _uneven(short, every)
    wanted, parameters = dict[int, Written](), _parameters(leaves)
    for path, layers in found.items():
        stack = _stack(path, layers, parameters, group, axis)
        wanted[id(layers[0][0])] = stack
    return [
        wanted.get(id(leaf), leaf) for leaf in leaves if id(leaf) in wanted or _layer(leaf, group) is None
    ]


def _check_alone(leaves: Sequence[Written], group: GroupPath, stacks: Collection[Path]) -> None:
    """Raises where the module that holds the layers, `layers/0`, would hold the stack and other parts.

    Raises:
        RestoreError: Names them: no Linen program keeps both in one module.
    """
    rest = [leaf.path for leaf in leaves if _is_in(leaf, group) and _layer(leaf, group) is None]
    beside = [path for path in rest if path not in stacks]
    if beside:
        what = f"beside the layers of {render(group)}, which would lie in their stack"
        hint = "give the MODULE:FACTORY of the program that keeps them so."
        raise refusal("leaf lies", "leaves lie", what, beside, hint)


def _stack(
    path: Path, layers: dict[int, list[Written]], parameters: _Shapes, group: GroupPath, axis: int
) -> Written:
    parts = [part for number in sorted(layers) for part in layers[number]]
    if sorted(layers) != list(range(len(layers))):
        raise RestoreError(f"{render(path)} is stored for the layers {ranges(layers)} only.", paths=[path])
    kinds = {(part.shape, str(part.dtype)) for part in parts}
    whole = _regrouped(parts[0], parameters, lambda shape: (*shape[:axis], len(parts), *shape[axis:]))
    is_thin = axis > len(parts[0].shape) and not _factored(parts[0], parameters)
    if len(kinds) > 1 or len(parts) > len(layers) or is_thin:
        rows = aligned(Row(part.path, (str(part.shape), str(part.dtype))) for part in parts)
        raise RestoreError(f"layers cannot be stacked on axis {axis}:\n{rows}", paths=[path])
    return dataclasses.replace(_stacks_name(parts[0], group), shape=whole)


def _uneven(short: Mapping[Path, Iterable[int]], every: Set[int]) -> RestoreError:
    rows = "\n".join(
        f"  {render(path)} is stored for the layers {ranges(layers)}, not for {ranges(every - set(layers))}"
        for path, layers in short.items()
    )
    return RestoreError(
        f"the layers {ranges(every)} cannot be stacked: some lack leaves that others have.\n{rows}",
        paths=list(short),
        hints=["--weights-only does where the leaves are an optimizer's; unlike layers cannot be one stack."],
    )


def _is_of_old(leaf: Written, group: GroupPath, way: Regrouping) -> bool:
    """Tells whether a leaf is below a group's layers as they were."""
    keys, depth = segments(leaf.path), len(group)
    places = (keys[at : at + depth + 2] for at in range(len(keys) - depth + 1))
    if way == "unscan":
        return any(place[:depth] == group for place in places)
    return any(_layer_at(place, group) is not None for place in places)


def _is_in(leaf: Written, group: GroupPath) -> bool:
    return _keys(leaf, group)[: len(group)] == group


def _layer(leaf: Written, group: GroupPath) -> int | None:
    """Returns which layer of the group a leaf belongs to."""
    found = _layer_at(_keys(leaf, group), group)
    return None if found is None else found[0]


def _layer_at(keys: tuple[str, ...], group: GroupPath) -> tuple[int, int] | None:
    """Returns which layer a path begins with, and how many keys say so; `layers_0` is one, `layers/0` two."""
    above, name = group[:-1], group[-1]
    at = len(above)
    if keys[:at] != above or len(keys) <= at:
        return None
    if match := re.fullmatch(rf"{re.escape(name)}_(\d{{1,9}})", keys[at]):
        return int(match[1]), 1
    is_level = keys[at] == name and len(keys) > at + 2 and re.fullmatch(r"\d{1,9}", keys[at + 1])
    return (int(keys[at + 1]), 2) if is_level else None


def _keys(leaf: Written, group: GroupPath) -> tuple[str, ...]:
    """Returns the keys of a leaf's parameter, where there are enough of them to be below a group."""
    keys = tuple(map(str, leaf.parameter or ()))
    own = len(leaf.path) - len(leaf.above)
    # An optimizer may know its parameter by the last keys alone.
    return keys if len(group) < len(keys) < len(group) + own else ()


def _stacks_name(leaf: Written, group: GroupPath) -> Written:
    """Returns a leaf of a layer under the path of the stack of its group."""
    _, taken = _layer_at(_keys(leaf, group), group) or (0, 1)
    return _renamed(leaf, group, taken, group[-1])


def _renamed(leaf: Written, group: GroupPath, taken: int, name: str) -> Written:
    """Returns a leaf with one name where its parameter has so many keys from the group's own one on."""
    parameter = leaf.parameter or ()
    at = len(group) - 1
    from_end = len(parameter) - at
    path = (*leaf.path[:-from_end], name, *leaf.path[len(leaf.path) - from_end + taken :])
    return dataclasses.replace(leaf, path=path, parameter=(*parameter[:at], name, *parameter[at + taken :]))


def _no_layers(leaves: Sequence[Written], group: GroupPath) -> RestoreError:
    """Returns the error where there is nothing to stack, with the groups that there are."""
    name = "/".join(group)
    paths = {segments(leaf.parameter) for leaf in leaves if leaf.parameter}
    firsts = {_first_of(keys[:depth]) for keys in paths for depth in range(1, len(keys))}
    groups = sorted("/".join(keys) for keys in firsts if keys)
    if not groups:
        return _no_group(leaves, group, f"{name}_0 or {name}/0")
    return RestoreError(
        f"no parameter lies under {name}_0 or {name}/0.",
        hints=[f"a group is a path below a collection or a train state; there are: {_some(groups)}."],
    )


def _first_of(module: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the group that a module is the first layer of by its name; nothing if it is none."""
    if name := re.fullmatch(r"(.+)_0+", module[-1]):
        return (*module[:-1], name[1])
    return module[:-1] if re.fullmatch("0+", module[-1]) else ()


def _no_group(leaves: Sequence[Written], group: GroupPath, looked_for: str) -> RestoreError:
    paths = {segments(leaf.parameter) for leaf in leaves if leaf.parameter}
    # Further down, most likely: the levels above it were left out.
    found = {
        keys[:at]
        for keys in paths
        for at in range(len(group), len(keys))
        if keys[:at][-len(group) :] == group
    }
    tops = sorted({"/".join(keys) for keys in found or {keys[: len(group)] for keys in paths}})
    return RestoreError(
        f"no parameter lies under {looked_for}.",
        hints=[f"a group is a path below a collection or a train state; there are: {_some(tops)}."],
    )


_LISTED = 20


def _some(names: Sequence[str]) -> str:
    more = f", ... and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
