"""Numbers that stand beside an NNX object are leaves like any other: stored, restored, missed."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from orbax_nnx_handler import (
    MissingParamError,
    NNXLinenHandler,
    NNXLinenRestore,
    NNXLinenSave,
    from_linen,
    plan_restore,
    restore,
    save,
    to_linen,
)


def _model() -> nnx.Linear:
    return nnx.Linear(4, 3, rngs=nnx.Rngs(0))


def _abstract() -> nnx.Linear:
    return nnx.eval_shape(_model)


class _Run(NamedTuple):
    model: Any
    epoch: Any


@pytest.fixture
def linen(tmp_path) -> Any:
    params = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}
    beside = {"step": jnp.int32(1200), "epoch": 7, "rate": 0.5, "done": True}
    ocp.PyTreeCheckpointer().save(tmp_path / "linen", {"params": params, **beside})
    return tmp_path / "linen"


@pytest.mark.parametrize(
    ("name", "zero", "stored"),
    [
        ("step", 0, 1200),
        ("step", np.int32(0), 1200),
        ("epoch", np.int32(0), 7),
        ("rate", 0.0, 0.5),
        ("rate", np.float32(0), 0.5),
        ("done", False, True),
    ],
)
def test_a_number_beside_a_module_comes_back_as_it_is_stored(
    linen, name: str, zero: Any, stored: Any
) -> None:
    restored = restore(linen, {"model": _abstract(), name: zero}, unexpected="ignore")

    assert restored[name] == stored
    np.testing.assert_array_equal(restored["model"].kernel[...], np.ones((4, 3)))


def test_a_number_in_any_container_has_one_origin(linen) -> None:
    target = _Run(model=_abstract(), epoch=0)
    plan = plan_restore(linen, target, unexpected="ignore")

    restored = restore(linen, target, unexpected="ignore")

    assert isinstance(restored, _Run)
    assert restored.epoch == 7
    assert ("epoch",) in plan.restored


def test_a_number_that_is_not_stored_is_missing(linen) -> None:
    with pytest.raises(MissingParamError, match="rounds"):
        restore(linen, {"model": _abstract(), "rounds": 5}, unexpected="ignore")


def test_the_settings_of_a_module_stay_settings(linen) -> None:
    restored = restore(linen, {"model": _abstract(), "step": 0}, unexpected="ignore")

    assert restored["model"].in_features == 4


def test_what_is_saved_beside_a_module_comes_back(tmp_path) -> None:
    item = {"model": _model(), "epoch": 3, "rate": np.float32(0.5), "done": True}
    target = {"model": _abstract(), "epoch": 0, "rate": np.float32(0), "done": False}

    save(tmp_path / "item", item)
    with ocp.CheckpointManager(tmp_path / "managed", item_handlers=NNXLinenHandler()) as manager:
        manager.save(1, args=NNXLinenSave(item))
        manager.wait_until_finished()
        managed = manager.restore(1, args=NNXLinenRestore(target))

    for restored in (restore(tmp_path / "item", target), managed, from_linen(to_linen(item), target)):
        assert (restored["epoch"], restored["rate"], restored["done"]) == (3, 0.5, True)
        assert restored["epoch"].dtype == jnp.int32


def test_numpy_weights_are_taken_over_while_a_program_is_traced() -> None:
    weights = np.arange(6, dtype=np.float32)

    made = jax.jit(
        lambda: from_linen({"params": {"w": weights}}, {"w": jax.ShapeDtypeStruct((6,), jnp.float32)})
    )

    np.testing.assert_array_equal(made()["w"], np.arange(6))
    assert jax.eval_shape(made)["w"].shape == (6,)
