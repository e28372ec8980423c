"""What the checkpoint is as a whole: without a weight, or of another layout than was asked for."""

from collections.abc import Iterable

from orbax_nnx_handler.planning import layouts
from orbax_nnx_handler.planning.diagnosis.causes import Cause
from orbax_nnx_handler.planning.diagnosis.name_causes import LayoutGiven, NoWeights
from orbax_nnx_handler.planning.diagnosis.scene import Scene
from orbax_nnx_handler.planning.errors import UnknownLayoutError
from orbax_nnx_handler.planning.folding import fold_paths

_SHORT = 3


def find_given_layout(scene: Scene) -> Iterable[Cause]:
    """Yields the verdict that the layout was named, and is not that of the checkpoint."""
    placements = scene.plan.evidence.placements
    if not scene.missing_weights or not placements:
        return
    stored = {path: item.leaf for path, item in placements.items()}
    try:
        fitting = [layout.title for layout in layouts.candidates(stored, "auto")]
    except UnknownLayoutError:
        return
    if scene.plan.layout not in fitting:
        yield LayoutGiven(
            paths=scene.with_moments(scene.missing_weights),
            given=scene.plan.layout,
            found=tuple(fitting[:_SHORT]),
        )


def find_no_weights(scene: Scene) -> Iterable[Cause]:
    """Yields the verdict that nothing in the checkpoint is a weight."""
    leaves = [item.leaf for item in scene.plan.evidence.placements.values()]
    # A few scalars are a step and counts, whichever names they carry.
    if not scene.missing_weights or len(leaves) > _SHORT or any(leaf.shape for leaf in leaves):
        return
    if all(path in scene.plan.missing for path in scene.weights):
        paths = [*scene.missing_weights, *scene.of_role(scene.missing, "optimizer")]
        yield NoWeights(paths=tuple(paths), stored=fold_paths(leaf.path for leaf in leaves))
