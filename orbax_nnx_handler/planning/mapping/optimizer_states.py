"""An optimizer's leaves as states of optax.

A leaf's path below `opt_state` is a place, a field and, for a moment, the path of a
parameter: `1/inner_state/0`, `mu`, `dense/kernel`. The place is made of containers
alone (numbers of a chain, `inner_state`), and the leaves of one place are one state.
A module of the model may be called like a field or a container: what stands below a
field is the parameter's.
"""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType

from orbax_nnx_handler.planning.core.leaves import (
    CONTAINERS,
    LABELLED,
    MOMENTS,
    OWN_PARTS,
    Shape,
    begins_a_state,
    is_optax_state,
    record,
)
from orbax_nnx_handler.planning.core.paths import Path, Tokens, canonical, is_number, printable, segments
from orbax_nnx_handler.planning.core.recipes import reads
from orbax_nnx_handler.planning.layouts.layout import Placement
from orbax_nnx_handler.planning.mapping.roots import strip
from orbax_nnx_handler.planning.rules import Rename, Rule
from orbax_nnx_handler.planning.rules.entries import OPT_STATE, Entry
from orbax_nnx_handler.planning.rules.rule import Pattern
from orbax_nnx_handler.planning.target.roles import Wanted

_RECORDS = frozenset({"hyperparams", "hyperparams_states", "skip_state", "measurement", "info"})
"""Fields of optax's states that hold several scalars by name, and no moments."""

ORPHAN = "(parameter)"
"""The first key that stands for a parameter which is not among the known ones."""


@record
class OptimizerLeaf:
    """One leaf of an optimizer, stored or wanted.

    Attributes:
        path: The leaf's whole path.
        tokens: The canonical path below `opt_state`.
        shape: Its shape.
    """

    path: Path
    tokens: Tokens
    shape: Shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerState:
    """One state of a chain: the leaves of one place.

    Attributes:
        place: The containers down to it, as canonical keys.
        moments: The moments of each field, by parameter.
        scalars: The other leaves, by field.
        doubtful: Whether its leaves may be other moments: a module is called like a field.
        parts: Its fields that hold a further state, which no other kind of state has.
    """

    place: Tokens
    moments: Mapping[Tokens, Mapping[Path, OptimizerLeaf]]
    scalars: Mapping[Tokens, OptimizerLeaf]
    doubtful: bool = False
    parts: frozenset[str] = frozenset()

    @cached_property
    def fields(self) -> tuple[frozenset[Tokens], ...]:
        """What tells a state: its moments, its scalars, and names above it that no optax container has."""
        strange = [key for key, label in _kinds(self.place) if not label and not _is_container(key)]
        parts = frozenset((part,) for part in self.parts)
        own = frozenset(self.moments), frozenset(self.scalars), parts
        return *own, self._numbers, frozenset([tuple(strange)])

    @property
    def _numbers(self) -> frozenset[Tokens]:
        """The fields with one number a parameter beside others of its shape, as Novograd's `nu`."""
        single = {name for name, field in self.moments.items() if not any(m.shape for m in field.values())}
        return frozenset(single) if len(single) < len(self.moments) else frozenset()

    @cached_property
    def label(self) -> Tokens:
        """The label of the group of parameters that it is for (`inner_states/<label>`)."""
        return tuple(key for key, label in _kinds(self.place) if label)

    @property
    def leaves(self) -> Iterator[OptimizerLeaf]:
        """Its leaves, scalars first."""
        yield from self.scalars.values()
        yield from (leaf for field in self.moments.values() for leaf in field.values())

    @cached_property
    def parameters(self) -> frozenset[Path]:
        """All parameters that it keeps moments of."""
        return frozenset(parameter for field in self.moments.values() for parameter in field)

    def __str__(self) -> str:
        """Returns place and fields: `1/inner_state {count, mu, nu}`."""
        place = "/".join(key.removeprefix("#") for key in self.place)
        names = ["/".join(field) for field in (*self.scalars, *self.moments) if field]
        return printable(f"{place} {{{', '.join(sorted(names))}}}".lstrip())


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredStates:
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


def read_stored(placements: Iterable[Placement], parameters: Mapping[Tokens, Path]) -> StoredStates:
    """Takes one stored optimizer apart.

    Args:
        placements: Its leaves and its step; those of other sections are left out.
        parameters: The stored paths of the parameters that it may train, by canonical path.
    """
    leaves: list[OptimizerLeaf] = []
    slots: dict[Tokens, dict[Path, OptimizerLeaf]] = defaultdict(dict)
    count: Path | None = None
    for item in placements:
        if item.section == "step" and item.slot == ("count",):
            count = item.leaf.path
        if item.section != "optimizer":
            continue
        leaf = OptimizerLeaf(path=item.leaf.path, tokens=item.tokens, shape=item.leaf.shape)
        if item.slot is None:
            leaves.append(leaf)
        else:
            slots[canonical(item.slot)][parameters.get(leaf.tokens, (ORPHAN, *leaf.tokens))] = leaf
    return StoredStates(states=read_states(leaves, parameters), slots=dict(slots), count=count)


def parted_by_rules(placements: Sequence[Placement], rules: Iterable[Rule]) -> Sequence[Placement]:
    """Returns the placements, the parts of an `opt_state` that renames call by name as fields of their own.

    A program may keep an optimizer for each network there: `("opt_state/enc", "enc/opt_state")`.
    """
    renames = [rule.pattern for rule in rules if isinstance(rule, Rename) and not rule.regex]
    patterns = [pattern for pattern in map(Pattern, renames) if OPT_STATE in pattern.templates[:-1]]
    parts: dict[Path, list[Placement]] = defaultdict(list)
    for item in placements if patterns else ():
        if item.section == "optimizer" and len(item.path) > 1 and not begins_a_state(item.path):
            parts[item.leaf.path[: 1 - len(item.path)]].append(item)
    named = {
        part
        for part, items in parts.items()
        if is_optax_state([item.path[1:] for item in items])
        and any(span.stop == len(segments(part)) for p in patterns for span in p.spans(segments(part)))
    }
    moved = {
        id(item): dataclasses.replace(item, section="other", collection=None, owner=(), path=item.leaf.path)
        for part in named
        for item in parts[part]
    }
    return [moved.get(id(item), item) for item in placements] if moved else placements


def wanted_states(
    wanted: Iterable[Wanted], parameters: Iterable[Tokens], above: Tokens = ()
) -> list[OptimizerState]:
    """Takes one wanted optimizer apart.

    Args:
        wanted: Its leaves.
        parameters: The canonical paths of the weights below the target's root; none for an
            optimizer without its model.
        above: That root.
    """
    leaves = [OptimizerLeaf(path=w.leaf.path, tokens=w.tokens, shape=w.leaf.shape) for w in wanted]
    return read_states(leaves, {tokens: tokens for tokens in parameters}, above)


def virtual_parameters(wanted: Sequence[Wanted], above: Tokens) -> list[Wanted]:
    """Returns the parameters that an optimizer without its model was built for, below a network's keys."""
    leaves = {item.leaf.path: item.leaf for item in wanted}
    found: dict[Path, Wanted] = {}
    for state in wanted_states(wanted, ()):
        for (_, *name), moment in (item for field in state.moments.values() for item in field.items()):
            path = (*above, *name)
            known = found.get(path)
            if known is None or len(known.leaf.shape) < len(moment.shape):
                leaf = dataclasses.replace(leaves[moment.path], path=(ORPHAN, *path), kind=None)
                found[path] = Wanted(leaf=leaf, role="model", path=path)
    return list(found.values())


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
    listed = list(leaves)
    # A moment in a box beside a plain `count`, as where `tx.init` has been given an `nnx.State`.
    boxed = all(_is_boxed(leaf.tokens) or len(leaf.tokens) == _depth(leaf.tokens) + 1 for leaf in listed)
    left = [leaf for leaf in listed if not reader.add_known(leaf)]
    reader.tell_counts()
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
        self.contested: set[Tokens] = set()
        # Where one parameter's path ends in another's, a leaf may be a moment of either.
        self.either: set[Tokens] = set()
        self.sure: set[Tokens] = set()

    def add_known(self, leaf: OptimizerLeaf) -> bool:
        """Adds a moment of a parameter that is known; tells whether it is one."""
        tokens = leaf.tokens
        at = _depth(tokens)
        rest = tokens[at + 1 :]
        if rest in self.parameters:
            if tokens[at] not in MOMENTS:
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

    def tell_counts(self) -> None:
        """Takes a state's number for its count or rate, though a parameter is called so.

        A state that is itself like the parameters has more than such numbers.
        """
        for place, fields in self.moments.items():
            bare = fields.get((), {}).values()
            if bare and not any(leaf.shape or len(leaf.tokens) > len(place) + 1 for leaf in bare):
                self.scalars[place] |= {leaf.tokens[len(place) :]: leaf for leaf in bare}
                del fields[()]

    def _add_moment(self, place: Tokens, field: Tokens, parameter: Tokens, leaf: OptimizerLeaf) -> bool:
        known = self.parameters[parameter]
        if known in self.moments[place][field]:
            # Two leaves claim one moment, and neither more than the other.
            self.contested.add(place)
            known = (ORPHAN, *leaf.tokens)
        self.moments[place][field][known] = leaf
        return True

    def add_others(self, leaves: Sequence[OptimizerLeaf], boxed: bool) -> None:
        """Adds scalars, and moments of parameters that are not known."""
        parts = [
            (leaf, leaf.tokens[:-1] if boxed and _is_boxed(leaf.tokens) else leaf.tokens) for leaf in leaves
        ]
        apart = [(leaf, tokens, _depth(tokens, self.wrappers)) for leaf, tokens in parts]
        rests = [
            tokens[at + 1 :] for _, tokens, at in apart if tokens[at + 1 :] and tokens[at] not in _RECORDS
        ]
        # An optimizer that runs on the variables dict of a module that is not known: `mu/params/...`.
        if rests and not self.between and all(rest[0] == "params" for rest in rests):
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
        doubtful = self.contested | {field[:-1] for field in self.either - self.sure}
        places = self.moments.keys() | self.scalars.keys()
        within = {(place[:at], key) for place in places for at, key in enumerate(place) if key in OWN_PARTS}
        return [
            OptimizerState(
                place=place,
                moments=self.moments.get(place, {}),
                scalars=self.scalars.get(place, {}),
                doubtful=place in doubtful or self._is_bare(place),
                parts=frozenset(key for above, key in within if above == place),
            )
            for place in sorted(places, key=_in_order)
        ]

    def _is_bare(self, place: Tokens) -> bool:
        """Tells whether a state could be the moments themselves, its field a module of the model."""
        if place in self.scalars or () in self.moments[place]:
            return False
        leaves = [leaf for field in self.moments[place].values() for leaf in field.values()]
        return all(leaf.tokens[len(place) :] in self.parameters for leaf in leaves)


def _is_boxed(tokens: Tokens) -> bool:
    return len(tokens) > 1 and tokens[-1] == "value"


def _depth(tokens: Tokens, wrappers: Collection[Tokens] = ()) -> int:
    """Returns how many keys at the start of a path are containers."""
    at, last = 0, len(tokens) - 1
    while at <= last and (is_number(tokens[at]) or tokens[at] in CONTAINERS):
        at += 1
    if at > last or not (wrappers or tokens[at] == LABELLED or (at < last and is_number(tokens[at + 1]))):
        return at  # Nearly every path.
    return sum(1 for _ in itertools.takewhile(bool, _are_containers(tokens, wrappers)))


def _are_containers(tokens: Tokens, wrappers: Collection[Tokens]) -> Iterator[bool]:
    for at, (key, label) in enumerate(_kinds(tokens)):
        numbered = at + 1 < len(tokens) and is_number(tokens[at + 1]) and key not in _RECORDS
        yield label or numbered or _is_container(key) or tokens[: at + 1] in wrappers


def _is_container(key: str) -> bool:
    return is_number(key) or key in CONTAINERS or key == LABELLED


def _kinds(place: Tokens) -> Iterable[tuple[str, bool]]:
    """Yields each key of a place, and whether it is a label: what stands below `inner_states`."""
    labelled = False
    for at, key in enumerate(place):
        labelled = labelled and key != "inner_state"
        yield key, labelled
        # `optax.partition` keeps a masked state under each label; without one, a label is one key.
        labelled = (key == LABELLED) or (labelled and "inner_state" in place[at + 1 :])


def _in_order(place: Tokens) -> list[tuple[bool, int, str]]:
    return [(is_number(key), int(key[1:]) if is_number(key) else 0, key) for key in place]


def _ends(tokens: Tokens, parameters: Collection[Tokens]) -> bool:
    """Tells whether a path, or an end of it, is a parameter."""
    return any(tokens[at:] in parameters for at in range(len(tokens)))


def split(tokens: Tokens, parameters: Collection[Tokens]) -> tuple[Tokens, Tokens | None]:
    """Returns slot and parameter of an optimizer path; the parameter is None where there is none."""
    at = _depth(tokens)
    for end in (at + 1, *range(len(tokens))):
        if tokens[end:] in parameters:
            return tokens[:end], tokens[end:]
    return tokens, None


_KEPT_ASIDE: Tokens = ("model",)
"""The key of the model's Variables among what is kept aside, some of which may be trained (MaxText)."""


def parameter_paths(
    entries: Iterable[Entry], root: Tokens, trained: Mapping[Tokens, str | None] = MappingProxyType({})
) -> dict[Tokens, Path]:
    """Returns stored path by canonical path, for stored parameters as they are on disk.

    Args:
        entries: What the checkpoint holds of the model.
        root: Keys above the model within its collection.
        trained: What the target's optimizer trains: collection by canonical path. A copy (`ema_params`)
            has no moments, and of what is kept aside nearly nothing has: numbers of the program's lie there.
    """
    collections = {"params", None, *trained.values()}

    def may_be_trained(entry: Entry) -> bool:
        return (
            strip(entry.tokens, _KEPT_ASIDE) in trained
            if entry.section == "aux"
            else entry.collection in collections
        )

    own = [entry for entry in entries if may_be_trained(entry)]
    # What has a parameter's path in another collection, or aside, has no moments: those are the parameter's.
    own.sort(key=lambda entry: (entry.section == "aux", entry.collection not in ("params", None)))
    boxes = _boxes(own)
    found: dict[Tokens, Path] = {}
    for entry in own:
        (path,) = reads(entry.recipe)
        tokens = entry.tokens
        below = strip(tokens, _KEPT_ASIDE if entry.section == "aux" else root)
        found.setdefault(tokens, path)
        if below is not tokens:
            found.setdefault(below, path)
        unboxed = entry.unboxed
        if unboxed in boxes:
            found.setdefault(unboxed, path)
            found.setdefault(below[:-1], path)
    return found


def _boxes(entries: Sequence[Entry]) -> set[Tokens]:
    """Returns the paths that hold a `value` and nothing else, as a box of `nn.with_partitioning` does."""
    boxes = {entry.tokens[:-1] for entry in entries if entry.unboxed is not None}
    others = (entry.tokens for entry in entries if boxes and entry.unboxed is None)
    return boxes - {tokens[:at] for tokens in others for at in range(len(tokens))}
