"""Questions of a proposal, settled by running both programs: each at the smallest module that tells."""

import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from orbax_nnx_handler import (
    Add,
    Fuse,
    Suggestion,
    UnstackLayers,
    VerificationError,
    restore,
    suggest,
    verify,
)
from tests.sampled import every
from tests.verifying.twins import BERT, GEMMA, TRANSLATOR, TWINS, Twin

Save = Callable[[Twin], pathlib.Path]


def settled(twin: Twin, path: pathlib.Path) -> Suggestion:
    return suggest(path, nnx.eval_shape(twin.make), verify=(twin.linen.apply, twin.run, twin.inputs))


@pytest.mark.parametrize(
    "twin", every(2, [twin for twin in TWINS if not twin.options]), ids=lambda twin: twin.name
)
def test_a_whole_conversion_is_proposed_and_proved(twin: Twin, saved: Save):
    found = settled(twin, saved(twin))

    assert found.questions == ()
    assert found.unmatched_wanted == ()
    assert found.confidence == "certain"
    assert "# proved by outputs: both programs return the same within" in str(found)
    # Of the right rules test_verify shows that the outputs are equal.
    right, proposed = (
        nnx.to_flat_state(
            nnx.state(restore(saved(twin), nnx.eval_shape(twin.make), renames=rules), nnx.Not(nnx.RngState))
        )
        for rules in (twin.rules, found.renames)
    )
    differing = [
        path
        for (path, one), (_, other) in zip(right, proposed, strict=True)
        if not np.array_equal(one.get_value(), other.get_value())
    ]
    assert differing == []


def test_what_only_shapes_allow_is_asked_and_no_rule_rests_on_it(saved: Save):
    gemma = str(suggest(saved(GEMMA), nnx.eval_shape(GEMMA.make)))
    squares = str(suggest(saved(ODD), nnx.eval_shape(ODD.make)))

    assert (
        "# question: how is layers/attn/kv_einsum made into layers/self_attn/k_proj, layers/self_attn/v_proj?"
        in gemma
    )
    assert "Repeat" not in gemma
    assert "# question: which of delta, gamma is " in squares
    assert "# no rule is proposed." in squares


class Odd(nn.Module):
    """Square matrices and norms of one shape, under names that tell nothing."""

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(name="alpha")(x)
        x = nn.tanh(nn.Dense(6, name="gamma")(x))
        x = nn.LayerNorm(name="beta")(x)
        return nn.Dense(6, name="delta")(x)


class OddTwin(nnx.Module):
    """Calls them in the other order of their names."""

    def __init__(self, rngs):
        self.one, self.two = nnx.LayerNorm(6, rngs=rngs), nnx.LayerNorm(6, rngs=rngs)
        self.three, self.four = nnx.Linear(6, 6, rngs=rngs), nnx.Linear(6, 6, rngs=rngs)

    def __call__(self, x):
        return self.three(self.one(nnx.tanh(self.four(self.two(x)))))


_X = np.random.default_rng(5).normal(size=(3, 6)).astype("f")
ODD = Twin(name="odd", linen=Odd(), make=lambda: OddTwin(nnx.Rngs(0)), inputs=(_X,), rules=[])


def test_names_that_tell_nothing_are_settled_by_the_outputs(saved: Save):
    before = suggest(saved(ODD), nnx.eval_shape(ODD.make))
    found = settled(ODD, saved(ODD))

    assert before.questions
    assert "verify=(linen_apply, nnx_apply, inputs)" in str(before)
    assert found.confidence == "certain", found
    assert {item.grounds for item in found.proposals} == {"outputs"}
    assert "('alpha', 'two'),  # proved by outputs" in str(found)
    assert sorted(map(str, found.renames)) == [
        "('alpha', 'two')",
        "('beta', 'one')",
        "('delta', 'three')",
        "('gamma', 'four')",
    ]


class Joined(nn.Module):
    """Three projections of one width."""

    @nn.compact
    def __call__(self, x):
        q, k, v = (nn.Dense(6, name=name)(x) for name in ("query", "key", "value"))
        return nn.softmax(q @ k.T) @ v


class JoinedTwin(nnx.Module):
    """Has them as one."""

    def __init__(self, rngs):
        self.qkv = nnx.Linear(6, 18, rngs=rngs)

    def __call__(self, x):
        q, k, v = jnp.split(self.qkv(x), 3, -1)
        return nnx.softmax(q @ k.T) @ v


JOINED = Twin(name="joined", linen=Joined(), make=lambda: JoinedTwin(nnx.Rngs(0)), inputs=(_X,), rules=[])
SWAPPED = [("alpha", "one"), ("beta", "two"), ("gamma", "four"), ("delta", "three")]
WRONGLY = [
    Fuse(("query/bias", "key/bias", "value/bias"), "qkv/bias", axis=0),
    Fuse(("key/kernel", "query/kernel", "value/kernel"), "qkv/kernel", axis=1),
]


@pytest.mark.parametrize(
    ("twin", "rules", "wrong", "proved"),
    [
        (ODD, SWAPPED, SWAPPED[:2], "was given"),
        (JOINED, WRONGLY, WRONGLY[1:], "kernel joined in another order"),
    ],
    ids=["exchanged", "joined"],
)
def test_given_rules_that_outputs_prove_wrong_are_named_and_found_right_without(
    twin: Twin, rules: list[Any], wrong: list[Any], proved: str, saved: Save
):
    path, target = saved(twin), nnx.eval_shape(twin.make)
    pair = (twin.linen.apply, twin.run, twin.inputs)

    found = suggest(path, target, renames=rules, verify=pair)
    again = suggest(path, target, renames=[rule for rule in rules if rule not in wrong], verify=pair)

    assert proved in found.proof
    words = f"Given rules make it so: correct or take out {' and '.join(map(str, wrong))}, and run it again."
    assert found.proof.endswith(words)
    assert again.is_proved, again


def test_however_often_rules_change_the_linen_program_runs_once(saved: Save):
    runs: list[str] = []

    def linen(variables: Any, x: Any) -> Any:
        runs.append("linen")
        return ODD.linen.apply(variables, x)

    def ours(model: Any, x: Any) -> Any:
        runs.append("nnx")
        return ODD.run(model, x)

    found = suggest(saved(ODD), nnx.eval_shape(ODD.make), verify=(linen, ours, ODD.inputs))

    assert found.confidence == "certain"
    assert runs.count("linen") == 1 < runs.count("nnx")


def as_initialised(twin: Twin, path: pathlib.Path) -> pathlib.Path:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, twin.linen.init(jax.random.key(0), *twin.inputs))
    return path


def test_norms_that_are_all_the_same_are_told_by_what_they_are_called_with(tmp_path: pathlib.Path):
    found = settled(ODD, as_initialised(ODD, tmp_path / "c"))

    assert found.confidence == "certain", found
    assert {"('alpha', 'two')", "('beta', 'one')"} <= {*map(str, found.renames)}


class Beside(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.LayerNorm(name="alpha")(x) + 2 * nn.LayerNorm(name="beta")(x)


class BesideTwin(nnx.Module):
    def __init__(self, rngs):
        self.one, self.two = nnx.LayerNorm(6, rngs=rngs), nnx.LayerNorm(6, rngs=rngs)

    def __call__(self, x):
        return self.two(x) + 2 * self.one(x)


BESIDE = Twin(name="beside", linen=Beside(), make=lambda: BesideTwin(nnx.Rngs(0)), inputs=(_X,), rules=[])


def test_a_question_that_outputs_do_not_tell_stays_open(tmp_path: pathlib.Path):
    # Norms as they were initialised are all the same.
    found = settled(BESIDE, as_initialised(BESIDE, tmp_path / "c"))

    assert found.questions
    assert found.confidence == "open"
    assert "# both programs were run, and return the same under more than one answer" in str(found)
    assert "suggest(..., verify=" not in str(found)


class BesideMore(BesideTwin):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.shift = nnx.Param(jnp.ones((7,)))


def test_leaves_that_nothing_is_stored_for_are_told_and_no_other_inputs_are_asked_for(tmp_path: pathlib.Path):
    path, make = as_initialised(BESIDE, tmp_path / "c"), lambda: BesideMore(nnx.Rngs(0))
    found = suggest(
        path, nnx.eval_shape(make), init=make, verify=(BESIDE.linen.apply, BESIDE.run, BESIDE.inputs)
    )

    assert found.questions
    assert "both programs were run, but 1 leaf is still without a source" in found.proof
    assert "write rules for shift first" in found.proof


def test_where_no_answer_makes_the_programs_equal_other_inputs_are_not_asked_for(tmp_path: pathlib.Path):
    def doubled(model: Any, *inputs: Any) -> Any:
        return 2 * model(*inputs)

    verify = (BESIDE.linen.apply, doubled, BESIDE.inputs)
    # Norms as they were initialised are all the same.
    path = as_initialised(BESIDE, tmp_path / "c")
    found = suggest(path, nnx.eval_shape(BESIDE.make), verify=verify)

    assert found.questions
    assert "under the first answer to what is open they do not return the same" in found.proof


def test_programs_that_differ_leave_a_word_on_where(saved: Save):
    def doubled(model: Any, *inputs: Any) -> Any:
        return 2 * model(*inputs)

    found = suggest(
        saved(TRANSLATOR),
        nnx.eval_shape(TRANSLATOR.make),
        verify=(TRANSLATOR.linen.apply, doubled, TRANSLATOR.inputs),
    )

    assert found.questions == ()
    assert (found.confidence, found.is_proved, found.is_refuted) == ("open", False, True)
    assert "not proven: the programs return different values under these rules" in found.proof
    assert "# confidence: open\n" in str(found)


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(3, name="out")(nn.RNN(nn.GRUCell(8), name="rnn")(x))


class Recurring(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.cell = nnx.GRUCell(4, 8, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(nnx.RNN(self.cell)(x))


def test_programs_are_not_run_where_rules_leave_a_value_that_counts(tmp_path: pathlib.Path):
    # Linen's GRU has a bias that nnx.GRUCell has no place for; no restore may drop it but at zero.
    x = jax.random.normal(jax.random.key(0), (2, 5, 4))
    variables = jax.tree.map(lambda leaf: leaf + 0.1, Recurrent().init(jax.random.key(1), x))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", variables)

    verify = (Recurrent().apply, lambda model, x: model(x), (x,))
    found = suggest(tmp_path / "c", nnx.eval_shape(lambda: Recurring(nnx.Rngs(0))), verify=verify)

    assert not found.is_proved
    assert found.proof.startswith("not run: 1 stored value")
    assert "Drop('hn/bias', 'why')" in str(found)


def test_a_program_that_fails_is_an_error(saved: Save):
    with pytest.raises(VerificationError, match="nnx_apply fails: ZeroDivisionError"):
        suggest(
            saved(TRANSLATOR),
            nnx.eval_shape(TRANSLATOR.make),
            verify=(TRANSLATOR.linen.apply, lambda *_: 1 // 0, TRANSLATOR.inputs),
        )


class Bloom(nn.Module):
    """One array of queries, keys and values, head by head."""

    @nn.compact
    def __call__(self, x):
        fused = nn.Dense(24, name="query_key_value")(x).reshape(*x.shape[:-1], 2, 12)
        q, k, v = (part.swapaxes(-2, -3) for part in jnp.split(fused, 3, axis=-1))
        heads = nn.softmax(q @ k.swapaxes(-1, -2)) @ v
        return nn.Dense(8, name="dense")(heads.swapaxes(-2, -3).reshape(x.shape))


class BloomTwin(nnx.Module):
    """Queries, keys and values apart, or in one array side by side."""

    def __init__(self, *, fused, rngs):
        names = ("qkv",) if fused else ("q_proj", "k_proj", "v_proj")
        for name in names:
            setattr(self, name, nnx.Linear(8, 24 // len(names), rngs=rngs))
        self.names, self.o_proj = names, nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        fused = jnp.concatenate([getattr(self, name)(x) for name in self.names], -1)
        parts = (part.reshape(*x.shape[:-1], 2, 4) for part in jnp.split(fused, 3, axis=-1))
        q, k, v = (part.swapaxes(-2, -3) for part in parts)
        heads = nnx.softmax(q @ k.swapaxes(-1, -2)) @ v
        return self.o_proj(heads.swapaxes(-2, -3).reshape(x.shape))


def bloom(tokens: int, *, fused: bool = False) -> Twin:
    x = np.random.default_rng(7).normal(size=(2, tokens, 8)).astype("f")
    return Twin(
        name=f"bloom_{tokens}_{fused}",
        linen=Bloom(),
        make=lambda: BloomTwin(fused=fused, rngs=nnx.Rngs(0)),
        inputs=(x,),
        rules=[],
    )


@pytest.mark.parametrize("fused", [False, True])
def test_arrays_head_by_head_or_side_by_side_are_told_by_the_outputs(saved: Save, fused: bool):
    twin = bloom(5, fused=fused)
    path = saved(twin)

    (question,) = suggest(path, nnx.eval_shape(twin.make)).questions
    found = settled(twin, path)

    assert question.choices[:2] == ("side by side", "head by head, 2 heads")
    assert found.confidence == "certain", found


def test_a_single_token_proves_nothing_of_queries_and_keys(saved: Save):
    twin = bloom(1)

    found = settled(twin, saved(twin))

    assert found.confidence == "likely"
    assert "do not depend on: k_proj/bias, k_proj/kernel, q_proj/bias, q_proj/kernel. Choose" in found.proof


class Nameless(nn.Module):
    """Attention over four square layers, under names that tell nothing (SAGAN's)."""

    @nn.compact
    def __call__(self, x):
        q, k, v = (nn.Dense(8, name=name)(x) for name in "fgh")
        return nn.Dense(8, name="s")(nn.softmax(q @ k.swapaxes(-1, -2)) @ v)


class NamelessTwin(nnx.Module):
    def __init__(self, rngs):
        self.t1, self.t2, self.t3, self.t4 = (nnx.Linear(8, 8, rngs=rngs) for _ in range(4))

    def __call__(self, x):
        return self.t1(nnx.softmax(self.t3(x) @ self.t4(x).swapaxes(-1, -2)) @ self.t2(x))


@pytest.mark.parametrize("tokens", [1, 5])
def test_of_all_orders_of_four_parts_the_one_is_found_that_outputs_tell_and_none_that_they_do_not(
    saved: Save, tokens: int
):
    x = np.random.default_rng(7).normal(size=(4, tokens, 8)).astype("f")
    twin = Twin(
        name=f"nameless_{tokens}",
        linen=Nameless(),
        make=lambda: NamelessTwin(nnx.Rngs(0)),
        inputs=(x,),
        rules=[],
    )

    found = settled(twin, saved(twin))

    if tokens > 1:
        assert found.confidence == "certain", found
        assert sorted(map(str, found.renames)) == ["('f', 't3')", "('g', 't4')", "('h', 't2')", "('s', 't1')"]
    else:  # Of one token nothing tells f from g.
        assert (found.renames, found.confidence) == ((), "open")


class Chain(nn.Module):
    @nn.compact
    def __call__(self, x):
        for name in "fghkmn":
            x = nn.tanh(nn.Dense(8, name=name)(x))
        return x


class ChainTwin(nnx.Module):
    def __init__(self, rngs):
        self.t1, self.t2, self.t3, self.t4, self.t5, self.t6 = (nnx.Linear(8, 8, rngs=rngs) for _ in range(6))

    def __call__(self, x):
        for layer in (self.t4, self.t1, self.t6, self.t2, self.t5, self.t3):
            x = nnx.tanh(layer(x))
        return x


def test_of_more_orders_than_a_question_lists_the_one_is_found_that_modules_inputs_tell(saved: Save):
    x = np.random.default_rng(8).normal(size=(4, 8)).astype("f")
    twin = Twin(name="chain", linen=Chain(), make=lambda: ChainTwin(nnx.Rngs(0)), inputs=(x,), rules=[])

    found = settled(twin, saved(twin))

    assert found.confidence == "certain", found
    right = zip("fghkmn", (4, 1, 6, 2, 5, 3), strict=True)
    assert sorted(map(str, found.renames)) == [f"('{name}', 't{at}')" for name, at in right]


@pytest.mark.parametrize("given", [5, (), (lambda *_: 0, lambda *_: 0), "programs.py:PAIR", {"inputs": ()}])
def test_what_is_no_pair_of_programs_is_told_before_anything_is_searched(given: Any):
    with pytest.raises(VerificationError, match=r"verify is a .*: it takes \(linen_apply"):
        suggest("nowhere", nnx.eval_shape(BERT.make), verify=given)


class OffByOne(nn.Module):
    """A norm whose scale is stored less one, as Gemma's."""

    @nn.compact
    def __call__(self, x):
        weight = self.param("weight", nn.initializers.normal(0.3), (8,))
        return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6) * (1 + weight)


class OffByOneLayer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(8, name="fc")(OffByOne(name="ln")(x)), None


class OffByOneLayers(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(OffByOneLayer, variable_axes={"params": 1}, split_rngs={"params": True}, length=3)
        return OffByOne(name="ln_f")(layers(name="h")(x, None)[0])


class Scaled(nnx.Module):
    def __init__(self):
        self.scale = nnx.Param(jnp.ones(8))

    def __call__(self, x):
        return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6) * self.scale[...]


class ScaledLayer(nnx.Module):
    def __init__(self, rngs):
        self.norm, self.lin = Scaled(), nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return x + self.lin(self.norm(x))


class ScaledLayers(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([ScaledLayer(rngs) for _ in range(3)])
        self.final_norm = Scaled()

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.final_norm(x)


UNSTACKED = [UnstackLayers("h", "layers/{i}", axis=1)]
NAMED = [("ln/weight", "norm/scale"), ("ln_f/weight", "final_norm/scale"), ("fc", "lin")]


@pytest.mark.parametrize("rules", [[], UNSTACKED, [*UNSTACKED, *NAMED]], ids=["none", "stack", "all names"])
def test_what_outputs_prove_is_proposed_beside_whatever_rules_are_settled(saved: Save, rules: list[Any]):
    twin = Twin(
        name="off_by_one",
        linen=OffByOneLayers(),
        make=lambda: ScaledLayers(nnx.Rngs(0)),
        inputs=(np.random.default_rng(3).normal(size=(2, 5, 8)).astype("f"),),
        rules=[],
    )

    found = suggest(
        saved(twin),
        nnx.eval_shape(twin.make),
        renames=rules,
        verify=(twin.linen.apply, twin.run, twin.inputs),
    )

    assert found.confidence == "certain", found
    assert sum(isinstance(rule, Add) and rule.constant == 1 for rule in found.renames) == 2


class _Scaled(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(6, name="up")(x) * jnp.arange(1.0, 7.0)


class _ScaledByTable(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(4, 6, rngs=rngs)
        self.table = nnx.Cache(jnp.arange(1.0, 7.0))

    def __call__(self, x):
        return self.dense(x) * self.table[...]


def _of_table(tmp_path):
    linen, inputs = _Scaled(), jax.random.normal(jax.random.key(2), (2, 4))
    path = tmp_path / "run"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, linen.init(jax.random.key(0), inputs))
    programs = (linen.apply, lambda model, *args: model(*args), (inputs,))
    return path, lambda: _ScaledByTable(nnx.Rngs(1)), programs


def test_what_a_program_computes_as_it_is_built_is_there_where_questions_are_settled(tmp_path):
    path, make, programs = _of_table(tmp_path)

    found = suggest(path, nnx.eval_shape(make), init=make, verify=programs)

    assert found.confidence == "certain"
    assert "proved by outputs" in str(found)


def test_zeros_in_the_place_of_a_table_are_named_with_the_way_out(tmp_path):
    path, make, programs = _of_table(tmp_path)

    found = verify(path, nnx.eval_shape(make), *programs, renames=[("up", "dense")])

    assert not found.equal
    assert "table: not stored, and filled with zeros" in " ".join(str(found).split())
    assert verify(path, nnx.eval_shape(make), *programs, renames=[("up", "dense")], init=make).equal


class _State(nnx.Module):
    def __init__(self, make):
        self.model = make()
        self.optimizer = nnx.Optimizer(self.model, optax.adam(1e-3), wrt=nnx.Param)


def test_moments_are_proved_with_the_parameters_that_they_belong_to(tmp_path):
    linen, inputs = nn.Dense(6), jax.random.normal(jax.random.key(2), (2, 4))
    variables = jax.tree.map(lambda leaf: leaf + 0.3, linen.init(jax.random.key(0), inputs))
    state = TrainState.create(apply_fn=linen.apply, params=variables["params"], tx=optax.adam(1e-3))
    path = tmp_path / "run"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, {"params": state.params, "opt_state": state.opt_state, "step": state.step})
    programs = (linen.apply, lambda held, x: held.model(x), (inputs,))

    def make():
        return _State(lambda: nnx.Linear(4, 6, rngs=nnx.Rngs(1)))

    found = suggest(path, nnx.eval_shape(make), init=make, verify=programs)

    assert (found.confidence, found.unmatched_wanted) == ("certain", ())
    assert found.proof.startswith("proved by outputs")


class Followed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(nn.LayerNorm(name="last_ln")(x))


class FollowedTwin(nnx.Module):
    def __init__(self, rngs):
        self.fin, self.out = nnx.LayerNorm(6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(self.fin(x))


@pytest.mark.parametrize("left", ["aaa", "last_ln_b"])
def test_of_two_modules_one_of_which_is_never_called_the_other_one_is_proved(
    left: str, tmp_path: pathlib.Path
):
    weights = Followed().init(jax.random.key(0), _X)["params"]
    weights = jax.tree.map(lambda x: x + jax.random.normal(jax.random.key(x.size), x.shape), weights)
    weights[left] = jax.tree.map(lambda x: 2 * x + 1, weights["last_ln"])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path := tmp_path / "c", {"params": weights})
    target = nnx.eval_shape(lambda: FollowedTwin(nnx.Rngs(0)))

    found = suggest(path, target, verify=(Followed().apply, lambda model, x: model(x), (_X,)))

    assert not found.questions
    assert "proved by outputs" in found.proof


_MATRICES = ("amber", "coral", "olive", "ruby")


class GatedCell(nn.RNNCellBase):
    """Multiplies its carry alone, with matrices of its own."""

    @nn.compact
    def __call__(self, carry: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        each = [self.param(name, nn.initializers.normal(), (6, 6)) for name in _MATRICES]
        new = nn.tanh(x + sum(at * nn.tanh(carry @ one) for at, one in enumerate(each, 1)))
        return new, new

    @property
    def num_feature_axes(self) -> int:
        return 1

    def initialize_carry(self, rng: jax.Array, input_shape: tuple[int, ...]) -> jax.Array:  # noqa: ARG002
        return jnp.zeros(input_shape)


class GatedCells(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for name in ("lower", "upper"):
            x = nn.RNN(GatedCell(name=name))(x)
        return nn.Dense(3, name="out")(x)


class GatedCellTwin(nnx.Module):
    """Calls the matrices otherwise, and by the alphabet in another order."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        for name in ("four", "two", "one", "three"):
            setattr(self, name, nnx.Param(jax.random.normal(rngs.params(), (6, 6))))

    def __call__(self, carry: jax.Array, x: jax.Array) -> jax.Array:
        each = (self.four, self.two, self.one, self.three)
        return nnx.tanh(x + sum(at * nnx.tanh(carry @ one[...]) for at, one in enumerate(each, 1)))


class GatedCellsTwin(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.lower, self.upper = GatedCellTwin(rngs), GatedCellTwin(rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for cell in (self.lower, self.upper):
            carries = [jnp.zeros_like(x[:, 0])]
            for at in range(x.shape[1]):
                carries.append(cell(carries[-1], x[:, at]))
            x = jnp.stack(carries[1:], axis=1)
        return self.head(x)


GATED = Twin(
    name="gated cells",
    linen=GatedCells(),
    make=lambda: GatedCellsTwin(nnx.Rngs(0)),
    inputs=(np.random.default_rng(6).normal(size=(2, 5, 6)).astype("f"),),
    rules=[],
)


def test_a_cell_is_tried_on_later_calls_where_the_first_does_not_tell(saved: Save):
    # With a carry of zeros every order of the matrices is right, and of two cells all orders are too many.
    found = settled(GATED, saved(GATED))

    assert found.confidence == "certain", found
    pairs = zip(_MATRICES, ("four", "two", "one", "three"), strict=True)
    assert {str(pair) for pair in pairs} <= {*map(str, found.renames)}


class UpBlock(nn.Module):
    """A part that is called with the same in every block, as a time's embedding is, among others."""

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
        hidden = nn.Dense(8)(nn.LayerNorm()(x)) + nn.Dense(8)(nn.silu(time))
        return nn.Dense(8)(nn.silu(nn.LayerNorm()(hidden)))


class UpBlocks(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
        half = UpBlock()(jnp.concatenate([x[:, ::2], x[:, 1::2]], -1), time)
        return nn.Dense(3)(UpBlock()(jnp.concatenate([jnp.repeat(half, 2, 1), x], -1), time))


class UpBlockTwin(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm1, self.lin1 = nnx.LayerNorm(16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)
        self.time = nnx.Linear(6, 8, rngs=rngs)
        self.norm2, self.lin2 = nnx.LayerNorm(8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
        hidden = self.lin1(self.norm1(x)) + self.time(nnx.silu(time))
        return self.lin2(nnx.gelu(self.norm2(hidden)))  # Linen's program has a silu.


class UpBlocksTwin(nnx.Module):
    """Numbers its blocks outside in."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up = nnx.List([UpBlockTwin(rngs), UpBlockTwin(rngs)])
        self.out = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
        half = self.up[1](jnp.concatenate([x[:, ::2], x[:, 1::2]], -1), time)
        return self.out(self.up[0](jnp.concatenate([jnp.repeat(half, 2, 1), x], -1), time))


def test_of_a_model_that_stays_wrong_only_what_its_run_shows_is_proved(saved: Save):
    random = np.random.default_rng(0)
    inputs = (random.normal(size=(4, 6, 8)).astype("f"), random.normal(size=(4, 1, 6)).astype("f"))
    make = lambda: UpBlocksTwin(nnx.Rngs(0))  # noqa: E731
    twin = Twin(name="up blocks", linen=UpBlocks(), make=make, inputs=inputs, rules=[])

    found = settled(twin, saved(twin))
    why = {str(item.rule): item.why for item in found.proposals}

    assert found.is_refuted
    told = [rule for rule, words in why.items() if words == "proved by outputs"]
    assert not [rule for rule in told if "time" in rule or "norm2" in rule or "lin2" in rule], found
    assert "# by outputs of single modules, not proved" in str(found)


class LinenScannedAttention(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        q, k, v = (nn.Dense(8, name=name)(x) for name in ("query", "key", "value"))
        return x + nn.softmax(q @ k.swapaxes(-1, -2)) @ v, None


class LinenScannedAttentions(nn.Module):
    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            LinenScannedAttention, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return scan(name="layers")(x, None)[0]


class KeysFirst(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.qkv = nnx.Linear(8, 24, rngs=rngs)

    def __call__(self, x):
        k, q, v = jnp.split(self.qkv(x), 3, -1)
        return x + nn.softmax(q @ k.swapaxes(-1, -2)) @ v


class ScannedKeysFirst(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.vmap(KeysFirst, in_axes=0, out_axes=0)(rngs.split(3))

    def __call__(self, x):
        return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


def test_an_order_that_one_layer_proves_is_that_of_all_where_both_sides_stack_them(tmp_path: pathlib.Path):
    x, random = jax.random.normal(jax.random.key(1), (3, 6, 8)), np.random.default_rng(0)
    linen = LinenScannedAttentions()
    variables = jax.tree.map(
        lambda leaf: np.asarray(leaf + random.normal(size=leaf.shape), "f"), linen.init(jax.random.key(0), x)
    )
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", variables)
    target = nnx.eval_shape(lambda: ScannedKeysFirst(nnx.Rngs(0)))
    found = suggest(tmp_path / "checkpoint", target, verify=(linen.apply, lambda model, x: model(x), (x,)))

    assert found.confidence == "certain", found
    assert sorted((rule.patterns[0], rule.axis) for rule in found.renames if isinstance(rule, Fuse)) == [
        ("key/bias", 1),
        ("key/kernel", 2),
    ]


def test_programs_that_differ_are_no_likely_proposal_where_what_is_proved_no_rule_says(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Suggestion, "answered", lambda self, _, changes=(): () if changes else self.renames)
    x, linen = jax.random.normal(jax.random.key(1), (3, 6, 8)), LinenScannedAttentions()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", linen.init(jax.random.key(0), x))
    target = nnx.eval_shape(lambda: ScannedKeysFirst(nnx.Rngs(0)))
    found = suggest(tmp_path / "checkpoint", target, verify=(linen.apply, lambda model, x: model(x), (x,)))

    assert found.confidence == "open"
    assert found.is_refuted
    assert "not proven: the programs return different values" in found.proof


class TwoWays(nn.Module):
    """A cell of gates that reads forwards, and one that reads backwards."""

    @nn.compact
    def __call__(self, x):
        forwards = nn.RNN(nn.GRUCell(6, name="fw"), name="rnn_fw")
        backwards = nn.RNN(nn.GRUCell(6, name="bw"), reverse=True, keep_order=True, name="rnn_bw")
        return nn.Dense(3, name="head")(jnp.concatenate([forwards(x), backwards(x)], -1))


class Gates(nnx.Module):
    """A cell with a layer for each gate of what is read, and of what is carried."""

    def __init__(self, rngs):
        for name in "rzn":
            setattr(self, f"x_{name}", nnx.Linear(6, 6, rngs=rngs))
            setattr(self, f"h_{name}", nnx.Linear(6, 6, use_bias=name == "n", rngs=rngs))

    def __call__(self, carry, x):
        reset = nnx.sigmoid(self.x_r(x) + self.h_r(carry))
        update = nnx.sigmoid(self.x_z(x) + self.h_z(carry))
        new = nnx.tanh(self.x_n(x) + reset * self.h_n(carry))
        return (1 - update) * new + update * carry


class BothWays(nnx.Module):
    """Calls its second cell first."""

    def __init__(self, rngs):
        self.a, self.b = Gates(rngs), Gates(rngs)

    def __call__(self, x):
        read = [self.read(self.b, x), self.read(self.a, x[:, ::-1])[:, ::-1]]
        return jnp.concatenate(read, -1)

    def read(self, cell, x):
        carry, found = jnp.zeros(x[:, 0].shape), []
        for at in range(x.shape[1]):
            carry = cell(carry, x[:, at])
            found.append(carry)
        return jnp.stack(found, 1)


class TwoWaysTwin(nnx.Module):
    def __init__(self, rngs):
        self.rnn, self.out = BothWays(rngs), nnx.Linear(12, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(self.rnn(x))


_READ = np.random.default_rng(6).normal(size=(2, 4, 6)).astype("f")
TWO_WAYS = Twin(
    name="two_ways",
    linen=TwoWays(),
    make=lambda: TwoWaysTwin(nnx.Rngs(0)),
    inputs=(_READ,),
    rules=[],
)


def test_gates_of_both_directions_are_settled_where_each_exchange_shows(saved: Save):
    before = suggest(saved(TWO_WAYS), nnx.eval_shape(TWO_WAYS.make))
    found = settled(TWO_WAYS, saved(TWO_WAYS))

    assert len(before.questions) > 1
    assert not found.questions, found
    assert found.is_proved
    for name in ("hn", "hr", "hz", "in", "ir", "iz"):
        wanted = name.replace("h", "h_").replace("i", "x_")
        assert f"('fw/{name}', 'rnn/b/{wanted}')" in str(found)
        assert f"('bw/{name}', 'rnn/a/{wanted}')" in str(found)


class Summed(nn.Module):
    """Four layers of one input that are added: which is which, nothing tells."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="last")(sum(nn.Dense(6, name=name)(x) for name in ("p", "q", "s", "t")))


class SummedTwin(nnx.Module):
    def __init__(self, rngs):
        self.c, self.d, self.e, self.f = (nnx.Linear(6, 6, rngs=rngs) for _ in range(4))
        self.out = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(self.c(x) + self.d(x) + self.e(x) + self.f(x))


SUMMED = Twin(name="summed", linen=Summed(), make=lambda: SummedTwin(nnx.Rngs(0)), inputs=(_X,), rules=[])


def test_what_may_be_exchanged_without_a_difference_stays_a_question(saved: Save):
    found = settled(SUMMED, saved(SUMMED))

    assert found.questions
    assert found.confidence == "open"


class Sums(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, name="stem")(x)
        return nn.Dense(6, name="ham")(x) + nn.Dense(6, name="egg")(nn.tanh(x))


class SumsOfMore(nnx.Module):
    """The same, and a gain that the checkpoint lacks: what its outputs are, nothing tells."""

    def __init__(self, rngs: nnx.Rngs):
        self.stem, self.oak, self.elm = (nnx.Linear(6, 6, rngs=rngs) for _ in range(3))
        self.gain = nnx.Param(jnp.zeros((5,)))

    def __call__(self, x):
        x = self.stem(x)
        return (self.oak(x) + self.elm(jnp.tanh(x))) * self.gain[...].sum()


def test_what_outputs_leave_open_is_answered_as_any_question(tmp_path: pathlib.Path):
    x = np.random.default_rng(0).normal(size=(3, 6)).astype("f")
    variables = Sums().init(jax.random.key(0), x)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path := tmp_path / "linen", variables)
    target = nnx.eval_shape(lambda: SumsOfMore(nnx.Rngs(0)))

    found = suggest(path, target, verify=(Sums().apply, lambda model, x: model(x), (x,)))

    (question,) = found.questions
    for at, choice in enumerate(question.choices):
        rules = found.answered([at])
        assert rules == question.alternatives[at] != found.renames
        model = restore(path, target, renames=rules, policy="init", init=lambda: SumsOfMore(nnx.Rngs(0)))
        own = "ham" if "ham -> oak" in choice else "egg"
        np.testing.assert_array_equal(model.oak.kernel[...], variables["params"][own]["kernel"])
