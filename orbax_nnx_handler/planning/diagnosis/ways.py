"""The ways out that a hint proposes: policies, patterns of rules, the search; none that leads away.

While stored leaves lie unused that could be the missing ones, no hint fills these. A rule is tried
before it is proposed, and a policy selects what it is meant for and nothing else.
"""

import dataclasses
import functools
import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, cast

from flax import nnx

from orbax_nnx_handler.planning.core.errors import Cause, Hint, as_python, fill_hint
from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.lines import listed
from orbax_nnx_handler.planning.core.paths import Path, Tokens, canonical, is_number, segments, without_box
from orbax_nnx_handler.planning.core.recipes import Recipe, reads
from orbax_nnx_handler.planning.diagnosis.evidence import Evidence, spell
from orbax_nnx_handler.planning.layouts.layout import words_of
from orbax_nnx_handler.planning.likeness.shapes import ways
from orbax_nnx_handler.planning.mapping.layer_paths import layer_paths
from orbax_nnx_handler.planning.options import Policy
from orbax_nnx_handler.planning.rules import Drop, Rename, UnstackLayers, as_rules
from orbax_nnx_handler.planning.rules.rule import Pattern, Rule

LOOK = Hint(
    "look at what is stored with `orbax-nnx tree CHECKPOINT`, and check the path and the target.",
    command="tree",
)
SUGGEST = Hint(
    "`orbax-nnx suggest CHECKPOINT MODULE:FACTORY` proposes rules to check and paste.", command="suggest"
)
SUGGEST_MORE = Hint(
    "`orbax-nnx suggest CHECKPOINT MODULE:FACTORY`, with the rules that were passed, proposes those that "
    "they lack, or asks what is open.",
    command="suggest more",
)
SUGGEST_ANEW = Hint(
    "`orbax-nnx suggest CHECKPOINT MODULE:FACTORY` proposes rules for the whole conversion, to check and to "
    "pass instead of those that were passed.",
    command="suggest",
)
RULE = Hint(
    "stored leaves that nothing wants have shapes that could become these, and no name tells which: write "
    "the rules, or leave behind what nobody needs with Drop(pattern, reason)."
)
ASKED = Hint(
    "stored leaves that nothing wants could be these, and no name tells which: "
    "`orbax-nnx suggest CHECKPOINT MODULE:FACTORY` asks, and takes the answer.",
    command="suggest",
)


def search_hint(evidence: Evidence) -> Hint:
    """Returns the way out where stored leaves that nothing wants could be missing ones."""
    found = evidence.links or evidence.links_anew or evidence.has_networks or evidence.sides.loose
    if evidence.is_searched and not found:
        return ASKED if evidence.is_asked else RULE
    return suggest_hint(evidence)


def suggest_hint(evidence: Evidence) -> Hint:
    """Returns the way out that is to look for rules: for what is left over, or instead of those passed."""
    if not evidence.verdict.renames:
        return SUGGEST
    return SUGGEST_MORE if evidence.links or evidence.sides.loose else SUGGEST_ANEW


def is_search(hint: Hint) -> bool:
    """Tells whether a way out is to look for rules."""
    return hint in (SUGGEST, SUGGEST_MORE, SUGGEST_ANEW, ASKED, RULE)


def completed(hint: Hint, evidence: Evidence) -> Hint:
    """Returns a hint whose rules are all that is to be passed, those that were passed already included."""
    rules, given = hint.arguments.get("renames", ()), evidence.verdict.renames
    if not rules or all(rule in rules for rule in given):
        return hint
    return dataclasses.replace(hint, arguments={**hint.arguments, "renames": [*given, *rules]})


def weights_alone(evidence: Evidence) -> str:
    """Returns the way out that leaves the optimizer aside."""
    model, root = spell(evidence.root), evidence.root
    part = f"the target's {model!r} by itself" if model else "the model by itself"
    optimizers = (path for path, item in evidence.sides.wanted.items() if item.role == "optimizer")
    if model and any(canonical(path)[: len(root)] == root for path in optimizers):
        part = f"what the target has below {model!r}, without its optimizers,"
    return f"to restore the weights alone, pass {part} as target."


_MOST_DROPS = 32
"""Layers that rules leave behind one by one; each of them looks at every stored leaf when it is tried."""
_ABSENT = frozenset(("NoOptimizer", "OtherOptimizer", "OptimizerNested", "MomentsStay"))
"""Causes of an optimizer, whose way out is to leave it aside."""
AXES = 4
"""Axes along which layers may be stacked."""
_NO_MORE = frozenset(("OtherOutput", "RandomLayout", "LayerCount"))
"""Causes whose rules restore no more weights than without them."""
_SIZES = frozenset(("OtherOutput", "DimensionDiffers"))


def is_arranged(evidence: Evidence, path: Path) -> bool:
    """Tells whether a leaf of another shape could be arranged as it is wanted; moments follow."""
    item = evidence.verdict.mismatched.get(path)
    return item is not None and item.kind == "shape" and bool(ways(item.stored_shape, item.wanted.shape))


def checked(cause: Cause, evidence: Evidence) -> Cause | None:
    """Returns a cause with ways out that lead nowhere else.

    Returns:
        None where the cause is that something was never stored, and names and shapes say that it is.
    """
    lost = evidence.perhaps_stored.intersection(cause.paths)
    if cause.may_be_initialised and lost:
        if cause.kind in _ABSENT or (cause.kind != "DroppedByRule" and not lost.isdisjoint(evidence.links)):
            return None
        cause = dataclasses.replace(cause, filters=(), may_be_initialised=False)
    if cause.kind in _SIZES and all(is_arranged(evidence, path) for path in cause.paths):
        return None
    if "renames" not in cause.way.arguments:
        return cause
    return dataclasses.replace(cause, way=tried(cause, evidence))


def tried(cause: Cause, evidence: Evidence) -> Hint:
    """Returns rules to pass with those that were passed already, in an order in which they help."""
    way, given = cause.way, list(evidence.verdict.renames)
    rules = list(way.arguments["renames"])
    orders = {"behind": [*given, *rules], "in front of": [*rules, *given]} if given else {"": rules}
    for where, every in orders.items():
        # What a very big model becomes under them is not looked at.
        if not evidence.is_searched or _helps(cause, evidence, every):
            words = f"{way.words} Put {'them' if len(rules) > 1 else 'it'} {where} the rules passed so far."
            arguments = {**way.arguments, "renames": every}
            return dataclasses.replace(way, words=words if where else way.words, arguments=arguments)
    return suggest_hint(evidence)


def in_any_order(cause: Cause, evidence: Evidence, names: Sequence[str], shapes: Sequence[Shape]) -> Cause:
    """Returns a cause whose rules join parts, or take them apart, with their order left to fill in.

    Whatever the order, they would fit: none is there to be pasted.
    """
    blanks = f"({', '.join('?' * len(names))})"
    rules = as_python(cause.way.arguments["renames"]).replace(repr((*names,)), blanks)
    parts = listed(f"{name!r} {shape}" for name, shape in zip(names, shapes, strict=True))
    words = (
        f"pass renames={re.sub(r'(?<=sizes=)[(].*?[)]', blanks, rules)} with {parts} in the order in which "
    )
    way = Hint(f"{words}they were joined, which no metadata tells.", cause.way.arguments)
    way = tried(dataclasses.replace(cause, way=way), evidence)
    return dataclasses.replace(cause, way=dataclasses.replace(way, arguments={}))


def _helps(cause: Cause, evidence: Evidence, rules: Sequence[Rule]) -> bool:
    """Tells whether more is restored under some rules, and nothing beside the cause is arranged anew.

    Of what the search of the whole model finds, nothing may come from elsewhere: of `fc1`, `fc2`, `fc3` for
    `fc0`, `fc1`, `fc2`, `fc3` alone is left, and as `fc0` it would leave all of them one layer off.
    """
    before, found = evidence.restored, evidence.restored_under(rules)
    if found is None or not before.keys() <= found.keys():
        return False
    others = (path for path in before if path not in cause.paths)
    if any(_is_rearranged(before[path].recipe, found[path]) for path in others):
        return False  # A pattern that matches more than is meant.
    had = {path: reads(item.recipe) for path, item in (*before.items(), *evidence.verdict.mismatched.items())}
    if not evidence.is_found({path: made for path, made in found.items() if reads(made) != had.get(path)}):
        return False
    return len(found) > len(before) or cause.kind in _NO_MORE


def _is_rearranged(before: Recipe, after: Recipe) -> bool:
    return before != after and reads(before) == reads(after)


_MOST = 4
"""Filters that one policy may need before `policy="init"` is easier to read."""
_PAIRS = 200


def fill_all(evidence: Evidence, paths: Collection[Path]) -> Hint | None:
    """Returns the way out that initialises some missing leaves, and keeps what was chosen for others.

    Returns:
        None where a few filters do not do.
    """
    settled: dict[Policy, set[Path]] = {"init": set(), "warn": set(), "error": set()}
    for path, item in evidence.verdict.missing.items():
        settled[item.policy].add(path)
    filters, zeros = selecting(evidence, settled["init"].union(paths)), selecting(evidence, settled["warn"])
    if not filters or bool(zeros) != bool(settled["warn"]):
        return None
    more: dict[Any, Policy] = dict.fromkeys(zeros, "warn")
    return fill_hint(filters, len(paths), more, alone=not (settled["init"] or settled["warn"]))


def selecting(evidence: Evidence, paths: Iterable[Path]) -> tuple[Any, ...]:
    """Returns filters that select the missing leaves among some paths and nothing else.

    Where a few filters cannot, they may select leaves that are restored as well.

    Returns:
        The filters, Variable types before names; empty where a few do not do.
    """
    wanted = {path for path in paths if path in evidence.verdict.missing}
    offers = [(each, found) for each, found in _offers(evidence, wanted) if not found.isdisjoint(wanted)]
    exact = _few([offer for offer in offers if offer[1] <= wanted], wanted)
    if exact:
        return exact
    others = evidence.verdict.missing.keys() - wanted
    return _few([offer for offer in offers if offer[1].isdisjoint(others)], wanted)


def _few(offers: Sequence[tuple[Any, set[Path]]], wanted: set[Path]) -> tuple[Any, ...]:
    left, chosen = set(wanted), list[Any]()
    while left and offers and len(chosen) < _MOST:
        # At a tie the first one: types come before names, and names deep in the path before those above.
        best, found = max(offers, key=lambda offer: len(offer[1] & left))
        if not found & left:
            break
        chosen.append(best)
        left -= found
    return () if left else tuple(chosen)


def _offers(evidence: Evidence, wanted: Collection[Path]) -> Iterable[tuple[Any, set[Path]]]:
    kinds: dict[type, set[Path]] = defaultdict(set)
    names: dict[Any, set[Path]] = defaultdict(set)
    narrow = functools.cache(_kinds)
    for path, item in evidence.sides.wanted.items():
        if item.role not in ("random", "transient"):
            for kind in narrow(item.leaf.kind):
                kinds[kind].add(path)
            for key in path:
                names[key].add(path)
    # A module's name says more than `kernel` does.
    lost = [path for path in evidence.verdict.missing if path in wanted]
    keys = [key for path in lost for key in reversed(path[:-1])] + [path[-1] for path in lost]
    # What every weight has in its path (`model`) would fill whatever else is missing later.
    paths = list(evidence.weights)
    everywhere = {key for key in paths[0] if all(key in path for path in paths)} if paths else set[object]()
    used = dict.fromkeys(key for key in keys if isinstance(key, str) and key not in everywhere)
    yield from kinds.items()
    yield from ((nnx.PathContains(key), names[key]) for key in used)
    # `layers` and 4 rather than `model` and 4.
    beside = [pair for path in lost for pair in reversed([*itertools.pairwise(path)])]
    apart = (pair for path in lost for pair in itertools.combinations(path, 2))
    pairs = dict.fromkeys(itertools.chain(beside, apart))
    for one, other in itertools.islice(pairs, _PAIRS):
        if isinstance(one, str) and isinstance(other, str | int):
            yield (
                nnx.All(nnx.PathContains(one), nnx.PathContains(cast(Any, other))),
                names[one] & names[other],
            )


def _kinds(kind: type | None) -> list[type]:
    """Returns the narrow types that Flax itself names; `nnx.Param` would say nothing."""
    if kind is None:
        return []
    types = (nnx.LoRAParam, nnx.BatchStat, nnx.OptState)
    found: list[type] = [each for each in types if issubclass(kind, each)]
    is_own = getattr(nnx, kind.__name__, None) is kind and kind not in (*types, nnx.Param, nnx.Variable)
    narrow: list[type] = [kind] if is_own and not issubclass(kind, nnx.OptState) else []
    return [*found, *narrow]


_NUMBER = re.compile(r"\d+$")
_GLUED = re.compile(r"(.*[^\d#_])(\d{1,18})")


def shortest_patterns(evidence: Evidence, paths: Iterable[Path]) -> list[str]:
    """Returns few patterns that match these stored weights, each by one of them, and no other.

    A pattern is the end of a path, as short as it can be and still match nothing
    else: `up/kernel`, `encoder/up/kernel`, `layers_{i}/up/kernel`, `params/up/kernel`.

    Returns:
        The patterns; none where even a whole path is in that of another leaf.
    """
    meant = {path: _names(evidence, path) for path in paths}
    every = {path: _names(evidence, path) for path in evidence.stored_weights} | meant
    others = [names for path, names in every.items() if path not in meant]

    @functools.cache
    def matches_no_other(text: str) -> bool:
        pattern = Pattern(text)
        return not any(any(pattern.spans(names)) for names in others)

    patterns: list[str] = []
    matched: list[tuple[str, ...]] = []
    left = list(meant.values())

    def is_new(text: str) -> bool:
        pattern = Pattern(text)
        return matches_no_other(text) and not any(any(pattern.spans(names)) for names in matched)

    while left:
        text = _shortest(left[0], others, is_new)
        if text is None:
            return []
        patterns.append(text)
        pattern = Pattern(text)
        hits = [any(pattern.spans(names)) for names in left]
        matched += [names for names, hit in zip(left, hits, strict=True) if hit]
        left = [names for names, hit in zip(left, hits, strict=True) if not hit]
    return patterns


def _names(evidence: Evidence, path: Path) -> tuple[str, ...]:
    """Returns a stored path as a rule meets it, owner and collection included."""
    return without_box(segments(path)) if evidence.sides.placements[path].collection else segments(path)


def _shortest(
    names: Sequence[str], others: Sequence[Sequence[str]], matches_no_other: Callable[[str], bool]
) -> str | None:
    lengths = range(min(2, len(names)), len(names) + 1)
    for length, any_number in itertools.product(lengths, (True, False)):
        end = names[-length:]
        form = _general if any_number else tuple
        if form(end) not in (form(other[-length:]) for other in others):
            text = "/".join(_general(end) if any_number else end)
            if matches_no_other(text):
                return text
    return None


def _general(names: Sequence[str]) -> tuple[str, ...]:
    """Returns the names with a place for each number, every place with a letter of its own."""
    letters = iter("ijklmnopqrstuvwxyz")
    return tuple(_NUMBER.sub(lambda _: f"{{{next(letters)}}}", name) for name in names)


def numbers_apart(tokens: Tokens) -> Tokens:
    """Returns canonical tokens with the number at a name's end by itself: `fc1` is `fc`, `#1`."""
    found = (_GLUED.fullmatch(token) for token in tokens)
    pairs = zip(tokens, found, strict=True)
    return tuple(part for token, two in pairs for part in ((two[1], f"#{int(two[2])}") if two else (token,)))


def layer_pattern(evidence: Evidence, path: Path, group: Tokens) -> str:
    """Returns how the checkpoint writes a layer of this group and of no other, `layers_{}` if that does."""
    names, group = segments(path), numbers_apart(group)
    tokens = [numbers_apart(canonical(names[: at + 1])) for at in range(len(names))]
    depth = next(
        at for at, each in enumerate(tokens) if is_number(each[-1]) and each[:-1][-len(group) :] == group
    )
    whole = [*names[:depth], _NUMBER.sub("{}", names[depth])]
    others = [segments(other) for other in evidence.stored_weights]
    others = [other for other in others if _numberless(other[: depth + 1]) != tuple(whole)]
    shortest = len(numbers_apart(canonical(names[depth : depth + 1]))) % 2 + 1
    return next(
        "/".join(whole[-length:])
        for length in range(shortest, depth + 2)
        if length > depth or not any(_holds(other, whole[-length:]) for other in others)
    )


def _numberless(names: Sequence[str]) -> tuple[str, ...]:
    return (*names[:-1], _NUMBER.sub("{}", names[-1]))


def _holds(names: Sequence[str], end: Sequence[str]) -> bool:
    """Tells whether names lead through a layer that is written like that."""
    return any(
        _numberless(names[at : at + len(end)]) == tuple(end) for at in range(len(names) - len(end) + 1)
    )


def leaving_out(evidence: Evidence, cause: Cause) -> Cause:
    """Returns the cause with rules under which surplus layers are left behind, where it is about such."""
    if cause.kind != "LayerCount" or not 0 < cause.facts["stored"] - cause.facts["wanted"] <= _MOST_DROPS:
        return cause
    stored, wanted = cause.facts["stored"], cause.facts["wanted"]
    seats = [
        (path, seat)
        for path, item in evidence.stored_weights.items()
        for seat in layer_paths(evidence.stored_below(item))
        if spell((*seat.group.parent, seat.group.name)) == cause.facts["group"]
    ]
    flat, stacks = ([(p, seat) for p, seat in seats if seat.form == form] for form in ("flat", "stacked"))
    unstack: list[list[Rule]] = [[]]
    if flat:
        path, seat = flat[0]
        pattern = layer_pattern(evidence, path, (*seat.group.parent, seat.group.name))
    elif stacks:
        path, seat = stacks[0]
        whole = "/".join(segments(path)[: -len(segments(seat.rest))])
        shapes = [evidence.shape(each) for each, _ in stacks]
        axes = [axis for axis in range(AXES) if all(shape[axis : axis + 1] == (stored,) for shape in shapes)]
        pattern = f"{whole}_{{}}"
        unstack = [[UnstackLayers(whole, f"{whole}_{{i}}", axis=axis)] for axis in axes]
    else:
        return cause
    reason = f"the target has {wanted}"
    drops = [Drop(pattern.replace("{}", str(at)), reason) for at in range(wanted, stored)]
    told = f'*[Drop(f"{pattern.replace("{}", "{i}")}", "{reason}") for i in range({wanted}, {stored})]'
    told = as_python(drops[0]) if len(drops) == 1 else told
    fitting = [rules for rules in unstack if _leaves_out(evidence, [*rules, *drops])]
    if len(fitting) != 1:
        return cause
    rules = fitting[0]
    shown = ", ".join([*map(as_python, rules), told])
    words = f"{cause.way.words.removesuffix('.')}; or, if the first {wanted} are all that you want, pass "
    return dataclasses.replace(cause, way=Hint(f"{words}renames=[{shown}].", {"renames": [*rules, *drops]}))


def _leaves_out(evidence: Evidence, rules: Sequence[Rule]) -> bool:
    """Tells whether rules restore what is restored without them, and more where something does not fit."""
    if not evidence.is_searched:
        return False
    before, found = evidence.restored, evidence.restored_under([*evidence.verdict.renames, *rules])
    if found is None or not before.keys() <= found.keys():
        return False
    return len(found) > len(before) or not (evidence.mismatched or evidence.missing)


def rules_for_fields(
    evidence: Evidence, lost: Sequence[Path], fields: Iterable[Path]
) -> list[tuple[str, str]]:
    """Returns rules that give fields which no layout knows to the networks they are called after.

    Those that lead to the lost leaves of optimizers and steps, behind the rules that were passed.
    """
    owners = {evidence.sides.wanted[path].owner for path in lost}
    names: dict[Path, set[str]] = {owner: set().union(*map(words_of, map(str, owner))) for owner in owners}
    rules: list[tuple[str, str]] = []
    given = {rule.pattern for rule in evidence.verdict.renames if isinstance(rule, Rename)}
    for field in fields:
        words = words_of(str(field[-1]))
        hits = [owner for owner in owners if words & names[owner]]
        if len(hits) == 1 and spell(canonical(field)) not in given:
            above = hits[0][:-1] or hits[0]
            rules.append(
                (
                    spell(canonical(field)),
                    "/".join(map(str, (*above, "step" if "step" in words else "opt_state"))),
                )
            )
    found = evidence.restored_under([*evidence.verdict.renames, *as_rules(rules)]) if rules else None
    return rules if found is not None and found.keys() >= {*evidence.restored, *lost} else []
