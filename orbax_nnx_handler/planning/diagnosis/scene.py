"""A plan as the diagnosis looks at it: what is wrong and not yet explained."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from functools import cached_property

from orbax_nnx_handler.planning.leaves import Shape, StoredLeaf
from orbax_nnx_handler.planning.moments import split
from orbax_nnx_handler.planning.paths import Path, canonical
from orbax_nnx_handler.planning.placement import Placement
from orbax_nnx_handler.planning.plan import Mismatched, Missing, RestorePlan
from orbax_nnx_handler.planning.roles import Role, Wanted
from orbax_nnx_handler.planning.roots import strip

Tokens = tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """A plan, less what was explained already.

    Attributes:
        plan: The plan.
        explained: Wanted and stored paths that a cause accounts for.
    """

    plan: RestorePlan
    explained: frozenset[Path] = frozenset()

    def without(self, paths: Iterable[Path]) -> "Scene":
        """Returns the scene with some paths explained."""
        added = frozenset(paths) - self.explained
        if not added:
            return self
        later = dataclasses.replace(self, explained=self.explained | added)
        # What both sides hold does not depend on what is explained, and a big model is not worked out anew.
        vars(later).update((name, value) for name, value in vars(self).items() if name in _LASTING)
        return later

    @cached_property
    def missing(self) -> Mapping[Path, Missing]:
        """Missing leaves that make the restore fail."""
        return {
            path: item
            for path, item in self.plan.missing.items()
            if path not in self.explained and item.policy == "error"
        }

    @cached_property
    def open_leaves(self) -> Mapping[Path, Missing]:
        """Missing leaves that make the restore fail, explained ones included."""
        return {path: item for path, item in self.plan.missing.items() if item.policy == "error"}

    @cached_property
    def mismatched(self) -> Mapping[Path, Mismatched]:
        """Mismatched leaves."""
        return {path: item for path, item in self.plan.mismatched.items() if path not in self.explained}

    @cached_property
    def unexpected(self) -> Mapping[Path, StoredLeaf]:
        """Stored leaves that nobody wants."""
        return {path: leaf for path, leaf in self.plan.unexpected.items() if path not in self.explained}

    def role(self, path: Path) -> Role:
        """Returns what a wanted leaf is."""
        return self.plan.evidence.wanted[path].role

    def shape(self, path: Path) -> Shape:
        """Returns the shape of a stored leaf, or of a wanted one."""
        placement = self.plan.evidence.placements.get(path)
        return placement.leaf.shape if placement else self.plan.evidence.wanted[path].leaf.shape

    def of_role(self, paths: Collection[Path], role: Role) -> list[Path]:
        """Returns the wanted paths of one role."""
        return [path for path in paths if self.role(path) == role]

    @cached_property
    def weights(self) -> Mapping[Path, Wanted]:
        """All wanted weights, statistics included."""
        return {path: item for path, item in self.plan.evidence.wanted.items() if item.role == "model"}

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
        return {path: item for path, item in self.plan.evidence.placements.items() if item.section == "model"}

    @cached_property
    def free_weights(self) -> Mapping[Path, Placement]:
        """Stored leaves of the model that nobody wants."""
        return {path: item for path, item in self.stored_weights.items() if path in self.unexpected}

    @cached_property
    def weights_complete(self) -> bool:
        """Whether every weight is restored."""
        return all(path in self.plan.restored for path in self.weights)

    @cached_property
    def root(self) -> Tokens:
        """Where the model sits in the target; told by its optimizer where no name meets a stored one."""
        root = self.plan.evidence.roots.wanted
        tops = {item.tokens[:1] for item in self.weights.values() if len(item.tokens) > 1}
        moments = [i.tokens for i in self.plan.evidence.wanted.values() if i.role == "optimizer"]
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
            tokens = strip(canonical(placement.path), self.plan.evidence.roots.stored)
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
        wanted = self.plan.evidence.wanted
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
"""The properties of a scene that stay what they are whatever is explained."""


def spell(tokens: Tokens) -> str:
    """Returns a canonical path as a person writes it."""
    return "/".join(token.removeprefix("#") for token in tokens)
