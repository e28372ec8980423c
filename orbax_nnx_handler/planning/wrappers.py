"""The values of `nnx.WeightNorm` and `nnx.SpectralNorm` where Linen's modules keep theirs.

Linen names a value after the layer and the weight that it belongs to, in one key
with slashes: `layer_instance/kernel/scale`, where the wrapper owns the layer. NNX
keeps a dict whose keys are the weights' paths. The opposite of what
`planning.structures` does.
"""

from collections.abc import Iterable, Mapping
from typing import Any, cast

from orbax_nnx_handler.planning.folding import list_paths
from orbax_nnx_handler.planning.paths import Path

_LAYER = "layer_instance"
_SCALES, _STATISTICS = "scales", "batch_stats"


def in_linen_wrappers(leaves: Mapping[Path, Any]) -> dict[Path, Path]:
    """Returns, for each value of a normalising wrapper, its path under Linen's key.

    Args:
        leaves: The leaves of a model by NNX path.
    """
    found = {path: _linen_key(path, leaves) for path in leaves}
    return {path: place for path, place in found.items() if place is not None}


def is_scale(path: Path) -> bool:
    """Tells a scale of `WeightNorm` by Linen's key: NNX keeps it in no Variable, Linen as a parameter."""
    return str(path[-1]).endswith("/scale")


def _linen_key(path: Path, leaves: Mapping[Path, Any]) -> Path | None:
    if len(path) < 2 or not isinstance(path[-1], tuple):
        return None
    wrapper, home, keys = path[:-2], path[-2], cast(Path, path[-1])
    if home == _SCALES:
        weight, name = keys, "scale"
    elif home == _STATISTICS:
        weight, name = keys[:-1], str(keys[-1])
    else:
        return None
    if (*wrapper, _LAYER, *weight) not in leaves:
        return None
    return (*wrapper, "/".join(map(str, (_LAYER, *weight, name))))


def layers_inside(paths: Iterable[Path]) -> str:
    """Returns what to know of wrappers that are written with their layer inside; empty for none.

    NNX has one form of a wrapper, Linen has two, and nothing in the NNX model tells which one
    the Linen program is: under `@nn.compact` the layer belongs to the module around.

    Args:
        paths: The paths of a tree in Linen's form, collections included.
    """
    found = {path[1:-1]: None for path in paths if str(path[-1]).startswith(f"{_LAYER}/")}
    if not found:
        return ""
    named = list_paths(list(found))
    return (
        f"normalising wrappers are written with their layer inside ({_LAYER}): {named}. Linen reads that "
        "where setup() makes the wrapper: self.norm = nn.WeightNorm(nn.Dense(4)). Under @nn.compact the "
        "layer is kept beside the wrapper (Dense_0), and that program does not find these values."
    )
