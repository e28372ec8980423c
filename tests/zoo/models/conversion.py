"""Small conversions of flat trees, for the hand-written side of the comparison."""

import functools
import re
from collections.abc import Sequence

import numpy as np

Flat = dict[str, object]


def renamed(leaves: Flat, *rules: tuple[str, str]) -> Flat:
    """Returns the leaves under paths rewritten by regular expressions, in order."""
    result: Flat = {}
    for path, leaf in leaves.items():
        path = _renamed(path, rules)
        assert path not in result, path
        result[path] = leaf
    return result


# Asked for each leaf of each of some thousand steps.
@functools.cache
def _renamed(path: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        path = re.sub(pattern, replacement, path)
    return path


def numbered(leaves: Flat) -> Flat:
    """Returns the leaves with `name_3` as `name/3`."""
    return renamed(leaves, (r"_(\d+)(?=/|$)", r"/\1"))


def stacked(leaves: Flat, name: str) -> Flat:
    """Returns the leaves with `name/0/…`, `name/1/…` stacked as `name/…`."""
    result: Flat = {}
    for path, leaf in leaves.items():
        match = re.fullmatch(rf"{name}/(\d+)/(.*)", path)
        if match is None:
            result[path] = leaf
        elif match[1] == "0":
            count = sum(bool(re.fullmatch(rf"{name}/\d+/{match[2]}", other)) for other in leaves)
            result[f"{name}/{match[2]}"] = np.stack([leaves[f"{name}/{i}/{match[2]}"] for i in range(count)])
    return result


def unstacked(leaves: Flat, name: str) -> Flat:
    """Returns the leaves with `name/…` taken apart as `name/0/…`, `name/1/…`."""
    result: Flat = {}
    for path, leaf in leaves.items():
        if path.startswith(f"{name}/"):
            rest = path.removeprefix(f"{name}/")
            result |= {f"{name}/{index}/{rest}": part for index, part in enumerate(np.asarray(leaf))}
        else:
            result[path] = leaf
    return result


def fused(leaves: Flat, gates: Sequence[str]) -> Flat:
    """Returns the leaves with each cell's gates side by side, as NNX computes them."""
    result: Flat = {}
    for path, leaf in leaves.items():
        match = re.fullmatch(rf"(.*)/([ih])({'|'.join(gates)})/(\w+)", path)
        if match is None:
            result[path] = leaf
        elif match[3] == gates[0]:
            cell, side, _, weight = match.groups()
            parts = [np.asarray(leaves[f"{cell}/{side}{gate}/{weight}"]) for gate in gates]
            result[f"{cell}/dense_{side}/{weight}"] = np.concatenate(parts, axis=-1)
    return result
