"""Both training loops, in Linen and in NNX: same optimizer, same batches; and the mesh of the second."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from orbax_nnx_handler.demo.models import ENCODED, LinenDecoder, NNXDecoder, Size, Training, batch_at, decode

DEVICES = 8
TEMPERATURE = 0.6
"""Of the text that is sampled."""


def use_virtual_devices() -> None:
    """Makes the CPU look like eight devices.

    Raises:
        RuntimeError: JAX has been initialised already.
    """
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    # Two programs in flight share one pool of threads: on few cores each may hold what the other waits for.
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def make_mesh() -> Mesh:
    """Returns a mesh of four by two devices, axes `data` and `model`."""
    return Mesh(np.array(jax.devices()[:DEVICES]).reshape(4, 2), ("data", "model"))


def make_target(size: Size, optimizer: optax.GradientTransformation, mesh: Mesh) -> Training:
    """Returns what the restore must fill: shapes, dtypes and shardings, no values."""
    abstract = nnx.eval_shape(lambda: Training(size, optimizer, nnx.Rngs(1)))
    graphdef, state = nnx.split(abstract)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: _sharded(leaf, mesh), state))


def _sharded(leaf: jax.ShapeDtypeStruct, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Shards a leaf's last two axes over the mesh where it divides them; replicates the rest."""
    axes: list[Any] = [None] * len(leaf.shape)
    if len(leaf.shape) >= 2:
        axes[-2] = "data" if leaf.shape[-2] % mesh.shape["data"] == 0 else None
        axes[-1] = "model" if leaf.shape[-1] % mesh.shape["model"] == 0 else None
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))


def make_optimizer() -> optax.GradientTransformation:
    """Returns AdamW with clipping, under a rate that warms up and decays."""
    rate = optax.warmup_cosine_decay_schedule(0.0, 3e-3, warmup_steps=20, decay_steps=1000)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98))


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the mean loss of a letter, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def start_linen(size: Size, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state of a Linen program before its first step."""
    model = LinenDecoder(size)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, size.time), jnp.int32))["params"]
    return TrainState.create(apply_fn=model.apply, params=params, tx=optimizer)


@jax.jit
def linen_step(state: TrainState, batch: jax.Array) -> tuple[TrainState, jax.Array]:
    """Returns the state after one step, and the loss before it."""

    def loss(params: Any) -> jax.Array:
        return cross_entropy(state.apply_fn({"params": params}, batch[:, :-1]), batch[:, 1:])

    value, gradients = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=gradients), value


def train_linen(state: TrainState, steps: range, size: Size) -> tuple[TrainState, list[float]]:
    """Returns the state after these steps, and the loss of each."""
    losses: list[jax.Array] = []
    for step in steps:
        state, loss = linen_step(state, jnp.asarray(batch_at(step, size=size.batch, time=size.time)))
        losses.append(loss)
    return state, [float(loss) for loss in losses]


@nnx.jit
def nnx_step(training: Training, batch: jax.Array) -> jax.Array:
    """Takes one step in place; returns the loss before it."""
    value, gradients = nnx.value_and_grad(
        lambda model: cross_entropy(model(batch[:, :-1]), batch[:, 1:]),
    )(training.model)
    training.optimizer.update(training.model, gradients)
    return value


def train_nnx(training: Training, steps: range, size: Size, mesh: Mesh) -> list[float]:
    """Takes these steps in place, each batch sharded over the mesh; returns the loss of each."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    batches = (batch_at(step, size=size.batch, time=size.time) for step in steps)
    return [float(nnx_step(training, jax.device_put(batch, sharding))) for batch in batches]


def sample(training: Training, size: Size, letters: int) -> str:
    """Returns how the model continues the end of the text, sampled with its own random stream."""
    ending = jnp.asarray(ENCODED[-size.time :])
    letters_drawn = _sample(training.model, ending, jax.random.split(training.sampling(), letters))
    return " ".join(decode(np.asarray(letters_drawn)).split())


@nnx.jit
def _sample(model: NNXDecoder, window: jax.Array, keys: jax.Array) -> jax.Array:
    def sample_one(window: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = model(window[None])[0, -1]
        letter = jax.random.categorical(key, logits / TEMPERATURE).astype(window.dtype)
        return jnp.append(window[1:], letter), letter

    return jax.lax.scan(sample_one, window, keys)[1]
