"""Items of the kinds that Orbax's documentation names, each new on every call."""

import collections
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from flax.training.train_state import TrainState

Pair = collections.namedtuple("Pair", ["left", "right"])


@flax.struct.dataclass
class Box:
    """A node of a type that JAX learns from Flax."""

    weight: Any
    bias: Any = None


def params(value: float = 1.0) -> dict[str, Any]:
    """Returns the weights of one dense layer."""
    return {"dense": {"kernel": jnp.full((4, 2), value), "bias": jnp.arange(2.0) + value}}


def train_state(value: float = 1.0) -> TrainState:
    """Returns the state of a Linen program."""
    return TrainState.create(apply_fn=None, params=params(value), tx=optax.adamw(1e-3))


def sharded() -> dict[str, Any]:
    """Returns arrays that lie on several devices, one of them in copies."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(-1), ("x",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    values = np.arange(8 * len(jax.devices()), dtype=np.float32).reshape(len(jax.devices()), 8)
    return {
        "rows": jax.make_array_from_callback(values.shape, rows, lambda index: values[index]),
        "everywhere": jax.make_array_from_callback(values.shape, everywhere, lambda index: values[index]),
    }


ITEMS: dict[str, Any] = {
    "params": params,
    "train_state": train_state,
    "python_numbers": lambda: {"epoch": 3, "rate": 0.1, "big": 2**40},
    "strings": lambda: {"name": "run", "w": jnp.ones(2)},
    "numpy": lambda: {"a": np.arange(3), "b": np.arange(3) / 3, "c": np.array([True]), "d": np.int8([1])},
    "numpy_scalars": lambda: {"a": np.float64(0.1), "b": np.int32(4)},
    "narrow_floats": lambda: {"a": jnp.ones(3, jnp.bfloat16), "b": np.ones(2, ml_dtypes.float8_e4m3fn)},
    "empty_nodes": lambda: {"a": {}, "b": [], "c": None, "d": (), "w": jnp.ones(2)},
    "no_leaves": lambda: {"a": {}},
    "one_array": lambda: jnp.arange(4.0),
    "one_numpy_array": lambda: np.arange(4.0),
    "one_number": lambda: 7,
    "list": lambda: [jnp.ones(2), [jnp.zeros(1), 3]],
    "tuple": lambda: (jnp.ones(2), (jnp.zeros(1),)),
    "named_tuple": lambda: {"p": Pair(jnp.ones(2), {"x": np.ones(1)})},
    "dataclass": lambda: Box(weight=jnp.ones(2)),
    "odd_keys": lambda: {"a/b": jnp.ones(1), "3": jnp.ones(2), "": {"x": jnp.ones(3)}},
    "random_keys": lambda: {"k": jax.random.key(1), "many": jax.random.split(jax.random.key(2), 3)},
    "optimizer_state": lambda: optax.adam(1e-3).init(params()),
    "zero_size": lambda: {"w": jnp.zeros((0, 3)), "s": jnp.float32(2)},
    "sharded": sharded,
}
