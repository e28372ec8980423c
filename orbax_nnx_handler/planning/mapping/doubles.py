"""Layers that are stored twice: one by one, and in a stack.

Both claim the wanted layer (law 4), also where one of them alone has its path.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.paths import Path, Tokens
from orbax_nnx_handler.planning.mapping.layers import Key, layer_paths
from orbax_nnx_handler.planning.mapping.matches import Rivals
from orbax_nnx_handler.planning.rules.entries import Entry
from orbax_nnx_handler.planning.target.roles import Wanted


def stored_twice(
    fitting: Mapping[Path, Entry],
    wanted: Sequence[Wanted],
    below: Mapping[Path, Tokens],
    free: Iterable[tuple[Tokens, Entry]],
) -> Iterator[Rivals]:
    """Yields the wanted layers that have their path, and are in another stored arrangement besides.

    Args:
        fitting: The entry of each wanted leaf that was found by its path.
        wanted: All wanted leaves.
        below: The canonical path of each below the model's root.
        free: The entries that no wanted leaf has the path of, with each reading of their paths.
    """
    others: dict[Key, list[tuple[str, Entry]]] = defaultdict(list)
    for tokens, entry in free:
        for place in layer_paths(tokens):
            if place.form in ("flat", "stacked"):
                others[place.group, place.rest].append((place.form, entry))
    if not others:
        return
    for item in wanted:
        entry = fitting.get(item.leaf.path)
        if entry is None:
            continue
        for place in layer_paths(below[item.leaf.path]):
            claims = [
                other
                for form, other in others.get((place.group, place.rest), ())
                if form != place.form
                and other.collection == entry.collection
                and (
                    _is_layer_of(item.leaf.shape, other.shape)
                    if place.form == "flat"
                    else _is_layer_of(other.shape, item.leaf.shape)
                )
            ]
            if claims and place.form in ("flat", "stacked"):
                yield Rivals(wanted=item, entries=(entry, *claims))
                break


def _is_layer_of(layer: Shape, stack: Shape) -> bool:
    """Tells whether a stack may hold layers of a shape."""
    return any((*stack[:axis], *stack[axis + 1 :]) == layer for axis in range(len(stack)))
