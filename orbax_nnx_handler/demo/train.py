"""The two training loops: the same optimizer, the same batches, two libraries."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from orbax_nnx_handler.demo.linen_model import Decoder
from orbax_nnx_handler.demo.nnx_model import Training
from orbax_nnx_handler.demo.size import Size
from orbax_nnx_handler.demo.text import batch_at


def make_optimizer() -> optax.GradientTransformation:
    """Returns AdamW with clipping, under a rate that warms up and decays."""
    rate = optax.warmup_cosine_decay_schedule(0.0, 3e-3, warmup_steps=20, decay_steps=1000)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98))


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the mean loss of a letter, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def start_linen(size: Size, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state of a Linen program before its first step."""
    model = Decoder(size)
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
    """Takes these steps in place, each batch spread over the mesh; returns the loss of each."""
    spread = NamedSharding(mesh, PartitionSpec("data"))
    batches = (batch_at(step, size=size.batch, time=size.time) for step in steps)
    return [float(nnx_step(training, jax.device_put(batch, spread))) for batch in batches]
