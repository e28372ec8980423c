"""What a save writes, leaf by leaf: where, under which name of an array, and what of the item.

Under a plan, what the checkpoint did not hold is written where the layout of the plan reads it.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from orbax_nnx_handler.planning.core.dtypes import held_dtype
from orbax_nnx_handler.planning.core.errors import RestoreError, RuleError
from orbax_nnx_handler.planning.core.leaves import Shape, StoredLeaf
from orbax_nnx_handler.planning.core.lines import counted
from orbax_nnx_handler.planning.core.paths import Path, Tokens, printable, render, segments
from orbax_nnx_handler.planning.core.recipes import Fill, Read, Recipe, reads, simplify, substitute
from orbax_nnx_handler.planning.layouts import LAYOUTS
from orbax_nnx_handler.planning.layouts.layout import Fields, Placement
from orbax_nnx_handler.planning.layouts.linen import AUX, TRAIN_STATE
from orbax_nnx_handler.planning.mapping.matches import Found
from orbax_nnx_handler.planning.options import RestoreOptions
from orbax_nnx_handler.planning.restore_plan import RestorePlan
from orbax_nnx_handler.planning.rules.rule import shared_ends
from orbax_nnx_handler.planning.verdict import choose
from orbax_nnx_handler.storage.arithmetic import evaluate
from orbax_nnx_handler.storage.checkpoint.trees import array_name, leads_out
from orbax_nnx_handler.storage.saving.item import ItemLeaf
from orbax_nnx_handler.storage.stores.locations import MISREAD, is_misread


@dataclasses.dataclass(frozen=True, kw_only=True)
class SavedLeaf:
    """One leaf of a tree to be stored.

    Attributes:
        recipe: How it is made, over paths of the item; a `Fill` is zeros.
        shape: Its shape.
        dtype: Its dtype.
        like: The leaf of the item whose devices and save args it takes.
    """

    recipe: Recipe
    shape: Shape
    dtype: Any
    like: Path

    @classmethod
    def of(cls, leaf: ItemLeaf) -> "SavedLeaf":
        """Returns a leaf of the item as it is.

        Raises:
            RestoreError: It holds several arrays of unlike shapes, as `optax.sm3` keeps.
        """
        value = leaf.value
        try:
            value = value if hasattr(value, "dtype") else np.asarray(value)
        except ValueError as error:
            what = (
                f"{render(leaf.path)} is a {type(value).__name__} of arrays, and a Variable is stored as one."
            )
            hint = "save the parts of the state without such Variables."
            raise RestoreError(what, paths=[leaf.path], hints=[hint]) from error
        return cls(recipe=Read(leaf.path), shape=tuple(value.shape), dtype=value.dtype, like=leaf.path)

    def through(self, recipe: Recipe, shape: Shape) -> "SavedLeaf":
        """Returns what a recipe makes of it."""
        return dataclasses.replace(self, recipe=recipe, shape=shape)

    @property
    def sources(self) -> tuple[Path, ...]:
        """The leaves of the item that it is made from."""
        return tuple(dict.fromkeys(reads(self.recipe)))

    def value(self, values: Mapping[Path, Any]) -> Any:
        """Returns what is stored: the item's own array where nothing changes.

        Args:
            values: The item's values by path: arrays, numbers, or `jax.ShapeDtypeStruct`s.
        """
        like = values[self.like]
        if isinstance(self.recipe, Read):  # Of a copy, it is another leaf than the one it is like.
            read = values[self.recipe.path]
            if getattr(read, "dtype", self.dtype) == self.dtype:
                return read
        if _is_abstract(like) or any(_is_abstract(values[path]) for path in self.sources):
            return jax.ShapeDtypeStruct(self.shape, self.dtype)
        if isinstance(self.recipe, Fill):
            return _zeros(self.shape, self.dtype, like)
        held = held_dtype(self.dtype)
        if held == self.dtype or not isinstance(like, jax.Array):
            return evaluate(self.recipe, values, self.dtype)
        if isinstance(like, Tracer):
            return evaluate(self.recipe, values, held)
        return _on_host(evaluate(self.recipe, values, like.dtype), self.dtype)


def _on_host(value: jax.Array, dtype: Any) -> Any:
    """Returns an array in a dtype of 64 bits, of which JAX takes half."""
    if value.is_fully_addressable:
        return np.asarray(value).astype(dtype)
    # Of what is sharded over several processes, none has all.
    return np.asarray(value.addressable_data(0)).astype(dtype) if value.is_fully_replicated else value


def _is_abstract(value: Any) -> bool:
    return isinstance(value, jax.ShapeDtypeStruct)


def _zeros(shape: Shape, dtype: Any, like: Any) -> Any:
    if not isinstance(like, jax.Array):
        return np.zeros(shape, dtype)

    def zeros(_: Any) -> jax.Array:
        return jnp.zeros(shape, dtype)

    # Under jit with the other as an argument, so that it is on the same devices of every process.
    return cast(jax.Array, jax.jit(zeros, keep_unused=True)(like))


_LOCK, _LONGEST = ".__lock", 255
_RENAME = "call one of the two otherwise, or save them as items of their own."


def check_names(paths: Iterable[Path]) -> None:
    """Raises where arrays would have one name on disk, or a name that no reader takes.

    Args:
        paths: The stored path of each array.

    Raises:
        RestoreError: Names both paths, and the name.
    """
    known: dict[str, Path] = {}
    for path in paths:
        name = array_name(path)
        if leads_out(name):
            raise RestoreError(
                f"{_keys(path)} cannot be stored: its array would be called {name!r}, which is no name "
                "inside a checkpoint.",
                paths=[path],
                hints=["no part of a key between slashes may be empty, '.' or '..': call it otherwise."],
            )
        other = known.setdefault(name, path)
        if other is not path:
            raise _both_at(repr(name), other, path, "Orbax joins the keys of a path by dots.")


def check_folders(paths: Iterable[Path]) -> None:
    """Raises where an array could not have a directory of its own, under its name.

    Raises:
        RestoreError: Names the path.
    """
    for path in paths:
        name = array_name(path)
        reason = MISREAD if is_misread(name) else ""
        if any(part.endswith(_LOCK) for part in name.split("/")):
            reason = f"TensorStore keeps names that end in '{_LOCK}' for itself"
        if any(len(part.encode(errors="replace")) > _LONGEST for part in name.split("/")):
            reason = f"a directory's name has at most {_LONGEST} bytes"
        if reason:
            raise RestoreError(
                f"{_keys(path)} cannot be stored in a directory of its own: {reason}.",
                paths=[path],
                hints=["save with use_ocdbt=True: the database keeps such names. Or call it otherwise."],
            )


def check_spellings(paths: Iterable[Path]) -> None:
    """Raises where two paths are spelled alike, so that no rule and no restore could tell them apart.

    Raises:
        RestoreError: Names both paths.
    """
    known: dict[tuple[str, ...], Path] = {}
    for path in paths:
        other = known.setdefault(segments(path), path)
        if other is not path:
            why = "a key with a slash is spelled as two keys are, and no restore could tell them apart."
            raise _both_at("/".join(segments(path)), other, path, why)


def _both_at(place: str, one: Path, other: Path, why: str) -> RestoreError:
    return RestoreError(
        f"{_keys(one)} and {_keys(other)} would both be stored at {place}: {why}",
        paths=[one, other],
        hints=[_RENAME],
    )


def _keys(path: Path) -> str:
    return printable(repr(tuple(map(str, path))))


def in_nodes(
    leaves: Mapping[Path, SavedLeaf], empty: Mapping[Path, Any]
) -> tuple[dict[Path, SavedLeaf], dict[Path, Any]]:
    """Returns leaves and empty nodes below keys of one type in each node, as JAX can sort them.

    Numbers count a list's elements where a node has no other keys. Else they are keys of a dict, in which
    NNX keeps no empty states. What holds a leaf is not empty.
    """
    names = {path: tuple(map(str, path)) for path in (*leaves, *empty)}
    above = {name[:depth] for name in names.values() for depth in range(len(name))}
    held = {names[path] for path in leaves}
    # Of a node in which leaves lie, whether some key is no number.
    named: dict[Tokens, bool] = {}
    for path in leaves:
        for depth, key in enumerate(path):
            node = names[path][:depth]
            named[node] = named.get(node, False) or not isinstance(key, int)

    def spelled(path: Path) -> Path:
        return tuple(str(key) if named[names[path][:at]] else key for at, key in enumerate(path))

    def fits(path: Path) -> bool:
        nodes = [(names[path][:at], not isinstance(key, int)) for at, key in enumerate(path)]
        is_apart = names[path] not in above and held.isdisjoint([names[path], *(node for node, _ in nodes)])
        return is_apart and all(named.get(node, is_name) == is_name for node, is_name in nodes)

    left = {path: value for path, value in empty.items() if fits(path)}
    return {spelled(path): leaf for path, leaf in leaves.items()}, left


_LINEN = frozenset({"train_state", "variables", "maxtext"})


class _Known(NamedTuple):
    """A leaf that was restored as it is stored: its place as Linen stores the item, and its own."""

    linen: Placement
    stored: Placement


class PlacesInLayout:
    """Says where the layout of a plan keeps what the checkpoint did not hold."""

    def __init__(self, leaves: Mapping[Path, SavedLeaf], empty: Iterable[Path], plan: RestorePlan):
        layout = next(layout for layout in LAYOUTS if layout.title == plan.layout)
        self._is_linen, self._fields = layout.name in _LINEN, layout.fields
        self._leaves = leaves
        paths = [*leaves, *empty]
        placed = TRAIN_STATE.place({at: StoredLeaf(path=at, shape=(), dtype=None) for at in paths})
        self._linen = {item.leaf.path: item for item in placed}
        self._by_part: dict[tuple[object, ...], dict[Path, _Known]] = {}
        self._by_section: dict[tuple[Path, str], _Known] = {}
        self._models: dict[Path, _Known] = {}
        count = Counter(path for item in plan.restored.values() for path in reads(item.recipe))
        for at, leaf in leaves.items():
            item = plan.restored.get(leaf.like)
            if item is None or not isinstance(item.recipe, Read) or count[item.recipe.path] > 1:
                continue
            known = _Known(self._linen[at], plan.sides.placements[item.recipe.path])
            if known.linen.section != known.stored.section:
                continue
            self._by_section.setdefault((known.linen.owner, known.linen.section), known)
            if plan.renames and item.evidence.kind in ("rule", "moment"):
                continue  # A rule speaks of the leaves that it names.
            if known.linen.section == "model":
                self._models.setdefault(known.linen.owner, known)
            near = self._by_part.setdefault(_part(known.linen), {})
            for depth in range(len(at)):
                near.setdefault(at[:depth], known)

    def __call__(self, at: Path) -> Path:
        """Returns where the leaf is stored that Linen stores at a path."""
        item = self._linen[at]
        if item.section in ("aux", "other"):
            return at if self._is_linen or at[0] == AUX else (AUX, *at)
        known = self._nearest(at)
        found = known and _by_analogy(at, known.linen.leaf.path, known.stored.leaf.path)
        return found or self._in_field(item)

    def _nearest(self, at: Path) -> _Known | None:
        near = self._by_part.get(_part(self._linen[at]), {})
        return next((near[at[:depth]] for depth in range(len(at), -1, -1) if at[:depth] in near), None)

    def _in_field(self, item: Placement) -> Path:
        owner, below = self._owner(item), item.path
        model = self._models.get(item.owner)
        if item.section == "model" and model is not None:
            below = _by_analogy(below, model.linen.path, model.stored.path) or below
        return self._fields.path(item.section, item.collection, below, owner)

    def _owner(self, item: Placement) -> Path:
        """Returns the keys above the train state, as another leaf of it is stored."""
        same = ("optimizer", "step") if item.section in ("optimizer", "step") else ("model",)
        own = _is_together(self._fields)
        for section in same if own else (*same, "model", "optimizer"):
            known = self._by_section.get((item.owner, section))
            if known is not None:
                return known.stored.owner if own else self._fields.above(known.stored)
        # In NNX's own trees an optimizer lies below its attribute.
        leaf = self._leaves.get(item.leaf.path)
        if not own or item.section == "model" or leaf is None:
            return item.owner
        field = "step" if item.section == "step" else "opt_state"
        return leaf.like[: leaf.like.index(field)] if field in leaf.like else item.owner


def _is_together(fields: Fields) -> bool:
    return fields.collections is None and not fields.params


def _part(item: Placement) -> tuple[object, ...]:
    return item.owner, item.section, item.collection


def _by_analogy(path: Path, other: Path, stored: Path) -> Path | None:
    """Returns the path that is to one as a stored path is to another: what differs is replaced."""
    start, end = shared_ends([*map(str, path)], [*map(str, other)], least=1)
    old, new = other[start : len(other) - end], path[start : len(path) - end]
    names, wanted = [str(key) for key in stored], [str(key) for key in old]
    for at in range(len(names) - len(wanted), -1, -1):
        if names[at : at + len(wanted)] == wanted:
            return (*stored[:at], *new, *stored[at + len(wanted) :])
    return None


def moved_empty(
    empty: Mapping[Path, Any],
    before: Mapping[Path, SavedLeaf],
    after: Mapping[Path, SavedLeaf],
    place: PlacesInLayout,
) -> dict[Path, Any]:
    """Returns the empty nodes: where they are, a parameter's under its stored name, none in another chain."""
    now = {leaf.like: at for at, leaf in after.items()}
    names = {
        at[1:]: now[leaf.like][1:] for at, leaf in before.items() if at[0] == "params" and leaf.like in now
    }
    chain = all(_slots(at) == _slots(now[leaf.like]) for at, leaf in before.items() if leaf.like in now)
    levels = _levels(before, now) if empty else {}
    moved: dict[Path, Any] = {}
    for at, value in empty.items():
        cut = next((cut for cut in range(len(at)) if at[cut:] in names), len(at))
        depth = next((depth for depth in range(len(at), -1, -1) if at[:depth] in levels), None)
        if cut < len(at):
            to = (*at[:cut], *names[at[cut:]])
        elif depth is not None and "opt_state" in at:
            to = (*levels[at[:depth]], *at[depth:])
        else:
            to = place(at)
        # What holds nothing is not kept aside.
        if (chain or at[0] != "opt_state") and (to[0] != AUX or at[0] == AUX):
            moved[to] = value
    return moved


def _levels(leaves: Mapping[Path, SavedLeaf], now: Mapping[Path, Path]) -> dict[Path, Path]:
    """Returns where each level above the leaves of optimizers is now, by where it would be."""
    levels: dict[Path, Path] = {}
    for at, leaf in leaves.items():
        if leaf.like not in now or ("opt_state" not in at and at[-1] != "step"):
            continue
        stored, depth = now[leaf.like], len(at)
        rest = len(stored)
        while depth and rest and str(at[depth - 1]) == str(stored[rest - 1]):
            depth, rest = depth - 1, rest - 1
            levels.setdefault(at[:depth], stored[:rest])
    return levels


def _slots(path: Path) -> list[tuple[int, int]]:
    return [(depth, key) for depth, key in enumerate(path) if isinstance(key, int)]


def check_restored(leaves: Mapping[Path, SavedLeaf], plan: RestorePlan) -> None:
    """Raises where what a save writes would not be restored as the plan has restored it.

    Only what the checkpoint did not hold, or what it held and nobody wanted, can change that.

    Args:
        leaves: The leaves by stored path.
        plan: What the restore did.

    Raises:
        RuleError: Names the leaves that the layout has no place for.
    """
    written = dict.fromkeys(path for leaf in leaves.values() for path in leaf.sources)
    unsourced = [path for path in written if path in plan.missing]
    if not unsourced and not plan.skipped:
        return
    stored = {at: StoredLeaf(path=at, shape=leaf.shape, dtype=leaf.dtype) for at, leaf in leaves.items()}
    options = RestoreOptions(layout=plan.read_as, renames=plan.renames)
    try:
        found: Mapping[Path, Found] = choose([*plan.sides.wanted.values()], stored, options).mapping.found
    except RestoreError:
        found = {}
    shapes = {path: item.leaf.shape for path, item in plan.sides.wanted.items()}

    def comes_back(path: Path) -> bool:
        source = found.get(path)
        if source is None:
            return False
        way = substitute(source.recipe, lambda at: leaves[at].recipe)
        return path in reads(way) and (path in plan.restored or simplify(way, shapes) == Read(path))

    lost = [path for path in (*unsourced, *plan.restored) if path in written and not comes_back(path)]
    if lost:
        raise _no_place([path for path in lost if path in plan.missing] or unsourced or lost, plan)


def _no_place(paths: Sequence[Path], plan: RestorePlan) -> RuleError:
    listed = "\n".join(f"  {render(path)}" for path in paths[:20])
    leaves = counted(len(paths), "leaf", "leaves")
    return RuleError(
        f"{leaves} of the state would not be found again in the layout of the checkpoint ({plan.layout}), "
        f"which has no place for all that is saved:\n{listed}",
        paths=paths,
        hints=["save without renames: NNX's own names are written, and all of them are found."],
    )
