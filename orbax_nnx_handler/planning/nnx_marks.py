"""What shows that a tree of bare weights was saved by an NNX program."""

from collections import defaultdict
from collections.abc import Iterable

from orbax_nnx_handler.planning.paths import Path, segments

# What stands side by side in NNX and never among the parameters of a Linen program: the fused gates of
# a cell, the statistics of a normalisation.
_TOGETHER = (("dense_i", "dense_h"), ("mean", "var"))


def marks_of_nnx(paths: Iterable[Path]) -> list[Path]:
    """Returns the paths that only NNX gives; a Linen program has other names or other collections.

    Args:
        paths: The paths of a model's leaves below any collection.
    """
    listed = {path: segments(path) for path in paths}
    names: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for keys in listed.values():
        for depth, key in enumerate(keys):
            names[keys[:depth]].add(key)
    return [path for path, keys in listed.items() if _is_marked(keys, names)]


def _is_marked(keys: tuple[str, ...], names: dict[tuple[str, ...], set[str]]) -> bool:
    # Linen numbers modules in the name, NNX lists in the path.
    return any(
        key.isdecimal() or any(key in pair and names[keys[:depth]] >= set(pair) for pair in _TOGETHER)
        for depth, key in enumerate(keys)
    )
