"""How arrays are arranged that no name tells: gates of cells, matrices turned, features of positions, levels.

Linen keeps the gates of recurrent cells apart, another program in one array. Both sides are read as if
their cells were called alike and the gates were fused, so that names, places and shapes tell which cell is
which. Then each array of a cell is one link of all its gates, in the order in which the program that its
names are from keeps them; an order that no name tells is asked about.
"""

import dataclasses
import itertools
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set

from orbax_nnx_handler.planning.core.folding import plain_names
from orbax_nnx_handler.planning.core.leaves import Shape, order_after
from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.likeness import in_list
from orbax_nnx_handler.planning.likeness.assignment import Fit
from orbax_nnx_handler.planning.likeness.links import Findings, Link, Tie
from orbax_nnx_handler.planning.likeness.module_parts import Leaf
from orbax_nnx_handler.planning.likeness.named_parts import NamedPart
from orbax_nnx_handler.planning.likeness.shapes import Joint, Steps, Way, transposed
from orbax_nnx_handler.planning.likeness.vocabulary import STRONG, Concepts, Names, concepts, place_of, words

_LSTM, _GRU = "ifgo", "rzn"
_GATES = frozenset(side + gate for side in "ih" for gate in _LSTM + _GRU)
_ORDERS: Mapping[str, Mapping[str, str]] = {
    _LSTM: {"ifgo": "as in PyTorch and Keras", "igfo": "as in Haiku and TensorFlow", "ifog": ""},
    _GRU: {"rzn": "as in PyTorch", "zrn": "as in Keras and Haiku"},
}
"""Orders of the gates that programs have; any other one is possible too."""
_FACTS: Mapping[str, Mapping[str, str]] = {
    "PyTorch": {_LSTM: "ifgo", _GRU: "rzn"},
    "Keras": {_LSTM: "ifgo", _GRU: "zrn"},
}
_OF_PYTORCH = re.compile(r"(weight|bias)_(ih|hh)(?:_l(\d+))?(_reverse)?|(bias)(?:_l(\d+))(_reverse)?")
_INPUT = frozenset(("i", "ih", "in", "inp", "input", "inputs", "x", "wx", "xh", "wi", "xz"))
_HIDDEN = frozenset(("h", "hh", "hidden", "rec", "recurrent", "state", "u", "wh", "hz"))
_SIDES = {"input_ih": _INPUT, "hidden_hh": _HIDDEN}


@dataclasses.dataclass(frozen=True)
class _Cell:
    """The gates of a stored cell, by what they are called there.

    Attributes:
        names: Its path.
        order: Its gates in the order of PyTorch, a letter for each.
        leaves: Its leaves by gate and parameter: `("if", "kernel")`.
    """

    names: Names
    order: str
    leaves: Mapping[Names, Leaf]

    def fused(self) -> Iterator[tuple[Leaf, Sequence[Leaf]]]:
        """Yields each array of all gates, the features along the last axis, with the gates."""
        for side, name in (("i", "input_ih"), ("h", "hidden_hh")):
            for kind in ("kernel", "bias"):
                gates = [self.leaves.get((side + gate, kind)) for gate in self.order]
                held = [gate for gate in gates if gate is not None]
                if len(held) == len(gates):
                    shape = (*held[0].shape[:-1], held[0].shape[-1] * len(held))
                    yield dataclasses.replace(held[0], names=(*self.names, name, kind), shape=shape), held


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cells:
    """Both sides with the gates of cells fused and called alike.

    Attributes:
        wanted: The wanted leaves; those of a cell under the names that a fused one has here.
        stored: The stored leaves, or what is fused of them.
    """

    wanted: Sequence[Leaf]
    stored: Sequence[Leaf]
    _aims: Mapping[Path, tuple[Leaf, str]]
    _gates: Mapping[tuple[Path, Names], tuple[Sequence[Leaf], str]]
    _lone: Mapping[tuple[Path, Names], Leaf]

    def apart(self, found: Findings) -> Findings:
        """Returns what was found with each fused array as its gates, and the orders that nothing tells."""
        if not self._gates:
            return found
        asked: dict[str, list[Link]] = defaultdict(list)
        links: list[Link] = []
        for link in found.links:
            if not self._is_fused(link):
                links.append(self._called(link))
            elif (made := self._in_gates(link)) is not None:
                (links if made.fact else asked[self._gates[link.source.part][1]]).append(made)
        ties = [tie for tie in map(self._tie, found.ties) if tie is not None]
        return Findings(
            links=links, ties=[*ties, *itertools.starmap(_orders, asked.items())], groups=found.groups
        )

    def _is_fused(self, link: Link) -> bool:
        return any(leaf.part in self._gates for leaf in link.stored)

    def _called(self, link: Link) -> Link:
        """Returns a link with its leaves under their own names."""
        wanted = tuple(self._aims[x.source][0] if x.source in self._aims else x for x in link.wanted)
        stored = tuple(self._lone.get(leaf.part, leaf) for leaf in link.stored)
        if (wanted, stored) == (link.wanted, link.stored):
            return link
        return dataclasses.replace(link, wanted=wanted, stored=stored, levels=())

    def _in_gates(self, link: Link) -> Link | None:
        gates, order = self._gates[link.source.part]
        aim, program = self._aims.get(link.target.source, (None, ""))
        if aim is None or link.joint is not None or link.layers is not None or link.copied:
            return None
        # PyTorch keeps outputs before inputs.
        ways = [way for way in link.ways[0] if way.turned == (program == "PyTorch")] or link.ways[0]
        if program:
            gates = [gates[order.index(gate)] for gate in _FACTS[program][order]]
        plain = tuple((Way(()),) for _ in gates)
        return Link(
            wanted=(aim,),
            stored=tuple(gates),
            grounds="fact" if program else "names",
            ways=plain,
            joint=Joint(len(gates[0].shape) - 1, False, None, plain),
            after=ways[0].steps,
            fact=program,
        )

    def _tie(self, tie: Tie) -> Tie | None:
        """Returns a question about cells with their gates; none where it would leave their order open."""
        readings: list[tuple[Link, ...]] = []
        for reading in tie.readings:
            made = [self._in_gates(x) if self._is_fused(x) else self._called(x) for x in reading]
            if any(x is None or (x.joint is not None and x.layers is None and not x.fact) for x in made):
                return None
            readings.append(tuple(x for x in made if x is not None))
        return dataclasses.replace(tie, readings=tuple(readings))


def as_fused(wanted: Sequence[Leaf], stored: Sequence[Leaf]) -> Cells:
    """Returns both sides with what Linen keeps apart of a recurrent cell as one array of all gates.

    Nothing changes where the target keeps the gates apart too, or has cells of NNX.

    Args:
        wanted: The wanted leaves.
        stored: The stored leaves.
    """
    cells = [*_cells(stored)]
    own = {leaf.names[-2] for leaf in wanted if len(leaf.names) > 1} if cells else set[str]()
    fused = [item for cell in cells for item in cell.fused()]
    aims = {} if own & (_GATES | {"dense_i"}) else {x[0].source: x for x in _wanted_cells(wanted, fused)}
    if not aims:
        return Cells(wanted=wanted, stored=stored, _aims={}, _gates={}, _lone={})
    orders = {cell.names: cell.order for cell in cells}
    gates = {leaf.part: (held, orders[leaf.names[:-2]]) for leaf, held in fused}
    gone = {id(gate) for _, held in fused for gate in held}
    lone = {
        id(leaf): _lone(leaf) for leaf in stored if leaf.names[-2:] == ("hn", "bias") and id(leaf) not in gone
    }
    return Cells(
        wanted=[aims[leaf.source][1] if leaf.source in aims else leaf for leaf in wanted],
        stored=[
            *(lone.get(id(leaf), leaf) for leaf in stored if id(leaf) not in gone),
            *(leaf for leaf, _ in fused),
        ],
        _aims={path: (own, program) for path, (own, _, program) in aims.items()},
        _gates=gates,
        _lone={lone[id(leaf)].part: leaf for leaf in stored if id(leaf) in lone},
    )


def _lone(leaf: Leaf) -> Leaf:
    """Returns the only bias that a GRU has beside its state as a parameter of the cell."""
    return dataclasses.replace(leaf, names=(*leaf.names[:-2], "bias_hn"))


def _cells(stored: Iterable[Leaf]) -> Iterator[_Cell]:
    found: dict[Names, dict[Names, Leaf]] = defaultdict(dict)
    for leaf in stored:
        if len(leaf.names) > 1 and leaf.names[-2] in _GATES:
            found[leaf.names[:-2]][leaf.names[-2:]] = leaf
    for names, held in found.items():
        for order in (_LSTM, _GRU):
            kernels = [[held.get((side + gate, "kernel")) for gate in order] for side in "ih"]
            shapes = [{leaf.shape for leaf in side if leaf is not None} for side in kernels]
            is_whole = not any(leaf is None for side in kernels for leaf in side)
            if is_whole and all(len(each) == 1 and len(next(iter(each))) == 2 for each in shapes):
                yield _Cell(names, order, held)


# Wanted cells.


_Aim = tuple[Leaf, Leaf, str]
"""A wanted leaf, the same under the name that it has here, and the program that its name is from."""


def _wanted_cells(wanted: Sequence[Leaf], fused: Sequence[tuple[Leaf, Sequence[Leaf]]]) -> Iterator[_Aim]:
    """Yields the arrays of all gates of cells that have one for their inputs and one for their state."""
    shapes: dict[Names, set[Shape]] = defaultdict(set)
    for leaf, _ in fused:
        shapes[leaf.names[-2:]].update((leaf.shape, leaf.shape[::-1]))
    sizes = set[Shape]().union(*shapes.values())
    keras = {leaf.names[:-1] for leaf in wanted if leaf.names[-1] == "recurrent_kernel"}
    found: dict[Names, dict[Names, list[tuple[Names, Leaf, str]]]] = defaultdict(lambda: defaultdict(list))
    for leaf in wanted:
        if leaf.shape in sizes or "hn" in words(leaf.names[-1]):
            above, within, role, program = _role(leaf.names, keras)
            found[above][within].append((role, leaf, program))
    for above, cells in found.items():
        for within, held in cells.items():
            yield from _aims_of((*above, *within[: len(within) if len(cells) > 1 else 0]), held, shapes)


def _role(names: Names, keras: Collection[Names]) -> tuple[Names, Names, Names, str]:
    """Returns the module that a leaf is in, which cell of it, what it is there, and whose name that is."""
    *above, last = names
    if tuple(above) in keras:
        side = {"kernel": "input_ih", "recurrent_kernel": "hidden_hh"}.get(last, "")
        return tuple(above), (), (side, "kernel" if side else "bias"), "Keras"
    if known := _OF_PYTORCH.fullmatch(last):
        kind, side, layer, is_back, *bias = known.groups()
        within = f"layer_{layer or bias[1] or 0}", "backward" if is_back or bias[2] else "forward"
        sides = {"ih": "input_ih", "hh": "hidden_hh"}
        return (
            tuple(above),
            within,
            (sides.get(side, ""), "bias" if kind != "weight" else "kernel"),
            "PyTorch",
        )
    is_parameter = last in ("kernel", "weight", "bias") and len(names) > 1
    said = words(above[-1] if is_parameter else last)
    side = next((side for word in said for side, of in _SIDES.items() if word in of), "")
    kind = "bias" if {"bias", "b"} & {last, *said} else "kernel"
    above = above[:-1] if is_parameter and side else above
    return tuple(above), (), ("" if "hn" in said else side, kind), ""


def _aims_of(
    cell: Names, held: Sequence[tuple[Names, Leaf, str]], shapes: Mapping[Names, Collection[Shape]]
) -> Iterator[_Aim]:
    """Yields the leaves of a cell under the names that they have here; nothing where it is no whole one."""
    roles: dict[Names, list[Leaf]] = defaultdict(list)
    for role, leaf, _ in held:
        roles[role].append(leaf)
    kernels = [("input_ih", "kernel"), ("hidden_hh", "kernel")]
    if any(len(roles[role]) != 1 or roles[role][0].shape not in shapes[role] for role in kernels):
        return
    program = next(iter({program for role, _, program in held if role == kernels[0]}))
    for role in kernels:
        yield roles[role][0], dataclasses.replace(roles[role][0], names=(*cell, *role)), program
    # In an LSTM it makes no difference to which of the two arrays a bias belongs.
    for of in (("hidden_hh", "bias"), ("input_ih", "bias")):
        biases = [
            x for at in (of, ("", "bias"), ("input_ih", "bias")) for x in roles[at] if x.shape in shapes[of]
        ]
        if biases and of in shapes:
            yield biases[0], dataclasses.replace(biases[0], names=(*cell, *of)), program
    for leaf in roles["", "bias"]:
        if "hn" in words(leaf.names[-1]):
            yield leaf, dataclasses.replace(leaf, names=(*cell, "bias_hn")), ""


# Orders that nothing tells.


def _orders(order: str, links: Sequence[Link]) -> Tie:
    """Returns the question in which order arrays hold the gates: one order for all of a model."""
    readings: dict[str, tuple[Link, ...]] = {}
    for letters in (*_ORDERS[order], *map("".join, itertools.permutations(order))):
        told = _ORDERS[order].get(letters) or "one after the other"
        places = [order.index(letter) for letter in letters]
        readings[letters] = tuple(
            dataclasses.replace(link, stored=tuple(link.stored[at] for at in places), told=told)
            for link in links
        )
    return Tie(
        wanted=tuple(link.target.names for link in links),
        stored=tuple(leaf.names for link in links for leaf in link.stored),
        readings=tuple(readings.values()),
    )


# Matrices that are stored transposed.


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


def beside_turned(
    fits: Mapping[tuple[int, int], Fit], wanted: Sequence[NamedPart], stored: Sequence[NamedPart]
) -> list[tuple[int, int]]:
    """Returns pairs of matrices as they are, where those of one role on both sides only fit transposed.

    Of Praxis' `ffn_layer1` and `ffn_layer2` either has the shape of the other one, transposed.
    """
    told: dict[tuple[str, str], set[bool]] = defaultdict(set)
    as_they_are: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for pair, fit in fits.items():
        for one, other, options in fit.pairs:
            if min(len(one.shape), len(other.shape)) > 1 == len(options):
                names, is_turned = (one.names[-1], other.names[-1]), options[0].turned
                if wanted[pair[0]].said & stored[pair[1]].said & STRONG:
                    told[names].add(is_turned)
                elif not is_turned and len(one.shape) == len(other.shape):
                    as_they_are[names].append(pair)
    return [pair for names, held in as_they_are.items() if told[names] == {True} for pair in held]


# Features of several positions as one axis.

_ARMS = frozenset(("enc", "dec"))
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
        side, spans, is_named = said & _ARMS, above[2:], leaf.names[-1] == "kernel"
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


def moves(shape: Shape, move: tuple[int, int]) -> Steps:
    """Returns the step that moves an axis to another place; none where it is there."""
    return () if move[0] == move[1] else (transposed(shape, order_after(len(shape), move)),)


# Levels that may be counted from either end, and names from another number.


def shifted(links: Iterable[Link]) -> Iterator[Link]:
    """Yields links of one number that count otherwise than all do: `stage{0,1}_fc` as `stage{1,2}_fc`."""
    held = defaultdict[object, list[tuple[int, int, Link]]](list)
    for link in links:
        ours, theirs = (re.split(r"(\d+)", "/".join(x.names)) for x in (link.target, link.source))
        for at in range(1, len(ours), 2) if ours[::2] == theirs[::2] else ():
            held[*ours[::2], at].append((int(ours[at]), int(theirs[at]), link))
    for some in held.values():
        one, other = {to for to, *_ in some}, {at for _, at, _ in some}
        if (shift := min(one) - min(other)) and one == {x + shift for x in other}:
            yield from (link for to, at, link in some if to != at + shift)
