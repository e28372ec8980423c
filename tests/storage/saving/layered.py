"""A model of layers, in a list or scanned, with statistics and streams; its values, layer by layer."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

LAYERS = 3


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.dense = nnx.Linear(5, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)


class Model(nnx.Module):
    def __init__(self, form: str, seed: int = 0, layers: int = LAYERS):
        rngs = nnx.Rngs(seed, dropout=seed + 1)
        if form == "list":
            self.layers: Any = nnx.List([Block(rngs) for _ in range(layers)])
        else:
            make = nnx.split_rngs(splits=layers)(nnx.vmap(Block))
            self.layers = make(rngs)


def numbered(item: Any) -> Any:
    """Returns the item with another number in each element, the keys left as they are."""
    graph, state = nnx.split(item)
    flat, tree = jax.tree.flatten(state)
    start = 3
    for at, leaf in enumerate(flat):
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            values = np.arange(start, start + leaf.size).reshape(leaf.shape)
            flat[at] = jnp.asarray(values.astype(leaf.dtype))
            start += leaf.size
    return nnx.merge(graph, jax.tree.unflatten(tree, flat))


def stacked(state: Any) -> dict[str, np.ndarray]:
    """Returns all leaves of the layers, stacked, by path below a layer."""
    layers = state["layers"]
    if 0 in layers:
        parts = [jax.tree.map(_on_host, layers[at]) for at in range(LAYERS)]
        layers = jax.tree.map(lambda *parts: np.stack(parts), *parts)
    return {
        jax.tree_util.keystr(path): _on_host(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(layers)[0]
    }


def _on_host(leaf: Any) -> np.ndarray:
    is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def assert_alike(left: Any, right: Any) -> None:
    here, there = stacked(left), stacked(right)
    assert here.keys() == there.keys()
    for path, value in here.items():
        np.testing.assert_array_equal(value, there[path], err_msg=path)
