"""What the handler writes, and that a Linen program reads it with stock Orbax, structure check on."""

import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from orbax_nnx_handler.transfer.writing import linen_save

FEATURES = 4


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(3, name="up")(x)
        return nn.Dense(2, name="layers_0")(x)


class NNXEncoder(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(FEATURES, 3, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(3, 2, rngs=rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.layers[0](self.up(x))


def is_matrix(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, tree)


def by_rank(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: "matrix" if leaf.ndim > 1 else "vector", tree)


OPTIMIZERS: dict[str, optax.GradientTransformation] = {
    "adam": optax.adam(1e-2),
    "adamw": optax.adamw(1e-2),
    "adamw with a schedule": optax.adamw(optax.constant_schedule(1e-2)),
    "adamw with masked decay": optax.adamw(1e-2, mask=is_matrix),
    "sgd": optax.sgd(1e-2),
    "sgd with momentum": optax.sgd(1e-2, momentum=0.9),
    "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=2),
    "lion": optax.lion(1e-2),
    "clip then adamw": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)),
    "adamw then clip": optax.chain(optax.adamw(1e-2), optax.clip(1.0)),
    "MultiSteps": optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
    "inject_hyperparams": optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2),
    "masked": optax.masked(optax.adam(1e-2), is_matrix),
    "multi_transform": optax.multi_transform({"matrix": optax.adam(1e-2), "vector": optax.sgd(1e-2)}, by_rank),
    "unchained": optax.scale_by_adam(),
    "ema of weights": optax.chain(optax.ema(0.9), optax.scale(-1e-2)),
    "apply_if_finite": optax.apply_if_finite(optax.adam(1e-2), 3),
    "lookahead-free nesting": optax.chain(optax.chain(optax.chain(optax.trace(0.9)))),
}


def trained(tx: optax.GradientTransformation) -> tuple[NNXEncoder, nnx.Optimizer]:
    model = NNXEncoder(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    x = jnp.arange(2 * FEATURES, dtype=jnp.float32).reshape(2, FEATURES)
    for _ in range(2):
        grads = nnx.grad(lambda model: jnp.mean(model(x) ** 2))(model)
        optimizer.update(model, grads)
    return model, optimizer


def linen_state(tx: optax.GradientTransformation) -> TrainState:
    encoder = Encoder()
    params = encoder.init(jax.random.key(0), jnp.ones((1, FEATURES)))["params"]
    return TrainState.create(apply_fn=encoder.apply, params=params, tx=tx).replace(step=jnp.int32(0))


def write(path: Path, item: Any, **options: Any) -> Path:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(path, args=linen_save(ocp.args.PyTreeSave(item), **options))
    return path


def described(path: Path) -> dict[tuple[tuple[str, int], ...], tuple[str, Any]]:
    """Returns Orbax's own record of a tree: each path with its kinds of keys, value type and shape."""
    content = json.loads((path / "_METADATA").read_text())
    return {
        tuple((key["key"], key["key_type"]) for key in entry["key_metadata"]): (
            entry["value_metadata"]["value_type"],
            entry["value_metadata"].get("write_shape"),
        )
        for entry in content["tree_metadata"].values()
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_linen_program_restores_any_optimizer_with_the_structure_check_on(name: str, tmp_path: Path) -> None:
    tx = OPTIMIZERS[name]
    item = trained(tx)
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, linen_state(tx))

    write(tmp_path / "item", item)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "item", abstract)

    assert jax.tree.structure(restored) == jax.tree.structure(abstract)
    np.testing.assert_array_equal(restored.params["layers_0"]["kernel"], item[0].layers[0].kernel[...])
    assert (restored.step.dtype, int(restored.step)) == (jnp.int32, 2)
    ours = [np.asarray(leaf) for leaf in jax.tree.leaves(item[1].opt_state)]
    theirs = [np.asarray(leaf) for leaf in jax.tree.leaves(restored.opt_state)]
    assert len(ours) == len(theirs)
    for leaf in ours:
        # Linen sorts `layers_0` before `up`, NNX `layers` likewise, so the orders agree where names do.
        assert any(leaf.shape == other.shape and np.array_equal(leaf, other) for other in theirs)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_stored_tree_is_the_one_that_stock_orbax_writes_for_linen(name: str, tmp_path: Path) -> None:
    tx = OPTIMIZERS[name]
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "linen", linen_state(tx))

    write(tmp_path / "nnx", trained(tx))

    assert described(tmp_path / "nnx") == described(tmp_path / "linen")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_bare_state_with_its_transformation_is_written_as_the_module_is(name: str, tmp_path: Path) -> None:
    tx = OPTIMIZERS[name]
    item = trained(tx)
    write(tmp_path / "module", item)

    write(tmp_path / "state", nnx.state(item), tx=tx)

    assert described(tmp_path / "state") == described(tmp_path / "module")
