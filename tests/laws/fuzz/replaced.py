"""Networks and optimizers in dicts, under rules that put one network's weights in another's place.

Networks lie side by side, in groups, below levels or in lists; an optimizer lies beside its network, is
called after it or not, or trains both. What it keeps belongs to the weights that it has trained: where those
go elsewhere and no rule takes it along, it must be left. Nothing here is the package's but the rules.
"""

import dataclasses
import pathlib
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx

from orbax_nnx_handler import Add, Copy, Drop, RestoreError, restore, to_linen
from tests.laws.fuzz.programs import numbered
from tests.laws.fuzz.trial import Outcome
from tests.written import put_at

NAMES = (
    *(("a", "b"), ("actor", "critic"), ("gen", "disc"), ("net", "target"), ("pi", "v"), ("enc", "dec")),
    *(("teacher", "student"), ("model", "model2"), ("q1", "q2")),
)
PLACES = ("side", "side", "grouped", "level", "unlike", "prefix", "listed")
CALLED = ("after", "after", "after", "short", "numbers", "words", "list", "one", "one")
WRAPPED = ((), (), (), ("net",), ("core",), ("model",), ("module",))
RULES = (
    *("none", "add", "renamed", "renamed with", "exchanged", "exchanged with", "replaced", "replaced with"),
    *("leaf copied", "leaf exchanged", "copied", "optimizer dropped", "optimizer left"),
)
MUST_RESTORE = ("none", "optimizer dropped")
TX: Mapping[str, Callable[[], optax.GradientTransformation]] = {
    "adam": lambda: optax.adam(1e-3),
    "sgd": lambda: optax.sgd(1e-3),
    "momentum": lambda: optax.sgd(1e-3, momentum=0.9),
    "schedule": lambda: optax.adamw(optax.constant_schedule(1e-3)),
    "chain": lambda: optax.chain(optax.clip(1.0), optax.adam(1e-3)),
}
CONSTANT = 1000.0

Keys = tuple[str, ...]
_Weight = tuple[str, Keys]
"""A network's name, and the keys of a weight below it."""


class _Unnamed(Exception):
    """What is the model at the root, or lies aside, has no name of its own that rules could call it by."""


class Part(nnx.Module):
    """Modules by their names."""

    def __init__(self, parts: Mapping[str, Any]):
        for name, part in parts.items():
            setattr(self, name, part)


@dataclasses.dataclass
class _Optimizer:
    place: Keys
    trains: tuple[str, ...]
    tx: str


@dataclasses.dataclass
class _Program:
    """Two networks or three, and their optimizers, with where each lies."""

    places: Mapping[str, Keys]
    modules: Mapping[str, Mapping[str, tuple[int, int]]]
    wrapped: Keys
    optimizers: list[_Optimizer]
    stored: Mapping[Keys, Keys] = dataclasses.field(default_factory=dict[Keys, Keys], repr=False)
    """Where each of its leaves is stored, if elsewhere."""

    def text(self, place: Keys) -> str:
        """Returns what rules call a part of it, if it has a name of its own."""
        path = next((path for path in self.stored if path[: len(place)] == place), None)
        if path is None:
            return "/".join(place)
        stored = self.stored[path]
        found = stored[: len(stored) - len(path) + len(place)]
        found = found[:-1] if place in self.places.values() and found[-1:] == ("params",) else found
        if "nnx_aux" in found or not found:
            raise _Unnamed
        return "/".join(found)

    def make(self, called: Mapping[Keys, Keys], left: Sequence[str], gone: Sequence[Keys]) -> dict[str, Any]:
        """Returns the program with other names, and without some networks and optimizers."""
        tree: dict[str, Any] = {}
        networks = {name: self._network(name) for name in self.places if name not in left}
        for name, network in networks.items():
            put_at(tree, called.get(self.places[name], self.places[name]), network)
        for one in self.optimizers:
            if one.place in gone or not networks.keys() >= {*one.trains}:
                continue
            of = {name: networks[name] for name in one.trains}
            model = Part(of) if len(of) > 1 else of[one.trains[0]]
            optimizer = nnx.Optimizer(model, TX[one.tx](), wrt=nnx.Param)
            put_at(tree, called.get(one.place, one.place), optimizer)
        return tree

    def _network(self, name: str) -> Any:
        parts = {key: nnx.Linear(*shape, rngs=nnx.Rngs(0)) for key, shape in self.modules[name].items()}
        network = Part(parts)
        for key in self.wrapped:
            network = Part({key: network})
        return network

    def weights(self, name: str) -> list[_Weight]:
        return [(name, (module, key)) for module in self.modules[name] for key in ("kernel", "bias")]

    def place_of(self, weight: _Weight) -> Keys:
        return (*self.places[weight[0]], *self.wrapped, *weight[1])


@dataclasses.dataclass
class _Change:
    """Rules, what they make of the program, and which stored weight each weight is then."""

    rules: list[Any]
    source: dict[_Weight, _Weight]
    called: dict[Keys, Keys] = dataclasses.field(default_factory=dict)
    left: tuple[str, ...] = ()
    gone: tuple[Keys, ...] = ()
    lost: tuple[Keys, ...] = ()
    added: _Weight | None = None


def try_replaced(seed: int, place: pathlib.Path) -> Outcome:
    """Draws a program and rules for its networks, restores what is stored of it under them, and compares."""
    rng = random.Random(seed)
    program = _drawn_program(rng)
    kind, policy = rng.choice(RULES), rng.choice(("error", "error", "warn"))
    layout = rng.choice(("own names", "own names", "linen", "maxtext"))
    saved = numbered(program.make({}, (), ()))
    stored = _state_of(saved)
    try:
        tree = stored if layout == "own names" else to_linen(saved, layout)
    except ValueError as error:
        return Outcome(seed, "refused", "may refuse", "not saved", str(error))
    if layout != "own names":
        program.stored = _places_of(stored, tree)
    try:
        change = _drawn_change(rng, program, kind)
    except _Unnamed:
        return Outcome(seed, "refused", "may refuse", "no name", str(program))
    # A level that one network alone leaves of two may go; only what needs no rule has one reading then.
    is_plain = kind in MUST_RESTORE and layout == "own names"
    answer = "must restore" if is_plain else "may refuse"
    is_pure = rng.random() < 0.3
    detail = f"{layout}, {'pure, ' * is_pure}{program}, {policy}, {change.rules}: "
    target = nnx.eval_shape(lambda: program.make(change.called, change.left, change.gone))
    target = _state_of(target) if is_pure else target
    parts = [*program.places.values(), *(one.place for one in program.optimizers)]
    parts = [part for part in (change.called.get(part, part) for part in parts) if _has(target, part)]
    unwanted = rng.sample(parts, rng.randrange(len(parts))) if rng.random() < 0.25 else []
    for part in unwanted:
        _take_out(target, part)
    options = {"unexpected": "ignore"} if unwanted else {}
    detail += f"without {unwanted}: " * bool(unwanted)
    answer = "may refuse" if unwanted else answer
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(place / "saved", tree)
    try:
        result = restore(place / "saved", target, renames=change.rules, policy=policy, **options)
    except RestoreError as error:
        said = "refused without need" if answer == "must restore" else "refused"
        return Outcome(seed, said, answer, kind, detail + " | ".join(str(error).splitlines()[:6]))
    except Exception as error:
        return Outcome(seed, "crashed", answer, kind, f"{detail}{type(error).__name__}: {error}")
    have, want = _flat(_state_of(result)), _flat(stored)
    wrong = [*_wrong_weights(program, change, have, want), *_wrong_states(program, change, have, want)]
    if policy == "warn":  # What is filled is reported, and has no stored number.
        numbers = np.unique(np.concatenate([np.ravel(value) for value in want.values()]))
        wrong = [path for path in wrong if np.isin(have[path], numbers[numbers != 0]).any()]
    return Outcome(seed, "wrong" if wrong else "right", answer, kind, detail + str(wrong[:3]))


def _drawn_program(rng: random.Random) -> _Program:
    names, form, called = rng.choice(NAMES), rng.choice(PLACES), rng.choice(CALLED)
    names = (*names, "aux")[: rng.choice((2, 2, 3))]
    modules: dict[str, tuple[int, int]] = {"d": (3, 4)}
    modules |= {"out": (4, 4)} if rng.random() < 0.6 else {}
    modules |= {"params": (2, 5)} if rng.random() < 0.3 else {}
    own = {
        name: modules | ({"extra": (4, 2)} if at and rng.random() < 0.3 else {})
        for at, name in enumerate(names)
    }
    last = "net" if "model" in names else "model"
    places: dict[str, Keys] = {}
    for at, name in enumerate(names):
        places[name] = {
            "side": (name,),
            "grouped": ("nets", name),
            "level": ("trainings", name, "model"),
            "unlike": ("trainings", str(at), last) if at else (name,),
            "prefix": ("m", name),
            "listed": ("nets", str(at)),
        }[form]
    kinds = [rng.choice([*TX]) for _ in names]
    kinds = [kinds[0]] * len(names) if rng.random() < 0.6 else kinds
    wrapped = rng.choice(WRAPPED)
    if called == "one":
        place = rng.choice((("opt",), ("optimizer",), ("train", "opt")))
        return _Program(places, own, wrapped, [_Optimizer(place, names, kinds[0])])
    found = list[_Optimizer]()
    for at, name in enumerate(names):
        own_name = {
            "after": f"{name}_opt",
            "short": f"{name[0]}{name[-1]}_opt",
            "numbers": f"opt{at + 1}",
            "words": ("first", "second", "third")[at],
            "list": str(at),
        }[called]
        place = ("opts", own_name) if called == "list" or form in ("grouped", "prefix") else (own_name,)
        place = (*places[name][:-1], "optimizer") if "trainings" in places[name] else place
        found.append(_Optimizer(place, (name,), kinds[at]))
    return _Program(places, own, wrapped, found[:1] if rng.random() < 0.15 else found)


def _drawn_change(rng: random.Random, program: _Program, kind: str) -> _Change:
    """Returns what rules of a kind do; nothing where they cannot."""
    one, other = rng.sample([*program.places], 2)
    change = _Change([], {weight: weight for name in program.places for weight in program.weights(name)})
    here, there = program.places[one], program.places[other]
    texts = program.text(here), program.text(there)
    optimizers = [at.place for name in (one, other) for at in program.optimizers if at.trains == (name,)]
    whole = program.modules[one] == program.modules[other]
    takes = kind.endswith("with") and len(optimizers) == 2
    if kind == "add":
        change.added = (one, ("d", "kernel"))
        change.rules = [Add(program.text(program.place_of(change.added)), CONSTANT)]
    elif kind.startswith("renamed"):
        _rename(program, change, here, (*here[:-1], "fresh"))
        own = optimizers[: kind == "renamed with"]
        for place in own:
            _rename(program, change, place, (*place[:-1], "fresh_opt"))
    elif kind.startswith("exchanged") and whole:
        change.rules = _exchanged(*texts) + (_exchanged(*map(program.text, optimizers)) if takes else [])
        rng.shuffle(change.rules)
        change.source = {weight: (_of(weight[0], one, other), weight[1]) for weight in change.source}
    elif kind.startswith("replaced") and whole:
        change.rules = _replaced(*texts) + (_replaced(*map(program.text, optimizers)) if takes else [])
        change.source |= {weight: (other, weight[1]) for weight in program.weights(one)}
        change.left = (other,)
    elif kind == "copied" and whole:
        change.rules = [Drop(texts[1], "not wanted"), Copy(*texts)]
        change.source |= {weight: (one, weight[1]) for weight in program.weights(other)}
    elif kind.startswith("leaf"):
        module = rng.choice([name for name in program.modules[one] if name in program.modules[other]])
        keys = [(module, "kernel"), (module, "bias")][: rng.randint(1, 2)]
        end = (module,) if len(keys) == 2 else keys[0]
        left, right = (program.text((*at, *program.wrapped, *end)) for at in (here, there))
        copied = [Drop(right, "not wanted"), Copy(left, right)]
        change.rules = copied if kind == "leaf copied" else _exchanged(left, right)
        change.source |= {(other, key): (one, key) for key in keys}
        change.source |= {(one, key): (other, key) for key in keys} if kind == "leaf exchanged" else {}
    elif kind == "optimizer dropped" and len(optimizers) == 2:
        change.rules, change.gone = [Drop(program.text(optimizers[1]), "not wanted")], (optimizers[1],)
    elif kind == "optimizer left" and optimizers:
        change.rules, change.lost = [Drop(program.text(optimizers[0]), "not wanted")], (optimizers[0],)
    return change


def _has(tree: Any, place: Keys) -> bool:
    return not place or (place[0] in tree and _has(tree[place[0]], place[1:]))


def _take_out(tree: dict[str, Any], place: Keys) -> None:
    """Takes a part out of nested dicts, and those that it leaves empty."""
    first, *rest = place
    if rest:
        _take_out(tree[first], tuple(rest))
    if not rest or not tree[first]:
        del tree[first]


def _of(name: str, one: str, other: str) -> str:
    return {one: other, other: one}.get(name, name)


def _rename(program: _Program, change: _Change, old: Keys, new: Keys) -> None:
    *above, _ = (text := program.text(old)).split("/")
    change.rules.append((text, "/".join((*above, new[-1]))))
    change.called[old] = new


def _exchanged(one: str, other: str) -> list[Any]:
    return [(one, other), (other, one)]


def _replaced(one: str, other: str) -> list[Any]:
    return [Drop(one, "not wanted"), (other, one)]


def _wrong_weights(
    program: _Program, change: _Change, have: Mapping[Keys, Any], stored: Mapping[Keys, Any]
) -> list[Keys]:
    wrong: list[Keys] = []
    for weight, source in change.source.items():
        place, own = program.places[weight[0]], program.place_of(weight)
        path = (*change.called.get(place, place), *own[len(place) :])
        value = stored[program.place_of(source)] + CONSTANT * (weight == change.added)
        if path in have and weight[0] not in change.left and not np.array_equal(have[path], value):
            wrong.append(path)
    return wrong


def _wrong_states(
    program: _Program, change: _Change, have: Mapping[Keys, Any], stored: Mapping[Keys, Any]
) -> list[Keys]:
    """Returns what an optimizer has that none had which trained the weights that it trains now."""
    wrong: list[Keys] = []
    for one in program.optimizers:
        place = change.called.get(one.place, one.place)
        weights = [weight for name in one.trains for weight in program.weights(name)]
        for path, value in have.items() if not {*change.left} & {*one.trains} else ():
            if path[: len(place)] != place or one.place in change.gone:
                continue
            below = path[len(place) :]
            # Where `opt_state` alone is named, the step beside it is kept.
            is_lost = one.place in change.lost and (
                below != ("step",) or "opt_state" not in str(change.rules)
            )
            likely = [] if is_lost else _sources(one, below, weights, change)
            found = [v for name, end in likely for v in _of_optimizers(program, name, end, stored)]
            if not any(np.array_equal(value, each) for each in found):
                wrong.append(path)
    return wrong


def _sources(
    one: _Optimizer, below: Keys, weights: Sequence[_Weight], change: _Change
) -> list[tuple[str, Keys]]:
    """Returns the stored networks that a leaf of an optimizer may be of, with its keys there."""
    if below[-1] not in ("kernel", "bias"):
        return [(change.source[weight][0], below) for weight in weights]
    end = below[-2:]
    if len(one.trains) == 1:
        return [(change.source[one.trains[0], end][0], below)]
    at = next(at for at, key in enumerate(below) if key in one.trains)  # Right below the field.
    source = change.source[below[at], end][0]
    return [(source, (*below[:at], source, *below[at + 1 :]))]


def _of_optimizers(program: _Program, network: str, below: Keys, stored: Mapping[Keys, Any]) -> list[Any]:
    """Returns what the optimizers of a network have stored, whatever the numbers of their chains."""
    places = [one.place for one in program.optimizers if network in one.trains]
    return [
        value
        for place in places
        for path, value in stored.items()
        if path[: len(place)] == place and _fields(path[len(place) :]) == _fields(below)
    ]


def _fields(below: Keys) -> Keys:
    return tuple(key for key in below if not key.isdigit())


def _state_of(tree: Any) -> dict[str, Any]:
    """Returns nested dicts of arrays with strings for keys, as people save them."""
    if not isinstance(tree, dict):
        tree = nnx.to_pure_dict(nnx.state(tree))
    return {
        str(key): _state_of(part) if isinstance(part, dict | nnx.Module | nnx.Optimizer) else part
        for key, part in tree.items()
    }


def _places_of(state: dict[str, Any], tree: Any) -> dict[Keys, Keys]:
    """Returns where each leaf of a program is stored: every one has numbers of its own."""
    values = {np.asarray(leaf).tobytes(): path for path, leaf in _flat(tree).items()}
    return {path: values[leaf.tobytes()] for path, leaf in _flat(state).items() if leaf.tobytes() in values}


def _flat(tree: dict[str, Any]) -> dict[Keys, np.ndarray]:
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {tuple(map(_key, path)): np.asarray(leaf) for path, leaf in found}


def _key(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", None))))
