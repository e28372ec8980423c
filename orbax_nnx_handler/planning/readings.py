"""Which of the possible readings of a stored tree a restore goes by."""

import dataclasses
from collections.abc import Sequence

from orbax_nnx_handler.planning import layouts
from orbax_nnx_handler.planning.ambiguity import two_layouts
from orbax_nnx_handler.planning.errors import RestoreError
from orbax_nnx_handler.planning.mapping import LeafMapping, map_leaves
from orbax_nnx_handler.planning.options import RestoreOptions
from orbax_nnx_handler.planning.placement import Stored
from orbax_nnx_handler.planning.roles import WEIGHTS, Wanted, of_role


def best_mapping(
    wanted: Sequence[Wanted], stored: Stored, options: RestoreOptions
) -> tuple[LeafMapping, list[RestoreError]]:
    """Returns the reading that finds the most leaves, and what is wrong with the choice.

    Raises:
        RestoreError: No layout fits, or the rules fit under none of those that do.
    """
    mappings, refused = list[LeafMapping](), list[RestoreError]()
    for layout in layouts.candidates(stored, options.layout):
        try:
            mappings.append(map_leaves(wanted, stored, layout, options.renames))
        except RestoreError as error:  # A rule may be meant for one layout of several.
            refused.append(error)
    if not mappings:
        raise refused[0]
    scores = [_score(mapping, wanted) for mapping in mappings]
    best = mappings[scores.index(max(scores))]
    rivals = [m for m, score in zip(mappings, scores, strict=True) if score == max(scores)]
    different = [mapping for mapping in rivals if mapping.found != best.found]
    if options.layout == "auto":
        plain = _plain_mapping(wanted, stored, options, max(scores))
        if plain is not None:
            return plain, []
    return best, [two_layouts(best, different[0])] if different else []


def _plain_mapping(
    wanted: Sequence[Wanted], stored: Stored, options: RestoreOptions, best: int
) -> LeafMapping | None:
    """Returns the reading under which no key has a meaning, where it is the better one.

    So a module may be called `params`, and a Linen `TrainState` is found as it was written.
    """
    weights = of_role(wanted, *WEIGHTS)
    if best >= len(weights) or not _may_be_plain(weights, options):
        return None
    untyped = [dataclasses.replace(w, role="model", path=w.leaf.path) for w in wanted if w.leaf.kind is None]
    plain = untyped if len(untyped) == len(wanted) else wanted
    try:
        mapping = map_leaves(plain, stored, layouts.UNNAMED, options.renames)
    except RestoreError:
        return None
    score = _score(mapping, weights)
    return mapping if score == len(weights) or (plain is untyped and score > best) else None


_TELLING_KEYS = frozenset[str]().union(*(layout.keys for layout in layouts.LAYOUTS))


def _may_be_plain(weights: Sequence[Wanted], options: RestoreOptions) -> bool:
    """Tells whether a model may hold a module that is called like a part of a train state.

    A second mapping is as dear as the first, and nearly every model has no such module.
    """
    return bool(options.renames) or any(
        item.leaf.kind is None or not _TELLING_KEYS.isdisjoint(item.tokens[:-1]) for item in weights
    )


def _score(mapping: LeafMapping, wanted: Sequence[Wanted]) -> int:
    shapes = mapping.shapes
    return sum(shapes.get(item.leaf.path) == item.leaf.shape for item in wanted)
