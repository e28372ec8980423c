"""What the caller wants and what the disk holds, leaf by leaf; and names that optax gives to its states."""

import dataclasses
import functools
import itertools
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, Self, TypeVar, dataclass_transform, overload

import jax
import numpy as np

from orbax_nnx_handler.planning.core.paths import Path, without_box

Shape = tuple[int, ...]

_Made = TypeVar("_Made")
_Value = TypeVar("_Value")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def record(made: type[_Made]) -> type[_Made]:
    """Makes a frozen keyword-only dataclass of which planning makes one for each leaf.

    Its instances take half the time of a plain one's: the generated `__init__` of a frozen class sets
    field by field what is here one update. They take 110 bytes more, so what stays as long as
    the result is a plain dataclass. What is left out stays the class's own default. Of wrong arguments only
    too few are found here; the type checker finds all.
    """
    decorated: Any = dataclasses.dataclass(frozen=True, kw_only=True)(made)
    checked = decorated.__init__
    names = [field.name for field in dataclasses.fields(decorated)]
    least = sum(not hasattr(decorated, name) for name in names)

    @functools.wraps(checked)
    def init(self: Any, /, **fields: Any) -> None:
        if len(fields) < least:
            checked(self, **fields)  # Says what is missing.
        self.__dict__.update(fields)

    decorated.__init__ = init
    return decorated


def with_fields(item: _Made, **fields: Any) -> _Made:
    """Returns a record with some fields changed, as `dataclasses.replace` does, in a sixth of the time."""
    new = object.__new__(type(item))
    new.__dict__.update(vars(item), **fields)
    for name in _derived_of(type(item)):  # From the fields as they were.
        new.__dict__.pop(name, None)
    return new


@functools.cache
def _derived_of(made: type[Any]) -> tuple[str, ...]:
    return tuple(name for one in made.__mro__ for name, x in vars(one).items() if isinstance(x, derived))


class derived(Generic[_Value]):  # noqa: N801 (a decorator, like `property`)
    """A `functools.cached_property` without the lock that Python 3.11 takes: several times faster."""

    def __init__(self, function: Callable[[Any], _Value]) -> None:
        self._function, self.__doc__ = function, function.__doc__

    def __set_name__(self, owner: type[Any], name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type[Any]) -> Self: ...
    @overload
    def __get__(self, instance: object, owner: type[Any]) -> _Value: ...
    def __get__(self, instance: Any, owner: type[Any]) -> Any:
        if instance is None:
            return self
        value = instance.__dict__[self._name] = self._function(instance)
        return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class WantedLeaf:
    """One variable of the target.

    Attributes:
        path: Keys from the target's root, the indices of tuples included.
        kind: The Variable's type; None where the target is a pure dict.
        shape: The shape to come back.
        dtype: The dtype to come back; a key dtype for random keys.
        sharding: Where the value must live, or None for the documented default.
        value: The concrete value the target carries, or None when abstract.
        dtype_is_chosen: Whether the leaf's restore args chose the dtype: it then wins
            over `dtype="stored"` too.
        sharding_is_default: Whether nothing says where the value must live, so that an array which
            is on devices already may stay on them.
    """

    path: Path
    kind: type[Any] | None
    shape: Shape
    dtype: np.dtype[Any]
    sharding: jax.sharding.Sharding | None = None
    value: Any = None
    dtype_is_chosen: bool = False
    sharding_is_default: bool = False

    def __getstate__(self) -> dict[str, Any]:
        # Devices and arrays belong to this process; what a plan says of the leaf does not need them.
        return vars(self) | {"kind": _importable(self.kind), "sharding": None, "value": None}

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: Any) -> Self:
        return self

    @property
    def nbytes(self) -> int:
        """Size in bytes of the whole array, over all devices."""
        return math.prod(self.shape) * self.dtype.itemsize


def total_nbytes(leaves: Iterable[WantedLeaf], below: float = math.inf) -> int:
    """Returns the bytes of all leaves, those that have so many each or more left out."""
    kinds = Counter([(leaf.shape, leaf.dtype.itemsize) for leaf in leaves])  # A model has few of them.
    sizes = ((math.prod(shape) * itemsize, count) for (shape, itemsize), count in kinds.items())
    return sum(size * count for size, count in sizes if size < below)


def _importable(kind: type[Any] | None) -> type[Any] | None:
    """Returns the type, or the first one above it that a pickle can name: a class may live in a function."""
    if kind is None:
        return None
    return next(
        each
        for each in kind.__mro__
        if getattr(sys.modules.get(each.__module__), each.__qualname__, 0) is each
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredLeaf:
    """One array of the checkpoint, from metadata alone.

    Attributes:
        path: Keys from the item's root, as the writing program had them.
        shape: The stored shape.
        dtype: The stored dtype, or None for a value that is no array (a string).
        chunk_shape: Shape of one chunk on disk, where the metadata tells.
        key_impl: The PRNG implementation ("threefry2x32") of a stored random key.
    """

    path: Path
    shape: Shape
    dtype: np.dtype[Any] | None
    chunk_shape: Shape | None = None
    key_impl: str | None = None

    @property
    def nbytes(self) -> int:
        """Size in bytes, uncompressed."""
        if self.dtype is None:
            return 0
        return math.prod(self.shape) * self.dtype.itemsize


OPT_STATE = "opt_state"
"""The field of a train state, and the attribute of an `nnx.Optimizer`, that holds the state."""

OWN_PARTS = frozenset({"fast_state", "adv_state", "hessian_fn_state"})
"""Fields of one kind of optax's states alone that hold a further state (lookahead, SAM, Sophia)."""

CONTAINERS = OWN_PARTS | {"inner_state", "inner_opt_state", OPT_STATE, "base_optimizer_state"}
"""Fields of optax's wrappers that hold other states (`optax.transforms`, `optax.contrib`)."""

LABELLED = "inner_states"
"""The field of `optax.partition` that holds a state for each label."""

LSTM_GATES, GRU_GATES = "ifgo", "rzn"
"""The gates in the order in which NNX's LSTM and GRU cells split their product (flax/nnx/nn/recurrent.py)."""

FACTORED = ("v_row", "v_col")
"""Moments without the largest and without the second axis of a parameter (optax/_src/factorized.py)."""

UNUSED = frozenset({*FACTORED, "v", "m", "ema"})
"""Fields in which Adafactor keeps a zero of shape (1,) for a parameter that it does not use them for."""

MOMENTS = frozenset(
    {
        *("mu", "nu", "nu_max", "trace", "ema", "v", *FACTORED, "momentum"),
        *("acc_grads", "grad_acc", "sum_of_squares"),
    }
)
"""Fields that hold moments in optax's own states, right below the state."""

COPIES = frozenset({"x0", "z", "params0", "init_params", "init_particles", "params", "cache"})
"""Fields that hold copies of the parameters themselves (optax.contrib: `_madgrad.py`, `_mechanic.py`,
`_schedule_free.py`, `_prodigy.py`, `_dog.py`, `_cocob.py`, `_sam.py`; optax/_src/transform.py:
`scale_by_distance_over_gradients`, `scale_by_lbfgs`)."""

OF_GRADIENTS = MOMENTS | {
    *("m", "m1", "m2", "n", "g", "s", "e_g", "e_x", "exp_avg", "exp_avg_sq", "grad", "updates", "found_nan"),
    *("grad_sum", "grad_sum_sq", "grad_sum_of_squares", "cumulative_gradients", "subgradients", "reward"),
    *("previous_gradient", "prev_updates", "step_sizes", "diff_params_memory", "diff_updates_memory"),
    *("scale", "max_dist", "projector"),
}
"""Fields that optax computes of gradients and updates: a constant in a parameter does not change them."""

NUMBERS = frozenset({"count", "mini_step", "gradient_step", "notfinite_count"})
"""Fields that hold a number."""


def is_state(path: Path) -> bool:
    """Tells whether the first key below a chain and its wrappers is a field of an optimizer.

    A number has nothing below it but its box: a module may be called `count`.
    """
    names = list(map(str, path))
    pairs = enumerate(itertools.pairwise(["", *names]))
    own = (at for at, (above, key) in pairs if above != LABELLED and not _is_container(key))
    at = next(own, len(names) - 1)
    is_number = names[at] in NUMBERS and names[at + 1 :] in ([], ["value"])
    return is_number or names[at] in MOMENTS or names[at] == "hyperparams"


def begins_a_state(path: Path) -> bool:
    """Tells whether a path below `opt_state` may lead to a field of an optimizer."""
    return _is_container(str(path[0])) or is_state(path)


def is_optax_state(paths: Collection[Path]) -> bool:
    """Tells whether all that some paths lead to is arranged as optax arranges a state."""
    return all(path and begins_a_state(path) for path in paths) and any(map(is_state, paths))


def _is_container(key: str) -> bool:
    return key.isdecimal() or key in CONTAINERS or key == LABELLED


def optimizer_owners(paths: Iterable[Path]) -> set[Path]:
    """Returns the keys above each `opt_state` of an optimizer, where nothing but the place tells one.

    A module of a model may be called `opt_state` too. An optimizer has its step beside it, as
    `nnx.Optimizer` (flax/nnx/training/optimizer.py) and `TrainState` have, boxed as its own leaves
    are, or what lies below it is arranged as optax arranges it.
    """
    below: dict[Path, list[Path]] = {}
    steps: dict[Path, bool] = {}
    for path in paths:
        plain = without_box(path)
        if plain and str(plain[-1]) == "step":
            steps[plain[:-1]] = plain != path
        for at, key in enumerate(path[:-1]):
            if str(key) == OPT_STATE:
                below.setdefault(path[:at], []).append(path[at + 1 :])
    found: set[Path] = set()
    for owner in sorted(below, key=len):
        # A module within an optimizer's own moments makes no further one.
        within = owner_of((*owner, OPT_STATE), found) is not None
        # A box around the step alone is a module called `step` with a leaf called `value`.
        boxed = steps.get(owner)
        has_step = boxed is not None and (not boxed or all(path[-1] == "value" for path in below[owner]))
        if not within and (has_step or all(map(begins_a_state, below[owner]))):
            found.add(owner)
    return found


def lone_optimizers(paths: Collection[Path]) -> set[Path]:
    """Returns the keys above each `opt_state` that has a step and nothing else beside it: `nnx.Optimizer`."""
    owners = optimizer_owners(path for path in paths if len(path) > 1)
    beside: dict[Path, set[str]] = {owner: set() for owner in owners}
    for path in paths if owners else ():
        for at in range(len(path)):
            if path[:at] in beside:
                beside[path[:at]].add(str(path[at]))
    return {owner for owner, keys in beside.items() if owner and keys == {OPT_STATE, "step"}}


def owner_of(path: Path, owners: Collection[Path]) -> Path | None:
    """Returns the keys above the `opt_state` that a path lies below; None where it is none of an optimizer's.

    Args:
        path: The path.
        owners: What `optimizer_owners` returned.
    """
    for at, key in enumerate(path[:-1]):
        if str(key) == OPT_STATE and path[:at] in owners:
            return path[:at]
    return None


def may_hold_layer(stack: Shape, layer: Shape, number: int) -> bool:
    """Tells whether a stack may hold a layer of a shape and a number; one of four layers has no layer 4."""
    return any(
        (*stack[:axis], *stack[axis + 1 :]) == layer and number < stack[axis] for axis in range(len(stack))
    )


def differing_axes(stored: Shape, wanted: Shape) -> list[int]:
    """Returns the axes on which two shapes of one rank differ; none for other ranks."""
    if len(stored) != len(wanted):
        return []
    return [at for at, (a, b) in enumerate(zip(stored, wanted, strict=True)) if a != b]


def suffice(size: int, count: int, others: Mapping[int, int], least: int = 1) -> bool:
    """Tells whether leaves of one size are enough for one of another, or some of another for one of these.

    Args:
        size: Their number of elements.
        count: How many there are.
        others: How many there are of others, by their number of elements.
        least: How many it takes at least.
    """
    most = max(others.values(), default=0)
    if max(count, most) > len(others):
        pairs = (sorted(((size, count), other)) for other in others.items())
        return any(s > 1 and not big % s and least <= big // s <= there for (s, there), (big, _) in pairs)
    return (size > 1 and any(size * times in others for times in range(least, count + 1))) or any(
        not size % times and others.get(size // times, 0) >= times
        for times in range(least, min(most, size - 1) + 1)
    )


def repeats(stored: Shape, wanted: Shape) -> bool:
    """Tells whether one axis alone is longer, several times over, as that of keys which heads share."""
    axes = differing_axes(stored, wanted)
    return len(axes) == 1 and stored[axes[0]] > 0 and wanted[axes[0]] % stored[axes[0]] == 0 < wanted[axes[0]]


MOST_JOINED = 12
"""Leaves of one kind near each other; of more no one array is made."""


@functools.lru_cache(maxsize=4096)
def totals_with(sizes: tuple[int, ...], size: int) -> frozenset[int]:
    """Returns what one of several sizes is together with others, not all of them its like."""
    totals = {(size, False)}
    for at, other in enumerate(sizes):
        if at != sizes.index(size):
            totals |= {(total + other, is_mixed or other != size) for total, is_mixed in totals}
    return frozenset(total for total, is_mixed in totals if is_mixed)


def permuted(shape: Shape, axes: Sequence[int]) -> Shape:
    """Returns a shape with its axes in another order."""
    return tuple(shape[axis] for axis in axes)


# Leaves that one move of an axis arranges: layers whose stacked axis lies elsewhere on the other side.
# A leaf whose layers are as many as its features has one shape either way, and no sign of its own. Its group
# has: all of it is stacked along one axis, and holds as many layers.

Move = tuple[int, int]
"""From which axis to which other one."""


class Pair(NamedTuple):
    """A wanted leaf with the stored one that it is made from.

    Attributes:
        names: The wanted path.
        stored: The stored shape.
        wanted: The wanted shape.
    """

    names: tuple[str, ...]
    stored: Shape
    wanted: Shape


@dataclasses.dataclass(frozen=True)
class MovedGroup:
    """Leaves that one move of an axis arranges, all of them.

    Attributes:
        name: The path that all of them lie below.
        members: Their positions among the pairs.
        moves: The moves, each with other results, under which the shapes of all come out.
    """

    name: tuple[str, ...]
    members: tuple[int, ...]
    moves: tuple[Move, ...]


def moved_groups(pairs: Sequence[Pair]) -> list[MovedGroup]:
    """Returns the groups, the widest, of leaves of which one at least shows that the axis is another."""
    below: dict[tuple[str, ...], list[int]] = defaultdict(list)
    telling = [at for at, pair in enumerate(pairs) if _is_arranged(pair)]
    names = {pairs[at].names[:depth] for at in telling for depth in range(1, len(pairs[at].names))}
    for at, pair in enumerate(pairs if names else ()):
        for depth in range(1, len(pair.names)):
            if pair.names[:depth] in names:
                below[pair.names[:depth]].append(at)
    found: list[MovedGroup] = []
    for name in sorted(names, key=lambda name: (len(name), name)):
        if any(name[: len(group.name)] == group.name for group in found):
            continue
        moves = _moves([pairs[at] for at in below[name]])
        if moves:
            found.append(MovedGroup(name, tuple(below[name]), moves))
    return found


def order_after(rank: int, move: Move) -> tuple[int, ...]:
    """Returns the order of axes that a move leaves, as a transpose takes it."""
    axis, to = move
    rest = [at for at in range(rank) if at != axis]
    return (*rest[:to], axis, *rest[to:])


def _is_arranged(pair: Pair) -> bool:
    return pair.stored != pair.wanted and sorted(pair.stored) == sorted(pair.wanted)


def _moves(pairs: Sequence[Pair]) -> tuple[Move, ...]:
    """Returns the moves that explain some leaves as one group of as many layers."""
    ranks = [len(pair.stored) for pair in pairs]
    if len(pairs) < 2 or max(ranks) < 3:
        return ()  # Matrices alone are transposed rather than stacks.
    found: dict[tuple[tuple[int, ...], ...], Move] = {}
    # Of two that do the same, that to the front: programs stack there.
    for move in sorted(itertools.permutations(range(min(ranks)), 2), key=lambda move: move[1]):
        if min(move) > 0 and len({pair.stored[0] for pair in pairs}) == 1:
            continue  # Layers may lie in front on both sides, and matrices are transposed in each.
        orders = tuple(order_after(rank, move) for rank in ranks)
        comes_out = all(
            permuted(pair.stored, order) == pair.wanted for pair, order in zip(pairs, orders, strict=True)
        )
        if comes_out and len({pair.stored[move[0]] for pair in pairs}) == 1:
            found.setdefault(orders, move)
    return tuple(found.values())


def families(leaves: Iterable[tuple[tuple[str, ...], int]]) -> dict[tuple[str, ...], list[tuple[Shape, int]]]:
    """Returns the sizes of the leaves of one kind beside each leaf, or below one level, with its own."""
    found: dict[tuple[Path, str], list[tuple[tuple[str, ...], int]]] = defaultdict(list)
    for names, size in leaves:
        is_layer = "".join(names[-3:-2])[-1:].isdigit()  # Of several no array is made but a stack.
        for above in {names[:-2], names[: -2 if is_layer else -3]}:
            found[above, names[-1]].append((names, size))
    beside: dict[tuple[str, ...], list[tuple[Shape, int]]] = defaultdict(list)
    for family in found.values():
        sizes = tuple(sorted(size for _, size in family))
        is_mixed = len(sizes) <= MOST_JOINED and 0 < sizes[0] < sizes[-1]
        for names, size in family if is_mixed else ():
            beside[names].append((sizes, size))
    return beside
