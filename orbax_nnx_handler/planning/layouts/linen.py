"""The layouts that Flax's own Linen training loops write.

A program may keep several train states in one item, each below keys of its own
(`{"gen": TrainState, "disc": TrainState}`), and other things beside them
(`{"model": TrainState, "config": ..., "data": ...}`, Flax's checkpointing guide).
"""

from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence, Set

from orbax_nnx_handler.planning.core.leaves import StoredLeaf
from orbax_nnx_handler.planning.core.paths import Path, Tokens, canonical
from orbax_nnx_handler.planning.layouts.layout import (
    FLAX_COLLECTIONS,
    Fields,
    Layout,
    Placement,
    Section,
    Stored,
    has_subtree,
    is_copy_level,
    is_copy_name,
    tops,
    words_of,
)

AUX = "nnx_aux"
"""Where NNX state without a counterpart in a Linen program is stored, as MaxText names it."""

_TRAIN_STATE_KEYS = frozenset({"opt_state", "step"})
KEYS = _TRAIN_STATE_KEYS | {"params", AUX}
"""The fields of a train state."""

_VARIABLES_FIELDS = frozenset(
    {"model_state", "extra_variables", "extra_vars", "variables", "mutable", "mutables", "state", "aux"}
)
"""Fields of a train state under which programs keep the collections beside `params`.

`model_state`: Scenic, Flax's ImageNet and WMT examples of 2021; `extra_variables`, `mutable`: user programs.
"""


def place_with(stored: Stored, params_depth: int) -> tuple[Placement, ...]:
    """Reads a tree of train states, or of one whose fields are the first level.

    Args:
        stored: The stored leaves.
        params_depth: 1 where `params` holds the parameters, 2 where it holds the
            whole variables dict, one subtree a collection (MaxText).
    """
    owners = owners_of(stored) or _ITEM
    if owners == _ITEM:  # Nearly every checkpoint.
        located = ((leaf, _locate(path, params_depth)) for path, leaf in stored.items())
        return tuple(
            [
                Placement(leaf=leaf, section=section, collection=collection, path=path, owner=())
                for leaf, (section, collection, path) in located
            ]
        )
    return tuple(_placement(stored, path, owners, params_depth) for path in stored)


def owners_of(stored: Iterable[Path]) -> tuple[Path, ...]:
    """Returns the keys above each train state.

    It has `params` with `opt_state` or `step` beside it, or nothing but collections. A
    module that is called `params` within a train state makes no further one.
    """
    paths = list(stored)
    holds: dict[Path, set[str]] = {}
    called = _called_like_fields(paths)
    others: Sequence[Path] = paths
    if not called:  # Nearly every checkpoint, and nearly every path of one begins with a field.
        others = [path for path in paths if path and path[0] not in KEYS]
        fields = {path[:1] for path in paths if len(path) > 1 or "step" in path}
        if fields := {str(key) for field in fields for key in field if key in KEYS}:
            holds[()] = fields
    for path in others:
        if KEYS.isdisjoint(path):
            continue
        # The first such key: one below it belongs to a train state's field.
        at = 0 if path[0] in KEYS else next(at for at, key in enumerate(path) if key in KEYS)
        at += path[: at + 1] in called
        if at < len(path) and path[at] not in KEYS:
            continue
        if at + 1 < len(path) or path[at:] == ("step",):
            holds.setdefault(path[:at], set()).add(str(path[at]))
    above = sorted((owner for owner, keys in holds.items() if "params" in keys), key=len)
    full = [owner for owner in above if not owner or holds[owner] & _TRAIN_STATE_KEYS]
    found: list[Path] = []
    for owner in full:
        if not any(_within(owner, outer) for outer in found) and not _mirrors(
            owner, holds[owner], found, paths
        ):
            found.append(owner)
    # Optimizers may lie beside their models, each below a key of its own (`{gen, disc, g_opt, d_opt}`).
    apart = [] if () in found else _optimizers(paths, holds)
    beside = {owner[:-1] for owner in apart}
    found += [
        owner
        for owner in above
        if owner not in found
        and not any(_within(owner, outer) for outer in found)
        and (owner[:-1] in beside or _only_collections(paths, owner))
        and not _mirrors(owner, holds[owner], found, paths)
    ]
    # What lies beside or around a train state and has `params` is one too, whatever else it has.
    parents = {owner[:-1] for owner in found if owner}
    around = {owner[:depth] for owner in found for depth in range(1, len(owner))}
    found += [
        owner
        for owner in above
        if (owner[:-1] in parents or owner in around)
        and owner not in found
        and not any(_within(owner, outer) for outer in found)
        and not _mirrors(owner, holds[owner], found, paths)
    ]
    if found:
        found += [owner for owner in apart if not any(owner[: len(outer)] == outer for outer in found)]
    return tuple(sorted(found, key=lambda owner: list(map(str, owner))))


def _called_like_fields(paths: Iterable[Path]) -> Set[Path]:
    """Returns the keys above train states that are called `opt_state` or `step`: all fields lie below.

    No chain of optax has fields of these names, and a step has none.
    """
    below: dict[Path, set[Hashable]] = {}
    for path in paths:
        if _TRAIN_STATE_KEYS.isdisjoint(path):
            continue
        at = 0 if path[0] in KEYS else next(at for at, key in enumerate(path) if key in KEYS)
        if path[at] in _TRAIN_STATE_KEYS and at + 1 < len(path):
            below.setdefault(path[: at + 1], set()).add(path[at + 1])
    return {at for at, keys in below.items() if keys >= {"params", *_TRAIN_STATE_KEYS}}


def _optimizers(paths: Iterable[Path], holds: Mapping[Path, Set[str]]) -> list[Path]:
    """Returns the owners that have an optimizer's state and step, or one of them, and nothing else."""
    found = {owner for owner, keys in holds.items() if owner and keys <= _TRAIN_STATE_KEYS}
    depths = {len(owner) for owner in found}
    others = {
        path[:depth]
        for path in paths
        for depth in depths
        if len(path) > depth and path[depth] not in _TRAIN_STATE_KEYS
    }
    return [owner for owner in holds if owner in found - others]


def _mirrors(owner: Path, keys: Collection[str], found: Sequence[Path], paths: Sequence[Path]) -> bool:
    """Tells whether an owner is a module in another collection of a train state around it.

    It is, where the train state's own `params` have all of its keys there: `ema_params/block/params`
    beside `params/block/params`. A train state within another has an `opt_state` that they have not.
    """
    for outer in found:
        if len(outer) < len(owner) and owner[: len(outer)] == outer:
            module = (*outer, "params", *owner[len(outer) + 1 :])
            have = {str(path[len(module)]) for path in paths if path[: len(module)] == module != path}
            if have >= set(keys):
                return True
    return False


def _within(path: Path, owner: Path) -> bool:
    """Tells whether a path lies in a field of a train state, rather than beside its fields."""
    field = path[len(owner) :] if path[: len(owner)] == owner else ()
    beside = len(field) > 1 and field[0] in _VARIABLES_FIELDS and field[1] in FLAX_COLLECTIONS[1:]
    return bool(field) and (field[0] in KEYS or field[0] in FLAX_COLLECTIONS or beside)


def _only_collections(paths: Sequence[Path], owner: Path) -> bool:
    depth = len(owner)
    below = {path[depth] for path in paths if len(path) > depth and path[:depth] == owner}
    return all(name in FLAX_COLLECTIONS or is_copy_name(str(name)) for name in below)


_ITEM: tuple[Path, ...] = ((),)
"""The owners where the item is the train state."""


def _placement(stored: Stored, path: Path, owners: Collection[Path], params_depth: int) -> Placement:
    inside = owners if owners == _ITEM else [owner for owner in owners if path[: len(owner)] == owner]
    if not inside and path[0] == AUX and len(path) > 1:
        # Beside several train states each leaf is kept under its own path in the item.
        return aside(stored[path], owners)
    if not inside:
        return Placement(leaf=stored[path], section="other", path=path)
    owner = max(inside, key=len)
    section, collection, rest = _locate(path[len(owner) :] if owner else path, params_depth)
    return Placement(leaf=stored[path], section=section, collection=collection, path=rest, owner=owner)


def aside(leaf: StoredLeaf, owners: Iterable[Path]) -> Placement:
    """Places a leaf that is kept under its own path in the item, below `nnx_aux`."""
    path = leaf.path[1:]
    own = (owner for owner in owners if path[: len(owner)] == owner)
    return Placement(leaf=leaf, section="aux", path=path, owner=max(own, key=len, default=()))


def _locate(path: Path, params_depth: int) -> tuple[Section, str | None, Path]:
    if not path:
        return "other", None, path
    top, rest = str(path[0]), path[1:]
    if top == "opt_state" and rest:
        return "optimizer", None, rest
    if top == "step" and rest in ((), ("value",)):
        return "step", None, path
    if top == AUX and rest:
        return "aux", None, rest
    if not rest:
        return "other", None, path
    if top == "params" and params_depth == 2 and len(rest) > 1:
        return "model", str(rest[0]), rest[1:]
    if top in _VARIABLES_FIELDS and len(rest) > 1 and rest[0] in FLAX_COLLECTIONS[1:]:
        return "model", str(rest[0]), rest[1:]
    if params_depth == 2 and len(rest) > 1 and rest[0] == "params":
        return "model", top, rest[1:]  # A copy of the parameters, as deep as they are.
    return "model", top, rest


def _has_params(stored: Stored, owner: Path) -> bool:
    return any(path[: len(owner) + 1] == (*owner, "params") and len(path) > len(owner) + 1 for path in stored)


def _is_train_state(stored: Stored) -> bool:
    if _holds_no_params(stored):
        return has_subtree(stored, "opt_state") and len(tops(stored) - _TRAIN_STATE_KEYS) > 0
    owners = owners_of(stored)
    return bool(owners) and not _is_variables(stored)


def _is_variables(stored: Stored) -> bool:
    if _holds_no_params(stored):
        return bool(_WITHOUT_PARAMS & tops(stored))
    return _has_params(stored, ()) and not _TRAIN_STATE_KEYS & tops(stored)


def without_aux(path: Path) -> Tokens:
    """Returns the canonical path of a leaf, as it was before it was kept in `nnx_aux`."""
    return canonical(tuple(key for key in path if key != AUX))


_WITHOUT_PARAMS = frozenset({AUX, "batch_stats", "LoRAParam"})
"""What tells collections from modules where a state without `nnx.Param` was saved (adapters, statistics)."""


def _holds_no_params(stored: Stored) -> bool:
    # A random stream that is kept aside may be called `params`.
    return not any("params" in path and AUX not in path[: path.index("params")] for path in stored)


def _networks_of(stored: Stored) -> Mapping[str, Set[str]]:
    """Returns the fields of each network that the first keys are called after; the last one counts.

    What holds a network's variables itself, with `params` below, is no field (`actor_params/params/kernel`).
    """
    found: dict[str, set[str]] = {}
    below: dict[str, set[str]] = defaultdict(set)
    for path in (path for path in stored if len(path) > 1):
        below[str(path[0])].add(str(path[1]))
    for top in (top for top, keys in below.items() if "params" not in keys):
        field = next((field for field in _FIELDS if top.endswith(f"_{field}")), "")
        if field and len(top) > len(field) + 1:
            found.setdefault(top.removesuffix(f"_{field}"), set()).add(field)
    return found


_OPTIMIZER_FIELDS = ("opt_state", "optimizer_state")
_FIELDS = (*_OPTIMIZER_FIELDS, *FLAX_COLLECTIONS)


def _is_by_network(stored: Stored) -> bool:
    """Tells whether networks stand in front of their fields: of one that has several, or of several."""
    if not KEYS.isdisjoint(tops(stored) - {"step"}):
        return False
    with_params = [fields for fields in _networks_of(stored).values() if "params" in fields]
    return len(with_params) > 1 or any(len(fields) > 1 for fields in with_params)


def _place_by_network(stored: Stored) -> tuple[Placement, ...]:
    networks = _networks_of(stored)
    trained = [name for name, fields in networks.items() if not fields.isdisjoint(_OPTIMIZER_FIELDS)]
    others = [name for name, fields in networks.items() if "params" in fields and name not in trained]
    # A step beside several train states is that of none of them. An optimizer may keep nothing (`optax.sgd`):
    # only of a copy its name tells that it has none.
    is_alone = len(trained) == 1 and all(_is_copy_of(name, trained[0]) for name in others)
    stepped: Path = (trained[0],) if is_alone else ()
    keys = {f"{name}_{field}": (name, field) for name, fields in networks.items() for field in fields}
    steps: dict[Path, Path] = {(f"{name}_step",): (name,) for name in trained}
    # Beside them, it is the program's own count.
    steps |= {("step",): stepped} if steps.keys().isdisjoint(stored) else {}

    def placed(path: Path) -> Placement:
        leaf, rest = stored[path], path[1:]
        if path in steps:
            return Placement(leaf=leaf, section="step", path=path, owner=steps[path])
        if not rest or path[0] not in keys:
            return Placement(leaf=leaf, section="other", path=path)
        name, field = keys[str(path[0])]
        if field in _OPTIMIZER_FIELDS:
            return Placement(leaf=leaf, section="optimizer", path=rest, owner=(name,))
        return Placement(leaf=leaf, section="model", collection=field, path=rest, owner=(name,))

    return tuple(map(placed, stored))


def _is_copy_of(name: str, network: str) -> bool:
    own = words_of(network)
    return is_copy_level(name) or (bool(own) and own < words_of(name))


TRAIN_STATE = Layout(
    name="train_state",
    title="Flax TrainState",
    fits=_is_train_state,
    place=lambda stored: place_with(stored, 1),
    keys=KEYS,
)
VARIABLES = Layout(
    name="variables",
    title="Linen variables",
    fits=_is_variables,
    place=lambda stored: place_with(stored, 1),
)
BY_NETWORK = Layout(
    name="by_network",
    title="fields by network",
    fits=_is_by_network,
    place=_place_by_network,
    fields=Fields(joined=True),
)
