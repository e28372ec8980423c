"""An NNX program, as a user would hand it to the command line."""

import jax
import optax
from flax import nnx


class Mlp(nnx.Module):
    def __init__(self, layers: int, width: int, rngs: nnx.Rngs):
        self.up = nnx.Linear(16, width, rngs=rngs)
        self.hidden = nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in range(layers)])
        self.norm = nnx.BatchNorm(width, use_running_average=True, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.down = nnx.Linear(width, 4, rngs=rngs)


class Named(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Linear(16, 8, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.head = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.norm(nnx.relu(self.embed(x))))


def make(layers: int = 3, width: int = 8) -> Mlp:
    return Mlp(layers, width, nnx.Rngs(0))


def make_train(layers: int = 3) -> tuple[Mlp, nnx.Optimizer[Mlp]]:
    model = make(layers)
    return model, nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)


def make_abstract() -> Mlp:
    return nnx.eval_shape(make)


def make_named() -> Named:
    return Named(nnx.Rngs(0))


def make_broken() -> Mlp:
    raise KeyError("no such size")


def make_other() -> nnx.Module:
    return nnx.Sequential(nnx.Linear(3, 5, rngs=nnx.Rngs(0)), nnx.LayerNorm(5, rngs=nnx.Rngs(0)))


A_NUMBER = 3
