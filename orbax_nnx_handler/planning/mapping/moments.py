"""What each wanted leaf of an optimizer is made from: a moment takes its parameter's recipe.

Most moments have their parameter's shape and take the recipe as it is. Factored
ones (`adafactor`'s `v_row`, `v_col`) lack an axis, and those that an optimizer does
not use for a parameter are placeholders of one element. Where a recipe does something
that no moment can follow (a scale, a cast that changes values), the moment is stuck,
with the reason.
"""

import dataclasses
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from functools import cached_property
from typing import cast

import numpy as np

from orbax_nnx_handler.planning import rules
from orbax_nnx_handler.planning.core.dtypes import changes_values
from orbax_nnx_handler.planning.core.leaves import COPIES, FACTORED, OF_GRADIENTS, UNUSED, Shape, StoredLeaf
from orbax_nnx_handler.planning.core.paths import Path, Tokens, canonical
from orbax_nnx_handler.planning.core.recipes import (
    Add,
    Concat,
    Fill,
    Index,
    Read,
    Recipe,
    RecipeError,
    Repeat,
    Scale,
    Shapes,
    Slice,
    Stack,
    Transpose,
    children,
    of_moment,
    parts_of,
    reads,
    shape_of,
    substitute,
)
from orbax_nnx_handler.planning.layouts.layout import Stored
from orbax_nnx_handler.planning.mapping.matches import Found, MatchEvidence
from orbax_nnx_handler.planning.mapping.optimizer_pairs import PairedStates, pair_states
from orbax_nnx_handler.planning.mapping.optimizer_states import (
    ORPHAN,
    OptimizerLeaf,
    OptimizerState,
    StoredStates,
)
from orbax_nnx_handler.planning.rules import Casts
from orbax_nnx_handler.planning.rules.rule import shared_ends

_STATE = MatchEvidence(kind="optimizer", words="the same field of the same optimizer state")
_MOMENT = MatchEvidence(
    kind="moment", words="its parameter's recipe, in the same field of the same optimizer state"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StuckMoment:
    """A wanted moment whose stored ones cannot follow their parameter.

    Attributes:
        path: The wanted moment.
        stored: The stored ones.
        reason: What happens to the parameter, and by which rule.
        why: Why they cannot follow.
    """

    path: Path
    stored: tuple[Path, ...]
    reason: str
    why: str


def why_stuck(recipe: Recipe, stored: Mapping[Path, StoredLeaf], casts: Casts, field: str) -> str:
    """Returns why a moment in a field cannot follow its parameter; empty if it can."""
    for part in parts_of(recipe):
        if isinstance(part, Scale):
            return "a moment of a scaled parameter is not the scaled moment"
        if isinstance(part, Add) and field not in COPIES | OF_GRADIENTS:
            return (
                f"nothing tells whether {field!r} is computed of gradients or holds parameters, which change"
            )
        if isinstance(part, Repeat):
            return "the gradient of a repeated element is that of all its copies together"
        if casts and part in casts:  # Not without casts: the hash of a recipe is that of all its parts.
            lossy = [path for path in reads(part) if changes_values(stored[path].dtype, casts[part])]
            if lossy:
                before = stored[lossy[0]].dtype
                return f"casting {before} to {casts[part]} changes the parameter under its moment"
    return ""


def why_lost(slot: str, stored: Shape, before: Shape, wanted: Shape, after: Shape) -> str:
    """Returns why a moment of another shape does not follow where its parameter goes."""
    if math.prod(stored) == 1:
        return f"the {slot} of {before} is one value of all its elements, and does not tell that of {after}"
    if len(stored) != len(before) - 1:
        return f"the {slot} {stored} of {before} has other axes, and does not tell the {wanted} of {after}"
    return (
        f"the {slot} {stored} of {before} is a mean over one axis, and does not tell "
        f"the mean {wanted} of {after}"
    )


Moments = Mapping[Path, OptimizerLeaf]
Fields = Mapping[Tokens, Moments]


def follow(
    recipe: Recipe,
    moments: Moments,
    parameters: Shapes,
    wanted: Shape,
    slot: str = "",
    wanted_slot: str | None = None,
) -> Recipe | None:
    """Returns how a moment is made, given how its parameter is made.

    Args:
        recipe: The parameter's recipe.
        moments: The stored moments of one slot, by their parameters' stored paths.
        parameters: Shapes of the stored parameters.
        wanted: The wanted moment's shape.
        slot: The last name of the stored slot (`v_row`).
        wanted_slot: That of the wanted one, where it is another.

    Returns:
        The recipe, with `Fill` for layers whose moment is not stored; None if
        no moment is stored, or none that can follow its parameter.
    """
    sources = list(dict.fromkeys(reads(recipe)))
    stored = [path for path in sources if path in moments]
    if not stored:
        return None
    if all(moments[path].shape == parameters[path] for path in stored):
        # Nearly every moment: one source, of the parameter's shape.
        whole = len(sources) == 1 and not isinstance(recipe, Stack)
        return _moved(recipe, moments) if whole else _prune(recipe, moments, parameters)
    if isinstance(recipe, Read):
        return Read(moments[recipe.path].path)
    if not _comes_out(recipe, parameters):
        # A layer of another shape: the parameter is the fault to tell of, whatever its moments are.
        return _moved(recipe, moments) if len(stored) == len(sources) else None
    shapes = {moments[path].path: moments[path].shape for path in stored}
    if slot in UNUSED and wanted == (1,) and set(shapes.values()) == {wanted}:
        # An unused slot: Adafactor keeps one zero for it whatever the layer count. The moment of a
        # parameter of one element has that shape too, and is one.
        is_used = wanted in (shape_of(recipe, parameters), *(parameters[path] for path in stored))
        return None if is_used else Read(moments[stored[0]].path)
    if math.prod(wanted) == 1 and list(shapes.values()) == [wanted] and len(sources) == 1:
        # One value of a whole parameter, such as the norm of its gradient, while the parameter is whole.
        whole = math.prod(shape_of(recipe, parameters)) == math.prod(parameters[sources[0]])
        return Read(moments[sources[0]].path) if whole else None
    reduced = _Reduced(moments=moments, parameters=parameters, slot=slot)
    return reduced.recipe(recipe, wanted, slot if wanted_slot is None else wanted_slot)


def _prune(recipe: Recipe, moments: Moments, parameters: Shapes) -> Recipe | None:
    """Replaces parameters by moments; a stack keeps a `Fill` where one is absent."""
    if isinstance(recipe, Stack):
        empty = Fill(shape_of(recipe.sources[0], parameters))
        return Stack(
            tuple(_prune(part, moments, parameters) or empty for part in recipe.sources), recipe.axis
        )
    if isinstance(recipe, Fill):
        return recipe
    if any(path not in moments for path in reads(recipe)):
        return None
    return _moved(recipe, moments)


def _comes_out(recipe: Recipe, shapes: Shapes) -> bool:
    try:
        shape_of(recipe, shapes)
    except RecipeError:
        return False
    return True


def _moved(recipe: Recipe, moments: Moments) -> Recipe:
    return substitute(recipe, lambda path: Read(moments[path].path))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Reduced:
    """Moments that lack one axis of their parameters."""

    moments: Moments
    parameters: Shapes
    slot: str

    def recipe(self, recipe: Recipe, wanted: Shape, wanted_slot: str) -> Recipe | None:
        """Returns a parameter's recipe with its axes rewritten for the moment."""
        if any(path not in self.moments for path in reads(recipe)):
            return None
        for axis in _lost_axes(shape_of(recipe, self.parameters), wanted, wanted_slot):
            moved = self._without_axis(recipe, axis)
            shapes = {self.moments[path].path: self.moments[path].shape for path in reads(recipe)}
            try:
                if moved is not None and shape_of(moved, shapes) == wanted:
                    return moved
            except RecipeError:
                continue
        return None

    def _without_axis(self, recipe: Recipe, lost: int) -> Recipe | None:
        """Returns the recipe on moments that lack axis `lost` of the recipe's result."""
        match recipe:
            case Read(path):
                moment = self.moments[path]
                return (
                    Read(moment.path)
                    if lost in _lost_axes(self.parameters[path], moment.shape, self.slot)
                    else None
                )
            case Index(source, axis, index):
                inner = lost if lost < axis else lost + 1
                moved = self._without_axis(source, inner)
                return None if moved is None else Index(moved, axis - (inner < axis), index)
            case Slice(source, axis, start, size) if lost != axis:
                moved = self._without_axis(source, lost)
                return None if moved is None else Slice(moved, axis - (lost < axis), start, size)
            case Transpose(source, permutation):
                inner = permutation[lost]
                moved = self._without_axis(source, inner)
                kept = tuple(axis - (axis > inner) for axis in permutation if axis != inner)
                return None if moved is None else Transpose(moved, kept)
            case Stack(sources, axis) if lost != axis:
                parts = self._parts(sources, lost if lost < axis else lost - 1)
                return None if parts is None else Stack(parts, axis - (lost < axis))
            case Concat(sources, axis) if lost != axis:
                parts = self._parts(sources, lost)
                return None if parts is None else Concat(parts, axis - (lost < axis))
            case _:
                return None

    def _parts(self, sources: Iterable[Recipe], lost: int) -> tuple[Recipe, ...] | None:
        parts = [self._without_axis(part, lost) for part in sources]
        whole = tuple(part for part in parts if part is not None)
        return whole if len(whole) == len(parts) else None


def _lost_axes(parameter: Shape, moment: Shape, slot: str) -> list[int]:
    """Returns the axes whose loss explains a moment's shape.

    optax factors the two largest axes, the later one of equal size winning,
    as `numpy.argsort` orders them: `v_row` lacks the largest, `v_col` the
    second (`optax.scale_by_factored_rms`). Where the name does not tell,
    every axis is possible that the shapes allow.
    """
    order = [int(axis) for axis in np.argsort(parameter)[::-1]]
    possible = [axis for axis in order if (*parameter[:axis], *parameter[axis + 1 :]) == moment]
    rank = FACTORED.index(slot) if slot in FACTORED else len(order)
    return [order[rank]] if rank < len(order) and order[rank] in possible else possible


def missing_layers(recipe: Recipe) -> tuple[int, ...]:
    """Returns which parts of a stack no stored leaf holds."""
    if isinstance(recipe, Read):
        return ()
    if isinstance(recipe, Stack):
        return tuple(at for at, part in enumerate(recipe.sources) if isinstance(part, Fill))
    return tuple(at for child in children(recipe) for at in missing_layers(child))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FollowedMoments:
    """What became of a target's optimizer, beside the leaves that were found.

    Attributes:
        states: Which stored state each wanted one is, and what has no counterpart.
        stuck: Moments that cannot follow their parameter.
    """

    states: PairedStates
    stuck: tuple[StuckMoment, ...]


@dataclasses.dataclass(frozen=True)
class MomentFollower:
    """Carries what was found for the parameters over to their moments.

    Attributes:
        optimizer: The stored optimizer.
        wanted: The wanted one's states; their parameters by canonical path.
        parameters: The wanted path of each parameter by canonical path below the root.
        stored: All stored leaves.
        applied: What the user's rules did to the parameters.
        found: What the parameters are made from, and then the moments.
    """

    optimizer: StoredStates
    wanted: Sequence[OptimizerState]
    parameters: Mapping[Tokens, Path]
    stored: Stored
    applied: rules.RulesApplied
    found: dict[Path, Found]

    def follow(self) -> FollowedMoments:
        """Adds what the optimizer's leaves are made from, state by state."""
        states = pair_states(self.wanted, self.optimizer.states, self._sources)
        stuck: list[StuckMoment] = []
        for wanted, stored in states.pairs:
            for name, leaf in wanted.scalars.items():
                if self._added and name[-1:] == ("gamma",) and (*name[:-1], "barf") in wanted.scalars:
                    stuck.append(self._stuck_number(leaf, stored.scalars[name]))
                    continue
                self.found[leaf.path] = Found(recipe=Read(stored.scalars[name].path), evidence=_STATE)
            stuck += self._add_moments(wanted.moments, stored.moments)
        for wanted in states.missing:
            slots = {name: self.optimizer.slots[name] for name in wanted.moments if self._is_slot(name)}
            stuck += self._add_moments(wanted.moments, self.optimizer.slots if slots else {})
            count = wanted.scalars.get(("count",))
            if count is not None and self.optimizer.count is not None:
                self.found[count.path] = Found(recipe=Read(self.optimizer.count), evidence=_STATE)
        return FollowedMoments(states=states, stuck=tuple(stuck))

    def _is_slot(self, name: Tokens) -> bool:
        """Tells whether a field is the only wanted one of a name that is stored without any state."""
        return name in self.optimizer.slots and sum(name in state.moments for state in self.wanted) == 1

    def _add_moments(self, wanted: Fields, stored: Fields) -> Iterator[StuckMoment]:
        for name in (name for name in wanted if name in stored):
            for key, leaf in wanted[name].items():
                made = self._moment(leaf, name, key, stored)
                if isinstance(made, StuckMoment):
                    yield made
                elif made is not None:
                    self.found[leaf.path] = made

    @cached_property
    def _may_stick(self) -> bool:
        return bool(self.applied.casts or self._added) or any(
            isinstance(rule, rules.Scale | rules.Repeat) for rule, _ in self.applied.made
        )

    @cached_property
    def _added(self) -> Sequence[rules.Add]:
        return [rule for rule, _ in self.applied.made if isinstance(rule, rules.Add)]

    def _stuck_number(self, wanted: OptimizerLeaf, stored: OptimizerLeaf) -> StuckMoment:
        """Returns the number that `optax.contrib.momo` keeps of products (optax/contrib/_momo.py)."""
        why = "gamma is the mean of the products of gradients and parameters, which change"
        return StuckMoment(path=wanted.path, stored=(stored.path,), reason=str(self._added[0]), why=why)

    @cached_property
    def _shapes(self) -> Mapping[Path, Shape]:
        return {path: leaf.shape for path, leaf in self.stored.items()}

    def _parameter(self, key: Path) -> Found | None:
        path = self.parameters.get(_name(key))
        return None if path is None else self.found.get(path)

    def _sources(self, key: Path) -> Collection[Path]:
        parameter = self._parameter(key)
        return ((ORPHAN, *_name(key)),) if parameter is None else tuple(reads(parameter.recipe))

    def _moment(
        self, leaf: OptimizerLeaf, name: Tokens, key: Path, fields: Fields
    ) -> Found | StuckMoment | None:
        moments, parameter = fields[name], self._parameter(key)
        if parameter is None:
            orphan = moments.get((ORPHAN, *_name(key)))
            if orphan is None or _name(key) in self._changed:
                return None
            return Found(recipe=Read(orphan.path), evidence=_STATE)
        if isinstance(parameter.recipe, Read) and not self._may_stick:
            moment = moments.get(parameter.recipe.path)
            if moment is not None and moment.shape == self._shapes[parameter.recipe.path]:
                # Nearly every one: read whole, as its parameter is.
                return Found(
                    recipe=Read(moment.path),
                    evidence=_MOMENT,
                    reason=parameter.reason,
                    missing_layers=parameter.missing_layers,
                    surplus=parameter.surplus,
                )
        stored = {path: moments[path] for path in reads(parameter.recipe) if path in moments}
        may_stick = stored and self._may_stick
        own = next((key for key in reversed(name) if key), "")  # A list of moments counts its own.
        why = why_stuck(parameter.recipe, self.stored, self.applied.casts, own) if may_stick else ""
        recipe = None if why else self._follow(leaf.shape, name, fields, parameter.recipe)
        if recipe is not None:
            gaps = parameter.missing_layers or missing_layers(recipe)
            spare = {item.path for item in stored.values()} - set(reads(recipe)) if len(stored) > 1 else ()
            return Found(
                evidence=_MOMENT,
                recipe=recipe,
                reason=parameter.reason,
                missing_layers=gaps,
                surplus=parameter.surplus,
                spare=tuple(spare),
            )
        return self._stuck(leaf, name, stored, parameter, why) if stored else None

    @cached_property
    def _changed(self) -> Set[Tokens]:
        """The names, whole or at their end, of weights that rules have changed or found under other ones."""
        names: set[Tokens] = set()
        for tokens, path in self.parameters.items() if self.applied.made else ():
            source = self.found.get(path)
            read = source.recipe if source else None
            stored = canonical(read.path) if isinstance(read, Read) else ()
            boxed = stored[-1:] == ("value",) != tokens[-1:]
            _, same = shared_ends(("", *tokens), (".", *(stored[:-1] if boxed else stored)))
            names.update(tokens[at:] for at in range(len(tokens) - same) if source)
        return names

    def _follow(self, wanted: Shape, field: Tokens, fields: Fields, parameter: Recipe) -> Recipe | None:
        """Returns how a moment is made; a factored one may be stored under the other's name.

        Which of two axes is the largest may change where a parameter is transposed: of
        equal ones, optax takes the last.
        """
        own = field[-1] if field else ""
        made = of_moment(parameter, own)
        if own not in FACTORED:
            return follow(made, fields[field], self._shapes, wanted, own)
        for name in sorted(FACTORED, key=lambda name: name != own):
            stored = fields.get((*field[:-1], name), {})
            recipe = follow(made, stored, self._shapes, wanted, name, own)
            if recipe is not None:
                return recipe
        return None

    def _stuck(
        self, wanted: OptimizerLeaf, field: Tokens, stored: Moments, parameter: Found, why: str
    ) -> StuckMoment | None:
        if not why and any(path not in stored for path in reads(parameter.recipe)):
            return None
        if not why and not _comes_out(parameter.recipe, self._shapes):
            return None
        first, leaf = next(iter(stored.items()))
        after = shape_of(parameter.recipe, self._shapes)
        name = field[-1] if field else "moment"
        return StuckMoment(
            path=wanted.path,
            stored=tuple(item.path for item in stored.values()),
            reason=parameter.reason,
            why=why or why_lost(name, leaf.shape, self._shapes[first], wanted.shape, after),
        )


def _name(parameter: Path) -> Tokens:
    """Returns the canonical path of a wanted optimizer's parameter, known or not."""
    return cast(Tokens, parameter[1:] if parameter and parameter[0] == ORPHAN else parameter)
