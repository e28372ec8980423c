"""Copies of the model that a checkpoint holds beside it: averaged weights, a target network."""

from collections import defaultdict
from collections.abc import Mapping

from orbax_nnx_handler.planning.core.leaves import Shape, StoredLeaf
from orbax_nnx_handler.planning.core.paths import Path, render
from orbax_nnx_handler.planning.core.recipes import Read
from orbax_nnx_handler.planning.verdict.outcomes import Restored


def copies_of_model(unexpected: Mapping[Path, StoredLeaf], restored: Mapping[Path, Restored]) -> list[str]:
    """Returns the keys under which the restored leaves lie once more, with the same paths and shapes.

    Args:
        unexpected: Stored leaves that nobody wants.
        restored: What comes from the checkpoint.
    """
    groups: dict[str, dict[Path, Shape]] = defaultdict(dict)
    for item in restored.values():
        if isinstance(item.recipe, Read) and len(item.recipe.path) > 1:
            groups[str(item.recipe.path[0])][item.recipe.path[1:]] = item.wanted.shape
    beside: dict[Path, dict[Path, Shape]] = defaultdict(dict)
    for path, leaf in unexpected.items():
        if len(path) > 1:
            beside[path[:1]][path[1:]] = leaf.shape
    return [
        render(top)
        for top, leaves in beside.items()
        if any(own and own.items() <= leaves.items() for own in groups.values())
    ]
