"""What a restore says of narrowed values, of copies beside the model and of a model's own constants."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from orbax_nnx_handler import MissingParamError, NNXLinenHandler, NNXLinenRestore, restore


def write(path: Path, tree: Any) -> Path:
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
    return path


def warning(path: Path, target: Any) -> str:
    handler = NNXLinenHandler()
    handler.restore(path, args=NNXLinenRestore(target))
    assert handler.report is not None
    return handler.report.warning


def abstract(tree: Any, dtype: Any = jnp.float32) -> Any:
    return nnx.State(
        jax.tree.map(lambda value: nnx.Param(jax.ShapeDtypeStruct(np.shape(value), dtype)), tree)
    )


MODEL = {"up": {"kernel": np.ones((2, 3), np.float32), "bias": np.ones(3, np.float32)}}


def test_a_copy_of_the_model_is_named_as_one(tmp_path: Path) -> None:
    extra = {"ema_params": MODEL, "masks": {"up": {"kernel": MODEL["up"]["kernel"]}}}
    path = write(tmp_path / "c", {"params": MODEL, **extra})

    assert warning(path, abstract(MODEL)).endswith(
        "a copy of the model is stored beside it and was not wanted: ema_params"
    )


def test_arrays_of_64_bits_that_come_back_in_32_are_a_warning(tmp_path: Path) -> None:
    tree = {"params": {"up": {"kernel": np.ones((2, 3)), "rate": np.float64(0.5)}}}

    said = warning(write(tmp_path / "c", tree), abstract(tree["params"]))

    assert (
        said == "1 leaf is stored in 64 bits and comes back in 32, set jax_enable_x64 to keep them: up/kernel"
    )


class Rotary(nnx.Module):
    def __init__(self) -> None:
        self.up = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        self.cached_sin = nnx.Variable(jnp.sin(jnp.arange(4.0)))


def test_a_models_own_constant_comes_from_the_target_or_init_and_is_never_zeros(tmp_path: Path) -> None:
    path = write(tmp_path / "c", {"params": MODEL})
    exact = np.asarray(jnp.sin(jnp.arange(4.0)))

    np.testing.assert_array_equal(restore(path, Rotary()).cached_sin[...], exact)
    abstract_model = nnx.eval_shape(Rotary)
    np.testing.assert_array_equal(restore(path, abstract_model, init=Rotary).cached_sin[...], exact)
    with pytest.raises(MissingParamError, match="cached_sin"):
        restore(path, abstract_model)
