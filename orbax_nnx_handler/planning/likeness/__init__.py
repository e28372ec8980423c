"""How like each other the parts of two models are: by names, shapes and order.

Here what a whole path says of a part: what it is for, and the list that it is in.
"""

import functools
import re

from orbax_nnx_handler.planning.core.paths import levels
from orbax_nnx_handler.planning.likeness.vocabulary import Names, words

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


@functools.lru_cache(maxsize=1 << 16)
def purposes(names: Names) -> frozenset[int]:
    """Returns what a part is for, by its path; nothing for most."""
    path = "_".join(words("_".join(names)))
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
