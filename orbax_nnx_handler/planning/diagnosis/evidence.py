"""A verdict as the diagnosis looks at it: what is wrong and not yet explained.

With what a hint needs to speak of some leaves and no others: NNX filters of a policy, patterns of rules.
"""

import dataclasses
import itertools
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from flax import nnx

from orbax_nnx_handler.planning.core.leaves import Shape, StoredLeaf
from orbax_nnx_handler.planning.core.paths import Path, Tokens, canonical, segments
from orbax_nnx_handler.planning.layouts.layout import Placement
from orbax_nnx_handler.planning.mapping.optimizers.states import split
from orbax_nnx_handler.planning.mapping.roots import strip
from orbax_nnx_handler.planning.target.roles import Role, Wanted
from orbax_nnx_handler.planning.verdict.outcomes import Mismatched, Missing, Restored, Sides, Verdict


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evidence:
    """A verdict, less what was explained already.

    Attributes:
        verdict: The verdict.
        explained: Wanted and stored paths that a cause accounts for.
    """

    verdict: Verdict
    explained: frozenset[Path] = frozenset()

    def without(self, paths: Iterable[Path]) -> "Evidence":
        """Returns the evidence with some paths explained."""
        added = frozenset(paths) - self.explained
        if not added:
            return self
        later = dataclasses.replace(self, explained=self.explained | added)
        # What both sides hold does not depend on what is explained, and a big model takes long to work out.
        vars(later).update((name, value) for name, value in vars(self).items() if name in _LASTING)
        return later

    @property
    def sides(self) -> Sides:
        """Both sides, leaf by leaf."""
        return self.verdict.sides

    @property
    def restored(self) -> Mapping[Path, Restored]:
        """Leaves that come from disk."""
        return self.verdict.restored

    @cached_property
    def missing(self) -> Mapping[Path, Missing]:
        """Missing leaves that make the restore fail."""
        return {
            path: item
            for path, item in self.verdict.missing.items()
            if path not in self.explained and item.policy == "error"
        }

    @cached_property
    def open_leaves(self) -> Mapping[Path, Missing]:
        """Missing leaves that make the restore fail, explained ones included."""
        return {path: item for path, item in self.verdict.missing.items() if item.policy == "error"}

    @cached_property
    def mismatched(self) -> Mapping[Path, Mismatched]:
        """Mismatched leaves."""
        return {path: item for path, item in self.verdict.mismatched.items() if path not in self.explained}

    @cached_property
    def unexpected(self) -> Mapping[Path, StoredLeaf]:
        """Stored leaves that nobody wants."""
        return {path: leaf for path, leaf in self.verdict.unexpected.items() if path not in self.explained}

    def role(self, path: Path) -> Role:
        """Returns what a wanted leaf is."""
        return self.sides.wanted[path].role

    def shape(self, path: Path) -> Shape:
        """Returns the shape of a stored leaf, or of a wanted one."""
        placement = self.sides.placements.get(path)
        return placement.leaf.shape if placement else self.sides.wanted[path].leaf.shape

    def of_role(self, paths: Collection[Path], role: Role) -> list[Path]:
        """Returns the wanted paths of one role."""
        return [path for path in paths if self.role(path) == role]

    @cached_property
    def weights(self) -> Mapping[Path, Wanted]:
        """All wanted weights, statistics included."""
        return {path: item for path, item in self.sides.wanted.items() if item.role == "model"}

    @cached_property
    def missing_weights(self) -> list[Path]:
        """Missing leaves of the model."""
        return self.of_role(self.missing, "model")

    @cached_property
    def mismatched_weights(self) -> list[Path]:
        """Leaves of the model whose shape differs."""
        return [p for p in self.of_role(self.mismatched, "model") if self.mismatched[p].kind == "shape"]

    @cached_property
    def stored_weights(self) -> Mapping[Path, Placement]:
        """All stored leaves of the model."""
        return {path: item for path, item in self.sides.placements.items() if item.section == "model"}

    @cached_property
    def free_weights(self) -> Mapping[Path, Placement]:
        """Stored leaves of the model that nobody wants."""
        return {path: item for path, item in self.stored_weights.items() if path in self.unexpected}

    @cached_property
    def weights_complete(self) -> bool:
        """Whether every weight is restored."""
        return all(path in self.restored for path in self.weights)

    @cached_property
    def root(self) -> Tokens:
        """Where the model sits in the target; found by its optimizer where no name meets a stored one."""
        root = self.sides.roots.wanted
        tops = {item.tokens[:1] for item in self.weights.values() if len(item.tokens) > 1}
        moments = [i.tokens for i in self.sides.wanted.values() if i.role == "optimizer"]
        if root or len(tops) != 1 or not moments:
            return root
        (top,) = tops
        return root if any(top[0] in tokens for tokens in moments) else top

    @cached_property
    def below(self) -> Mapping[Path, Tokens]:
        """The canonical path of each weight below the target's root."""
        return {path: strip(item.tokens, self.root) for path, item in self.weights.items()}

    def stored_below(self, placement: Placement) -> Tokens:
        """Returns the canonical path of a stored leaf below the stored root."""
        path = placement.leaf.path
        if path not in self._stored_below:
            tokens = strip(canonical(placement.path), self.sides.roots.stored)
            boxed = len(tokens) > 1 and tokens[-1] == "value"
            self._stored_below[path] = tokens[:-1] if boxed else tokens
        return self._stored_below[path]

    @cached_property
    def _stored_below(self) -> dict[Path, Tokens]:
        return {}

    @cached_property
    def moments(self) -> Mapping[Path, tuple[Tokens, Tokens]]:
        """Slot and parameter of each wanted optimizer leaf that belongs to a parameter."""
        parameters = set(self.below.values())
        wanted = self.sides.wanted
        apart = {path: split(i.tokens, parameters) for path, i in wanted.items() if i.role == "optimizer"}
        return {path: (slot, parameter) for path, (slot, parameter) in apart.items() if parameter is not None}

    def with_moments(self, weights: Collection[Path]) -> tuple[Path, ...]:
        """Returns weights and those of their moments that are wrong as well."""
        parameters = {self.below[path] for path in weights if path in self.below}
        wrong = self.missing.keys() | self.mismatched.keys()
        followers = [
            p for p, (_, parameter) in self.moments.items() if parameter in parameters and p in wrong
        ]
        return (*weights, *followers)


_LASTING = frozenset(
    {
        "weights",
        "stored_weights",
        "weights_complete",
        "root",
        "below",
        "moments",
        "_stored_below",
        "open_leaves",
    }
)
"""The properties of a evidence that stay what they are whatever is explained."""


def spell(tokens: Tokens) -> str:
    """Returns a canonical path as a person writes it."""
    return "/".join(token.removeprefix("#") for token in tokens)


_MOST = 4
"""Filters that one policy may need before `policy="init"` is easier to read."""


def selecting(evidence: Evidence, paths: Iterable[Path]) -> tuple[Any, ...]:
    """Returns filters that select the missing leaves among some paths and no other missing leaf.

    A policy speaks of missing leaves only, so what is restored may be selected as well.

    Returns:
        The filters, Variable types before names; empty where a few do not do.
    """
    open_leaves = evidence.open_leaves
    wanted = {path for path in paths if path in open_leaves}
    offers = [(each, found) for each, found in _offers(evidence, wanted) if found <= wanted]
    chosen: list[Any] = []
    while wanted and offers and len(chosen) < _MOST:
        # At a tie the first one: types come before names, and names deep in the path before those above.
        best, found = max(offers, key=lambda offer: len(offer[1] & wanted))
        if not found & wanted:
            break
        chosen.append(best)
        wanted -= found
    return () if wanted else tuple(chosen)


def _offers(evidence: Evidence, wanted: Collection[Path]) -> list[tuple[Any, set[Path]]]:
    kinds: dict[type, set[Path]] = defaultdict(set)
    names: dict[str, set[Path]] = defaultdict(set)
    for path, item in evidence.open_leaves.items():
        for kind in _kinds(item.wanted.kind):
            kinds[kind].add(path)
        for key in path:
            if isinstance(key, str):
                names[key].add(path)
    # A module's name says more than `kernel` does.
    keys = [key for path in wanted for key in reversed(path[:-1])] + [path[-1] for path in wanted]
    # What every weight has in its path (`model`) would fill whatever else is missing later.
    paths = list(evidence.weights)
    everywhere = {key for key in paths[0] if all(key in path for path in paths)} if paths else set[object]()
    used = dict.fromkeys(key for key in keys if isinstance(key, str) and key not in everywhere)
    return [*kinds.items(), *((nnx.PathContains(key), names[key]) for key in used)]


def _kinds(kind: type | None) -> list[type]:
    """Returns the narrow types that Flax itself names; `nnx.Param` would say nothing."""
    if kind is None:
        return []
    types = (nnx.LoRAParam, nnx.BatchStat, nnx.OptState)
    found: list[type] = [each for each in types if issubclass(kind, each)]
    is_own = getattr(nnx, kind.__name__, None) is kind and kind not in (*types, nnx.Param, nnx.Variable)
    narrow: list[type] = [kind] if is_own and not issubclass(kind, nnx.OptState) else []
    return [*found, *narrow]


_NUMBER = re.compile(r"\d+$")


def patterns_of(evidence: Evidence, paths: Iterable[Path]) -> list[str]:
    """Returns few patterns that match these stored weights and no other.

    A pattern is the end of a path, as short as it can be and still match nothing
    else: `up/kernel`, `encoder/up/kernel`, `layers_{i}/up/kernel`.
    """
    every = {path: _names(evidence, path) for path in evidence.stored_weights}
    meant = {path: every[path] for path in dict.fromkeys(paths)}
    others = [names for path, names in every.items() if path not in meant]
    return [
        "/".join(pattern) for pattern in dict.fromkeys(_shortest(names, others) for names in meant.values())
    ]


def _names(evidence: Evidence, path: Path) -> tuple[str, ...]:
    names = segments(evidence.stored_weights[path].path)
    return names[:-1] if len(names) > 1 and names[-1] == "value" else names


def _shortest(names: Sequence[str], others: Sequence[Sequence[str]]) -> tuple[str, ...]:
    lengths = range(min(2, len(names)), len(names) + 1)
    for length, any_number in itertools.product(lengths, (True, False)):
        end = names[-length:]
        if not any(_alike(other[-length:], end, any_number) for other in others):
            return _general(end) if any_number else tuple(end)
    return tuple(names)


def _alike(one: Sequence[str], other: Sequence[str], any_number: bool) -> bool:
    return _general(one) == _general(other) if any_number else tuple(one) == tuple(other)


def _general(names: Sequence[str]) -> tuple[str, ...]:
    """Returns the names with a place for each number, every place with a letter of its own."""
    letters = iter("ijklmnopqrstuvwxyz")
    return tuple(_NUMBER.sub(lambda _: f"{{{next(letters)}}}", name) for name in names)


def differing_axes(stored: Shape, wanted: Shape) -> list[int]:
    """Returns the axes on which two shapes of one rank differ; none for other ranks."""
    if len(stored) != len(wanted):
        return []
    return [at for at, (a, b) in enumerate(zip(stored, wanted, strict=True)) if a != b]
