"""Small checkpoints in which every element is its own number, targets for them, and what must come back."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx

from orbax_nnx_handler import RestoreError, restore
from tests.written import write_once

Tree = dict[Any, Any]
Flat = dict[tuple[Any, ...], np.ndarray]
Zeros = Callable[[tuple[int, ...], Any], Any]
"""JAX's or NumPy's: where only shapes are asked for, NumPy's need not be traced."""

STATISTICS = ("mean", "var")


class Numbers:
    """Gives arrays whose elements occur nowhere else."""

    def __init__(self, start: int = 1):
        self._next = start

    def __call__(self, *shape: int, dtype: Any = np.float32) -> np.ndarray:
        size = int(np.prod(shape))
        start, self._next = self._next, self._next + size
        return np.arange(start, start + size).reshape(shape).astype(dtype)

    def dense(self, rows: int = 3, columns: int = 4) -> Tree:
        return {"kernel": self(rows, columns), "bias": self(columns)}

    def like(self, tree: Any) -> Any:
        """Returns a tree of the same shapes and dtypes with numbers of its own."""
        if isinstance(tree, dict) and tree and all(isinstance(key, tuple) for key in tree):
            return {path: self._like(leaf) for path, leaf in tree.items()}
        return jax.tree.map(self._like, tree)

    def _like(self, leaf: Any) -> Any:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(self(2, dtype=np.uint32))
        return self(*leaf.shape, dtype=leaf.dtype)

    def optimizer(self, tx: optax.GradientTransformation, params: Tree) -> Any:
        """Returns an optax state of these parameters in which every count and moment is its own number."""
        return self.like(jax.eval_shape(tx.init, params))


class Branch(nnx.Module):
    """A module made from nested dicts: lists where the keys are ints, statistics by their names."""

    def __init__(self, tree: Tree, kinds: Mapping[str, type[Any]], zeros: Zeros = jnp.zeros):
        for key, part in tree.items():
            setattr(self, key, _module(part, key, kinds, zeros))


def _module(part: Any, key: Any, kinds: Mapping[str, type[Any]], zeros: Zeros) -> Any:
    if not isinstance(part, dict):
        kind = nnx.BatchStat if key in STATISTICS else nnx.Param
        return kinds.get(key, kind)(zeros(part.shape, part.dtype))
    if part and all(isinstance(name, int) for name in part):
        return nnx.List([_module(part[at], at, kinds, zeros) for at in sorted(part)])
    return Branch(part, kinds, zeros)


class Training(nnx.Module):
    """The usual train state of an NNX program."""

    def __init__(
        self,
        tree: Tree,
        tx: optax.GradientTransformation,
        kinds: Mapping[str, type[Any]],
        zeros: Zeros = jnp.zeros,
    ):
        self.model = Branch(tree, kinds, zeros)
        self.optimizer = nnx.Optimizer(self.model, tx, wrt=nnx.Param)


def model_target(tree: Tree, kinds: Mapping[str, type[Any]] | None = None) -> Any:
    return nnx.eval_shape(lambda: Branch(tree, kinds or {}, np.zeros))


def training_target(
    tree: Tree, tx: optax.GradientTransformation, kinds: Mapping[str, type[Any]] | None = None
) -> Any:
    return nnx.eval_shape(lambda: Training(tree, tx, kinds or {}, np.zeros))


def pure_target(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


FORMS = ("module", "state", "pure")


def target_of(form: str, tree: Tree) -> Any:
    """Returns a target for a model in one of the forms that a caller may have."""
    if form == "pure":
        return pure_target(tree)
    model = model_target(tree)
    return nnx.state(model) if form == "state" else model


def write(directory: Any, tree: Any) -> Any:
    """Saves a tree with stock Orbax and returns its place."""
    path = next(
        directory / f"item_{at}" for at in itertools.count() if not (directory / f"item_{at}").exists()
    )

    def save(path: Any) -> None:
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(path, tree)

    return write_once(path, tree, save)


def flat(tree: Any) -> Flat:
    """Returns the leaves of a tree by path: of modules, states, optax states and nested dicts."""
    if isinstance(tree, dict) and tree and all(isinstance(key, tuple) for key in tree):
        return tree
    if isinstance(tree, nnx.Module | nnx.Optimizer):
        tree = nnx.state(tree)
    if isinstance(tree, nnx.State):
        pairs = nnx.to_flat_state(tree)
        return {
            tuple(path): np.asarray(_bits(leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf))
            for path, leaf in pairs
        }
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {tuple(map(key, path)): _array(leaf) for path, leaf in found}


def _array(leaf: Any) -> Any:
    return leaf if isinstance(leaf, jax.ShapeDtypeStruct) else np.asarray(_bits(leaf))


def _bits(value: Any) -> Any:
    return jax.random.key_data(value) if jnp.issubdtype(value.dtype, jax.dtypes.prng_key) else value


def key(key: Any) -> Any:
    return next(getattr(key, name) for name in ("key", "name", "idx") if hasattr(key, name))


def put(node: Any, values: Flat) -> None:
    """Gives the Variables of a module or state the values that stand under their paths."""
    pairs = nnx.to_flat_state(nnx.state(node) if isinstance(node, nnx.Module) else node)
    for path, leaf in pairs:
        leaf.set_value(jnp.asarray(values[tuple(path)]))
    if isinstance(node, nnx.Module):
        nnx.update(node, nnx.from_flat_state(list(pairs)))


def below(prefix: str, tree: Any) -> Flat:
    """Returns the leaves of a tree, their paths below a prefix such as `optimizer/opt_state`."""
    return {(*prefix.split("/"), *path): leaf for path, leaf in flat(tree).items()}


def check(result: Any, expected: Any) -> None:
    """Compares a result with every value that must come back."""
    have = flat(result)
    want = flat(expected)
    wrong = [path for path in want if path not in have or not np.array_equal(have[path], want[path])]
    shown = [f"{path}: have {have.get(path)}, want {want[path]}" for path in wrong[:4]]
    assert not wrong, "\n".join(shown)


def refused(path: Any, target: Any, **options: Any) -> RestoreError:
    """Returns the error of a restore that must not be done."""
    try:
        result = restore(path, target, **options)
    except RestoreError as error:
        return error
    shown = [f"  {'/'.join(map(str, path))} = {value.ravel()[:3]}" for path, value in flat(result).items()]
    raise AssertionError("\n".join(["restored without a question:", *shown[:6]]))


def right_or_refused(path: Any, target: Any, expected: Any, **options: Any) -> None:
    """Where a question and the right value are both right, but nothing else is."""
    try:
        result = restore(path, target, **options)
    except RestoreError:
        return
    check(result, expected)


def linen_numbers(tree: Any) -> Any:
    """Returns nested dicts with the numbers of lists in the names: `layers/0` as `layers_0`."""
    if not isinstance(tree, dict):
        return tree
    found: Tree = {}
    for key, part in tree.items():
        if isinstance(part, dict) and part and all(isinstance(name, int) for name in part):
            found |= {f"{key}_{at}": linen_numbers(layer) for at, layer in part.items()}
        else:
            found[key] = linen_numbers(part)
    return found


def stacked(layers: list[Any], axis: int = 0) -> Any:
    """Returns layers as one scanned layer."""
    return jax.tree.map(lambda *leaves: np.stack(leaves, axis), *layers)
