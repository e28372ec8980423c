"""Stored modules that the Linen program never calls: no source of what the NNX program calls."""

import pathlib
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from orbax_nnx_handler import restore, suggest, verify
from tests.verifying.twins import Twin

_X = np.random.default_rng(5).normal(size=(3, 6)).astype("f")


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(6, name="lin")(nn.tanh(nn.LayerNorm(name="ln")(x)))


class Residuals(nn.Module):
    """Layers that are numbered from one, as where the first was taken out."""

    names: tuple[str, ...] = ("block_1", "block_2", "block_3")

    @nn.compact
    def __call__(self, x):
        for name in self.names:
            x = Residual(name=name)(x)
        return nn.Dense(3, name="head")(nn.LayerNorm(name="last_ln")(x))


class ResidualTwin(nnx.Module):
    def __init__(self, rngs):
        self.norm, self.fc = nnx.LayerNorm(6, rngs=rngs), nnx.Linear(6, 6, rngs=rngs)

    def __call__(self, x):
        return x + self.fc(nnx.tanh(self.norm(x)))


class ResidualsTwin(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([ResidualTwin(rngs) for _ in range(3)])
        self.final_norm, self.out = nnx.LayerNorm(6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)
        self.aux = nnx.Linear(6, 4, rngs=rngs)  # For training alone.

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.out(self.final_norm(x))


RESIDUALS = Twin(
    name="residuals", linen=Residuals(), make=lambda: ResidualsTwin(nnx.Rngs(0)), inputs=(_X,), rules=[]
)


def beside(path: pathlib.Path, **modules: str) -> pathlib.Path:
    """Saves the variables with modules beside them that the program does not call: copies, changed."""
    params = RESIDUALS.variables()["params"]
    others = {
        name: jax.tree.map(lambda leaf: 1.5 * leaf + 0.1, params[like]) for name, like in modules.items()
    }
    head = {"kernel": np.ones((6, 4), "f"), "bias": np.ones(4, "f")}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, {"params": {**params, **others, "aux": head}})
    return path


@pytest.mark.parametrize(
    ("modules", "wanted", "source", "rules"),
    [
        (
            {"block_0": "block_1"},
            "layers",
            "block_0",
            [(f"block_{at + 1}", f"layers/{at}") for at in range(3)],
        ),
        ({"out": "head"}, "out", "out", [("head", "out")]),
        ({"final_norm": "last_ln"}, "final_norm", "final_norm", [("last_ln", "final_norm")]),
    ],
    ids=["a layer", "a head of the wanted name", "a norm of the wanted name"],
)
def test_what_linen_never_calls_is_no_source_of_what_the_model_calls(
    modules: dict[str, str], wanted: str, source: str, rules: list[Any], tmp_path: pathlib.Path
):
    path, target = beside(tmp_path / "c", **modules), nnx.eval_shape(RESIDUALS.make)
    pair = (RESIDUALS.linen.apply, RESIDUALS.run, RESIDUALS.inputs)

    first = suggest(path, target)
    told = verify(path, target, *pair, renames=first.renames)
    found = suggest(path, target, verify=pair)

    assert not told.equal
    assert told.unused == (("params", source),)
    assert (told.first.path, "which the Linen program does not use" in told.first.proved) == (wanted, True)
    assert found.confidence != "open", found  # Of `aux` outputs tell nothing.
    assert {*map(str, rules)} <= {*map(str, found.renames)}
    assert verify(path, target, *pair, renames=found.renames).equal
    # What neither program calls stays each other's.
    assert np.all(restore(path, target, renames=found.renames).aux.kernel[...] == 1)


def test_what_linen_never_calls_is_told_also_where_the_code_differs_too(tmp_path: pathlib.Path):
    def doubled(model: Any, x: Any) -> Any:
        return 2 * model(x)

    path, target = beside(tmp_path / "c", out="head"), nnx.eval_shape(RESIDUALS.make)
    rules = suggest(path, target).renames
    told = verify(path, target, RESIDUALS.linen.apply, doubled, RESIDUALS.inputs, renames=rules)
    found = suggest(path, target, verify=(RESIDUALS.linen.apply, doubled, RESIDUALS.inputs))

    words = (
        "out: filled from params/out, which the Linen program does not use, while params/head, in what it "
        "calls and of the same sizes, fills nothing"
    )
    assert told.remarks[0].startswith(words)
    assert str(told).split("note: ")[1].startswith("out: filled from params/out")
    assert found.is_refuted
    assert words in found.proof


def test_what_linen_uses_without_a_call_is_a_source(tmp_path: pathlib.Path):
    # An embedding that only `attend` uses, or a kernel that linen_apply takes by itself.
    path, target = beside(tmp_path / "c", out="head"), nnx.eval_shape(RESIDUALS.make)

    def linen(variables: Any, x: Any) -> Any:
        params = variables["params"]
        return RESIDUALS.linen.apply(variables, x) + x @ params["out"]["kernel"]

    rules = suggest(path, target).renames
    told = verify(path, target, linen, RESIDUALS.run, RESIDUALS.inputs, renames=rules)

    assert not told.equal
    assert told.unused == ()


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(6, name="amber")(nn.tanh(nn.Dense(6, name="coral")(x)))


class Plains(nn.Module):
    @nn.compact
    def __call__(self, x):
        for name in ("block_1", "block_2", "block_3"):
            x = Plain(name=name)(x)
        return nn.Dense(3, name="head")(x)


class PlainTwin(nnx.Module):
    def __init__(self, rngs):
        self.one, self.two = nnx.Linear(6, 6, rngs=rngs), nnx.Linear(6, 6, rngs=rngs)

    def __call__(self, x):
        return x + self.one(nnx.tanh(self.two(x)))


class PlainsTwin(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([PlainTwin(rngs) for _ in range(3)])
        self.out = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.out(x)


PLAINS = Twin(name="plains", linen=Plains(), make=lambda: PlainsTwin(nnx.Rngs(0)), inputs=(_X,), rules=[])


def test_what_a_layer_that_is_never_called_leaves_open_is_proved_without_it(tmp_path: pathlib.Path):
    # Four layers for three, whose modules have names that tell nothing: nothing is proposed for any.
    params, target = PLAINS.variables()["params"], nnx.eval_shape(PLAINS.make)
    other = jax.tree.map(lambda leaf: 1.5 * leaf + 0.1, params["block_1"])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", {"params": {**params, "block_0": other}})
    pair = (PLAINS.linen.apply, PLAINS.run, PLAINS.inputs)

    assert suggest(tmp_path / "c", target).unmatched_wanted
    found = suggest(tmp_path / "c", target, verify=pair)

    assert found.confidence == "certain", found
    assert verify(tmp_path / "c", target, *pair, renames=found.renames).equal


class LinenGains(nn.Module):
    """A module that is called, of whose own parameters one was left over: the name that is wanted."""

    @nn.compact
    def __call__(self, x):
        self.param("alpha", nn.initializers.normal(1.0), (6,))
        return nn.tanh(nn.Dense(6, name="lin")(x)) * self.param("gain", nn.initializers.normal(1.0), (6,))


class Gains(nnx.Module):
    def __init__(self, rngs):
        self.lin, self.alpha = nnx.Linear(6, 6, rngs=rngs), nnx.Param(np.ones(6, "f"))

    def __call__(self, x):
        return nnx.tanh(self.lin(x)) * self.alpha[...]


def test_of_what_is_called_a_parameter_that_is_not_used_is_no_source(tmp_path: pathlib.Path):
    linen = LinenGains()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", linen.init(jax.random.key(0), _X))
    target, pair = nnx.eval_shape(lambda: Gains(nnx.Rngs(0))), (linen.apply, RESIDUALS.run, (_X,))

    told = verify(tmp_path / "c", target, *pair)
    found = suggest(tmp_path / "c", target, verify=pair)

    assert told.unused == (("params", "alpha"),)
    assert "filled from params/alpha, which the Linen program does not use, while params/gain" in str(told)
    assert found.is_proved
    assert ("gain", "alpha") in [(rule.pattern, getattr(rule, "replacement", "")) for rule in found.renames]
