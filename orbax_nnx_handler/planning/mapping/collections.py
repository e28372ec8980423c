"""Which stored collection a wanted leaf may come from.

A collection is a part of the name (law 2): a parameter comes from `params`, a
statistic from `batch_stats`, and so on for every type that Flax, or the program,
has given a name. What lies beside them (`ema_params`, `grads`) is another value,
unless the target or a rule asks for it by name.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flax import nnx

from orbax_nnx_handler.planning.core.paths import Tokens
from orbax_nnx_handler.planning.layouts.layout import FLAX_COLLECTIONS
from orbax_nnx_handler.planning.rules.entries import Entry
from orbax_nnx_handler.planning.target.roles import Wanted, collection_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collections:
    """The collections of one stored train state.

    Attributes:
        paths: The canonical paths in each.
        only: The one that the target names, if it names one.
        copies: Those that repeat the paths of a collection of Flax's: averages, gradients.
    """

    paths: Mapping[str | None, frozenset[Tokens]]
    only: str | None
    copies: frozenset[str | None]

    @staticmethod
    def of(entries: Iterable[Entry], only: str | None) -> "Collections":
        """Returns the collections of these entries."""
        found: dict[str | None, set[Tokens]] = defaultdict(set)
        for entry in entries:
            found[entry.collection].add(entry.tokens)
        known = [found[name] for name in FLAX_COLLECTIONS if name in found]
        copies = {
            name
            for name, paths in found.items()
            if name is not None
            and name not in FLAX_COLLECTIONS
            and any(len(paths & others) * 2 > len(paths) for others in known)
        }
        return Collections(
            paths={name: frozenset(paths) for name, paths in found.items()},
            only=only,
            copies=frozenset(copies),
        )

    def eligible(self, item: Wanted, claims: Sequence[Entry]) -> Sequence[Entry]:
        """Returns the claims that the collection allows; of a type without a name, its own first."""
        if len(claims) == 1 and claims[0].collection == item.collection and item.role == "model":
            return claims if self.only in (None, item.collection) else ()  # Nearly every leaf.
        allowed = [entry for entry in claims if self.may_give(entry, item)]
        if allowed and item.collection is None:
            return [*allowed, *(entry for entry in claims if self.contests(entry.collection, item))]
        own = [entry for entry in allowed if entry.collection == item.collection]
        return own if own and item.collection is not None else allowed

    def may_give(self, entry: Entry, item: Wanted) -> bool:
        """Tells whether a wanted leaf may come from an entry."""
        return self.allows(entry.collection, item)

    def allows(self, collection: str | None, item: Wanted) -> bool:
        """Tells whether a wanted leaf may come from a collection; None where the layout tells none."""
        if self.only is not None:
            return collection == self.only
        if collection is None:
            return True
        if item.role == "random":
            return False
        if item.collection is None:
            return collection in FLAX_COLLECTIONS
        return collection == item.collection or self._may_stray(collection, item)

    def contests(self, collection: str | None, item: Wanted) -> bool:
        """Tells whether a collection is a copy whose leaves an array without a type might mean as well."""
        untyped = item.collection is None and item.role == "model" and self.only is None
        return untyped and collection in self.copies

    def _may_stray(self, collection: str, item: Wanted) -> bool:
        """Tells whether a collection may be that of a type that nobody has named.

        Linen names custom collections freely, so a custom Variable type may come from a custom
        collection, or from that of the type it is a kind of; never from a copy.
        """
        if item.role != "model" or is_named(item.leaf.kind) or item.collection in self.paths:
            return False
        if collection in FLAX_COLLECTIONS:
            return collection == base_collection(item.leaf.kind)
        return collection not in self.copies

    def is_network(self, entry: Entry) -> bool:
        """Tells whether an entry is one of a network's own values, which its modules may rearrange."""
        if self.only is not None:
            return entry.collection == self.only
        return entry.collection is None or entry.collection in FLAX_COLLECTIONS


def is_named(kind: type[Any] | None) -> bool:
    """Tells whether Flax or the program has named the collection of a Variable type."""
    if kind is None:
        return False
    try:
        nnx.variable_name_from_type(kind)
    except ValueError:
        return False
    return True


def base_collection(kind: type[Any] | None) -> str | None:
    """Returns the collection of the named type that a type is a kind of."""
    bases = kind.__mro__[1:] if kind is not None else ()
    return next((collection_of(base) for base in bases if is_named(base)), None)
