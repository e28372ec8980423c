"""One trial's tree: a checkpoint, a target, and what a restore must make of them."""

import dataclasses
import random
from collections.abc import Callable
from typing import Any, Literal

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from tests.laws.fuzz.models import (
    Cell,
    Group,
    Habits,
    Module,
    Node,
    Path,
    draw_model,
    groups_of,
    leaves_of,
    one_axis,
)
from tests.laws.fuzz.optimizers import draw_chain, nested, rewritten
from tests.laws.fuzz.train_states import Entry, Numbers, TrainState, Wanted

Answer = Literal["must restore", "may refuse", "must refuse"]


class Memory(nnx.Variable[Any]):
    """A collection of the user's own."""


class CachedValue(nnx.Variable[Any]):
    """Another one."""


KINDS: dict[str, Any] = {
    "params": nnx.Param,
    "batch_stats": nnx.BatchStat,
    "memory": Memory,
    "cached_value": CachedValue,
    "moment": nnx.OptVariable,
    "scalar": nnx.OptArray,
    "step": nnx.OptState,
}
for _name in ("memory", "cached_value"):
    nnx.register_variable_name(_name, KINDS[_name], overwrite=True)

COPIES = (
    "ema_params",
    "target_params",
    "grads",
    "old_params",
    "slow_params",
    "teacher_params",
    "masks",
    "a_params",
)
STATISTICS_COPIES = ("old_batch_stats", "ema_batch_stats", "initial_stats")
BESIDE = ("config", "data", "epoch", "metrics", "rng", "metadata")
NETWORKS = (("gen", "disc"), ("actor", "critic"), ("teacher", "student"), ("b", "a"))
LEVELS = (("model",), ("state",), ("train_state",), ("agent",), ("ckpt", "state"))


@dataclasses.dataclass
class Tree:
    """One trial.

    Attributes:
        stored: Every stored array.
        wanted: Every wanted leaf with its value.
        typed: Whether the target has Variables, or is a pure dict.
        answer: What the laws demand.
        why: Why it is not `must restore`; where it is, empty.
        options: The options of the restore.
        states: The train states that the tree was made from.
        concrete: Whether the target carries values of its own.
        dtypes: The wanted dtypes that differ from the stored ones.
        absent: Wanted leaves that no stored leaf may become, whole or in part.
        random: Random keys that are wanted too, and stored nowhere.
        like_stored: Whether every wanted path is a stored one.
        module: Whether the target is a module, and no State.
    """

    entries: list[Entry]
    wanted: list[Wanted]
    typed: bool
    states: list[TrainState]
    answer: Answer = "must restore"
    why: list[str] = dataclasses.field(default_factory=list)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    concrete: bool = False
    dtypes: dict[Path, Any] = dataclasses.field(default_factory=dict)
    absent: set[Path] = dataclasses.field(default_factory=set)
    random: tuple[Path, ...] = ()
    like_stored: bool = False
    module: bool = False

    @property
    def stored(self) -> dict[Path, np.ndarray]:
        return {entry.path: entry.value for entry in self.entries}

    def refuse(self, why: str) -> None:
        self.answer = "must refuse"
        self.why.append(why)

    def may_refuse(self, why: str) -> None:
        if self.answer == "must restore":
            self.answer = "may refuse"
        self.why.append(why)

    def expected(self) -> dict[Path, np.ndarray]:
        """Returns the value of every wanted leaf, in the dtype in which it is wanted."""
        present = (item for item in self.wanted if item.path not in self.absent)
        return {item.path: item.value.astype(self.dtype_of(item)) for item in present}

    def dtype_of(self, item: Wanted) -> Any:
        return self.dtypes.get(item.path, item.value.dtype)

    def target(self, sharding: Callable[[tuple[int, ...]], Any] | None = None) -> Any:
        """Returns the target: nested dicts, or a State where its leaves have types."""
        leaves = {item.path: self._leaf(item, sharding) for item in self.wanted}
        leaves |= {path: nnx.RngKey(jax.eval_shape(lambda: jax.random.key(0))) for path in self.random}
        if self.module:
            return _module(nested(leaves))
        return nnx.State(nested(leaves)) if self.typed else nested(leaves)

    def _leaf(self, item: Wanted, sharding: Callable[[tuple[int, ...]], Any] | None) -> Any:
        shape, dtype = item.value.shape, self.dtype_of(item)
        if sharding:
            value: Any = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(shape))
        else:
            value = np.zeros(shape, dtype) if self.concrete else jax.ShapeDtypeStruct(shape, dtype)
        return KINDS[item.kind](value) if self.typed else value


class Branch(nnx.Module):
    """A module with the parts of a nested dict."""

    def __init__(self, parts: dict[Any, Any]):
        for key, part in parts.items():
            setattr(self, str(key), _module(part))


def _module(part: Any) -> Any:
    if not isinstance(part, dict):
        return part
    if part and all(isinstance(key, int) for key in part):
        # In the state of an optax chain the parts without state are left out.
        return nnx.List([_module(part[at]) if at in part else None for at in range(max(part) + 1)])
    return Branch(part)


def draw_tree(rng: random.Random) -> Tree:
    """Returns a random tree in which nothing is wrong on purpose."""
    habits = Habits(
        square=rng.choice((0.0, 0.3, 1.0)),
        statistics=rng.choice((0.0, 0.3)),
        custom=rng.choice((0.0, 0.0, 0.2)),
        cells=rng.choice((0.0, 0.15)),
        odd_dtypes=rng.choice((0.0, 0.0, 0.3)),
    )
    several = rng.random() < 0.2
    if rng.random() < 0.07:
        return _nnx_tree(rng, habits)
    states = _several(rng, habits) if several else [_lone(rng, habits)]
    for state in states:
        _dress(state, rng, several)
    entries = [entry for state in states for entry in state.stored()]
    if not states[0].owner or several:
        entries += _beside(rng, states[0].numbers, {entry.path[0] for entry in entries})
    tree = Tree(entries=entries, wanted=[], typed=rng.random() < 0.75, states=states)
    tree.concrete = rng.random() < 0.2
    _want(tree, rng, several)
    _judge(tree)
    _choose_options(tree, rng)
    tree.module = tree.typed and rng.random() < 0.2
    if tree.typed and rng.random() < 0.1:
        tree.random = (("rngs", "dropout", "key"),)
    return tree


def _nnx_tree(rng: random.Random, habits: Habits) -> Tree:
    """A checkpoint of NNX states as pure dicts, some of them wanted: every wanted path is a stored one."""
    states = _several(rng, habits)
    found: dict[str, list[Wanted]] = {}
    for state in states:
        _dress(state, rng, several=True)
        state.stored()
        (name,) = state.owner
        for item in train_state(state, ()):
            key = name if item.path[0] == "model" else f"{name}_opt"
            found.setdefault(key, []).append(dataclasses.replace(item, path=(key, *item.path[1:])))
    leaves = [item for part in found.values() for item in part]
    entries = [Entry((), tuple(map(str, item.path)), item.value, "nnx") for item in leaves]
    chosen = rng.sample(list(found), rng.randint(1, len(found)))
    wanted = [item for key in chosen for item in found[key]]
    tree = Tree(entries=entries, wanted=wanted, typed=rng.random() < 0.75, states=states)
    tree.options["unexpected"] = "ignore"
    tree.like_stored = True
    return tree


def _lone(rng: random.Random, habits: Habits) -> TrainState:
    state = TrainState(parts=draw_model(rng, habits), values={}, numbers=Numbers())
    if rng.random() < 0.15:
        state.owner = rng.choice(LEVELS)
    elif rng.random() < 0.1:
        state.form = rng.choice(("maxtext", "boxed"))
    return state


def _several(rng: random.Random, habits: Habits) -> list[TrainState]:
    numbers, alike = Numbers(), rng.random() < 0.6
    first = draw_model(rng, habits)
    return [
        TrainState(
            parts=first if alike else draw_model(rng, habits), values={}, numbers=numbers, owner=(name,)
        )
        for name in rng.choice(NETWORKS)
    ]


def _dress(state: TrainState, rng: random.Random, several: bool) -> None:
    """Gives a train state its optimizer, copies and step."""
    state.step = rng.randrange(1, 10_000)
    if rng.random() < 0.6:
        state.chain = draw_chain(rng)
        state.wanted_chain = rewritten(state.chain, rng) if rng.random() < 0.4 else state.chain
    if rng.random() < 0.3 and not several:
        names = (*COPIES, *STATISTICS_COPIES) if "batch_stats" in state.collections else COPIES
        state.copies = tuple(rng.sample(names, rng.choice((1, 1, 2))))
    if rng.random() < 0.15:
        state.statistics_below = rng.choice(("model_state", "extra_variables", "mutable"))


def _beside(rng: random.Random, numbers: Numbers, taken: set[Any]) -> list[Entry]:
    """Returns what programs store beside a train state."""
    found: list[Entry] = []
    for name in BESIDE:
        if rng.random() < 0.08 and name not in taken:
            inner = () if name in ("epoch", "rng") else (rng.choice(("loss", "dims", "position")),)
            shape = () if name == "epoch" else (2,)
            dtype = np.uint32 if name == "rng" else np.int32
            found.append(Entry((name,), inner, numbers.array(shape, dtype), "beside"))
    return found


def _want(tree: Tree, rng: random.Random, several: bool) -> None:
    """Draws which part of the checkpoint the target asks for, and under which keys."""
    draw = rng.random()
    if several:
        _want_networks(tree, rng)
    elif draw < 0.3:
        tree.wanted = tree.states[0].wanted_model()
        if not tree.typed and tree.states[0].collections:
            tree.may_refuse("a pure dict of several collections")
    elif draw < 0.4 and _is_identity(tree.states[0]) and not tree.states[0].owner:
        _want_like_stored(tree, rng)
    else:
        tree.wanted = train_state(tree.states[0], ())
        if not tree.typed and tree.states[0].collections:
            tree.may_refuse("a pure dict of several collections")


def train_state(state: TrainState, owner: Path) -> list[Wanted]:
    found = [dataclasses.replace(item, path=(*owner, "model", *item.path)) for item in state.wanted_model()]
    if state.wanted_chain:
        place = (*owner, "optimizer", "opt_state")
        found += [dataclasses.replace(item, path=(*place, *item.path)) for item in state.wanted_optimizer()]
        found.append(Wanted((*owner, "optimizer", "step"), "step", np.asarray(state.step, np.uint32)))
    return found


def _want_networks(tree: Tree, rng: random.Random) -> None:
    """All networks, or one under its own name, or one under none, which is a question."""
    draw = rng.random()
    if not tree.typed and any(state.collections for state in tree.states):
        tree.may_refuse("a pure dict of several collections")
    if draw < 0.6:
        tree.wanted = [item for state in tree.states for item in train_state(state, state.owner)]
        return
    state = rng.choice(tree.states)
    if draw < 0.85:
        tree.wanted = train_state(state, state.owner)
        return
    tree.wanted = train_state(state, ())
    if tree.states[0].parts == tree.states[1].parts:
        tree.refuse("which of two networks")
    else:
        tree.may_refuse("which of two networks, by their paths")


def _is_identity(state: TrainState) -> bool:
    """Tells whether both sides have the model's leaves under the same paths."""
    groups = all(
        group.stored == group.wanted and group.stored.way != "list" for group in groups_of(state.parts)
    )
    return groups and state.form == "plain" and not _has_cells(state.parts)


def _has_cells(parts: tuple[Node, ...]) -> bool:
    return any(
        isinstance(part, Cell) or (isinstance(part, Group | Module) and _has_cells(part.parts))
        for part in parts
    )


def _want_like_stored(tree: Tree, rng: random.Random) -> None:
    """A target keyed like the stored tree: every wanted path is a stored one."""
    whole = [entry for entry in tree.entries if entry.what in ("params", "copy", "batch_stats")]
    keys = sorted({entry.path[0] for entry in whole})
    chosen = set(rng.sample(keys, rng.randint(1, len(keys))))
    tree.like_stored = True
    tree.wanted = [
        Wanted(entry.path, "batch_stats" if "stats" in entry.path[0] else "params", entry.value)
        for entry in whole
        if entry.path[0] in chosen
    ]


def _judge(tree: Tree) -> None:
    """Finds what the laws leave open in a tree in which nothing is wrong on purpose."""
    for state in tree.states:
        if not tree.like_stored and any(not one_axis(group) for group in groups_of(state.parts)):
            tree.may_refuse("an axis that the shapes leave open")
        if not tree.like_stored and not tree.typed and any("stats" not in name for name in state.copies):
            tree.may_refuse("a pure dict beside a copy")
        if any("0" in path for path, _ in leaves_of(state.parts)):
            tree.may_refuse("a module called like a layer's number")
        if state.form != "plain" and _odd_names(state):
            tree.may_refuse("odd names in another program's layout")
    if len({item.path for item in tree.wanted}) != len(tree.wanted):
        raise AssertionError("two wanted leaves of one path")


def _odd_names(state: TrainState) -> bool:
    odd = {"params", "value", "model", "opt_state", "step", "mu", "nu", "trace", "count", "0"}
    return any(odd & {part for part in path if isinstance(part, str)} for path, _ in leaves_of(state.parts))


_NARROWER = {"float32": ml_dtypes.bfloat16, "bfloat16": np.float32, "float16": np.float32}


def _choose_options(tree: Tree, rng: random.Random) -> None:
    tree.options["unexpected"] = "ignore"
    used = {entry.what for entry in tree.entries} & {"copy", "beside"}
    if rng.random() < 0.15 and not used and len(tree.states) == 1 and _wants_all(tree):
        tree.options["unexpected"] = "error"
    if rng.random() < 0.15:
        for item in tree.wanted:
            name = item.value.dtype.name
            if item.kind in ("params", "moment") and name in _NARROWER and rng.random() < 0.5:
                tree.dtypes[item.path] = np.dtype(_NARROWER[name])


def _wants_all(tree: Tree) -> bool:
    return any(item.kind == "step" for item in tree.wanted)
