"""Random programs of several networks through `save` and `restore`: every element comes back.

One to three networks, an optimizer for each, one for several or none, averages and counts lie anywhere: side
by side, in groups, in lists, below levels, one training within another. What is restored is the same program,
as modules, as states or as dicts of arrays, so nothing has to be guessed: a save may be refused, in one error
and before anything is written; a restore may not. Nothing here is the package's.
"""

import dataclasses
import pathlib
import random
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx

from orbax_nnx_handler import NNXLinenHandler, NNXLinenRestore, NNXLinenSave, RestoreError, restore, save
from tests.laws.fuzz.programs import numbered
from tests.laws.fuzz.replaced import Part
from tests.laws.fuzz.trial import Outcome
from tests.written import put_at

NAMES = (
    *(("a", "b", "c"), ("actor", "critic", "target"), ("gen", "disc", "aux"), ("pi", "v", "q")),
    *(("enc", "dec", "head"), ("teacher", "student", "model"), ("model", "model2", "net")),
)
LEVELS: tuple[Any, ...] = ((), (), (), (), ("training",), ("agent", "state"), ("params",), ("model",))
FORMS = ("modules", "modules", "states", "one state", "pure", "pure", "a module")
TX: Mapping[str, Callable[[], optax.GradientTransformation]] = {
    "adam": lambda: optax.adam(1e-3),
    "sgd": lambda: optax.sgd(1e-3),
    "momentum": lambda: optax.sgd(1e-3, momentum=0.9),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(1e-3))),
    "nested": lambda: optax.chain(optax.chain(optax.clip(1.0), optax.adam(1e-3)), optax.trace(0.9)),
}

Key = str | int
Keys = tuple[Key, ...]


@dataclasses.dataclass(frozen=True)
class _Program:
    """Where networks, optimizers (with what each trains), averages and counts lie."""

    networks: Mapping[str, Keys]
    modules: Mapping[str, tuple[str, ...]]
    optimizers: Mapping[Keys, tuple[str, tuple[str, ...]]]
    averages: Mapping[Keys, str]
    counts: tuple[Keys, ...]

    def make(self) -> Any:
        """Returns the program as modules in containers."""
        networks = {name: _network(modules) for name, modules in self.modules.items()}
        parts: dict[Keys, Any] = {place: networks[name] for name, place in self.networks.items()}
        for place, (tx, trains) in self.optimizers.items():
            model = (
                networks[trains[0]] if len(trains) == 1 else Part({name: networks[name] for name in trains})
            )
            parts[place] = nnx.Optimizer(model, TX[tx](), wrt=nnx.Param)
        parts |= {place: _network(self.modules[name]) for place, name in self.averages.items()}
        parts |= {place: jnp.zeros((), jnp.int32) for place in self.counts}
        if () in parts:
            return parts[()]
        tree: dict[Any, Any] = {}
        for place, part in parts.items():
            put_at(tree, place, part)
        return _with_lists(tree)


def try_placed(seed: int, place: pathlib.Path) -> Outcome:
    """Draws a program, saves it, restores it into itself, and compares."""
    rng = random.Random(seed)
    program = _drawn(rng)
    form, layout = rng.choice(FORMS), rng.choice(("linen", "linen", "maxtext"))
    by_handler = rng.random() < 0.2
    tag = f"{len(program.networks)}, {layout}, {form}"
    detail = f"{layout}, {form}, {program}: "
    saved = _in_form(numbered(program.make()), form)
    target = (
        jax.eval_shape(lambda: saved)
        if form == "pure"
        else nnx.eval_shape(lambda: _in_form(program.make(), form))
    )
    try:
        _save(place / "saved", saved, layout, by_handler)
    except ValueError as error:
        if (place / "saved").exists():
            return Outcome(seed, "crashed", "must restore", tag, f"{detail}wrote, and refused: {error}")
        return Outcome(seed, "refused", "may refuse", tag, detail + str(error))
    except Exception as error:
        return Outcome(
            seed, "crashed", "must restore", tag, f"{detail}saving: {type(error).__name__}: {error}"
        )
    try:
        result = _restored(place / "saved", target, by_handler)
    except RestoreError as error:
        said = " | ".join(str(error).splitlines()[:8])
        return Outcome(seed, "refused without need", "must restore", tag, detail + said)
    except Exception as error:
        return Outcome(seed, "crashed", "must restore", tag, f"{detail}{type(error).__name__}: {error}")
    have, want = _values(result), _values(saved)
    wrong = [path for path in want if path not in have or not np.array_equal(have[path], want[path])]
    wrong += [path for path in have if path not in want]
    return Outcome(seed, "wrong" if wrong else "right", "must restore", tag, detail + str(wrong[:3]))


def _save(place: pathlib.Path, item: Any, layout: Any, by_handler: bool) -> None:
    if not by_handler:
        save(place, item, layout=layout)
        return
    with ocp.Checkpointer(NNXLinenHandler(layout=layout)) as checkpointer:
        checkpointer.save(place, args=NNXLinenSave(item))


def _restored(place: pathlib.Path, target: Any, by_handler: bool) -> Any:
    if not by_handler:
        return restore(place, target)
    with ocp.Checkpointer(NNXLinenHandler()) as checkpointer:
        return checkpointer.restore(place, args=NNXLinenRestore(target))


def _drawn(rng: random.Random) -> _Program:
    names = rng.sample(rng.choice(NAMES), rng.choice((1, 2, 2, 2, 3)))
    level, style = rng.choice(LEVELS), rng.choice(("any", "any", "side", "grouped", "listed", "trainings"))
    some = [name for name in ("out", "layers", "norm", "params") if rng.random() < 0.3]
    modules = ("d", *some, *(name for name in ("cell", "gru", "drop") if rng.random() < 0.12))
    taken: list[Keys] = []

    def placed(choices: list[Keys]) -> Keys | None:
        rng.shuffle(choices)
        found = (at for at in choices if not any(at[: len(o)] == o or o[: len(at)] == at for o in taken))
        at = next(found, None)
        if at is not None:
            taken.append(at)
        return at

    networks: dict[str, Keys] = {}
    for at, name in enumerate(names):
        choices = _places_of_network(rng, style, name, at, [*networks.values()], level)
        networks[name] = placed(choices) or placed([(*level, f"{name}_net")]) or (f"{name}_{at}",)
    own = {name: modules if rng.random() < 0.7 else (*modules, f"x{at}") for at, name in enumerate(names)}
    kinds = [rng.choice([*TX])] * len(names) if rng.random() < 0.5 else [rng.choice([*TX]) for _ in names]
    optimizers: dict[Keys, tuple[str, tuple[str, ...]]] = {}
    together = len(names) > 1 and rng.random() < 0.2
    trained = [tuple(names)] if together else [(name,) for name in names if rng.random() < 0.85]
    for at, trains in enumerate(trained):
        choices = _places_of_optimizer(rng, style, trains, at, networks, level)
        if (place := placed(choices)) is not None:
            optimizers[place] = (kinds[at], trains)
    averages: dict[Keys, str] = {}
    for name in names if rng.random() < 0.3 else ():
        above = networks[name][:-1]
        if (place := placed([(*above, f"{name}_ema"), (*above, "ema"), (*level, "ema", name)])) is not None:
            averages[place] = name
    counts = [(*level, "step"), (*level, "epoch"), *((*at[:-1], "step") for at in networks.values())]
    counts = [place for _ in range(rng.choice((0, 0, 0, 1, 2))) if (place := placed(counts)) is not None]
    return _Program(networks, own, optimizers, averages, tuple(counts))


def _places_of_network(
    rng: random.Random, style: str, name: str, at: int, others: list[Keys], level: Keys
) -> list[Keys]:
    inner = [(*other[:-1], name, "model") for other in others if other[-1:] == ("model",)]
    found: dict[str, list[Keys]] = {
        "side": [(*level, name)],
        "grouped": [(*level, "nets", name)],
        "listed": [(*level, "nets", at)],
        "trainings": [(*level, "trainings", name, "model"), (*level, name, "model"), (*level, at, "model")],
    }
    if style != "any":
        return found[style][:1] if style != "trainings" else [found[style][rng.choice((0, 0, 1, 1, 2))]]
    return [
        *(place for places in found.values() for place in places),
        *inner,
        (*level, "model"),
        (*level, "params", name),
    ]


def _places_of_optimizer(
    rng: random.Random,
    style: str,
    trains: tuple[str, ...],
    at: int,
    networks: Mapping[str, Keys],
    level: Keys,
) -> list[Keys]:
    network, name = networks[trains[0]], trains[0]
    attribute = rng.choice(("optimizer", "optimizer", "opt", "tx"))
    beside = [(*network[:-1], attribute)] if network[-1:] == ("model",) else []
    after = [(*network[:-1], f"{name}_opt")] if isinstance(network[-1], str) else []
    one = [(*level, "opt"), (*level, "optimizer"), (*level, "training", "opt")]
    if len(trains) > 1:
        return one
    found = {
        "side": [(*level, f"{name}_opt")] if rng.random() < 0.7 else [(*level, f"opt{at}")],
        "grouped": [(*level, "opts", name)] if rng.random() < 0.7 else [(*level, "opts", at)],
        "listed": [(*level, "opts", at)],
        "trainings": beside,
    }
    if style != "any":
        return found[style]
    return [*(place for places in found.values() for place in places), *after, *one]


def _network(modules: tuple[str, ...]) -> Any:
    rngs = nnx.Rngs(0)
    kinds: dict[str, Callable[[], Any]] = {
        "d": lambda: nnx.Linear(3, 4, rngs=rngs),
        "out": lambda: nnx.Linear(4, 4, rngs=rngs),
        "layers": lambda: nnx.List([nnx.Linear(4, 4, use_bias=False, rngs=rngs) for _ in range(2)]),
        "norm": lambda: nnx.BatchNorm(4, rngs=rngs),
        "params": lambda: nnx.Linear(2, 5, rngs=rngs),
        "cell": lambda: nnx.OptimizedLSTMCell(2, 3, rngs=rngs),
        "gru": lambda: nnx.GRUCell(2, 3, rngs=rngs),
        "drop": lambda: nnx.Dropout(0.1, rngs=rngs),
    }
    other = lambda: nnx.Linear(4, 2, rngs=rngs)  # noqa: E731
    return Part({name: kinds.get(name, other)() for name in modules})


def _with_lists(node: Any) -> Any:
    """Returns dicts whose keys are the first numbers as lists, and other numbers as text."""
    if not isinstance(node, dict):
        return node
    parts = {key: _with_lists(part) for key, part in node.items()}
    if all(isinstance(key, int) for key in parts) and sorted(parts) == [*range(len(parts))]:
        return [parts[at] for at in range(len(parts))]
    return {str(key): part for key, part in parts.items()}


def _in_form(program: Any, form: str) -> Any:
    if form == "one state":
        return nnx.split(program)[1]
    if form == "a module":
        return _as_module(program)
    if form == "modules":
        return program
    if isinstance(program, dict):
        return {key: _in_form(part, form) for key, part in program.items()}
    if isinstance(program, list):
        return [_in_form(part, form) for part in program]
    if not isinstance(program, nnx.Module | nnx.Optimizer):
        return program
    state = nnx.state(program)
    return nnx.to_pure_dict(state) if form == "pure" else state


def _as_module(program: Any) -> Any:
    if isinstance(program, dict):
        return Part({key: _as_module(part) for key, part in program.items()})
    if isinstance(program, list):
        return nnx.List([_as_module(part) for part in program])
    return nnx.Variable(program) if isinstance(program, jax.Array) else program


def _values(tree: Any) -> dict[Keys, np.ndarray]:
    if isinstance(tree, nnx.Module | nnx.Optimizer):
        tree = nnx.state(tree)
    if isinstance(tree, dict | list) and not isinstance(tree, nnx.State):
        pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {(key, *below): value for key, part in pairs for below, value in _values(part).items()}
    if isinstance(tree, nnx.State):
        leaves = {tuple(path): leaf for path, leaf in nnx.to_flat_state(tree)}
        leaves = {k: leaf[...] if isinstance(leaf, nnx.Variable) else leaf for k, leaf in leaves.items()}
    else:
        leaves = {(): tree}
    return {path: np.asarray(_bits(leaf)) for path, leaf in leaves.items()}


def _bits(value: Any) -> Any:
    is_key = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(value) if is_key else value
