"""LoRA adapters over a base from another checkpoint, and quantised leaves that the target makes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from orbax_nnx_handler import MissingParamError, NNXLinenHandler, NNXLinenRestore, NNXLinenSave, restore

X = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)


class Net(nnx.Module):
    """Two layers, each with an adapter of rank 2 where `rank` says so."""

    def __init__(self, rngs: nnx.Rngs, *, rank: int = 2):
        self.up = nnx.LoRALinear(8, 6, lora_rank=rank, rngs=rngs) if rank else nnx.Linear(8, 6, rngs=rngs)
        self.down = nnx.LoRALinear(6, 4, lora_rank=rank, rngs=rngs) if rank else nnx.Linear(6, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.relu(self.up(x)))


def tuned() -> Net:
    """Returns a model whose adapters are trained: not the zeros that they begin with."""
    model = Net(nnx.Rngs(7))
    state = nnx.state(model, nnx.LoRAParam)
    nnx.update(model, jax.tree.map(lambda leaf: leaf + 0.5, state))
    return model


@pytest.fixture
def base(tmp_path) -> Any:
    """The base as a Linen program stored it; what it holds is not what the tuned model began with."""
    rng = np.random.default_rng(1)
    layers = {"up": (8, 6), "down": (6, 4)}
    params = {
        name: {"kernel": rng.normal(size=shape).astype(np.float32), "bias": np.ones(shape[1], np.float32)}
        for name, shape in layers.items()
    }
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "base", {"params": params})
    return tmp_path / "base"


@pytest.fixture
def adapters(tmp_path) -> Any:
    """The adapters alone, by a filter."""
    with ocp.Checkpointer(NNXLinenHandler()) as checkpointer:
        checkpointer.save(tmp_path / "adapters", args=NNXLinenSave(nnx.state(tuned(), nnx.LoRAParam)))
    return tmp_path / "adapters"


def make() -> Net:
    return Net(nnx.Rngs(3))


def test_adapters_are_saved_alone(adapters):
    with ocp.PyTreeCheckpointer() as checkpointer:
        stored = checkpointer.restore(adapters)

    assert set(stored) == {"LoRAParam"}
    assert len(jax.tree.leaves(stored)) == 4


def test_two_restores_fill_one_target_and_each_leaf_has_its_origin(base, adapters):
    handler = NNXLinenHandler()

    model = handler.restore(
        base,
        args=NNXLinenRestore(nnx.eval_shape(make), policy={nnx.LoRAParam: "init", ...: "error"}, init=make),
    )
    first = handler.report
    model = handler.restore(
        adapters, args=NNXLinenRestore(model, policy={nnx.LoRAParam: "error", ...: "init"})
    )
    second = handler.report

    lora = {(layer, "lora", part) for layer in ("up", "down") for part in ("lora_a", "lora_b")}
    assert set(first.filled) == set(second.restored) == lora
    assert set(first.restored) == set(second.filled)
    plain = restore(base, nnx.eval_shape(lambda: Net(nnx.Rngs(0), rank=0)))
    trained = tuned()
    expected = nnx.relu(plain.up(X) + X @ trained.up.lora.lora_a[...] @ trained.up.lora.lora_b[...])
    expected = plain.down(expected) + expected @ trained.down.lora.lora_a[...] @ trained.down.lora.lora_b[...]
    np.testing.assert_allclose(model(X), expected, rtol=1e-4)


def test_the_state_of_the_adapters_alone_is_a_target(adapters):
    found = restore(adapters, nnx.state(nnx.eval_shape(make), nnx.LoRAParam), unexpected="error")

    jax.tree.map(np.testing.assert_array_equal, found, nnx.state(tuned(), nnx.LoRAParam))


def test_adapters_that_are_not_stored_are_an_error_unless_a_filter_names_them(base):
    with pytest.raises(MissingParamError) as error:
        restore(base, nnx.eval_shape(make))

    assert {path[-1] for path in error.value.paths} == {"lora_a", "lora_b"}


class Scale(nnx.Variable):
    """What the target computes of its weights: no Linen program stores it."""


class Quantised(nnx.Module):
    """A layer whose codes and scale the program makes when it is built."""

    def __init__(self, rngs: nnx.Rngs):
        self.dense = nnx.Linear(8, 6, rngs=rngs)
        kernel = self.dense.kernel[...]
        self.scale = Scale(jnp.max(jnp.abs(kernel), axis=0) / 127)
        self.qvalue = Scale(jnp.round(kernel / self.scale[...]).astype(jnp.int8))


@pytest.mark.parametrize("filter_", [Scale, nnx.Any(nnx.PathContains("qvalue"), nnx.PathContains("scale"))])
def test_quantised_leaves_may_be_absent_where_the_target_makes_them(tmp_path, filter_):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(
            tmp_path / "item",
            {"params": {"dense": {"kernel": np.ones((8, 6), np.float32), "bias": np.zeros(6, np.float32)}}},
        )

    def make_quantised() -> Quantised:
        return Quantised(nnx.Rngs(0))

    model = restore(
        tmp_path / "item",
        nnx.eval_shape(make_quantised),
        policy={filter_: "init", ...: "error"},
        init=make_quantised,
    )

    np.testing.assert_array_equal(model.dense.kernel[...], np.ones((8, 6)))
    np.testing.assert_array_equal(model.qvalue[...], make_quantised().qvalue[...])
    assert model.qvalue[...].dtype == jnp.int8
