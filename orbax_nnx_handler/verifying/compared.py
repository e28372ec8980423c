"""Every call of paired modules, compared, and which calls hold which."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Sequence

from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.verifying.comparing import (
    TOLERANCE,
    Distance,
    changes_more_than_rounding,
    compare,
    exceeds,
)
from orbax_nnx_handler.verifying.pairing import ModulePair, Use, uses_of
from orbax_nnx_handler.verifying.recording import Call
from orbax_nnx_handler.verifying.verification import ModuleComparison


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compared:
    """One call of a module in both programs.

    Attributes:
        found: How far apart they are.
        pair: The modules.
        linen: Linen's call.
        nnx: The target's.
    """

    found: ModuleComparison
    pair: ModulePair
    linen: Use
    nnx: Use

    @property
    def path(self) -> Path:
        """Keys to the module in the target."""
        return self.pair.nnx.path

    @property
    def gets_the_same(self) -> bool:
        """Whether the inputs agree."""
        return not exceeds(self.found.inputs, TOLERANCE)

    @property
    def agrees(self) -> bool:
        """Whether inputs and outputs agree."""
        return self.gets_the_same and bool(self.found.outputs.compared) and not self.found.differs

    def encloses(self, inner: "Compared") -> bool:
        """Tells whether the module holds another: of the same layer, where both are scanned."""
        if self.path == inner.path or inner.path[: len(self.path)] != self.path:
            return False
        return self.pair.nnx.layer in (None, inner.pair.nnx.layer)


def compare_modules(
    pairs: Iterable[ModulePair], linen_calls: Iterable[Call], nnx_calls: Iterable[Call]
) -> list[Compared]:
    """Compares every call of paired modules, in the order in which the NNX program returned from them."""
    linen, nnx = by_path(linen_calls), by_path(nnx_calls)
    compared = list[Compared]()
    for pair in pairs:
        ours, theirs = uses_of(pair.nnx, nnx), uses_of(pair.linen, linen)
        if len(ours) == len(theirs):
            each = enumerate(zip(theirs, ours, strict=True))
            compared += [_compared(pair, number, one, other) for number, (one, other) in each]
    return sorted(compared, key=lambda one: one.nnx.call.order)


def _compared(pair: ModulePair, number: int, linen: Use, nnx: Use) -> Compared:
    inputs, outputs = compare(linen.inputs, nnx.inputs), compare(linen.outputs, nnx.outputs)
    found = ModuleComparison(
        nnx=pair.nnx,
        linen=pair.linen,
        call=number,
        inputs=inputs,
        outputs=outputs,
        is_certain=pair.is_certain,
        differs=_differs(inputs, outputs),
    )
    return Compared(found=found, pair=pair, linen=linen, nnx=nnx)


def _differs(inputs: Distance, outputs: Distance) -> bool:
    if not outputs.compared or exceeds(inputs, TOLERANCE):
        return False
    return changes_more_than_rounding(inputs, outputs)


def by_path(calls: Iterable[Call]) -> dict[Path, Sequence[Call]]:
    """Returns calls by module, in their order."""
    found: dict[Path, list[Call]] = defaultdict(list)
    for call in calls:
        found[call.path].append(call)
    return dict(found)
