"""Rules out of links: few and general, and none takes a leaf away that it is not meant for."""

import dataclasses
import functools
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from orbax_nnx_handler.planning.core.errors import RuleError
from orbax_nnx_handler.planning.core.paths import is_index, parse
from orbax_nnx_handler.planning.likeness.joined_parts import joining_rule
from orbax_nnx_handler.planning.likeness.links import (
    Link,
    Move,
    alike,
    as_within,
    differing,
    layers_of,
    leads,
    led_into,
    numbered,
    with_first,
)
from orbax_nnx_handler.planning.likeness.shapes import shaping_rule
from orbax_nnx_handler.planning.likeness.vocabulary import Names
from orbax_nnx_handler.planning.rules import Copy, Fuse, Rename, Rule, Split, StackLayers, UnstackLayers
from orbax_nnx_handler.planning.rules.entries import Entries, Entry, PathIndex
from orbax_nnx_handler.planning.rules.inverse import leads_back, unwritten_lists
from orbax_nnx_handler.planning.rules.rename import cuts, keeping, matches_only, rename_of, with_places
from orbax_nnx_handler.planning.rules.rule import compiled
from orbax_nnx_handler.planning.rules.stacking import stacked_in_parts, whole_parts
from orbax_nnx_handler.planning.suggesting.stacks import from_zero
from orbax_nnx_handler.planning.suggesting.whole_modules import Renamed, of_leaves, of_modules

_MOST_NAMES = 8  # Above the parts of a fuse, for a rule to leave others out.


@dataclasses.dataclass
class Writer:
    """Writes rules, each tried on the stored model as those before it left it.

    Attributes:
        entries: The stored model now.
        root: How many segments of wanted paths lead to the model.
        below: The names above the stored model that the planner takes away by itself.
        rules: What is written, each rule with the links that it serves.
        by_layer: The links of what renames for single layers take, which stand for no others.
    """

    entries: Entries
    root: int
    below: Names = ()
    rules: dict[Rule, list[Link]] = dataclasses.field(default_factory=dict[Rule, list[Link]])
    by_layer: list[Link] = dataclasses.field(default_factory=list[Link])

    def write(
        self, links: Sequence[Link], groups: Sequence[tuple[Names, Names]]
    ) -> Mapping[Rule, Sequence[Link]]:
        """Returns the rules of links that leave nothing open, in order; groups lead into layers of both."""
        listed = unwritten_lists((with_first(x.whole) for x in self.entries), ())
        kept = {name: rule for name in listed if (rule := keeping(name, self.entries))}
        self._unstack(links := self._from_zero(links))
        moves = [move for link in links for move in self._moves(link)]
        self._copy(links)
        self._reshape(moves)
        self._reshape(alone := self._join(links, moves))  # The parts of what was split.
        # Layers that become those of several lists are called as those that hold the most of them.
        several, index = Counter(stored for stored, _ in set(groups)), PathIndex(x.names for x in alone)
        inside = {pair: self._inside(*pair, alone, index) for pair in sorted(set(groups))}
        ordered = sorted(inside, key=lambda pair: several[pair[0]] > 1 and len(inside[pair]))
        groups = [*dict(ordered).items()]
        staying = {id(move) for pair in groups for move in inside[pair].values()}
        # What stays in its layer until layers are stacked is named later, for all layers at once.
        led = {at for x, _ in groups for at in led_into(x, alone, index) if not leads(x, alone[at].aim)}
        leaving = {id(alone[at]): alone[at] for at in sorted(led) if id(alone[at]) not in staying}
        self._rename(list(leaving.values()))
        self._stack([move.link for move in leaving.values()])  # Before the layers around get other names.
        # What has got no name yet is looked at again beside each rule for layers.
        alone = [move for move in alone if id(move) not in leaving or move.link.layers is None]
        self._rename_groups(alone, [*groups, *self._renumbered(links)])
        self._rename_many(alone, of_leaves(alone))
        self._rename_many(alone, of_modules(alone))
        self._rename(alone)
        before = self.entries
        self._stack(links)
        firsts = (with_first(x.whole) for x in before if self.rules)
        left = unwritten_lists(firsts, self.rules)
        return {**{kept[name]: [] for name in sorted(left & kept.keys())}, **self.rules}

    def _below(self, names: Names) -> Names:
        return (*self.below, *names[self.root :])

    def _moves(self, link: Link) -> list[Move]:
        aim, seats = self._aim(link, link.target.names), link.seats(self.root - len(self.below))
        if link.is_split:
            whole = self._now(link, link.source.names)
            return [Move(whole, whole, [*seats], link, link.after)] if link.after else []
        if link.source.made:
            return self._gates(link, aim, seats)
        found: list[Move] = []
        for leaf, ways in zip(link.stored, link.ways, strict=True):
            names = self._below(link.target.names) if link.copied else self._now(link, leaf.names)
            found.append(Move(names, aim, [*seats], link, ways[0].steps))
        return found

    def _gates(self, link: Link, aim: Names, seats: Sequence[tuple[int, int]]) -> list[Move]:
        """Returns the gates of a recurrent cell: the planner itself fuses them below the wanted name."""
        cell = link.source.names[:-2]
        inside = (entry.segments for entry in self.entries if entry.segments[:-2] == cell)
        return [Move(names, (*aim[:-2], *names[-2:]), [*seats], link) for names in inside]

    def _now(self, link: Link, names: Names) -> Names:
        """Returns the path of a stored leaf once its layers are taken apart."""
        layers = link.layers
        if layers is None or layers.stacks:
            return names
        into = self._below(layers.wanted)
        return (*numbered(into, link.layer), *names[len(layers.stored) :])

    def _aim(self, link: Link, names: Names) -> Names:
        """Returns the path that a wanted leaf has before its layers are stacked."""
        layers = link.layers
        if layers is None or not layers.stacks:
            return self._below(names)
        return (*numbered(layers.stored, link.layer), *names[len(layers.wanted) :])

    # One stage after the other.

    def _from_zero(self, links: Sequence[Link]) -> Sequence[Link]:
        """Renames layers that are to be stacked and count from another number than 0."""
        made = dict[int, Link]()
        for layers, some in layers_of(links, stacks=True).items():
            numbers, into = sorted({link.layer for link in some}), self._below(layers.wanted)
            first = numbers[0] if numbers == [*range(numbers[0], numbers[-1] + 1)] else 0
            rules = [rename_of(numbered(layers.stored, at), (*into, str(at - first))) for at in numbers]
            good = {leaf.names for link in some for leaf in link.stored}
            if (
                first
                and into
                and all(x and matches_only(compiled(x.pattern), self.entries, good) for x in rules)
            ):
                for rule in filter(None, rules):
                    self._take(rule, some)
                made |= {id(link): from_zero(link, into, first) for link in some}
        return [made.get(id(link), link) for link in links]

    def _unstack(self, links: Sequence[Link]) -> None:
        for layers, some in layers_of(links, stacks=False).items():
            used = {leaf.names for link in some for leaf in link.stored}
            held = {e.segments for e in self.entries if leads(layers.stored, e.segments)}
            for below in whole_parts(used, held, len(layers.stored)):
                stored, into = (*layers.stored, *below), (*self._below(layers.wanted), *below)
                if not into:
                    continue  # Layers that lie beside the model's other parts have no name in common.
                self._take(UnstackLayers("/".join(stored), "/".join(into), layers.axis), some)

    def _stack(self, links: Iterable[Link]) -> None:
        written: dict[StackLayers, list[Link]] = defaultdict(list)
        for layers, some in layers_of(links, stacks=True).items():
            into, shift = self._below(layers.wanted), len(self.below) - self.root
            seats = ((at, to + shift) for at, to in some[0].levels if at < layers.seat)
            around = [(at, to) for at, to in seats if 0 <= to < len(into)]
            # The layers around, which experts are a list in, are counted too.
            left = with_places(numbered(layers.stored, 0), [*(at for at, _ in around), layers.seat])
            right = with_places(into, [to for _, to in around])
            if right:  # What lies beside the model's other parts has no name in common.
                written[StackLayers("/".join(left), "/".join(right), layers.axis)] += some
        for rule, some in written.items():
            if not self._take(rule, some):
                made = {self._aim(link, leaf.names): link for link in some for leaf in link.wanted}
                left = parse(rule.pattern)
                held = {entry.segments for entry in self.entries if leads(left, entry.segments)}
                for part, below in stacked_in_parts(rule, made.keys(), held):
                    self._take(part, [x for at, x in made.items() if at[len(left) :][: len(below)] == below])

    def _copy(self, links: Sequence[Link]) -> None:
        for link in [link for link in links if link.copied]:
            self._take(Copy("/".join(link.source.names), "/".join(self._below(link.target.names))), [link])

    def _reshape(self, moves: Sequence[Move]) -> None:
        waiting = [move for move in moves if move.steps]
        while waiting:
            by_step: dict[object, list[Move]] = defaultdict(list)
            for move in waiting:
                by_step[move.steps[0]].append(move)
            for group in by_step.values():
                for pattern in self._patterns(group):
                    self._take(shaping_rule(pattern, group[0].steps[0]), [move.link for move in group])
            for move in waiting:
                move.steps = move.steps[1:]
            waiting = [move for move in waiting if move.steps]

    def _patterns(self, moves: Sequence[Move]) -> list[str]:
        """Returns patterns that match the leaves of some moves and no other leaf, none what another does."""
        good = {move.names for move in moves}
        found: dict[str, set[Names]] = {}
        for move in moves:
            if any(move.names in held for held in found.values()):
                continue
            pattern = self._pattern(next(move.templates())[0], good) or self._pattern(move.names, good)
            pattern = pattern or "/".join(self._whole(move.names))
            held = {names for names in good if next(compiled(pattern).spans(names), None)} | {move.names}
            found = {text: others for text, others in found.items() if not others <= held}
            found[pattern] = held
        return list(found)

    def _pattern(self, template: Names, good: Collection[Names]) -> str:
        """Returns the shortest end of a path that matches none but the good ones; empty if none does."""
        least = 2 if len(template) > 1 else 1
        for width in range(least, len(template) + 1):
            pattern = compiled("/".join(template[-width:]))
            if matches_only(pattern, self.entries, good):
                return pattern.text
        return ""

    def _whole(self, names: Names) -> Names:
        found = (self.entries[at] for at in self.entries.holding(names))
        return next((entry.whole for entry in found if entry.segments == names), names)

    def _join(self, links: Sequence[Link], moves: Sequence[Move]) -> list[Move]:
        """Writes what fuses and splits leaves; returns the leaves that are left to rename."""
        fused = [link for link in links if link.joint is not None]
        if not fused:
            return list(moves)
        parts = {leaf.names for link in fused for leaf in link.stored}
        taken = {self._now(link, leaf.names) for link in fused for leaf in link.stored}
        alone = [move for move in moves if move.names not in taken]
        made = Counter(move.names for link in fused for move in self._joining(link, 0, ())[1])
        twice = {names for names, count in made.items() if count > 1}
        for kept in range(_MOST_NAMES):
            written: dict[Rule, list[Link]] = defaultdict(list)
            for link in fused:
                written[self._joining(link, kept, twice)[0]].append(link)
            fused = list[Link]()
            for rule, some in written.items():
                each = {rule: some}
                if not self._fits(rule, some):
                    if kept + 1 < _MOST_NAMES:
                        fused += some
                        continue
                    single = {self._joining(link, kept, twice, is_one=True)[0]: [link] for link in some}
                    each = single if all(map(self._fits, single, single.values())) else each
                alone += [move for link in some for move in self._joining(link, kept, twice)[1]]
                for item in each.items():
                    self._take(*item)
        return [move for move in alone if move.names not in parts]

    def _fits(self, rule: Rule, links: Iterable[Link]) -> bool:
        """Tells whether the rule of a fuse or split is about no other leaf."""
        good = {self._now(link, leaf.names) for link in links for leaf in link.stored}
        patterns = (
            rule.patterns if isinstance(rule, Fuse) else (rule.pattern,) if isinstance(rule, Split) else ()
        )
        into = map(compiled, rule.into if isinstance(rule, Split) else ())
        if not all(matches_only(pattern, self.entries, ()) for pattern in into):
            return False  # A save would fuse other leaves too.
        return all(matches_only(compiled(text), self.entries, good) for text in patterns)

    def _joining(
        self, link: Link, kept: int, twice: Collection[Names], *, is_one: bool = False
    ) -> tuple[Rule, list[Move]]:
        """Returns the rule of a fuse or split, and what comes out of it: one name is not given to two."""
        seats = link.seats(self.root - len(self.below))
        sources = [self._now(link, leaf.names) for leaf in link.stored]
        aims = [self._aim(link, leaf.names) for leaf in link.wanted]
        _, intos = joining_rule(link, sources, aims)
        called = aims
        if any(into in twice for into in intos):
            called = [(*aim[:-2], "_".join((*sources[0][-2:-1], *aim[-2:-1])), aim[-1]) for aim in aims]
            _, intos = joining_rule(link, sources, called)
        named = [with_places(names, [now for now, _ in seats if not is_one]) for names in sources]
        rule, _ = joining_rule(link, named, called, kept)
        steps = [ways[0].steps for ways in link.ways] if link.is_split else [link.after]
        return rule, [
            Move(into, aim, [*seats], link, some) for into, aim, some in zip(intos, aims, steps, strict=True)
        ]

    def _renumbered(self, links: Iterable[Link]) -> Iterator[tuple[Names, Names]]:
        """Yields where layers lie that are taken out of a stack, and where the target has them."""
        for link in links:
            layers = link.layers
            if layers is not None and not layers.counted:
                now = numbered(self._below(layers.wanted), link.layer)
                yield now, link.target.names[: len(layers.wanted) - 1]

    def _rename_groups(self, moves: Sequence[Move], groups: Sequence[tuple[Names, Names]]) -> None:
        """Renames what leads into layers, so that the rules within are one for all of them."""
        # `block_{i}` is for `block_3_audio` too: longer names come first.
        index = PathIndex(move.names for move in moves)
        for stored, wanted in sorted(set(groups), key=lambda pair: (-len(pair[0]), -len(pair[0][-1]), pair)):
            into = self._below(wanted)
            inside = self._inside(stored, wanted, moves, index)
            are_few = len({move.names[len(stored) :] for move in inside.values()}) < 2
            if are_few or alike(stored, into) or stored[0].startswith("{"):
                continue  # A number alone stands for any name.
            rule = Rename("/".join(stored), "/".join(into))
            after = self._set_apart(rule, moves, inside)
            if after is None or not leads_back(rule, self.entries, after):
                continue  # Each leaf gets a rule that does, and takes no other one astray.
            # What it alone tells rests on it: no later rule is for these leaves.
            told = (x.link for x in inside.values() if x.names[len(stored) :] == x.aim[len(into) :])
            self._apply(rule, after, told)
            shift = len(into) - len(stored)
            for at, move in inside.items():
                move.names = (*move.aim[: len(into)], *move.names[len(stored) :])
                index.add(at, move.names)
                move.seats = [(aim if seat < len(stored) else seat + shift, aim) for seat, aim in move.seats]

    def _set_apart(self, rule: Rename, moves: Sequence[Move], inside: Mapping[int, Move]) -> Entries | None:
        """Renames or keeps first what a rename for layers would take too, as `layer_{i}` takes `layer_norm`.

        Returns:
            The entries after the rename for layers; None where it takes a leaf astray.
        """
        head, led = len(parse(rule.pattern)), len(parse(rule.replacement))
        staying = {id(move) for move in inside.values()}
        for attempt in (self._rename, self._rename, functools.partial(self._keep, rule), None):
            after = Entries.of(rule.apply(self.entries).entries)
            changed = {self.entries[at].segments: new.segments for at, new in after.changed.items()}
            for move in inside.values():
                if changed.get(move.names) == (*move.aim[:led], *move.names[head:]):
                    del changed[move.names]
            astray = [move for move in moves if move.names in changed] if changed else []
            if not astray:
                return after
            if attempt is not None:
                # Within its layer first, if it stays there: the way back is as short.
                apart = [as_within(move, head, led) if id(move) in staying else move for move in astray]
                attempt(apart)
                for move, other in zip(astray, apart, strict=True):
                    seats = zip(other.seats, move.seats, strict=True)
                    move.names, move.seats = other.names, [(now, to) for (now, _), (_, to) in seats]
        return None

    def _keep(self, rule: Rename, moves: Sequence[Move]) -> None:
        """Writes that leaves which have their names already keep them under a rename for layers."""
        pattern, good = compiled(rule.pattern), {x.names for x in moves if alike(x.names, x.aim)}
        for move in moves if good else ():
            left, spans = next(move.templates())[0], [*pattern.spans(move.names)]
            is_layer = not spans[0].start and all(map(is_index, spans[0].bindings.values()))
            head = pattern.width if is_layer else 0
            for span in spans[is_layer:]:
                kept = ("/".join(left[at : span.stop]) for at in range(span.start, head - 1, -1))
                text = next((x for x in kept if matches_only(compiled(x), self.entries, good)), "")
                if text and (keeping := Rename(text, text)) not in self.rules:
                    self._take(keeping, [move.link])

    def _inside(
        self, stored: Names, wanted: Names, moves: Sequence[Move], index: PathIndex
    ) -> Mapping[int, Move]:
        """Returns the leaves that lie in layers and stay in them, by their places among all."""
        into = self._below(wanted)
        return {at: moves[at] for at in led_into(stored, moves, index) if leads(into, moves[at].aim)}

    def _rename_many(self, moves: Sequence[Move], renames: Iterable[Renamed]) -> None:
        """Writes renames that many modules share, where they take no leaf astray; else each has its own."""
        aims = {move.names: move.aim for move in moves}
        for rule in (rename_of(*each) for each in renames):
            after = Entries.of(rule.apply(self.entries).entries) if rule else self.entries
            new = {self.entries[at].segments: entry.segments for at, entry in after.changed.items()}
            steps = ((names, old, aims.get(old, ("",))) for old, names in new.items())
            are_meant = all(names in (aim, (*old[:-1], aim[-1])) for names, old, aim in steps)
            if rule and are_meant and leads_back(rule, self.entries, after):
                self._apply(rule, after, [move.link for move in moves if move.names in new])
                for move in moves:
                    move.names = new.get(move.names, move.names)

    def _rename(self, moves: Sequence[Move]) -> None:
        aims = {move.names: move.aim for move in moves}
        groups = defaultdict[tuple[Names, Names], dict[Names, list[Move]]](dict)
        refused, exchanged = set[tuple[Names, Names]](), dict[Names, Names]()
        for move in moves:
            if not alike(move.names, move.aim):
                groups[differing(move)].setdefault(move.names, []).append(move)
        # Longer ones first: what one rename wrote is safe from the others. A name is given once it is free.
        order, held = sorted(groups, key=lambda pair: -len(pair[0]))[::-1], Counter(one for one, _ in groups)
        while order:
            free = (at for at in range(len(order))[::-1] if not held[order[at][1]])
            pair = order.pop(next(free, -1))
            held[pair[0]] -= 1
            waiting = groups[pair]  # By name: no rule looks through all of them.
            for names in [*waiting]:
                found = self._rename_rule(waiting[names][0], aims, refused) if names in waiting else None
                if found is not None:
                    rule, applied, is_for_one = found
                    for name, new in self._renamed(applied, aims, exchanged).items():
                        for move in waiting.pop(name, ()):
                            move.names, move.seats = new, [(to, to) for _, to in move.seats]
                            self.rules.setdefault(rule, []).append(move.link)
                            self.by_layer += [move.link] if is_for_one else []

    def _renamed(
        self, after: Entries, aims: dict[Names, Names], exchanged: dict[Names, Names]
    ) -> Mapping[Names, Names]:
        """Takes the entries after a rename and returns the paths that it changed, with the new ones.

        A leaf that still has one of these keeps its aim; that of the other one is `exchanged` until it goes.
        """
        changed = {self.entries[at].segments: new.segments for at, new in after.changed.items()}
        made = {new: aims.get(old, new) for old, new in changed.items()}
        there = {x for x in made if x in aims and x not in changed and self.entries.has(x)}
        aims.update({old: exchanged.pop(old) for old in changed if old in exchanged})
        aims.update({new: aim for new, aim in made.items() if new not in there})
        exchanged.update({new: made[new] for new in there})
        self.entries = after
        return changed

    def _rename_rule(
        self, move: Move, aims: Mapping[Names, Names], refused: set[tuple[Names, Names]]
    ) -> tuple[Rename, Entries, bool] | None:
        """Returns the shortest rename that takes a leaf to its aim, no other astray, and if one can, back.

        With the entries after it, and whether it is for a single layer.
        """
        whole = self._whole(move.names)
        above = whole[: len(whole) - len(move.names)]
        first: tuple[Rename, Entries, bool] | None = None
        for count, (left, right) in enumerate(move.templates()):
            stored, wanted = (*above, *left), (*above, *right)
            for start, stop in cuts(stored, wanted):
                names = stored[start : len(stored) - stop], wanted[start : len(wanted) - stop]
                if names in refused or (rule := rename_of(*names)) is None:
                    continue
                changed, taken = dict[int, Entry](), set[Names]()
                for at, new in rule.changes(self.entries):
                    taken.add(old := self.entries[at].segments)
                    if old not in aims:
                        refused.add(names)  # For good: nothing renames the leaves without an aim.
                    if old not in aims or not alike(new.segments, aims[old]):
                        break
                    changed[at] = new
                else:
                    if move.names in taken:
                        after = self.entries.with_changes(changed)
                        if leads_back(rule, self.entries, after):
                            return rule, after, count > 0
                        first = first or (rule, after, False)
        return first

    def _take(self, rule: Rule, links: Iterable[Link]) -> bool:
        try:
            applied = rule.apply(self.entries)
        except RuleError:
            return False  # The plan with the other rules shows what is lost.
        if applied.matched:
            self._apply(rule, Entries.of(applied.entries), links)
        return True

    def _apply(self, rule: Rule, after: Entries, links: Iterable[Link]) -> None:
        self.entries = after
        self.rules.setdefault(rule, []).extend(links)
