"""What a proposal that fits leaves in doubt: another part may be meant, or have the source as well.

Last: the same link with another recipe, which outputs have proved.
"""

import dataclasses
import functools
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import NamedTuple

from orbax_nnx_handler.planning.core import recipes
from orbax_nnx_handler.planning.core.folding import around, plain_names
from orbax_nnx_handler.planning.core.paths import Path, canonical, is_number, segments
from orbax_nnx_handler.planning.core.recipes import Recipe, Shapes
from orbax_nnx_handler.planning.layouts.layout import is_copy_level
from orbax_nnx_handler.planning.likeness import in_list, norms_told, purposes
from orbax_nnx_handler.planning.likeness.arrangements import by_level
from orbax_nnx_handler.planning.likeness.assignment import fit_of, may_be, sizes_of_few
from orbax_nnx_handler.planning.likeness.links import Findings, Link, Tie
from orbax_nnx_handler.planning.likeness.module_parts import Leaf, ModulePart, module_parts, part_of
from orbax_nnx_handler.planning.likeness.named_parts import NamedPart, named_parts
from orbax_nnx_handler.planning.likeness.shapes import (
    Joint,
    Way,
    chain_of,
    cuts_of,
    is_vector,
    lifted,
    shaping,
)
from orbax_nnx_handler.planning.likeness.vocabulary import (
    MARGIN,
    PARAMETER,
    PLACING,
    STRONG,
    Concepts,
    Names,
    concepts,
    may_hold_otherwise,
    meanings,
    weight,
    words,
)
from orbax_nnx_handler.planning.mapping.roots import PLAIN_LEVELS
from orbax_nnx_handler.planning.suggesting.link_groups import tie_of

GENERAL = frozenset(("norm", "attn", "mlp", "enc", "dec", "conv", "head", "embed"))
"""Words that many parts of a model share."""


def wanted_twice(
    found: Findings, wanted: Sequence[Leaf], parts: Sequence[ModulePart], stored: Sequence[ModulePart]
) -> Iterator[Link]:
    """Yields links whose source a part that stays open might have as well: its own may be what is absent.

    Where that is a part of a module that Linen numbered, all parts of both modules are doubted.

    Args:
        found: What is known.
        wanted: All wanted leaves.
        parts: Their parts.
        stored: All stored ones.
    """
    known = {part_of(leaf) for link in found.every for leaf in link.wanted}
    is_whole = all(part_of(leaf) in known for leaf in wanted)
    lacking = [part for part in parts if not is_whole and part.names not in known]
    if not (sizes := {part.main_size for part in lacking}):
        return
    sides = [named_parts(side, sizes=sizes) for side in (parts, stored)]
    ours, theirs = ({role.part.names: role for role in side} for side in sides)
    plain = [(link, part_of(link.target), part_of(link.source)) for link in found.links if link.joint is None]
    roles = {(x, y): (ours[x], theirs[y]) for _, x, y in plain if x in ours and y in theirs}
    near = defaultdict[int, list[tuple[tuple[int, ...], NamedPart]]](list)
    for part in lacking:
        near[part.main_size].append((_numbers(ours[part.names], end=-1), ours[part.names]))
    counts = Counter(part.main_size for part in lacking), Counter(x.part.main_size for x, _ in roles.values())
    few = sizes_of_few(counts)
    doubted, modules = set[tuple[Names, Names]](), set[Names]()
    for pair, (one, other) in roles.items():
        is_counted = any(level.is_automatic for level in other.part.levels[-2:-1])
        # What is stored in no layer is none of another layer's; of many parts, those of one are compared.
        layers, size = {_numbers(one, end=-1), ()}, one.part.main_size
        is_any = size in few and bool(_numbers(other, end=-1))
        for its, role in near[size]:
            if (is_any or its in layers) and _may_have(role, one, other):
                doubted.add(pair)
                if is_counted and pair[0][-1] == role.part.names[-1]:
                    modules |= {pair[0][:-1], role.part.names[:-1]}
    yield from (link for link, *pair in plain if tuple(pair) in doubted or pair[0][:-1] in modules)


def _numbers(role: NamedPart, end: int | None = None) -> tuple[int, ...]:
    return tuple(level.number for level in role.part.levels[:end] if level.number is not None)


def _may_have(role: NamedPart, one: NamedPart, other: NamedPart) -> bool:
    """Tells whether a stored part may be made into another part as well as into the one it is known to be."""
    now, then = fit_of(one, other), fit_of(role, other)
    if now is None or then is None:
        return False
    numbers = _numbers(other)
    is_its = _numbers(one)[: len(numbers)] == numbers != _numbers(role)[: len(numbers)]
    if then.score + MARGIN >= now.score and may_be(then, role, other) and not is_its:
        return True
    untold = one.said & other.said - other.part.own
    if role.part.module == one.part.module and "gate" in role.said and "up" in untold:
        return True  # Numbers tell which layer leads up in a network without a gate.
    ours, own, theirs = (_telling(each.part.names) for each in (role, one, other))
    return bool(theirs & ours - own) and not theirs & own - ours


@functools.lru_cache(maxsize=65536)
def _telling(names: Names) -> frozenset[str]:
    """Returns the words of a path that say more than what many parts are; a letter may only count."""
    said = (word for name in names for word in words(name) if word.isalpha())
    said = (word for word in said if len(word) > 1 or word in STRONG)
    return frozenset(word for word in said if not meanings(word) or {*meanings(word)} - GENERAL)


# What may be a copy.


def apart_from_copies(links: Sequence[Link], stored: Iterable[Leaf]) -> tuple[list[Link], list[Tie]]:
    """Returns the links, and as questions those of what may be a copy, or may hold its parts otherwise.

    A copy is what is called one, `unet_ema`, and a module of one name that is wanted twice and stored once.
    Further questions are which levels on the way up of a U-Net are which.
    """

    def is_copied(names: Iterable[object]) -> bool:
        return any(map(_is_copied, map(str, names)))

    links, levels = by_level(links)
    doubled, used = _doubled(links), {leaf.part for link in links for leaf in link.stored}
    free = {x.names[-2:] for x in stored if x.part not in used and not is_copied(x.names)}
    every = {link.source.names for link in links}
    plain = every - copied if (copied := {names for names in every if is_copied(names)}) else copied
    originals = {tuple(map(words, names[:at])) for names in plain for at in range(len(names))}

    def has_original(names: Names) -> bool:
        """Tells whether what a module is called a copy of is used too: `actor` of `actor_target`."""
        at = next((at for at, name in enumerate(names) if is_copied([name])), 0)
        left = tuple(word for word in words(names[at]) if not is_copied([word]))
        return (*map(words, names[:at]), left) in originals

    kinds: dict[str, list[Link]] = defaultdict(list)
    for link in links:
        names, is_stored = link.target.names[:-1], any(is_copied(leaf.source) for leaf in link.stored)
        copies = [name for name in names if is_copy_level(name)]
        said = words("/".join(link.source.names)) if copies else ()  # RAFT's `mask` is a `mask_head`.
        is_copy = not is_stored and any(not {*words(name)} <= {*said} for name in copies)
        is_beside = link.source.names[-2:] in free or has_original(link.source.names)
        is_taken = is_stored and not is_copied(names) and is_beside
        kind = "lent" if is_copy or link.target.source in doubled else "taken" if is_taken else ""
        kinds["held" if may_hold_otherwise(names, link.source.names[:-1]) else kind].append(link)
    return kinds.pop("", []), [*map(tie_of, levels), *(tie_of([some]) for some in kinds.values())]


@functools.lru_cache(maxsize=65536)
def _is_copied(name: str) -> bool:
    return is_copy_level(name) or "tgt" in meanings(name)


def _doubled(links: Iterable[Link]) -> set[Path]:
    """Returns the wanted leaves that have module, name and source of another one; not the model's."""
    found: dict[tuple[tuple[Path, Names], Names], list[Link]] = defaultdict(list)
    for link in links:
        if link.joint is None and link.layers is None and len(link.target.names) > 2:
            found[link.source.part, link.target.names[-2:]].append(link)
    alike = (x for x in found.values() if len(x) > 1 and x[0].source.names[-2:] == x[0].target.names[-2:])
    every = itertools.chain.from_iterable(alike)
    return {x.target.source for x in every if not PLAIN_LEVELS.issuperset(x.target.names[:-2])}


# What the names of parts have to share.

_KINDS = concepts(("norm", "token", "embed", "head", "conv", "bias", "enc", "dec"))
_OF_ANY = _KINDS | (PLACING - {"attn", "mlp", "self", "cross"})
"""What many parts are, and that they are first or last: what one side may say and the other not."""


class _Said(NamedTuple):
    """What only the wanted and what only the stored name says; whether they share a word that tells."""

    only: tuple[Concepts, Concepts]
    is_shared: bool


def strangers(links: Iterable[Link]) -> Iterator[Link]:
    """Yields links of parts that shapes do not tell, whose names share no more than what kind they are.

    A vector is as long as any other one of its model, and a square matrix as large: a new `mask_token` fits
    an old `dist_token`, a `q_norm` the norm of a head. Both names say something that the other one lacks;
    for a vector in no list it is enough that one does. Words that one side lacks in other parts too, which
    are told, say nothing, nor do the names of modules that hold such parts.
    """
    parts = defaultdict[tuple[Names, Names], list[Link]](list)
    for link in links:
        for one, other in itertools.product(link.wanted, link.stored):
            parts[part_of(one), part_of(other)].append(link)
    called = {pair: _names(some[0]) for pair, some in parts.items()}
    said = {pair: _said(*names) for pair, names in called.items()}
    told = {pair for pair, some in parts.items() if said[pair].is_shared or _are_told(pair, some)}
    told |= _norms_of(told, parts) if len(told) < len(parts) else set()
    kinds = {tuple(map(plain_names, pair)): said[pair].only for pair in told}
    lacking = [frozenset[str]().union(*(only[side] for only in kinds.values())) for side in (0, 1)]
    known = [{pair[side] for pair in told} for side in (0, 1)]
    modules = {both for pair in told for both in itertools.product(*map(around, pair))}
    for pair, some in parts.items():
        if pair in told:
            continue
        left = [only - others for only, others in zip(said[pair].only, lacking, strict=True)]
        left = [set[str]() if pair[side] in known[side] else left[side] for side in (0, 1)]
        if (pair[0][:-1], pair[1][:-1]) in modules:
            left = [left[side] & concepts(called[pair][side][len(pair[side]) - 1 :]) for side in (0, 1)]
        is_lone = not any(in_list(x)[0] for x in pair) and all(is_vector(link.source.shape) for link in some)
        if all(left) or (is_lone and any(left)):
            yield from (x for x in some if x.joint is None and x.layers is None and not x.copied)


def _norms_of(
    told: Set[tuple[Names, Names]], parts: Mapping[tuple[Names, Names], Sequence[Link]]
) -> set[tuple[Names, Names]]:
    """Returns the norms of layers that are told."""
    links = [*itertools.chain(*parts.values())]
    leaves = ((x for link in links for x in link.wanted), (x for link in links for x in link.stored))
    sides = [module_parts(dict.fromkeys(side)) for side in leaves]
    ours, theirs = ({part.names: at for at, part in enumerate(side)} for side in sides)
    pairs = [(ours[one], theirs[other]) for one, other in told if one in ours and other in theirs]
    return {(sides[0][at].names, sides[1][to].names) for at, to in norms_told(pairs, sides).items()}


def _are_told(pair: tuple[Names, Names], links: Sequence[Link]) -> bool:
    """Tells whether shapes tell parts, what heads are for, or the order of some that are in no list."""
    one, other = map(purposes, pair)
    # Whether heads for something are each other's, another law says.
    are_heads = one & other or (one | other and "head" in concepts(pair[0]) & concepts(pair[1]))
    is_inside, shapes = any(in_list(x)[0] for x in pair), [link.source.shape for link in links]
    is_ordered = not is_inside and all(link.grounds == "order" for link in links)
    is_kernel = any(len(x.source.shape) > 1 and x.source.names[-1] == "kernel" for x in links)
    if all(map(is_vector, shapes)):
        return bool(are_heads) or is_ordered or is_kernel
    is_raw = all(part_of(x) == x.names for link in links for x in (link.target, link.source))
    are_square = all(is_vector(shape) or shape == shape[:1] * 2 for shape in shapes)
    return bool(are_heads) or is_inside or is_ordered or not (is_raw or are_square)


def _names(link: Link) -> tuple[Names, Names]:
    """Returns what a link's leaves are called, without the words for a module's usual parameters."""
    one, other = (x.names[: -(x.names[-1] in PARAMETER) or None] for x in (link.target, link.source))
    return one, other


@functools.lru_cache(maxsize=1 << 16)
def _said(wanted: Names, stored: Names) -> _Said:
    sides = ours, theirs = _own(wanted), _own(stored)
    one, other = ours - theirs, theirs - ours
    begun = any(x.startswith(y) or y.startswith(x) for x in one for y in other if min(len(x), len(y)) > 1)
    is_short = not (one.isdisjoint(_in_short(stored)) and other.isdisjoint(_in_short(wanted)))
    is_shared = begun or is_short or not ours & theirs <= _KINDS | PLACING
    # Where both only say where they are in a block, that has decided; a letter alone says nothing.
    return _Said((one - _OF_ANY, other - _OF_ANY), is_shared or not all(sides) or one | other <= PLACING)


def _own(names: Names) -> Concepts:
    """Returns what names say; a letter that is none of an attention may stand for anything."""
    letters = (word for name in names for word in words(name) if len(word) == 1 and word not in STRONG)
    return concepts(names) - concepts(letters)


def _in_short(names: Names) -> set[str]:
    """Returns what words may be in short: `sa` of `SelfAttention`, `lnf` of `ln_f`."""
    several = [x[at:to] for x in map(words, names) for to in range(len(x) + 1) for at in range(to - 1)]
    return {"".join(word[:width] for word in some) for some in several for width in (1, None)}


# What names say of a value.

_SPELLINGS = "log logs,exp,inverse inv,squared square sq,sqrt,rsqrt,neg negated,raw,softplus,keep,drop"
_FUNCTIONS = {word: each.split()[0] for each in _SPELLINGS.split(",") for word in each.split()}
"""Words that say which function of a value is held, or which share of it."""


def unlike_names(links: Sequence[Link]) -> Iterator[Link]:
    """Yields links of parts whose names are strangers, or say that they hold other functions of a value."""
    yield from strangers(links)
    for link in links:
        pairs = ((x.names, y.names) for x in link.wanted for y in link.stored)
        if any(any(_functions(*both)) for both in pairs if any(map(_holds_function, (*both[0], *both[1])))):
            yield link


@functools.lru_cache(maxsize=1 << 16)
def _holds_function(name: str) -> bool:
    return any(word in name.lower() for word in _FUNCTIONS)  # Nearly no name does.


def why_unlike(wanted: Path, stored: Path) -> str:
    """Returns what the names of two leaves that shapes allow say against it, or that they say nothing."""
    said = [" ".join(sorted(some)) for some in _functions(segments(wanted), segments(stored)) if some]
    if not said:
        return "and no name tells"
    called = (
        f"only one is called {said[0]}" if len(said) == 1 else f"one is called {', the other '.join(said)}"
    )
    return f"but {called}: the value may be another function"


@functools.lru_cache(maxsize=1 << 16)
def _functions(wanted: Names, stored: Names) -> tuple[Set[str], Set[str]]:
    """Returns of which function of a value the name of each of two leaves is, where the other's is not.

    `log_std` is no `std`, and what is kept is not what is dropped. Of a layer, which returns the value, it
    is told where nothing but that word differs: `fc_logvar` and `fc_var`.
    """
    names = [_own_name(wanted), _own_name(stored)]
    said = [_with_functions(*names), _with_functions(*names[::-1])]
    one, other = ({_FUNCTIONS[word] for word in each & _FUNCTIONS.keys()} for each in said)
    is_raw = any(part[-1] not in PARAMETER for part in (wanted, stored))
    if not is_raw or all("expand" in concepts([name]) for name in names):
        one, other = one - {"exp"}, other - {"exp"}  # MobileNet's `conv_exp` expands.
    plain = [concepts(each - _FUNCTIONS.keys()) for each in said]
    if not is_raw and plain[0] != plain[1]:
        return set(), set()
    # The module around the other one may say so too: `log_scale/constant`.
    paths = [
        _with_functions("_".join(x), name) for x, name in zip((wanted, stored), names[::-1], strict=True)
    ]
    around = [{_FUNCTIONS[word] for word in each & _FUNCTIONS.keys()} for each in paths]
    return one - around[1], other - around[0]


def _own_name(names: Names) -> str:
    """Returns what a leaf is called, or the module whose parameter it is, without numbers."""
    called = [name for name in names if not name.isdecimal()]
    return "_".join(called[-1 - (names[-1] in PARAMETER) :])


def _with_functions(name: str, other: str) -> set[str]:
    """Returns the words of a name; of `logvar` two, where `var` is known or a word of the other one."""
    found = set[str]()
    for word in words(name):
        rest = word.removeprefix("log")
        is_log = len(rest) > 2 and (rest in words(other) or all(weight(x) > 1 for x in meanings(rest)))
        found |= {"log", rest} if word != rest and is_log else {word}
    return found


# Another recipe than the one that was found.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Remade:
    """A wanted leaf that is made otherwise than was thought; the layer is told where it is scanned."""

    leaf: Path
    layer: int | None
    recipe: Recipe


def remade_links(links: Sequence[Link], changes: Sequence[Remade], shapes: Shapes) -> list[Link]:
    """Returns links under which some leaves are made otherwise, and those alike in other layers too.

    A change that moves weights from one module to another changes its own leaf alone, and one that no
    link can say changes none.
    """
    found, settled = list(links), set[int]()
    for change in changes:
        for at, link in enumerate(found):
            # Among the links as they were: two that change places are still known.
            if (other := _remade(link, change, links, shapes)) is None:
                continue
            settled.add(at)
            order = [link.stored.index(leaf) for leaf in other.stored if leaf in link.stored]
            for to, like in enumerate(found):
                if to not in settled and len(order) == len(link.stored) and _looks(like) == _looks(link):
                    stored = tuple(like.stored[number] for number in order)
                    found[to] = dataclasses.replace(
                        like, stored=stored, ways=other.ways, joint=other.joint, after=other.after
                    )
            found[at] = other
            break
    return found


def _looks(link: Link) -> tuple[object, ...]:
    """Returns what the links of one leaf in all layers share."""
    sides = ([_template(leaf) for leaf in side] for side in (link.wanted, link.stored))
    return link.ways, link.joint, link.after, *sides


def _template(leaf: Leaf) -> tuple[str, ...]:
    return tuple(token for token in canonical(leaf.names) if not is_number(token))


def _remade(link: Link, change: Remade, every: Sequence[Link], shapes: Shapes) -> Link | None:
    part = next((at for at, leaf in enumerate(link.wanted) if leaf.source == change.leaf), None)
    layers = link.layers
    if part is None or link.source.made or not shapes.keys() >= {*recipes.reads(change.recipe)}:
        return None
    if layers is not None and layers.stacks and change.layer not in (None, link.layer):
        return None
    whole, after = chain_of(change.recipe)
    if isinstance(whole, recipes.Concat | recipes.Stack):
        return _rejoined(link, whole, after, shapes)
    if link.joint is not None and not link.is_split:
        return None
    steps = shaping(after, shapes)
    cuts, source = cuts_of(whole)
    if source is None:
        return None
    if link.is_split:
        assert link.joint is not None
        if source != link.source.source or len(cuts) != 1 or link.joint.part_at(cuts[0]) != part:
            return None
        return dataclasses.replace(link, ways=(*link.ways[:part], (Way(steps),), *link.ways[part + 1 :]))
    if cuts and layers is None:
        found = lifted(cuts, steps, shapes[source], link.wanted[part].shape)
        if found is None:
            return None
        steps = found
    stored = next(
        (x for one in every if one.layers == layers for x in one.stored if x.source == source), None
    )
    return None if stored is None else dataclasses.replace(link, stored=(stored,), ways=((Way(steps),),))


def _rejoined(
    link: Link, whole: recipes.Concat | recipes.Stack, after: Sequence[Recipe], shapes: Shapes
) -> Link | None:
    """Returns a fuse of the same parts in another order, each or the whole shaped otherwise."""
    sources = [leaf.source for leaf in link.stored]
    parts = [chain_of(part) for part in whole.sources]
    reads = [cuts_of(part)[1] for part, _ in parts]
    if link.joint is None or link.is_split or len({*sources}) < len(sources) or {*reads} != {*sources}:
        return None
    order = [sources.index(path) for path in reads if path is not None]
    sizes = link.joint.sizes
    ways = tuple((Way(shaping(steps, shapes)),) for _, steps in parts)
    joint = Joint(
        whole.axis,
        isinstance(whole, recipes.Stack),
        tuple(sizes[at] for at in order) if sizes is not None else None,
        ways,
    )
    stored = tuple(link.stored[at] for at in order)
    return dataclasses.replace(link, stored=stored, ways=ways, joint=joint, after=shaping(after, shapes))
