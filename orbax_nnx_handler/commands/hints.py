"""The options at a prompt that do what hints propose."""

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import EllipsisType
from typing import Any, cast

from flax import nnx

from orbax_nnx_handler.commands.arguments import rename_text
from orbax_nnx_handler.planning.core.errors import Hint
from orbax_nnx_handler.planning.options import Policy
from orbax_nnx_handler.planning.rules import Rename, Rule, as_rules

_MANY = 8
"""Options that fit at a prompt; more of them are a matter for a program."""


def as_options(hints: Iterable[Hint], given: Sequence[Rule] = ()) -> str:
    """Returns the options that do what hints propose; empty where none can be said at a prompt.

    Args:
        hints: The hints.
        given: The rules that were passed already, which hints repeat.
    """
    words = [word for hint in hints for word in _options(hint, given)]
    return " ".join(dict.fromkeys(words))


def _options(hint: Hint, given: Sequence[Rule]) -> list[str]:
    words: list[str] = []
    for name, value in hint.arguments.items():
        if name == "renames" and given:
            value = [rule for rule in as_rules(value) if rule not in given]
        said = _SAID[name](value) if name in _SAID else None
        if said is None:
            return []
        words += said
    return words if len(words) <= _MANY else []


def option(name: str, value: str) -> str | None:
    """Returns an option as it can be pasted at a prompt; None where its value cannot be seen there."""
    if not value.isprintable():
        return None
    # `--rename -rf=hidden` would be an option of another name.
    between = "=" if value.startswith("-") else " "
    return f"--{name}{between}{shlex.quote(value)}"


def _option(name: str) -> Callable[[Any], list[str] | None]:
    return lambda value: _all_said([option(name, str(value))])


def _all_said(words: Iterable[str | None]) -> list[str] | None:
    """Returns the words; None where one of them cannot be said, for a part of a way out would mislead."""
    every = list(words)
    said = [word for word in every if word is not None]
    return said if len(said) == len(every) else None


def _policies(policy: Any) -> list[str] | None:
    if isinstance(policy, str):
        return [f"--policy {policy}"]
    words: list[str | None] = []
    for key, choice in cast("Mapping[Any, Policy]", policy).items():
        keys = _keys(key)
        if keys:
            words.append(option("policy", f"{'/'.join(keys)}={choice}"))
        elif not isinstance(key, EllipsisType):
            return None  # Types of Variables have no spelling at a prompt.
    return _all_said(words)


def _keys(chosen: Any) -> list[str]:
    """Returns the keys that a filter asks for, as `--policy` takes them; none for any other filter."""
    parts = cast("Sequence[Any]", chosen.predicates) if isinstance(chosen, nnx.All) else (chosen,)
    keys = [part.key for part in parts if isinstance(part, nnx.PathContains)]
    said = [str(key) for key in keys if isinstance(key, str | int) and "/" not in str(key)]
    return said if len(said) == len(parts) else []


def rename_options(renames: Iterable[Rule | tuple[str, str]]) -> list[str] | None:
    """Returns rules as options; None where one of them is more than another name."""
    rules = as_rules(renames)
    pairs = [(rule.pattern, rule.replacement) for rule in rules if isinstance(rule, Rename)]
    if len(pairs) < len(rules):
        return None
    texts = [rename_text(stored, wanted) for stored, wanted in pairs]
    return _all_said(None if text is None else option("rename", text) for text in texts)


_SAID: Mapping[str, Callable[[Any], list[str] | None]] = {
    "item": _option("item"),
    "layout": _option("layout"),
    "policy": _policies,
    "renames": rename_options,
}
