"""The search for a whole conversion: structure, shapes and names on both sides; last, the parts left over."""

import dataclasses
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from functools import cached_property

from orbax_nnx_handler.planning.core.dtypes import number_of
from orbax_nnx_handler.planning.core.leaves import StoredLeaf
from orbax_nnx_handler.planning.core.paths import Path, Tokens, segments
from orbax_nnx_handler.planning.core.recipes import Read, reads, shape_of
from orbax_nnx_handler.planning.layouts.layout import repeats_beside
from orbax_nnx_handler.planning.likeness.arrangements import as_fused
from orbax_nnx_handler.planning.likeness.assignment import Fit, fit_of, may_be, sizes_of_few, ways_apart
from orbax_nnx_handler.planning.likeness.counted_modules import (
    with_either_count,
    with_runs_told,
    with_surplus_asked,
)
from orbax_nnx_handler.planning.likeness.joined_parts import is_table, tied
from orbax_nnx_handler.planning.likeness.linked_modules import GENERAL
from orbax_nnx_handler.planning.likeness.links import Findings, Link, Tie, leads, settle_turns
from orbax_nnx_handler.planning.likeness.module_parts import Leaf, ModulePart, module_parts, part_of
from orbax_nnx_handler.planning.likeness.named_parts import NamedPart, named_parts
from orbax_nnx_handler.planning.likeness.networks import with_axes, with_either_end, with_networks_apart
from orbax_nnx_handler.planning.likeness.norms_of_layers import with_counted_parts, with_one_before
from orbax_nnx_handler.planning.likeness.shapes import Way, ways
from orbax_nnx_handler.planning.likeness.vocabulary import Names, concepts
from orbax_nnx_handler.planning.mapping.cells_and_wrappers import derive
from orbax_nnx_handler.planning.rules.applying import unboxed
from orbax_nnx_handler.planning.rules.entries import Entry
from orbax_nnx_handler.planning.rules.values import steps_in
from orbax_nnx_handler.planning.suggesting.doubts import (
    apart_from_copies,
    coincidences,
    contradicted,
    wanted_twice,
)
from orbax_nnx_handler.planning.suggesting.link_groups import (
    Precedents,
    with_moved_axes,
    with_networks_told,
)
from orbax_nnx_handler.planning.suggesting.matching_layers import Context, match_context
from orbax_nnx_handler.planning.suggesting.questions import as_questions, of_one_tower, with_words_told
from orbax_nnx_handler.planning.suggesting.whole_modules import with_modules_asked
from orbax_nnx_handler.planning.target.roles import Wanted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Searched:
    """What a search found.

    Attributes:
        links: What is decided.
        turns: Links of square matrices of which nobody knows whether they are transposed.
        found: The rest: ties, groups of layers.
        ordered: The wanted leaves of lists that may be in the order of others, whatever names say.
    """

    links: tuple[Link, ...]
    turns: tuple[Link, ...]
    found: Findings
    ordered: Set[Path] = frozenset()


def search(wanted: Sequence[Leaf], stored: Sequence[Leaf], order: Mapping[Tokens, Sequence[str]]) -> Searched:
    """Searches what each wanted leaf is made from; `order` is that of creation, by module."""
    if any(leaf.collection is None for leaf in (*wanted, *stored)):
        wanted, stored = ([dataclasses.replace(x, collection=None) for x in y] for y in (wanted, stored))
    cells = as_fused(wanted, stored)
    found = cells.apart(match_model(Context(wanted=cells.wanted, stored=cells.stored, order=order)))
    found = _with_shared_tables(found)
    found.add(tied(wanted, stored, found))
    found.links.extend(match_leftovers(wanted, stored, found.links))
    found, count = with_either_end(found), len(found.ties)
    ordered = {path for tie in found.ties[count:] for path in _wanted_by(tie)}
    sides = module_parts(wanted), module_parts(stored)
    found = with_surplus_asked(with_runs_told(with_one_before(found, *sides), sides), sides[1])
    found = with_words_told(with_networks_told(found))
    used = {part_of(leaf) for link in found.every for leaf in link.stored}
    made = {part_of(leaf) for link in found.links for leaf in link.wanted}
    left = {part_of(leaf) for leaf in stored} - used, {part_of(leaf) for leaf in wanted} - made
    twice = {link.target.source: link for link in wanted_twice(found, wanted, *sides)}
    odd = {**coincidences(found.links, *left, sides), **twice}
    found = with_modules_asked(with_either_count(as_questions(found, odd)), wanted, stored)
    plain, copies = apart_from_copies((found := with_moved_axes(found)).links, stored)
    found.ties.extend(copies)
    settled, turns = settle_turns(plain)
    return Searched(links=tuple(settled), turns=tuple(turns), found=found, ordered=ordered)


def wanted_leaves(items: Iterable[Wanted]) -> list[Leaf]:
    """Returns the wanted leaves of a model."""
    return [
        Leaf(
            # As Linen calls a gate that Python does not let be an attribute.
            names=tuple("if" if name == "if_" else name for name in segments(item.path)),
            collection=item.collection,
            shape=item.leaf.shape,
            number=number_of(item.leaf.dtype),
            source=item.leaf.path,
        )
        for item in items
    ]


def stored_leaves(entries: Iterable[Entry], arranged: bool) -> list[Leaf]:
    """Returns the stored leaves of a model; `arranged`: the gates of cells fused, as NNX's have them."""
    model = unboxed([entry for entry in entries if entry.section == "model"])
    return _arranged(model) if arranged else [_leaf(entry, entry.segments) for entry in model]


def without_repeats(wanted: Sequence[Leaf], entries: Sequence[Entry]) -> Sequence[Entry]:
    """Returns the entries without those of a collection, or of a module, that repeats one beside it.

    No path tells a running average from the `params` beside it, or a target network; a Variable's type
    says from which collection it is read. A module is left out only where the rest is large enough.
    """
    typed = {None, *(leaf.collection or "params" for leaf in wanted)}
    first = {(entry.segments, entry.shape) for entry in entries if entry.collection in typed}
    kept = [x for x in entries if x.collection in typed or (x.segments, x.shape) not in first]
    paths = {(*x.segments, str(x.collection)): x.shape for x in kept}
    copies = repeats_beside(paths, itertools.chain(*(leaf.names for leaf in wanted)))
    rest = [x for x in kept if not any(x.segments[:at] in copies for at in range(len(x.segments)))]
    sizes = [sum(math.prod(x.shape) for x in some) for some in (wanted, rest)] if copies else [0, 0]
    return rest if sizes[0] <= sizes[1] else kept


def _leaf(entry: Entry, names: Names) -> Leaf:
    return Leaf(
        names=names,
        collection=entry.collection,
        shape=entry.shape,
        number=number_of(entry.cast or entry.dtype),
        source=entry.sources[0],
        done=steps_in(entry.recipe),
        called=entry.whole if entry.named else (),
    )


def _arranged(entries: Sequence[Entry]) -> list[Leaf]:
    """Returns the stored leaves with the gates of recurrent cells as NNX fuses them."""
    plain = {entry.tokens: entry for entry in entries if isinstance(entry.recipe, Read)}
    by_path = {entry.sources[0]: entry for entry in plain.values()}
    derived, without_variable = derive(
        {
            tokens: StoredLeaf(path=e.sources[0], shape=e.shape, dtype=e.dtype, key_impl=None)
            for tokens, e in plain.items()
        }
    )
    shapes = {path: entry.shape for path, entry in by_path.items()}
    consumed = {path for item in derived for path in reads(item.recipe)}
    consumed |= {item.leaf.path for item in without_variable}
    made = [_leaf(entry, entry.segments) for entry in entries if entry.sources[0] not in consumed]
    for item in derived:
        first = by_path[next(iter(reads(item.recipe)))]
        leaf = _leaf(first, (*first.segments[:-2], *item.path[-2:]))
        made.append(dataclasses.replace(leaf, shape=shape_of(item.recipe, shapes), made=True))
    return made


def _with_shared_tables(found: Findings) -> Findings:
    """Returns what is known, the only table that fits those of an encoder and of a decoder made into both."""
    ties, links = list[Tie](), list[Link]()
    for tie in found.ties:
        several = [*itertools.chain(*tie.readings)]
        tables = [part for part in module_parts(link.source for link in several[:1]) if is_table(part)]
        called = {(part[-1:], concepts(part[:-1]) - {"enc", "dec"}) for part in tie.wanted}
        is_one = len(tie.stored) == len(called) == 1 < len(several) == len(tie.readings)
        if is_one and any(part.said.isdisjoint(("enc", "dec")) for part in tables):
            links += (dataclasses.replace(link, copied=at > 0) for at, link in enumerate(several))
        else:
            ties.append(tie)
    return dataclasses.replace(found, links=[*found.links, *links], ties=ties)


def paths_of(links: Iterable[Link]) -> Mapping[Path, set[Path]]:
    """Returns the stored leaves that each wanted leaf is made from."""
    found: dict[Path, set[Path]] = defaultdict(set)
    for link in links:
        for leaf in link.wanted:
            found[leaf.source] |= {stored.source for stored in link.stored}
    return found


def agrees(
    link: Link, settled: Mapping[Path, set[Path]], claimed: Set[Path], free: Set[tuple[Path, Names]]
) -> bool:
    """Tells whether a link takes no leaf that another one has by its name, but for parts that are free."""
    for leaf in link.wanted:
        if leaf.source in settled:
            return {one.source for one in link.stored} <= settled[leaf.source]
    return link.copied or all(leaf.source not in claimed or leaf.part in free for leaf in link.stored)


def match_leftovers(wanted: Sequence[Leaf], stored: Sequence[Leaf], links: Sequence[Link]) -> list[Link]:
    """Returns links between parts of which nothing is linked, and that fit each other alone.

    A pair shares a word of its own, no shape and name allows another one on either side, and the
    numbers above do not differ. Wanted parts of one name that only one stored part fits, which
    nothing else wants, are all made from it. What lies in a stack of layers is no part by itself.
    """
    made = {leaf.part for link in links for leaf in link.wanted}
    used = {leaf.part for link in links for leaf in link.stored}
    groups = {link.layers for link in links if link.layers is not None}
    tops = [x.wanted for x in groups if x.stacks], [x.stored for x in groups if not x.stacks]
    free = [
        module_parts(x for x in leaves if x.part not in own and not any(leads(top, x.names) for top in above))
        for leaves, own, above in zip((wanted, stored), (made, used), tops, strict=True)
    ]
    if not (few := sizes_of_few(Counter(part.main_size for part in parts) for parts in free)):
        return []
    ours, theirs = (named_parts(parts, sizes=few) for parts in free)
    tokens = {link.target.shape[0] for link in links if _is_of_tokens(link)}
    fits: dict[int, dict[int, Fit]] = defaultdict(dict)
    sizes: dict[int, list[int]] = defaultdict(list)
    for to, other in enumerate(theirs):
        sizes[other.part.main_size].append(to)
    for at, one in enumerate(ours):
        for to in sizes[one.part.main_size]:
            if (fit := fit_of(one, theirs[to])) is not None and may_be(fit, one, theirs[to]):
                fits[to][at] = fit
    counts = Counter(at for options in fits.values() for at in options)
    # A large model of which nothing is left over is not counted.
    shapes = [Counter(map(_shapes, module_parts(side if fits else ()))) for side in (wanted, stored)]
    found: list[Link] = []
    for to, options in fits.items():
        takers = [ours[at] for at in options]
        if any(counts[at] > 1 for at in options) or not _are_one(takers, theirs[to], free[1]):
            continue
        are_whole = all(len(fit.pairs) > 1 for fit in options.values())
        is_alone = are_whole and _are_alone(takers, theirs[to], shapes)
        # A vector with an element for each token is a bias of the logits.
        is_bias = theirs[to].part.is_vector and theirs[to].part.main_size in tokens
        is_told = is_alone or is_bias or all(_is_meant(one, theirs[to]) for one in takers)
        if is_told and all(fit.is_exact for fit in options.values()):
            found += (
                Link(wanted=(one,), stored=(other,), grounds="names", ways=(how,), copied=number > 0)
                for number, fit in enumerate(options.values())
                for one, other, how in fit.pairs
            )
    return found


def _are_one(takers: Sequence[NamedPart], other: NamedPart, theirs: Sequence[ModulePart]) -> bool:
    """Tells whether parts are one that a program holds several times; else a stack may hold the rest."""
    # The one embedding of an encoder and of its decoder; `adapter_pool/probe` is not also `pool/probe`.
    parts = (x.part for x in takers)
    called = {(x.names[-1:], concepts(x.names[-2:-1]) - {"enc", "dec"}, _shapes(x)) for x in parts}
    is_alone = len(takers) == 1 or sum(x.names[-1:] == other.part.names[-1:] for x in theirs) == 1
    return len(called) == 1 and is_alone


def _are_alone(
    takers: Sequence[NamedPart], other: NamedPart, shapes: Sequence[Mapping[tuple[object, ...], int]]
) -> bool:
    """Tells whether a layer is the only one of its shapes on either side: a kernel, and a bias beside it."""
    counts = (shapes[0][_shapes(takers[0].part)], shapes[1][_shapes(other.part)])
    return len(takers) == 1 and counts == (1, 1) and not other.part.is_vector


def _shapes(part: ModulePart) -> tuple[object, ...]:
    return tuple(sorted((kind, leaf.shape) for kind, leaf in part.leaves.items()))


def _is_of_tokens(link: Link) -> bool:
    is_table, names = link.target.names[-1] == "embedding", (*link.target.names, *link.source.names)
    return is_table and len(link.target.shape) > 1 and not concepts(names) & {"pos", "type", "patch", "cls"}


def _is_meant(one: NamedPart, other: NamedPart) -> bool:
    left, right = ([x.number for x in role.part.levels if x.number is not None] for role in (one, other))
    return (not left or not right or left == right) and bool(one.part.own & other.part.own - GENERAL)


@dataclasses.dataclass(frozen=True)
class Settled:
    """What a search finds without the rules that are settled, and the stored model as they left it.

    A search among what is left sees a model with gaps: a number, a rival or a sibling is gone. So
    the whole model tells first, and what is left adds only what it leaves open.

    Attributes:
        before: What a search finds without the rules.
        after: The stored model under the rules.
        differs: Whether the rules make a wanted leaf of what the search did not.
        answered: The wanted leaves that the rules make.
    """

    before: Searched
    after: Sequence[Entry]
    differs: bool
    answered: Set[Path]

    def reconciled(self, found: Searched) -> Searched:
        """Returns what a search finds under the rules, where the whole model does not speak against it."""
        known = {(leaf.source, _stacked(link)): link for link in self.before.links for leaf in link.wanted}
        used = {leaf.source for link in self.before.links for leaf in link.stored}
        unanswered = {path for tie in self._unanswered for path in _wanted_by(tie)}
        kept: list[Link] = []
        for link in found.links:
            first = known.get((link.target.source, _stacked(link)))
            if first is None and not self.differs and link.target.source not in unanswered:
                kept += [] if used.intersection(self._sources(link)) else [link]
            elif first is not None:
                kept += [link] if self._agree(link, first) else []
        covered = {leaf.source for link in kept for leaf in link.wanted}
        lost = [link for link in self.before.links if link.target.source not in covered]
        kept += [] if self.differs else [moved for link in lost for moved in self._moved(link)]
        covered.update(leaf.source for link in kept for leaf in link.wanted)
        ties = [] if self.differs else [*found.found.ties, *self._again(found.found.ties)]
        turns = tuple(link for link in found.turns if link.target.source not in covered)
        groups = found.found.groups + self.before.found.groups
        whole = Findings(links=found.found.links, ties=ties, groups=groups)
        ordered = found.ordered | self.before.ordered
        return Searched(links=tuple(kept), turns=turns, found=whole, ordered=ordered)

    @cached_property
    def _unanswered(self) -> list[Tie]:
        """What the whole model leaves open, and no rule tells: that another one is gone does not."""
        open_ = [tie for tie in self.before.found.ties if not self.answered & _wanted_by(tie)]
        # What one answer leaves out may get another stored leaf by a rule.
        whole = (t for t in open_ if all(len(paths_of(each)) == len(_wanted_by(t)) for each in t.readings))
        return [tie for tie in whole if _of_siblings(tie) or self._is_untouched(tie.readings)]

    def _is_untouched(self, readings: Sequence[Sequence[Link]]) -> bool:
        """Tells whether no rule touches what is stored, or its name alone where its arrangement is open."""
        made = (self._made_of[leaf.source] for each in readings for link in each for leaf in link.stored)
        is_plain = all(len(some) == 1 and isinstance(some[0].recipe, Read) for some in made)
        is_how = is_plain and all(link.joint is not None for each in readings for link in each)
        return is_how or self._is_as_stored(readings)

    def _is_as_stored(self, readings: Sequence[Sequence[Link]]) -> bool:
        """Tells whether no rule touches what is stored; which of it is meant, no other shape tells."""
        is_which = any(paths_of(each) != paths_of(readings[0]) for each in readings)
        leaves = [leaf for link in itertools.chain(*readings) for leaf in link.stored]
        made = [self._made_of[leaf.source] for leaf in leaves]
        is_called_so = [[x.segments for x in some] for some in made] == [[leaf.names] for leaf in leaves]
        return is_called_so and (is_which or all(isinstance(x.recipe, Read) for some in made for x in some))

    def _again(self, ties: Iterable[Tie]) -> Iterator[Tie]:
        asked = {path for tie in ties for path in _wanted_by(tie)}
        for tie in self._unanswered:
            readings = tuple(tuple(x for link in each for x in self._moved(link)) for each in tie.readings)
            if not asked & _wanted_by(tie) and [*map(len, readings)] == [*map(len, tie.readings)]:
                yield dataclasses.replace(tie, readings=readings)

    @cached_property
    def _made_of(self) -> Mapping[Path, list[Entry]]:
        found: dict[Path, list[Entry]] = defaultdict(list)
        for entry in self.after:
            for path in entry.sources:
                found[path].append(entry)
        return found

    def _entry(self, leaf: Leaf) -> Entry | None:
        made = () if leaf.made else self._made_of[leaf.source]
        return next((entry for entry in made if entry.segments == leaf.names), None)

    def _sources(self, link: Link) -> list[Path]:
        entries = [(leaf, self._entry(leaf)) for leaf in link.stored]
        return [path for leaf, entry in entries for path in (entry.sources if entry else (leaf.source,))]

    def _agree(self, link: Link, first: Link) -> bool:
        """Tells whether a link under the rules makes the same of the same leaves."""
        if self._sources(link) != [leaf.source for leaf in first.stored]:
            return False
        at = [leaf.source for leaf in first.wanted].index(link.target.source)
        entry = self._entry(link.source)
        if entry is not None and len(first.stored) == 1:
            parts = self._made_of[link.source.source]
            is_part = first.layers is not None and not first.layers.stacks
            if parts[min(first.layer if is_part else at, len(parts) - 1)].recipe != entry.recipe:
                return False  # Another part of what a rule took apart, and no copy.
        done = steps_in(entry.recipe) if entry else ()
        now, then = link.ways[0][0].steps, first.ways[at][0].steps
        if not done and [step.before for step in now[:1]] == [step.before for step in then[:1]]:
            return now == then
        return done.count("transpose") + _turns(link.ways[0][0]) == _turns(first.ways[at][0])

    def _moved(self, link: Link) -> Iterator[Link]:
        """Yields a link of the whole model as the rules left its leaves, where they did not change much."""
        made = [self._made_of[leaf.source] for leaf in link.stored]
        if any(len(entries) != 1 for entries in made):
            return
        entry = made[0][0]
        if self._is_as_stored([[link]]):
            yield link
        elif not (link.is_split or link.source.made) and all(entries[0] is entry for entries in made):
            done = steps_in(entry.recipe)
            leaf = dataclasses.replace(link.source, names=entry.segments, shape=entry.shape, done=done)
            turns = _turns(link.ways[0][0]) - done.count("transpose")
            alone = dataclasses.replace(link, stored=(leaf,), joint=None, layers=None, levels=())
            possible = (way for way in ways(leaf.shape, link.target.shape) if _turns(way) == turns)
            yield from (dataclasses.replace(alone, ways=((way,),)) for way in possible)


def _of_siblings(tie: Tie) -> bool:
    parts, count = {link.source.source[:-1] for each in tie.readings for link in each}, len(tie.stored)
    return len(tie.wanted) == count and len({part[:-1] for part in parts}) * count == len(parts) > 1


def _wanted_by(tie: Tie) -> set[Path]:
    return {*paths_of(itertools.chain(*tie.readings))}


def _stacked(link: Link) -> int:
    """Returns which layer of a wanted stack a link is about."""
    return link.layer if link.layers is not None and link.layers.stacks else 0


def _turns(way: Way) -> int:
    return sum(step.kind == "transpose" for step in way.steps)


def match_model(context: Context) -> Findings:
    """Matches a model, networks that hold the same by themselves where parts of them would be crossed."""

    def match(wanted: Sequence[Leaf], stored: Sequence[Leaf]) -> Findings:
        return with_axes(_match_whole(dataclasses.replace(context, wanted=wanted, stored=stored)))

    return with_networks_apart(match(context.wanted, context.stored), context.wanted, context.stored, match)


def _match_whole(context: Context) -> Findings:
    """Matches a model; blocks of one kind, of which shapes or names tell some, tell the others.

    What is made of a name in few blocks of a list and not in most is asked about, where those do not tell.
    """

    def matched(given: Context) -> Findings:
        def match(ours: Sequence[Leaf], theirs: Sequence[Leaf]) -> Findings:
            return match_context(dataclasses.replace(given, wanted=ours, stored=theirs))

        found = ways_apart(given.wanted, given.stored, match)
        return with_counted_parts(found, given.wanted, given.stored, given.order)

    found, count = matched(context), None
    while (odd := contradicted(found.links)) or found.ties:
        if count is not None and len(found.ties) + len(odd) >= count:
            break
        count, sure = len(found.ties) + len(odd), [x for x in found.links if x.target.source not in odd]
        known = Precedents(context.wanted, context.stored, sure).speak_for
        found = matched(dataclasses.replace(context, known=known))
    kept, every = of_one_tower(found, context.stored), context.stored
    alone = match_model(dataclasses.replace(context, stored=kept)) if len(kept) < len(every) else found
    return alone if len(alone.links) > len(found.links) else as_questions(found, odd)
