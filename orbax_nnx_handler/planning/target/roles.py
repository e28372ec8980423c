"""What each wanted leaf is: decided by Variable type, never by name.

A pure dict has no Variable types; there the structure decides (`opt_state`, the
`step` beside it) and random state shows itself by its key dtype. Last: in which order modules are made, and
which order is left where some come before others.
"""

import functools
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, Literal, cast

from flax import nnx

from orbax_nnx_handler.planning.core.dtypes import is_count_dtype, is_key, is_weight_called_step
from orbax_nnx_handler.planning.core.leaves import (
    OPT_STATE,
    WantedLeaf,
    derived,
    optimizer_owners,
    owner_of,
    record,
)
from orbax_nnx_handler.planning.core.paths import Path, Tokens, canonical, is_number

Role = Literal["model", "optimizer", "step", "random", "transient"]


WEIGHTS: tuple[Role, ...] = ("model", "optimizer", "step")
"""What a checkpoint must hold; the rest may be absent."""


@record
class Wanted:
    """A wanted leaf with its role.

    Attributes:
        leaf: The leaf.
        role: `model` is a weight or statistic, `random` a key or count,
            `transient` a cache or intermediate that the program recomputes.
        path: The leaf's path; for an optimizer leaf, the part below `opt_state`.
        owner: For a leaf of an optimizer, the keys above its `opt_state`; for a step, those above it.
        collection: The Linen collection that belongs to the Variable's type, or
            None for a pure dict.
    """

    leaf: WantedLeaf
    role: Role
    path: Path
    collection: str | None = None
    owner: Path = ()

    @derived
    def tokens(self) -> tuple[str, ...]:
        """The canonical path."""
        return canonical(self.path)

    @property
    def is_bare(self) -> bool:
        """Whether the leaf is an `nnx.Variable` of no kind of its own: what a module computes once."""
        return self.leaf.kind is nnx.Variable and self.role == "model"

    @property
    def is_count(self) -> bool:
        """Whether the leaf is a step or an optimizer's count: an integer of any width, if the value fits."""
        named = self.tokens[-1] == "step" or (self.leaf.shape == () and self.role in ("step", "optimizer"))
        return named and is_count_dtype(self.leaf.dtype)


def roles_of(leaves: Mapping[Path, WantedLeaf]) -> list[Wanted]:
    """Returns every leaf with its role, in the target's order."""
    # A module of the model may be called `opt_state`.
    certain = _certain_owners(leaves)
    collections = {kind: collection_of(kind) for kind in {leaf.kind for leaf in leaves.values()}}
    states = {kind for kind in collections if kind is not None and _role_of(kind) == "optimizer"}
    typed = (path for path, leaf in leaves.items() if leaf.kind in states) if states else ()
    owners = certain | {_owner(path, leaves) for path in typed if OPT_STATE in path[:-1]}
    streams = {path[:-1] for path, leaf in leaves.items() if is_key(leaf.dtype)}
    return [_wanted(leaf, owners, certain, streams, collections[leaf.kind]) for leaf in leaves.values()]


def _owner(path: Path, leaves: Mapping[Path, WantedLeaf]) -> Path:
    """Returns the keys above an `opt_state`; an `nnx.Optimizer` with its step may itself be called that."""
    at = path.index(OPT_STATE)
    inner = path[: at + 1]
    return inner if path[at + 1] in (OPT_STATE, "step") and (*inner, "step") in leaves else path[:at]


def collection_of(kind: type[Any] | None) -> str | None:
    """Returns the Linen collection of a Variable type, as Flax itself names it.

    A type that Flax and the program have not registered is called as its class is.
    """
    if kind is None or not issubclass(kind, nnx.Variable):
        return None
    try:
        return nnx.variable_name_from_type(cast(Any, kind))
    except ValueError:
        return kind.__name__


def is_named(kind: type[Any] | None) -> bool:
    """Tells whether Flax or the program has named the collection of a Variable type."""
    if kind is None:
        return False
    try:
        nnx.variable_name_from_type(kind)
    except ValueError:
        return False
    return True


def base_collection(kind: type[Any] | None) -> str | None:
    """Returns the collection of the named type that a type is a kind of."""
    bases = kind.__mro__[1:] if kind is not None else ()
    return next((collection_of(base) for base in bases if is_named(base)), None)


@functools.lru_cache(maxsize=256)
def is_called_like(kind: type[Any] | None, collection: str | None) -> bool:
    """Tells whether a collection is called as a type that nobody named: `lora_params` as `LoRAParam`."""
    return kind is not None and collection is not None and _telling(kind.__name__) == _telling(collection)


def _telling(name: str) -> str:
    return re.sub(r"(?<=.)(params?|stats?|vars?|variables?|state)$", "", name.lower().replace("_", ""))


def is_of_another_type(kind: type[Any] | None, collection: str | None) -> bool:
    """Tells whether Flax or the program has named a collection for a type that a type is no kind of."""
    try:
        known = nnx.variable_type_from_name(collection or "")
    except ValueError:
        return False
    return kind is None or not issubclass(kind, known)


@functools.lru_cache(maxsize=256)
def _is_weight(kind: type[Any] | None) -> bool:
    return kind is not None and issubclass(kind, nnx.Param | nnx.BatchStat)


def _certain_owners(leaves: Mapping[Path, WantedLeaf]) -> set[Path]:
    """Returns the owners of an `opt_state` that is no module's, whatever types its moments have.

    In a `TrainState` around an `nnx.State`, the moments of optax are States of `nnx.Param`. What tells
    them from a module that is called `opt_state` is a value beside them that is no Variable.
    """
    bare = [path for path, leaf in leaves.items() if leaf.kind is None]
    bare = [path for path in bare if not is_weight_called_step(path, leaves[path].dtype)]
    steps = {path[:-1] for path in bare if path and str(path[-1]) == "step"}
    beside = {path[: path.index(OPT_STATE)] for path in leaves if steps and OPT_STATE in path}
    return optimizer_owners(bare) | (steps & beside) | _beside_variables(leaves, bare)


def _beside_variables(leaves: Mapping[Path, WantedLeaf], bare: Iterable[Path]) -> set[Path]:
    """Returns the owners of an `opt_state` without a Variable in it, in a target that has Variables.

    It is none of their modules'; a save of such an item takes it for the optimizer's as well.
    """
    owners = {path[: path.index(OPT_STATE)] for path in bare if OPT_STATE in path[:-1]}
    if not owners:
        return owners
    typed = [path for path, leaf in leaves.items() if leaf.kind is not None]
    inside = {path[: path.index(OPT_STATE)] for path in typed if OPT_STATE in path}
    return owners - inside if typed else set()


def _wanted(
    leaf: WantedLeaf,
    owners: Collection[Path],
    certain: Collection[Path],
    streams: set[Path],
    collection: str | None,
) -> Wanted:
    owner = owner_of(leaf.path, owners) if owners else None
    role = _role(leaf, owner, owners, streams)
    if role == "model" and owner is not None and owner in certain:
        role = "optimizer"
    if role == "model" and leaf.path[-1:] == ("step",) and leaf.path[:-1] in certain and leaf.shape == ():
        role = "step"  # A Variable beside an `opt_state`: the count of a functional train state.
    if role == "step":
        return Wanted(leaf=leaf, role=role, path=leaf.path, owner=leaf.path[:-1])
    if role != "optimizer":
        return Wanted(leaf=leaf, role=role, path=leaf.path, collection=collection)
    above = () if owner is None else owner
    rest = leaf.path if owner is None else leaf.path[len(owner) + 1 :]
    return Wanted(leaf=leaf, role=role, path=rest, owner=above)


def _role(leaf: WantedLeaf, owner: Path | None, owners: Collection[Path], streams: set[Path]) -> Role:
    kind = leaf.kind
    if kind is None:
        return _untyped_role(leaf, owner, owners, streams)
    role = _role_of(kind)
    if role == "optimizer":
        return "step" if owner is None and str(leaf.path[-1]) == "step" else "optimizer"
    if role == "model" and owner is not None and not _is_weight(kind):
        return "optimizer"
    return role


@functools.lru_cache(maxsize=256)
def _role_of(kind: type[Any]) -> Role:
    """Returns the role that a type has wherever it stands."""
    if issubclass(kind, nnx.RngState):
        return "random"
    if issubclass(kind, nnx.Cache | nnx.Intermediate):
        return "transient"
    return "optimizer" if issubclass(kind, nnx.OptState) else "model"


def _untyped_role(leaf: WantedLeaf, owner: Path | None, owners: Collection[Path], streams: set[Path]) -> Role:
    path = leaf.path
    if owner is not None:
        return "optimizer"
    if is_key(leaf.dtype) or (path[:-1] in streams and leaf.shape == () and str(path[-1]) == "count"):
        return "random"
    # Beside an optimizer a step may be a float; alone at the root only an integer is one.
    at_root = len(path) == 1 and not is_weight_called_step(path, leaf.dtype)
    is_step = str(path[-1]) == "step" and (path[:-1] in owners or at_root)
    return "step" if is_step else "model"


def of_role(wanted: Iterable[Wanted], *roles: Role) -> list[Wanted]:
    """Returns the wanted leaves of these roles."""
    return [item for item in wanted if item.role in roles]


Order = Mapping[Tokens, Sequence[str]]
"""Names in the order of their creation, by the module's canonical path."""


def creation_order(item: Any) -> Order:
    """Returns the order in which attributes were set; empty where nothing tells it.

    A module remembers it until it is split and merged: what comes out of
    `nnx.eval_shape` or `nnx.jit` has its attributes sorted by name, so that an
    item in which every module is sorted tells nothing.

    Args:
        item: A module, or a tuple, list or dict of modules.
    """
    found = dict(_walk(item, ()))
    named = [[name for name in names if not is_number(name)] for names in found.values()]
    return {} if all(names == sorted(names) for names in named) else found


def order_of(target: Any, init: Callable[[], Any] | None) -> Order:
    """Returns the order of a target's modules, from the function that builds it where there is one.

    Args:
        target: The target.
        init: Builds the target; traced only, nothing is computed.
    """
    if init is None:
        return creation_order(target)
    found: list[Order] = []

    def build() -> Any:
        built = init()
        found.append(creation_order(built))
        return built

    nnx.eval_shape(build)
    return found[0]


def creation_place(names: Tokens, order: Order) -> tuple[int, ...] | None:
    """Returns the place of a module in the order of creation, level by level."""
    tokens = canonical(names)
    place = list[int]()
    for at, token in enumerate(tokens):
        known = order.get(tokens[:at], ())
        if token not in known and not is_number(token):
            break
        place.append(int(token[1:]) if is_number(token) else list(known).index(token))
    return tuple(place) or None


def _walk(item: Any, path: Tokens) -> Iterator[tuple[Tokens, list[str]]]:
    children = _children(item)
    if children is None:
        return
    # A name with a number (`conv_1`) is a number below a name in canonical paths.
    yield path, list(dict.fromkeys(canonical((key,))[0] for key, _ in children))
    for key, child in children:
        yield from _walk(child, (*path, *canonical((key,))))


def _children(item: Any) -> list[tuple[Any, Any]] | None:
    if isinstance(item, nnx.Variable | nnx.State):
        return None
    if isinstance(item, nnx.List | list | tuple):
        return list(enumerate(cast(Sequence[Any], item)))
    if isinstance(item, dict):
        return list(cast(dict[Any, Any], item).items())
    if isinstance(item, nnx.Pytree):
        return [(name, part) for name, part in vars(item).items() if _is_part(name, part)]
    return None


def _is_part(name: str, part: Any) -> bool:
    # `_pytree__...`: Flax keeps its own records of a module beside the module's parts.
    kinds: tuple[type[Any], ...] = (nnx.Pytree, nnx.Variable, dict, list, tuple)
    return not name.startswith("_pytree") and isinstance(part, kinds)


_MOST = 200
"""Of more parts an order is not looked for."""


def only_order(
    numbers: Sequence[int], bounds: Mapping[Tokens, tuple[int, int]], before: Mapping[Tokens, Set[Tokens]]
) -> tuple[Tokens, ...]:
    """Returns the only order in which parts may have some rising numbers; nothing where there are several.

    Each has one between two bounds, and comes behind what is before it.
    """
    orders: dict[Set[Tokens], list[tuple[Tokens, ...]]] = {frozenset(): [()]}
    for number in numbers:
        longer: dict[Set[Tokens], list[tuple[Tokens, ...]]] = defaultdict(list)
        for used, some in orders.items():
            for names, (low, high) in bounds.items():
                if names not in used and before[names] <= used and low < number < high:
                    made = longer[used | {names}]
                    made += [(*each, names) for each in some][: 2 - len(made)]
        if len(longer) > _MOST:
            return ()
        orders = longer
    found = [each for some in orders.values() for each in some]
    return found[0] if len(found) == 1 else ()


def all_behind(names: Tokens, behind: Mapping[Tokens, Set[Tokens]]) -> Set[Tokens]:
    """Returns what is computed behind a part, at whatever distance."""
    found, left = set[Tokens](), [*behind.get(names, ())]
    while left:
        if (one := left.pop()) not in found:
            found.add(one)
            left += behind.get(one, ())
    return found
