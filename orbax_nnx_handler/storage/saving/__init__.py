"""What a save writes of an NNX item, and the arguments with which stock Orbax writes it."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from absl import logging
from flax import nnx
from jax.core import Tracer

from orbax_nnx_handler.orbax_interfaces import v0 as ocp
from orbax_nnx_handler.planning.core.errors import DtypeMismatchError, RestoreError, RuleError
from orbax_nnx_handler.planning.core.folding import list_paths
from orbax_nnx_handler.planning.core.lines import counted
from orbax_nnx_handler.planning.core.paths import Path, render, tree_of
from orbax_nnx_handler.planning.core.recipes import Read
from orbax_nnx_handler.planning.layouts.language import MAXTEXT
from orbax_nnx_handler.planning.layouts.linen import AUX
from orbax_nnx_handler.planning.mapping.cells_and_wrappers import (
    cells_of,
    layers_inside,
    with_empty_gates,
    with_gates,
    without_aside,
)
from orbax_nnx_handler.planning.mapping.matches import SavedAs
from orbax_nnx_handler.planning.options import check_choice
from orbax_nnx_handler.planning.restore_plan import RestorePlan, RestoreReport
from orbax_nnx_handler.planning.rules import Rule, as_rules
from orbax_nnx_handler.planning.target import flatten_like, is_unbuilt
from orbax_nnx_handler.storage import paused_collection
from orbax_nnx_handler.storage.arithmetic import sharded_by_compiler
from orbax_nnx_handler.storage.checkpoint.stored_random import add_leftovers
from orbax_nnx_handler.storage.saving.arrange import (
    Arranged,
    Flavour,
    Transformation,
    arrange,
    check_distinct,
    is_nnx,
    is_stream,
)
from orbax_nnx_handler.storage.saving.item import ItemLeaf, ItemLeaves
from orbax_nnx_handler.storage.saving.saved import (
    SavedLeaf,
    check_folders,
    check_names,
    check_restored,
    check_spellings,
    in_nodes,
)
from orbax_nnx_handler.storage.saving.undo import (
    Copies,
    SavedLeaves,
    as_restored,
    check_lead_back,
    streams_as_stored,
    without_rules,
)

RulesOrRestore = Iterable[Rule | tuple[str, str]] | RestorePlan | RestoreReport
"""The rules of a restore, or what it did: a save writes what the restore has read."""

_UNCERTAIN = (
    "The optimizer state of a bare nnx.State does not tell how many empty states end it; they were left out. "
    "A Linen program whose optimizer has some refuses the shorter list. Save the module that holds the "
    "nnx.Optimizer, or pass tx= with the state."
)
_MAX_STEP = np.iinfo(np.int32).max


@dataclasses.dataclass(frozen=True, kw_only=True)
class SavePlan:
    """What a save writes.

    Attributes:
        leaves: The leaves by stored path.
        empty: The nodes that hold nothing, by stored path.
        random: Random state for the item's metadata, by path below `nnx_aux`.
        values: The item's values by path in the item.
        copies: Leaves that are not stored, each with what will be restored for it.
        steps: The paths in the item of the steps of its train states.
    """

    leaves: Mapping[Path, SavedLeaf]
    empty: Mapping[Path, Any]
    random: Mapping[Path, ItemLeaf]
    values: Mapping[Path, Any]
    copies: Copies = ()
    steps: frozenset[Path] = frozenset()

    def tree(self) -> Any:
        """Returns the tree to be stored, its values computed."""
        _check_step(self)
        _check_copies(self)
        return self._nested(leaf.value(self.values) for leaf in self.leaves.values())

    def like(self, given: Mapping[Path, Any], default: Any) -> Any:
        """Returns a tree of the same structure with what is given for the leaf that each is made from."""
        return self._nested(given.get(leaf.like, default) for leaf in self.leaves.values())

    def _nested(self, values: Iterable[Any]) -> Any:
        return tree_of({**self.empty, **dict(zip(self.leaves, values, strict=True))}, lists=True)


def plan_save(
    item: Any, flavour: Flavour = "linen", tx: Transformation | None = None, undone: RulesOrRestore = ()
) -> SavePlan:
    """Decides where each leaf of an item goes and what it is made from.

    The gates of recurrent cells are apart, rules or a restore are undone, and steps are counted in int32.

    Raises:
        RuleError: See `without_rules` and `as_restored`.
        RestoreError: A leaf is a masked array; see `check_distinct`, `check_names` and `check_spellings`.
        ValueError: There is no such layout to save in; see `arrange`.
    """
    check_choice("layout", flavour, get_args(Flavour))
    arranged = arrange(item, flavour, tx)
    if not arranged.certain and flavour == "linen":
        _warn(_UNCERTAIN)
    return _planned(arranged, flavour, undone)


def saved_places(item: Any, stored: Collection[Path]) -> list[dict[Path, SavedAs]]:
    """Returns what a save of an item stores, by stored path, in each layout that stored paths may have."""
    found: list[dict[Path, SavedAs]] = []
    has_params = any(("params", "params") in itertools.pairwise(path) for path in stored)
    for flavour in get_args(Flavour) if has_params else get_args(Flavour)[:1]:
        try:
            plan = _planned(arrange(item, flavour), flavour, ())
        except ValueError:
            continue
        streams = {(AUX, *at): (leaf.path, Read(leaf.path)) for at, leaf in plan.random.items()}
        found.append({**streams, **{at: (leaf.like, leaf.recipe) for at, leaf in plan.leaves.items()}})
    return found


def _planned(arranged: Arranged, flavour: Flavour, undone: RulesOrRestore) -> SavePlan:
    values = {leaf.path: leaf.value for leaf in (*arranged.leaves.values(), *arranged.random.values())}
    _check_masks(values)
    leaves: SavedLeaves = {at: SavedLeaf.of(leaf) for at, leaf in arranged.leaves.items()}
    empty, copies, metadata = arranged.empty, (), arranged.random
    done: RestorePlan | Sequence[Rule] = ()
    if isinstance(undone, RestorePlan | RestoreReport):
        done = undone if isinstance(undone, RestorePlan) else undone.plan
        leaves, empty, copies = as_restored(leaves, empty, done)
        in_tree = {at: SavedLeaf.of(leaf) for at, leaf in _streams_in_tree(arranged, done).items()}
        check_distinct((at, leaf.like) for part in (leaves, in_tree) for at, leaf in part.items())
        leaves = {**leaves, **in_tree}
        paths = {leaf.like for leaf in in_tree.values()}
        metadata = {at: leaf for at, leaf in metadata.items() if leaf.path not in paths}
    aside = {at: leaf for at, leaf in leaves.items() if at in arranged.aside}
    inside = {at: leaf for at, leaf in leaves.items() if at not in aside}
    cells = without_aside(cells_of(inside, arranged.moments), arranged.moments, aside.keys())
    leaves, empty = with_gates(inside, cells) | aside, with_empty_gates(empty, cells)
    inline = {at[1:]: leaf for at, leaf in arranged.leaves.items() if at[0] == AUX and is_stream(leaf)}
    random = {at: leaf.path for at, leaf in (*metadata.items(), *inline.items())}
    if not isinstance(undone, RestorePlan | RestoreReport):
        rules = as_rules(undone)
        _check_alone(rules, arranged)
        beside = [(AUX, *at) for at in random]
        leaves, empty, copies = without_rules(leaves, empty, rules, flavour, beside)
        done = rules
    streams = streams_as_stored(random, done)
    check_distinct((streams[at], path) for at, path in random.items())
    moved: dict[Path, Path] = {(AUX, *at): (AUX, *streams[at]) for at in inline}
    leaves = {moved.get(at, at): leaf for at, leaf in leaves.items()}
    check_distinct((at, leaf.like) for at, leaf in leaves.items())
    check_names(leaves)
    check_spellings(leaves)
    leaves, empty = in_nodes(leaves, empty)
    if isinstance(done, RestorePlan):
        check_restored(leaves, done)
    return SavePlan(
        leaves=_counted_as_in_linen(leaves, arranged.steps, done),
        empty=empty,
        random={streams[at]: leaf for at, leaf in metadata.items()},
        values=values,
        copies=copies,
        steps=arranged.steps,
    )


def _check_alone(rules: Sequence[Rule], arranged: Arranged) -> None:
    """Raises where rules alone do not tell enough of an item to be undone."""
    if not rules:
        return
    hints = ["pass what the restore did, which is undone leaf by leaf: renames=handler.report."]
    if arranged.several:
        what = "the item holds several train states, and rules alone do not tell which they are for."
        raise RuleError(what, hints=hints)
    if any(at[0] != "opt_state" for at in arranged.moments):
        what = "the train state lies below a key, and under rules alone its moments cannot follow."
        raise RuleError(what, hints=hints)


def _streams_in_tree(arranged: Arranged, plan: RestorePlan) -> ItemLeaves:
    """Returns random state that the checkpoint of a plan has in its tree, by its stored path there.

    Elsewhere a Linen program would not store it: see `Arranged.random`.
    """
    found: dict[Path, ItemLeaf] = {}
    for leaf in arranged.random.values():
        item = plan.restored.get(leaf.path)
        if item is not None and isinstance(item.recipe, Read):
            stored = item.recipe.path
            if stored[0] != AUX or plan.layout == MAXTEXT.title:
                found[stored] = leaf
    return found


def _counted_as_in_linen(
    leaves: SavedLeaves, steps: frozenset[Path], done: RestorePlan | Sequence[Rule]
) -> SavedLeaves:
    """Returns leaves, steps in int32 in place of NNX's uint32; none that was stored in uint32 itself."""
    as_linen = set(steps)
    if isinstance(done, RestorePlan):
        restored = done.restored
        as_linen -= {path for path in restored if restored[path].stored_dtype == np.uint32}
    return {
        at: dataclasses.replace(leaf, dtype=np.dtype(np.int32))
        if leaf.like in as_linen and leaf.dtype == np.uint32
        else leaf
        for at, leaf in leaves.items()
    }


def _check_masks(values: Mapping[Path, Any]) -> None:
    masked = [path for path, value in values.items() if isinstance(value, np.ma.MaskedArray)]
    if masked:
        leaves = counted(len(masked), "leaf that is a masked array", "leaves that are masked arrays")
        raise RestoreError(
            f"the state has {leaves}, and no array of JAX's has a mask: {list_paths(masked)}.",
            paths=masked,
            hints=["save numpy.ma.filled(array, value) in its place, and the mask as an array of its own."],
        )


def as_save_item(item: Any) -> Any:
    """Returns an item that Orbax's `PyTreeSave` takes.

    `nnx.Rngs` answers to any attribute, which `PyTreeSave` takes for the protocol of a tree's metadata;
    its State has the same paths.

    Raises:
        ValueError: It is a class or a function, which holds nothing.
    """
    if is_unbuilt(item):
        raise nothing_to_save(item)
    return cast(Any, nnx.state(item)) if isinstance(item, nnx.Rngs) else item


def nothing_to_save(item: Any) -> ValueError:
    """Returns the error for an item that holds no array."""
    kind = "class" if isinstance(item, type) else "function"
    what = f"the {kind} {item.__name__}" if is_unbuilt(item) else f"a {type(item).__name__}"
    return ValueError(
        f"there is nothing to save: {what} holds no array.\n"
        "hint: pass the module, the nnx.State or a dict of these, such as what a restore returned."
    )


@paused_collection()
def linen_save(
    given: ocp.args.PyTreeSave,
    flavour: Flavour = "linen",
    tx: Transformation | None = None,
    undone: RulesOrRestore = (),
    *,
    in_folders: bool = False,
    since: RestoreReport | None = None,
) -> ocp.args.PyTreeSave:
    """Returns the save arguments for NNX state in the layout of a Linen program.

    Nothing is copied but the step, which Linen counts as int32, and the gates of
    recurrent cells, which Linen stores one by one; arrays stay where they are, for
    Orbax to write in the background.

    With `in_folders`, each array gets a directory on this machine. With the report of a restore before it,
    `since`, the same rules have to lead back from there.

    Raises:
        RuleError: See `plan_save` and `check_lead_back`.
        DtypeMismatchError: The step is beyond int32.
        RestoreError: An array has no element, or no dtype of TensorStore's; see `plan_save`, `check_folders`.
        ValueError: A leaf is a `jax.ShapeDtypeStruct`; see `plan_save` and `add_leftovers`.
    """
    if not is_nnx(given.item) and not undone:
        return given
    plan = plan_save(given.item, flavour, tx, undone)
    if since is not None and not isinstance(undone, RestorePlan | RestoreReport):
        check_lead_back(plan.leaves, as_rules(undone), since.plan)
    if in_folders:
        check_folders(plan.leaves)
    _check_values(plan)
    _warn(layers_inside(plan.leaves))
    save_args = given.save_args
    if save_args is not None:
        save_args = plan.like(flatten_like(save_args), ocp.SaveArgs())
    return dataclasses.replace(
        given,
        item=plan.tree(),
        save_args=save_args,
        custom_metadata=add_leftovers(
            given.custom_metadata, {path: leaf.value for path, leaf in plan.random.items()}
        ),
    )


def _warn(text: str) -> None:
    if text and jax.process_index() == 0:
        logging.warning("%s", text)


def _check_values(plan: SavePlan) -> None:
    sources = dict.fromkeys(leaf.like for leaf in plan.leaves.values())
    lost = [path for path in sources if isinstance(plan.values[path], jax.ShapeDtypeStruct)]
    if lost:
        leaves = counted(len(lost), "leaf", "leaves")
        raise ValueError(
            f"the state has {leaves} with a shape and no value: {list_paths(lost)}.\n"
            "hint: save what a restore returned, or what the function builds that nnx.eval_shape was given."
        )
    unstorable = [(path, plan.values[path]) for path in sources if not _is_storable(plan.values[path])]
    if unstorable:
        rows = [f"  {render(path)}   {value.shape} {value.dtype}" for path, value in unstorable[:20]]
        more = [f"  ... and {len(unstorable) - 20} more"] if len(unstorable) > 20 else []
        leaves = counted(len(unstorable), "leaf", "leaves")
        raise RestoreError(
            "\n".join([f"the state has {leaves} that Orbax cannot store:", *rows, *more]),
            paths=[path for path, _ in unstorable],
            hints=[
                "leave out what has no element, and keep others in a dtype of TensorStore's (uint4 as uint8)."
            ],
        )


def _is_storable(value: Any) -> bool:
    """Tells whether an array has elements, of a dtype that TensorStore knows; what is no array is Orbax's."""
    if not isinstance(value, np.ndarray | jax.Array):
        return True
    array = cast(jax.Array, value)
    return array.size > 0 and _is_known(array.dtype)


@functools.cache
def _is_known(dtype: Any) -> bool:
    try:
        if not jnp.issubdtype(dtype, jax.dtypes.extended):
            ts.dtype(dtype.name)
    except ValueError:
        return False
    return True


def _check_step(plan: SavePlan) -> None:
    """Raises where the step does not fit the int32 in which a Linen program counts.

    A stock reader would cast it into the program's int32 unseen, whatever dtype it is stored in.
    """
    for leaf in plan.leaves.values():
        step = plan.values[leaf.like]
        is_step = leaf.like in plan.steps and leaf.dtype == np.int32
        if is_step and not isinstance(step, jax.ShapeDtypeStruct | Tracer):
            _check_fits(leaf.like, step)


def _check_fits(path: Path, step: Any) -> None:
    if isinstance(step, jax.Array) and not step.is_fully_addressable:
        step = step.addressable_data(0)
    largest = int(np.max(np.asarray(step), initial=0))
    if largest > _MAX_STEP:
        raise DtypeMismatchError(
            f"step {largest} cannot be saved: a Linen program counts steps in int32, up to {_MAX_STEP}.\n"
            "hint: count from a smaller number: optimizer.step.set_value(jnp.uint32(0)).",
            paths=[path],
        )


def _check_copies(plan: SavePlan) -> None:
    """Raises where what is stored as the copy of something else has become another value.

    Training changes a tied weight and its copy in different ways; to store either would lose the other.
    """
    unequal = [
        (copy.like, own.sources) for copy, own in plan.copies if not _are_equal(copy, own, plan.values)
    ]
    if not unequal:
        return
    repeated = [path for path, sources in unequal if path in sources]
    tied = [(path, sources[0]) for path, sources in unequal if path not in sources]
    if tied:
        rows = [f"  {render(path)} is no longer {render(other)}" for path, other in tied]
        what, rule = counted(len(tied), "leaf is a copy", "leaves are copies"), "Copy"
        said = f"{what} of another, and the values differ"
    else:
        rows = [f"  {render(path)}" for path in repeated]
        what, rule = counted(len(repeated), "leaf holds", "leaves hold"), "Repeat"
        said = f"{what} each element several times, and those differ"
    listed = "\n".join(rows)
    raise RuleError(
        f"the rules or the plan say that {said}:\n{listed}",
        paths=[path for pair in tied for path in pair] or repeated,
        hints=[
            f"save without renames or the {rule}, and restore that without it: each has its own place then."
        ],
    )


def _are_equal(one: SavedLeaf, other: SavedLeaf, values: Mapping[Path, Any]) -> bool:
    left, right = one.value(values), other.value(values)
    if any(isinstance(value, jax.ShapeDtypeStruct | Tracer) for value in (left, right)):
        return True
    if not any(isinstance(value, jax.Array) for value in (left, right)):
        # Of the 64 bits of NumPy's own, JAX takes half.
        return bool(_same(np.asarray(left), np.asarray(right), np.signbit))
    with sharded_by_compiler([left, right]) as (arrays, _):
        return bool(cast(jax.Array, _equal(*arrays)))


@jax.jit
def _equal(left: jax.Array, right: jax.Array) -> jax.Array:
    # Arrays of several processes stay where they are: each process gets the answer.
    return _same(left, right, jnp.signbit)


def _same(left: Any, right: Any, signbit: Callable[[Any], Any]) -> Any:
    """Tells whether arrays of NumPy's or JAX's are equal to the sign of zero; a NaN is equal to any NaN."""

    def is_negative(x: Any) -> Any:
        # A cast keeps the sign, also from the floats of 8 bits, whose sign bit JAX does not look for.
        return signbit(x if x.dtype.itemsize > 2 else x.astype(jnp.float32))

    same = left == right
    if jnp.issubdtype(left.dtype, jnp.inexact):
        # 1 / x tells 0.0 from -0.0.
        parts = (
            [(left.real, right.real), (left.imag, right.imag)] if left.dtype.kind == "c" else [(left, right)]
        )
        for one, other in parts:
            same &= is_negative(one) == is_negative(other)
    return (same | ((left != left) & (right != right))).all()
