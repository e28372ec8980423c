"""Layers that are stored twice: one by one, and in a stack.

Both claim the wanted layer (law 4), also where one of them alone has its path. Layers that
have numbers may also lie in front of a scan that the layout knows; but then the target has
more layers than these.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.paths import Path, Tokens
from orbax_nnx_handler.planning.layouts.layout import ScannedBlocks
from orbax_nnx_handler.planning.mapping.layers import Key, layer_paths, scan_paths
from orbax_nnx_handler.planning.mapping.matches import Rivals
from orbax_nnx_handler.planning.rules.entries import Entry
from orbax_nnx_handler.planning.target.roles import Wanted


def stored_twice(
    fitting: Mapping[Path, Entry],
    wanted: Sequence[Wanted],
    below: Mapping[Path, Tokens],
    free: Iterable[tuple[Tokens, Entry]],
    scans: Sequence[ScannedBlocks] = (),
) -> Iterator[Rivals]:
    """Yields the wanted layers that have their path, and are in another stored arrangement besides.

    Args:
        fitting: The entry of each wanted leaf that was found by its path.
        wanted: All wanted leaves.
        below: The canonical path of each below the model's root.
        free: The entries that no wanted leaf has the path of, with each reading of their paths.
        scans: The scans that the layout knows by name.
    """
    others = _by_place(free, scans)
    if not others:
        return
    left = [below[item.leaf.path] for item in wanted if item.leaf.path not in fitting]
    lacking = {place.group for tokens in left for place in layer_paths(tokens) if place.form == "flat"}
    for item in wanted:
        entry = fitting.get(item.leaf.path)
        if entry is None:
            continue
        for place in layer_paths(below[item.leaf.path]):
            form = _OTHER.get(place.form)
            rivals = others.get((form, (place.group, place.rest)), ()) if form else ()
            claims = [other for other in rivals if _is_same_layer(item, place.form, entry, other)]
            if place.form == "flat" and place.group not in lacking:
                scanned = others.get(("known scan", (place.group, place.rest)), ())
                claims += [other for other in scanned if other.collection == entry.collection]
            if claims:
                yield Rivals(wanted=item, entries=(entry, *claims))
                break


def _by_place(
    free: Iterable[tuple[Tokens, Entry]], scans: Sequence[ScannedBlocks]
) -> Mapping[tuple[str, Key], list[Entry]]:
    """Returns the entries by arrangement, group of layers and path below a layer."""
    found: dict[tuple[str, Key], list[Entry]] = defaultdict(list)
    for tokens, entry in free:
        for place in layer_paths(tokens):
            if place.form in _OTHER:
                found[place.form, (place.group, place.rest)].append(entry)
        for place in scan_paths(tokens, scans):
            found["known scan", (place.group, place.rest)].append(entry)
    return found


_OTHER: Mapping[str, str] = {"flat": "stacked", "stacked": "flat"}


def _is_same_layer(item: Wanted, form: str, entry: Entry, other: Entry) -> bool:
    layer, stack = (item.leaf.shape, other.shape) if form == "flat" else (other.shape, item.leaf.shape)
    return other.collection == entry.collection and _is_layer_of(layer, stack)


def _is_layer_of(layer: Shape, stack: Shape) -> bool:
    """Tells whether a stack may hold layers of a shape."""
    return any((*stack[:axis], *stack[axis + 1 :]) == layer for axis in range(len(stack)))
