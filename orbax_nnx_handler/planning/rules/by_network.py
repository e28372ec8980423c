"""Rules of a model, as rules for each of several networks that are called otherwise."""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from orbax_nnx_handler.planning.rules.rename import Rename
from orbax_nnx_handler.planning.rules.rule import (
    Rule,
)
from orbax_nnx_handler.planning.rules.stacking import UnstackLayers


def by_network(keys: Sequence[Rename], rules: Sequence[Rule]) -> Iterator[tuple[Rule, ...]]:
    """Yields rules that rename each network and what is in it, out of those for one model of all of them.

    Args:
        keys: The rules that made parts of one model of the networks.
        rules: They, and those behind them; nothing comes where one takes parts of two networks.
    """
    collections = {rule.replacement: rule.pattern.removeprefix(f"{rule.replacement}/") for rule in keys}
    owners, levels = dict[str, str](), set[str]()
    for rule in rules[len(keys) :]:
        if isinstance(rule, Rename | UnstackLayers):
            stored, _ = _parted(rule.pattern, dict.fromkeys(collections, ""))
            wanted, *rest = (rule.replacement if isinstance(rule, Rename) else rule.into).split("/")
            if stored and (not rest or owners.setdefault(stored, wanted) != wanted):
                return
            levels.update(rest[:1] if stored and len(rest) > 1 else ())
    # `model` beside an optimizer, or 0 of a tuple.
    for level in (*levels, "") if len(levels) == 1 else ("",):
        found: dict[object, dict[str, Rule]] = defaultdict(dict)
        for rule in rules[len(keys) :]:
            below = _below(rule, owners, collections, level)
            if below is None:
                return
            network, inner = below
            kind = type(rule), *_fields(inner)[0][1], getattr(rule, "axis", None)
            at = next(at for at in itertools.count() if network not in found[*kind, at])
            found[*kind, at][network] = inner
        yield tuple(_in_networks(owners, collections, found.values()))


def _below(
    rule: Rule, owners: Mapping[str, str], collections: Iterable[str], level: str
) -> tuple[str, Rule] | None:
    """Returns the network that a rule is about, if it is about one, and the rule below it; None for two."""
    stored = {key: (key, "") for key in collections}
    wanted = {owner: (key, level) for key, owner in owners.items()}
    networks, fields = set[str](), list[tuple[str, Sequence[str]]]()
    for name, paths in _fields(rule):
        # A rename leads from the stored names to the wanted ones.
        known = wanted | stored if name in ("pattern", "patterns") else stored | wanted
        parted = [_parted(path, {key: at for key, (_, at) in known.items()}) for path in paths]
        networks |= {known[key][0] for key, _ in parted if key}
        fields.append((name, [rest for _, rest in parted]))
    return None if len(networks) > 1 else (next(iter(networks), ""), _with_fields(rule, fields))


def _in_networks(
    owners: Mapping[str, str], collections: Mapping[str, str], found: Iterable[Mapping[str, Rule]]
) -> Iterator[Rule]:
    yield from (Rename(stored, wanted) for stored, wanted in owners.items() if stored != wanted)
    for rules in found:
        if len({*rules.values()}) == 1 and ("" in rules or len(rules) == len(collections)):
            yield next(iter(rules.values()))
            continue
        for stored in collections if "" in rules else rules:
            rule = rules.get(stored) or rules[""]
            above = f"{owners.get(stored, stored)}/{collections[stored]}"
            fields = [(name, [f"{above}/{path}" for path in paths]) for name, paths in _fields(rule)]
            yield _with_fields(rule, fields)


def _parted(path: str, above: Mapping[str, str]) -> tuple[str, str]:
    """Returns the network that a path begins with, if it does, and the rest without a level between."""
    key, _, rest = path.partition("/")
    return (key, rest.removeprefix(f"{above[key]}/")) if rest and key in above else ("", path)


def _fields(rule: Rule) -> list[tuple[str, tuple[str, ...]]]:
    """Returns the fields of a rule that hold paths, the stored ones first."""
    fields = ((name, getattr(rule, name, ())) for name in ("pattern", "patterns", "replacement", "into"))
    return [(name, (paths,) if isinstance(paths, str) else paths) for name, paths in fields if paths]


def _with_fields(rule: Rule, fields: Iterable[tuple[str, Sequence[str]]]) -> Rule:
    changes = {
        name: tuple(paths) if isinstance(getattr(rule, name), tuple) else paths[0] for name, paths in fields
    }
    return cast(Rule, dataclasses.replace(cast(Any, rule), **changes))
