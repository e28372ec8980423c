"""An optimizer's leaves as states of optax, and which stored state each wanted one is.

A leaf's path below `opt_state` is a place, a field and, for a moment, the path of a
parameter: `1/inner_state/0`, `mu`, `dense/kernel`. The place is made of containers
alone (numbers of a chain, `inner_state`), and the leaves of one place are one state.

A state is told by its fields and by the parameters that it keeps moments of, never by
a single name: nearly every state has a `count`. States are paired in order (`alignment`);
a state that changed its fields, or whose parameters are others, is another state.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property

from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.paths import Path, Tokens, is_number
from orbax_nnx_handler.planning.core.recipes import reads
from orbax_nnx_handler.planning.mapping.alignment import align
from orbax_nnx_handler.planning.mapping.roots import strip
from orbax_nnx_handler.planning.rules.entries import Entry

_CONTAINERS = frozenset(
    {
        *("inner_state", "inner_states", "inner_opt_state", "opt_state"),
        *("base_optimizer_state", "fast_state", "adv_state", "hessian_fn_state"),
    }
)
"""Fields of optax's wrappers that hold other states (`optax.transforms`, `optax.contrib`)."""

_RECORDS = frozenset({"hyperparams", "hyperparams_states", "skip_state", "measurement", "info"})
"""Fields of optax's states that hold several scalars by name, and no moments."""

_MOMENTS = frozenset({"mu", "nu", "nu_max", "trace", "ema", "v", "v_row", "v_col", "acc_grads", "grad_acc"})
"""Fields that hold moments in optax's own states, right below the state."""

ORPHAN = "(parameter)"
"""The first key that stands for a parameter which is not among the known ones."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerLeaf:
    """One leaf of an optimizer, stored or wanted.

    Attributes:
        path: The leaf's whole path.
        tokens: The canonical path below `opt_state`; of a leaf with a `slot`, its parameter's.
        shape: Its shape.
        slot: The field, where the layout itself tells field and parameter apart and keeps no states.
    """

    path: Path
    tokens: Tokens
    shape: Shape
    slot: Tokens | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerState:
    """One state of a chain: the leaves of one place.

    Attributes:
        place: The containers down to it, as canonical keys.
        moments: The moments of each field, by parameter.
        scalars: The other leaves, by field.
        doubtful: Whether its leaves are moments under another reading of their paths as well.
    """

    place: Tokens
    moments: Mapping[Tokens, Mapping[Path, OptimizerLeaf]]
    scalars: Mapping[Tokens, OptimizerLeaf]
    doubtful: bool = False

    @cached_property
    def fields(self) -> tuple[frozenset[Tokens], ...]:
        """What tells a state: its moments, its scalars, and names above it that no optax container has."""
        strange = [key for key, label in _kinds(self.place) if not label and not _is_container(key)]
        return frozenset(self.moments), frozenset(self.scalars), self._numbers, frozenset([tuple(strange)])

    @property
    def _numbers(self) -> frozenset[Tokens]:
        """The fields with one number a parameter beside others of its shape, as Novograd's `nu`."""
        single = {name for name, field in self.moments.items() if not any(m.shape for m in field.values())}
        return frozenset(single) if single != self.moments.keys() else frozenset()

    @cached_property
    def label(self) -> Tokens:
        """The label of the group of parameters that it is for (`inner_states/<label>`)."""
        return tuple(key for key, label in _kinds(self.place) if label)

    @cached_property
    def parameters(self) -> frozenset[Path]:
        """All parameters that it keeps moments of."""
        return frozenset(parameter for field in self.moments.values() for parameter in field)

    def __str__(self) -> str:
        """Returns place and fields: `1/inner_state {count, mu, nu}`."""
        place = "/".join(key.removeprefix("#") for key in self.place)
        names = ["/".join(field) for field in (*self.scalars, *self.moments) if field]
        return f"{place} {{{', '.join(sorted(names))}}}".lstrip()


@dataclasses.dataclass(frozen=True, kw_only=True)
class UndecidedState:
    """A wanted state that may be several stored ones, or whose paths can be read in two ways.

    Attributes:
        wanted: The state.
        stored: The stored ones that it may be.
    """

    wanted: OptimizerState
    stored: tuple[OptimizerState, ...]

    @property
    def paths(self) -> tuple[Path, ...]:
        """The wanted leaves that it is about."""
        moments = [leaf for field in self.wanted.moments.values() for leaf in field.values()]
        return tuple(leaf.path for leaf in (*self.wanted.scalars.values(), *moments))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairedStates:
    """Which stored state each wanted one is; what is in none of these has no counterpart.

    Attributes:
        pairs: The pairs, wanted first.
        undecided: Wanted states that may be several stored ones.
        missing: Wanted states that are not stored.
        unexpected: Stored states that are not wanted.
    """

    pairs: Sequence[tuple[OptimizerState, OptimizerState]]
    undecided: Sequence[UndecidedState]
    missing: Sequence[OptimizerState]
    unexpected: Sequence[OptimizerState]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredOptimizer:
    """What a checkpoint holds of one optimizer.

    Attributes:
        states: Its states, in the order of the chain.
        slots: Moments by field and parameter, in a layout that keeps no states (T5X).
        count: The step that is every state's count, in a layout whose optimizers keep none of their own.
    """

    states: Sequence[OptimizerState]
    slots: Mapping[Tokens, Mapping[Path, OptimizerLeaf]]
    count: Path | None = None

    def of_parameter(self, parameter: Path) -> Iterable[Path]:
        """Yields the stored moments of a stored parameter."""
        for fields in (self.slots, *(state.moments for state in self.states)):
            for field in fields.values():
                if parameter in field:
                    yield field[parameter].path


def read_stored(
    leaves: Sequence[OptimizerLeaf], parameters: Mapping[Tokens, Path], count: Path | None = None
) -> StoredOptimizer:
    """Takes a stored optimizer apart.

    Args:
        leaves: Its leaves.
        parameters: The stored paths of the parameters that it may train, by canonical path.
        count: The step, where the layout keeps no other count.
    """
    slots: dict[Tokens, dict[Path, OptimizerLeaf]] = defaultdict(dict)
    for leaf in leaves:
        if leaf.slot is not None:
            slots[leaf.slot][parameters.get(leaf.tokens, (ORPHAN, *leaf.tokens))] = leaf
    return StoredOptimizer(states=read_states(leaves, parameters), slots=dict(slots), count=count)


def read_states(
    leaves: Iterable[OptimizerLeaf], parameters: Mapping[Tokens, Path], above: Tokens = ()
) -> list[OptimizerState]:
    """Takes the leaves of one optimizer apart, and returns its states in the order of the chain.

    Args:
        leaves: The leaves of one side.
        parameters: The parameters that this side knows, by canonical path; a parameter may
            have several spellings. Without any, the first name below the containers is the field.
        above: Keys above the model. The optimizer may have been built for any module on the
            way to it, so an end of them may stand between a field and a parameter.
    """
    reader = _Reader(parameters, above)
    listed = [leaf for leaf in leaves if leaf.slot is None]
    boxed = bool(listed) and all(leaf.tokens[-1:] == ("value",) for leaf in listed)
    left = [leaf for leaf in listed if not reader.add_known(leaf)]
    reader.add_others(left, boxed)
    return reader.states()


class _Reader:
    """Sorts leaves by place, field and parameter."""

    def __init__(self, parameters: Mapping[Tokens, Path], above: Tokens) -> None:
        self.parameters = parameters
        self.above = {above[at:] for at in range(len(above))} | {("params",), ()}
        self.wrappers: set[Tokens] = set()
        self.moments: dict[Tokens, dict[Tokens, dict[Path, OptimizerLeaf]]] = defaultdict(
            lambda: defaultdict(dict)
        )
        self.scalars: dict[Tokens, dict[Tokens, OptimizerLeaf]] = defaultdict(dict)
        self.between: set[Tokens] = set()
        # Where one parameter's path ends in another's, a leaf may be a moment of either.
        self.inner = any(_ends(tokens[1:], parameters) for tokens in parameters)
        self.either: set[Tokens] = set()
        self.sure: set[Tokens] = set()

    def add_known(self, leaf: OptimizerLeaf) -> bool:
        """Adds a moment of a parameter that is known; tells whether it is one."""
        tokens = leaf.tokens
        at = _depth(tokens)
        rest = tokens[at + 1 :]
        if rest in self.parameters:
            if self.inner and tokens[at] not in _MOMENTS:
                (self.either if _ends(rest[1:], self.parameters) else self.sure).add(tokens[: at + 1])
            self.between.add(())
            return self._add_moment(tokens[:at], tokens[at : at + 1], rest, leaf)
        if tokens[at:] in self.parameters:
            return self._add_moment(tokens[:at], (), tokens[at:], leaf)
        end = next((end for end in range(len(tokens)) if tokens[end:] in self.parameters), None)
        if end is None or end == 0:
            return False
        if end > at and tokens[at + 1 : end] in self.above:
            self.between.add(tokens[at + 1 : end])
            return self._add_moment(tokens[:at], tokens[at : at + 1], tokens[end:], leaf)
        # A wrapper that optax does not have.
        place, field = (
            (tokens[:end], ()) if is_number(tokens[end - 1]) else (tokens[: end - 1], tokens[end - 1 : end])
        )
        self.wrappers |= {place[:length] for length in range(1, len(place) + 1)}
        return self._add_moment(place, field, tokens[end:], leaf)

    def _add_moment(self, place: Tokens, field: Tokens, parameter: Tokens, leaf: OptimizerLeaf) -> bool:
        known = self.parameters[parameter]
        if known in self.moments[place][field]:
            # Two leaves claim one moment: neither reading of the second is any better.
            known = (ORPHAN, *leaf.tokens)
        self.moments[place][field][known] = leaf
        return True

    def add_others(self, leaves: Sequence[OptimizerLeaf], boxed: bool) -> None:
        """Adds scalars, and moments of parameters that are not known."""
        parts = [(leaf, leaf.tokens[:-1] if boxed else leaf.tokens) for leaf in leaves]
        apart = [(leaf, tokens, _depth(tokens, self.wrappers)) for leaf, tokens in parts]
        rests = [
            tokens[at + 1 :] for _, tokens, at in apart if tokens[at + 1 :] and tokens[at] not in _RECORDS
        ]
        # An optimizer that runs on the whole variables dict: `mu/params/...`.
        if rests and not self.parameters and all(rest[0] == "params" for rest in rests):
            self.between = {("params",)}
        for leaf, tokens, at in apart:
            place, field, rest = tokens[:at], tokens[at : at + 1], tokens[at + 1 :]
            if not rest or tokens[at] in _RECORDS:
                self.scalars[place][tokens[at:]] = leaf
            else:
                below = strip(rest, next(iter(self.between))) if len(self.between) == 1 else rest
                self.moments[place][field][(ORPHAN, *below)] = leaf

    def states(self) -> list[OptimizerState]:
        """Returns the states in the order of their places."""
        doubtful = {field[:-1] for field in self.either - self.sure}
        return [
            OptimizerState(
                place=place,
                moments=self.moments.get(place, {}),
                scalars=self.scalars.get(place, {}),
                doubtful=place in doubtful or self._is_bare(place),
            )
            for place in sorted(self.moments.keys() | self.scalars.keys(), key=_in_order)
        ]

    def _is_bare(self, place: Tokens) -> bool:
        """Tells whether a state could be the moments themselves, its field a module of the model."""
        if place in self.scalars or not self.inner or () in self.moments[place]:
            return False
        leaves = [leaf for field in self.moments[place].values() for leaf in field.values()]
        return all(leaf.tokens[len(place) :] in self.parameters for leaf in leaves)


def _depth(tokens: Tokens, wrappers: Collection[Tokens] = ()) -> int:
    """Returns how many keys at the start of a path are containers."""
    at = 0
    for key, label in _kinds(tokens):
        numbered = at + 1 < len(tokens) and is_number(tokens[at + 1]) and key not in _RECORDS
        if not (label or _is_container(key) or numbered or tokens[: at + 1] in wrappers):
            break
        at += 1
    return at


def _is_container(key: str) -> bool:
    return is_number(key) or key in _CONTAINERS


def _kinds(place: Tokens) -> Iterable[tuple[str, bool]]:
    """Yields each key of a place, and whether it is a label: what stands below `inner_states`."""
    labelled = False
    for at, key in enumerate(place):
        labelled = labelled and key != "inner_state"
        yield key, labelled
        # `optax.partition` keeps a masked state under each label; without one, a label is one key.
        labelled = (key == "inner_states") or (labelled and "inner_state" in place[at + 1 :])


def _in_order(place: Tokens) -> list[tuple[bool, int, str]]:
    return [(is_number(key), int(key[1:]) if is_number(key) else 0, key) for key in place]


def _ends(tokens: Tokens, parameters: Collection[Tokens]) -> bool:
    """Tells whether a path, or an end of it, is a parameter."""
    return any(tokens[at:] in parameters for at in range(len(tokens)))


Sources = Callable[[Path], Collection[Path]]
"""The stored parameters that a wanted one is made from, by the wanted one."""


def pair_states(
    wanted: Sequence[OptimizerState], stored: Sequence[OptimizerState], sources: Sources
) -> PairedStates:
    """Pairs the states of two optimizers.

    Args:
        wanted: The target's states.
        stored: The checkpoint's.
        sources: The stored parameters that each wanted one is made from.
    """
    needs = [{source for item in state.parameters for source in sources(item)} for state in wanted]
    pairing = _Pairing(wanted, stored, needs)
    pairing.pair(exact=True)
    # A group of parameters that has grown or shrunk.
    pairing.pair(exact=False)
    return pairing.result()


class _Pairing:
    """Pairs states round by round; every round with what the ones before it left."""

    def __init__(
        self, wanted: Sequence[OptimizerState], stored: Sequence[OptimizerState], needs: Sequence[set[Path]]
    ) -> None:
        self.wanted, self.stored, self.needs = wanted, stored, needs
        everything = {parameter for state in stored for parameter in state.parameters}
        self.shared = everything & set[Path]().union(*needs)
        self.labels = {s.label for s in wanted} & {s.label for s in stored} - {()}
        self.pairs: dict[int, int] = {}
        self.undecided: dict[int, tuple[int, ...]] = {}

    def pair(self, *, exact: bool) -> None:
        here = [at for at in range(len(self.wanted)) if at not in self.pairs and at not in self.undecided]
        taken = {*self.pairs.values(), *(at for there in self.undecided.values() for at in there)}
        there = [at for at in range(len(self.stored)) if at not in taken]
        by_fields: dict[object, list[int]] = defaultdict(list)
        for index, at in enumerate(there):
            by_fields[self.stored[at].fields].append(index)
        choices = [
            {
                index
                for index in by_fields.get(self.wanted[at].fields, ())
                if self._fits(at, there[index], exact)
            }
            for at in here
        ]
        found = align(choices, len(there))
        self.pairs |= {here[left]: there[right] for left, right in found.pairs.items()}
        self.undecided |= {
            here[left]: tuple(there[at] for at in right) for left, right in found.undecided.items()
        }

    def _fits(self, here: int, there: int, exact: bool) -> bool:
        wanted, stored = self.wanted[here], self.stored[there]
        if wanted.label != stored.label and {wanted.label, stored.label} & self.labels:
            # A label of both sides is its own counterpart.
            return False
        if not wanted.moments:
            return exact
        needs, has = self.needs[here] & self.shared, stored.parameters & self.shared
        return bool(needs & has) and (not exact or not needs ^ has)

    def result(self) -> PairedStates:
        pairs = [(self.wanted[here], self.stored[there]) for here, there in self.pairs.items()]
        sure = [pair for pair in pairs if not (pair[0].doubtful or pair[1].doubtful)]
        unsure = [UndecidedState(wanted=a, stored=(b,)) for a, b in pairs if a.doubtful or b.doubtful]
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


def split(tokens: Tokens, parameters: Collection[Tokens]) -> tuple[Tokens, Tokens | None]:
    """Returns slot and parameter of an optimizer path; the parameter is None where there is none."""
    at = _depth(tokens)
    for end in (at + 1, *range(len(tokens))):
        if tokens[end:] in parameters:
            return tokens[:end], tokens[end:]
    return tokens, None


def parameter_paths(
    entries: Iterable[Entry], root: Tokens, collections: Collection[str | None] = ("params", None)
) -> dict[Tokens, Path]:
    """Returns stored path by canonical path, for stored parameters as they are on disk.

    Args:
        entries: What the checkpoint holds of the model.
        root: Keys above the model within its collection.
        collections: Those whose leaves an optimizer may train. A copy (`ema_params`) has no moments.
    """
    found: dict[Tokens, Path] = {}
    for entry in entries:
        if entry.collection not in collections:
            continue
        (path,) = reads(entry.recipe)
        tokens = entry.tokens
        below = strip(tokens, root)
        found.setdefault(tokens, path)
        if below is not tokens:
            found.setdefault(below, path)
        unboxed = entry.unboxed
        if unboxed is not None:
            found.setdefault(unboxed, path)
            found.setdefault(below[:-1], path)
    return found
