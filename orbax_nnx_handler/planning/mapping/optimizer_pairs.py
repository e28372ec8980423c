"""Which weights an optimizer's moments belong to, and which stored state of it each wanted one is.

A state is told by its fields and by the parameters that it keeps moments of, never by
a single name: nearly every state has a `count`. A state whose fields have changed, or whose
parameters are others, is another state.

Like states are paired in order: as many as can be, and as few of them moved as can be.
That is a longest common subsequence, and then whatever else has a counterpart. There may be
several best pairings. What is the same in all of them is certain; the rest is undecided. So is
a state that has moved past another one: a chain in another order is another optimizer (law 8).
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property

from flax import nnx

from orbax_nnx_handler.planning.core.paths import Path, Tokens, canonical, trained_by
from orbax_nnx_handler.planning.core.recipes import Read, Recipe, substitute
from orbax_nnx_handler.planning.layouts.layout import Placement, is_copy_level
from orbax_nnx_handler.planning.mapping.matches import Found
from orbax_nnx_handler.planning.mapping.networks import Matched
from orbax_nnx_handler.planning.mapping.optimizer_states import OptimizerState
from orbax_nnx_handler.planning.mapping.roots import named_levels, strip
from orbax_nnx_handler.planning.mapping.train_states import StoredOptimizer, WantedOptimizer
from orbax_nnx_handler.planning.rules.entries import Entry
from orbax_nnx_handler.planning.target.roles import Wanted


@dataclasses.dataclass(frozen=True, kw_only=True)
class UndecidedState:
    """A wanted state that may be several stored ones, has moved, or whose paths can be read in two ways.

    Attributes:
        wanted: The state.
        stored: The stored ones that it may be.
        moved: Whether it is told by its fields, and stands at another place among the others.
    """

    wanted: OptimizerState
    stored: tuple[OptimizerState, ...]
    moved: bool = False

    @property
    def doubtful(self) -> bool:
        """Whether paths can be read in two ways, rather than states paired in several."""
        return self.wanted.doubtful or any(state.doubtful for state in self.stored)

    @property
    def paths(self) -> tuple[Path, ...]:
        """The wanted leaves that it is about."""
        return tuple(leaf.path for leaf in self.wanted.leaves)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairedStates:
    """Which stored state each wanted one is; what is in none of these has no counterpart.

    Attributes:
        pairs: The pairs, wanted first.
        undecided: Wanted states that may be several stored ones.
        missing: Wanted states that are not stored.
        unexpected: Stored states that are not wanted.
    """

    pairs: Sequence[tuple[OptimizerState, OptimizerState]] = ()
    undecided: Sequence[UndecidedState] = ()
    missing: Sequence[OptimizerState] = ()
    unexpected: Sequence[OptimizerState] = ()

    @property
    def lacking(self) -> frozenset[Path]:
        """The wanted leaves that no stored state has."""
        return frozenset(leaf.path for state in self.missing for leaf in state.leaves)


Sources = Callable[[Path], Collection[Path]]
"""The stored parameters that a wanted one is made from, by the wanted one."""


def pair_states(
    wanted: Sequence[OptimizerState], stored: Sequence[OptimizerState], sources: Sources
) -> PairedStates:
    """Pairs the states of two optimizers."""
    pairing = _Pairing(wanted, stored, sources)
    pairing.pair_lone()
    pairing.pair(exact=True)
    # A group of parameters that has grown or shrunk.
    pairing.pair(exact=False)
    pairing.ask_for_labels()
    return pairing.result()


class _Pairing:
    """Pairs states round by round; every round with what the ones before it left."""

    def __init__(
        self, wanted: Sequence[OptimizerState], stored: Sequence[OptimizerState], sources: Sources
    ) -> None:
        self.wanted, self.stored, self.sources = wanted, stored, sources
        self.labels = {s.label for s in wanted} & {s.label for s in stored} - {()}
        self.pairs: dict[int, int] = {}
        self.undecided: dict[int, tuple[int, ...]] = {}

    @cached_property
    def needs(self) -> Sequence[frozenset[Path]]:
        """The stored parameters behind the moments of each wanted state."""
        return [frozenset(self._needs(state)) for state in self.wanted]

    def _needs(self, state: OptimizerState) -> Iterator[Path]:
        return (source for parameter in state.parameters for source in self.sources(parameter))

    @cached_property
    def shared(self) -> frozenset[Path]:
        """The parameters that moments of both sides are about."""
        return frozenset[Path]().union(*self.needs) & frozenset[Path]().union(
            *(s.parameters for s in self.stored)
        )

    def pair_lone(self) -> None:
        """Pairs the states whose fields no other state of either side has: most of them, and large ones."""
        stored = _by_fields(self.stored)
        # Moments first: they tell which label is which.
        groups = _by_fields(self.wanted).items()
        for fields, here in sorted(groups, key=lambda item: not self.wanted[item[1][0]].moments):
            there = stored.get(fields, [])
            if len(here) == len(there) == 1 and self._may_be(self.wanted[here[0]], self.stored[there[0]]):
                self.pairs[here[0]] = there[0]

    def _may_be(self, wanted: OptimizerState, stored: OptimizerState) -> bool:
        if wanted.label != stored.label:
            if {wanted.label, stored.label} & self.labels:
                return False  # A label of both sides is its own counterpart.
            if not wanted.moments and not self._are_one_label(wanted.label, stored.label):
                return False
        return not wanted.moments or not stored.parameters.isdisjoint(self._needs(wanted))

    def _are_one_label(self, wanted: Tokens, stored: Tokens) -> bool:
        """Tells whether moments under a label lie under another one there, or one side has none."""
        sides = ({state.label for state in states} - {()} for states in (self.wanted, self.stored))
        told = ((self.wanted[here], self.stored[there]) for here, there in self.pairs.items())
        return sum(map(len, sides)) < 2 or any(
            (one.label, other.label) == (wanted, stored) for one, other in told if one.moments
        )

    def ask_for_labels(self) -> None:
        """Leaves open which state of other labels one without moments is: no name tells it."""
        taken, alike = set(self.pairs.values()), _by_fields(self.stored)
        for here, wanted in enumerate(self.wanted):
            if here in self.pairs.keys() | self.undecided.keys() or wanted.moments:
                continue
            there = [at for at in alike.get(wanted.fields, ()) if at not in taken]
            there = [at for at in there if self.stored[at].label not in {*self.labels, wanted.label}]
            if there and wanted.label not in self.labels:
                self.undecided[here] = tuple(there)

    def pair(self, *, exact: bool) -> None:
        # What is paired already stays in its place: the others are told by what they stand between.
        here = [at for at in range(len(self.wanted)) if at not in self.undecided]
        open_to_many = {at for several in self.undecided.values() for at in several}
        there = [at for at in range(len(self.stored)) if at not in open_to_many]
        if all(at in self.pairs for at in here):
            return
        taken = set(self.pairs.values())
        alike = _by_fields([self.stored[at] for at in there])
        choices = [
            {there.index(self.pairs[it])}
            if it in self.pairs
            else {
                at
                for at in alike.get(self.wanted[it].fields, ())
                if there[at] not in taken and self._fits(it, there[at], exact)
            }
            for it in here
        ]
        found = match_in_order(choices, len(there))
        self.pairs |= {here[left]: there[right] for left, right in found.pairs.items()}
        self.undecided |= {
            here[left]: tuple(there[at] for at in right) for left, right in found.undecided.items()
        }

    def _fits(self, here: int, there: int, exact: bool) -> bool:
        wanted, stored = self.wanted[here], self.stored[there]
        if not self._may_be(wanted, stored):
            return False
        return (
            not exact
            or not wanted.moments
            or self.needs[here] & self.shared == stored.parameters & self.shared
        )

    def result(self) -> PairedStates:
        moved = set(self._moved())
        sure: list[tuple[OptimizerState, OptimizerState]] = []
        unsure: list[UndecidedState] = []
        for here, there in self.pairs.items():
            wanted, stored = self.wanted[here], self.stored[there]
            if here in moved or wanted.doubtful or stored.doubtful:
                unsure.append(UndecidedState(wanted=wanted, stored=(stored,), moved=here in moved))
            else:
                sure.append((wanted, stored))
        open_ones = [
            UndecidedState(wanted=self.wanted[here], stored=tuple(self.stored[at] for at in there))
            for here, there in self.undecided.items()
        ]
        known = self.pairs.keys() | self.undecided.keys()
        used = {*self.pairs.values(), *(at for there in self.undecided.values() for at in there)}
        return PairedStates(
            pairs=sure,
            undecided=[*open_ones, *unsure],
            missing=[state for at, state in enumerate(self.wanted) if at not in known],
            unexpected=[state for at, state in enumerate(self.stored) if at not in used],
        )

    def _moved(self) -> Iterator[int]:
        """Yields the wanted states that are out of order among those of their label; labels have no order."""
        alike: dict[object, list[int]] = defaultdict(list)
        for here, there in sorted(self.pairs.items()):
            alike[self.wanted[here].label, self.stored[there].label].append(here)
        for group in alike.values():
            there = [self.pairs[here] for here in group]
            if there != sorted(there):
                kept = _in_every_subsequence([{at} for at in there], len(self.stored))
                yield from (here for at, here in enumerate(group) if at not in kept)


def _by_fields(states: Sequence[OptimizerState]) -> Mapping[object, list[int]]:
    found: dict[object, list[int]] = defaultdict(list)
    for at, state in enumerate(states):
        found[state.fields].append(at)
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alignment:
    """What the best alignments of two sequences agree on.

    Attributes:
        pairs: The stored index of each wanted one, where all of them agree.
        undecided: The stored indices that a wanted one may be, where they do not.
    """

    pairs: Mapping[int, int]
    undecided: Mapping[int, tuple[int, ...]]


def match_in_order(choices: Sequence[Collection[int]], count: int) -> Alignment:
    """Aligns two sequences.

    Args:
        choices: For each wanted element, the stored ones that it may be, by index.
        count: How many stored elements there are.
    """
    if all(at in there for at, there in enumerate(choices)) and len(choices) == count:
        return Alignment(pairs={at: at for at in range(count)}, undecided={})
    claims = _reversed(choices, count)
    pairs = {here: there for here, there in _lone(choices) if len(claims[there]) == 1}
    pairs |= _in_every_subsequence(choices, count)
    left = {here: set(there) - set(pairs.values()) for here, there in enumerate(choices) if here not in pairs}
    # What is left has moved. It is certain where only one is left on either side.
    moved = {here: next(iter(there)) for here, there in left.items() if len(there) == 1}
    for here, there in moved.items():
        if sum(there in others for others in left.values()) == 1:
            pairs[here] = there
    undecided = {here: tuple(sorted(there)) for here, there in left.items() if there and here not in pairs}
    return Alignment(pairs=pairs, undecided=undecided)


def _lone(choices: Sequence[Collection[int]]) -> list[tuple[int, int]]:
    return [(here, next(iter(there))) for here, there in enumerate(choices) if len(there) == 1]


def _reversed(choices: Sequence[Collection[int]], count: int) -> list[list[int]]:
    claims: list[list[int]] = [[] for _ in range(count)]
    for here, there in enumerate(choices):
        for at in there:
            claims[at].append(here)
    return claims


def _in_every_subsequence(choices: Sequence[Collection[int]], count: int) -> dict[int, int]:
    """Returns the pairs that every longest common subsequence has."""
    ahead = _lengths(choices, count)
    mirrored = [[count - 1 - at for at in there] for there in reversed(choices)]
    # behind[i][j]: the longest of choices[i:] and the stored ones from j on.
    behind = [row[::-1] for row in reversed(_lengths(mirrored, count))]
    longest = ahead[-1][-1]
    pairs: dict[int, int] = {}
    for here, row in enumerate(choices):
        possible = [at for at in row if ahead[here][at] + 1 + behind[here + 1][at + 1] == longest]
        without = max(ahead[here][at] + behind[here + 1][at] for at in range(count + 1))
        if len(possible) == 1 and without < longest:
            pairs[here] = possible[0]
    return pairs


def _lengths(choices: Sequence[Collection[int]], count: int) -> list[list[int]]:
    """Returns the length of the longest common subsequence of every pair of beginnings."""
    table = [[0] * (count + 1)]
    for there in choices:
        last, row = table[-1], [0]
        for at in range(count):
            row.append(last[at] + 1 if at in there else max(last[at + 1], row[at]))
        table.append(row)
    return table


class Trainings:
    """Tells which network's moments an optimizer holds: that of its train state.

    Attributes:
        networks: The networks whose weights were looked for.
        entries: What the rules have made of the checkpoint.
        found: What the weights come from.
        placements: What each stored leaf is, by its path.
    """

    def __init__(
        self,
        networks: Sequence[Matched],
        entries: Sequence[Entry],
        found: Mapping[Path, Found],
        placements: Sequence[Placement],
    ) -> None:
        self.networks, self.entries, self.found, self.placements = networks, entries, found, placements

    def of(self, wanted: WantedOptimizer, stored: StoredOptimizer) -> Sequence[Matched]:
        """Returns the network that an optimizer trains; several where no name tells, and it matters.

        Beside several train states (`{gen, disc, g_opt, d_opt}`) it is the one whose names most moments
        have, longer ones first; of several with the same names, the one that the target has the optimizer
        beside; then one that no level names (`model` beside `ema`); then the one that its own parameters
        have become, and the one of which fewest parameters have no moment; then the one that it is called
        after; then, of the only optimizer, the one that is called no copy.
        """
        whole = [item for item in self.networks if item.network.only in (None, "params")]
        own = [e for e in self.entries if e.placed and canonical(e.placed.owner) in stored.models]
        trained = {e.owner for e in own if e.placed and e.placed.collection in (None, "params")}
        # What rules call its weights, if they have taken the optimizer along.
        renamed = {entry.owner for entry in own if entry.named}
        moved = [item for item in whole if item.network.owner in renamed]
        moved = [item for item in moved if stored.owner[: len(item.network.owner)] == item.network.owner]
        # Beside several networks, also those that rules have renamed; in a train state of its own, they are
        # others', and the first of the rest is another one.
        known = stored.models | renamed if len(stored.models) > 1 else stored.models
        likely = moved or [item for item in whole if item.network.owner in known] or whole
        if len(likely) < 2:
            return likely
        ends = [[item.tokens[at:] for at in range(len(item.tokens))] for item in wanted.leaves]
        above = wanted.owner[:-1]

        def moments(network: Matched) -> tuple[int, ...]:
            kinds = {network.names.get(item.leaf.path, ()): item.leaf.kind for item in network.weights}
            # Another network's own type of Variable may have a parameter's name.
            params = {name for name, kind in kinds.items() if issubclass(kind or nnx.Param, nnx.Param)}
            names = [next((end for end in tails if end in kinds), ()) for tails in ends]
            beside = all(item.tokens[: len(above)] == above for item in network.weights)
            is_unnamed = not named_levels(strip(network.roots.wanted, above))
            is_trained = network.network.owner in trained
            each = sum(map(bool, names)), len(params.intersection(names)), sum(map(len, names))
            return (*each, beside, is_unnamed, is_trained, -len(params.difference(names)))

        scores = {id(network): moments(network) for network in likely}
        likely = [item for item in likely if scores[id(item)] == max(scores.values())]
        names = trained_by(wanted.owner, {item.roots.wanted for item in likely})
        likely = [item for item in likely if item.roots.wanted in names] if len(names) == 1 else likely
        if len(likely) > 1 and len({at.owner for at in self.placements if at.section == "optimizer"}) == 1:
            likely = [item for item in likely if not any(map(is_copy_level, item.roots.wanted))] or likely
        alike = len({self._made(item) for item in likely}) == 1 if len(likely) > 1 else True
        return likely[:1] if alike else likely

    @cached_property
    def _placed(self) -> Mapping[Path, Placement]:
        return {item.leaf.path: item for item in self.placements}

    def _made(self, network: Matched) -> frozenset[tuple[Tokens, Recipe]]:
        """Returns how the weights of a network are made, whatever the network's own name is."""

        def of_network(path: Path) -> Recipe:
            placed = self._placed[path]
            # What lies aside has its network's name in its path, and no moment follows it.
            tokens = placed.tokens if placed.section == "model" else ()
            return Read(tokens[:-1] if len(tokens) > 1 and tokens[-1] == "value" else tokens)

        weights = [(item.leaf.path, network.names[item.leaf.path]) for item in network.weights]
        return frozenset(
            (name, substitute(self.found[path].recipe, of_network))
            for path, name in weights
            if path in self.found
        )


def trained_network(optimizer: StoredOptimizer, entries: Sequence[Entry]) -> Tokens:
    """Returns what rules call the stored network that an optimizer has trained, if its name tells."""
    trained = trained_by(optimizer.owner, optimizer.models) if len(optimizer.models) > 1 else optimizer.models
    weights = [entry for entry in entries if entry.section == "model" and entry.placed]
    owners = {e.owner for e in weights if e.placed and canonical(e.placed.owner) in trained}
    return owners.pop() if len(owners) == 1 else ()


def weights_of(
    optimizer: StoredOptimizer, stored: Sequence[Entry], network: Matched | None, entries: Sequence[Entry]
) -> Sequence[Entry]:
    """Returns the stored weights that an optimizer's moments may belong to.

    Args:
        optimizer: The optimizer.
        stored: The weights as they are stored.
        network: What it trains.
        entries: What the rules have made of the checkpoint.
    """
    own = [entry for entry in stored if entry.collection is None or entry.owner in optimizer.models]
    if network is None or len(optimizer.models) < 2:
        return own
    called = [entry for entry in own if entry.owner == network.network.owner]
    is_moved = any(canonical(item.owner) != optimizer.owner for item in optimizer.leaves[:1])
    if called and not is_moved:
        return called  # What rules have called so since then has another optimizer.
    sources = {p for e in entries if e.owner == network.network.owner for p in e.sources}
    return [entry for entry in own if not sources.isdisjoint(entry.sources)] or own


def _is_param(item: Wanted) -> bool:
    kind = item.leaf.kind
    return kind is not None and issubclass(kind, nnx.Param)


def parameters_of(network: Matched, root: Tokens, lone: bool) -> dict[Tokens, Wanted]:
    """Returns the weights that an optimizer may train, by their canonical paths below its model's root."""
    weights: Sequence[Wanted] = network.weights
    if any(item.leaf.kind for item in weights):
        weights = [item for item in weights if item.leaf.kind]  # A number beside Variables is no parameter.
    parameters: dict[Tokens, Wanted] = {}
    # Beside a parameter, a copy of it may be wanted under the same path of another collection.
    for item in sorted(weights, key=_is_param, reverse=True):
        parameters.setdefault(strip(item.tokens, root), item)
        if not lone:
            parameters.setdefault(network.names[item.leaf.path], item)
    return parameters


def trained_of(
    states: Sequence[OptimizerState], parameters: Mapping[Tokens, Wanted]
) -> Mapping[Tokens, str | None]:
    """Returns what an optimizer trains, each `nnx.Param` and whatever it has moments of, with collections."""
    moments = frozenset[Path]().union(*(state.parameters for state in states))
    return {at: item.collection for at, item in parameters.items() if _is_param(item) or at in moments}
