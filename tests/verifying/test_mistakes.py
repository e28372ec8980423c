"""Deliberate mistakes in right rules, and ports that compute something else: the right module is named."""

import dataclasses
import functools
import io
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from rich.console import Console

from orbax_nnx_handler import Add, Fuse, Scale, StackLayers, Transpose, UnstackLayers, Verification, verify
from orbax_nnx_handler.planning.core.recipes import Concat, Index, Read, Slice
from orbax_nnx_handler.planning.core.recipes import Transpose as Turned
from orbax_nnx_handler.verifying import single_module
from orbax_nnx_handler.verifying.single_module import ModuleRunner, alternatives
from tests.verifying.twins import BILSTM, GPT, LLAMA, MIXTURES, TRANSLATOR, VIT, Twin

Save = Callable[[Twin], pathlib.Path]


def exchanged(rules: Sequence[Any], one: str, other: str) -> list[Any]:
    """Returns rules in which two pairs have exchanged what they write."""
    written = {rule[0]: rule[1] for rule in rules if isinstance(rule, tuple)}
    other_of = {one: other, other: one}
    return [
        (rule[0], written[other_of[rule[0]]]) if isinstance(rule, tuple) and rule[0] in other_of else rule
        for rule in rules
    ]


def fused(order: str) -> list[Any]:
    """Returns the rules of the decoder with q, k and v joined in an order."""
    rest = [rule for rule in GPT.rules if not isinstance(rule, Fuse)]
    rules = [
        Fuse(tuple(f"attn/{name}_proj/{leaf}" for name in order), f"attention/qkv/{leaf}", axis=axis)
        for leaf, axis in (("kernel", 1), ("bias", 0))
    ]
    return [*rules, *rest]


def shifted() -> list[Any]:
    rest = [rule for rule in GPT.rules if not isinstance(rule, StackLayers)]
    return [("h_0", "x_1"), ("h_1", "x_2"), ("h_2", "x_0"), *rest, StackLayers("x_{i}", "blocks", axis=0)]


def crossed(rules: Sequence[Any]) -> list[Any]:
    """Returns rules under which two layers have changed places."""
    return [
        part
        for rule in rules
        for part in (
            [(rule[0].replace("{i}", one), rule[1].replace("{i}", other)) for one, other in ("01", "10")]
            if isinstance(rule, tuple) and "{i}" in rule[0]
            else [rule]
        )
    ]


def respelled(rules: Sequence[Any], one: str, other: str) -> list[Any]:
    """Returns rules that write one name for another wherever it stands."""

    def swap(text: str) -> str:
        return text.replace(one, "\0").replace(other, one).replace("\0", other)

    return [(rule[0], swap(rule[1])) if isinstance(rule, tuple) else rule for rule in rules]


MISTAKES: dict[str, tuple[Twin, list[Any], dict[str, Any], str, str]] = {
    "q and k joined in another order": (
        GPT,
        fused("kqv"),
        {},
        "blocks/attention/qkv",
        "joined in another order",
    ),
    "v joined first": (GPT, fused("vqk"), {}, "blocks/attention/qkv", "joined in another order"),
    "a square kernel transposed": (
        GPT,
        [Transpose("attn/c_proj/kernel", (1, 0)), *GPT.rules],
        {},
        "blocks/attention/out",
        "kernel is transposed",
    ),
    "a rule that scales a kernel": (
        GPT,
        [Scale("attn/c_proj/kernel", 2.0), *GPT.rules],
        {},
        "blocks/attention/out",
        "kernel is not scaled: as it is stored",
    ),
    "a rule that scales a kernel and its bias": (
        GPT,
        [Scale("attn/c_proj", 2.0), *GPT.rules],
        {},
        "blocks/attention/out",
        "are neither scaled nor shifted",
    ),
    "a rule that adds to the scale of a norm": (
        LLAMA,
        [Add("post_attention_layernorm/scale", 0.5), *LLAMA.rules],
        {},
        "blocks/0/post_norm",
        "scale is not shifted",
    ),
    "two norms exchanged": (
        GPT,
        exchanged(GPT.rules, "ln_1", "ln_2"),
        {},
        "blocks/norm1",
        "It needs those that blocks/norm2, layer 0 was given",
    ),
    "stacked layers shifted": (GPT, shifted(), {}, "blocks", "It needs those that blocks, layer 1 was given"),
    "another epsilon": (GPT, [*GPT.rules], {"epsilon": 1e-5}, "blocks/norm1", ""),
    "another gelu": (GPT, [*GPT.rules], {"exact_gelu": True}, "blocks/mlp", ""),
    "another scale in attention": (GPT, [*GPT.rules], {"scale": 1.5}, "blocks/attention", ""),
    "heads divided in another order": (
        VIT,
        [Transpose("query/kernel", (0, 2, 1)), *VIT.rules],
        {},
        "layers/0/attn/to_q",
        "kernel is divided otherwise",
    ),
    "an output matrix divided in another order": (
        VIT,
        [Transpose("out/kernel", (1, 0, 2)), *VIT.rules],
        {},
        "layers/0/attn/to_out",
        "kernel is divided otherwise",
    ),
    "key and value exchanged": (
        VIT,
        respelled(VIT.rules, "to_k", "to_v"),
        {},
        "layers/0/attn",
        "layers/0/attn/to_k and layers/0/attn/to_v have each other's weights",
    ),
    "layers in another order": (
        VIT,
        crossed(VIT.rules),
        {},
        "layers/0",
        "It needs those that layers/1 was given",
    ),
    "cross and self attention exchanged": (
        TRANSLATOR,
        respelled(TRANSLATOR.rules, "cross_att", "self_att"),
        {},
        "self_attention",
        "It needs those that cross_attention was given",
    ),
    "forward and backward exchanged": (
        BILSTM,
        exchanged(BILSTM.rules, "forward_cell", "backward_cell"),
        {},
        "fwd/cell",
        "It needs those that bwd/cell was given",
    ),
    "another base of rotary positions": (LLAMA, [*LLAMA.rules], {"base": 5e5}, "blocks/0/attn", ""),
    "gate and up exchanged": (
        LLAMA,
        exchanged(LLAMA.rules, "gate_proj", "up_proj"),
        {},
        "blocks/0",
        "blocks/0/gate and blocks/0/up have each other's weights",
    ),
    "a square kernel of a scan transposed": (
        LLAMA,
        [Transpose("q_proj/kernel", (2, 1, 0)), *LLAMA.rules],
        {},
        "blocks/0/attn/q",
        "kernel is transposed",
    ),
}


@functools.cache
def found(name: str, path: pathlib.Path) -> Verification:
    twin, rules, changed, _, _ = MISTAKES[name]
    target = nnx.eval_shape(functools.partial(twin.make, **changed))
    return verify(path, target, twin.linen.apply, twin.run, twin.inputs, renames=rules)


@pytest.mark.parametrize("name", MISTAKES)
def test_the_right_module_is_named_and_what_is_otherwise(name: str, saved: Save):
    twin, _, changed, path, proved = MISTAKES[name]

    result = found(name, saved(twin))

    assert not result.equal
    assert result.first is not None
    assert result.first.path == path, result
    if changed:
        assert result.first.proved == "", result
        assert "proved" not in str(result)
    else:
        assert proved in result.first.proved, result


@pytest.mark.parametrize("name", [name for name, (*_, proved) in MISTAKES.items() if proved])
def test_a_mistake_in_the_rules_is_found_among_the_first_ways_that_are_tried(name: str, saved: Save):
    result = found(name, saved(MISTAKES[name][0]))

    assert result.first is not None
    assert result.first.tried <= 12  # Each runs a module: a few times both programs would be many.


def test_settings_that_differ_are_named(saved: Save):
    result = found("another epsilon", saved(GPT))

    assert result.first is not None
    assert result.first.settings == {"epsilon": (1e-6, 1e-5)}
    assert "epsilon is 1e-06 in Linen and 1e-05 in NNX" in str(result)


def test_where_the_code_differs_the_place_between_two_modules_is_named(saved: Save):
    text = " ".join(str(found("another gelu", saved(GPT))).split())

    assert (
        "blocks/mlp/up, layer 0 still returns the same, and blocks/mlp/down, layer 0 is called with" in text
    )


def test_the_message_shows_the_weights_their_recipes_and_the_way_to_the_place(saved: Save):
    result = found("a square kernel transposed", saved(GPT))
    text = str(result)

    lines = text.splitlines()
    assert lines[0].startswith("Verification: not equal: relative difference ")
    assert lines[2] == "first difference: blocks/attention/out, layer 0   <- h_0/attn/c_proj"
    assert "    blocks/attention/out/kernel   (3, 8, 8)   <- params/h_{0..2}/attn/c_proj/kernel" in text
    assert "transpose (1, 0), stack 3 on axis 0" in text
    assert "proved by outputs: kernel is transposed: as it is stored. With this change alone" in text
    assert "in the order of the run" in text
    shown = io.StringIO()
    Console(file=shown, force_terminal=True, width=60).print(result)
    first, *others = shown.getvalue().splitlines()
    assert first.startswith("\x1b[1;31mVerification: not equal")
    assert max(len(re.sub(r"\x1b\[\d*m", "", line)) for line in others) <= 60
    page = result._repr_html_()
    assert "<b>proved by outputs:</b> kernel is transposed" in page
    assert page.count("&lt;- h_") > len(lines)  # All calls, folded away, where the text has those around it.
    row = re.search(r"inputs \S+ +outputs", page)
    assert row is not None
    assert page.index("<details>") < row.start()


@pytest.mark.parametrize("tolerance", ["1e-3", -1.0, float("nan")])
def test_a_tolerance_is_a_number_from_0_on(saved: Save, tolerance: Any):
    path, target = saved(GPT), nnx.eval_shape(GPT.make)
    with pytest.raises(ValueError, match="tolerance is a number from 0 on"):
        verify(path, target, GPT.linen.apply, GPT.run, GPT.inputs, tolerance=tolerance)


def test_a_tolerance_may_be_given_and_what_differs_is_said_all_the_same(saved: Save):
    target = nnx.eval_shape(functools.partial(GPT.make, epsilon=1e-5))

    result = verify(
        saved(GPT), target, GPT.linen.apply, GPT.run, GPT.inputs, renames=GPT.rules, tolerance=1e-2
    )

    assert result.equal
    assert result.first is not None
    assert "blocks/norm1 still differs by more than rounding" in result.remarks[0]


class LinenDeep(nn.Module):
    """Its layers enlarge what rounding leaves, as attention does that is not scaled."""

    @nn.compact
    def __call__(self, x):
        for number in range(3):
            x = nn.Dense(8, name=f"layers_{number}")(x)
        return nn.Dense(8, name="head")(nn.RMSNorm(name="norm")(x))


class Deep(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, rounded: float, scale: float):
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(3)])
        self.norm, self.head = nnx.RMSNorm(8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)
        self.rounded, self.scale = rounded, scale

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x * (1 + self.rounded * jnp.sin(1e3 * x)))
        return self.head(self.norm(x) * self.scale)


@pytest.mark.parametrize("rounded", [0, 3e-5, 2e-4])
def test_what_rounding_leaves_is_no_place_where_a_difference_arises(tmp_path: pathlib.Path, rounded: float):
    x = jax.random.normal(jax.random.key(1), (4, 6, 8))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", LinenDeep().init(jax.random.key(0), x))
    target = nnx.eval_shape(lambda: Deep(nnx.Rngs(0), rounded, 0.25))
    found = verify(
        tmp_path / "checkpoint",
        target,
        LinenDeep().apply,
        lambda model, x: model(x),
        (x,),
        tolerance=1e-3,
    )

    assert found.first is not None
    assert found.first.path == "(root)"
    assert "norm still returns the same, and head is called with something else." in str(found)


class LinenMix(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.tanh(nn.Dense(4, name="dense")(x))


class LinenMixer(nn.Module):
    """Layers that hold nothing but one module, and what follows them without a module around it."""

    has_ffn: bool

    @nn.compact
    def __call__(self, x):
        for name in ("mix_0", "mix_1"):
            x = x + LinenMix(name=name)(x)
        if not self.has_ffn:
            return x
        gate, up = (nn.Dense(6, name=name)(x) for name in ("gate", "up"))
        return nn.Dense(4, name="down")(nn.tanh(gate) * up)


class Mix(nnx.Module):
    def __init__(self, activation, rngs):
        self.dense, self.activation = nnx.Linear(4, 4, rngs=rngs), activation

    def __call__(self, x):
        return self.activation(self.dense(x))


class Ffn(nnx.Module):
    def __init__(self, activation, rngs):
        self.up, self.down = nnx.Linear(4, 12, rngs=rngs), nnx.Linear(6, 4, rngs=rngs)
        self.activation = activation

    def __call__(self, x):
        gate, up = jnp.split(self.up(x), 2, -1)
        return self.down(self.activation(gate) * up)


class Mixer(nnx.Module):
    def __init__(self, rngs, fault, activation):
        @nnx.split_rngs(splits=2)
        @nnx.vmap(in_axes=0, out_axes=0)
        def blocks(rngs):
            return Mix(activation if fault == "mix" else jnp.tanh, rngs)

        self.mix = blocks(rngs)
        self.ffn = Ffn(activation, rngs) if fault == "ffn" else None

    def __call__(self, x):
        run = nnx.scan(lambda x, mix: x + mix(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        x = run(x, self.mix)
        return x if self.ffn is None else self.ffn(x)


@pytest.mark.parametrize("fault", ["mix", "ffn"])
def test_a_fault_is_named_in_the_innermost_module_that_is_called_with_the_same(tmp_path, fault: str):
    # As many examples as layers; Linen has no module that is the `ffn`.
    x, linen = jax.random.normal(jax.random.key(1), (2, 3, 4)), LinenMixer(fault == "ffn")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", linen.init(jax.random.key(0), x))
    joined = [
        Fuse((f"gate/{name}", f"up/{name}"), f"ffn/up/{name}", axis=axis)
        for name, axis in (("kernel", 1), ("bias", 0))
    ]
    rules = [
        StackLayers("mix_{i}", "mix", axis=0),
        *([*joined, ("down", "ffn/down")] if fault == "ffn" else []),
    ]

    def verified(activation: Any) -> Verification:
        target = nnx.eval_shape(lambda: Mixer(nnx.Rngs(0), fault, activation))
        run = lambda model, x: model(x)  # noqa: E731
        return verify(tmp_path / "checkpoint", target, linen.apply, run, (x,), renames=rules)

    assert verified(jnp.tanh).equal
    wrong = verified(nnx.relu).first
    assert wrong is not None
    assert wrong.path == fault
    assert (wrong.module.nnx.path == (fault,)) == (fault == "mix")


def test_two_modules_may_have_each_others_weights_where_their_biases_are_stored_in_one_array():
    shapes = {("key",): (4, 4), ("value",): (4, 4), ("bias",): (2, 4)}
    kernels = {("k", "kernel"): Read(("value",)), ("v", "kernel"): Read(("key",))}
    biases = {("k", "bias"): Index(Read(("bias",)), 0, 1), ("v", "bias"): Index(Read(("bias",)), 0, 0)}
    doubtful = {**kernels, **biases}

    ways = [dict(way.recipes) for way in alternatives(doubtful, {}, shapes)]

    assert {(("v" if key == "k" else "k"), leaf): recipe for (key, leaf), recipe in doubtful.items()} in ways


class LinenRecurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        # The cell is a part of this module, not of the `RNN`.
        return nn.Dense(2, name="out")(nn.RNN(nn.SimpleCell(3), name="recurrent")(nn.Dense(3, name="in")(x)))


class Loop(nnx.Module):
    def __init__(self, rngs, activation):
        self.x, self.h = nnx.Linear(3, 3, rngs=rngs), nnx.Linear(3, 3, use_bias=False, rngs=rngs)
        self.activation = activation

    def __call__(self, x):
        states = [jnp.zeros(x[:, 0].shape)]
        for at in range(x.shape[1]):
            states.append(self.activation(self.x(x[:, at]) + self.h(states[-1])))
        return jnp.stack(states[1:], 1)


class Recurrent(nnx.Module):
    def __init__(self, rngs, activation):
        self.first, self.last = nnx.Linear(3, 3, rngs=rngs), nnx.Linear(3, 2, rngs=rngs)
        self.loop = Loop(rngs, activation)

    def __call__(self, x):
        return self.last(self.loop(self.first(x)))


def test_a_loop_is_compared_with_the_module_that_runs_a_cell_of_its_callers(tmp_path):
    x = jax.random.normal(jax.random.key(1), (2, 4, 3))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", LinenRecurrent().init(jax.random.key(0), x))
    rules = [("in", "first"), ("out", "last"), ("SimpleCell_0/i", "loop/x"), ("SimpleCell_0/h", "loop/h")]

    def verified(activation: Any) -> Verification:
        target = nnx.eval_shape(lambda: Recurrent(nnx.Rngs(0), activation))
        run = lambda model, x: model(x)  # noqa: E731
        return verify(tmp_path / "checkpoint", target, LinenRecurrent().apply, run, (x,), renames=rules)

    right, wrong = verified(jnp.tanh), verified(nnx.relu).first
    assert right.equal
    assert (("loop",), ("recurrent",)) in {(one.nnx.path, one.linen.path) for one in right.modules}
    assert wrong is not None
    assert wrong.path == "loop"


def test_a_mistake_of_one_rule_is_tried_in_all_leaves_that_it_makes():
    leaves = [("experts", at, "up", "kernel") for at in range(3)]
    right = {leaf: Index(Read(("w",)), 0, at) for at, leaf in enumerate(leaves)}
    mistakes = (
        {leaf: Turned(recipe, (1, 0)) for leaf, recipe in right.items()},
        dict(zip(leaves, [right[leaves[at]] for at in (1, 2, 0)], strict=True)),
    )
    for made in mistakes:
        assert right in [way.recipes for way in alternatives(made, {}, {("w",): (3, 4, 4)})]


@pytest.mark.parametrize("count", [1, 3])
def test_what_changes_nothing_is_no_other_way(count: int):
    made = {("experts", at, "kernel"): Index(Read(("w",)), 0, at) for at in range(count)}

    ways = [*alternatives(made, {}, {("w",): (3, 4, 4)})]

    assert ways
    assert all(way.recipes.items() - made.items() for way in ways)


class LinenLooking(nn.Module):
    """Makes its mask by itself."""

    @nn.compact
    def __call__(self, x):
        scores = nn.Dense(5, name="scores")(x) + jnp.triu(jnp.full((5, 5), -9.0), 1)
        return nn.softmax(scores) @ x


class LinenLookers(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, name="out")(LinenLooking(name="look")(x))


class Looking(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.scores = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x, mask):
        return nnx.softmax(self.scores(x) + mask) @ x


class Lookers(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.look, self.out = Looking(rngs), nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        return self.out(self.look(x, jnp.triu(jnp.full((5, 5), -9.0), 0)))


def test_an_input_without_a_counterpart_is_named_where_the_difference_may_come_in_with_it(tmp_path):
    x, linen = jax.random.normal(jax.random.key(1), (3, 5, 8)), LinenLookers()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", linen.init(jax.random.key(0), x))
    target = nnx.eval_shape(lambda: Lookers(nnx.Rngs(0)))
    found = verify(tmp_path / "c", target, linen.apply, lambda model, x: model(x), (x,))

    assert found.first is not None
    assert found.first.path == "look"
    assert "note: of the inputs NNX's float32[5,5] has no counterpart: the difference may come in" in str(
        found
    )


def test_two_parts_of_one_array_are_told_apart_where_their_order_is_said():
    source = Read(("params", "film", "kernel"))
    joined = Concat((Slice(source, 1, 0, 8), Slice(source, 1, 8, 8)), 1)

    ways = alternatives({("film", "kernel"): joined}, {}, {source.path: (4, 16)})

    said = next(way.words for way in ways if "joined in another order" in way.words)
    first, second = said.partition(": ")[2].split(", ")
    assert first != second
    assert ("[8:16]" in first, "[0:8]" in second) == (True, True)


def mixed(first: str, second: str) -> list[Any]:
    """Returns the rules of the mixtures with what two of them write exchanged."""
    paths = [f"blocks/{path[0]}/experts/{{e}}/{path[2:]}_proj/kernel" for path in (first, second)]
    other = dict(zip(paths, reversed(paths), strict=True))
    return [
        dataclasses.replace(rule, into=other.get(rule.into, rule.into))
        if isinstance(rule, UnstackLayers)
        else rule
        for rule in MIXTURES.rules
    ]


@pytest.mark.parametrize(
    ("first", "second", "named"),
    [
        ("0/down", "1/down", "blocks/0/experts/0/down_proj"),
        ("0/gate", "1/gate", "blocks/0/experts/0/gate_proj"),
        ("0/up", "1/gate", "blocks/0/experts/0/up_proj"),
        ("1/gate", "1/up", "blocks/1/experts/0"),
    ],
)
def test_a_weight_of_experts_that_is_another_layers_is_proved(
    saved: Save, monkeypatch: pytest.MonkeyPatch, first: str, second: str, named: str
):
    runs, run = list[Any](), ModuleRunner.run
    monkeypatch.setattr(ModuleRunner, "run", lambda self, *args: runs.append(args) or run(self, *args))
    target, rules = nnx.eval_shape(MIXTURES.make), mixed(first, second)
    told = verify(saved(MIXTURES), target, MIXTURES.apply, MIXTURES.run, MIXTURES.inputs, renames=rules)
    assert told.first is not None
    assert told.first.path == named
    assert "are exchanged" in told.first.proved
    assert len(runs) <= 16


def test_a_search_ends_when_it_would_take_longer_than_both_programs_and_says_so(saved: Save):
    fault, module = MIXTURES.faults["weights of experts not normalised"]
    target = nnx.eval_shape(functools.partial(MIXTURES.make, **fault))
    told = verify(
        saved(MIXTURES), target, MIXTURES.apply, MIXTURES.run, MIXTURES.inputs, renames=MIXTURES.rules
    )
    assert told.first is not None
    assert (told.first.path, told.first.is_cut) == (module, True)
    assert told.first.tried < 20
    assert "There are more, which were not tried" in " ".join(str(told).split())


def test_a_module_that_is_tried_often_is_taken_apart_once_and_read_for_together(
    saved: Save, monkeypatch: pytest.MonkeyPatch
):
    runs, reads, splits = list[Any](), list[Any](), list[Any]()

    def counted(function: Callable[..., Any], calls: list[Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(args)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(ModuleRunner, "run", counted(ModuleRunner.run, runs))
    monkeypatch.setattr(single_module, "read_values", counted(single_module.read_values, reads))
    monkeypatch.setattr(nnx, "split", counted(nnx.split, splits))
    fault, module = MIXTURES.faults["weights of experts not normalised"]
    target = nnx.eval_shape(functools.partial(MIXTURES.make, **fault))
    told = verify(
        saved(MIXTURES), target, MIXTURES.apply, MIXTURES.run, MIXTURES.inputs, renames=MIXTURES.rules
    )

    assert told.first is not None
    assert told.first.path == module
    parts = [args[0] for args in splits if type(args[0]) is not type(target)]
    assert len(runs) > 2
    assert len(parts) == len({*map(id, parts)})
    assert len(reads) <= len(runs)
