"""Proposes rules where the names or the arrangement of checkpoint and target differ.

For a model, and where that leaves something open, for one with its copies, for several networks, or for one
of the modules that hold the same.
"""

import contextlib
import dataclasses
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial

from orbax_nnx_handler.planning.core.errors import RestoreError
from orbax_nnx_handler.planning.core.paths import Path, levels, segments, shared_levels
from orbax_nnx_handler.planning.core.recipes import reads
from orbax_nnx_handler.planning.layouts.layout import STATISTICS, Stored, is_copy_beside, words_of
from orbax_nnx_handler.planning.likeness.linked_modules import says_nothing, unlike_networks
from orbax_nnx_handler.planning.likeness.vocabulary import Names, concepts, telling, words
from orbax_nnx_handler.planning.mapping.networks import layers_in_turns
from orbax_nnx_handler.planning.options import RestoreOptions
from orbax_nnx_handler.planning.rules import Drop, Rename, Rule
from orbax_nnx_handler.planning.rules.entries import Entry
from orbax_nnx_handler.planning.rules.split_and_fuse import by_network, copies_as_roots, keys_as_names
from orbax_nnx_handler.planning.rules.stacking import nested_stacks
from orbax_nnx_handler.planning.suggesting.proposing import QUESTIONS, Proposing
from orbax_nnx_handler.planning.suggesting.proved_recipes import Remade
from orbax_nnx_handler.planning.suggesting.questions import Question
from orbax_nnx_handler.planning.suggesting.suggestion import (
    BY_NUMBER,
    RUN_BOTH,
    Answers,
    Confidence,
    Proposal,
    Suggestion,
    Tried,
    asking_too,
    behind,
    changed,
    changes_nothing,
)
from orbax_nnx_handler.planning.target import Target
from orbax_nnx_handler.planning.target.roles import Order, creation_order, of_role, order_of
from orbax_nnx_handler.planning.verdict.replaced_weights import open_statistics

__all__ = [
    "BY_NUMBER",
    "RUN_BOTH",
    "Answers",
    "Confidence",
    "Order",
    "Proposal",
    "Question",
    "Remade",
    "Suggestion",
    "creation_order",
    "order_of",
    "propose",
]


def propose(
    target: Target, stored: Stored, options: RestoreOptions, order: Order | None = None
) -> Suggestion:
    """Proposes rules for the weights that have no stored leaf of their name and shape.

    Args:
        target: What the caller wants.
        stored: What the checkpoint holds.
        options: As for a plan; its rules are applied first and not proposed again.
        order: The order in which the target's modules are created, where it is known.

    Raises:
        RestoreError: No layout fits, the rules do not, or the trees are nested too deep.
    """
    proposing = _OfNetworks(target, stored, options, order or {})
    found = proposing.asking_of_statistics(proposing.by_network())
    return dataclasses.replace(found, is_given=bool(options.renames))


class _OfNetworks(Proposing):
    """What is proposed for a model alone, for one with its copies, and for several networks."""

    @cached_property
    def _called(self) -> Mapping[Path, Names]:
        """What the settled rules call the stored leaves."""
        return {path: x.whole for x in self._chosen.mapping.applied.entries for path in x.sources}

    def by_network(self) -> Suggestion:
        """Returns the proposal; networks below keys are told by what they are called, or asked about.

        What they hold does not tell: a `student` is as large as its `teacher`. One of its own name, or of
        the same words, is no other one.
        """
        found = self.best()
        named = self._named if self._networks else {}
        pairs = self._made(found) if self._networks else []
        unlike = {*unlike_networks(pairs)} | {pair for pair in pairs if _is_other(*pair, named)}
        if not unlike and (not named or found.confidence != "open"):
            return found
        kept = named | dict(pair for pair in pairs if pair not in unlike)
        keys = [key for key in self._networks if key not in kept]
        roots = [root for root in self._roots if root not in kept.values()]
        others = [self._suggested(Tried(verdict=self._base), ())]
        rest = self._without(keys, roots)
        makers = [rest.by_network] * bool(keys or roots)
        for made in (*makers, partial(rest._all_behind, _renames(kept.items()))):
            with contextlib.suppress(RestoreError):
                others.append(self._of_all(made()))
        others = [x for x in others if not unlike_networks(self._made(x))]
        others = [x for x in others if not any(_is_other(*pair, named) for pair in self._made(x))]
        told = min(others, key=_open_ends)
        readings = {reading: self._all_behind(_renames(reading)) for reading in self._readings(keys, roots)}
        whole = {
            x: one for x, one in readings.items() if len(one.unmatched_wanted) < len(told.unmatched_wanted)
        }
        made = _asked_whole(whole, told, [x.leaf.path for x in self._model]) if whole else told
        return made if unlike else min(made, found, key=_open_ends)

    def asking_of_statistics(self, found: Suggestion) -> Suggestion:
        """Returns a proposal that asks whether statistics which are stored once are a copy's as well."""
        left = {*found.unmatched_wanted}
        if STATISTICS.isdisjoint(item.collection for item in self._model if item.leaf.path in left):
            return found
        verdict = self._judged((), dict.fromkeys(found.renames, ()), 0, ()).verdict or self._base
        for owner, paths, rules in open_statistics(verdict, found.unmatched_wanted):
            for rule, field in ((rule, tuple(rule.pattern.split("/"))) for rule in rules):
                found = asking_too(found, rule, (field, owner), self._below([field]), paths)
        return found

    @cached_property
    def _networks(self) -> list[Names]:
        """The keys below which networks with params of their own lie."""
        entries = self._chosen.mapping.applied.entries
        prefixes = dict.fromkeys(entry.prefix for entry in entries if entry.section == "model")
        keys = dict.fromkeys(x if x and is_copy_beside(x[-1], "params") else x[:-1] for x in prefixes)
        return [*keys] if () not in keys else []

    @cached_property
    def _roots(self) -> list[Names]:
        """The outermost modules of the target, but for levels that say nothing and lead to all of it."""
        paths = [segments(item.leaf.path) for item in self._model]
        shared = shared_levels(paths, own=2)
        depth = sum(1 for _ in itertools.takewhile(says_nothing, shared)) + 1
        return [*dict.fromkeys(path[:depth] for path in paths)]

    @cached_property
    def _named(self) -> dict[Names, Names]:
        """The stored networks that are called by the words of one wanted network, in any order."""
        called = [
            {x: {*itertools.chain(*map(words_of, x))} for x in side} for side in (self._networks, self._roots)
        ]
        pairs = [(x, y) for x, y in itertools.product(*called) if called[0][x] == called[1][y] != set()]
        counts = Counter(x for x, _ in pairs), Counter(y for _, y in pairs)
        return {x: y for x, y in pairs if counts[0][x] == counts[1][y] == 1}

    def _made(self, found: Suggestion) -> list[tuple[Names, Names]]:
        """Returns the stored networks with the wanted ones that rules make of them."""
        tried = self._judged((), dict.fromkeys(found.renames, ()), 0, ())
        made = defaultdict[Names, list[Names]](list)
        verdict = tried.verdict or self._base
        for path, item in verdict.restored.items():
            if path not in self._found:
                names = next((self._called[at] for at in reads(item.recipe) if at in self._called), ())
                keys = [key for key in self._networks if names[: len(key)] == key]
                made[max(keys, key=len, default=())].append(segments(path))
        return [(key, tuple(shared_levels(paths, own=2))) for key, paths in made.items() if key]

    def _readings(
        self, keys: Sequence[Names], roots: Sequence[Names]
    ) -> list[tuple[tuple[Names, Names], ...]]:
        """Returns which stored networks may be which wanted ones by how much each holds."""
        if not 0 < len(roots) <= 3 or not 0 < len(keys) <= 4:
            return []
        held = [Counter[Names](), Counter[Names]()]
        stored = [x for x in self._chosen.mapping.applied.entries if x.section == "model"]
        for key, entry in itertools.product(keys, stored):
            held[0][key] += entry.prefix[: len(key)] == key and math.prod(entry.shape)
        for root, item in itertools.product(roots, self._model):
            held[1][root] += segments(item.leaf.path)[: len(root)] == root and math.prod(item.leaf.shape)
        orders = itertools.permutations((*keys, *[()] * len(roots)), len(roots))
        found = dict.fromkeys(
            tuple((k, r) for k, r in zip(order, roots, strict=True) if k) for order in orders
        )
        fits = [x for x in found if x and all(held[0][key] == held[1][root] for key, root in x)]
        return [x for x in fits if len(x) == max(map(len, fits))]

    def _without(self, keys: Collection[Names], roots: Collection[Names]) -> "_OfNetworks":
        """Returns what is left of the target and of what is stored without some networks."""
        below = self._below(keys)
        leaves = self.target.leaves.items()
        kept = {p: x for p, x in leaves if not any(segments(p)[: len(root)] == root for root in roots)}
        stored = {path: leaf for path, leaf in self.stored.items() if path not in below}
        return dataclasses.replace(self, target=dataclasses.replace(self.target, leaves=kept), stored=stored)

    def best(self) -> Suggestion:
        """Returns the proposal, or that for a model of which several networks are parts by their keys."""
        found = self.suggestion()
        entries = self._chosen.mapping.applied.entries if found.unmatched_wanted else ()
        copies, roots = copies_as_roots(entries, [segments(item.leaf.path) for item in self._model])
        for made in (partial(self._with_copies, copies), self._behind) if roots else ():
            with contextlib.suppress(RestoreError):
                found = min(found, made(*roots), key=_open_ends)
        keys, turns = keys_as_names(entries, roots), layers_in_turns(entries)
        wanted = ((segments(x.leaf.path), x.leaf.shape) for x in self._model)
        for rules, fact in ((turns, "Gemma 2"), *(((rule,), "") for rule in nested_stacks(entries, wanted))):
            with contextlib.suppress(RestoreError):
                found = min(found, self._behind(*rules, fact=fact) if rules else found, key=_open_ends)
        if not keys:
            return _which_network(self._alike(entries if len(found.questions) > 1 else ()), found) or found
        alone: dict[str, Suggestion] = {}
        for key in [key for key in keys if key not in roots][:QUESTIONS]:
            with contextlib.suppress(RestoreError):
                alone[key.replacement] = self._among([key], Rename(key.replacement, ""))
        if (one := _one_of(alone, found)) is not None and one.confidence != "open":
            return one
        names = " ".join({segments(item.leaf.path)[0] for item in self._model})
        # A copy is used only where the target names it.
        plain = [key for key in keys if not is_copy_beside(key.replacement, names)]
        with contextlib.suppress(RestoreError):
            other = self._behind(*keys) if len(plain) == len(keys) else self._among(plain, *plain)
            others = [each for each in (*self._by_network(keys, other), other) if not each.problem]
            others = [each for each in others if not _mixes(each, keys, self._called)]
            asked = dataclasses.replace(found, questions=other.questions, settle=other.settle)
            found = min([*others, found if found.proposals else asked], key=_open_ends)
        return found if one is None or found.confidence != "open" else one

    def _alike(self, entries: Iterable[Entry]) -> Mapping[str, Suggestion]:
        """Returns what is proposed for each of the modules that hold the same, without the others."""
        found: dict[str, Suggestion] = {}
        for name, others in _alike_modules(entries).items():
            options = dataclasses.replace(self.options, renames=(*self.options.renames, *others))
            with contextlib.suppress(RestoreError):
                found[name] = self._of_all(dataclasses.replace(self, options=options).suggestion())
        return found

    def _among(self, networks: Sequence[Rename], *rules: Rename) -> Suggestion:
        """Returns what is proposed where some networks are all that is stored, tried beside the others."""
        its = self._below([tuple(key.replacement.split("/")) for key in networks])
        found = dataclasses.replace(self, stored={path: self.stored[path] for path in its})._behind(*rules)
        return self._of_all(found)

    def _below(self, prefixes: Collection[Names]) -> Mapping[Path, None]:
        named = self._called.items()
        return {path: None for path, names in named if any(names[: len(x)] == x for x in prefixes)}

    def _with_copies(self, copies: Collection[Names], *roots: Rename) -> Suggestion:
        """Returns what is proposed for the model alone, and so for copies of it under the same rules."""
        named = {rule.replacement for rule in roots}
        others = {p: x for p, x in self.target.leaves.items() if segments(p)[0] not in named}
        below = self._below(copies)
        stored = {path: self.stored[path] for path in self._called if path not in below}
        target = dataclasses.replace(self.target, leaves=others)
        alone = dataclasses.replace(self, target=target, stored=stored, is_beside=True)
        return self._of_all(behind(roots, alone.best()))

    def _of_all(self, found: Suggestion) -> Suggestion:
        """Returns what was proposed for a part of the target or of what is stored, tried with all of it."""
        tried = self._suggested(self._judged((), dict.fromkeys(found.renames, ()), 0, ()), found.questions)
        return dataclasses.replace(tried, proposals=found.proposals, settle=found.settle)

    def _behind(self, *rules: Rule, fact: str = "") -> Suggestion:
        """Returns what is proposed behind some rules, together with them."""
        options = dataclasses.replace(self.options, renames=(*self.options.renames, *rules))
        return behind(rules, dataclasses.replace(self, options=options).suggestion(), fact)

    def _all_behind(self, rules: Sequence[Rename]) -> Suggestion:
        """Returns what is proposed for all networks behind rules that rename them, together with these.

        As for a checkpoint in which they are called so: what the old names say is no evidence.
        """
        if self.options.renames:
            options = dataclasses.replace(self.options, renames=(*self.options.renames, *rules))
            return behind(rules, dataclasses.replace(self, options=options).best())
        stored = dict(self.stored)
        for key, to in ((tuple(x.pattern.split("/")), x.replacement.split("/")) for x in rules):
            for path in [path for path in self.stored if segments(path)[: len(key)] == key]:
                called = (*to, *path[len(key) :])
                stored[called] = dataclasses.replace(stored.pop(path), path=called)
        return self._of_all(behind(rules, dataclasses.replace(self, stored=stored).best()))

    def _by_network(self, keys: Sequence[Rename], found: Suggestion) -> Iterator[Suggestion]:
        """Yields rules that leave each network its own params, so that its optimizer follows."""

        def nth(rules: Sequence[Rule], at: int) -> tuple[Rule, ...]:
            joined = next(itertools.islice(by_network(keys, rules), at, None), rules)
            return tuple(rule for rule in joined if rule in rules or not changes_nothing(rule))

        is_trained = bool(of_role(self._wanted, "optimizer"))
        for at, _ in enumerate(by_network(keys, found.renames) if is_trained else ()):
            rules = nth(found.renames, at)
            asked = changed(found, partial(nth, at=at))
            tried = self._suggested(self._judged((), dict.fromkeys(rules, ()), 0, ()), asked.questions)
            proposals = tuple(Proposal(rule=rule, grounds="names") for rule in rules)
            yield dataclasses.replace(tried, proposals=proposals, settle=asked.settle)


def _is_other(key: Names, root: Names, named: Mapping[Names, Names]) -> bool:
    """Tells whether a stored network is made into another one than its own, or into that of another one."""
    own = named.get(key, root)
    is_own = not root or root[: len(own)] == own
    return not is_own or any(root[: len(y)] == y != own for y in named.values())


def _renames(pairs: Iterable[tuple[Names, Names]]) -> list[Rename]:
    return [Rename("/".join(key), "/".join(to)) for key, to in pairs if key != to]


def _asked_whole(
    readings: Mapping[tuple[tuple[Names, Names], ...], Suggestion], told: Suggestion, model: Iterable[Path]
) -> Suggestion:
    """Returns a proposal that asks which of some networks is which.

    Args:
        readings: What is proposed if they are each other's.
        told: What is proposed for all others.
        model: The wanted weights.
    """
    each = tuple(readings.values())
    keys, roots = (dict.fromkeys(pair[side] for pairs in readings for pair in pairs) for side in (0, 1))
    left = {*told.unmatched_wanted}
    asked = {path for one in each for path in left.difference(one.unmatched_wanted)}
    question = Question(
        wanted=tuple(path for path in model if path in asked),
        stored=tuple(p for p in told.unmatched_stored if any(segments(p)[: len(key)] == key for key in keys)),
        parts=(tuple(keys), tuple(roots)),
        about="which",
        choices=tuple(", ".join(f"{'/'.join(x)} -> {'/'.join(y)}" for x, y in pairs) for pairs in readings),
        settle=lambda answer: each[answer].renames,
    )

    def settled(answers: Answers, changes: Sequence[Remade]) -> tuple[Rule, ...]:
        first, *rest = answers
        if first is None:
            return told.answered(rest, changes)
        return each[first].answered([None] * len(each[first].questions), changes)

    return dataclasses.replace(told, questions=(question, *told.questions), settle=settled)


def _open_ends(found: Suggestion) -> tuple[bool, int]:
    """Returns how far a proposal is from a whole one: whether a plan speaks against it, what is open."""
    return bool(found.problem), len(found.unmatched_wanted)


def _one_of(networks: Mapping[str, Suggestion], found: Suggestion) -> Suggestion | None:
    """Returns the proposal for the only stored network that the target may be, or the question which it is.

    Args:
        networks: The proposals by the keys of their network.
        found: What is proposed without any.

    Returns:
        None where each of them leaves something open.
    """
    whole = {key: one for key, one in networks.items() if one.confidence != "open"}
    if len(whole) < 2:
        asked = [one for one in networks.values() if not whole and _asks_all(one)]
        return next(iter(whole.values()), asked[0] if len(asked) == 1 else None)
    return _which_of(whole, dataclasses.replace(found, proposals=()))


def _which_network(networks: Mapping[str, Suggestion], found: Suggestion) -> Suggestion | None:
    """Returns the question which of some networks the target is, by what is proposed for each alone.

    Returns:
        None where no two of them settle all that is asked else.
    """
    asked = {path for question in found.questions for path in question.wanted}
    told = {key: one for key, one in networks.items() if not (one.questions or one.problem)}
    whole = {key: one for key, one in told.items() if asked.isdisjoint(one.unmatched_wanted)}
    return _which_of(whole, found) if len(whole) > 1 else None


def _which_of(networks: Mapping[str, Suggestion], found: Suggestion) -> Suggestion:
    each = tuple(networks.values())
    open_in_all = set[Path].intersection(*({*one.unmatched_wanted} for one in each))
    question = Question(
        wanted=tuple(path for path in found.unmatched_wanted if path not in open_in_all),
        stored=found.unmatched_stored,
        parts=(tuple((name,) for name in networks), (("the target",),)),
        about="which",
        choices=tuple(networks),
        settle=lambda answer: each[answer].renames,
    )

    def settled(answers: Answers, changes: Sequence[Remade]) -> tuple[Rule, ...]:
        (answer,) = answers
        return found.renames if answer is None else each[answer].answered((), changes)

    return dataclasses.replace(found, questions=(question,), settle=settled)


def _asks_all(found: Suggestion) -> bool:
    """Tells whether a proposal with its questions answered leaves nothing open."""
    asked = {path for question in found.questions for path in question.wanted}
    return not found.problem and asked.issuperset(found.unmatched_wanted)


def _mixes(found: Suggestion, keys: Sequence[Rename], called: Mapping[Path, Path]) -> bool:
    """Tells whether a proposal takes a part of several networks and leaves the rest: no model is both."""
    unused, parts = {*found.unmatched_stored}, 0
    for key in keys:
        above = tuple(key.pattern.split("/"))
        inside = {path for path, names in called.items() if names[: len(above)] == above}
        # What is asked about within the network is left for the answer.
        asked = {path for each in found.questions if inside.issuperset(each.stored) for path in each.stored}
        its = [path in unused for path in inside - asked]
        parts += any(its) and not all(its)
    return parts > 1


def _alike_modules(entries: Iterable[Entry]) -> Mapping[str, Sequence[Drop]]:
    """Returns modules, or lists of them, that hold the same, each with rules that leave the others behind.

    What says the word that tells one of them goes with it: `decoder_norm` with `decoderblock_0`. Numbers
    tell them where they are all that is stored.
    """
    model = {entry.whole: entry.shape for entry in entries if entry.section == "model"}
    depth = next((at for at, names in enumerate(zip(*model, strict=False)) if len({*names}) > 1), 0)
    tops = {names[depth]: levels(names[depth : depth + 1])[0] for names in model if len(names) > depth + 1}
    bases = {top: level.base for top, level in tops.items()}
    for called in (bases, {top: top for top in tops}) if len(tops) > 1 else ():
        held: dict[str, dict[object, int]] = defaultdict(dict)
        for names, shape in model.items():
            if (top := names[depth]) in tops:
                number = tops[top].number if called is bases else None
                held[called[top]][number, names[depth + 1 :], shape] = math.prod(shape)
        alike: dict[frozenset[object], list[str]] = defaultdict(list)
        for name, below in held.items():
            alike[frozenset(below)].append(name)
        several = [names for names in alike.values() if len(names) > 1]
        largest = max(several, key=lambda names: sum(held[names[0]].values()), default=list[str]())
        if largest and (called is bases or len(largest) == len(tops)):
            return _each_alone(largest, called, "/".join(next(iter(model))[:depth]))
    return {}


def _each_alone(names: Sequence[str], called: Mapping[str, str], above: str) -> Mapping[str, Sequence[Drop]]:
    said = dict(zip(names, telling([concepts([name]) for name in names]), strict=True))
    found: dict[str, list[Drop]] = {name: [] for name in names}
    for top, base in called.items():
        begin = words(top)[:1]
        near = [x for x in names if concepts([top]) & said[x] or x.lower().startswith(begin)]
        owners = [base] if base in names else near
        for name in names if owners else ():
            if name not in owners:
                found[name].append(Drop("/".join(filter(None, (above, top))), "a network beside it"))
    return found
