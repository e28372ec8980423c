"""What the names of two leaves that shapes allow say against it.

They share no more than what kind they are, they alone differ among those beside them, or they say that
they hold other functions of a value.
"""

import functools
import itertools
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence, Set
from typing import NamedTuple

from orbax_nnx_handler.planning.core.folding import around, plain_names
from orbax_nnx_handler.planning.core.paths import Path, levels, segments
from orbax_nnx_handler.planning.likeness import Couples, in_list, is_as_wide, purposes
from orbax_nnx_handler.planning.likeness.linked_modules import LinksByParts
from orbax_nnx_handler.planning.likeness.links import Link
from orbax_nnx_handler.planning.likeness.module_parts import ModulePart, part_of
from orbax_nnx_handler.planning.likeness.shapes import is_vector
from orbax_nnx_handler.planning.likeness.vocabulary import (
    PARAMETER,
    PLACING,
    STRONG,
    Concepts,
    Names,
    concepts,
    exclude,
    meanings,
    weight,
    words,
)

# What the names of parts have to share.

_KINDS = concepts(("norm", "token", "embed", "head", "conv", "bias", "enc", "dec"))
_OF_ANY = _KINDS | (PLACING - {"attn", "mlp", "self", "cross"})
"""What many parts are, and that they are first or last: what one side may say and the other not."""
_UNSURE = PLACING | STRONG | {"head", "embed"}
"""What is said of parts that are each other's all the same, or of modules at other depths: a Q is a `value`,
a tied table a head, and what is called an attention, or leads out, holds a network and what leads in."""


class _Said(NamedTuple):
    """What only the wanted and what only the stored name says; whether they share a word or are opposites."""

    only: tuple[Concepts, Concepts]
    is_shared: bool
    is_short: bool
    are_opposites: bool


def strangers(parts: LinksByParts, wanted: Sequence[ModulePart], norms: Sequence[Couples]) -> Iterator[Link]:
    """Yields links of parts that shapes do not tell, whose names share no more than what kind they are.

    A vector is as long as any other one of its model, and a square matrix as large: a new `mask_token` fits
    an old `dist_token`, a `q_norm` the norm of a head. Both names say something that the other one lacks;
    for a vector in no list it is enough that one does. Words that one side lacks in other parts too, which
    are told, say nothing, nor do the names of modules that hold such parts.
    """
    called = {pair: _names(some[0]) for pair, some in parts.items()}
    said = {pair: _said(*map(plain_names, names)) for pair, names in called.items()}
    for pair in (pair for pair in parts if said[pair].are_opposites and parts[pair][0].grounds != "fact"):
        yield from (link for link in parts[pair] if link.joint is None)
    told = {pair for pair, some in parts.items() if said[pair].is_shared or _are_told(pair, some)}
    if len(told) == len(parts):
        return
    told |= {*_norms_of(told, wanted, norms)} & parts.keys()
    kinds = {said[pair].only for pair in told}
    lacking = [frozenset[str]().union(*(only[side] for only in kinds)) for side in (0, 1)]
    known = [{pair[side] for pair in told} for side in (0, 1)]
    doubted = dict[tuple[Names, Names], list[Concepts]]()
    for pair in (x for x in parts if x not in told):
        left = [only - others for only, others in zip(said[pair].only, lacking, strict=True)]
        left = [frozenset[str]() if pair[side] in known[side] else left[side] for side in (0, 1)]
        if any(left):
            doubted[pair] = left
    modules = {both for pair in (told if doubted else ()) for both in itertools.product(*map(around, pair))}
    for pair, left in doubted.items():
        some = parts[pair]
        if (pair[0][:-1], pair[1][:-1]) in modules:
            left = [left[side] & concepts(called[pair][side][len(pair[side]) - 1 :]) for side in (0, 1)]
        is_lone = not any(in_list(x)[0] for x in pair) and all(is_vector(link.source.shape) for link in some)
        if all(left) or (is_lone and any(left)):
            yield from (x for x in some if x.joint is None and x.layers is None and not x.copied)


def _norms_of(
    told: Set[tuple[Names, Names]], parts: Sequence[ModulePart], norms: Sequence[Couples]
) -> Iterator[tuple[Names, Names]]:
    """Yields the norms of layers that are told."""
    layers = {part.names: part for part in parts}
    for pair in told:
        one, other = norms[0].get(pair[0]), norms[1].get(pair[1])
        if one is not None and other is not None and is_as_wide(one, layers[pair[0]]):
            yield one.names, other.names


def _are_told(pair: tuple[Names, Names], links: Sequence[Link]) -> bool:
    """Tells whether shapes tell parts, what heads are for, or the order of some that are in no list."""
    is_inside, shapes = any(in_list(x)[0] for x in pair), [link.source.shape for link in links]
    is_ordered = not is_inside and all(link.grounds == "order" for link in links)
    if all(map(is_vector, shapes)):
        if is_ordered or any(len(x.source.shape) > 1 and x.source.names[-1] == "kernel" for x in links):
            return True
    else:
        is_raw = all(part_of(x) == x.names for link in links for x in (link.target, link.source))
        are_square = all(is_vector(shape) or shape == shape[:1] * 2 for shape in shapes)
        if is_inside or is_ordered or not (is_raw or are_square):
            return True
    # Whether heads for something are each other's, another law says.
    one, other = map(purposes, pair)
    return bool(one & other or (one | other and "head" in concepts(pair[0]) & concepts(pair[1])))


def _names(link: Link) -> tuple[Names, Names]:
    """Returns what a link's leaves are called, without the words for a module's usual parameters."""
    one, other = (x.names[: -(x.names[-1] in PARAMETER) or None] for x in (link.target, link.source))
    return one, other


@functools.lru_cache(maxsize=1 << 16)
def _said(wanted: Names, stored: Names) -> _Said:
    sides = ours, theirs = _own(wanted), _own(stored)
    one, other = ours - theirs, theirs - ours
    begun = any(x.startswith(y) or y.startswith(x) for x in one for y in other if min(len(x), len(y)) > 1)
    is_short = begun or not (one.isdisjoint(_in_short(stored)) and other.isdisjoint(_in_short(wanted)))
    is_shared = is_short or not ours & theirs <= _KINDS | PLACING
    # Where both only say where they are in a block, that has decided; a letter alone says nothing.
    return _Said(
        (one - _OF_ANY, other - _OF_ANY),
        is_shared or not all(sides) or one | other <= PLACING,
        is_short,
        _are_of_opposites(ours, theirs) or _are_norms_of_ends(wanted, stored),
    )


def _are_norms_of_ends(wanted: Names, stored: Names) -> bool:
    """Tells whether one of two norms in no layer is the last, an `encoder_norm`, and the other the first."""
    one, other = ({*meanings(x[-1])} if x and not in_list(x)[0] else set[str]() for x in (wanted, stored))
    is_known = "norm" in one & other and (one | other).isdisjoint(("attn", "mlp", "self", "cross"))
    ends = [(x & {"embed", "pre"}, x & {"enc", "dec", "last"}) for x in (one, other) if is_known]
    return any(bool(x[0] and y[1]) and not (x[1] or y[0]) for x, y in itertools.permutations(ends, 2))


def _are_of_opposites(ours: Concepts, theirs: Concepts) -> bool:
    """Tells whether of two parts, or of the modules around them, one is called what the other never is.

    What leads from `a` to `b` does not lead back: `gen_ab` and `gen_ba`.
    """
    one, other = ours - theirs, theirs - ours
    if any(len(word) == 2 and word[::-1] in other for word in one):
        return True
    # Where a norm stands in its block, order tells.
    return "norm" not in ours | theirs and exclude(ours - _UNSURE, theirs - _UNSURE)


def _own(names: Names) -> Concepts:
    """Returns what names say; a letter that is none of an attention may stand for anything."""
    letters = (word for name in names for word in words(name) if len(word) == 1 and word not in STRONG)
    return concepts(names) - concepts(letters)


def _in_short(names: Names) -> frozenset[str]:
    return frozenset[str]().union(*map(_short_forms, names))


@functools.lru_cache(maxsize=65536)
def _short_forms(name: str) -> frozenset[str]:
    """Returns what words of a name may be in short: `sa` of `SelfAttention`, `lnf` of `ln_f`."""
    every = words(name)
    several = [every[at:to] for to in range(len(every) + 1) for at in range(to - 1)]
    return frozenset("".join(word[:width] for word in some) for some in several for width in (1, None))


# What is called otherwise than all beside it.

_CELLS = frozenset(("lstm", "gru", "rnn", "cell"))
_LOOKS = frozenset(("embed", "conv"))  # What a kernel of images is called by its shape.


def called_otherwise(parts: LinksByParts) -> Iterator[Link]:
    """Yields links of parts, or of modules around them, that are called another than they are made of.

    Where all beside them has one name on both sides, a `cost` that is left is no `reward`, though nothing
    else has its shape. Nor is a `cost_head` a `reward_head` anywhere, nor one of some `heads` another one:
    both are called alike what they are, and differently which one. Not where a word stands for another one in
    several parts, nor where a module holds parts that are called the same on both sides, and as nothing else
    of the model; and what the only convolution of images is, its shape tells.
    """
    odd = defaultdict[tuple[Names, Names], list[tuple[Names, Names]]](list)
    for pair in parts:
        one, other = _differing(*pair)
        if one and other and _is_another(one[-1], other[-1]):
            odd[one, other].append(pair)
    networks = _networks_called_otherwise(parts, odd)
    odd.update(networks)
    inside = _inside({*odd} | {(one[:-1], other[:-1]) for one, other in odd}, parts)
    images = {pair for pair, some in parts.items() if any(len(link.source.shape) == 4 for link in some)}
    renamed = Counter({tuple(map(plain_names, pair)): _renamed(*pair) for pair in odd}.values())
    for (one, other), held in odd.items():
        at, to = len(one) - 1, len(other) - 1
        every = {(x[at], y[to]) for x, y in inside[one[:-1], other[:-1]]}
        names = [x for x in every if x[0] != one[-1] and x[1] != other[-1]]
        is_alone = bool(names) and _are_called_alike(*zip(*names, (one[-1], other[-1]), strict=True))
        is_told = renamed[_renamed(one, other)] > 1 or _hold_own(one, other, inside[one, other], parts)
        has_form = _has_form(one[-1], other[-1])
        is_told |= images == {*held} and not (has_form and _LOOKS.isdisjoint(concepts(one) & concepts(other)))
        if (one, other) in networks:
            is_told |= len(every) > len(names) + 1 or not (is_alone or has_form)
        held_by = [concepts(x[-2:-1]) for x in (one, other) if not in_list(x)[0]]
        is_of_heads = len(held_by) == 2 and all(frozenset() < x <= {"head", "out"} for x in held_by)
        if (is_alone or is_of_heads or has_form) and not is_told:
            yield from (x for pair in held for x in parts[pair] if x.joint is None and not x.copied)


def _networks_called_otherwise(
    parts: Iterable[tuple[Names, Names]], known: Container[tuple[Names, Names]]
) -> Mapping[tuple[Names, Names], list[tuple[Names, Names]]]:
    """Returns the parts of the outermost modules that are called otherwise, as all that they hold may be."""
    found = defaultdict[tuple[Names, Names], list[tuple[Names, Names]]](list)
    for one, other in parts:
        at = next((at for at, (x, y) in enumerate(zip(one, other, strict=False)) if x != y), len(one))
        if at + 1 < min(len(one), len(other)) and _is_another(one[at], other[at]):
            found[one[: at + 1], other[: at + 1]].append((one, other))
    return {x: held for x, held in found.items() if x not in known and not _share_names(*x, held)}


def _share_names(one: Names, other: Names, held: Iterable[tuple[Names, Names]]) -> bool:
    """Tells whether one of two modules is called by a letter, or a part in both by the same word."""
    is_letter = any(len(word) == 1 for word in (*words(one[-1]), *words(other[-1])))
    if is_letter or _has_form(one[-1], other[-1]):
        return is_letter
    inside = (({*words("_".join(x[len(one) :]))}, {*words("_".join(y[len(other) :]))}) for x, y in held)
    return any(word.isalpha() for both in inside for word in both[0] & both[1])


def _differing(one: Names, other: Names) -> tuple[Names, Names]:
    """Returns both paths without the names at their end that are the same."""
    pairs = zip(reversed(one), reversed(other), strict=False)
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return one[: len(one) - same], other[: len(other) - same]


def _inside(
    modules: Set[tuple[Names, Names]], parts: LinksByParts
) -> Mapping[tuple[Names, Names], Sequence[tuple[Names, Names]]]:
    """Returns the parts that lie in some modules on both sides."""
    found = defaultdict[tuple[Names, Names], list[tuple[Names, Names]]](list)
    depths = {(len(one), len(other)) for one, other in modules}
    for (one, other), (at, to) in itertools.product(parts, depths):
        if at < len(one) and to < len(other) and (both := (one[:at], other[:to])) in modules:
            found[both].append((one, other))
    return found


def _renamed(one: Names, other: Names) -> tuple[Concepts, Concepts]:
    return _said(one[-1:], other[-1:]).only


def _hold_own(
    one: Names, other: Names, held: Iterable[tuple[Names, Names]], parts: Iterable[tuple[Names, Names]]
) -> bool:
    """Tells whether a word of both sides says which parts two modules hold, and no other part has it."""
    kind = plain_names(one)
    inside = (concepts(part[len(one) :]) & concepts(source[len(other) :]) for part, source in held)
    own = {word for said in inside for word in said if weight(word) == 1}
    others = (part for part, _ in parts if own and plain_names(part)[: len(kind)] != kind)
    return bool(own - concepts(itertools.chain(*others)))


def _are_called_alike(ours: Names, theirs: Names) -> bool:
    """Tells whether all parts but the last are called the same, but for what all of a side begin with."""
    sides = [[words(name) for name in side] for side in (ours, theirs)]
    pairs = (zip(*side, strict=False) for side in sides)
    shared = [sum(1 for _ in itertools.takewhile(lambda x: len({*x}) == 1, each)) for each in pairs]
    one, other = ([name[at:] for name in side] for side, at in zip(sides, shared, strict=True))
    return ours[:-1] == theirs[:-1] or (all(one) and all(other) and one[:-1] == other[:-1])


@functools.lru_cache(maxsize=1 << 16)
def _is_another(one: str, other: str) -> bool:
    """Tells whether two names share no word that tells, and each says something that the other one lacks."""
    said = _said((one,), (other,))
    kinds = [concepts([x]) for x in (one, other)]
    are_heads = "head" in kinds[0] & kinds[1]  # A place may tell: `start_head` and `answerable_head`.
    is_bare = frozenset(("head",)) in kinds
    if are_heads and is_bare and 1 in (len(words(one)), len(words(other))):
        return any(only - {"cls"} for only in said.only)  # An `aux_classifier` is not the classifier.
    is_any = (is_form := _has_form(one, other)) and are_heads and not is_bare
    left = (only - _CELLS - {"gate"} for only in said.only)
    return not (said.is_short if is_form else said.is_shared) and (any if is_any else all)(left)


_LAYER = frozenset(("head", "proj", "projection", "projector", "layer", "linear", "dense", "fc", "pred"))


def _has_form(one: str, other: str) -> bool:
    """Tells whether two names end in the same word, and have as many words before it, all other ones.

    Whatever word says that they are a layer: `reward_head` and `cost_proj`.
    """
    sides = [[word for word in words(name) if word.isalpha()] for name in (one, other)]
    sides = [[*x[:-1], "layer"] if {*x[-1:]} & _LAYER else x for x in sides]
    same = [len({*pair}) == 1 for pair in itertools.zip_longest(*sides)]
    return len(same) > 1 and same[-1] and not any(same[:-1])


# Where names say that a part lies.

_PLACES = frozenset(("attn", "mlp", "cross", "self", "pre", "post", "first", "last", "in", "downsample"))
_INWARDS, _OUTWARDS = frozenset(("in", "up", "gate", "q", "k", "v")), frozenset(("out", "down", "o"))
_TABLES = frozenset(("pos", "type", "rel", "q"))
_OF_TABLES = _TABLES | frozenset(("embed", "token", "in", "out", "shared", "attn", "bias"))
_OTHERS = {
    "1": frozenset(("mlp", "post", "last", "downsample", "cross")),
    "2": frozenset(("attn", "pre", "in", "first", "downsample")),
    "3": frozenset(("attn", "pre", "in", "first", "downsample", "cross")),
}
"""What the first norms of a block are not; the second one may be a cross-attention's."""


@functools.lru_cache(maxsize=1 << 16)
def _lie_elsewhere(wanted: Names, stored: Names) -> bool:
    """Tells whether the names of two parts say that these lie, or lead, elsewhere: none is the other one.

    A norm before an attention is none behind it, a table of positions none of tokens, and what leads into
    a network does not lead out of it. Of what Linen numbered, no name says anything.
    """
    ends = "".join(wanted[-1:]), "".join(stored[-1:])
    if any(level.is_automatic for name in ends for level in levels((name,))):
        return False
    (one, other), around = [concepts([name]) for name in ends], (concepts(wanted), concepts(stored))
    if "norm" in one & other:
        return _stand_elsewhere(ends, [one, other], around)
    if "embed" in one | other <= _OF_TABLES:
        left, right = one & _TABLES, other & _TABLES
        return bool(left | right) and around[0].isdisjoint(right) and around[1].isdisjoint(left)
    # A `value` may be of a network that judges states.
    said = (x - {"v"} if "val" in name else x for x, name in zip((one, other), ends, strict=True))
    leads = [(not x.isdisjoint(_INWARDS), not x.isdisjoint(_OUTWARDS)) for x in said]
    return sorted(leads) == [(False, True), (True, False)]


def _stand_elsewhere(ends: Sequence[str], said: Sequence[Concepts], around: Sequence[Concepts]) -> bool:
    """Tells whether two norms stand at other places: by what they and their paths say, and their numbers."""
    numbers = [name[len(name.rstrip("0123456789")) :] for name in ends]
    one, other, *paths = (frozenset("last" if x == "out" else x for x in each) for each in (*said, *around))
    if (left := one & _PLACES) and (right := other & _PLACES):
        is_behind = "post" in one ^ other and not {"attn", "mlp"}.isdisjoint(one & other)
        return is_behind or (paths[0].isdisjoint(right) and paths[1].isdisjoint(left))
    if all(numbers):
        return said == [{"norm"}, {"norm"}] and numbers[0] != numbers[1] and {*numbers} != {"0", "1"}
    number, place = (numbers[0], said[1]) if numbers[0] else (numbers[1], said[0])
    place -= {"attn"} if "cross" in place else set[str]()
    is_other = not place.isdisjoint(_OTHERS.get(number, ()))
    return is_other or not (said[0] ^ said[1]).isdisjoint("qkv")


# What names say of a value.

_SPELLINGS = "log logs,exp,inverse inv,squared square sq,sqrt,rsqrt,neg negated,raw,softplus,keep,drop"
_FUNCTIONS = {word: each.split()[0] for each in _SPELLINGS.split(",") for word in each.split()}
"""Words that say which function of a value is held, or which share of it."""


def unlike_names(
    links: Sequence[Link], parts: LinksByParts, wanted: Sequence[ModulePart], norms: Sequence[Couples]
) -> Iterator[Link]:
    """Yields links of parts whose names are strangers, or say that they hold other functions of a value."""
    yield from strangers(parts, wanted, norms)
    yield from called_otherwise(parts)
    for link in (x for x in links if x.joint is None):
        ends = ((x.names[-1], y.names[-1]) for x in link.wanted for y in link.stored)
        is_odd = any(one != other and _are_opposites(one, other) for one, other in ends)
        is_odd |= link.grounds == "shapes" and _lie_elsewhere(part_of(link.target), part_of(link.source))
        yield from [link] * is_odd
    names = {name for link in links for leaf in (*link.wanted, *link.stored) for name in leaf.names}
    named = {x for x in names if any(y in _FUNCTIONS or y.startswith("log") for y in words(x))}  # Few.
    for link in links if named else ():
        pairs = ((x.names, y.names) for x in link.wanted for y in link.stored)
        if any(any(_functions(*both)) for both in pairs if not named.isdisjoint((*both[0], *both[1]))):
            yield link


@functools.lru_cache(maxsize=1 << 16)
def _are_opposites(wanted: str, stored: str) -> bool:
    """Tells whether two parameters are called what one of them never is of the other.

    A mean is no variance and a shift no scale, nor is what only another letter tells the same: `rel_pos_h`
    and `rel_pos_w`, `pos_bias_u` and `pos_bias_v`, `B` and `C`.
    """
    kinds = PARAMETER.get(wanted), PARAMETER.get(stored)
    if None not in kinds:
        return kinds[0] != kinds[1]
    one, other = words(wanted), words(stored)
    if not any(map(str.isdecimal, (*one, *other))) and exclude(concepts([wanted]), concepts([stored])):
        return True
    differing = [pair for pair in itertools.zip_longest(one, other, fillvalue="") if pair[0] != pair[1]]
    is_letter = len(differing) == 1 and all(len(word) == 1 and word.isalpha() for word in differing[0])
    return is_letter and kinds == (None, None)


def why_unlike(wanted: Path, stored: Path) -> str:
    """Returns what the names of two leaves that shapes allow say against it, or that they say nothing."""
    said = [" ".join(sorted(some)) for some in _functions(segments(wanted), segments(stored)) if some]
    if not said:
        return "and no name tells"
    called = f"{'only ' * (len(said) == 1)}one is called {', the other '.join(said)}"
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
