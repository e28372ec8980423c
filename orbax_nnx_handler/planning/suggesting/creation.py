"""In which order a program creates its modules."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

from flax import nnx

from orbax_nnx_handler.planning.core.paths import Tokens, canonical, is_number

Order = Mapping[Tokens, Sequence[str]]
"""Names in the order of their creation, by the module's canonical path."""


def creation_order(item: Any) -> Order:
    """Returns the order in which attributes were set; empty where nothing tells it.

    A module remembers it until it is split and merged: what comes out of
    `nnx.eval_shape` or `nnx.jit` has its attributes sorted by name, so that an
    item in which every module is sorted tells nothing.

    Args:
        item: A module, or a tuple, list or dict of modules.
    """
    found = dict(_walk(item, ()))
    named = [[name for name in names if not is_number(name)] for names in found.values()]
    return {} if all(names == sorted(names) for names in named) else found


def order_of(target: Any, init: Callable[[], Any] | None) -> Order:
    """Returns the order of a target's modules, from the function that builds it where there is one.

    Args:
        target: The target.
        init: Builds the target; traced only, nothing is computed.
    """
    if init is None:
        return creation_order(target)
    found: list[Order] = []

    def build() -> Any:
        built = init()
        found.append(creation_order(built))
        return built

    nnx.eval_shape(build)
    return found[0]


def _walk(item: Any, path: Tokens) -> Iterator[tuple[Tokens, list[str]]]:
    children = _children(item)
    if children is None:
        return
    # A name with a number (`conv_1`) is a number below a name in canonical paths.
    yield path, list(dict.fromkeys(canonical((key,))[0] for key, _ in children))
    for key, child in children:
        yield from _walk(child, (*path, *canonical((key,))))


def _children(item: Any) -> list[tuple[Any, Any]] | None:
    if isinstance(item, nnx.Variable | nnx.State):
        return None
    if isinstance(item, nnx.List | list | tuple):
        return list(enumerate(cast(Sequence[Any], item)))
    if isinstance(item, dict):
        return list(cast(dict[Any, Any], item).items())
    if isinstance(item, nnx.Pytree):
        return [(name, part) for name, part in vars(item).items() if _is_part(name, part)]
    return None


def _is_part(name: str, part: Any) -> bool:
    # `_pytree__...`: Flax keeps its own records of a module beside the module's parts.
    kinds: tuple[type[Any], ...] = (nnx.Pytree, nnx.Variable, dict, list, tuple)
    return not name.startswith("_pytree") and isinstance(part, kinds)
