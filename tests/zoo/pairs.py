"""What a pair is, how each side runs, and how the two are compared.

Linen computes the reference: its variables are replaced by random values,
saved by stock Orbax, restored through the library into the NNX module, and both
run on the same input. No number is compared with one of the library's own.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from orbax_nnx_handler import restore

Renames = Sequence[tuple[str, str]]
Variables = Mapping[str, Any]
Outcome = dict[str, np.ndarray]
"""Everything that a run shows: outputs and statistics by name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """How a stateful pair makes a training step.

    Attributes:
        linen: Keyword arguments of the Linen call that updates statistics.
        nnx: The same for the NNX call.
        collections: The Linen collections that change.
        statistics: The NNX filter of the variables that change.
        steps: Training steps before the statistics are compared.
    """

    linen: Mapping[str, Any]
    nnx: Mapping[str, Any]
    collections: tuple[str, ...] = ("batch_stats",)
    statistics: Any = nnx.BatchStat
    steps: int = 2


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Pair:
    """One Linen module and the NNX module that computes the same.

    Attributes:
        linen_name: What the docs call the Linen side.
        nnx_name: What the docs call the NNX side.
        variant: What this pair shows beyond others of these names.
        linen: The Linen module.
        nnx: Builds the NNX module.
        inputs: Positional arguments of both calls.
        initial: The call that creates all variables, where evaluation does not.
        linen_kwargs: Keyword arguments of the Linen call in evaluation.
        nnx_kwargs: The same for the NNX call.
        training: How to train, for modules with state.
        renames: The names that nobody can know.
        without_variable: Stored paths with no variable in NNX: zero in the checkpoint.
        unseen: Stored paths that change no output of a correct program.
        needs: A name of `nnx` that later versions of Flax have only, or "".
    """

    linen_name: str
    nnx_name: str
    linen: nn.Module
    nnx: Callable[[nnx.Rngs], nnx.Module]
    inputs: tuple[Any, ...]
    variant: str = ""
    initial: tuple[tuple[Any, ...], Mapping[str, Any]] | None = None
    linen_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    nnx_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    training: Training | None = None
    renames: Renames = ()
    without_variable: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()
    needs: str = ""

    def __str__(self) -> str:
        return "-".join(
            part.replace(" ", "_") for part in (self.linen_name, self.nnx_name, self.variant) if part
        )


def values(*shape: int, seed: int = 0) -> np.ndarray:
    """Returns float32 inputs that are neither constant nor symmetric."""
    return np.random.default_rng(seed).normal(0.2, 1.0, shape).astype(np.float32)


def path_of(keys: Sequence[Any]) -> str:
    """Returns a JAX key path as `params/Dense_0/kernel`."""
    return _path_of(tuple(keys))


# Asked for a few million times, of some thousand.
@functools.cache
def _path_of(keys: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def stored_variables(pair: Pair) -> dict[str, Any]:
    """Returns the Linen variables with random values in place of the initial ones."""
    inputs, kwargs = pair.initial or (pair.inputs, pair.linen_kwargs)
    initialise = functools.partial(pair.linen.init, **kwargs)
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    shapes = jax.eval_shape(initialise, rngs, *inputs)
    return randomised(shapes, zeros=pair.without_variable)


def randomised(shapes: Any, zeros: Sequence[str] = ()) -> Any:
    """Returns a tree of random values, each leaf's drawn from its path."""

    def draw(keys: Sequence[Any], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        path = path_of(keys)
        chance = np.random.default_rng(zlib.crc32(path.encode()))
        if path in zeros:
            return np.zeros(leaf.shape, leaf.dtype)
        if np.issubdtype(leaf.dtype, np.integer):
            return np.asarray(chance.integers(1, 3, leaf.shape), leaf.dtype)
        if path.endswith(("scale", "var", "sigma", "value/var")):
            return np.asarray(chance.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
        return np.asarray(chance.normal(0.0, 0.5, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def saved(tree: Any, path: Path) -> Path:
    """Writes a tree with stock Orbax and returns where."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
    return path


def abstract_module(pair: Pair) -> nnx.Module:
    """Returns the NNX module of a pair without values, to restore into."""
    return nnx.eval_shape(lambda: pair.nnx(nnx.Rngs(0)))


def restored_module(pair: Pair, path: Path, target: nnx.Module | None = None) -> nnx.Module:
    """Restores the checkpoint of a pair into its NNX module, and checks that nothing stayed abstract."""
    module = restore(
        path, target or abstract_module(pair), renames=pair.renames, policy="error", unexpected="error"
    )
    abstract = [path for path, leaf in nnx.to_flat_state(nnx.state(module)) if not is_concrete(leaf)]
    assert not abstract, f"leaves that hold no values: {abstract}"
    return module


def is_concrete(leaf: Any) -> bool:
    """Tells whether a variable, or a raw array beside the variables, holds values."""
    value = leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
    return isinstance(value, jax.Array)


def shifted(inputs: tuple[Any, ...], step: int) -> tuple[Any, ...]:
    """Returns the inputs of a training step: statistics must see more than one batch."""
    return tuple(
        x * (1.0 + step) + step if np.issubdtype(np.asarray(x).dtype, np.floating) else x for x in inputs
    )


def linen_outcome(pair: Pair, variables: Variables) -> Outcome:
    """Runs the Linen side: training steps where it has state, then evaluation."""
    outcome: dict[str, Any] = {}
    variables = jax.tree.map(jnp.array, dict(variables))  # Copies: Linen may write into a NumPy array.
    if pair.training is not None:
        outcome |= _linen_statistics("restored", pair.training, variables)
        for step in range(pair.training.steps):
            output, updates = pair.linen.apply(
                variables,
                *shifted(pair.inputs, step),
                **pair.training.linen,
                mutable=pair.training.collections,
            )
            variables |= updates
            outcome |= _named(f"step {step}", output)
        outcome |= _linen_statistics("trained", pair.training, variables)
    output = pair.linen.apply(variables, *pair.inputs, **pair.linen_kwargs)
    return outcome | _named("evaluation", output)


def nnx_outcome(pair: Pair, module: Any) -> Outcome:
    """Runs the NNX side through the same steps as `linen_outcome`."""
    # As one program: each operation by itself would be compiled by itself.
    graphdef, state = nnx.split(module)
    return _nnx_outcome(pair, graphdef, state)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _nnx_outcome(pair: Pair, graphdef: Any, state: Any) -> Outcome:
    module = nnx.merge(graphdef, state)
    outcome: dict[str, Any] = {}
    if pair.training is not None:
        outcome |= _nnx_statistics("restored", pair.training, module)
        for step in range(pair.training.steps):
            outcome |= _named(f"step {step}", module(*shifted(pair.inputs, step), **pair.training.nnx))
        outcome |= _nnx_statistics("trained", pair.training, module)
    return outcome | _named("evaluation", module(*pair.inputs, **pair.nnx_kwargs))


def _linen_statistics(when: str, training: Training, variables: Variables) -> dict[str, Any]:
    changing = {name: variables[name] for name in training.collections}
    return _ranked(when, [(path_of(keys[1:]), leaf) for keys, leaf in _flat(changing)])


def _nnx_statistics(when: str, training: Training, module: nnx.Module) -> dict[str, Any]:
    flat = nnx.to_flat_state(nnx.state(module, training.statistics))
    return _ranked(when, [(_joined(path), jnp.copy(leaf.get_value())) for path, leaf in flat])


def _ranked(when: str, flat: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Names each statistic by its last key and its rank: module names may differ."""
    ranks: dict[str, int] = {}
    named: dict[str, Any] = {}
    for path, leaf in sorted(flat, key=lambda entry: entry[0]):
        last = path.rsplit("/", 1)[-1]
        ranks[last] = ranks.get(last, -1) + 1
        named[f"{when} {last} {ranks[last]}"] = leaf
    return named


def _joined(path: tuple[Any, ...]) -> str:
    return "/".join(_joined(key) if isinstance(key, tuple) else str(key) for key in path)


def _flat(tree: Any) -> list[tuple[tuple[Any, ...], Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def _named(name: str, output: Any) -> dict[str, Any]:
    leaves = jax.tree.leaves(output)
    return {f"{name}, output {index}": jnp.asarray(leaf) for index, leaf in enumerate(leaves)}


def assert_same(expected: Mapping[str, Any], actual: Mapping[str, Any], tolerance: float = 2e-5) -> None:
    """Raises AssertionError unless both outcomes hold the same numbers under the same names."""
    assert sorted(expected) == sorted(actual)
    for name, value in expected.items():
        np.testing.assert_allclose(
            np.asarray(actual[name]), np.asarray(value), rtol=tolerance, atol=tolerance, err_msg=name
        )


def differs(expected: Mapping[str, Any], actual: Mapping[str, Any], tolerance: float = 2e-5) -> bool:
    """Tells whether `assert_same` would raise; it is asked for each weight of each pair."""
    if sorted(expected) != sorted(actual):
        return True
    # As two vectors: a comparison of small arrays takes twenty times what it compares.
    one, other = (
        np.concatenate([np.ravel(outcome[name]) for name in expected]) for outcome in (actual, expected)
    )
    return one.shape != other.shape or not np.allclose(
        one, other, rtol=tolerance, atol=tolerance, equal_nan=True
    )


def weights_that_matter(pair: Pair, variables: Variables) -> list[str]:
    """Returns the stored paths whose values the pair's outcome depends on."""
    paths = [path_of(keys) for keys, _ in _flat(variables)]
    unknown = {*pair.without_variable, *pair.unseen} - set(paths)
    assert not unknown, f"no such stored paths: {unknown}"
    return [path for path in paths if path not in (*pair.without_variable, *pair.unseen)]


def broken(variables: Any, path: str) -> Any:
    """Returns the variables with one weight wrong: another's of the same shape, or its own values moved."""
    flat, tree = jax.tree_util.tree_flatten_with_path(variables)
    leaves = {path_of(keys): leaf for keys, leaf in flat}
    assert len(leaves) == len(flat)
    leaves[path] = _wrong_value(leaves, path)
    return tree.unflatten(leaves.values())


def replaced(variables: Any, path: str, value: np.ndarray) -> Any:
    """Returns the variables with the value at one path replaced."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: value if path_of(keys) == path else leaf, variables
    )


def _wrong_value(leaves: Mapping[str, np.ndarray], path: str) -> np.ndarray:
    right = leaves[path]
    for other, value in leaves.items():
        alike = other != path and (value.shape, value.dtype) == (right.shape, right.dtype)
        if alike and not np.allclose(value, right):
            return value
    if right.dtype == bool:
        return ~right
    if right.size > 1 and np.ptp(right) > 0:
        return np.roll(right.reshape(-1), 1).reshape(right.shape)
    return right + np.asarray(1, right.dtype)
