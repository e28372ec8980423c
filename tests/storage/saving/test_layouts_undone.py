"""What a checkpoint did not hold is saved where the plan's layout reads it, whatever layout that is."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from orbax_nnx_handler import RuleError, from_linen, plan_restore, to_linen
from orbax_nnx_handler.planning.core.recipes import reads
from tests.sampled import checkered
from tests.storage.saving.trees import leaves, numbered

ADAM = optax.adam(0.1)


class Net(nnx.Module):
    def __init__(self) -> None:
        self.lin = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        self.bn = nnx.BatchNorm(3, rngs=nnx.Rngs(0))


def training() -> dict[str, Any]:
    model = Net()
    return {"model": model, "optimizer": nnx.Optimizer(model, ADAM, wrt=nnx.Param), "epoch": jnp.int32(0)}


def states_of(item: Any) -> dict[str, Any]:
    return {key: part if key == "epoch" else nnx.state(part) for key, part in item.items()}


@functools.cache
def without_values() -> dict[str, Any]:
    return nnx.eval_shape(training)


@functools.cache
def _filled() -> dict[str, Any]:
    made = training()
    states = states_of(made)
    filled = jax.tree.map(jnp.asarray, numbered(states, 1000))
    nnx.update(made["model"], filled["model"])
    nnx.update(made["optimizer"], filled["optimizer"])
    return made | {"epoch": filled["epoch"]}


def with_values() -> dict[str, Any]:
    """Returns a training of its own whose elements are all different."""
    return nnx.clone(_filled())


def vector() -> Any:
    return np.zeros(3, "float32")


PARAMS = {
    "lin": {"kernel": np.zeros((2, 3), "float32"), "bias": vector()},
    "bn": {"scale": vector(), "bias": vector()},
}
STATS = {"bn": {"mean": vector(), "var": vector()}}
TOGETHER = {"lin": PARAMS["lin"], "bn": {**PARAMS["bn"], **STATS["bn"]}}
STEP = np.int32(0)


def optimizer(params: Any = PARAMS) -> Any:
    return list(ADAM.init(params))


def boxed(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: {"value": leaf}, tree)


def slots() -> Any:
    return jax.tree.map(lambda leaf: {"grad_ema": leaf, "grad_sq_ema": leaf}, PARAMS)


def train_state() -> dict[str, Any]:
    return {"params": PARAMS, "batch_stats": STATS, "opt_state": optimizer(), "step": STEP}


def t5x(moments: Any) -> dict[str, Any]:
    state = {"step": STEP, "param_states": moments}
    return {"target": PARAMS, "flax_mutables": {"batch_stats": STATS}, "state": state}


TREES: dict[str, Any] = {
    "TrainState": train_state(),
    "TrainState below a key": {"state": train_state(), "config": np.int32(3)},
    "variables": {"params": PARAMS, "batch_stats": STATS},
    "collections in a field": {
        "params": PARAMS,
        "model_state": {"batch_stats": STATS},
        "opt_state": optimizer(),
        "step": STEP,
    },
    "by network": {
        "net_params": PARAMS,
        "net_batch_stats": STATS,
        "net_opt_state": optimizer(),
        "net_step": STEP,
    },
    "MaxText": {
        "params": {"params": PARAMS},
        "nnx_aux": {"model": STATS},
        "opt_state": optimizer({"params": PARAMS}),
        "step": STEP,
    },
    "T5X": t5x(slots()),
    "T5X, optax": t5x(optimizer()),
    "Scenic": {
        "params": PARAMS,
        "model_state": {"batch_stats": STATS},
        "opt_state": optimizer(),
        "global_step": STEP,
    },
    "Kauldron": {
        "params": PARAMS,
        "collections": {"batch_stats": STATS},
        "opt_state": optimizer(),
        "step": STEP,
    },
    "openpi": {
        "params": {"params": boxed(TOGETHER)},
        "train_state": {"step": STEP, "opt_state": boxed(optimizer())},
    },
    "openpi weights": {"params": boxed(TOGETHER)},
    "openpi train state": {"params": boxed(TOGETHER), "opt_state": optimizer(), "step": STEP},
    "Tunix": {
        "model_params": boxed(TOGETHER),
        "optimizer_state": {"step": boxed(STEP), "opt_state": boxed(optimizer())},
    },
    "nnx.State": {
        "model": boxed(TOGETHER),
        "optimizer": {"step": boxed(STEP), "opt_state": boxed(optimizer())},
    },
    "pure dict": {"model": TOGETHER, "optimizer": {"step": STEP, "opt_state": optimizer()}},
    "pure dict, optimizer beside modules": {**TOGETHER, "opt_state": optimizer(), "step": STEP},
    "bare params": TOGETHER,
    "big_vision": {"params": PARAMS, "opt": [[STEP, PARAMS, PARAMS], [STEP]]},
    "Gemma": {f"transformer/{name}": module for name, module in TOGETHER.items()},
}
STATES = {"opt_state", "net_opt_state", "param_states", "opt"}
STEPS = {"step", "net_step", "global_step"}
ABSENT: dict[str, Callable[[Any], bool]] = {
    "a field of its own": lambda path: path == ("epoch",),
    "step": lambda path: path[-1] in STEPS,
    "parameter": lambda path: path[-2:] == ("lin", "bias"),
    "module": lambda path: "bn" in path[-1:] or path[-1:] == ("transformer/bn",),
    "statistics": lambda path: path[-1] in ("mean", "var"),
    "optimizer": lambda path: path[-1] in STATES,
    "optimizer and step": lambda path: path[-1] in STATES | STEPS,
    "moment": lambda path: path[-1] in ("mu", "grad_ema"),
}
REFUSED = {
    # The one count of T5X's own optimizers is the step; optax's would lie beside it, and has not been stored.
    *{("T5X", "optimizer"), ("T5X", "moment"), ("T5X, optax", "optimizer")},
    # big_vision has no step beside its optimizer, Gemma no optimizer.
    *{("big_vision", absent) for absent in ABSENT if "optimizer" not in absent},
    *{("Gemma", absent) for absent in ABSENT},
}


def without(tree: Any, is_absent: Callable[[Any], bool], above: tuple[Any, ...] = ()) -> Any:
    if isinstance(tree, list):
        return [without(part, is_absent, (*above, at)) for at, part in enumerate(tree)]
    fields = tree._asdict() if hasattr(tree, "_asdict") else tree
    if not isinstance(fields, dict):
        return tree
    left = {
        key: without(part, is_absent, (*above, key))
        for key, part in fields.items()
        if not is_absent((*above, key))
    }
    return {key: part for key, part in left.items() if not isinstance(part, dict) or part}


@pytest.mark.parametrize(("layout", "absent"), checkered(TREES, ABSENT))
def test_what_a_checkpoint_did_not_hold_is_found_again_in_its_layout(layout: str, absent: str) -> None:
    stored = numbered(without(TREES[layout], ABSENT[absent]))
    state = from_linen(stored, with_values(), policy="init")
    plan = plan_restore(stored, without_values(), policy="warn")
    if (layout, absent) in REFUSED:
        with pytest.raises(RuleError, match="no place for all that is saved"):
            to_linen(state, renames=plan)
        return

    tree = to_linen(state, renames=plan)

    back = from_linen(tree, without_values())  # Nothing may be missing.
    before, after = states_of(state), states_of(back)
    for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(one, other)
    again, held = leaves(tree), leaves(stored)
    for path in (tuple(map(str, path)) for item in plan.restored.values() for path in reads(item.recipe)):
        np.testing.assert_array_equal(again[path], held[path])
