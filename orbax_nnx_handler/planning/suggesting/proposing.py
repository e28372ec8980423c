"""From what the search found to rules that the planner accepts: each proposal is tried before it is made."""

import dataclasses
import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial

from orbax_nnx_handler.planning.core.errors import RestoreError
from orbax_nnx_handler.planning.core.folding import around
from orbax_nnx_handler.planning.core.paths import Path, segments
from orbax_nnx_handler.planning.core.recipes import Read, Shapes, reads
from orbax_nnx_handler.planning.layouts.layout import Stored, copies_beside
from orbax_nnx_handler.planning.likeness import Owners, in_list
from orbax_nnx_handler.planning.likeness.arrangements import flattened, turned_lists
from orbax_nnx_handler.planning.likeness.linked_modules import of_other_lists
from orbax_nnx_handler.planning.likeness.links import Findings, Link, Tie, turns_told
from orbax_nnx_handler.planning.likeness.module_parts import Leaf, part_of
from orbax_nnx_handler.planning.likeness.shapes import Way
from orbax_nnx_handler.planning.likeness.vocabulary import Names, counts_of
from orbax_nnx_handler.planning.mapping.networks import networks_as_parts
from orbax_nnx_handler.planning.options import RestoreOptions
from orbax_nnx_handler.planning.rules import Rule
from orbax_nnx_handler.planning.rules.applying import unboxed
from orbax_nnx_handler.planning.rules.entries import Entries, Entry, loose_parts
from orbax_nnx_handler.planning.rules.split_and_fuse import keys_as_names
from orbax_nnx_handler.planning.rules.values import steps_in
from orbax_nnx_handler.planning.suggesting.link_groups import (
    kinds_of_links,
    of_few_layers,
    possible_roots,
    without_strays,
)
from orbax_nnx_handler.planning.suggesting.proved_recipes import Remade, remade_behind
from orbax_nnx_handler.planning.suggesting.questions import (
    Choice,
    Question,
    as_questions,
    held_by,
    is_turned,
    of_turns,
)
from orbax_nnx_handler.planning.suggesting.rule_writing import Writer
from orbax_nnx_handler.planning.suggesting.search import (
    Searched,
    Settled,
    agrees,
    paths_of,
    search,
    stored_leaves,
    wanted_leaves,
    without_repeats,
)
from orbax_nnx_handler.planning.suggesting.suggestion import (
    Answers,
    Suggestion,
    Tried,
    changes_nothing,
    problem_of,
    proposals_of,
    resized_in,
    steps_by_leaf,
)
from orbax_nnx_handler.planning.suggesting.whole_modules import as_one, as_they_lie, left_open, torn_by_name
from orbax_nnx_handler.planning.target import Target
from orbax_nnx_handler.planning.target.roles import WEIGHTS, Order, Wanted, of_role, roles_of
from orbax_nnx_handler.planning.verdict import Chosen, choose, judge
from orbax_nnx_handler.planning.verdict.outcomes import Restored, Verdict

QUESTIONS, _TRIES = 24, 6


@dataclasses.dataclass(frozen=True)
class Proposing:
    """What is proposed for a target and what is stored, under rules that are settled.

    Attributes:
        target: What the caller wants.
        stored: What the checkpoint holds.
        options: As for a plan.
        order: The order in which the target's modules are created, where it is known.
        is_beside: Whether it is a model beside copies that follow the same rules.
    """

    target: Target
    stored: Stored
    options: RestoreOptions
    order: Order
    is_beside: bool = False

    @cached_property
    def _wanted(self) -> list[Wanted]:
        return roles_of(self.target.leaves)

    @cached_property
    def _model(self) -> list[Wanted]:
        return of_role(self._wanted, "model")

    @cached_property
    def _base(self) -> Verdict:
        return judge(self.target, self.stored, self.options, chosen=self._chosen)

    @cached_property
    def _found(self) -> dict[Path, Restored]:
        """What is restored without a proposal, and no law, and no order of other lists, speaks against."""
        doubted = {p for fault in self._base.faults for p in fault.paths} | self._doubted(self._base)
        if any(item.leaf.path not in self._base.restored for item in self._model):
            doubted |= self._searched.ordered
        return {path: item for path, item in self._base.restored.items() if path not in doubted}

    def _doubted(self, verdict: Verdict) -> set[Path]:
        """Returns what a plan restores by name, and lists that count otherwise speak against."""
        pairs = dict[tuple[Names, Names], list[Path]]()
        for path, item in verdict.restored.items() if verdict.unexpected else ():
            if isinstance(item.recipe, Read):
                parts = segments(path)[:-1], segments(item.recipe.path)[:-1]
                pairs.setdefault(parts, []).extend([path] * (item.evidence.kind != "rule"))
        sides = ([x.leaf.path for x in self._model], [path for x in self._applied for path in x.sources])
        others = of_other_lists(pairs, *({segments(path)[:-1]: 0 for path in side} for side in sides))
        return {*verdict.counted_otherwise, *(path for pair in others for path in pairs[pair])}

    @cached_property
    def _free(self) -> set[tuple[Path, Names]]:
        """The parts that settled rules cut out of a leaf, and the copies, that nothing is made of."""
        made, copied = [x.recipe for x in self._base.restored.values()], self._chosen.mapping.applied.copied
        same = [entry for entry in self._applied if copied and entry.sources[0] in copied]
        copies = [x for x in same if made.count(x.recipe) < sum(y.recipe == x.recipe for y in same)]
        return {leaf.part for leaf in stored_leaves([*loose_parts(self._applied, made), *copies], False)}

    @cached_property
    def _chosen(self) -> Chosen:
        return choose(self._wanted, self.stored, self.options)

    @cached_property
    def _applied(self) -> Sequence[Entry]:
        return unboxed(networks_as_parts(self._chosen.mapping.applied.entries))

    def suggestion(self) -> Suggestion:
        """Returns the proposal, tried."""
        if all(item.leaf.path in self._found for item in self._model):
            return self._as_it_is()
        searched = self._searched
        links = self._reconciled(searched.links, searched.found.ties)
        tried = self._best(links, searched)
        questions = self._questions(links, searched, tried)

        def answered(answers: Answers, changes: Sequence[Remade]) -> tuple[Rule, ...]:
            chosen = [q.readings[at] for q, at in zip(questions, answers, strict=True) if at is not None]
            return self._rules(tried, searched, [link for reading in chosen for link in reading], changes)

        counts = held_by(*((self._theirs, self._ours) if questions else ((), ())))
        asked = [item.question(partial(self._rules, tried, searched), counts) for item in questions]
        return dataclasses.replace(self._suggested(tried, asked), settle=answered)

    def _as_it_is(self) -> Suggestion:
        """Returns that by names nothing needs a rule; outputs may prove that a leaf is made otherwise."""

        def answered(_: Answers, changes: Sequence[Remade]) -> tuple[Rule, ...]:
            none = Searched(links=(), turns=(), found=Findings())
            return self._rules(self._best(self._reconciled(()), none), none, (), changes) if changes else ()

        return dataclasses.replace(self._suggested(Tried(verdict=self._base), ()), settle=answered)

    def _rules(
        self, tried: Tried, searched: Searched, more: Sequence[Link], changes: Sequence[Remade] = ()
    ) -> tuple[Rule, ...]:
        answered = {(link.target.source, link.source.source) for link in more}
        kept = [one for one in tried.links if (one.target.source, one.source.source) not in answered]
        links, sides = [*kept, *more], (self._ours, self._theirs)
        links = remade_behind(links, changes, sides, self._entries, self._shapes) if changes else links
        rules = Writer(Entries(self._entries), tried.root, tried.below).write(links, searched.found.groups)
        keeps = any(map(changes_nothing, tried.rules or rules))
        if keeps and not tried.rules:  # Nothing was tried yet: what keeps a name may keep it from a rename.
            keeps = self._judged(links, rules, tried.root, tried.below).is_clean
        return tuple(rule for rule in rules if keeps or not changes_nothing(rule))

    @cached_property
    def _searched(self) -> Searched:
        found = self._search(after := self._applied)
        if not self.options.renames:
            return found
        try:
            plain = self._chosen_by(())
            if keys := keys_as_names(plain.mapping.applied.entries):
                plain = self._chosen_by(keys)  # Else one name would stand for a leaf of each network.
        except RestoreError:
            return found  # Only the rules make it a tree of a known layout.
        before = self._search(unboxed(networks_as_parts(plain.mapping.applied.entries)))
        sources = paths_of(before.links)
        made = ((sources.get(path, set()), reads(item.recipe)) for path, item in self._base.restored.items())
        differs = any(not said <= set(read) for said, read in made)
        return Settled(before, after, differs, self._base.restored.keys() - before.ordered).reconciled(found)

    def _chosen_by(self, rules: Sequence[Rule]) -> Chosen:
        return choose(self._wanted, self.stored, dataclasses.replace(self.options, renames=tuple(rules)))

    def _search(self, entries: Sequence[Entry]) -> Searched:
        ours, model = self._ours, [entry for entry in entries if entry.section == "model"]
        arranged = any("dense_i" in leaf.names[-2:-1] for leaf in ours)
        kept = self._entries if entries is self._applied else without_repeats(ours, model)
        theirs = stored_leaves(kept, arranged) if arranged or kept is not self._entries else self._theirs
        sizes = [sum(math.prod(x.shape) for x in some) for some in (ours, theirs, model)]
        try:
            found = _searched(ours, theirs, self.order)
        except RecursionError as error:
            raise RestoreError("target or checkpoint is nested deeper than Python can follow.") from error
        # A target with room for what repeats `params` too has a network of its own for it, no copy.
        has_room = sizes[2] > sizes[1] and 2 * sizes[0] > sizes[1] + sizes[2]
        kept = [link for link in found.links if not (has_room and link.copied)]
        # A copy is another value than what it is a copy of, also where that is not stored.
        copies = copies_beside((x.segments for x in model), itertools.chain(*(leaf.names for leaf in ours)))
        several = [x for x in kept if any(not copies.isdisjoint(y.names) for y in x.stored)]
        odd = {link.target.source: link for link in (*several, *_misplaced(kept, theirs))}
        known = as_questions(dataclasses.replace(found.found, links=kept), odd)
        ruled = {path for path, item in self._base.restored.items() if item.evidence.kind == "rule"}
        ordered, whole = found.ordered - ruled, dataclasses.replace(known, links=found.found.links)
        return dataclasses.replace(found, links=tuple(known.links), found=whole, ordered=ordered)

    def _reconciled(self, links: Sequence[Link], ties: Sequence[Tie] = ()) -> list[Link]:
        """Returns the links without those that speak against what a plan without rules finds by name."""
        settled = {path: {*reads(item.recipe)} for path, item in self._found.items()}
        settled = {path: settled[path] for path in settled.keys() - torn_by_name(settled, links, ties)}
        used, told = set[Path]().union(*settled.values()), turned_lists(links)
        kept = [x for x in links if agrees(x, settled, used, self._free) and not self._is_doubted(x, told)]
        kept = without_strays(kept, self._ours, self._theirs)
        made = {x.recipe: leaf for x, leaf in zip(self._entries, self._theirs, strict=True)}
        left = settled.keys() - paths_of(kept).keys()
        pairs = [(x, made.get(self._found[x.source].recipe)) for x in self._ours if x.source in left]
        asis = (Link(wanted=(x,), stored=(y,), grounds="shapes", ways=((Way(()),),)) for x, y in pairs if y)
        return [*kept, *asis]

    def _is_doubted(self, link: Link, told: Collection[tuple[Names, str]]) -> bool:
        """Tells whether a square matrix may be transposed that a plan without rules restores as it is."""
        x, names = self._found.get(link.target.source), link.target.names
        is_known = x is None or "transpose" in steps_in(x.recipe) or (in_list(names)[0], names[-1]) in told
        is_square = link.joint is None and link.source.shape == link.target.shape
        return is_square and not is_known and is_turned([link])

    def _best(self, links: Sequence[Link], searched: Searched) -> Tried:
        """Returns the rules under which the most leaves are what the search says, and none is another."""
        best, left = Tried(verdict=self._base), list(links)
        for _ in range(_TRIES):
            lost, most = set[Path](), -2
            # A save knows `model` as the root of a model only beside an optimizer or a step.
            is_alone = not (self.is_beside or of_role(self._wanted, "optimizer", "step"))
            for root, below in possible_roots(left, self._chosen.mapping.roots, is_alone=is_alone):
                tried = self._tried(left, searched, root, below)
                if tried.is_clean and tried.right == len(paths_of(left)):
                    return tried if tried.right > best.right else best
                if tried.is_clean and tried.right > best.right:
                    best = tried
                # Under another root more is wrong than needs be.
                lost, most = (set(tried.wrong), tried.right) if tried.right > most else (lost, most)
            rest = [link for link in left if not any(leaf.source in lost for leaf in link.wanted)]
            if len(rest) in (len(left), 0):
                break
            left = rest
        return best

    def _tried(self, links: Sequence[Link], searched: Searched, root: int, below: Names) -> Tried:
        tried = self._written(links, searched, root, below)
        if tried.is_clean or not any(map(changes_nothing, tried.rules)):
            return tried
        changing = {rule: some for rule, some in tried.rules.items() if not changes_nothing(rule)}
        return self._judged(links, changing, root, below)

    def _written(self, links: Sequence[Link], searched: Searched, root: int, below: Names) -> Tried:
        """Returns the rules of a few layers, or of all those that each need one, if they do for all."""
        kinds, whole = kinds_of_links(links), links[:0]
        while True:
            few, entries = of_few_layers(links, kinds, self._entries, whole)
            writer = Writer(Entries(entries), root, below)
            rules = writer.write(few, searched.found.groups)
            is_told = bool(whole) or few is links or not writer.by_layer
            if is_told and ((tried := self._judged(links, rules, root, below)).is_clean or few is links):
                return tried
            whole = links if is_told else writer.by_layer

    def _judged(
        self, links: Sequence[Link], rules: Mapping[Rule, Sequence[Link]], root: int, below: Names
    ) -> Tried:
        options = dataclasses.replace(self.options, renames=(*self.options.renames, *rules))
        try:
            verdict = judge(self.target, self.stored, options) if rules else self._base
        except RestoreError as error:
            return Tried(rules=rules, verdict=None, problem=str(error), right=-1)
        faults = [fault for fault in verdict.faults if not self._is_old(fault)]
        problem, blamed = "\n".join(map(str, faults)), {path for fault in faults for path in fault.paths}
        wanted, steps = paths_of(links), steps_by_leaf(links)
        got = {p: {*reads(x.recipe)} for p, x in verdict.restored.items() if p not in blamed}
        done = {p: steps_in(verdict.restored[p].recipe) for p in got.keys() & wanted.keys()}
        made = (path for path, sources in wanted.items() if sources <= got.get(path, set()))
        right = {path for path in made if steps.get(path) in (None, done[path])}
        wrong = [path for path in wanted if path not in right]
        wrong += [p for p, x in self._found.items() if p not in wanted and got.get(p) != {*reads(x.recipe)}]
        others = {item.leaf.path for item in self._model} - wanted.keys() - self._base.restored.keys()
        ends = {(at, x.segments[-2:]) for x in (self._applied if others else ()) for at in x.sources}
        wrong += [
            path
            for path, sources in got.items()
            # What lies in a renamed module under its own name, or a settled one, is that leaf.
            if path in others and any((source, segments(path)[-2:]) not in ends for source in sources)
        ]
        tried = Tried(rules=rules, links=links, verdict=verdict, problem=problem, root=root, below=below)
        return dataclasses.replace(tried, right=len(right), wrong=tuple(wrong))

    def _is_old(self, fault: RestoreError) -> bool:
        """Tells whether the settled rules alone have a fault too: no proposal is to blame for it."""
        return any(type(fault) is type(old) and {*fault.paths} <= {*old.paths} for old in self._base.faults)

    @cached_property
    def _shapes(self) -> Shapes:
        """The shapes of stored leaves, but of those that the settled rules have shaped otherwise."""
        shaped = {entry.sources[0] for entry in self._applied if not isinstance(entry.recipe, Read)}
        return {path: leaf.shape for path, leaf in self.stored.items() if path not in shaped}

    @cached_property
    def _entries(self) -> Sequence[Entry]:
        return without_repeats(self._ours, [entry for entry in self._applied if entry.section == "model"])

    @cached_property
    def _ours(self) -> list[Leaf]:
        return wanted_leaves(self._model)

    @cached_property
    def _theirs(self) -> list[Leaf]:
        return stored_leaves(self._entries, False)

    def _questions(self, links: Sequence[Link], searched: Searched, tried: Tried) -> list[Choice]:
        verdict, ties = tried.verdict or self._base, searched.found.ties
        known = {path: {*reads(item.recipe)} for path, item in verdict.restored.items()}
        doubted = self._doubted(verdict) | searched.ordered | torn_by_name(known, (), ties)
        covered = paths_of(links).keys() | known.keys() - doubted
        used, found = {leaf.part for link in links for leaf in link.stored}, list[Choice]()
        several = left_open(ties, covered, used, turns_told(searched.found.links if ties else ()))
        for readings in as_one(filter(None, several)):  # Too many orders are told by none of them.
            is_joined = len(readings) > 1 and all(link.joint or link.told for link in readings[0])
            found.append(Choice("how" if is_joined else "which", tuple(map(tuple, readings))))
        turns = [link for link in searched.turns if covered.isdisjoint(leaf.source for leaf in link.wanted)]
        called, told = {link.target.names[-1] for link in links if is_turned([link])}, turned_lists(links)
        turns += [
            dataclasses.replace(link, ways=((Way(()), *link.ways[0]),))
            for link in (*searched.links, *searched.turns)
            if self._is_doubted(link, told) and link.target.names[-1] in called
        ]
        found += of_turns(turns)
        return sorted(found, key=lambda item: len(item.readings) == 1)[:QUESTIONS]

    def _suggested(self, tried: Tried, questions: Sequence[Question]) -> Suggestion:
        verdict, weights = tried.verdict or self._base, [x.leaf.path for x in of_role(self._wanted, *WEIGHTS)]
        asked = itertools.chain(*(question.wanted for question in questions if question.about == "which"))
        doubted = {*self._doubted(verdict), *asked} - paths_of(tried.links).keys()
        left = {*verdict.missing, *verdict.mismatched, *doubted}
        own = {path for item in self._found.values() for path in reads(item.recipe)}
        placed = verdict.sides.placements
        made, images = verdict.restored, flattened(self._theirs if verdict is not self._base else (), own)
        return Suggestion(
            proposals=tuple(proposals_of(tried.rules)),
            questions=tuple(questions),
            wanted_count=len(weights),
            unmatched_wanted=tuple(path for path in weights if path in left),
            unmatched_stored=tuple(path for path in verdict.unexpected if placed[path].section == "model"),
            is_rivalled=tried.is_rivalled,
            problem=tried.problem or problem_of(verdict, weights, questions),
            resized=resized_in(verdict, questions),
            flattened=tuple(p for p in weights if p in made and images & {*reads(made[p].recipe)}),
        )


# Parts that are called after their block.

_IN_BLOCK = re.compile(
    r"((?:.*[a-z_])?(?:layer|block|stage|group|unit)s?_?\d+)_(?=.*[a-z])(\d+)?_?(\w+)", re.IGNORECASE
)


def _searched(wanted: Sequence[Leaf], stored: Sequence[Leaf], order: Order) -> Searched:
    """Searches what each wanted leaf is made from; where it tells more, parts called after a block lie in it.

    Keras' `conv2_block1_1_conv` is `1.conv` in `conv2_block1`. Not where one is called so on both sides.
    """
    plain, own = search(wanted, stored, order), Owners()
    sides = [[_in_block(leaf, own) for leaf in leaves] for leaves in (wanted, stored)]
    shared = {leaf.names[:-1] for leaf in wanted} & {leaf.names[:-1] for leaf in stored}
    is_name = any(leaf.names[:-1] in shared for leaf, *_ in own.values())
    if not own or is_name or len(paths_of(plain.links)) == len(wanted):
        return plain
    read = search(sides[0], sides[1], order)
    found = as_they_lie(read.found, own)
    links, turns = (tuple(as_they_lie(Findings(links=[*x]), own).links) for x in (read.links, read.turns))
    tried = Searched(links=links, turns=turns, found=found, ordered=read.ordered)
    return max(plain, tried, key=lambda searched: len(paths_of(searched.links)))


def _in_block(leaf: Leaf, own: Owners) -> Leaf:
    part = part_of(leaf)
    found = _IN_BLOCK.fullmatch(part[-1]) if part else None
    if found is None or len(part) == len(leaf.names):
        return leaf  # A name that says its parameter too, or of an array, is no module's.
    at, (block, number, name) = len(part) - 1, found.groups()
    called = f"{number}.{name}" if number else name
    made = dataclasses.replace(leaf, names=(*part[:-1], block, called, *leaf.names[len(part) :]))
    own[made.part] = leaf, {at: -1 if counts_of(called) else at, at + 1: -1}, -1
    return made


# What would better be exchanged.


def _misplaced(links: Iterable[Link], stored: Iterable[Leaf]) -> Iterator[Link]:
    """Yields links of parts that two modules, of which each is made of two stored ones, have exchanged.

    Where the convolutions of a block are those of `down_0`, its norm is rather the one of `down_0`, too, than
    that of another block which has one of the same name and shape. Numbers that both count alike tell.
    """
    made, homes = defaultdict[tuple[Names, Names], list[Link]](list), defaultdict[Names, set[Names]](set)
    for link in links:
        if link.joint is None and link.layers is None:
            made[part_of(link.target), part_of(link.source)].append(link)
    shapes = {part_of(leaf): leaf.shape for leaf in stored if leaf.place[1] == "main"}
    held, led = Counter[Names](), defaultdict[Names, Counter[Names]](Counter)
    for one, other in made:
        homes[other].add(one)
        held.update(around(other))
        for module in around(one):
            led[module].update(around(other))
    torn = {
        module: few
        for module, sources in led.items()
        if (few := [each for each, count in sources.items() if count < held[each]])
    }
    for (one, other), module in ((pair, at) for pair in made for at in around(pair[0]) if at in torn):
        for home, source in itertools.product(around(other), torn[module]):
            beside = *source, *other[len(home) :]
            is_like = source != home and len(source) == len(home) and beside in homes
            if not is_like or shapes.get(beside) != shapes.get(other, ()):
                continue
            if counts_of("/".join(module))[-1:] == counts_of("/".join(home))[-1:] != ():
                continue
            outside = {each[: len(module)] for each in homes[beside]}
            shared = (sum(led[at][x] for at in (module, *outside)) == held[x] for x in (home, source))
            if module not in outside and all(shared):
                yield from itertools.chain(made[one, other], *(made[each, beside] for each in homes[beside]))
