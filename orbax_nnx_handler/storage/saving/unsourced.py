"""Where a save under a plan writes what the checkpoint did not hold, so that its layout reads it."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from orbax_nnx_handler.planning.core.errors import RestoreError, RuleError
from orbax_nnx_handler.planning.core.leaves import StoredLeaf
from orbax_nnx_handler.planning.core.lines import counted
from orbax_nnx_handler.planning.core.paths import Path, render
from orbax_nnx_handler.planning.core.recipes import Read, reads, simplify, substitute
from orbax_nnx_handler.planning.layouts import LAYOUTS
from orbax_nnx_handler.planning.layouts.layout import Fields, Placement
from orbax_nnx_handler.planning.layouts.linen import AUX, TRAIN_STATE
from orbax_nnx_handler.planning.mapping.matches import Found
from orbax_nnx_handler.planning.options import RestoreOptions
from orbax_nnx_handler.planning.restore_plan import RestorePlan
from orbax_nnx_handler.planning.verdict.judge import choose
from orbax_nnx_handler.storage.saving.saved import SavedLeaf

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
    start, most = 0, min(len(path), len(other)) - 1
    while start < most and str(path[start]) == str(other[start]):
        start += 1
    end = 0
    while end < most - start and str(path[-1 - end]) == str(other[-1 - end]):
        end += 1
    old, new = other[start : len(other) - end], path[start : len(path) - end]
    names, wanted = [str(key) for key in stored], [str(key) for key in old]
    for at in range(len(names) - len(wanted), -1, -1):
        if names[at : at + len(wanted)] == wanted:
            return (*stored[:at], *new, *stored[at + len(wanted) :])
    return None


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
