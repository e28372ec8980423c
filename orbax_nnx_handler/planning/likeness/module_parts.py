"""The parts of a model that hold leaves of their own."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

from orbax_nnx_handler.planning.core.folding import around
from orbax_nnx_handler.planning.core.leaves import Shape, derived, record
from orbax_nnx_handler.planning.core.paths import Level, Path, levels
from orbax_nnx_handler.planning.likeness.shapes import is_vector
from orbax_nnx_handler.planning.likeness.vocabulary import (
    Concepts,
    Names,
    concepts,
    meanings,
    place_of,
    words,
)


@record
class Leaf:
    """A leaf of either side.

    Attributes:
        names: Its path as the program writes it, in segments, without a last level `value`.
        collection: Its Linen collection, or None where the side tells none.
        shape: Its shape; of a stack of layers that are looked at one by one, that of one layer.
        number: The kind of number it holds, as far as no cast crosses it: `floating`, `integer`, …
        source: Its path on disk or in the target.
        made: Whether NNX fuses a cell's gates into it; the last two names are NNX's then.
        done: What settled rules have done with its shape, in order.
    """

    names: Names
    collection: str | None
    shape: Shape
    number: str
    source: Path
    made: bool = False
    done: tuple[str, ...] = ()

    @property
    def part(self) -> tuple[Path, Names]:
        """What tells it from others: rules may make several of one stored leaf."""
        return self.source, self.names


@dataclasses.dataclass(frozen=True, eq=False)
class ModulePart:
    """A module with leaves of its own, or one parameter that is none of a module's usual ones.

    Attributes:
        names: Its path.
        leaves: Its leaves by what they are: `main` (kernel, scale, embedding), `bias`, `mean`, `var`,
            or a name of their own.
    """

    names: Names
    leaves: Mapping[str, Leaf]

    @derived
    def levels(self) -> tuple[Level, ...]:
        """Its path level by level."""
        return levels(self.names)

    @derived
    def own(self) -> Concepts:
        """What its last name says, or that of the norm whose scale and shift it computes."""
        last, above, *_ = (frozenset(meanings(x.base)) for x in (*self.levels[:-3:-1], *[Level("")] * 2))
        return (above if not last and "norm" in above else last) | self._kind

    @derived
    def said(self) -> Concepts:
        """What all its names say."""
        return concepts(level.base for level in self.levels) | self._kind

    @derived
    def _kind(self) -> Concepts:
        leaf = self.leaves.get("main")
        if leaf is None or leaf.names[-len(self.names) :] == self.names:
            return frozenset()
        return concepts([{"scale": "norm", "gamma": "norm", "embedding": "embed"}.get(leaf.names[-1], "")])

    @derived
    def main_size(self) -> int:
        """How many elements its main leaf holds."""
        return math.prod((self.leaves.get("main") or next(iter(self.leaves.values()))).shape)

    @property
    def is_norm(self) -> bool:
        """Whether it scales or shifts: each of its leaves is a vector, or its name says so."""
        return "norm" in self.own

    @property
    def is_vector(self) -> bool:
        """Whether no leaf of it is a matrix."""
        return all(is_vector(leaf.shape) for leaf in self.leaves.values())

    @property
    def module(self) -> Names:
        """The path of the module around it."""
        return self.names[: len(self.names) - (self.levels[-1].width if self.levels else 0)]

    @property
    def family(self) -> tuple[Names, str]:
        """What it shares with the others of its list: the module around them, the name before the number."""
        return self.module, self.levels[-1].base if self.levels else ""


def module_parts(leaves: Iterable[Leaf], above: int = 0) -> list[ModulePart]:
    """Returns the parts of a context.

    Args:
        leaves: The leaves of the context.
        above: How many segments of their paths lead to the context.
    """
    found: dict[Names, dict[str, Leaf]] = defaultdict(dict)
    for leaf in leaves:
        names, kind = place_of(leaf.names[above:])
        if kind in found[names] and leaf.names[-1] == "kernel":
            other = found[names].pop(kind)  # `scale` beside it, of weights that are normalised.
            found[other.names[above:]]["main"] = other
        elif kind in found[names]:
            names, kind = leaf.names[above:], "main"  # Two spellings of one thing: each by itself.
        found[names][kind] = leaf
    _join_letters(found)
    _sort_biases(found)
    inside: dict[Names, list[Names]] = defaultdict(list)
    for names in found:
        inside[names[:-1]].append(names)
    for names in [names for names, held in found.items() if set(held) == {"bias"}]:
        # Praxis: `linear/w` and `bias/b`.
        beside = [other for other in inside[names[:-1]] if other != names and names[-1:] == ("bias",)]
        around, bias = found.get(beside[0] if len(beside) == 1 else names[:-1], {}), found[names]["bias"]
        if "main" in around and "bias" not in around and bias.shape == around["main"].shape[1:]:
            around["bias"] = found.pop(names)["bias"]
    modules = {names[:depth] for names in found for depth in range(len(names))}
    return [ModulePart(_own_place(names, held, modules, above), held) for names, held in found.items()]


def _join_letters(found: dict[Names, dict[str, Leaf]]) -> None:
    """Makes `output_w` and `output_b` beside it one part with a bias, and `w_output` and `b_output`."""
    lasts = [(names[:-1], names[-1]) for names in found if names]
    pairs = [(above, x, f"{x[:-1]}b", x[:-2]) for above, x in lasts if x[-2:] == "_w"]
    # What follows the letter tells the part, or only its number: `w1` stays a name.
    pairs += [
        (above, x, f"b{x[1:]}", x[1:].lstrip("_") if x[1:2] == "_" and x[2:3].isalpha() else x)
        for above, x in lasts
        if x[:1] in "wW" and x[1:]
    ]
    for above, name, bias, part in pairs:
        shapes = [
            held["main"].shape
            for at in (name, bias)
            if (held := found.get((*above, at), {})).keys() == {"main"} and held["main"].names[-1] == at
        ]
        is_free = part == name or (*above, part) not in found
        if len(shapes) == 2 and shapes[0][-len(shapes[1]) :] == shapes[1] and is_free:
            main, other = (found.pop((*above, at))["main"] for at in (name, bias))
            found[*above, part] = {"main": main, "bias": other}


def _sort_biases(found: dict[Names, dict[str, Leaf]]) -> None:
    """Gives a bias the only kernel of its module, as `weight_v` beside `weight_g`.

    Beside `a` or `c`, `b` is no bias but a letter that counts.
    """
    alone = {names for names, held in found.items() if set(held) == {"bias"}}
    beside: dict[Names, list[Names]] = {names: [] for names in alone}
    for names, held in found.items():
        if names[:-1] in beside and set(held) == {"main"}:
            beside[names[:-1]].append(names)
    for names, others in beside.items():
        bias = found[names]["bias"]
        kernels = [other for other in others if _is_kernel(other[-1], found[other]["main"])]
        if bias.names[-1] == "b" and any(other[-1].lower() in ("a", "c") for other in others):
            found[*names, "b"] = {"main": found.pop(names)["bias"]}
        elif len(kernels) == 1:
            found[names]["main"] = found.pop(kernels[0])["main"]


def _is_kernel(name: str, leaf: Leaf) -> bool:
    is_scale = name == "t" and math.prod(leaf.shape) == 1  # SigLIP's, of logits, beside a bias `b`.
    return is_scale or (words(name)[:1] in (("kernel",), ("weight",)) and not is_vector(leaf.shape))


def _own_place(names: Names, held: Mapping[str, Leaf], modules: Collection[Names], above: int) -> Names:
    """Returns the path of a part; a scale beside modules, as of ConvNeXt's blocks, is one by itself."""
    is_scale = set(held) == {"main"} and is_vector(held["main"].shape)
    return held["main"].names[above:] if is_scale and names and names in modules else names


def part_of(leaf: Leaf) -> Names:
    """Returns the path of the part that a leaf belongs to."""
    return place_of(leaf.names)[0]


def prefixes(part: ModulePart) -> list[tuple[Names, Level]]:
    """Returns the levels of a part, each with what leads to it."""
    return list(zip([(), *around(part.names)], part.levels, strict=False))


def containers(part: ModulePart) -> list[Names]:
    """Returns the modules around a part, the innermost first, the context itself left out."""
    return [*around(part.names)][::-1]
