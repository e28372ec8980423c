"""What can be wrong with a checkpoint: each change says what the laws demand of a restore then."""

import dataclasses
import random
from collections.abc import Callable

import ml_dtypes
import numpy as np

from tests.laws.fuzz.models import ZERO, Group, Leaf, Module, Path, groups_of, leaves_of, rebuilt
from tests.laws.fuzz.optimizers import PARTS, Chain
from tests.laws.fuzz.train_states import Entry, TrainState, Wanted
from tests.laws.fuzz.trees import Tree

Perturbation = Callable[[Tree, TrainState, random.Random], bool]
"""Changes a tree, and says whether it could."""


def perturb(tree: Tree, rng: random.Random) -> str:
    """Spoils nearly every second tree in one way; returns in which."""
    state = rng.choice([state for state in tree.states if _is_wanted(tree, state)] or tree.states)
    if rng.random() < 0.6 or not _is_wanted(tree, state) or tree.answer == "must refuse":
        return ""
    for name in rng.sample(list(PERTURBATIONS), len(PERTURBATIONS)):
        if PERTURBATIONS[name](tree, state, rng):
            return name
    return ""


def _is_wanted(tree: Tree, state: TrainState) -> bool:
    """Tells whether a train state's model is wanted: whole, and not keyed like the stored tree."""
    if tree.like_stored:
        return False
    roots = {item.path[: len(state.owner)] for item in tree.wanted}
    return len(tree.states) == 1 or state.owner in roots


def _group_places(state: TrainState, *ways: str) -> list[tuple[Path, Group]]:
    """Returns the groups that are stored in one of the ways, with the keys above each."""

    def below(parts: tuple, above: Path) -> list[tuple[Path, Group]]:
        found = []
        for part in parts:
            if isinstance(part, Group):
                found.append((above, part))
            elif isinstance(part, Module):
                found += below(part.parts, (*above, part.name))
        return found

    return [item for item in below(state.parts, ()) if item[1].stored.way in ways and item[1].count > 1]


def _own(tree: Tree, state: TrainState) -> Callable[[Entry], bool]:
    return lambda entry: entry.above[: len(state.owner)] == state.owner and entry.what != "beside"


def _renumbered(
    tree: Tree, state: TrainState, above: Path, group: Group, number: Callable[[int], int | None]
) -> None:
    """Gives the stored layers other numbers; None takes a layer away."""
    names = {(*above, *_layer_keys(group, at)): number(at) for at in range(group.count)}
    mine, found = _own(tree, state), []
    for entry in tree.entries:
        keys = (
            next((keys for keys in names if entry.inner[: len(keys)] == keys), None) if mine(entry) else None
        )
        if keys is None:
            found.append(entry)
        elif names[keys] is not None:
            inner = (*above, *_layer_keys(group, names[keys] or 0), *entry.inner[len(keys) :])
            found.append(dataclasses.replace(entry, inner=inner))
    tree.entries = found


def _layer_keys(group: Group, at: int) -> Path:
    return (f"{group.name}_{at}",) if group.stored.way == "flat" else (group.name, str(at))


def _shifted(tree: Tree, state: TrainState, rng: random.Random) -> bool:
    places = _group_places(state, "flat", "list")
    if not places:
        return False
    above, group = rng.choice(places)
    _renumbered(tree, state, above, group, lambda at: at + 1)
    tree.refuse(f"the layers of {group.name} are numbered from 1")
    return True


def _with_a_hole(tree: Tree, state: TrainState, rng: random.Random) -> bool:
    places = _group_places(state, "flat", "list")
    if not places:
        return False
    above, group = rng.choice(places)
    hole = rng.randrange(group.count)
    filled = rng.random() < 0.3
    close = rng.random() < 0.3 and not filled
    _renumbered(
        tree, state, above, group, lambda at: None if at == hole else at + 1 if close and at > hole else at
    )
    said = f"layer {hole} of {group.name} is not stored"
    if not filled:
        tree.refuse(said)
        return True
    absent = state.made_from((*above, (group.name, hole)))
    own = {item.path for item in tree.wanted if item.inner in absent and _wanted_of(tree, state, item)}
    tree.absent |= own
    tree.options["policy"] = "warn"
    tree.may_refuse(said)
    return True


def _wanted_of(tree: Tree, state: TrainState, item: Wanted) -> bool:
    return len(tree.states) == 1 or item.path[: len(state.owner)] == state.owner


def _doubled(tree: Tree, state: TrainState, rng: random.Random) -> bool:
    places = _group_places(state, "flat")
    if not places:
        return False
    above, group = rng.choice(places)
    at = rng.randrange(group.count)
    keys, mine = (*above, *_layer_keys(group, at)), _own(tree, state)
    double = (*above, f"{group.name}_0{at}")
    for entry in list(tree.entries):
        if mine(entry) and entry.inner[: len(keys)] == keys:
            value = state.numbers.array(entry.value.shape, entry.value.dtype)
            inner = (*double, *entry.inner[len(keys) :])
            tree.entries.append(dataclasses.replace(entry, inner=inner, value=value))
    said = f"layer {at} of {group.name} is stored twice"
    if group.wanted.way == "flat":
        tree.may_refuse(said)
    else:
        tree.refuse(said)
    return True


def _of_another_number(tree: Tree, state: TrainState, rng: random.Random) -> bool:
    groups = [group for group in groups_of(state.parts) if group.count > 2]
    if not groups:
        return False
    group, by = rng.choice(groups), rng.choice((-1, 1))
    changed = dataclasses.replace(group, count=group.count + by)
    state.stored_parts = rebuilt(
        state.parts, lambda part: changed if part is group or part == group else part
    )
    _store_again(tree)
    # Behind equal blocks, a further layer is a leaf that nothing wants, as it is behind layers one by one.
    cycles = {each.count // group.stored.block for each in (group, changed)}
    blocks = group.stored == group.wanted and len(cycles) == 1
    if by > 0 and (group.stored.way in ("flat", "list") or (group.stored.way == "blocks" and blocks)):
        tree.may_refuse(f"{group.name} is stored with a layer more")
    else:
        tree.refuse(f"{group.name} is stored with {by} layers more")
    return True


def _store_again(tree: Tree) -> None:
    beside = [entry for entry in tree.entries if entry.what == "beside"]
    tree.entries = [entry for state in tree.states for entry in state.stored()] + beside


def _without_a_leaf(tree: Tree, state: TrainState, rng: random.Random) -> bool:
    mine = _own(tree, state)
    gone = rng.choice([entry for entry in tree.entries if mine(entry) and entry.what == "params"])
    if any(leaf.collection == ZERO for _, leaf in leaves_of(state.parts)) and gone.inner[-2:] == (
        "hn",
        "bias",
    ):
        return False
    tree.entries.remove(gone)
    tree.refuse(f"{gone.path} is not stored")
    return True


def _in_another_collection(tree: Tree, state: TrainState, rng: random.Random) -> bool:
    names = [name for name in state.collections if any(entry.what == name for entry in tree.entries)]
    if not names:
        return False
    name = rng.choice(names)
    other = rng.choice((f"ema_{name}", f"old_{name}", "stats", "aux_state", f"z_{name}"))
    mine = _own(tree, state)
    tree.entries = [
        dataclasses.replace(entry, above=tuple(other if key == name else key for key in entry.above))
        if mine(entry) and entry.what == name
        else entry
        for entry in tree.entries
    ]
    tree.refuse(f"{name} is stored as {other}")
    return True


def _under_another_name(tree: Tree, state: TrainState, rng: random.Random) -> bool:
    part = rng.choice(state.parts)
    new = rng.choice(("trunk", "backbone", "scanned_other", "zz_net", "a_net"))
    if isinstance(part, Leaf) or part.name in ("model", "params", "0"):
        return False
    _rename(tree, state, part.name, new, isinstance(part, Group))
    if rng.random() < 0.3 and not isinstance(part, Group) and state.form == "plain" and not state.owner:
        tree.options["renames"] = [(new, part.name)]
        tree.may_refuse("a rule")
    else:
        tree.refuse(f"{part.name} is stored as {new}")
    return True


def _rename(tree: Tree, state: TrainState, old: str, new: str, is_group: bool) -> None:
    mine = _own(tree, state)

    def renamed(key: object) -> object:
        if key == old:
            return new
        rest = str(key).removeprefix(f"{old}_") if is_group and str(key).startswith(f"{old}_") else ""
        return f"{new}_{rest}" if rest.isdecimal() or rest == "remainder" else key

    tree.entries = [
        dataclasses.replace(entry, inner=(renamed(entry.inner[0]), *entry.inner[1:]))
        if mine(entry) and entry.inner
        else entry
        for entry in tree.entries
    ]


def _of_another_shape(tree: Tree, state: TrainState, rng: random.Random) -> bool:
    mine = _own(tree, state)
    able = [entry for entry in tree.entries if mine(entry) and entry.what == "params" and entry.value.ndim]
    if not able:
        return False
    entry = rng.choice(able)
    axis = rng.randrange(entry.value.ndim)
    value = np.concatenate([entry.value, entry.value], axis)
    tree.entries[tree.entries.index(entry)] = dataclasses.replace(entry, value=value)
    tree.refuse(f"{entry.path} has another shape")
    return True


def _without_the_optimizer(tree: Tree, state: TrainState, rng: random.Random) -> bool:
    if not state.chain or not any(item.kind in ("moment", "scalar") for item in tree.wanted):
        return False
    mine = _own(tree, state)
    tree.entries = [e for e in tree.entries if not (mine(e) and e.what in ("moment", "scalar"))]
    tree.refuse("the optimizer is not stored")
    return True


def _with_another_optimizer(tree: Tree, state: TrainState, rng: random.Random) -> bool:
    """A part that the stored chain does not have is wanted too."""
    if not state.chain or not any(item.kind in ("moment", "scalar") for item in tree.wanted):
        return False
    new = [name for name in ("adam", "trace", "plateau", "rms", "lion") if name not in state.chain.stateful]
    simple = {"adam", "trace", "plateau", "rms", "lion", "schedule", "second schedule"}
    if not new or not set(state.chain.stateful) <= simple:
        return False
    added = rng.choice(new)
    assert added in PARTS
    places = len(state.chain.parts)
    state.wanted_chain = Chain((*state.chain.parts, added))
    state.chain = Chain(state.wanted_chain.parts[:places])
    prefix = next(item.path for item in tree.wanted if item.kind in ("moment", "scalar"))
    above = prefix[: prefix.index("opt_state") + 1]
    if "optimizer" not in above:
        return False
    others = [item for item in tree.wanted if item.path[: len(above)] != above]
    tree.wanted = others + [
        dataclasses.replace(item, path=(*above, *item.path)) for item in state.wanted_optimizer()
    ]
    tree.refuse(f"the state of {added} is not stored")
    return True


def _of_another_network(tree: Tree, state: TrainState, rng: random.Random) -> bool:
    if len(tree.states) < 2:
        return False
    mine = _own(tree, state)
    if rng.random() < 0.5 or not state.chain:
        tree.entries = [entry for entry in tree.entries if not mine(entry)]
        tree.refuse(f"{state.owner} is not stored")
    else:
        tree.entries = [e for e in tree.entries if not (mine(e) and e.what in ("moment", "scalar", "step"))]
        tree.refuse(f"the optimizer of {state.owner} is not stored")
    return True


def _with_a_step_of_its_own(tree: Tree, state: TrainState, rng: random.Random) -> bool:
    models = [item for item in tree.wanted if item.kind == "params"]
    if not models or not tree.typed:
        return False
    above = rng.choice(models).path[:-1]
    if not above or any(item.path[: len(above) + 1] == (*above, "step") for item in tree.wanted):
        return False
    kind = rng.choice(("params", "batch_stats", "memory"))
    tree.wanted.append(Wanted((*above, "step"), kind, np.zeros((), np.int32)))
    tree.refuse(f"{(*above, 'step')} is not stored")
    return True


def _quantised(tree: Tree, state: TrainState, rng: random.Random) -> bool:
    mine = _own(tree, state)
    able = [
        entry
        for entry in tree.entries
        if mine(entry) and entry.what == "params" and entry.value.ndim > 1 and entry.value.dtype == np.float32
    ]
    if not able or state.form != "plain":
        return False
    entry = rng.choice(able)
    dtype = rng.choice((ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.int8))
    codes = dataclasses.replace(entry, value=(entry.value % 100).astype(dtype))
    name = f"{entry.inner[-1]}_{rng.choice(('scale', 'scale_inv'))}"
    scale = Entry(entry.above, (*entry.inner[:-1], name), np.asarray(0.5, np.float32), "scale")
    tree.entries[tree.entries.index(entry)] = codes
    tree.entries.append(scale)
    tree.refuse(f"{entry.path} is quantised")
    return True


def _with_a_bait(tree: Tree, state: TrainState, rng: random.Random) -> bool:
    """A leaf that nothing wants, whose name once opened other ways; it changes nothing."""
    name = rng.choice(("scan_aux", "x_remainder", "scanned_blocks", "ema_count", "layers_remainder"))
    if any(name == part.name for part in state.parts) or name == "layers_remainder":
        return False
    inside = ("params",) if state.form == "maxtext" else ()
    inner = (name, "kernel", "value") if state.form == "boxed" else (name, "kernel")
    tree.entries.append(Entry((*state.owner, "params", *inside), inner, state.numbers.array((2,)), "bait"))
    if tree.options.get("unexpected") == "error":
        tree.refuse("an unexpected leaf")
    return True


PERTURBATIONS: dict[str, Perturbation] = {
    "shifted": _shifted,
    "a hole": _with_a_hole,
    "doubled": _doubled,
    "another number of layers": _of_another_number,
    "a leaf less": _without_a_leaf,
    "another collection": _in_another_collection,
    "another name": _under_another_name,
    "another shape": _of_another_shape,
    "no optimizer": _without_the_optimizer,
    "another optimizer": _with_another_optimizer,
    "another network": _of_another_network,
    "a step of its own": _with_a_step_of_its_own,
    "quantised": _quantised,
    "a bait": _with_a_bait,
}
