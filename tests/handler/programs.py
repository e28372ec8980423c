"""One small Linen program and the NNX program of the same model."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import linen as nn
from flax import nnx
from flax.training import train_state

FEATURES, HIDDEN, CLASSES = 8, 16, 4


class LinenNet(nn.Module):
    """Dense, BatchNorm, Dropout, Dense."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        x = nn.Dense(HIDDEN, name="up")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = nn.relu(nn.Dropout(0.5, deterministic=not train)(x))
        return nn.Dense(CLASSES, name="down")(x)


class Net(nnx.Module):
    """The same model in NNX, with random state that no Linen checkpoint holds."""

    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(FEATURES, HIDDEN, rngs=rngs)
        self.norm = nnx.BatchNorm(HIDDEN, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.relu(self.drop(self.norm(self.up(x)))))


class State(train_state.TrainState):
    """A TrainState with statistics, as Flax's guides write it."""

    batch_stats: Any


def make_net() -> Net:
    """Builds the NNX model."""
    return Net(nnx.Rngs(1))


def abstract_net() -> Net:
    """Builds the NNX model without allocating anything."""
    return nnx.eval_shape(make_net)


def randomised(tree: Any, seed: int = 0) -> Any:
    """Returns the tree with every float leaf random, so that no two leaves are alike."""
    rng = np.random.default_rng(seed)

    def leaf(value: Any) -> Any:
        value = np.asarray(value)
        if not jnp.issubdtype(value.dtype, jnp.floating):
            return value
        return jnp.asarray(np.abs(rng.normal(size=value.shape)) + 0.1, value.dtype)

    return jax.tree.map(leaf, tree)


def linen_state(tx: optax.GradientTransformation | None = None, seed: int = 0) -> State:
    """Returns a Linen train state with random weights, statistics and moments, at step 7."""
    variables = LinenNet().init(jax.random.key(0), jnp.zeros((1, FEATURES)))
    state = State.create(
        apply_fn=LinenNet().apply,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        tx=tx or optax.adamw(1e-2),
    )
    params, stats, opt_state = randomised((state.params, state.batch_stats, state.opt_state), seed)
    return state.replace(step=7, params=params, batch_stats=stats, opt_state=opt_state)


def save_stock(path: pathlib.Path, tree: Any) -> pathlib.Path:
    """Saves a tree with stock Orbax, as a Linen program does; returns the item directory."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
    return path


def train_target(tx: optax.GradientTransformation) -> tuple[Net, nnx.Optimizer[Net]]:
    """Returns the abstract model and optimizer of the NNX program."""

    def make() -> tuple[Net, nnx.Optimizer[Net]]:
        net = make_net()
        return net, nnx.Optimizer(net, tx, wrt=nnx.Param)

    return nnx.eval_shape(make)


def logits(net: Net, x: jax.Array) -> np.ndarray[Any, Any]:
    """Runs the NNX model in evaluation mode."""
    net.eval()
    return np.asarray(net(x))


def linen_logits(state: State, x: jax.Array) -> np.ndarray[Any, Any]:
    """Runs the Linen model in evaluation mode."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return np.asarray(LinenNet().apply(variables, x))
