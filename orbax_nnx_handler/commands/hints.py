"""Hints are written as Python; whoever reads them at a prompt needs the options instead."""

import ast
import re
import shlex
from collections.abc import Iterator
from typing import cast

_WORD = re.compile(r"\b(item|layout|policy|renames)=(?=['\"{\[])")
_FILTERED = re.compile(r'nnx\.PathContains\("([^"]+)"\): ("\w+")')


def options_of(message: str) -> str:
    """Returns the options that do what the hints of a message tell; empty where none does.

    Args:
        message: An error or a plan, with its hints.
    """
    hints = re.sub(r"\n +", " ", message).splitlines()
    words = [word for hint in hints if hint.startswith("hint: ") for word in _options(hint)]
    return " ".join(dict.fromkeys(words))


def _options(hint: str) -> Iterator[str]:
    for found in _WORD.finditer(hint):
        source = _expression(hint[found.end() :])
        if found[1] in ("item", "layout"):
            yield f"--{found[1]} {shlex.quote(str(ast.literal_eval(source)))}"
            # Of several layouts or items the hint names, the first stands for all.
            return
        yield from _policies(source) if found[1] == "policy" else _renames(source)


def _expression(text: str) -> str:
    """Returns the Python at the start of a text."""
    for end in range(1, len(text) + 1):
        try:
            ast.parse(text[:end], mode="eval")
        except SyntaxError:
            continue
        return text[:end]
    return "None"


def _policies(source: str) -> Iterator[str]:
    if source.startswith(('"', "'")):
        yield f"--policy {ast.literal_eval(source)}"
        return
    # Only keys of paths can be said at a prompt, no types of Variables; a part of a policy would mislead.
    found = _FILTERED.findall(source)
    if len(found) == source.count(": ") - source.count("...: "):
        yield from (f"--policy {shlex.quote(f'{key}={ast.literal_eval(value)}')}" for key, value in found)


def _renames(source: str) -> Iterator[str]:
    try:
        rules = cast("list[tuple[str, str]]", ast.literal_eval(source))
    except ValueError:
        return
    # A name with a space stands for one that the reader knows.
    if not any(" " in name for rule in rules for name in rule):
        yield from (f"--rename {shlex.quote(f'{stored}={wanted}')}" for stored, wanted in rules)
