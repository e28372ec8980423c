"""How a Linen program would name the modules of an NNX model."""

from collections.abc import Iterable, Mapping
from typing import Any, cast

from orbax_nnx_handler.planning.paths import Path, render, segments

Nested = dict[str, Any]


def linen_path(path: Path) -> tuple[str, ...]:
    """Returns an NNX path in Linen's words.

    Linen numbers modules in the name (`layers_0`), NNX lists in the path
    (`layers/0`); an `LSTMCell`'s gate is `if` in Linen, which Python does not
    allow for an attribute of NNX. Everything else keeps its name, so that reading
    the result back is the identity.
    """
    names: list[str] = []
    for key in path:
        if isinstance(key, int) and names:
            names[-1] = f"{names[-1]}_{key}"
        elif key == "if_":
            names.append("if")
        elif isinstance(key, tuple):
            names.extend(segments(cast(Path, key)))
        else:
            # With its slashes: `bridge.ToNNX` keeps the keys of `nn.WeightNorm` as Linen has them.
            names.append(str(key))
    return tuple(names)


def nest(leaves: Iterable[tuple[Path, Any]]) -> Nested:
    """Returns leaves as nested dicts under their Linen names.

    Args:
        leaves: Values by NNX path.

    Raises:
        ValueError: Two leaves would be stored under one name, or one inside the
            other; names both.
    """
    return nest_named((linen_path(path), value, path) for path, value in leaves)


def nest_as_is(leaves: Mapping[Path, Any]) -> Nested:
    """Returns leaves as nested dicts under the very keys of their paths, as strings."""
    return nest_named((segments(path), value, path) for path, value in leaves.items())


def nest_named(leaves: Iterable[tuple[tuple[str, ...], Any, Path]]) -> Nested:
    """Returns leaves as nested dicts.

    Args:
        leaves: For each leaf its stored path, its value, and its path in the item.

    Raises:
        ValueError: As `nest`.
    """
    tree: Nested = {}
    origins: dict[tuple[str, ...], Path] = {}
    for names, value, path in leaves:
        node = tree
        for depth, name in enumerate(names[:-1], start=1):
            if names[:depth] in origins:
                raise _collision(origins[names[:depth]], path, names)
            node = cast(Nested, node.setdefault(name, {}))
        if names[-1] in node:
            raise _collision(origins.get(names, names), path, names)
        node[names[-1]] = value
        origins[names] = path
    return tree


def _collision(first: Path, second: Path, names: tuple[str, ...]) -> ValueError:
    return ValueError(
        f"{render(first)} and {render(second)} would both be stored at {render(names)}.\n"
        "hint: a Linen program tells its variables apart by name; save the parts as items of their own, "
        "or rename one of the two."
    )
