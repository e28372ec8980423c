"""What a pair of whole models is, and one training step of each side, seen from outside."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.training.train_state import TrainState

from orbax_nnx_handler import restore
from tests.zoo.pairs import Outcome, Renames, is_concrete, path_of, randomised

Flat = dict[str, Any]
"""Leaves by path, the keys joined by slashes."""

TrainingModel = tuple[nnx.Module, nnx.Optimizer[Any]]
"""A model and its optimizer."""

Determined = Literal["shapes", "shapes and order", "outputs", "nothing"]


class StatisticsState(TrainState):
    """A train state with the one further collection that most programs keep."""

    batch_stats: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelPair:
    """A Linen and an NNX program for one model.

    Attributes:
        name: What tests and docs call it.
        linen: The Linen model; called with `inputs`, and `train` where it has statistics.
        nnx: Builds the NNX model; called the same way.
        inputs: A batch.
        labels: A class for each output vector.
        optimizer: The optimizer of both programs.
        optimizer_name: What the docs call it.
        renames: The names that nobody can know, as the user must give them.
        as_nnx: Converts a flat Linen tree to NNX paths; written by hand for the
            model, and no code of the library's.
        has_statistics: Whether training changes batch statistics.
        determined: For automatic names: what tells which Linen module is which
            attribute, where the NNX program creates its attributes in the order
            in which the Linen program calls its modules (`shapes and order`). A gate and what it
            gates stand beside each other, which only outputs tell apart.
        rearranged: Whether layers are stacked on one side and apart on the other.
        without_variable: Stored parameters with no variable in NNX.
    """

    name: str
    linen: nn.Module
    nnx: Callable[[nnx.Rngs], nnx.Module]
    inputs: tuple[np.ndarray, ...]
    labels: np.ndarray
    optimizer: optax.GradientTransformation
    optimizer_name: str
    as_nnx: Callable[[Flat], Flat]
    renames: Renames = ()
    has_statistics: bool = False
    determined: Determined | None = None
    rearranged: bool = False
    without_variable: tuple[str, ...] = ()

    @property
    def saves_back(self) -> bool:
        """Whether NNX keeps Linen's names and layers, so that a Linen program can go on."""
        return not self.renames and not self.rearranged

    def __str__(self) -> str:
        return self.name.replace(" ", "_")


def loss_of(logits: Any, labels: Any) -> Any:
    """Returns the mean cross entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def flat(tree: Any) -> Flat:
    """Returns a nested tree's leaves by path."""
    return {path_of(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def flat_nnx(state: Any) -> Flat:
    """Returns the values of an NNX state by path."""
    return {"/".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def _mode(has_statistics: bool, *, train: bool) -> dict[str, bool]:
    return {"train": train} if has_statistics else {}


def initial_state(pair: ModelPair) -> TrainState:
    """Returns the Linen train state with random weights and statistics."""
    initialise = functools.partial(pair.linen.init, **_mode(pair.has_statistics, train=False))
    shapes = jax.eval_shape(initialise, jax.random.key(0), *pair.inputs)
    variables = randomised(shapes, zeros=[f"params/{path}" for path in pair.without_variable])
    fields = {"apply_fn": pair.linen.apply, "params": variables["params"], "tx": pair.optimizer}
    if "batch_stats" in variables:
        return StatisticsState.create(**fields, batch_stats=variables["batch_stats"])
    return TrainState.create(**fields)


def trained_state(pair: ModelPair) -> TrainState:
    """Returns the state after three Linen steps: no moment is zero, and no gradient accumulated over two."""
    state = initial_state(pair)
    for _ in range(3):
        state, _ = linen_step(pair, state)
    return state


# Each step runs a few dozen times on tiny arrays: compiling it well would take longer than running it.
HASTY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@functools.partial(jax.jit, static_argnames=("linen", "without_variable"), compiler_options=HASTY)
def _linen_step(
    state: TrainState, inputs: Any, labels: Any, *, linen: nn.Module, without_variable: tuple[str, ...]
) -> tuple[TrainState, Flat]:
    has_statistics = isinstance(state, StatisticsState)
    statistics = {"batch_stats": state.batch_stats} if has_statistics else {}

    def objective(params: Any) -> Any:
        variables, mode = {"params": params, **statistics}, _mode(has_statistics, train=True)
        logits, updates = linen.apply(variables, *inputs, **mode, mutable=[*statistics])
        return loss_of(logits, labels), (logits, updates)

    gradients, (logits, updates) = jax.grad(objective, has_aux=True)(state.params)
    variables = {"params": state.params, **statistics}
    # Without statistics there is one mode only.
    evaluated = linen.apply(variables, *inputs, train=False) if has_statistics else logits
    after = state.apply_gradients(grads=_without(gradients, without_variable), **updates)
    return after, {"logits": evaluated, "training logits": logits, "gradient": gradients}


def linen_step(pair: ModelPair, state: TrainState) -> tuple[TrainState, Flat]:
    """Makes one training step and returns the new state and all that it shows, by NNX path."""
    after, shown = _linen_step(
        state, pair.inputs, pair.labels, linen=pair.linen, without_variable=pair.without_variable
    )
    statistics = after.batch_stats if isinstance(after, StatisticsState) else {}
    # What follows for some thousand steps is quicker with NumPy's arrays.
    shown, params, statistics, step = jax.tree.map(np.asarray, (shown, after.params, statistics, after.step))
    named = _labelled("gradient", pair, shown.pop("gradient")) | _labelled("updated", pair, params)
    return after, shown | named | _labelled("updated", pair, statistics) | {"step": step}


def _without(gradients: Any, without_variable: Sequence[str]) -> Any:
    """A value that NNX has no variable for must stay zero for the programs to agree."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: jnp.zeros_like(leaf) if path_of(keys) in without_variable else leaf, gradients
    )


def _labelled(label: str, pair: ModelPair, tree: Any) -> Flat:
    leaves = {path: leaf for path, leaf in flat(tree).items() if path not in pair.without_variable}
    return {f"{label} {path}": leaf for path, leaf in pair.as_nnx(leaves).items()}


def build(pair: ModelPair) -> TrainingModel:
    """Builds the NNX train state: the model and its optimizer."""
    model = pair.nnx(nnx.Rngs(0))
    return model, nnx.Optimizer(model, pair.optimizer, wrt=nnx.Param)


def abstract_state(pair: ModelPair) -> TrainingModel:
    """Returns the NNX train state without values, to restore into."""
    return nnx.eval_shape(lambda: build(pair))


def restored_state(pair: ModelPair, path: Path, target: TrainingModel) -> TrainingModel:
    """Restores the Linen train state into the NNX one."""
    model, optimizer = restore(path, target, renames=pair.renames, policy="error", unexpected="error")
    for part in (model, optimizer):
        assert all(is_concrete(leaf) for _, leaf in nnx.to_flat_state(nnx.state(part)))
    return model, optimizer


# One function for all models: pairs with the same NNX program share its compilation.
@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=HASTY)
def _nnx_step(graphdef: Any, has_statistics: bool, state: Any, inputs: Any, labels: Any) -> tuple[Any, Flat]:
    model, optimizer = nnx.merge(graphdef, state)

    def objective(model: Any) -> tuple[Any, Any]:
        logits = model(*inputs, **_mode(has_statistics, train=True))
        return loss_of(logits, labels), logits

    evaluated = model(*inputs, train=False) if has_statistics else None
    gradients, logits = nnx.grad(objective, has_aux=True)(model)
    optimizer.update(model, gradients)
    return nnx.state((model, optimizer)), {
        "logits": logits if evaluated is None else evaluated,
        "training logits": logits,
        "gradient": nnx.state(gradients),
    }


def nnx_step(pair: ModelPair, model: Any, optimizer: nnx.Optimizer[Any]) -> Outcome:
    """Makes one training step in place and returns all that it shows."""
    graphdef, before = nnx.split((model, optimizer))
    after, shown = _nnx_step(graphdef, pair.has_statistics, before, pair.inputs, pair.labels)
    nnx.update((model, optimizer), after)
    updated = nnx.state(model, (nnx.Param, nnx.BatchStat))
    named = {f"gradient {path}": leaf for path, leaf in flat_nnx(shown.pop("gradient")).items()}
    named |= {f"updated {path}": leaf for path, leaf in flat_nnx(updated).items()}
    return jax.device_get(shown | named | {"step": optimizer.step.get_value()})


def float_leaves(state: TrainState, without_variable: Sequence[str]) -> Mapping[str, np.ndarray]:
    """Returns the state's weights, statistics and moments that the next step depends on."""
    return {
        path: np.asarray(leaf)
        for path, leaf in flat(state).items()
        if np.issubdtype(np.asarray(leaf).dtype, np.floating)
        and not path.endswith(tuple(without_variable) or ("\0",))
        and not _is_placeholder(path, leaf)
    }


def _is_placeholder(path: str, leaf: Any) -> bool:
    """Adafactor keeps either factors or a whole second moment, and a single zero for the other."""
    return path.startswith("opt_state/") and np.shape(leaf) == (1,)
