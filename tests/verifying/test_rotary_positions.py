"""Queries and keys for rotary positions that turn neighbours, in a program that turns halves, and back."""

from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from orbax_nnx_handler import Fuse, restore, suggest, to_linen, verify

HEADS, SIZE, WIDTH = 2, 8, 16
X = np.random.default_rng(0).normal(size=(3, 6, WIDTH)).astype(np.float32)


def turned(x: Any, *, halves: bool) -> Any:
    """Returns (examples, tokens, heads, features), each pair of features turned by its position."""
    angles = np.arange(x.shape[1])[:, None] * 100.0 ** -(np.arange(SIZE // 2) / (SIZE // 2))
    sin, cos = (jnp.asarray(each, jnp.float32)[:, None] for each in (np.sin(angles), np.cos(angles)))
    a, b = (x[..., : SIZE // 2], x[..., SIZE // 2 :]) if halves else (x[..., ::2], x[..., 1::2])
    pairs = a * cos - b * sin, b * cos + a * sin
    return jnp.concatenate(pairs, -1) if halves else jnp.stack(pairs, -1).reshape(x.shape)


def attended(q: Any, k: Any, v: Any, *, halves: bool) -> Any:
    q, k, v = (x.reshape(*x.shape[:2], -1, SIZE) for x in (q, k, v))
    weights = jnp.einsum("bqhd,bkhd->bhqk", turned(q, halves=halves), turned(k, halves=halves)) / SIZE**0.5
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(weights), v).reshape(*q.shape[:2], -1)


class LinenAttention(nn.Module):
    halves: bool
    in_heads: bool = False

    @nn.compact
    def __call__(self, x: Any) -> Any:
        features = (HEADS, SIZE) if self.in_heads else HEADS * SIZE
        q, k, v = (nn.DenseGeneral(features, name=name)(x) for name in ("wq", "wk", "wv"))
        return nn.Dense(WIDTH, name="wo")(attended(q, k, v, halves=self.halves))


class LinenModel(nn.Module):
    halves: bool
    in_heads: bool = False

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for at in range(2):
            x = x + LinenAttention(self.halves, self.in_heads, name=f"layers_{at}")(x)
        return x


class Attention(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, *, halves: bool, fused: bool):
        self.halves, self.fused = halves, fused
        if fused:
            self.qkv = nnx.Linear(WIDTH, 3 * HEADS * SIZE, rngs=rngs)
        else:
            self.wq, self.wk, self.wv = (nnx.Linear(WIDTH, HEADS * SIZE, rngs=rngs) for _ in range(3))
        self.wo = nnx.Linear(HEADS * SIZE, WIDTH, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        q, k, v = jnp.split(self.qkv(x), 3, -1) if self.fused else (self.wq(x), self.wk(x), self.wv(x))
        return self.wo(attended(q, k, v, halves=self.halves))


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, **changed: Any):
        self.layers = nnx.List([Attention(rngs, **changed) for _ in range(2)])

    def __call__(self, x: Any) -> Any:
        for layer in self.layers:
            x = x + layer(x)
        return x


def programs(tmp_path: Any, *, halves: bool, in_heads: bool, fused: bool, ours: bool | None = None) -> Any:
    linen = LinenModel(halves, in_heads)
    random = np.random.default_rng(1)
    variables = jax.tree.map(
        lambda leaf: np.asarray(leaf + 0.3 * random.normal(size=leaf.shape), np.float32),
        linen.init(jax.random.key(0), X),
    )
    with ocp.StandardCheckpointer() as stock:
        stock.save(tmp_path / "checkpoint", variables)
    is_halves = not halves if ours is None else ours
    target = nnx.eval_shape(lambda: Model(nnx.Rngs(0), halves=is_halves, fused=fused))
    return tmp_path / "checkpoint", target, (linen.apply, lambda model, x: model(x), (X,))


@pytest.mark.parametrize("halves", [False, True], ids=["neighbours", "halves"])
@pytest.mark.parametrize(("in_heads", "fused"), [(False, False), (True, False), (False, True)])
def test_the_other_order_of_features_is_proved_and_settled(tmp_path, halves, in_heads, fused) -> None:
    path, target, pair = programs(tmp_path, halves=halves, in_heads=in_heads, fused=fused)

    found = suggest(path, target, verify=pair)

    assert found.is_proved
    assert verify(path, target, *pair, renames=found.renames).equal


def test_verify_names_queries_and_keys(tmp_path) -> None:
    path, target, pair = programs(tmp_path, halves=False, in_heads=False, fused=False)

    first = verify(path, target, *pair, renames=[("layers_{i}", "layers/{i}")]).first

    assert first is not None
    assert "the features of each head lie as other rotary positions pair them" in first.proved
    assert {path[-2:] for path in first.changes} == {
        (name, leaf) for name in ("wq", "wk") for leaf in ("kernel", "bias")
    }


def test_what_is_right_stays_as_it_is(tmp_path) -> None:
    path, target, pair = programs(tmp_path, halves=True, in_heads=False, fused=True, ours=True)
    names = [(f"{name}/{leaf}", axis) for leaf, axis in (("kernel", 1), ("bias", 0)) for name in ("w{}",)]
    rules = [Fuse(tuple(name.format(x) for x in "qkv"), f"qkv/{name[4:]}", axis=axis) for name, axis in names]
    found = verify(path, target, *pair, renames=[*cast(Any, rules), ("layers_{i}", "layers/{i}")])
    assert found.equal
    assert found.first is None


def test_another_order_of_parts_is_proved_with_the_other_rotary_positions(tmp_path) -> None:
    path, target, pair = programs(tmp_path, halves=False, in_heads=False, fused=True)
    rules = [Fuse(("wk/kernel", "wq/kernel", "wv/kernel"), "qkv/kernel", axis=1)]
    rules += [Fuse(("wk/bias", "wq/bias", "wv/bias"), "qkv/bias", axis=0)]

    first = verify(path, target, *pair, renames=[*rules, ("layers_{i}", "layers/{i}")]).first

    assert first is not None
    assert first.proved.startswith("bias and kernel joined in another order")
    assert first.proved.endswith("the features of each head lie as other rotary positions pair them")


def test_three_modules_that_have_each_others_weights_are_proved(tmp_path) -> None:
    path, target, pair = programs(tmp_path, halves=True, in_heads=False, fused=False, ours=True)
    turns = [(f"layers_{{i}}/w{one}", f"layers/{{i}}/w{other}") for one, other in ("qk", "kv", "vq")]

    first = verify(path, target, *pair, renames=[*turns, ("layers_{i}/wo", "layers/{i}/wo")]).first

    assert first is not None
    assert first.proved.startswith("layers/0/wq, layers/0/wk, layers/0/wv have the weights of ")


def in_one(y: Any, arrangement: str) -> list[Any]:
    """Returns queries, keys and values out of one array."""
    if arrangement == "heads":
        y = jnp.moveaxis(y.reshape(*y.shape[:2], HEADS, 3, SIZE), 3, 2).reshape(*y.shape[:2], -1)
    return jnp.split(y.reshape(*y.shape[:2], -1), 3, -1)


class LinenInOne(nn.Module):
    arrangement: str

    @nn.compact
    def __call__(self, x: Any) -> Any:
        features = (3, HEADS, SIZE) if self.arrangement == "axis" else 3 * HEADS * SIZE
        y = nn.DenseGeneral(features, name="qkv")(x)
        return x + nn.Dense(WIDTH, name="wo")(attended(*in_one(y, self.arrangement), halves=False))


class InOne(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, arrangement: str):
        self.arrangement = arrangement
        self.qkv_proj, self.out_proj = nnx.Linear(WIDTH, 48, rngs=rngs), nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return x + self.out_proj(attended(*in_one(self.qkv_proj(x), self.arrangement), halves=True))


@pytest.mark.parametrize("arrangement", ["axis", "heads", "side by side"])
def test_of_one_stored_array_queries_and_keys_alone_are_put_in_the_other_order(tmp_path, arrangement) -> None:
    linen, random = LinenInOne(arrangement), np.random.default_rng(1)
    variables = jax.tree.map(
        lambda leaf: np.asarray(leaf + 0.3 * random.normal(size=leaf.shape), np.float32),
        linen.init(jax.random.key(0), X),
    )
    with ocp.StandardCheckpointer() as stock:
        stock.save(tmp_path / "checkpoint", variables)
    target = nnx.eval_shape(lambda: InOne(nnx.Rngs(0), arrangement))

    found = suggest(tmp_path / "checkpoint", target, verify=(linen.apply, lambda model, x: model(x), (X,)))

    assert found.is_proved
    assert "patch" not in str(found)
    model = restore(tmp_path / "checkpoint", target, renames=found.renames)
    stored, made = (
        in_one(np.asarray(kernel).reshape(1, WIDTH, -1), arrangement)
        for kernel in (variables["params"]["qkv"]["kernel"], model.qkv_proj.kernel.get_value())
    )
    assert [np.array_equal(*pair) for pair in zip(stored, made, strict=True)] == [False, False, True]
    saved = to_linen(model, renames=found.renames)
    assert jax.tree.all(jax.tree.map(np.array_equal, saved, variables))
