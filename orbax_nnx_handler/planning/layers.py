"""Layers stacked by `nn.scan` and layers one by one: the same weights, arranged twice.

A group of layers named G under parent P is written in one of three ways:

    flat      P/G_0/rest, P/G_1/rest, ...          one leaf a layer
    stacked   P/G/rest                             one leaf, an extra axis
    blocks    P/G/X_0/rest ... P/G/X_{k-1}/rest    k leaves, an extra axis (cycles),
              P/G_remainder/X_0/rest ...           and what is left over, flat

In blocks, layer = cycle * k + position. Each way gives every layer of the group
a place, so any way can be made from any other.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from orbax_nnx_handler.planning.paths import is_number

Tokens = tuple[str, ...]
Form = Literal["flat", "stacked", "block", "remainder"]


class Group(NamedTuple):
    """A group of layers: the path of its parent and its name."""

    # A named tuple, as `Seat` is: a model of 20,000 leaves has 50,000 of each, and most are looked up once.

    parent: Tokens
    name: str


class Seat(NamedTuple):
    """One reading of a path as a part of a layer group.

    Attributes:
        group: The group.
        rest: The path below one layer.
        form: How the path holds layers.
        position: The layer (flat), its position in the block, or in the remainder; 0 if stacked.
        inner: The name of the layers within a block (`layers` in `layers/layers_3`); empty if none.
    """

    group: Group
    rest: Tokens
    form: Form
    position: int = 0
    inner: str = ""


def seats(tokens: Tokens) -> Iterator[Seat]:
    """Yields every reading of a canonical path as a part of a layer group."""
    numbered = [is_number(token) for token in tokens]
    for at, token in enumerate(tokens[:-1]):
        if not numbered[at]:
            if not numbered[at + 1]:
                yield Seat(Group(tokens[:at], token), tokens[at + 1 :], "stacked")
            continue
        if at == 0:
            continue
        number, name, rest = int(token[1:]), tokens[at - 1], tokens[at + 1 :]
        yield Seat(Group(tokens[: at - 1], name), rest, "flat", number)
        if at >= 2 and not numbered[at - 2]:
            yield from _block_seats(tokens[: at - 2], tokens[at - 2], name, rest, number)


def flat_seats(tokens: Tokens) -> list[Seat]:
    """Returns the readings of a canonical path as a part of layers one by one."""
    return [
        Seat(Group(tokens[: at - 1], tokens[at - 1]), tokens[at + 1 :], "flat", int(token[1:]))
        for at, token in enumerate(tokens[:-1])
        if at and is_number(token)
    ]


def _block_seats(parent: Tokens, container: str, inner: str, rest: Tokens, number: int) -> Iterator[Seat]:
    yield Seat(Group(parent, container), rest, "block", number, inner)
    name = container.removesuffix("_remainder")
    if name != container and name:
        yield Seat(Group(parent, name), rest, "remainder", number, inner)
