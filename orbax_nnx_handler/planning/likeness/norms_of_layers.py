"""Norms and the layers that they belong to: where each layer has its own, one tells where the other is.

Linen counts `Conv_0, Conv_1` and `BatchNorm_0, BatchNorm_1` apart, each in the order in which the
program computes them. Where a module has as many of both, and each norm is as wide as what its layer
takes, or as what it returns, `BatchNorm_1` is the norm of `Conv_1`. A target says by names what belongs
together: `conv1` and `bn1`, `skip_conv` and `skip_norm`, `downsample/0` and `downsample/1`. So a norm goes
where its layer has gone, whatever the numbers of the two programs are.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set

from orbax_nnx_handler.planning.core.paths import is_index
from orbax_nnx_handler.planning.likeness.links import Findings, Link, Tie
from orbax_nnx_handler.planning.likeness.module_parts import Leaf, ModulePart, module_parts, part_of
from orbax_nnx_handler.planning.likeness.shapes import Way
from orbax_nnx_handler.planning.likeness.vocabulary import Names, meanings, words

_KINDS = frozenset(
    words(
        "conv convs convolution bn bns norm norms batchnorm batch layernorm ln lns groupnorm gn group "
        "instance rms rmsnorm linear linears lin lins fc fcs dense layer layers"
    )
)
"""Words that say what a part is, and not where it is."""

_Couples = Mapping[Names, ModulePart]
"""The norm of each layer, by the layer's path."""


def with_norms_of_layers(found: Findings, wanted: Sequence[Leaf], stored: Sequence[Leaf]) -> Findings:
    """Returns what is known, with the norms where the layers are that they belong to.

    Args:
        found: What is known; norms that it has elsewhere, or asks about, are told by their layers.
        wanted: The wanted leaves.
        stored: The stored leaves.
    """
    modules = [*_counted_couples(stored)]
    if not modules:
        return found
    companions = _companions(module_parts(wanted))
    homes = {
        part_of(link.source): part_of(link.target)
        for link in found.links
        if link.layers is None and link.joint is None and not link.copied
    }
    pairs: list[tuple[ModulePart, ModulePart]] = []
    for couples in modules:
        pairs += _told_by(couples, homes, companions)
    return _replaced(found, pairs)


def _counted_couples(stored: Sequence[Leaf]) -> Iterator[_Couples]:
    """Yields the layers and norms of each module in which Linen counts as many of both."""
    counted: dict[Names, dict[str, dict[int, ModulePart]]] = defaultdict(lambda: defaultdict(dict))
    automatic = [leaf for leaf in stored if any(name[:1].isupper() for name in leaf.names)]
    for part in module_parts(automatic):
        last = part.levels[-1] if part.levels else None
        if last and last.is_automatic and last.number is not None and "main" in part.leaves:
            counted[part.module][last.base][last.number] = part
    for classes in counted.values():
        norms = [
            x for base, x in classes.items() if "norm" in meanings(base) and [*sorted(x)] == [*range(len(x))]
        ]
        layers = [x for x in classes.values() if all(part.is_layer for part in x.values())]
        fitting = [(x, y) for x in layers for y in norms if _are_couples(x, y)]
        if len(fitting) == 1:
            ((ours, theirs),) = fitting
            yield {ours[at].names: theirs[at] for at in ours}


def _are_couples(layers: Mapping[int, ModulePart], norms: Mapping[int, ModulePart]) -> bool:
    """Tells whether each norm is as wide as what its layer takes, or each as what its layer returns."""
    if layers.keys() != norms.keys() or len(layers) < 2:
        return False
    sizes = [(layers[at].leaves["main"].shape, norms[at].leaves["main"].shape[-1:]) for at in layers]
    # A kernel that is convolved channel by channel has one input.
    takes = all((*shape[-2:-1],) in (width, (1,)) for shape, width in sizes)
    return takes or all(shape[-1:] == width for shape, width in sizes)


def _companions(parts: Sequence[ModulePart]) -> _Couples:
    """Returns the norm of each layer of a target that names say belongs to it."""
    found: dict[Names, ModulePart] = {}
    called: dict[Names, tuple[list[ModulePart], list[ModulePart]]] = defaultdict(lambda: ([], []))
    lists: dict[Names, list[ModulePart]] = defaultdict(list)
    for part in parts:
        if "main" in part.leaves and (part.is_layer or part.is_vector):
            called[_place(part.names)][part.is_vector].append(part)
        if part.names and is_index(part.names[-1]):
            lists[part.names[:-1]].append(part)
    for layers, norms in called.values():
        if len(layers) == len(norms) == 1:
            found[layers[0].names] = norms[0]
    taken = {norm.names for norm in found.values()}
    for held in lists.values():
        left = [x for x in held if x.names not in found and x.names not in taken]
        found.update(_in_turns(sorted(left, key=lambda part: int(part.names[-1]))))
    return found


def _place(names: Names) -> Names:
    """Returns a path without the words that say what the part is."""
    kept = ("_".join(word for word in words(name) if word not in _KINDS) for name in names)
    return tuple(filter(None, kept))


def _in_turns(parts: Sequence[ModulePart]) -> Iterator[tuple[Names, ModulePart]]:
    """Yields the layers and norms of a list in which the one comes behind the other, all through."""
    firsts, seconds = parts[::2], parts[1::2]
    if len(firsts) != len(seconds) or len({part.is_vector for part in firsts}) > 1:
        return
    for one, other in zip(firsts, seconds, strict=True):
        if one.is_vector != other.is_vector:
            layer, norm = (other, one) if one.is_vector else (one, other)
            yield layer.names, norm


def _told_by(
    couples: _Couples, homes: Mapping[Names, Names], companions: _Couples
) -> list[tuple[ModulePart, ModulePart]]:
    """Returns the wanted norm of each layer of a module whose place is known, and the stored one."""
    told = [(homes[layer], norm) for layer, norm in couples.items() if layer in homes]
    pairs = [(companions[home], norm) for home, norm in told if home in companions]
    # What is no norm of a layer may be one of none of them.
    is_whole = len(pairs) == len(couples) == len({one.names for one, _ in pairs})
    return pairs if is_whole and all(map(_fit, pairs)) else []


def _fit(pair: tuple[ModulePart, ModulePart]) -> bool:
    ours, theirs = ({kind: leaf.shape for kind, leaf in part.leaves.items()} for part in pair)
    return ours == theirs


def _replaced(found: Findings, pairs: Iterable[tuple[ModulePart, ModulePart]]) -> Findings:
    """Returns what is known, with some pairs and without what speaks against them."""
    links = [
        Link(wanted=(leaf,), stored=(other.leaves[kind],), grounds="names", ways=((Way(()),),))
        for one, other in pairs
        for kind, leaf in one.leaves.items()
    ]
    known = {(x.target.source, x.source.source) for x in found.links}
    if all((x.target.source, x.source.source) in known for x in links):
        return found
    taken = {part_of(x.target) for x in links}, {part_of(x.source) for x in links}
    kept = [link for link in found.links if not _is_about(link, taken)]
    ties = [made for tie in found.ties if (made := _without(tie, taken))]
    return Findings(links=[*kept, *links], ties=ties, groups=found.groups)


def _is_about(link: Link, taken: tuple[Set[Names], Set[Names]]) -> bool:
    sides = (link.wanted, taken[0]), (link.stored, taken[1])
    return any(part_of(leaf) in parts for leaves, parts in sides for leaf in leaves)


def _without(tie: Tie, taken: tuple[Set[Names], Set[Names]]) -> Tie | None:
    """Returns a question without the parts that are known; None where nothing is left of it."""
    if taken[0].isdisjoint(tie.wanted) and taken[1].isdisjoint(tie.stored):
        return tie
    left = (tuple(link for link in each if not _is_about(link, taken)) for each in tie.readings)
    readings = tuple({frozenset(map(id, each)): each for each in left if each}.values())
    return (
        dataclasses.replace(
            tie,
            wanted=tuple(names for names in tie.wanted if names not in taken[0]),
            stored=tuple(names for names in tie.stored if names not in taken[1]),
            readings=readings,
        )
        if readings
        else None
    )
