"""What a dimension is: told by the places it stands at, never by its size."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from orbax_nnx_handler.planning.diagnosis.causes import listed
from orbax_nnx_handler.planning.paths import Path, segments


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """One axis of one weight on which the two sides differ.

    Attributes:
        path: The wanted weight.
        axis: The axis.
        rank: How many axes it has.
        stored: The stored size.
        wanted: The wanted size.
    """

    path: Path
    axis: int
    rank: int
    stored: int
    wanted: int

    @property
    def names(self) -> tuple[str, ...]:
        """The path's names in lower case."""
        return tuple(part.lower() for part in segments(self.path))

    @property
    def module(self) -> str:
        """The name of the module that has the weight."""
        return self.names[-2] if len(self.names) > 1 else ""


def name_of(places: Sequence[Place], most: int) -> str:
    """Returns what a dimension is, or an empty text.

    Args:
        places: Where it stands.
        most: In how many weights the size of the whole model would differ.
    """
    for name, is_it in _NAMES:
        if all(is_it(place) for place in places):
            return name
    embeds = any(_embeds(place) for place in places)
    if embeds and all(_is_vocabulary(place) for place in places):
        return "the vocabulary"
    return "the hidden size" if len({place.path for place in places}) >= max(most, 3) else ""


def output_module(places: Sequence[Place]) -> Path | None:
    """Returns the one module of which only the output differs in size; None if it is not that."""
    modules = {place.path[:-1] for place in places}
    is_last = all(place.axis == place.rank - 1 for place in places)
    return modules.pop() if len(modules) == 1 and is_last and places[0].path[:-1] else None


def modules_of(places: Sequence[Place]) -> str:
    """Returns where a dimension stands that has no name of its own: `a dimension of down and up`."""
    modules = {names[-2] for place in places if len(names := segments(place.path)) > 1}
    return f"a dimension of {listed(sorted(modules))}" if 0 < len(modules) <= _FEW else ""


_FEW = 3


def is_attention(path: Path) -> bool:
    """Tells from its path whether a weight is an attention's."""
    words = ("query", "key", "value", "attention", "attn")
    return any(any(word in part.lower() for word in words) for part in segments(path)[:-1])


def _is_experts(place: Place) -> bool:
    if any("router" in part for part in place.names) or place.module == "gate":
        return place.axis == place.rank - 1
    # Axis 1 where the layers are stacked before the experts.
    return any("expert" in part or "moe" in part for part in place.names) and place.axis < min(
        2, place.rank - 1
    )


def _is_positions(place: Place) -> bool:
    return any("pos" in part for part in place.names) and place.axis == place.rank - 2


def _embeds(place: Place) -> bool:
    return any("embed" in part for part in place.names) and not any("pos" in part for part in place.names)


def _is_vocabulary(place: Place) -> bool:
    """Embeddings have the vocabulary first, output layers last."""
    is_output = any(word in part for part in place.names for word in ("head", "logits", "output"))
    return place.axis == 0 if _embeds(place) else is_output and place.axis == place.rank - 1


def _is_out(place: Place) -> bool:
    return any(part in ("out", "o", "o_proj", "output", "attn_vec_einsum") for part in place.names[-2:])


def _is_heads(place: Place) -> bool:
    """Queries, keys and values have heads and head size last; the way out has them first."""
    if not is_attention(place.path) or place.rank < 2:
        return False
    return place.rank > 2 and place.axis < place.rank - 2 if _is_out(place) else place.axis == place.rank - 2


def _is_shared_heads(place: Place) -> bool:
    return _is_heads(place) and any(part in ("key", "value", "k", "v", "kv") for part in place.names[-2:])


def _is_head_size(place: Place) -> bool:
    if not is_attention(place.path) or place.rank < 2:
        return False
    return place.rank > 2 and place.axis == place.rank - (2 if _is_out(place) else 1)


_NAMES: Iterable[tuple[str, Callable[[Place], bool]]] = (
    ("the number of experts", _is_experts),
    ("the number of positions", _is_positions),
    ("the number of key and value heads", _is_shared_heads),
    ("the number of heads", _is_heads),
    ("the size of a head", _is_head_size),
)
