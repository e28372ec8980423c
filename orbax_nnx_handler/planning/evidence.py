"""What a verdict was based on: kept with the plan, for whoever asks why."""

import dataclasses
from collections.abc import Mapping

from orbax_nnx_handler.planning.paths import Path
from orbax_nnx_handler.planning.placement import Placement
from orbax_nnx_handler.planning.roles import Wanted
from orbax_nnx_handler.planning.roots import Roots
from orbax_nnx_handler.planning.stuck import StuckMoment


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evidence:
    """Both sides of a plan, leaf by leaf.

    Attributes:
        wanted: Every wanted leaf with its role.
        placements: Every stored leaf with the part of a train state it belongs to.
        roots: Where the model sits on both sides.
        stuck: Moments that cannot follow their parameters.
    """

    wanted: Mapping[Path, Wanted] = dataclasses.field(default_factory=dict[Path, Wanted])
    placements: Mapping[Path, Placement] = dataclasses.field(default_factory=dict[Path, Placement])
    roots: Roots = dataclasses.field(default_factory=lambda: Roots(wanted=(), stored=(), overlap=0))
    stuck: tuple[StuckMoment, ...] = ()
