"""Equal outputs that prove nothing: of weights without an effect, or of what did not run."""

import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from orbax_nnx_handler import Add, Fuse, Verification, from_linen, suggest, verify

EXCHANGED = [("a", "b"), ("b", "a")]
INPUT = jax.random.normal(jax.random.key(1), (3, 10, 8))


class LinenPair(nn.Module):
    after: Callable[[Any], Any] = lambda x: x

    @nn.compact
    def __call__(self, x):
        return self.after(nn.Dense(8, name="b")(nn.gelu(nn.Dense(8, name="a")(x))))


class Pair(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, after: Callable[[Any], Any] = lambda x: x):
        self.a, self.b = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)
        self.after = after

    def __call__(self, x):
        return self.after(self.b(nnx.gelu(self.a(x))))


def save(path: pathlib.Path, variables: Any) -> pathlib.Path:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "checkpoint", variables)
    return path / "checkpoint"


def pair(path: pathlib.Path, after: Callable[[Any], Any], **changed: Any) -> Verification:
    checkpoint = save(path, LinenPair().init(jax.random.key(0), INPUT))
    given = {
        "linen_apply": LinenPair(after).apply,
        "nnx_apply": lambda model, x: model(x),
        "inputs": (INPUT,),
        "renames": EXCHANGED,
    }
    return verify(checkpoint, nnx.eval_shape(lambda: Pair(nnx.Rngs(0), after)), **given | changed)


@pytest.mark.parametrize(
    "after",
    [
        lambda x: x * 0,
        lambda x: jax.nn.relu(x - 1e3),
        lambda x: jax.nn.sigmoid(x + 99),
        lambda x: jnp.sign(x + 1e3),
    ],
    ids=["zeros", "dead", "saturated", "signs"],
)
def test_outputs_that_hide_two_exchanged_modules_are_said_to(tmp_path: pathlib.Path, after: Any):
    found = pair(tmp_path, after)

    assert found.equal
    assert any(remark.startswith("a, b: the outputs differ from Linen's") for remark in found.remarks), (
        found.remarks
    )


@pytest.mark.parametrize("mask", [-1e4, -1e5, -1e9])
def test_a_mask_of_any_size_hides_no_difference(tmp_path: pathlib.Path, mask: float):
    def masked(x: Any) -> Any:
        return x.at[..., ::2].set(mask)

    rough = pair(
        tmp_path, masked, renames=(), nnx_apply=lambda model, x: masked(model.b(jax.nn.relu(model.a(x))))
    )

    assert not rough.equal


def test_an_output_of_few_digits_says_nothing_about_those_beside_it(tmp_path: pathlib.Path):
    found = pair(
        tmp_path,
        lambda x: x,
        renames=(),
        linen_apply=lambda variables, x: (y := LinenPair().apply(variables, x), y.astype(jnp.bfloat16)),
        nnx_apply=lambda model, x: (y := model(x) * (1 + 1e-3), y.astype(jnp.bfloat16)),
    )

    assert not found.equal
    assert found.tolerance == 1e-5


def test_whole_numbers_are_the_same_or_not(tmp_path: pathlib.Path):
    words = jnp.array([250_000, 7])
    found = pair(
        tmp_path,
        lambda x: x,
        renames=(),
        linen_apply=lambda variables, x: (LinenPair().apply(variables, x), words),
        nnx_apply=lambda model, x: (model(x), words + jnp.array([1, 0])),
    )

    assert not found.equal


def test_two_inputs_that_are_the_same_are_named(tmp_path: pathlib.Path):
    found = pair(
        tmp_path,
        lambda x: x,
        renames=(),
        linen_apply=lambda variables, x, y: LinenPair().apply(variables, x + y),
        nnx_apply=lambda model, x, y: model(x + y),
        inputs=(INPUT, INPUT),
    )

    assert [remark for remark in found.remarks if remark.startswith("two inputs are the same")]


def test_another_model_is_refused_however_often_it_runs_and_is_left_as_it_was(tmp_path: pathlib.Path):
    variables = LinenPair().init(jax.random.key(0), INPUT)
    other = from_linen(variables, Pair(nnx.Rngs(0)))
    before = nnx.graphdef(other)
    for name in ("first", "second"):
        with pytest.raises(Exception, match="the same whatever the weights"):
            pair(tmp_path / name, lambda x: x, nnx_apply=lambda _, x: other(x))

    assert nnx.graphdef(other) == before


def test_weights_in_the_place_of_which_another_models_run_are_named(tmp_path: pathlib.Path):
    other = from_linen(LinenPair().init(jax.random.key(0), INPUT), Pair(nnx.Rngs(0)))

    def both(model: Any, x: Any) -> Any:
        return other.b(nnx.gelu(model.a(x)))

    found = pair(tmp_path, lambda x: x, nnx_apply=both, renames=())

    assert found.equal
    (remark,) = found.remarks
    assert "they do not depend on: b/bias, b/kernel." in remark


class LinenNormed(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.BatchNorm(not train, name="one")(x)
        return nn.BatchNorm(not train, name="two")(nn.Dense(8, name="dense")(x))


class Normed(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.one, self.two = nnx.BatchNorm(8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
        self.dense = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return self.two(self.dense(self.one(x)))


@pytest.mark.parametrize("train", [True, False])
def test_statistics_that_training_does_not_use_are_named(tmp_path: pathlib.Path, train: bool):
    def linen(variables: Any, x: Any) -> Any:
        found = LinenNormed().apply(variables, x, train, mutable=["batch_stats"])
        return found[0]

    def ours(model: Any, x: Any) -> Any:
        (model.train if train else model.eval)()
        return model(x)

    checkpoint = save(tmp_path, LinenNormed().init(jax.random.key(0), INPUT, True))
    found = verify(checkpoint, nnx.eval_shape(lambda: Normed(nnx.Rngs(0))), linen, ours, (INPUT,))

    assert found.equal
    named = [remark for remark in found.remarks if "one/mean" in remark and "two/var" in remark]
    assert bool(named) == train
    assert all("run both in evaluation mode" in remark and "Choose" not in remark for remark in named)


def test_numbers_beside_which_a_bias_does_not_show_are_named(tmp_path: pathlib.Path):
    def found(size: float) -> Verification:
        variables = jax.tree.map(lambda leaf: size * leaf, LinenPair().init(jax.random.key(0), INPUT))
        checkpoint = save(tmp_path / f"{size}", variables)
        target = nnx.eval_shape(lambda: Pair(nnx.Rngs(0)))
        added = [Add("b/bias", 0.1)]
        return verify(
            checkpoint, target, LinenPair().apply, lambda model, x: model(x), (INPUT,), renames=added
        )

    assert not found(1.0).equal
    large = found(1e4)
    assert large.equal
    assert [remark.partition("numbers of about")[0] for remark in large.remarks][:1] == ["b: it returns "]


class LinenBranch(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(name="norm")(x)
        q, k, v = (nn.Dense(8, name=name)(y) for name in ("query", "key", "value"))
        y = nn.Dense(8, name="out")(nn.softmax(q @ k.swapaxes(-1, -2)) @ v)
        return x + y * self.param("gamma", nn.initializers.ones, (8,))


class Branch(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm, self.qkv = nnx.LayerNorm(8, rngs=rngs), nnx.Linear(8, 24, rngs=rngs)
        self.out, self.gamma = nnx.Linear(8, 8, rngs=rngs), nnx.Param(jnp.ones(8))

    def __call__(self, x):
        k, q, v = jnp.split(self.qkv(self.norm(x)), 3, -1)
        return x + self.out(nnx.softmax(q @ k.swapaxes(-1, -2)) @ v) * self.gamma[...]


@pytest.mark.parametrize("hidden", ["out", "gamma", "tiny gamma", ""])
def test_an_order_is_not_proved_behind_weights_of_zero(tmp_path: pathlib.Path, hidden: str):
    variables = LinenBranch().init(jax.random.key(0), INPUT)
    params = variables["params"]
    if hidden == "out":
        params["out"]["kernel"] *= 0
    elif hidden:
        params["gamma"] *= 1e-6 if "tiny" in hidden else 0
    given = LinenBranch().apply, lambda model, x: model(x), (INPUT,)
    found = suggest(save(tmp_path, variables), nnx.eval_shape(lambda: Branch(nnx.Rngs(0))), verify=given)

    fused = [rule.patterns[0] for rule in found.renames if isinstance(rule, Fuse)]
    assert (found.confidence == "certain") == (not hidden)
    assert hidden or fused == ["key/bias", "key/kernel"]


class LinenNorms(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(name="pre_norm")(x)
        return nn.LayerNorm(name="post_norm")(nn.Dense(8, name="dense")(x))


class Norms(nnx.Module):
    """Calls the norm at its end what its name denies."""

    def __init__(self, rngs: nnx.Rngs):
        self.norm_in, self.norm_out = nnx.LayerNorm(8, rngs=rngs), nnx.LayerNorm(8, rngs=rngs)
        self.dense = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return self.norm_in(self.dense(self.norm_out(x)))


def test_weights_that_a_module_gives_up_are_not_lost(tmp_path: pathlib.Path):
    variables = LinenNorms().init(jax.random.key(0), INPUT)
    random = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: leaf + random.normal(size=leaf.shape).astype("f"), variables)
    given = LinenNorms().apply, lambda model, x: model(x), (INPUT,)
    found = suggest(save(tmp_path, variables), nnx.eval_shape(lambda: Norms(nnx.Rngs(0))), verify=given)

    assert found.confidence == "certain"
    assert {(rule.pattern, rule.replacement) for rule in found.renames} == {
        ("pre_norm", "norm_out"),
        ("post_norm", "norm_in"),
    }


class LinenScaled(nn.Module):
    @nn.compact
    def __call__(self, x):
        temperature = self.param("temperature", nn.initializers.ones, ())
        gate = self.param("gate", nn.initializers.zeros, ())
        return nn.Dense(8, name="out")(x + gate * nn.Dense(8, name="branch")(x)) * temperature


class Scaled(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.temperature, self.gate = nnx.Param(jnp.ones(())), nnx.Param(jnp.zeros(()))
        self.branch, self.out = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return self.out(x + self.gate * self.branch(x)) * self.temperature


@pytest.mark.parametrize("inputs", [INPUT, INPUT[:1, :1]], ids=["many tokens", "one token"])
def test_of_a_scalar_the_outputs_tell_all_or_nothing(tmp_path: pathlib.Path, inputs: Any):
    checkpoint = save(tmp_path, LinenScaled().init(jax.random.key(0), INPUT))
    target = nnx.eval_shape(lambda: Scaled(nnx.Rngs(0)))
    found = verify(checkpoint, target, LinenScaled().apply, lambda model, x: model(x), (inputs,))

    (remark,) = found.remarks
    assert found.equal
    assert "that they do not depend on: branch/bias, branch/kernel." in remark


def nearest(z: Any, book: Any) -> Any:
    return book[((z[..., None, :] - book) ** 2).sum(-1).argmin(-1)]


STEPS = {
    "argmin": nearest,
    "top-k": lambda z, book: book[jax.lax.top_k(z, 1)[1][..., 0] % 2],
    "rounding": lambda z, book: jnp.round(z / 8) @ jnp.tile(book, (4, 1)),
}
"""How outputs may depend on what is encoded: in steps alone."""


class LinenCoded(nn.Module):
    step: Callable[[Any, Any], Any]
    more: int

    @nn.compact
    def __call__(self, x):
        encode = self.param("encode", nn.initializers.normal(0.01), (8, 8))
        book = self.param("book", nn.initializers.normal(1.0), (2, 8))
        for number in range(self.more):
            x = x + self.param(f"shift_{number}", nn.initializers.normal(1.0), (8,))
        return nn.Dense(8, name="out")(self.step(x + x @ encode, book))


class Coded(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, step: Callable[[Any, Any], Any], more: int):
        self.encode, self.book = nnx.Param(jnp.zeros((8, 8))), nnx.Param(jnp.zeros((2, 8)))
        for number in range(more):
            setattr(self, f"shift_{number}", nnx.Param(jnp.zeros(8)))
        self.out, self.step, self.more = nnx.Linear(8, 8, rngs=rngs), step, more

    def __call__(self, x):
        for number in range(self.more):
            x = x + getattr(self, f"shift_{number}")[...]
        return self.out(self.step(x + x @ self.encode[...], self.book[...]))


@pytest.mark.parametrize(
    ("step", "more"), [("argmin", 0), ("argmin", 3), ("top-k", 0), ("top-k", 3), ("rounding", 0)]
)
def test_weights_that_outputs_depend_on_by_steps_are_named(tmp_path: pathlib.Path, step: str, more: int):
    linen = LinenCoded(STEPS[step], more)
    checkpoint = save(tmp_path, linen.init(jax.random.key(0), INPUT))
    target = nnx.eval_shape(lambda: Coded(nnx.Rngs(0), STEPS[step], more))
    found = verify(checkpoint, target, linen.apply, lambda model, x: model(x), (INPUT,))

    named = "".join(remark for remark in found.remarks if "the outputs do not tell a small" in remark)
    assert found.equal
    assert "encode" in named
    assert "book" not in named


class LinenGated(nn.Module):
    """A branch with a gate: of its own, or a part of what a modulation makes."""

    is_modulated: bool

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.Dense(8, name="out")(nn.gelu(nn.Dense(8, name="up")(x)))
        if self.is_modulated:
            shift, gate = jnp.split(nn.Dense(16, name="modulation")(x), 2, -1)
            return x + shift + gate * y, None
        return x + self.param("gate", nn.initializers.ones, ()) * y, None


class Gated(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, is_modulated: bool):
        self.up, self.out = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)
        self.modulation = nnx.Linear(8, 16, rngs=rngs) if is_modulated else None
        self.gate = nnx.data(None) if is_modulated else nnx.Param(jnp.ones(()))

    def __call__(self, x):
        y = self.out(nnx.gelu(self.up(x)))
        if self.modulation is None:
            return x + self.gate[...] * y
        shift, gate = jnp.split(self.modulation(x), 2, -1)
        return x + shift + gate * y


class GatedLayers(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        make = nnx.vmap(lambda rngs: Gated(rngs, is_modulated=False), in_axes=0, out_axes=0)
        self.layers = make(rngs.split(3))

    def __call__(self, x):
        return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


class LinenGatedLayers(nn.Module):
    @nn.compact
    def __call__(self, x):
        scan = nn.scan(LinenGated, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scan(is_modulated=False, name="layers")(x, None)[0]


@pytest.mark.parametrize(
    "is_modulated", [True, False], ids=["a part of a modulation", "of one layer of three"]
)
def test_weights_that_a_gate_of_zero_hides_are_named_with_it(tmp_path: pathlib.Path, is_modulated: bool):
    linen = LinenGated(is_modulated) if is_modulated else LinenGatedLayers()
    variables = jax.tree.map(np.array, linen.init(jax.random.key(0), INPUT))
    if is_modulated:
        variables["params"]["modulation"]["kernel"][:, 8:] = 0
        make, apply = lambda: Gated(nnx.Rngs(0), is_modulated), lambda *given: linen.apply(*given)[0]
    else:
        variables["params"]["layers"]["gate"][1] = 0
        make, apply = lambda: GatedLayers(nnx.Rngs(0)), linen.apply
    found = verify(
        save(tmp_path, variables), nnx.eval_shape(make), apply, lambda model, x: model(x), (INPUT,)
    )

    (remark,) = found.remarks
    hidden, gate = ("out", "modulation/kernel") if is_modulated else ("layers/out", "layers/gate")
    assert found.equal
    assert f"{hidden}/kernel" in remark
    assert f"Weights of zero hide them, whatever the inputs are: {gate}." in remark
    assert str(found).startswith("Verification: equal, as far as these outputs tell: ")


class TwoWays(nn.Module):
    """Grouped queries with normed queries and keys, two tables for the same zeros, and two factors."""

    @nn.compact
    def __call__(self, x):
        zeros = jnp.zeros(x.shape[:-1], int)
        x = x + nn.Embed(2, 8, name="kind")(zeros) + nn.Embed(2, 8, name="side")(zeros)
        q = nn.RMSNorm(name="q_norm")(nn.DenseGeneral((4, 2), name="query")(x))
        k = nn.RMSNorm(name="k_norm")(nn.DenseGeneral((2, 2), name="key")(x))
        v = nn.DenseGeneral((2, 2), name="value")(x)
        y = nn.dot_product_attention(q, k.repeat(2, axis=2), v.repeat(2, axis=2))
        x = x + nn.DenseGeneral(8, axis=(-2, -1), name="out")(y)
        return nn.Dense(3, name="down")(nn.Dense(16, name="gate")(x) * nn.Dense(16, name="up")(x))


class TwoWaysTwin(nnx.Module):
    def __init__(self, rngs):
        self.kind, self.side = nnx.Embed(2, 8, rngs=rngs), nnx.Embed(2, 8, rngs=rngs)
        self.query = nnx.LinearGeneral(8, (4, 2), rngs=rngs)
        self.key, self.value = (nnx.LinearGeneral(8, (2, 2), rngs=rngs) for _ in range(2))
        self.q_norm, self.k_norm = nnx.RMSNorm(2, rngs=rngs), nnx.RMSNorm(2, rngs=rngs)
        self.out = nnx.LinearGeneral((4, 2), 8, axis=(-2, -1), rngs=rngs)
        self.gate, self.up = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(8, 16, rngs=rngs)
        self.down = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        zeros = jnp.zeros(x.shape[:-1], int)
        x = x + self.kind(zeros) + self.side(zeros)
        q, k, v = self.q_norm(self.query(x)), self.k_norm(self.key(x)), self.value(x)
        y = nnx.dot_product_attention(q, k.repeat(2, axis=2), v.repeat(2, axis=2))
        x = x + self.out(y)
        return self.down(self.gate(x) * self.up(x))


@pytest.mark.parametrize(
    "renames",
    [(), [("q_norm", "k_norm"), ("k_norm", "q_norm")], [("kind", "side"), ("side", "kind")]],
    ids=["right", "norms exchanged", "tables exchanged"],
)
def test_modules_that_may_be_exchanged_without_a_difference_are_said(tmp_path: pathlib.Path, renames: Any):
    x = jax.random.normal(jax.random.key(2), (2, 6, 8))
    keys = iter(jax.random.split(jax.random.key(1), 99))
    variables = jax.tree.map(
        lambda leaf: leaf + 0.3 * jax.random.normal(next(keys), leaf.shape),
        TwoWays().init(jax.random.key(0), x),
    )
    path = save(tmp_path / "c", variables)
    target = nnx.eval_shape(lambda: TwoWaysTwin(nnx.Rngs(0)))

    found = verify(path, target, TwoWays().apply, lambda model, x: model(x), (x,), renames=renames)

    assert found.equal, found
    said = [remark for remark in found.remarks if "may have each other's weights" in remark]
    assert {remark.partition(" may")[0] for remark in said} == {
        "k_norm and q_norm",
        "kind and side",
        "gate and up",
    }


class Policy(nn.Module):
    """A policy whose spread no output depends on."""

    @nn.compact
    def __call__(self, x):
        self.param("sigma_0", nn.initializers.normal(1.0), (4,))
        return nn.Dense(4, name="mean")(nn.tanh(nn.Dense(8, name="fc1")(x)))


class PolicyTwin(nnx.Module):
    def __init__(self, rngs):
        self.fc1, self.mean = nnx.Linear(5, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)
        self.sigma = nnx.Param(jnp.zeros(4))

    def __call__(self, x):
        return self.mean(jnp.tanh(self.fc1(x)))


def test_a_rule_of_which_the_outputs_tell_nothing_leaves_the_whole_likely(tmp_path: pathlib.Path):
    x = jax.random.normal(jax.random.key(2), (9, 5))
    path = save(tmp_path / "c", Policy().init(jax.random.key(0), x))
    target = nnx.eval_shape(lambda: PolicyTwin(nnx.Rngs(0)))

    found = suggest(path, target, verify=(Policy().apply, lambda model, x: model(x), (x,)))

    assert "tell nothing of weights that they do not depend on: sigma" in str(found)
    assert found.confidence == "likely", found


def attended(q: Any, k: Any, v: Any, *, is_linear: bool) -> Any:
    scores = q @ k.swapaxes(-1, -2) / 8
    return (scores / 16 if is_linear else nn.softmax(scores)) @ v


class LinenAttention(nn.Module):
    is_linear: bool = False

    @nn.compact
    def __call__(self, x):
        q, k, v = (nn.Dense(8, name=name)(x) for name in ("query", "key", "value"))
        return nn.Dense(8, name="out")(attended(q, k, v, is_linear=self.is_linear))


class LinenAttentions(nn.Module):
    is_linear: bool = False

    @nn.compact
    def __call__(self, x):
        for layer in range(2):
            x = x + LinenAttention(self.is_linear, name=f"attention_{layer}")(x)
        return nn.Dense(4, name="head")(x)


class Joined(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, is_linear: bool):
        self.qkv, self.out = nnx.Linear(8, 24, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)
        self.is_linear = is_linear

    def __call__(self, x):
        return self.out(attended(*jnp.split(self.qkv(x), 3, -1), is_linear=self.is_linear))


class Own(nnx.Module):
    """Queries, keys and values in parameters of its own, which no module shows."""

    def __init__(self, rngs: nnx.Rngs, is_linear: bool):
        for name in "qkv":
            setattr(self, f"w{name}", nnx.Param(jnp.zeros((8, 8))))
            setattr(self, f"b{name}", nnx.Param(jnp.zeros(8)))
        self.out, self.is_linear = nnx.Linear(8, 8, rngs=rngs), is_linear

    def __call__(self, x):
        made = (x @ getattr(self, f"w{name}")[...] + getattr(self, f"b{name}")[...] for name in "qkv")
        return self.out(attended(*made, is_linear=self.is_linear))


class Apart(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, is_linear: bool):
        self.query, self.key, self.value, self.out = (nnx.Linear(8, 8, rngs=rngs) for _ in range(4))
        self.is_linear = is_linear

    def __call__(self, x):
        made = (each(x) for each in (self.query, self.key, self.value))
        return self.out(attended(*made, is_linear=self.is_linear))


class Attentions(nnx.Module):
    def __init__(self, kind: Any, rngs: nnx.Rngs, is_linear: bool):
        self.attention = nnx.List([kind(rngs, is_linear) for _ in range(2)])
        self.head = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        for each in self.attention:
            x = x + each(x)
        return self.head(x)


PARTS = ("query", "key", "value")
RULES = {
    Joined: [
        Fuse([f"{part}/{name}" for part in PARTS], f"qkv/{name}", axis=-1) for name in ("kernel", "bias")
    ],
    Own: [
        (f"{part}/{name}", f"{letter}{part[0]}")
        for part in PARTS
        for name, letter in {"kernel": "w", "bias": "b"}.items()
    ],
    Apart: [],
}


@pytest.mark.parametrize("is_linear", [False, True], ids=["softmax", "linear"])
@pytest.mark.parametrize("kind", RULES)
def test_a_bias_of_keys_that_no_module_shows_is_said_to_be_untold(
    tmp_path: pathlib.Path, kind: Any, is_linear: bool
):
    linen = LinenAttentions(is_linear)
    random = np.random.default_rng(0)
    variables = linen.init(jax.random.key(0), INPUT)
    variables = jax.tree.map(lambda leaf: leaf + random.normal(size=leaf.shape).astype("f") / 4, variables)
    target = nnx.eval_shape(lambda: Attentions(kind, nnx.Rngs(0), is_linear))
    rules = [("attention_{i}", "attention/{i}"), *RULES[kind]]
    pair = (linen.apply, lambda model, x: model(x), (INPUT,))

    found = verify(save(tmp_path, variables), target, *pair, renames=rules)

    assert (found.equal, found.remarks) == (True, ())
    if kind is Apart or is_linear:
        assert found.without_effect == ()
        return
    where = "attention/{0..1}/" + {Joined: "qkv/bias", Own: "bk"}[kind]
    (said,) = found.without_effect
    assert said in " ".join(str(found).split())
    assert said.startswith(f"the outputs do not depend on params/attention_{{0..1}}/key/bias in {where}, ")
    assert "which a softmax takes away" in said


EXPERTS, IDLE = 8, [0, 3, 6]


class LinenSparse(nn.Module):
    """Each token goes to two experts, whose weights are stacked in parameters of the module itself."""

    @nn.compact
    def __call__(self, x):
        gate, up, down = (
            self.param(name, nn.initializers.normal(1.0), (EXPERTS, 8, 8)) for name in ("gate", "up", "down")
        )
        return sent(x, nn.Dense(EXPERTS, name="router")(x), gate, up, down)


def sent(x: Any, routed: Any, gate: Any, up: Any, down: Any) -> Any:
    weight, to = jax.lax.top_k(routed, 2)
    inner = nn.silu(jnp.einsum("btd,btkdf->btkf", x, gate[to])) * jnp.einsum("btd,btkdf->btkf", x, up[to])
    return jnp.einsum("btkf,btkfd,btk->btd", inner, down[to], nn.softmax(weight))


class Sparse(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.router = nnx.Linear(8, EXPERTS, rngs=rngs)
        self.gate, self.up, self.down = (nnx.Param(jnp.zeros((EXPERTS, 8, 8))) for _ in range(3))

    def __call__(self, x):
        return sent(x, self.router(x), self.gate[...], self.up[...], self.down[...])


@pytest.mark.parametrize("idle", [IDLE, []], ids=["some idle", "all used"])
def test_of_many_experts_those_are_named_that_no_token_is_sent_to(tmp_path: pathlib.Path, idle: list[int]):
    x = np.random.default_rng(0).normal(size=(4, 32, 8)).astype("f")
    variables = LinenSparse().init(jax.random.key(0), x)
    variables["params"]["router"]["bias"] = np.where(np.isin(np.arange(EXPERTS), idle), -50, 0).astype("f")
    target = nnx.eval_shape(lambda: Sparse(nnx.Rngs(0)))

    found = verify(save(tmp_path, variables), target, LinenSparse().apply, lambda model, x: model(x), (x,))

    assert found.equal
    said = [remark for remark in found.remarks if "experts" in remark]
    assert bool(said) == bool(idle), found.remarks
    assert not idle or said[0].startswith(
        "these inputs do not reach the experts 0, 3, 6 of 8 in down, gate, up: whether their weights"
    )
