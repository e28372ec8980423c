"""How the bytes of a target divide: restored, filled, missing; and what is stored beside them."""

import dataclasses
from collections.abc import Iterable
from typing import Literal

from orbax_nnx_handler.planning.leaves import StoredLeaf, WantedLeaf
from orbax_nnx_handler.planning.plan import RestorePlan

Part = Literal["restored", "filled", "missing", "unexpected"]

COLOURS: dict[Part, str] = {
    "restored": "#2e7d32",
    "filled": "#1565c0",
    "missing": "#c62828",
    "unexpected": "#9e9e9e",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
    """Bytes of each part; mismatched leaves count as missing, defaulted ones as filled."""

    restored: int
    filled: int
    missing: int
    unexpected: int

    @classmethod
    def of(cls, plan: RestorePlan) -> "Share":
        """Returns the shares of a plan."""
        open_ = [item for item in plan.missing.values() if item.policy == "error" or item.filled_by is None]
        settled = [
            item for item in plan.missing.values() if item.policy != "error" and item.filled_by is not None
        ]
        return cls(
            restored=_bytes(item.wanted for item in plan.restored.values()),
            filled=_bytes(item.wanted for item in (*settled, *plan.defaulted.values())),
            missing=_bytes(item.wanted for item in (*open_, *plan.mismatched.values())),
            unexpected=_bytes(plan.unexpected.values()),
        )

    def parts(self) -> list[tuple[Part, int]]:
        """Returns the parts that are not empty, with their bytes."""
        every: list[tuple[Part, int]] = [
            ("restored", self.restored),
            ("filled", self.filled),
            ("missing", self.missing),
            ("unexpected", self.unexpected),
        ]
        return [(part, nbytes) for part, nbytes in every if nbytes]


def _bytes(leaves: Iterable[WantedLeaf | StoredLeaf]) -> int:
    return sum(leaf.nbytes for leaf in leaves)


def sized(nbytes: int) -> str:
    """Returns bytes as a person writes them, in powers of ten: `1.50 GB`."""
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.2f} {unit}"
    return f"{nbytes} B"
