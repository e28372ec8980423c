"""What is proved of one module, and where else it is so: in other layers and experts, and at both ends."""

import pathlib
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from orbax_nnx_handler import Add, Verification, suggest, verify

X = np.random.default_rng(0).normal(size=(4, 10, 8)).astype("f")
LAYERS = 4


def weights(variables: Any) -> Any:
    random = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: leaf + 0.3 * random.normal(size=leaf.shape).astype("f"), variables)


def saved(path: pathlib.Path, module: nn.Module, x: Any) -> pathlib.Path:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "c", weights(module.init(jax.random.key(0), x)))
    return path / "c"


def told(path: pathlib.Path, linen: nn.Module, make: Any, x: Any, renames: Any) -> Verification:
    target, run = nnx.eval_shape(lambda: make(nnx.Rngs(0))), lambda model, x: model(x)
    return verify(saved(path, linen, x), target, linen.apply, run, (x,), renames=renames)


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(8, name="b")(nn.gelu(nn.Dense(8, name="a")(x)))


class LinenLayers(nn.Module):
    @nn.compact
    def __call__(self, x):
        for layer in range(LAYERS):
            x = LinenBlock(name=f"layers_{layer}")(x)
        return nn.Dense(3, name="head")(x)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.a, self.b = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return x + self.b(nnx.gelu(self.a(x)))


class Layers(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


ORDERS = {"shifted": [1, 2, 3, 0], "backwards": [3, 2, 1, 0], "two": [0, 2, 1, 3], "a round": [0, 3, 1, 2]}


@pytest.mark.parametrize("order", ORDERS)
def test_of_layers_with_a_rule_each_all_that_need_others_weights_are_told(tmp_path: pathlib.Path, order: str):
    made = {wanted: stored for stored, wanted in enumerate(ORDERS[order])}
    rules = [(f"layers_{stored}", f"layers/{wanted}") for wanted, stored in made.items()]

    first = told(tmp_path, LinenLayers(), Layers, X, rules).first

    wrong = [layer for layer in range(LAYERS) if made[layer] != layer]
    assert first is not None
    assert first.path == f"layers/{wrong[0]}"
    recipes = {**first.changes, **first.elsewhere}
    assert {leaf[1] for leaf in recipes} == {*wrong}
    assert all(recipe.path[1] == f"layers_{leaf[1]}" for leaf, recipe in recipes.items())
    assert [leaf[1] for leaf in first.elsewhere if leaf[2:] == ("a", "bias")] == wrong[1:]
    assert "The same is wrong in" in str(first.sentences[0])


def test_given_rules_that_shift_layers_are_all_named(tmp_path: pathlib.Path):
    rules = [(f"layers_{layer}", f"layers/{(layer + 1) % LAYERS}") for layer in range(LAYERS)]
    target = nnx.eval_shape(lambda: Layers(nnx.Rngs(0)))
    pair = (LinenLayers().apply, lambda model, x: model(x), (X,))

    found = suggest(saved(tmp_path, LinenLayers(), X), target, renames=rules, verify=pair)

    assert found.is_refuted
    assert all(repr(rule) in found.proof for rule in rules), found.proof


def test_a_mistake_in_one_layer_alone_is_told_of_no_other(tmp_path: pathlib.Path):
    found = told(
        tmp_path, LinenLayers(), Layers, X, [("layers_{i}", "layers/{i}"), Add("layers/1/a/bias", 1.0)]
    )

    assert (found.first.path, found.first.elsewhere, found.first.also) == ("layers/1/a", {}, "")


class LinenExpert(nn.Module):
    @nn.compact
    def __call__(self, x):
        gate, up = (nn.Dense(8, use_bias=False, name=name)(x) for name in ("gate", "up"))
        return nn.Dense(8, use_bias=False, name="down")(nn.silu(gate) * up)


class LinenMixture(nn.Module):
    @nn.compact
    def __call__(self, x):
        chosen = nn.softmax(nn.Dense(4, name="router")(x))
        return sum(LinenExpert(name=f"experts_{at}")(x) * chosen[..., at, None] for at in range(4))


class LinenMixtures(nn.Module):
    @nn.compact
    def __call__(self, x):
        return LinenMixture(name="layers_1")(x + LinenMixture(name="layers_0")(x))


class Expert(nnx.Module):
    def __init__(self, rngs):
        self.gate, self.up, self.down = (nnx.Linear(8, 8, use_bias=False, rngs=rngs) for _ in range(3))

    def __call__(self, x):
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class Mixture(nnx.Module):
    def __init__(self, rngs):
        self.router = nnx.Linear(8, 4, rngs=rngs)
        self.experts = nnx.List([Expert(rngs) for _ in range(4)])

    def __call__(self, x):
        chosen = nnx.softmax(self.router(x))
        return sum(expert(x) * chosen[..., at, None] for at, expert in enumerate(self.experts))


class Mixtures(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([Mixture(rngs) for _ in range(2)])

    def __call__(self, x):
        return self.layers[1](x + self.layers[0](x))


@pytest.mark.parametrize("at", [None, 2], ids=["all", "one"])
def test_what_is_exchanged_in_every_expert_is_told_of_each(tmp_path: pathlib.Path, at: int | None):
    rules = [("gate", "up"), ("up", "gate")]
    if at is not None:
        rules = [(f"experts_{at}/{one}", f"experts/{at}/{other}") for one, other in rules]

    first = told(tmp_path, LinenMixtures(), Mixtures, X, rules).first

    experts = [(layer, expert) for layer in range(2) for expert in (range(4) if at is None else [at])]
    assert first is not None
    assert first.path == f"layers/0/experts/{at or 0}"
    assert {(leaf[1], leaf[3]) for leaf in {**first.changes, **first.elsewhere}} == {*experts}
    for leaf, recipe in first.elsewhere.items():
        assert recipe.path[1:] == (f"layers_{leaf[1]}", f"experts_{leaf[3]}", *leaf[4:])


class LinenTied(nn.Module):
    """An embedding and a head of one shape."""

    @nn.compact
    def __call__(self, words):
        x = nn.Embed(8, 8, name="embed")(words)
        return nn.Dense(8, use_bias=False, name="head")(x + nn.Dense(8, name="middle")(nn.gelu(x)))


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.embed, self.middle = nnx.Embed(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)
        self.head = nnx.Linear(8, 8, use_bias=False, rngs=rngs)

    def __call__(self, words):
        x = self.embed(words)
        return self.head(x + self.middle(nnx.gelu(x)))


def test_an_embedding_and_a_head_that_are_exchanged_are_named(tmp_path: pathlib.Path):
    words = np.random.default_rng(0).integers(0, 8, (4, 10))
    rules = [("embed/embedding", "head/kernel"), ("head/kernel", "embed/embedding")]

    first = told(tmp_path, LinenTied(), Tied, words, rules).first

    assert first is not None
    assert first.path == "embed"
    assert first.proved == "embed/embedding and head/kernel are exchanged"
