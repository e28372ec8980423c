"""Flax's guide "Use Flax NNX and Linen together": modules of one API that hold those of the other."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import linen as nn
from flax import nnx
from flax.nnx import bridge

from orbax_nnx_handler import restore, save, to_linen

X = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)


class LinenDot(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        w = self.param("w", nn.initializers.lecun_normal(), (x.shape[-1], 6))
        return x @ w


class NNXDot(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, *, partitioned: bool = False):
        init = nnx.initializers.lecun_normal()
        init = nnx.with_partitioning(init, ("rows", "columns")) if partitioned else init
        self.w = nnx.Param(init(rngs.params(), (8, 6)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.w[...]


class Outer(nnx.Module):
    """An NNX module around a Linen one."""

    def __init__(self, rngs: nnx.Rngs):
        self.dot = bridge.ToNNX(LinenDot(), rngs=rngs)
        self.b = nnx.Param(jax.random.uniform(rngs.params(), (1, 6)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dot(x) + self.b[...]


class LinenOuter(nn.Module):
    """A Linen module around an NNX one."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b = self.param("b", nn.initializers.lecun_normal(), (1, 6))
        return bridge.to_linen(NNXDot)(x) + b


class Counting(nn.Module):
    """A Linen module with a collection of its own."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        w = self.param("w", nn.initializers.lecun_normal(), (8, 3))
        count = self.variable("counter", "count", lambda: jnp.full((), 7, jnp.int32))
        return x @ w * count.value


def stored(path: Any, tree: Any) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "item", tree)
    return path / "item"


def test_a_linen_checkpoint_goes_into_its_own_module_made_nnx(tmp_path):
    variables = LinenDot().init(jax.random.key(0), X)
    target = nnx.eval_shape(lambda: bridge.lazy_init(bridge.ToNNX(LinenDot(), rngs=nnx.Rngs(1)), X))

    model = restore(stored(tmp_path, variables), target)

    np.testing.assert_array_equal(model(X), LinenDot().apply(variables, X))


def test_an_nnx_module_around_a_linen_one_is_saved_and_comes_back(tmp_path):
    model = bridge.lazy_init(Outer(nnx.Rngs(0)), X)
    save(tmp_path / "item", model)

    again = restore(tmp_path / "item", bridge.lazy_init(Outer(nnx.Rngs(5)), X))

    np.testing.assert_array_equal(again(X), model(X))


def test_a_linen_checkpoint_goes_into_the_nnx_module_around_the_linen_one(tmp_path):
    tree = {"params": {"dot": {"w": np.ones((8, 6), np.float32)}, "b": np.full((1, 6), 2.0, np.float32)}}
    target = nnx.eval_shape(lambda: bridge.lazy_init(Outer(nnx.Rngs(0)), X))

    model = restore(stored(tmp_path, tree), target)

    np.testing.assert_allclose(model(X), X @ np.ones((8, 6)) + 2, rtol=1e-5)


def test_variables_of_an_nnx_module_made_linen_go_into_the_nnx_module(tmp_path):
    linen = bridge.to_linen(NNXDot)
    variables = linen.init(jax.random.key(0), X)

    model = restore(stored(tmp_path, variables), nnx.eval_shape(lambda: NNXDot(nnx.Rngs(0))))

    np.testing.assert_array_equal(model(X), linen.apply(variables, X))


def test_a_linen_module_around_an_nnx_one_is_one_rename_away(tmp_path):
    class Model(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.dot = NNXDot(rngs)
            self.b = nnx.Param(jnp.zeros((1, 6)))

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.dot(x) + self.b[...]

    variables = LinenOuter().init(jax.random.key(0), X)
    target = nnx.eval_shape(lambda: Model(nnx.Rngs(0)))

    model = restore(stored(tmp_path, variables), target, renames=[("ToLinen_0", "dot")])

    np.testing.assert_allclose(model(X), LinenOuter().apply(variables, X), rtol=1e-6)


def test_an_nnx_model_gives_variables_to_the_linen_module_made_of_it():
    model = NNXDot(nnx.Rngs(3))

    logits = bridge.to_linen(NNXDot).apply(to_linen(model), X)

    np.testing.assert_array_equal(logits, model(X))


def test_dropout_made_nnx_has_streams_of_its_own_and_they_go_on(tmp_path):
    def make() -> Any:
        return bridge.ToNNX(nn.Dropout(rate=0.5, deterministic=False), rngs=nnx.Rngs(dropout=0))

    model = make()
    model(X)
    save(tmp_path / "item", {"dropout": model, "dot": NNXDot(nnx.Rngs(0))})

    again = restore(tmp_path / "item", {"dropout": make(), "dot": NNXDot(nnx.Rngs(1))})

    np.testing.assert_array_equal(again["dropout"](X), model(X))


def test_a_collection_of_its_own_comes_back_as_the_type_made_for_it(tmp_path):
    variables = Counting().init(jax.random.key(0), X)
    target = nnx.eval_shape(lambda: bridge.lazy_init(bridge.ToNNX(Counting(), rngs=nnx.Rngs(1)), X))

    model = restore(stored(tmp_path, variables), target)

    assert int(model.count[...]) == 7
    assert type(model.count) is nnx.variable_type_from_name("counter")
    np.testing.assert_array_equal(model(X), Counting().apply(variables, X))


def test_partitioned_weights_come_back_on_the_mesh_from_boxes_of_linen(tmp_path):
    class Dot(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            init = nn.with_partitioning(nn.initializers.lecun_normal(), ("rows", "columns"))
            return x @ self.param("w", init, (x.shape[-1], 6))

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("rows", "columns"))
    variables = Dot().init(jax.random.key(0), X)
    with jax.set_mesh(mesh):
        target = nnx.eval_shape(lambda: NNXDot(nnx.Rngs(0), partitioned=True))

        model = restore(stored(tmp_path, variables), target)

    assert model.w[...].sharding.spec == jax.sharding.PartitionSpec("rows", "columns")
    np.testing.assert_array_equal(model.w[...], nn.unbox(variables)["params"]["w"])


def test_partitioned_weights_of_an_nnx_module_made_linen_come_back(tmp_path):
    linen = bridge.ToLinen(NNXDot, kwargs={"partitioned": True})
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("rows", "columns"))
    with jax.set_mesh(mesh):
        variables = linen.init(jax.random.key(0), X)
        path = stored(tmp_path, nn.unbox(variables))

        model = restore(path, nnx.eval_shape(lambda: NNXDot(nnx.Rngs(0), partitioned=True)))

    np.testing.assert_array_equal(model.w[...], nn.unbox(variables)["params"]["w"])
