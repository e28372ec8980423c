"""Random state and other NNX leftovers, where a checkpoint does hold them.

MaxText keeps them under `nnx_aux/model/...`. Flax 0.11 changed the layout of a
module's own stream: `drop/rngs/default/{count,key}` became
`drop/rngs/{count,key}`; both are read.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from orbax_nnx_handler.planning.core.paths import Path, Tokens, canonical
from orbax_nnx_handler.planning.core.recipes import Read
from orbax_nnx_handler.planning.layouts.layout import Placement
from orbax_nnx_handler.planning.mapping.matches import Found
from orbax_nnx_handler.planning.mapping.roots import Roots
from orbax_nnx_handler.planning.target.roles import Wanted

_MODEL = ("model",)


def find_random(
    found: dict[Path, Found], wanted: Sequence[Wanted], placements: Sequence[Placement], roots: Roots
) -> None:
    """Adds what `nnx_aux`, or an NNX state itself, holds of random state and custom variables.

    Args:
        found: What was found so far, extended in place.
        wanted: Leaves of the roles `random` and `model`.
        placements: What each stored leaf is.
        roots: Where the model sits on both sides.
    """
    left = [item for item in wanted if item.leaf.path not in found]
    if not left:
        return
    aux = _index(placement for placement in placements if placement.section == "aux")
    inline = _index((p for p in placements if p.section == "model" and p.collection is None), roots.stored)
    stored = {**inline, **aux}
    streams = _by_stream(stored)
    random = any(item.role == "random" for item in left)
    siblings = Counter(_unnamed(_in_model(item.tokens, roots.wanted)) for item in (wanted if random else ()))
    for item in left:
        tokens = _in_model(item.tokens, roots.wanted)
        source = aux.get(tokens) or aux.get(item.tokens)
        if source is None and item.role == "random":
            lone = siblings[_unnamed(tokens)] == 1
            source = _other_layout(tokens, stored if lone else {}, streams)
        if source is not None:
            found[item.leaf.path] = Found(recipe=Read(source))


def _in_model(tokens: Tokens, root: Tokens) -> Tokens:
    """Returns a path as `nnx_aux` has it: the model's own leaves below `model`, others where they are."""
    return (*_MODEL, *tokens[len(root) :]) if tokens[: len(root)] == root else tokens


def _index(placements: Iterable[Placement], root: Tokens | None = None) -> dict[Tokens, Path]:
    found: dict[Tokens, Path] = {}
    for placement in placements:
        tokens = canonical(placement.path)
        tokens = tokens if root is None else _in_model(tokens, root)
        found[tokens] = placement.leaf.path
        if tokens[-1:] == ("value",):
            found.setdefault(tokens[:-1], placement.leaf.path)
    return found


def _unnamed(tokens: Tokens) -> Tokens:
    return (*tokens[:-2], *tokens[-1:])


def _by_stream(index: Mapping[Tokens, Path]) -> Mapping[Tokens, list[Path]]:
    """Returns stored leaves by path without the stream's name."""
    found: dict[Tokens, list[Path]] = defaultdict(list)
    for tokens, path in index.items():
        if _names_stream(tokens) and tokens[-1] in ("key", "count"):
            found[_unnamed(tokens)].append(path)
    return found


def _other_layout(
    tokens: Tokens, index: Mapping[Tokens, Path], streams: Mapping[Tokens, list[Path]]
) -> Path | None:
    """Returns the same stream as another Flax wrote it, if just one can be meant."""
    named = streams.get(tokens, [])
    if len(named) == 1:
        return named[0]
    return index.get(_unnamed(tokens)) if _names_stream(tokens) else None


def _names_stream(tokens: Tokens) -> bool:
    return len(tokens) > 2 + len(_MODEL) * (tokens[:1] == _MODEL)
