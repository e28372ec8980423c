"""Programs that compute in bfloat16 or float16: one of the two, as Linen programs often do, or both."""

import itertools
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from orbax_nnx_handler import Transpose, suggest, verify

_WIDTH, _DEPTH = 32, 4
_X = np.random.default_rng(3).normal(size=(2, 9, _WIDTH)).astype("f")
_LOW = [(jnp.bfloat16, None), (None, jnp.bfloat16), (jnp.bfloat16, jnp.bfloat16), (jnp.float16, None)]


class Block(nn.Module):
    """A block whose layers compute in a dtype, around a residual in float32."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(name="ln", dtype=self.dtype)(x)
        q, k, v = (nn.Dense(_WIDTH, name=name, dtype=self.dtype)(y) for name in ("query", "key", "value"))
        y = nn.softmax(q @ k.swapaxes(-1, -2) / _WIDTH**0.5) @ v
        return x + nn.Dense(_WIDTH, name="out", dtype=self.dtype)(y)


class Program(nn.Module):
    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        for at in range(_DEPTH):
            x = Block(self.dtype, name=f"layer_{at}")(x)
        return nn.Dense(4, name="head")(x)


class BlockTwin(nnx.Module):
    def __init__(self, rngs, dtype, names, scale):
        self.norm = nnx.LayerNorm(_WIDTH, rngs=rngs, dtype=dtype)
        for name in names:
            setattr(self, name, nnx.Linear(_WIDTH, _WIDTH, rngs=rngs, dtype=dtype))
        self.names, self.scale = names, scale

    def __call__(self, x):
        y = self.norm(x)
        q, k, v, out = (getattr(self, name) for name in self.names)
        y = nnx.softmax(q(y) @ k(y).swapaxes(-1, -2) / self.scale) @ v(y)
        return x + out(y)


class ProgramTwin(nnx.Module):
    def __init__(self, rngs, dtype=None, names=("q", "k", "v", "proj"), scale=_WIDTH**0.5):
        self.layers = nnx.List([BlockTwin(rngs, dtype, names, scale) for _ in range(_DEPTH)])
        self.head = nnx.Linear(_WIDTH, 4, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    keys = map(jax.random.key, itertools.count())
    variables = jax.tree.map(
        lambda leaf: leaf + 0.15 * jax.random.normal(next(keys), leaf.shape),
        Program().init(jax.random.key(0), _X),
    )
    path = tmp_path_factory.mktemp("digits") / "checkpoint"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, variables)
    return path


def rules(**others: str) -> list[Any]:
    names = {"query": "q", "key": "k", "value": "v", "out": "proj", "ln": "norm", **others}
    return [("layer_{i}", "layers/{i}"), *names.items()]


def pair(dtype: Any) -> tuple[Any, Any, Any]:
    return Program(dtype).apply, lambda model, x: model(x), (_X,)


def compare(path: pathlib.Path, dtypes: tuple[Any, Any], renames: list[Any]) -> Any:
    target = nnx.eval_shape(lambda: ProgramTwin(nnx.Rngs(0), dtypes[1]))
    return verify(path, target, *pair(dtypes[0]), renames=renames)


@pytest.mark.parametrize("dtypes", _LOW)
def test_right_rules_are_equal_and_it_is_said_first_in_how_many_digits(
    path: pathlib.Path, dtypes: tuple[Any, Any]
):
    found = compare(path, dtypes, rules())

    low = [jnp.dtype(dtype).name for dtype in dtypes if dtype]
    sides = [name for name, dtype in zip(("linen_apply", "nnx_apply"), dtypes, strict=True) if dtype]
    assert found.equal, found
    assert "as far as these outputs tell" in str(found)
    assert found.remarks[0].startswith(f"{sides[0]} computes in {low[0]}, first in layer"), found
    assert f"let {' and '.join(sides)} run modules made with dtype=jnp.float32" in found.remarks[0]


@pytest.mark.parametrize("dtypes", _LOW)
@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ([("layer_1", "layers/2"), ("layer_2", "layers/1"), *rules()], "layers/1"),
        ([*rules(), Transpose("layers/2/v/kernel", (1, 0))], "layers/2/v"),
        (rules(value="proj", out="v"), "layers/0/v"),
    ],
    ids=["layers exchanged", "a square kernel turned", "two modules exchanged"],
)
def test_a_mistake_is_named_and_proved_in_few_digits_too(
    path: pathlib.Path, dtypes: tuple[Any, Any], wrong: list[Any], named: str
):
    found = compare(path, dtypes, wrong)

    assert not found.equal
    assert (found.first.path, bool(found.first.proved)) == (named, True), found
    assert "computes in" in str(found).splitlines()[2], found


def test_what_differs_in_the_code_is_named_beside_a_table_that_it_does_not_contradict(path: pathlib.Path):
    target = nnx.eval_shape(lambda: ProgramTwin(nnx.Rngs(0), scale=1.0))
    found = verify(path, target, *pair(jnp.bfloat16), renames=rules())

    assert (found.equal, found.first.path, found.first.proved) == (False, "layers/0", "")
    assert "still returns the same, but for rounding" in str(found)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_what_differs_by_far_more_than_rounding_is_settled(path: pathlib.Path, dtype: Any):
    target = nnx.eval_shape(lambda: ProgramTwin(nnx.Rngs(0), None, ("a", "b", "c", "d")))
    asked = suggest(path, target)
    found = suggest(path, target, verify=pair(dtype))

    assert asked.confidence == "open"
    assert not found.questions, found
    assert f"linen_apply computes in {jnp.dtype(dtype).name}" in str(found)
    assert "proved by outputs" not in str(found)
    assert verify(path, target, *pair(None), renames=found.renames).equal


def test_a_cast_of_outputs_alone_is_no_proof_that_programs_are_equal(
    path: pathlib.Path,
):
    """All modules compute in float32: what the cast hides may be a mistake as well as rounding."""
    linen_apply, nnx_apply, inputs = pair(None)
    target = nnx.eval_shape(lambda: ProgramTwin(nnx.Rngs(0)))

    def scaled(model: Any, *inputs: Any) -> Any:
        return (nnx_apply(model, *inputs) * 1.005).astype(jnp.bfloat16)

    found = verify(path, target, linen_apply, scaled, inputs, renames=rules())
    proposed = suggest(path, target, renames=rules(), verify=(linen_apply, scaled, inputs))

    assert found.equal
    assert "as far as these outputs tell" in str(found)
    assert "cast to fewer digits" in " ".join(found.remarks)
    assert "proved by outputs" not in str(proposed)
    exact = verify(path, target, linen_apply, nnx_apply, inputs, renames=rules())
    assert (exact.equal, exact.remarks) == (True, ())
