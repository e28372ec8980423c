"""Small programs, in Linen and in NNX, whose checkpoints are written in every layout.

A restored state is right if the NNX program goes on as the Linen program does:
the same logits now, and after each of two more training steps, in which every
weight, statistic, moment and count has its part.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from orbax_nnx_handler import restore
from tests.layouts import vision

# The same sums in another order, three times over.
TOLERANCE = 1e-4
STEP = 3


# Compared by identity: arrays have no hash, and a program is built once.
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Program:
    """One model and its training, in Linen and in NNX.

    Attributes:
        linen: The Linen model; takes `inputs` and `train`.
        nnx: Builds the NNX model; called the same way.
        inputs: A batch.
        labels: A class for each example.
        optimizer: The optimizer of both programs.
        renames: The names that nobody can know.
    """

    linen: nn.Module
    nnx: Callable[[nnx.Rngs], nnx.Module]
    inputs: np.ndarray
    labels: np.ndarray
    optimizer: optax.GradientTransformation
    renames: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """A Linen train state: `statistics` is empty for a model without."""

    params: Any
    statistics: Any
    opt_state: Any
    step: int


class LinenPerceptron(nn.Module):
    """Two layers with batch normalisation between them."""

    @nn.compact
    def __call__(self, x: Any, *, train: bool) -> Any:
        # An activation before the norm too: else the bias had no gradient, and its moments no say.
        x = nn.gelu(nn.Dense(8, name="up")(x))
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x)
        return nn.Dense(3, name="down")(nn.gelu(x))


class NnxPerceptron(nnx.Module):
    """The same in NNX."""

    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.down = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x: Any, *, train: bool) -> Any:
        x = self.norm(nnx.gelu(self.up(x)), use_running_average=not train)
        return self.down(nnx.gelu(x))


OPTIMIZERS = {
    "adam": lambda: optax.adam(1e-2, eps=1e-4),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    # The wider kernel is factored, the other one is not.
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=4, momentum=0.9),
}


@functools.cache
def perceptron(optimizer: str) -> Program:
    """The perceptron, names the same on both sides."""
    return Program(
        linen=LinenPerceptron(),
        nnx=NnxPerceptron,
        inputs=np.random.default_rng(0).normal(0.2, 1.0, (12, 4)).astype(np.float32),
        labels=np.arange(12) % 3,
        optimizer=OPTIMIZERS[optimizer](),
    )


@functools.cache
def vision_transformer(optimizer: Callable[[], optax.GradientTransformation]) -> Program:
    """big_vision's ViT with scanned blocks, and an NNX one with a list of them."""
    return Program(
        linen=vision.LinenViT(),
        nnx=vision.NnxViT,
        inputs=np.random.default_rng(0).normal(0.2, 1.0, (6, 4, 4, 3)).astype(np.float32),
        labels=np.arange(6) % 3,
        optimizer=optimizer(),
        renames=vision.RENAMES,
    )


@functools.cache
def trained(program: Program) -> Trained:
    """The Linen train state after three steps from random weights."""
    variables = random_variables(program)
    params, statistics = variables["params"], variables.get("batch_stats", {})
    state = Trained(params=params, statistics=statistics, opt_state=program.optimizer.init(params), step=0)
    for _ in range(STEP):
        _, state = _linen_step(program, state)
    return state


def random_variables(program: Program) -> Any:
    """Returns the Linen model's variables with random values."""
    initialise = functools.partial(program.linen.init, train=False)
    return random_tree(jax.eval_shape(initialise, jax.random.key(0), program.inputs))


def random_tree(shapes: Any) -> Any:
    """Returns a tree of random values, each leaf's drawn from its path."""
    return jax.tree_util.tree_map_with_path(_draw, shapes)


def _draw(keys: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    path = jax.tree_util.keystr(keys, simple=True, separator="/")
    chance = np.random.default_rng(zlib.crc32(path.encode()))
    if path.endswith(("scale", "var")):
        return chance.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype)
    return chance.normal(0.0, 0.5, leaf.shape).astype(leaf.dtype)


@functools.cache
def expected(program: Program) -> list[np.ndarray]:
    """The Linen program's logits now and after each of two more steps."""
    state, logits = trained(program), []
    for _ in range(3):
        before, state = _linen_step(program, state)
        logits.append(before)
    return logits


def build(program: Program) -> tuple[Any, Any]:
    """Builds the NNX model and its optimizer."""
    model = program.nnx(nnx.Rngs(0))
    return model, nnx.Optimizer(model, program.optimizer, wrt=nnx.Param)


def nnx_state(program: Program) -> tuple[Any, Any]:
    """The trained weights and statistics as one tree of NNX names, and the moments of the weights.

    Only for the perceptron, whose names are the same on both sides.
    """
    state = trained(program)
    modules = {**state.params}
    for name, statistics in state.statistics.items():
        modules[name] = {**modules[name], **statistics}
    return modules, state.opt_state


def trained_nnx(program: Program) -> tuple[Any, Any]:
    """The NNX program in the state of the Linen one: what an NNX codebase would save."""
    weights, opt_state = nnx_state(program)
    model, optimizer = build(program)
    nnx.update(model, weights)
    optimizer.step.set_value(jnp.uint32(STEP))
    stored = {
        jax.tree_util.keystr(keys, simple=True): leaf
        for keys, leaf in jax.tree_util.tree_leaves_with_path(opt_state)
    }
    for path, variable in nnx.to_flat_state(nnx.state(optimizer.opt_state)):
        variable.set_value(stored["".join(map(str, path))])
    return model, optimizer


def restored(program: Program, path: Path, **options: Any) -> tuple[Any, Any]:
    """Restores model and optimizer; nothing may be missing or left over."""
    options = {"policy": "error", "unexpected": "error", "renames": program.renames, **options}
    return restore(path, nnx.eval_shape(lambda: build(program)), **options)


def goes_on(program: Program, model: Any, optimizer: Any) -> None:
    """Raises AssertionError unless the NNX program now does what the Linen program does."""
    assert int(optimizer.step.get_value()) == STEP
    for number, logits in enumerate(expected(program)):
        found = _nnx_step(model, optimizer, program.inputs, program.labels)
        np.testing.assert_allclose(
            found, logits, rtol=TOLERANCE, atol=TOLERANCE, err_msg=f"after {number} steps"
        )


def assert_goes_on(program: Program, path: Path, **options: Any) -> None:
    """Restores a checkpoint of `trained(program)` and raises AssertionError unless it goes on."""
    goes_on(program, *restored(program, path, **options))


def _loss(logits: Any, labels: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@functools.cache
def _linen_update(program: Program) -> Callable[..., Any]:
    def logits_of(variables: Any, *, train: bool) -> tuple[Any, Any]:
        return program.linen.apply(variables, program.inputs, train=train, mutable=["batch_stats"])

    @jax.jit
    def update(params: Any, statistics: Any, opt_state: Any) -> tuple[Any, Any, Any, Any]:
        def objective(params: Any) -> tuple[Any, Any]:
            logits, after = logits_of({"params": params, "batch_stats": statistics}, train=True)
            return _loss(logits, program.labels), after.get("batch_stats", {})

        before, _ = logits_of({"params": params, "batch_stats": statistics}, train=False)
        gradients, after = jax.grad(objective, has_aux=True)(params)
        updates, opt_state = program.optimizer.update(gradients, opt_state, params)
        return before, optax.apply_updates(params, updates), after, opt_state

    return update


def _linen_step(program: Program, state: Trained) -> tuple[np.ndarray, Trained]:
    """Returns the logits before a step, and the state after it."""
    logits, params, statistics, opt_state = _linen_update(program)(
        state.params, state.statistics, state.opt_state
    )
    after = Trained(params=params, statistics=statistics, opt_state=opt_state, step=state.step + 1)
    return np.asarray(logits), after


@nnx.jit
def _nnx_step(model: Any, optimizer: Any, inputs: Any, labels: Any) -> Any:
    """Returns the logits before a step, which changes model and optimizer in place."""
    before = model(inputs, train=False)
    gradients = nnx.grad(lambda model: _loss(model(inputs, train=True), labels))(model)
    optimizer.update(model, gradients)
    return before


def as_numpy(tree: Any) -> Any:
    """Returns a tree with its arrays on the host."""
    return jax.tree.map(np.asarray, tree)
