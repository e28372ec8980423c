"""Finds the stored value of each wanted optimizer leaf: where its parameter goes, it goes."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property

from orbax_nnx_handler.planning.following import FACTORED, follow, missing_layers
from orbax_nnx_handler.planning.found import Found
from orbax_nnx_handler.planning.leaves import Shape
from orbax_nnx_handler.planning.moments import StoredMoments, Tokens, WantedMoment
from orbax_nnx_handler.planning.paths import Path
from orbax_nnx_handler.planning.placement import Stored
from orbax_nnx_handler.planning.recipes import Read, Recipe, reads, shape_of
from orbax_nnx_handler.planning.rules import RulesApplied, Scale
from orbax_nnx_handler.planning.scalars import pair_scalars
from orbax_nnx_handler.planning.stuck import StuckMoment, why_lost, why_stuck


@dataclasses.dataclass(frozen=True)
class MomentFollower:
    """Carries what was found for the parameters over to their moments.

    Attributes:
        moments: The stored optimizer state.
        wanted: The wanted optimizer leaves.
        parameters: The wanted path of each parameter by canonical path below the root.
        stored: All stored leaves.
        applied: What the user's rules did to the parameters.
    """

    moments: StoredMoments
    wanted: Sequence[WantedMoment]
    parameters: Mapping[Tokens, Path]
    stored: Stored
    applied: RulesApplied

    def add_to(self, found: dict[Path, Found]) -> list[StuckMoment]:
        """Adds what the moments are made from; returns those that cannot follow their parameter."""
        stuck: list[StuckMoment] = []
        for item in self.wanted:
            made = self._scalar(item) if item.parameter is None else self._moment(item, item.parameter, found)
            if isinstance(made, StuckMoment):
                stuck.append(made)
            elif made is not None:
                found[item.wanted.leaf.path] = made
        return stuck

    @cached_property
    def _slots(self) -> set[Tokens]:
        return {item.slot for item in self.wanted if item.parameter is not None}

    @cached_property
    def _scalars(self) -> Mapping[Tokens, Tokens]:
        wanted = {item.slot: item.wanted.leaf.shape for item in self.wanted if item.parameter is None}
        stored = {slot: leaf.shape for slot, leaf in self.moments.scalars.items()}
        found = {slot: self.moments.slot(slot, self._slots) for slot in self._slots}
        return pair_scalars(wanted, stored, found, self.moments.slots)

    @cached_property
    def _may_stick(self) -> bool:
        return bool(self.applied.casts) or any(isinstance(rule, Scale) for rule, _ in self.applied.made)

    @cached_property
    def _shapes(self) -> Mapping[Path, Shape]:
        return {path: leaf.shape for path, leaf in self.stored.items()}

    def _scalar(self, item: WantedMoment) -> Found | None:
        slot = self._scalars.get(item.slot)
        leaf = self.moments.count if item.slot[-1:] == ("count",) else None
        leaf = leaf if slot is None else self.moments.scalars[slot]
        return None if leaf is None else Found(recipe=Read(leaf.path))

    def _moment(
        self, item: WantedMoment, tokens: Tokens, found: Mapping[Path, Found]
    ) -> Found | StuckMoment | None:
        slot = self.moments.slot(item.slot, self._slots)
        parameter = found.get(self.parameters[tokens]) if tokens in self.parameters else None
        if slot is None or parameter is None:
            orphan = self.moments.orphan(item.slot, tokens)
            return None if orphan is None else Found(recipe=Read(orphan.path))
        stored = [
            self.moments.slots[slot][p] for p in reads(parameter.recipe) if p in self.moments.slots[slot]
        ]
        may_stick = stored and self._may_stick
        why = why_stuck(parameter.recipe, self.stored, self.applied.casts) if may_stick else ""
        recipe = None if why else self._follow(item, slot, parameter.recipe)
        if recipe is not None:
            gaps = parameter.missing_layers or missing_layers(recipe)
            spare = tuple({leaf.path for leaf in stored} - set(reads(recipe))) if len(stored) > 1 else ()
            return Found(
                recipe=recipe,
                reason=parameter.reason,
                missing_layers=gaps,
                surplus=parameter.surplus,
                spare=spare,
            )
        return self._stuck(item, slot, parameter, why) if stored else None

    def _follow(self, item: WantedMoment, slot: Tokens, parameter: Recipe) -> Recipe | None:
        """Returns how a moment is made; a factored one may be stored under the other's name.

        Which of two axes is the largest may change where a parameter is transposed: of
        equal ones, optax takes the last.
        """
        shape, wanted = item.wanted.leaf.shape, slot[-1] if slot else ""
        names = FACTORED if wanted in FACTORED else (wanted,)
        for name in sorted(names, key=lambda name: name != wanted):
            stored = self.moments.slots.get((*slot[:-1], name) if slot else slot, {})
            recipe = follow(parameter, stored, self._shapes, shape, name, wanted)
            if recipe is not None:
                return recipe
        return None

    def _stuck(self, item: WantedMoment, slot: Tokens, parameter: Found, why: str) -> StuckMoment | None:
        pairs = {path: self.moments.slots[slot].get(path) for path in reads(parameter.recipe)}
        stored = {path: leaf for path, leaf in pairs.items() if leaf is not None}
        if not why and len(stored) < len(pairs):
            return None
        first, leaf = next(iter(stored.items()))
        after = shape_of(parameter.recipe, self._shapes)
        return StuckMoment(
            path=item.wanted.leaf.path,
            stored=tuple(leaf.path for leaf in stored.values()),
            reason=parameter.reason,
            why=why or why_lost(slot[-1], leaf.shape, self._shapes[first], item.wanted.leaf.shape, after),
        )
