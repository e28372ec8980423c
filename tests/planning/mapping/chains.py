"""Random chains of optax, changed as programs change: what each state is, by trying every reading.

The oracle knows from the program where each part keeps its state, and tries all pairings
of like states. It shares no code with the planner.
"""

import dataclasses
import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import optax

Keys = tuple[Any, ...]
Part = Callable[[], optax.GradientTransformation]


def _falling(count: Any) -> Any:
    return 1.0 / (1.0 + count)


def _factored() -> optax.GradientTransformation:
    return optax.scale_by_factored_rms(min_dim_size_to_factor=2)


PARTS: dict[str, Part] = {
    "adam": optax.scale_by_adam,
    "amsgrad": optax.scale_by_amsgrad,
    "belief": optax.scale_by_belief,
    "lion": optax.scale_by_lion,
    "rms": optax.scale_by_rms,
    "stddev": optax.scale_by_stddev,
    "rss": optax.scale_by_rss,
    "novograd": optax.scale_by_novograd,
    "factored": _factored,
    "trace": lambda: optax.trace(0.9),
    "ema": lambda: optax.ema(0.9),
    "schedule": lambda: optax.scale_by_schedule(_falling),
    "plateau": lambda: optax.contrib.reduce_on_plateau(accumulation_size=10),
    "noise": lambda: optax.add_noise(0.1, 0.5, 0),
    "every": lambda: optax.apply_every(2),
    "nans": optax.zero_nans,
    "clip": lambda: optax.clip_by_global_norm(1.0),
    "decay": lambda: optax.add_decayed_weights(1e-3),
}


@dataclasses.dataclass(frozen=True)
class Node:
    """One part, or a wrapper around others."""

    kind: str
    inner: tuple["Node", ...] = ()

    def build(self) -> Any:
        """Returns the transformation."""
        inner = [node.build() for node in self.inner]
        match self.kind:
            case "chain":
                return _chain(inner)
            case "finite":
                return optax.apply_if_finite(_chain(inner), 3)
            case "masked":
                return optax.masked(_chain(inner), _kernels)
            case "steps":
                return optax.MultiSteps(_chain(inner), 2).gradient_transformation()
            case "injected":
                return optax.inject_hyperparams(lambda rate: _chain([*inner, optax.scale(rate)]))(rate=0.1)
            case "groups":
                return optax.multi_transform({"a": inner[0], "b_1": inner[1]}, _labels)
        return PARTS[self.kind]()


def _chain(parts: Sequence[Any]) -> optax.GradientTransformation:
    return optax.chain(*parts, optax.identity())  # Without any part, optax makes no chain.


def _kernels(params: Any) -> Any:
    return jax.tree.map(lambda leaf: len(leaf.shape) > 1, params)


def _labels(params: Any) -> Any:
    return jax.tree.map(lambda leaf: "a" if len(leaf.shape) > 1 else "b_1", params)


WRAPPERS = {
    "chain": (),
    "finite": ("inner_state",),
    "steps": ("inner_opt_state",),
    "injected": ("inner_state",),
}
WRAPPERS |= {"masked": ("inner_state",)}


def on_disk(state: Any) -> Any:
    """Returns optax's containers as Orbax stores them."""
    if hasattr(state, "_fields"):
        return {name: on_disk(getattr(state, name)) for name in state._fields} or None
    if isinstance(state, dict):
        return {key: on_disk(part) for key, part in state.items()}
    if isinstance(state, tuple | list):
        return [on_disk(part) for part in state]
    return state


def flat(tree: Any, path: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """Yields the leaves of a stored tree by path."""
    if isinstance(tree, dict):
        for key, part in tree.items():
            yield from flat(part, (*path, key))
    elif isinstance(tree, list):
        for key, part in enumerate(tree):
            yield from flat(part, (*path, key))
    elif tree is not None:
        key = jax.dtypes.issubdtype(tree.dtype, jax.dtypes.prng_key)
        yield path, jax.ShapeDtypeStruct((2,), np.dtype("uint32")) if key else tree


def places(node: Node, path: Keys = ()) -> Iterator[tuple[Keys, tuple[Keys, ...]]]:
    """Yields the place of every part's state, and the places inside that are other parts'."""
    if node.kind == "groups":
        for label, inner in zip(("a", "b_1"), node.inner, strict=True):
            yield from places(inner, (*path, "inner_states", label, "inner_state"))
        return
    if node.kind not in WRAPPERS:
        yield path, ()
        return
    inner = (*path, *WRAPPERS[node.kind])
    if node.kind not in ("chain", "masked"):
        yield path, (inner,)
    for at, part in enumerate(node.inner):
        yield from places(part, (*inner, at))


@dataclasses.dataclass(frozen=True)
class State:
    """One part's own leaves, by their path below it."""

    place: Keys
    leaves: dict[Keys, Any]
    signature: tuple[frozenset[Any], frozenset[Keys]]

    def like(self, other: "State") -> bool:
        """Tells whether both are of one kind, for parameters of which some are the same."""
        (fields, trained), (others, also) = self.signature, other.signature
        return fields == others and bool(trained & also)


def states_of(node: Node, params: Any) -> list[State]:
    """Returns the states of a chain that keep anything, in its order."""
    parameters = {path for path, _ in flat(params)}
    tree = dict(flat(on_disk(jax.eval_shape(node.build().init, params))))
    found: list[State] = []
    for place, others in places(node):
        mine = {
            path[len(place) :]: leaf
            for path, leaf in tree.items()
            if path[: len(place)] == place and not any(path[: len(other)] == other for other in others)
        }
        fields = frozenset(
            (p[0], len(leaf.shape) > 0) if p[1:] in parameters else p for p, leaf in mine.items()
        )
        trained = frozenset(p[1:] for p in mine if p[1:] in parameters)
        if mine:
            found.append(State(place, mine, (fields, trained)))
    return found


def readings(wanted: Sequence[State], stored: Sequence[State]) -> list[dict[int, int]]:
    """Returns every best reading: as many pairs of like states as can be, as few moved as can be."""
    groups: dict[object, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for at, state in enumerate(wanted):
        groups[state.signature][0].append(at)
    for at, state in enumerate(stored):
        groups[state.signature][1].append(at)
    ways = [list(_pairings(*group)) for group in groups.values()]
    every = [dict(itertools.chain.from_iterable(way)) for way in itertools.product(*ways)]
    kept = [_in_order([reading[at] for at in sorted(reading)]) for reading in every]
    return [reading for reading, count in zip(every, kept, strict=True) if count == max(kept)]


def _pairings(here: list[int], there: list[int]) -> Iterator[list[tuple[int, int]]]:
    if len(here) <= len(there):
        for chosen in itertools.permutations(there, len(here)):
            yield list(zip(here, chosen, strict=True))
    else:
        for chosen in itertools.permutations(here, len(there)):
            yield list(zip(chosen, there, strict=True))


def _in_order(numbers: Sequence[int]) -> int:
    """Returns how many of the numbers stay where they are: the longest run that rises."""
    best = [0] * len(numbers)
    for at, number in enumerate(numbers):
        best[at] = 1 + max([best[i] for i in range(at) if numbers[i] < number], default=0)
    return max(best, default=0)


class Program:
    """A random chain and its changes."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def part(self) -> Node:
        return Node(self.random.choice([*PARTS]))

    def chain(self) -> Node:
        parts = tuple(self.part() for _ in range(self.random.randint(1, 6)))
        return self.wrapped(Node("chain", self.grouped(parts)))

    def grouped(self, parts: tuple[Node, ...]) -> tuple[Node, ...]:
        """Puts some of the parts into a wrapper."""
        if len(parts) > 1 and self.random.random() < 0.3:
            start = self.random.randrange(len(parts))
            end = self.random.randint(start + 1, len(parts))
            kind = self.random.choice(["chain", "chain", "masked", "finite", "groups"])
            inner = parts[start:end]
            if kind == "groups":
                inner = (
                    Node("chain", inner),
                    Node("chain", (self.part(),)),
                )
            parts = (*parts[:start], Node(kind, inner), *parts[end:])
        return parts

    def wrapped(self, node: Node) -> Node:
        kind = self.random.choice(["", "", "", "chain", "steps", "injected", "finite"])
        return Node(kind, (node,)) if kind else node

    def changed(self, node: Node) -> Node:
        """Returns the chain of a later program."""
        for _ in range(self.random.choice([0, 1, 1, 1, 2])):
            node = self.random.choice([self.added, self.removed, self.swapped, self.unwrapped, self.wrapped])(
                node
            )
        return node

    def _chains(self, node: Node) -> list[Node]:
        below = [chain for part in node.inner for chain in self._chains(part)]
        return [node, *below] if node.kind in WRAPPERS else below

    def _replace(self, node: Node, old: Node, new: Node) -> Node:
        if node is old:
            return new
        return dataclasses.replace(node, inner=tuple(self._replace(part, old, new) for part in node.inner))

    def _edit(self, node: Node, change: Callable[[list[Node]], None]) -> Node:
        old = self.random.choice(self._chains(node))
        parts = list(old.inner)
        change(parts)
        return self._replace(node, old, dataclasses.replace(old, inner=tuple(parts)))

    def added(self, node: Node) -> Node:
        return self._edit(node, lambda parts: parts.insert(self.random.randint(0, len(parts)), self.part()))

    def removed(self, node: Node) -> Node:
        return self._edit(node, lambda parts: parts.pop(self.random.randrange(len(parts))) if parts else None)

    def swapped(self, node: Node) -> Node:
        def swap(parts: list[Node]) -> None:
            if len(parts) > 1:
                at = self.random.randrange(len(parts) - 1)
                parts[at], parts[at + 1] = parts[at + 1], parts[at]

        return self._edit(node, swap)

    def unwrapped(self, node: Node) -> Node:
        inner = [chain for chain in self._chains(node) if chain is not node]
        if not inner:
            return node
        old = self.random.choice(inner)
        if old.kind == "chain":
            return node
        return self._replace(node, old, Node("chain", old.inner))

    def params(self) -> Any:
        """Returns the parameters of a model, some of whose modules are called like parts of an optimizer."""
        names = ["dense", "mu", "nu", "count", "trace", "inner_state", "step", "ema", "layers_0", "value"]
        tree: dict[str, Any] = {}
        for name in self.random.sample(names, self.random.randint(1, 3)):
            tree[name] = {"kernel": _abstract(2, 3), "bias": _abstract(3)}
        if self.random.random() < 0.4:
            outer = self.random.choice(["mu", "nu", "dense", "count", "trace", "block"])
            tree[outer] = {**tree.get(outer, {}), **{name: dict(part) for name, part in tree.items()}}
        return tree


def _abstract(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.dtype("float32"))
