"""What is found: which wanted leaves are made from which stored ones; and which squares are transposed."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal

from orbax_nnx_handler.planning.core.leaves import derived, record, with_fields
from orbax_nnx_handler.planning.core.paths import canonical, levels
from orbax_nnx_handler.planning.likeness.module_parts import Leaf, part_of
from orbax_nnx_handler.planning.likeness.shapes import Joint, Steps, Way
from orbax_nnx_handler.planning.likeness.vocabulary import PYTORCHS, Names, concepts, parameter_of
from orbax_nnx_handler.planning.rules.entries import PathIndex
from orbax_nnx_handler.planning.rules.rename import with_places
from orbax_nnx_handler.planning.rules.rule import compiled, shared_ends

PairGrounds = Literal["shapes", "order", "names", "fact", "siblings", "patch", "outputs", "tried"]
"""What tells the pair: shapes allow no other; the order of both programs' parts; names; a known code base;
how its siblings are arranged; that patches are flattened alike; outputs, of both programs or of a module."""


@dataclasses.dataclass(frozen=True)
class Layers:
    """A group of layers that one side keeps one by one and the other stacked.

    Attributes:
        stored: The stored names that lead into a layer, `{i}` for its number; or into the stack.
        wanted: The same in the target.
        axis: The stacked axis.
        stacks: Whether the wanted side is the stacked one.
        counted: Whether the target counts as the stack does; else `wanted` lies on the way, one level deeper.
    """

    stored: Names
    wanted: Names
    axis: int
    stacks: bool
    counted: bool = True

    @property
    def seat(self) -> int:
        """The segment that holds the number of a layer, where the wanted side is stacked."""
        return max(at for at, name in enumerate(self.stored) if "{i}" in name)


@record
class Link:
    """Leaves that belong together: one stored and one wanted, or one and several.

    Attributes:
        wanted: The wanted leaf; the parts of a stored one that is split.
        stored: The stored leaf; the parts of a wanted one that is fused, in their order.
        grounds: What it rests on.
        ways: For each part its ways of shape; more than one where shapes leave a choice.
        joint: How the parts lie in the whole, where there are several.
        after: What is done with a whole once its parts are joined, or before it is taken apart.
        told: What `after` comes to, in words.
        fact: The code base whose convention it follows.
        levels: Segments of the stored and of the wanted path that count the same layers.
        copied: Whether the stored leaf has a wanted leaf of its own beside this one.
        layers: The stack that either side is part of.
        layer: The number of the layer in it.
    """

    wanted: tuple[Leaf, ...]
    stored: tuple[Leaf, ...]
    grounds: PairGrounds
    ways: tuple[tuple[Way, ...], ...]
    joint: Joint | None = None
    after: Steps = ()
    told: str = ""
    fact: str = ""
    levels: tuple[tuple[int, int], ...] = ()
    copied: bool = False
    layers: Layers | None = None
    layer: int = 0

    @derived
    def target(self) -> Leaf:
        """The wanted leaf, or the first of several."""
        return self.wanted[0]

    @derived
    def source(self) -> Leaf:
        """The stored leaf, or the first of several."""
        return self.stored[0]

    @property
    def by_part(self) -> Iterable[tuple[Leaf, tuple[Way, ...]]]:
        """The stored leaf of each part, and the ways of the part."""
        stored = self.stored if len(self.stored) > 1 else self.stored * len(self.ways)
        return zip(stored, self.ways, strict=True)

    @property
    def is_split(self) -> bool:
        """Whether one stored leaf becomes several wanted ones."""
        return len(self.wanted) > 1

    @property
    def parts(self) -> tuple[str, ...]:
        """What the parts of a fused or divided leaf are called, in their order."""
        several = self.wanted if self.is_split else self.stored
        return tuple((part_of(leaf) or leaf.names)[-1] for leaf in several)

    def seats(self, root: int) -> list[tuple[int, int]]:
        """Returns the segments of the stored path, its stack taken apart, and of the aim that count layers.

        `root` more segments lead to the model in the target than in the checkpoint.
        """
        layers = self.layers
        if layers is None:
            return [(stored, wanted - root) for stored, wanted in self.levels if wanted >= root]
        if layers.stacks:
            seat, shift = layers.seat, len(layers.stored) - len(layers.wanted)
            return [(seat, seat), *((s, w + shift) for s, w in self.levels if s > seat)]
        seat = len(layers.wanted) - root - 1
        shift = len(layers.wanted) - root - len(layers.stored)
        counted = [(seat, seat)] if layers.counted else []
        return [*counted, *((s + shift, w - root) for s, w in self.levels if s + shift > seat)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tie:
    """Parts of which nothing tells which is which.

    Attributes:
        wanted: Paths of the wanted parts.
        stored: Paths of the stored ones.
        readings: Some ways to pair them, each as links. One alone is a pair for which nothing but shapes
            speaks.
    """

    wanted: tuple[Names, ...]
    stored: tuple[Names, ...]
    readings: tuple[tuple[Link, ...], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Findings:
    """What is known of a model.

    Attributes:
        links: The leaves that belong together.
        ties: Where nothing tells which is which.
        groups: The names that lead into the layers of both sides, `{i}` for equal numbers.
    """

    links: list[Link] = dataclasses.field(default_factory=list[Link])
    ties: list[Tie] = dataclasses.field(default_factory=list[Tie])
    groups: list[tuple[Names, Names]] = dataclasses.field(default_factory=list[tuple[Names, Names]])

    @property
    def every(self) -> list[Link]:
        """All links, those of possible readings too."""
        return [*self.links, *(link for tie in self.ties for each in tie.readings for link in each)]

    def mapped(self, change: Callable[[Sequence[Link]], Iterable[Link]]) -> "Findings":
        """Returns the same with every list of links changed, those of possible readings too."""
        ties = [
            dataclasses.replace(tie, readings=tuple(tuple(change(reading)) for reading in tie.readings))
            for tie in self.ties
        ]
        return Findings(links=list(change(self.links)), ties=ties, groups=self.groups)

    def add(self, other: "Findings") -> None:
        """Takes over what another context found."""
        self.links.extend(other.links)
        self.ties.extend(other.ties)
        self.groups.extend(other.groups)


_QKV = frozenset("qkv")


Turns = Mapping[tuple[object, ...], set[bool]]
"""Whether matrices are transposed, by what they share their arrangement with."""


def turns_told(links: Iterable[Link]) -> Turns:
    """Returns of which matrices shapes or names tell whether they are transposed."""
    found: dict[tuple[object, ...], set[bool]] = defaultdict(set)
    for link in links:
        for leaf, possible in link.by_part:
            turns, is_named = [way.turned for way in possible], any(way.named for way in possible[:-1])
            if (len(turns) == 1 or is_named) and _axes(leaf) > 1 and leaf.names[-1] != "embedding":
                for key in _keys(link, leaf):
                    found[("named", *key) if is_named else key].add(turns[0])
    return found


def settle_turns(links: Sequence[Link], known: Turns | None = None) -> tuple[list[Link], list[Link]]:
    """Returns the links of which it is decided whether square matrices are transposed, and the others.

    Matrices of the same block that are not square, and whose parameter has the same name, tell first; then
    those of the same model, also what is known of its others. Where there is none, two `kernel` are arranged
    alike: both have inputs first.
    """
    is_asked = any(len(possible) > 1 for link in links for possible in link.ways)
    evidence: Turns = turns_told(links) if is_asked else {}
    if known and is_asked:
        evidence = {**known, **{key: told | known.get(key, told) for key, told in evidence.items()}}
    settled, left = list[Link](), list[Link]()
    for link in links:
        # Nearly every one is told.
        is_told = link.grounds != "shapes" and all(len(possible) == 1 for possible in link.ways)
        chosen = [_chosen(link, *each, evidence) for each in link.by_part] if not is_told else []
        if None in chosen:
            left.append(link)
            continue
        made = tuple((way,) for way in chosen if way is not None)
        grounds = _grounds(link, made) if link.grounds == "shapes" else link.grounds
        settled.append(link if is_told else with_fields(link, ways=made, grounds=grounds))
    return settled, left


def _grounds(link: Link, made: Sequence[tuple[Way]]) -> PairGrounds:
    """Returns what tells how leaves are made that shapes alone pair."""
    if any(len(several) > 1 and way.turned for several, (way,) in zip(link.ways, made, strict=True)):
        return "siblings"
    found = [way for (way,) in made]
    if any(way.flattens for way in found):
        return "patch" if concepts(link.target.names).isdisjoint("qkv") else "names"  # Heads, in one order.
    return "names" if any(way.named for way in found) else "shapes"


def readings_of(link: Link) -> tuple[Link, ...]:
    """Returns a link with its square matrices as they are, and turned."""
    made = [[[w for w in ways if w.turned == t] or ways for ways in link.ways] for t in (False, True)]
    return tuple(dataclasses.replace(link, ways=tuple((ways[0],) for ways in each)) for each in made)


def simplest(links: Sequence[Link], known: Turns | None = None) -> list[Link]:
    """Returns links with the simplest way of each where nothing decides."""
    settled, left = settle_turns(links, known)
    return [*settled, *(readings_of(link)[0] for link in left)]


def _chosen(link: Link, leaf: Leaf, ways: tuple[Way, ...], evidence: Turns) -> Way | None:
    is_told = len(ways) == 1 or ("transpose" in leaf.done and not ways[0].steps)
    if is_told or ways[0].named is None:
        return ways[0] if is_told else None
    if (is_first := _are_outputs_first(link)) is not None:
        return next((way for way in ways if way.turned is is_first), None)
    is_named = bool(ways[0].named)
    turned, is_far = _told(link, leaf, evidence, is_named)
    if len(turned) == 1 and is_named and is_far and ways[0].turned not in turned:
        return None  # Against a name, only the matrices of its own block tell.
    if len(turned) == 1:
        return next((way for way in ways if way.turned in turned), None)
    if is_named:
        return ways[0]
    if turned and is_far:
        return None
    if any([step.kind for step in way.steps] == ["transpose"] for way in ways if not way.turned):
        # Where image axes come last, outputs come first: that is PyTorch's convention for both.
        return next((way for way in ways if way.turned), None)
    # A matrix keeps its own name on both sides; `weight` and `w` may be PyTorch's.
    is_kept = _last_name(leaf.names) == _last_name(link.target.names) not in PYTORCHS
    # Nor one, or a stack of them, where the model's stacks, or those that lie apart, are turned.
    others = [(*key[:2], 5 - _axes(leaf)) for key in _keys(link, leaf) if key[0] == "model"]
    if is_kept and not _are_squares(leaf) and not any(True in evidence.get(key, ()) for key in others):
        return next((way for way in ways if not way.turned), None)
    return None


def _told(link: Link, leaf: Leaf, evidence: Turns, is_named: bool) -> tuple[set[bool], bool]:
    """Returns what others of its name tell of a matrix, or those that are or are not called kernels."""
    turned, is_far = _nearest(keys := [*_keys(link, leaf)], evidence)
    if turned:
        return turned, is_far
    if not is_named:
        return _nearest([("named", *key) for key in keys], evidence)[0], False
    # What is called a kernel has outputs first where those do that the target calls so too.
    is_kernel = _last_name(leaf.names) == "kernel" != _last_name(link.target.names)
    return (_nearest(_keys(link, leaf, "kernel"), evidence)[0] if is_kernel else turned), False


def _nearest(keys: Iterable[tuple[object, ...]], evidence: Turns) -> tuple[set[bool], bool]:
    """Returns what the nearest matrices that agree tell, or those of the model; and whether it is these."""
    for key in keys:
        turned = evidence.get(key, set())
        if len(turned) == 1 or (turned and "model" in key):
            return turned, "model" in key
    return set(), False


def _are_outputs_first(link: Link) -> bool | None:
    """Tells whether kernels of one input lie along the first axis of a matrix, as in `in_proj_weight`."""
    parts, whole = (link.wanted, link.source) if link.is_split else (link.stored, link.target)
    if link.joint is None or link.joint.is_new or len(whole.shape) != 2:
        return None
    inputs, is_first = whole.shape[1 - link.joint.axis], link.joint.axis == 0
    ends = {(len(x.shape), x.shape[0] == inputs, x.shape[-1] == inputs) for x in parts}
    if ends in ({(3, True, False)}, {(3, False, True)}):
        return is_first is (ends == {(3, True, False)})  # Heads tell where inputs are.
    return is_first if all(part.names[-1] == "kernel" for part in parts) else None


def _are_squares(leaf: Leaf) -> bool:
    """Tells whether an array holds square matrices of many heads: more than a convolution has places."""
    is_stack = len(leaf.shape) == 3 and leaf.shape[2] == leaf.shape[1] <= leaf.shape[0] != leaf.shape[1] ** 2
    return is_stack and "conv" not in concepts(leaf.names)


def _last_name(names: Names) -> str:
    """Returns what a parameter is called; in a list, `weights/0`, as the list."""
    return next((name for name in reversed(names) if not name.isdecimal()), names[-1])


def _axes(leaf: Leaf) -> int:
    return sum(length != 1 for length in leaf.shape)


def _keys(link: Link, leaf: Leaf, wanted: str = "") -> Iterable[tuple[object, ...]]:
    """Yields what a matrix, or one of another name, shares its arrangement with: module, block, model."""
    # A part of a stack of parts has an axis less; heads that are joined to a matrix are one.
    is_new = link.joint is not None and link.joint.is_new
    ranks = _axes(leaf) - (is_new and link.is_split), _axes(link.target) - (is_new and not link.is_split)
    seat = max(link.levels[-1][0] + 1 if link.levels else 0, len(link.layers.stored) if link.layers else 0)
    bases, block = (tuple(level.base for level in levels(names)) for names in (leaf.names, leaf.names[:seat]))
    named = tuple(map(parameter_of, (_last_name(leaf.names), wanted or _last_name(link.target.names))))
    for rank in dict.fromkeys((ranks[0], min(ranks))):
        if not _QKV.isdisjoint(concepts(bases[-2:-1])):
            yield "qkv", bases[:-2], named, rank  # What leads out of an attention is no evidence.
        yield "module", bases[:-2], named, rank
        yield "block", block, named, rank
        yield "model", named, rank


def layers_of(links: Iterable[Link], *, stacks: bool) -> Mapping[Layers, list[Link]]:
    """Returns the links of layers that are stacked, or taken out of a stack, by their layers."""
    found: dict[Layers, list[Link]] = defaultdict(list)
    for link in links:
        if link.layers is not None and link.layers.stacks == stacks:
            found[link.layers].append(link)
    return found


def numbered(template: Names, number: int) -> Names:
    """Returns where a layer lies."""
    return tuple(name.replace("{i}", str(number)) for name in template)


Undecided = tuple[list[tuple[int, int]], set[tuple[int, int]]]
"""A choice among pairs of parts by their places, and all pairs among which it is one."""


def together(undecided: Iterable[Undecided]) -> Iterator[Undecided]:
    """Yields several ties among the same pairs as one."""
    ties: dict[int, list[Undecided]] = defaultdict(list)
    for item in undecided:
        ties[id(item[1])].append(item)
    for items in (each for each in ties.values() if len(each) > 1):
        yield [pair for tie, _ in items for pair in tie], items[0][1]


LayerPair = tuple[Names, Names, Mapping[Names, Leaf], Mapping[Names, Leaf]]
"""What leads into a layer on both sides, and its leaves by what their paths are below it."""


def in_all_layers(
    links: Iterable[Link], layers: Iterable[LayerPair], depths: tuple[int, int]
) -> Iterator[Link]:
    """Yields the links of one layer for all layers that look alike."""
    every = list(links)
    for wanted, stored, ours, theirs in layers:
        for link in every:
            yield with_fields(
                link,
                wanted=tuple(ours[leaf.names[depths[0] :]] for leaf in link.wanted),
                stored=tuple(theirs[leaf.names[depths[1] :]] for leaf in link.stored),
                layers=_layers_in(link.layers, wanted, stored),
            )


def _layers_in(layers: Layers | None, wanted: Names, stored: Names) -> Layers | None:
    """Returns a stack within one layer as that within another one."""
    if layers is None or len(layers.wanted) < len(wanted) or len(layers.stored) < len(stored):
        return layers
    return dataclasses.replace(
        layers,
        stored=(*stored, *layers.stored[len(stored) :]),
        wanted=(*wanted, *layers.wanted[len(wanted) :]),
    )


@dataclasses.dataclass
class Move:
    """One stored leaf on its way to a wanted path.

    Attributes:
        names: Its path now.
        aim: What it is to be called in the end.
        seats: The segments of both that count the same layers.
        link: What it belongs to.
        steps: What is still to be done with its shape.
    """

    names: Names
    aim: Names
    seats: list[tuple[int, int]]
    link: Link
    steps: Steps = ()

    def templates(self) -> Iterator[tuple[Names, Names]]:
        """Yields both paths with places for the numbers of layers: all, all but the innermost, and so on."""
        for count in range(len(self.seats), 0, -1):
            now, to = ([seat[side] for seat in self.seats[:count]] for side in (0, 1))
            yield with_places(self.names, now), with_places(self.aim, to)
        yield self.names, self.aim


def with_first(names: Names) -> Names:
    """Returns a path as that of the first layer: what is asked of 20,000 leaves is asked of one layer's."""
    at = next((at for at, name in enumerate(names) if name.isdecimal()), len(names))
    return (*names[:at], *("0" for _ in names[at : at + 1]), *names[at + 1 :])


def leads(template: Names, names: Names) -> bool:
    """Tells whether a template leads into a path."""
    at = len(template)
    return len(names) > at and compiled("/".join(template)).match(names[:at]) is not None


def led_into(template: Names, moves: Sequence[Move], index: PathIndex) -> list[int]:
    """Returns which moves a template leads into."""
    return [at for at in compiled("/".join(template)).within(index) if leads(template, moves[at].names)]


def alike(one: Names, other: Names) -> bool:
    """Tells whether two paths are one, however they spell the numbers of layers."""
    return one == other or canonical(one) == canonical(other)


def as_within(move: Move, head: int, led: int) -> Move:
    """Returns a leaf on its way to its name in a layer, the segments that lead there still as they are."""
    aim = (*move.names[:head], *move.aim[led:])
    seats = [(now, now if now < head else to + head - led) for now, to in move.seats]
    return dataclasses.replace(move, aim=aim, seats=seats)


def differing(move: Move) -> tuple[Names, Names]:
    """Returns what both paths do not share at either end, with places for numbers."""
    left, right = next(move.templates())
    after, before = shared_ends(left[::-1], right[::-1], 1)
    return left[before : len(left) - after], right[before : len(right) - after]
