"""Linen programs that write inline what the target has modules for, whose code differs."""

import pathlib
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from orbax_nnx_handler import Rename, Verification, verify

X = np.random.default_rng(0).normal(size=(2, 6)).astype("f")
LAYERS = 3


class Linen(nn.Module):
    is_headed: bool
    is_pooled: bool = False

    @nn.compact
    def __call__(self, x):
        for layer in range(LAYERS):
            y = nn.LayerNorm(name=f"norm_{layer}")(x)
            y = nn.gelu(nn.Dense(8, name=f"up_{layer}")(y))
            x = x + nn.Dense(6, name=f"down_{layer}")(y)
        x = x.mean(0, keepdims=True) if self.is_pooled else x
        return nn.Dense(5, name="head")(nn.LayerNorm(name="norm")(x)) if self.is_headed else x


class Block(nnx.Module):
    def __init__(self, fault, rngs):
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.up, self.down = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 6, rngs=rngs)
        self.fault = fault

    def __call__(self, x):
        y = self.norm(2.0 + x * x if self.fault == "another input" else x)
        y = self.up(y)
        y = self.down(nnx.relu(y) if self.fault == "another activation" else nnx.gelu(y))
        if self.fault == "no residual":
            return y
        if self.fault == "twice":
            return x + y + x
        if self.fault == "a pair":
            return x - y, y
        return x + (0.5 * y if self.fault == "scaled" else y)


class Blocks(nnx.Module):
    def __init__(self, faults, rngs):
        self.blocks = nnx.List([Block(fault, rngs) for fault in faults])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
            x = x[0] if isinstance(x, tuple) else x
        return x


class Port(nnx.Module):
    def __init__(self, is_headed, faults, after, is_pooled, rngs):
        self.encoder = Blocks(faults, rngs)
        self.is_headed, self.after, self.is_pooled = is_headed, after, is_pooled
        if is_headed:
            self.norm, self.head = nnx.LayerNorm(6, rngs=rngs), nnx.Linear(6, 5, rngs=rngs)

    def __call__(self, x):
        x = self.encoder(x)
        x = x * x if self.after else x
        x = x.mean(0, keepdims=True) if self.is_pooled else x
        return self.head(self.norm(x)) if self.is_headed else x


RULES = [Rename(f"{name}_{{i}}", f"encoder/blocks/{{i}}/{name}") for name in ("norm", "up", "down")]


def verified(
    path: pathlib.Path,
    faults: list[str],
    *,
    is_headed: bool = True,
    after: bool = False,
    is_pooled: bool = False,
    port: Any = None,
    rules: Any = RULES,
) -> Verification:
    def weights(leaf: Any) -> Any:
        return leaf + 0.3 * np.random.default_rng(leaf.size).normal(size=leaf.shape).astype("f")

    program = Linen(is_headed, is_pooled)
    variables = jax.tree.map(weights, program.init(jax.random.key(0), X))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "c", variables)
    target = nnx.eval_shape(
        lambda: port(nnx.Rngs(0)) if port else Port(is_headed, faults, after, is_pooled, nnx.Rngs(0))
    )
    return verify(path / "c", target, program.apply, lambda model, x: model(x), (X,), renames=rules)


@pytest.mark.parametrize("is_headed", [True, False])
@pytest.mark.parametrize("at", [*range(LAYERS), None])
@pytest.mark.parametrize("fault", ["another input", "another activation", "no residual", "a pair", "scaled"])
def test_the_block_is_named_of_which_the_code_differs(
    fault: str, at: int | None, is_headed: bool, tmp_path: pathlib.Path
):
    found = verified(
        tmp_path, [fault if at in (None, layer) else "" for layer in range(LAYERS)], is_headed=is_headed
    )

    assert not found.equal
    assert found.first is not None
    assert found.first.place == ("encoder", "blocks", at or 0)


@pytest.mark.parametrize("is_headed", [True, False])
def test_no_block_is_named_where_what_follows_them_differs(is_headed: bool, tmp_path: pathlib.Path):
    found = verified(tmp_path, [""] * LAYERS, is_headed=is_headed, after=True)

    assert not found.equal
    assert found.first is not None
    assert found.first.place == ()


def test_where_what_follows_hides_what_a_block_returns_its_rest_is_named(tmp_path: pathlib.Path):
    found = verified(tmp_path, ["", "", "scaled"], is_pooled=True)

    assert found.first is not None
    assert found.first.place == ()
    assert "but the rest of encoder/blocks/2 or of encoder, or what is" in " ".join(str(found).split())


@pytest.mark.parametrize(("fault", "adds"), [("no residual", "Linen"), ("twice", "NNX")])
@pytest.mark.parametrize("at", [*range(LAYERS), None])
def test_a_residual_that_one_program_alone_adds_is_told(
    fault: str, adds: str, at: int | None, tmp_path: pathlib.Path
):
    found = verified(tmp_path, [fault if at in (None, layer) else "" for layer in range(LAYERS)])

    block = f"encoder/blocks/{at or 0}"
    words = f"the code differs: {adds} adds what {block} is called with as a residual, and the other program"
    assert words in " ".join(str(found).split())
    assert found.to_dict()["first"]["path"] == block


class Feed(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 6, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.gelu(self.up(x)))


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.norm, self.feed = nnx.LayerNorm(6, rngs=rngs), Feed(rngs)

    def __call__(self, x):
        return self.feed(self.norm(x))


class Layers(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([Layer(rngs) for _ in range(LAYERS)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_residual_is_left_out_where_its_input_is_not_in_the_module_that_returns_the_rest(tmp_path):
    rules = [
        Rename("norm_{i}", "layers/{i}/norm"),
        *(Rename(f"{name}_{{i}}", f"layers/{{i}}/feed/{name}") for name in ("up", "down")),
    ]

    found = verified(tmp_path, [], is_headed=False, port=Layers, rules=rules)

    assert found.first is not None
    assert found.first.place == ("layers", 0)
    assert "Linen adds what layers/0 is called with as a residual" in str(found)
