"""What is stored: what a path means, and what a checkpoint's metadata says.

Here what all of them read small JSON files with, which a stranger wrote: each field has the type that is
expected, or it is an error.
"""

import json
import math
from collections.abc import Collection
from typing import Any, cast

from orbax_nnx_handler.planning.core.leaves import Shape

# NumPy arrays have at most 64 axes, and no length that int64 cannot count.
_MAX_RANK = 64
_MAX_LENGTH = (1 << 63) - 1
MOST_LEAVES = 1 << 19
"""No program has had a quarter of it, and work and memory grow with them, whatever a leaf holds."""
_DEEPEST = 200
_OBJECT: set[type[Any]] = {dict}


class FieldError(ValueError):
    """A field is absent or of another type; the message names it."""


def check_paths(paths: Collection[tuple[Any, ...]]) -> None:
    """Raises where a tree has more leaves, deeper ones or longer lists than a program's can have.

    Raises:
        FieldError: Says which.
    """
    if len(paths) > MOST_LEAVES:
        raise FieldError(f"it names more than {MOST_LEAVES:,} leaves")
    check_depth(max(map(len, paths), default=0))
    # A list of a billion that holds one leaf would be written as one.
    lengths: dict[tuple[Any, ...], int] = {}
    for path in paths:
        if int not in map(type, path):
            continue
        for depth, key in enumerate(path):
            if isinstance(key, int):
                above = path[:depth]
                lengths[above] = max(lengths.get(above, 0), key + 1)
    if sum(lengths.values()) > MOST_LEAVES:
        raise FieldError(f"its lists would have more than {MOST_LEAVES:,} places")


def keys_of(name: str, separator: str) -> tuple[str, ...]:
    """Returns the keys that a name joins.

    Raises:
        FieldError: They are more than a program's can be.
    """
    check_depth(name.count(separator) + 1)
    return tuple(name.split(separator))


def check_depth(depth: int) -> None:
    """Raises where a leaf lies deeper than a program's can.

    Raises:
        FieldError: Says how deep.
    """
    if depth > _DEEPEST:
        raise FieldError(f"it names a leaf below {depth - 1} others")


def parse_object(content: bytes | None) -> dict[str, Any]:
    """Returns the JSON object that a file holds.

    Raises:
        FieldError: It holds something else.
    """
    try:
        parsed = json.loads(content or b"")
    # Nested a thousand deep, the parser gives up with the interpreter's own error.
    except (ValueError, RecursionError) as error:
        raise FieldError(f"no JSON: {error or type(error).__name__}") from error
    if not isinstance(parsed, dict):
        raise FieldError(f"a JSON {type(parsed).__name__} where an object should be")
    return cast(dict[str, Any], parsed)


def object_of(fields: dict[str, Any], name: str) -> dict[str, Any]:
    """Returns a field that is an object."""
    return _of_type(fields, name, dict, "an object")


def optional_object(fields: dict[str, Any], name: str) -> dict[str, Any]:
    """Returns a field that is an object, or an empty one where it is absent or null."""
    return {} if fields.get(name) is None else object_of(fields, name)


def objects_of(fields: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Returns a field that is a list of objects."""
    items: list[Any] = _of_type(fields, name, list, "a list")
    if not set(map(type, items)) <= _OBJECT:
        raise FieldError(f"{name} holds something else than objects")
    return items


def text_of(fields: dict[str, Any], name: str) -> str:
    """Returns a field that is a text, of characters that can be written."""
    text: str = _of_type(fields, name, str, "a text")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise FieldError(f"{name} is {text!r}, which is no text")
    return text


def texts_of(fields: dict[str, Any], name: str) -> list[str]:
    """Returns a field that is a list of texts."""
    items = cast(list[Any], _of_type(fields, name, list, "a list"))
    return [text_of({name: item}, name) for item in items]


def shape_field(fields: dict[str, Any], name: str, *, least: int) -> Shape:
    """Returns a field that is a shape, no length below `least`."""
    lengths = cast(list[Any], _of_type(fields, name, list, "a list"))
    if len(lengths) > _MAX_RANK:
        raise FieldError(f"{name} has {len(lengths)} axes, which is no shape: {_MAX_RANK} is the most")
    whole = all(type(length) is int and least <= length <= _MAX_LENGTH for length in lengths)
    # NumPy counts the elements of the other axes also where one has none.
    if not whole or (0 in lengths and math.prod(filter(None, lengths)) > _MAX_LENGTH >> 4):
        raise FieldError(f"{name} is {str(lengths)[:80]}, which is no shape")
    return tuple(lengths)


def _of_type(fields: dict[str, Any], name: str, kind: type, what: str) -> Any:
    value = fields.get(name)
    if isinstance(value, kind):
        return value
    if name not in fields:
        raise FieldError(f"{name} is absent")
    raise FieldError(f"{name} is {repr(value)[:80]}, where {what} should be")


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the pairs of a JSON object by their names.

    Raises:
        ValueError: A name stands there twice, or holds half of a character.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands there twice")
    # JSON can spell halves of characters, which are in no text that could be written.
    "".join(found).encode()
    return found
