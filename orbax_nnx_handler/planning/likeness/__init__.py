"""How like each other the parts of two models are: by names, shapes and order.

Here what a whole path says of a part: what it is for, and the list that it is in. Then which matrices may
take features of several positions as one axis, which no name tells.
"""

import functools
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Set

from orbax_nnx_handler.planning.core.folding import plain_names
from orbax_nnx_handler.planning.core.paths import Path, levels
from orbax_nnx_handler.planning.likeness.links import Link
from orbax_nnx_handler.planning.likeness.module_parts import Leaf
from orbax_nnx_handler.planning.likeness.vocabulary import Concepts, Names, concepts, place_of, words

_PURPOSES = tuple(
    re.compile(rf"(?:^|_)(?:{spellings})(?:_|$)")
    for spellings in (
        "lm|mlm|vocab|ctc|cls_predictions|predictions_transform|generator_predictions",
        "nsp|seq_relationship|next_sentence",
        "classifier|cls_head|probe",
        "projector|(?<!out_)(?<!output_)projection",
        *("pooler", "neck", "pre_logits", "critic|value", "reward", "policy|actor", "qa|span"),
        *("bbox|box|boxes|det", "mask_head", "adapter|lora|prompt"),
    )
)
"""What heads and the like are for, by the words of each: to tell tokens, a class, a value, ...."""
_ANY_PURPOSE = re.compile("|".join(purpose.pattern for purpose in _PURPOSES))


@functools.lru_cache(maxsize=1 << 16)
def purposes(names: Names) -> frozenset[int]:
    """Returns what a part is for, by its path; nothing for most."""
    path = "_".join(words("_".join(names)))
    if _ANY_PURPOSE.search(path) is None:
        return frozenset()  # Nearly every part.
    return frozenset(at for at, purpose in enumerate(_PURPOSES) if purpose.search(path))


def have_other_purposes(one: Names, other: Names) -> bool:
    """Tells whether two parts are each for something, and for nothing in common: `lm_head`, `value_head`."""
    left, right = purposes(one), purposes(other)
    return bool(left and right) and left.isdisjoint(right)


@functools.lru_cache(maxsize=1 << 18)  # Asked several times of each leaf.
def in_list(names: Names) -> tuple[Names, Names]:
    """Returns the outermost list that a part is in, and its path in a layer; nothing where it is in none."""
    at = 0
    for level in levels(names):
        at += level.width
        if level.number is not None:
            return (*names[: at - level.width], level.base), names[at:]
    return (), ()


def renumbered(links: Iterable[Link]) -> list[Link]:
    """Returns links that nothing but order tells, of parts with another number under one word.

    `conv2_0` in `blocks/1/conv1`: where both sides count alike, no layer is what a part is numbered.
    """
    some = [link for link in links if link.grounds in ("order", "shapes")]
    both = [(link, _numbers(link.target.names), _numbers(link.source.names)) for link in some]
    held: dict[str, tuple[set[str], set[str]]] = defaultdict(lambda: (set(), set()))
    for _, ours, theirs in both:
        for word in ours.keys() & theirs.keys():
            held[word][0].add(ours[word])
            held[word][1].add(theirs[word])
    alike = {word for word, (ours, theirs) in held.items() if ours == theirs}
    return [
        link
        for link, ours, theirs in both
        if any(ours[word] != theirs[word] for word in alike & ours.keys() & theirs.keys())
    ]


@functools.lru_cache(maxsize=1 << 18)
def _numbers(names: Names) -> Mapping[str, str]:
    """Returns the number behind each word of a path that has one number."""
    said = [pair for name in names for pair in itertools.pairwise(words(name))]
    found = [(word, number) for word, number in said if number.isdecimal() and not word.isdecimal()]
    counts = Counter(word for word, _ in found)
    return {word: number for word, number in found if counts[word] == 1}


def turned_lists(links: Iterable[Link]) -> Collection[tuple[Names, str]]:
    """Returns lists with a parameter, all of whose matrices but the squares, of several names, are turned."""
    turned: dict[tuple[Names, str], dict[Names, bool]] = defaultdict(dict)
    for link in links:
        shape, names = link.target.shape, link.target.names
        if (list_ := in_list(names)[0]) and len({*shape}) == len(shape) > 1:
            is_turned = any(way.turned for several in link.ways for way in several)
            held = turned[list_, names[-1]]
            held[plain_names(names)] = is_turned and held.get(plain_names(names), True)
    return {key for key, held in turned.items() if len(held) > 1 and all(held.values())}


_SIDES = frozenset(("enc", "dec"))
_OF_AN_IMAGE = 4
"""Up to as many channels are an input's own, of which no layer makes several positions."""
_Kernel = tuple[int, int, Path, Concepts]


def flattened(leaves: Iterable[Leaf], own: Set[Path]) -> set[Path]:
    """Returns stored matrices that may take or make features of several positions; not only `own` leaves.

    Nothing gives as many inputs, and they are several times what a convolution returns. Or nothing takes
    as many outputs, and they are several times what a convolution takes that nothing gives. Between
    an encoder and a decoder lies what each has of its own.
    """
    given: dict[int, set[Concepts]] = defaultdict(set)
    taken: dict[int, set[Concepts]] = defaultdict(set)
    images: list[_Kernel] = []
    matrices: list[_Kernel] = []
    for leaf in leaves:
        said, (*above, inputs, outputs) = concepts(leaf.names), (1, 1, *leaf.shape)
        side, spans, is_named = said & _SIDES, above[2:], leaf.names[-1] == "kernel"
        is_kernel = len(above) > 1 and (is_named or leaf.names[-1] == "w")
        is_layered = is_named and len(spans) == 1 and spans[0] < min(inputs, outputs)
        is_image = is_named and len(spans) > 1 and len({*spans}) == 1
        kernel = inputs, outputs, leaf.source, side
        given[outputs].add(side)
        if is_image or (is_kernel and spans and "conv" in said):
            images.append(kernel)
        elif is_kernel and (is_layered or not spans):
            matrices += [kernel] * said.isdisjoint(("attn", "q", "k", "v"))
            given[outputs // 2].add(side)  # The other half may be a gate.
        elif spans:
            given[inputs].add(side)  # Gemma's gate has its outputs first.
        if is_kernel or place_of(leaf.names)[1] != "bias":
            taken[inputs if is_kernel else outputs].add(side)
    returned, needed = defaultdict[int, set[Path]](set), defaultdict[int, set[Path]](set)
    for inputs, outputs, path, side in images:
        returned[outputs].add(path)
        if inputs > _OF_AN_IMAGE and not _explain(given[inputs], side):
            needed[inputs].add(path)
    return {
        path
        for inputs, outputs, path, side in matrices
        for size, others, widths in ((inputs, given, returned), (outputs, taken, needed))
        if not _explain(others[size], side)
        and any(
            size in range(2 * width, size + 1, width) and not own >= {path, *paths}
            for width, paths in widths.items()
            if width > 1
        )
    }


def _explain(sides: Iterable[Concepts], side: Concepts) -> bool:
    return any(not (other and side) or other == side for other in sides)
