"""What is told of whole modules: renames of many, whether one's matrices are transposed, which one is meant.

`('kernel', 'weight')`, and `('{x}_dense', 'net/{x}_linear')` for `up_dense`, `down_dense` and all
others: one rule where each module would have one. And rules for one model of several networks, also as
rules that rename each network.
"""

import dataclasses
import functools
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

from orbax_nnx_handler.planning.core.leaves import Shape, with_fields
from orbax_nnx_handler.planning.core.paths import Path, canonical, is_index, segments
from orbax_nnx_handler.planning.core.recipes import Read
from orbax_nnx_handler.planning.layouts.layout import is_copy_beside, is_copy_level, words_of
from orbax_nnx_handler.planning.likeness.assignment import MOST_PAIRS, fit_of, may_be
from orbax_nnx_handler.planning.likeness.links import Findings, Link, Move, Tie, alike, differing
from orbax_nnx_handler.planning.likeness.module_parts import Leaf, module_parts, part_of
from orbax_nnx_handler.planning.likeness.named_parts import NamedPart, named_parts
from orbax_nnx_handler.planning.likeness.shapes import Way
from orbax_nnx_handler.planning.likeness.vocabulary import PYTORCHS, Names, concepts, exclude, meanings, words
from orbax_nnx_handler.planning.rules import Rename, Rule, UnstackLayers
from orbax_nnx_handler.planning.rules.entries import Entries, Entry
from orbax_nnx_handler.planning.rules.rule import compiled
from orbax_nnx_handler.planning.verdict.outcomes import Verdict

Renamed = tuple[Names, Names]
"""The segments that a rename is for, and what they become."""

_MANY = 24
"""So many modules are rather renamed at once than one by one."""
_PLACES = ("{x}", "{y}", "{z}")


def of_leaves(moves: Sequence[Move]) -> Iterator[Renamed]:
    """Yields what many modules call a leaf, with what the wanted ones call it: `kernel`, `weight`."""
    return _shared(moves, lambda move: (move.names[-1:], move.aim[-1:]))


def of_modules(moves: Sequence[Move]) -> Iterator[Renamed]:
    """Yields renames of many modules, with places for what tells these apart: `{x}_dense`, `{x}_linear`."""
    others = [move for move in moves if not alike(move.names, move.aim)]
    return _shared(others, lambda move: _with_places(*differing(move)))


def _shared(moves: Sequence[Move], renamed: Callable[[Move], Renamed]) -> Iterator[Renamed]:
    groups = {(differing(move), renamed(move)) for move in moves}
    for (stored, wanted), count in Counter(each for _, each in groups).items():
        if stored != wanted and count > _MANY:
            yield stored, wanted


def _with_places(stored: Names, wanted: Names) -> Renamed:
    """Returns both with places for what their names have in common, where other words tell them still."""
    shared = min(len(stored), len(wanted))
    if shared > len(_PLACES) or any("{" in name for name in stored):
        return stored, wanted
    ends = stored[len(stored) - shared :], wanted[len(wanted) - shared :]
    made = [_with_place(*names) for names in zip(_PLACES, *ends, strict=False)]
    theirs = (*stored[: len(stored) - shared], *(one for one, _ in made))
    ours = (*wanted[: len(wanted) - shared], *(other for _, other in made))
    return (theirs, ours) if {*theirs}.difference(_PLACES) else (stored, wanted)


def _with_place(place: str, one: str, other: str) -> tuple[str, str]:
    """Returns two names with a place for the words that both begin or end with."""
    if one == other:
        return place, place
    if (width := _shared_words(one, other)) > 0:
        return place + one[width:], place + other[width:]
    if (width := _shared_words(one[::-1], other[::-1])) > 0:
        return one[:-width] + place, other[:-width] + place
    return one, other


def _shared_words(one: str, other: str) -> int:
    """Returns how many letters lie before the last `_` of what two names begin with."""
    shared = next((at for at, pair in enumerate(zip(one, other, strict=False)) if len({*pair}) > 1), len(one))
    return one[:shared].rfind("_")


def keeping(list_: str, entries: Entries) -> Rename | None:
    """Returns a rename that only keeps `layers/0`, which a save would join to `layers_0`."""
    rule = Rename(f"{list_}/{{i}}", f"{list_}/{{i}}")
    pattern = compiled(rule.pattern)
    near = (entries[at].segments for at in pattern.among(entries))
    spans = (span for names in near for span in pattern.spans(names))
    return rule if all(is_index(span.bindings["i"]) for span in spans) else None


# Whether the matrices of a module are transposed.

_FEW = 6
"""Of up to so many matrices of a module every order is tried."""


def with_modules_unturned(found: Findings, wanted: Iterable[Leaf], stored: Iterable[Leaf]) -> Findings:
    """Returns what is known, asked where names transpose matrices that fit as they are in another order.

    The matrices of a module are all stored transposed, or none is: Llama's `w2` leads back, in DINOv2 `w3`
    does. Names decide where all of a model are transposed and some of them fit in no other order.

    Args:
        found: What is known.
        wanted: All wanted leaves.
        stored: All stored ones.
    """
    parts = defaultdict[tuple[object, ...], list[Link]](list)
    for link in found.links:
        parts[part_of(link.target), part_of(link.source), link.layers, link.layer].append(link)
    turned = defaultdict[tuple[object, ...], list[Sequence[Link]]](list)
    straight = set[object]()
    for links in parts.values():
        for link in filter(_is_told, links):
            name, modules = link.target.names[-1], (part_of(x)[:-1] for x in (link.target, link.source))
            if link.ways[0][0].turned:
                turned[name, *modules, link.layers, link.layer].append(links)
            else:
                straight.add(name)
    orders = {key: [*_unturned(held)] for key, held in turned.items()}
    settled = {name for name, *_ in (key for key, made in orders.items() if not made)} - straight
    asked = [(turned[key], made) for key, made in orders.items() if made and key[0] not in settled]
    ties = [_tie(held, made) for held, made in asked] + _exchanged(found, wanted, stored)
    gone = {id(link) for held, _ in asked for links in held for link in links}
    kept = [link for link in found.links if id(link) not in gone]
    return dataclasses.replace(found, links=kept, ties=[*found.ties, *ties]) if ties else found


def _exchanged(found: Findings, wanted: Iterable[Leaf], stored: Iterable[Leaf]) -> list[Tie]:
    """Returns a question about parts that nothing is known of, and that fit exchanged within their module.

    With a bias no layer is transposed: `w2` and `w3` of Llama, and of DINOv2.
    """
    modules = {
        tuple(part_of(leaf)[:-1] for leaf in (link.target, link.source)): link.levels
        for link in found.links
        if link.joint is None and link.layers is None
    }
    known = {leaf.part for link in found.every for leaf in (*link.wanted, *link.stored)}
    sides = [defaultdict[Names, dict[Names, dict[str, Leaf]]](dict) for _ in range(2)]
    for side, leaves in zip(sides, (wanted, stored), strict=True):
        for leaf in leaves:
            if leaf.part not in known and (part := part_of(leaf)):
                side[part[:-1]].setdefault(part[-1:], {})[leaf.place[1]] = leaf
    links = list[Link]()
    for (one, other), seats in modules.items():
        ours, theirs = sides[0].get(one, {}), sides[1].get(other, {})
        levels = tuple((at, to) for at, to in seats if at < len(other) and to < len(one))
        parts = [
            [
                Link(wanted=(x,), stored=(y,), grounds="names", ways=((Way(()),),), levels=levels)
                for kind, x in ours[name].items()
                if (y := theirs[name].get(kind))
            ]
            for name in ours
            if name in theirs
        ]
        if all(any(x.target.shape == x.source.shape[::-1] != x.source.shape for x in each) for each in parts):
            orders = [*itertools.islice(_unturned(parts), 2)]
            links += orders[0] if len(orders) == 1 else ()
    return [_tie([links], [])] if links else []


def _is_told(link: Link) -> bool:
    """Tells whether shapes alone say if a matrix, whose parameter has one name, is transposed."""
    one, other = link.target, link.source
    is_plain = link.joint is None and len(link.wanted) == len(link.stored) == len(link.ways[0]) == 1
    is_matrix = len(one.shape) == len(other.shape) > 1 and len({*one.shape}) > 1
    return is_plain and is_matrix and one.names[-1] == other.names[-1] not in PYTORCHS


def _unturned(parts: Sequence[Sequence[Link]]) -> Iterator[list[Link]]:
    """Yields the orders of some parts in which all of their leaves fit as they are."""
    held = [{link.source.place[1]: link for link in links} for links in parts]
    for order in itertools.permutations(held) if len(parts) <= _FEW else ():
        pairs = [
            (link, other.get(kind))
            for links, other in zip(held, order, strict=True)
            for kind, link in links.items()
        ]
        made = [
            with_fields(one, stored=other.stored, ways=((Way(()),),), grounds="names", fact="")
            for one, other in pairs
            if other and other.source.shape == one.target.shape and one.levels == other.levels
        ]
        if len(made) == len(pairs):
            yield made


def _tie(parts: Sequence[Sequence[Link]], orders: Iterable[Sequence[Link]]) -> Tie:
    """Returns the question in which order parts are meant; last, whether they are transposed by name."""
    named = tuple(itertools.chain(*parts))
    return Tie(
        wanted=tuple(dict.fromkeys(part_of(link.target) for link in named)),
        stored=tuple(dict.fromkeys(part_of(link.source) for link in named)),
        readings=(*map(tuple, orders), named),
    )


# Whether another module may be meant.


def is_rivalled(verdict: Verdict) -> bool:
    """Tells whether a module that nothing wants holds what one does that is wanted, and may be meant.

    An average of the weights, an older copy of them, a layer more. Of what is wanted by its own name, one
    that is counted with it, or called its opposite, is none.
    """
    # Without their numbers: of a list there are few names, however long it is.
    taken = defaultdict[tuple[tuple[Path, Path], Shape], set[tuple[str, bool]]](set)
    for path, item in verdict.restored.items() if verdict.unexpected else ():
        source, called = item.recipe.path if isinstance(item.recipe, Read) else (), canonical(path)
        for at, others in _levels(source):
            is_own = {*canonical(names := segments(source)[at : at + 1])} <= {*called}
            taken[others, item.wanted.shape].add((_unnumbered(*names), is_own))
    rivals = defaultdict[Path, list[set[str]]](list)
    for path, leaf in verdict.unexpected.items() if any(taken.values()) else ():
        for at, others in _levels(path):
            name = _unnumbered(segments(path)[at])
            some = {x for x, is_own in taken[others, leaf.shape] if not is_own or _may_be(name, x)}
            rivals[path[: at + 1]].append(some)
    return any(names[0].intersection(*names[1:]) for names in rivals.values())


def _may_be(name: str, own: str) -> bool:
    return name != own and not exclude(concepts([name]), concepts([own]))


def _levels(path: Path) -> list[tuple[int, tuple[Path, Path]]]:
    """Returns the levels of modules in a path, each with what stands before and behind it."""
    keys = segments(path)
    return [(at, (keys[:at], keys[at + 1 :])) for at in range(1, len(keys) - 1)]


@functools.lru_cache(maxsize=65536)
def _unnumbered(name: str) -> str:
    return re.sub(r"\d+", "", name)


GENERAL = frozenset(("norm", "attn", "mlp", "enc", "dec", "conv", "head", "embed"))
"""Words that many parts of a model share."""


def wanted_twice(found: Findings, wanted: Sequence[Leaf], stored: Sequence[Leaf]) -> Mapping[Path, Link]:
    """Returns links whose source a part that stays open might have as well: its own may be what is absent.

    Where that is a part of a module that Linen numbered, all parts of both modules are doubted.

    Args:
        found: What is known.
        wanted: All wanted leaves.
        stored: All stored ones.
    """
    known = {part_of(leaf) for link in found.every for leaf in link.wanted}
    is_whole = all(part_of(leaf) in known for leaf in wanted)
    lacking = [part for part in module_parts(() if is_whole else wanted) if part.names not in known]
    if not (sizes := {part.main_size for part in lacking}):
        return {}
    sides = [named_parts(module_parts(side), sizes=sizes) for side in (wanted, stored)]
    ours, theirs = ({role.part.names: role for role in side} for side in sides)
    plain = [link for link in found.links if link.joint is None and link.layers is None]
    pairs = {link.target.source: (part_of(link.target), part_of(link.source)) for link in plain}
    roles = {(x, y): (ours[x], theirs[y]) for x, y in pairs.values() if x in ours and y in theirs}
    few = len(roles) * len(lacking) <= MOST_PAIRS
    near = defaultdict[object, list[NamedPart]](list)
    for part in lacking:  # Of very many only those of the same layer.
        near[part.main_size, () if few else _numbers(ours[part.names])].append(ours[part.names])
    doubted, modules = set[tuple[Names, Names]](), set[Names]()
    for pair, (one, other) in roles.items():
        for role in near[one.part.main_size, () if few else _numbers(one)]:
            if _may_have(role, one, other):
                doubted.add(pair)
                if pair[0][-1] == role.part.names[-1] and other.part.levels[-2:-1][0].is_automatic:
                    modules |= {pair[0][:-1], role.part.names[:-1]}
    odd = (x for x in plain if (pair := pairs[x.target.source]) in doubted or pair[0][:-1] in modules)
    return {link.target.source: link for link in odd}


def _numbers(role: NamedPart) -> tuple[int, ...]:
    return tuple(level.number for level in role.part.levels if level.number is not None)


def _may_have(role: NamedPart, one: NamedPart, other: NamedPart) -> bool:
    """Tells whether a stored part may be made into another part as well as into the one it is known to be."""
    now, then = fit_of(one, other), fit_of(role, other)
    if now is None or then is None:
        return False
    is_counted = any(level.is_automatic for level in other.part.levels[-2:])
    is_better = then.score > now.score or (is_counted and then.score == now.score)
    numbers = _numbers(other)
    is_its = _numbers(one)[: len(numbers)] == numbers != _numbers(role)[: len(numbers)]
    if is_better and may_be(then, role, other) and not is_its:
        return True
    ours, own, theirs = map(_telling, (role, one, other))
    return bool(theirs & ours - own) and not theirs & own - ours


def _telling(role: NamedPart) -> frozenset[str]:
    """Returns the words of a part's path that say more than what many parts are."""
    said = (word for name in role.part.names for word in words(name) if word.isalpha())
    return frozenset(word for word in said if not meanings(word) or {*meanings(word)} - GENERAL)


# What several networks of one checkpoint share.


def keys_as_names(entries: Iterable[Entry], roots: Sequence[Rename] = ()) -> tuple[Rename, ...]:
    """Returns rules under which several networks, each with params of its own, are parts of one model.

    Args:
        entries: What is stored.
        roots: Rules for the copies that are such a part; the other ones are none.
    """
    models = dict.fromkeys(entry.prefix for entry in entries if entry.section == "model")
    if len({prefix[:-1] for prefix in models}) < 2 or any(len(prefix) < 2 for prefix in models):
        return ()
    rules = {rule.pattern: rule for rule in roots}
    for prefix in models:
        if not is_copy_beside(prefix[-1], "params"):
            rules["/".join(prefix)] = Rename("/".join(prefix), "/".join(prefix[:-1]))
    stored = ("/".join(prefix) for prefix in models)
    return tuple(rules[path] for path in stored if path in rules)


def copies_as_roots(
    entries: Sequence[Entry], wanted: Iterable[Path]
) -> tuple[Collection[Names], tuple[Rename, ...]]:
    """Returns where copies of parameters lie, and rules under which they are wanted ones.

    What says the same words as a wanted copy is that, as `target_params/critic` and `critic/target_params`
    are `target_critic`; else the only one, or that with a word that no other one has.
    """
    copies, roots = _copies_in(entries), {str(path[0]) for path in wanted}
    named = [root for root in roots if is_copy_level(root) or is_copy_beside(root, "params")]
    levels = {*copies, *((*copy, part) for copy, parts in copies.items() for part in parts)}
    pairs = [(x, y) for x in levels for y in named if set[str]().union(*map(words_of, x)) == words_of(y)]
    if not pairs:
        is_one = len(copies) == len(named) == 1
        pairs = [(x, y) for x in copies for y in named if is_one or words_of(x[-1]) & words_of(y)]
    counts = Counter(itertools.chain(*pairs))
    alone = sorted((copy, root) for copy, root in pairs if counts[copy] == counts[root] == 1)
    rules = (Rename("/".join(copy), root) for copy, root in alone if len(roots) > len(alone))
    return copies.keys(), tuple(rules)


def _copies_in(entries: Iterable[Entry]) -> Mapping[Names, Collection[str]]:
    """Returns where copies of parameters lie, each with its parts.

    The copy of one of several networks lies below the name of this one: `target_params/critic`.
    """
    held: dict[Names, set[str]] = defaultdict(set)
    for entry in entries:
        if entry.section == "model" and entry.prefix:
            held[entry.prefix].add(entry.segments[0])
    copies = {prefix for prefix in held if is_copy_beside(prefix[-1], "params")}
    beside: dict[Names, set[str]] = defaultdict(set)
    for prefix in held.keys() - copies:
        beside[prefix[:-1]] |= held[prefix]
    alone = {copy for copy in copies if len(held[copy]) == 1 and held[copy] < beside[copy[:-1]]}
    found: dict[Names, Collection[str]] = {copy: held[copy] for copy in copies - alone}
    return found | {(*copy, *held[copy]): () for copy in alone}


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
