"""Sentences on lines of a readable width; code in them stays in one piece."""

from collections.abc import Iterator

WIDTH = 120
"""Columns of a line in an error, a plan or a log, where nothing forces more."""

_SENTENCES = ("cause: ", "hint: ", "note: ")
_OPENING, _CLOSING = "([{", ")]}"


def wrapped(text: str, width: int = WIDTH) -> str:
    """Returns a text whose causes and hints are no wider than they must be; rows stay as they are."""
    return "\n".join(line for whole in text.splitlines() for line in _lines(whole, width))


def _lines(line: str, width: int) -> Iterator[str]:
    if len(line) <= width or not line.startswith(_SENTENCES):
        yield line
        return
    indent = " " * (line.index(": ") + 2)
    current = ""
    for word in _words(line, width - len(indent)):
        if current.strip() and len(current) + 1 + len(word) > width:
            yield current
            current = indent + word
        else:
            current = f"{current} {word}" if current.strip() else current + word
    yield current


def _words(line: str, room: int) -> Iterator[str]:
    """Yields the words of a line; what stands in brackets or backticks is one word, so that it can be pasted.

    A list that is wider than a line is taken apart between its elements, where Python allows it too.
    """
    for word in _split(line, depth=0):
        yield from _split(word, depth=1) if len(word) > room else [word]


def _split(text: str, depth: int) -> Iterator[str]:
    level, quoted, word = 0, False, ""
    for letter in text:
        if letter == " " and level <= depth and not quoted and (not level or word.endswith(",")):
            yield word
            word = ""
            continue
        quoted ^= letter == "`"
        level = max(0, level + (letter in _OPENING) - (letter in _CLOSING))
        word += letter
    yield word
