"""Where a part of a block stands in the order of computation, as far as its name tells."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any


def order_word(found: Collection[str]) -> int:
    """Returns -1 for a name that means the beginning of something, 1 for its end, 0 for neither or both."""
    low = bool({"pre", "first", "in", "up", "expand", "stem"}.intersection(found))
    high = bool({"post", "last", "out", "down", "pointwise"}.intersection(found))
    return high - low


PLACING = frozenset(("pre", "post", "first", "last", "in", "out", "attn", "mlp", "self", "cross"))
"""The words that tell where a norm stands in its block."""


_SELF, _CROSS, _MLP, END = 10.0, 20.0, 30.0, 100.0


BEFORE_NETWORK = _MLP - 1


def same_place(one: float, other: float) -> bool:
    """Tells whether two norms may stand in the same place of a block.

    What comes after the attention comes before the network that follows it: Llama's
    `post_attention_layernorm` is Gemma's `pre_ffw_norm`.
    """
    low, high = sorted(x - 1 if x in (_SELF + 2, _CROSS + 2) else x for x in (one, other))
    if low == -END or high == END:
        return low != -END or high != END
    if high - low <= 1:
        return True
    return (low, high) in {
        (after, before + side)
        for after, before in ((_SELF + 1, _MLP), (_SELF + 1, _CROSS), (_CROSS + 1, _MLP))
        for side in (-1, 0)
    }


def component(said: Iterable[str]) -> float | None:
    """Returns where a part of a block stands in the order of computation."""
    found = set(said)
    if "cross" in found:
        return _CROSS
    if found & {"attn", "self"}:
        return _SELF
    return _MLP if found & {"mlp", "expert", "experts"} else None


def letters(told: Iterable[frozenset[str]]) -> list[str | None]:
    """Returns the letters by which parts are counted, `conv_a` and `conv_b`, from what tells them apart."""
    return [min(words) if len(words) == 1 and words <= {*"abcd"} else None for words in told]


def last_of_block(places: Sequence[float | None]) -> int | None:
    """Returns which norm of a block is its last one, of its network, where all others are attentions'."""
    kinds = [None if place is None else round(place, -1) for place in places]
    lasts = [at for at, kind in enumerate(kinds) if kind in (_MLP, END)]
    attends = all(kind in (_SELF, _CROSS, _MLP, END) for kind in kinds) and len(kinds) > 2
    return lasts[0] if attends and len(lasts) == 1 else None


def placed(positions: Sequence[float | None]) -> list[float | None]:
    """Returns places, the only unknown one at the other end: `layer_norm` beside `final_layer_norm`."""
    known = {position for position in positions if position is not None}
    if positions.count(None) == 1 and known and all(abs(position) >= 100 for position in known):
        return [0.0 if position is None else position for position in positions]
    return list(positions)


def in_strict_order(keys: Sequence[Any]) -> list[int] | None:
    """Returns the places in the order of their keys; None where a key is not known or is there twice."""
    if None in keys or len(set(keys)) < len(keys):
        return None
    return sorted(range(len(keys)), key=lambda at: keys[at])
