"""Nested containers and their leaves by path, as Orbax stores them and as Linen names them."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

from orbax_nnx_handler.planning.core.paths import Path, segments


def tree_of(leaves: Mapping[Path, Any], *, lists: bool) -> Any:
    """Returns nested containers with a value at each path.

    Args:
        leaves: The values; None stands for an empty node.
        lists: Whether int keys number a list, as in optax states. An `nnx.State`
            keeps them as keys.
    """
    root: dict[Any, Any] = {}
    for path, value in leaves.items():
        node = root
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return _contained(root, lists)


def nodes_of(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yields every leaf and every empty node of nested containers."""
    if is_empty(tree) or not isinstance(tree, dict | list | tuple):
        yield path, tree
        return
    inner = (
        cast("dict[Any, Any]", tree).items() if isinstance(tree, dict) else enumerate(cast("list[Any]", tree))
    )
    for key, value in inner:
        yield from nodes_of(value, (*path, key))


def is_empty(value: Any) -> bool:
    """Tells whether a node holds nothing, as the empty states of an optax chain do."""
    return value is None or (isinstance(value, dict | list | tuple) and not value)


def _contained(node: Any, lists: bool) -> Any:
    if not isinstance(node, dict) or not node:
        return cast(Any, node)
    inner = {key: _contained(value, lists) for key, value in cast("dict[Any, Any]", node).items()}
    if inner and all(isinstance(key, int) for key in inner):
        if lists:
            return [inner.get(number) for number in range(max(inner) + 1)]
        return {str(key): value for key, value in inner.items()}
    return inner


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
