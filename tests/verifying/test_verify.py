"""Both programs run on one input: right conversions are equal, module by module."""

import json
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

from orbax_nnx_handler import Fuse, Transpose, Verification, VerificationError, suggest, verify
from orbax_nnx_handler.planning.core.paths import render
from orbax_nnx_handler.storage.reading import fetch, read
from orbax_nnx_handler.verifying import are_the_same
from tests.verifying.twins import BILSTM, GPT, LLAMA, TRANSLATOR, TWINS, VIT, LinenEncoderBlock, Twin

Save = Callable[[Twin], pathlib.Path]


_AS_GIVEN: dict[str, Verification] = {}


def verified(twin: Twin, saved: Save, **changed: Any) -> Verification:
    """Verifies a twin: once for all tests that change nothing."""
    known = {} if changed else _AS_GIVEN
    if twin.name not in known:
        given = {
            "target": nnx.eval_shape(twin.make),
            "linen_apply": twin.linen.apply,
            "nnx_apply": twin.run,
            "inputs": twin.inputs,
            "renames": twin.rules,
            **twin.options,
        }
        known[twin.name] = verify(saved(twin), **given | changed)
    return known[twin.name]


@pytest.mark.parametrize("twin", TWINS, ids=lambda twin: twin.name)
def test_a_right_conversion_is_equal_and_so_is_every_module(twin: Twin, saved: Save):
    found = verified(twin, saved)

    assert found.equal, found
    assert found.first is None, found
    assert found.relative < 5e-6
    calls = len(found.modules)  # Of 92 at most.
    assert found.tolerance == pytest.approx(2e-5 if calls > 32 else 1e-5)
    assert found.remarks == (() if not twin.options else found.remarks)
    # The cell of a flipped sequence runs on what is behind the sequence's end too, which differs.
    alike = [module for module in found.modules if module.inputs.relative < 1e-5]
    assert len(alike) > 0.5 * len(found.modules)
    assert max(module.outputs.relative for module in alike) < 6e-6


@pytest.mark.parametrize(
    ("twin", "count", "pairs"),
    [
        (
            GPT,
            25,
            {("blocks/attention", 2): "h_2/attn", ("blocks/mlp/up", 0): "h_0/c_fc", ("norm", None): "ln_f"},
        ),
        (VIT, 24, {("layers/1/fc2", None): "encoderblock_1/Dense_1", ("patches", None): "embedding"}),
        (TRANSLATOR, 20, {("cross_attention/k", None): "decoder_cross_attn/key"}),
        (BILSTM, 94, {("bwd/cell", None): "backward_cell", ("fwd/cell/if_", None): "forward_cell/if"}),
        (LLAMA, 34, {("blocks/2/attn/o", None): "layers/o_proj", ("blocks/1", None): "layers"}),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_modules_are_paired_as_their_weights_are(
    twin: Twin, count: int, pairs: dict[tuple[str, int | None], str], saved: Save
):
    modules = verified(twin, saved).modules

    found = {(render(one.nnx.path), one.nnx.layer): render(one.linen.path) for one in modules}
    assert len(modules) == count
    assert {key: found.get(key) for key in pairs} == pairs


def test_a_scanned_layer_is_paired_with_its_own(saved: Save):
    modules = verified(LLAMA, saved).modules

    layers = {one.nnx.path[1]: one.linen.layer for one in modules if one.nnx.path[:1] == ("blocks",)}
    assert layers == {0: 0, 1: 1, 2: 2}


def test_the_result_prints_and_goes_to_json(saved: Save):
    found = verified(TRANSLATOR, saved)

    assert str(found).splitlines() == [
        "Verification: equal: relative difference 0, tolerance 1e-05 (absolute difference 0)",
        f"checkpoint: {saved(TRANSLATOR)}",
        "  20 calls of 19 modules compared: outputs at most 0 apart",
    ]
    as_dict = json.loads(json.dumps(found.to_dict()))
    assert as_dict["equal"] is True
    assert as_dict["first"] is None
    assert as_dict["modules"][0] == {
        "nnx": "embed",
        "nnx_layer": None,
        "linen": "shared",
        "linen_layer": None,
        "call": 0,
        "inputs": 0.0,
        "outputs": 0.0,
        "differs": False,
    }


def test_modules_come_in_the_order_of_the_run(saved: Save):
    names = [render(one.nnx.path) for one in verified(TRANSLATOR, saved).modules]

    assert names[0] == "embed"
    assert names.index("enc_attention") < names.index("self_attention") < names.index("cross_attention")
    assert names[-1] == "(root)"


def test_float_weights_are_compared_in_float32_whatever_the_target_is_in(saved: Save):
    half = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), nnx.eval_shape(TRANSLATOR.make)
    )

    assert verified(TRANSLATOR, saved, target=half).relative < 2e-6


def test_a_state_is_a_target_too(saved: Save):
    graphdef, state = nnx.split(nnx.eval_shape(VIT.make))

    found = verified(VIT, saved, target=state, nnx_apply=lambda state, x: nnx.merge(graphdef, state)(x))

    assert found.equal
    assert {render(one.nnx.path) for one in found.modules} > {"layers/1/attn/to_q", "(root)"}


def test_a_model_in_a_dict_is_a_target_too(saved: Save):
    target = {"net": nnx.eval_shape(VIT.make)}

    found = verified(VIT, saved, target=target, nnx_apply=lambda target, x: target["net"](x))

    assert found.equal
    assert "net/layers/0/attn" in {render(one.nnx.path) for one in found.modules}


def test_a_jitted_program_is_looked_into_all_the_same(saved: Save):
    linen = jax.jit(VIT.linen.apply)
    compiled = nnx.jit(lambda model, x: model(x))
    compiled(VIT.make(), *VIT.inputs)

    found = verified(VIT, saved, linen_apply=linen, nnx_apply=compiled)

    assert len(found.modules) == 24


def test_a_part_of_the_linen_model_may_be_bound_by_itself(saved: Save):
    def apply(variables: Any, images: Any) -> Any:
        return LinenEncoderBlock().apply({"params": variables["params"]["encoderblock_1"]}, images)

    inputs = (np.random.default_rng(3).normal(size=(1, 4, 8)).astype("f"),)
    found = verified(
        VIT, saved, linen_apply=apply, nnx_apply=lambda model, x: model.layers[1](x), inputs=inputs
    )

    assert found.equal
    names = [render(one.linen.path).split("/")[0] for one in found.modules]
    assert set(names) == {"encoderblock_1", "(root)"}
    assert names[-1] == "(root)"  # The two functions themselves.


class Statistics(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.BatchNorm(use_running_average=True)(x))


class NNXStatistics(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.out = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(self.norm(x))


def test_collections_beside_the_parameters_are_the_linen_programs_too(tmp_path: pathlib.Path):
    x = np.random.default_rng(0).normal(size=(2, 4)).astype("f")
    variables = Statistics().init(jax.random.key(0), x)
    variables = jax.tree.map(lambda leaf: leaf + 0.25, variables)
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", {**variables, "step": 3, "ema_params": variables["params"]})
    seen: list[Any] = []

    def apply(variables: Any, x: Any) -> Any:
        seen.append(jax.tree.map(np.shape, variables))
        return Statistics().apply(variables, x)

    found = verify(
        tmp_path / "state",
        nnx.eval_shape(lambda: NNXStatistics(nnx.Rngs(0))),
        apply,
        lambda model, x: model(x),
        (x,),
        renames=[("BatchNorm_0", "norm"), ("Dense_0", "out")],
    )

    assert found.equal
    assert seen == [jax.tree.map(np.shape, variables)]


@pytest.mark.parametrize("held", [np.asarray, jnp.asarray], ids=["NumPy", "JAX"])
def test_proposals_for_variables_in_memory_are_proved_too(held: Callable[[Any], Any]):
    x = np.random.default_rng(0).normal(size=(2, 4)).astype("f")
    variables = jax.tree.map(
        lambda leaf: held(leaf + 0.25), nn.unbox(Statistics().init(jax.random.key(0), x))
    )
    target = nnx.eval_shape(lambda: NNXStatistics(nnx.Rngs(0)))
    programs = (Statistics().apply, lambda model, x: model(x), (x,))

    found = suggest(variables, target, verify=programs)

    assert found.is_proved


def test_vmapped_members_are_compared_one_by_one(tmp_path: pathlib.Path):
    class Members(nn.Module):
        @nn.compact
        def __call__(self, x):
            member = nn.vmap(
                nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=2
            )
            return member(4, name="member")(x).sum(0)

    class NNXMembers(nnx.Module):
        def __init__(self, rngs):
            self.members = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])

        def __call__(self, x):
            return self.members[0](x) + self.members[1](x)

    x = np.random.default_rng(0).normal(size=(3, 4)).astype("f")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", Members().init(jax.random.key(0), x))
    target = nnx.eval_shape(lambda: NNXMembers(nnx.Rngs(0)))

    found = verify(
        tmp_path / "c",
        target,
        Members().apply,
        lambda model, x: model(x),
        (x,),
        renames=[("member", "members")],
    )

    assert found.equal
    assert [(render(one.nnx.path), one.linen.layer) for one in found.modules[:2]] == [
        ("members/0", 0),
        ("members/1", 1),
    ]


def fails(*_: Any) -> Any:
    raise KeyError("tokens")


async def awaited(model: Any, x: Any) -> Any:
    return model(x)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"linen_apply": fails}, "linen_apply fails: KeyError: 'tokens'\nat "),
        ({"nnx_apply": fails}, "nnx_apply fails: KeyError: 'tokens'\nat "),
        (
            {"nnx_apply": lambda model, x: model(x)[:1]},
            "arrays of different shapes:\n  linen_apply  (2, 5)\n",
        ),
        ({"nnx_apply": lambda model, x: (model(x),)}, "the programs return different things:"),
        (
            {"nnx_apply": lambda *_: None, "linen_apply": lambda *_: None},
            "the programs return no array",
        ),
        (
            {"linen_apply": VIT.linen},
            "linen_apply is a LinenVit, not a function.\nhint: pass linen_model",
        ),
        (
            {"nnx_apply": None},
            "nnx_apply is a NoneType, not a function.",
        ),
        (
            {"nnx_apply": lambda model, x: (model(x), 1.0)},
            "let nnx_apply return the first of its 2 parts",
        ),
        (
            {"nnx_apply": awaited},
            "a program returns a coroutine, which cannot be compared.",
        ),
    ],
)
def test_a_program_that_cannot_be_compared_is_named(changed: dict[str, Any], said: str, saved: Save):
    with pytest.raises(VerificationError) as raised:
        verified(VIT, saved, **changed)

    assert said in str(raised.value)
    assert raised.value.hints


def test_inputs_of_another_shape_than_the_weights_are_for_are_named(saved: Save):
    with pytest.raises(VerificationError, match=r"hint: .* than 1 input \(float32\[2,3,3,2\]\)"):
        verified(VIT, saved, inputs=(jnp.ones((2, 3, 3, 2)),))


def test_a_model_that_wants_random_numbers_is_told_how(tmp_path: pathlib.Path):
    class Noisy(nnx.Module):
        def __init__(self, rngs):
            self.out = nnx.Linear(4, 3, rngs=rngs)
            self.drop = nnx.Dropout(0.5)

        def __call__(self, x, rngs=None):
            return self.drop(self.out(x), rngs=rngs)

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(
            tmp_path / "c", {"params": {"out": {"kernel": np.ones((4, 3)), "bias": np.ones(3)}}}
        )
    target = nnx.eval_shape(lambda: Noisy(nnx.Rngs(0)))

    with pytest.raises(VerificationError, match=r"(?s)nnx_apply fails: .*model\.eval\(\) first, or rngs"):
        verify(
            tmp_path / "c",
            target,
            lambda variables, x: nn.Dense(3).apply({"params": variables["params"]["out"]}, x),
            lambda model, x: model(x),
            (np.ones((1, 4), "f"),),
        )


def test_the_classes_and_the_model_are_left_as_they_were(saved: Save):
    before = nnx.Linear.__call__
    models: list[Any] = []

    def apply(model: Any, x: Any) -> Any:
        models.append(model)
        return model(x)

    verified(VIT, saved, nnx_apply=apply)

    assert nnx.Linear.__call__ is before
    names = [vars(module).keys() for _, module in nnx.iter_modules(models[0])]
    fresh = [vars(module).keys() for _, module in nnx.iter_modules(VIT.make())]
    assert names == fresh


class LinenGated(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gate, value = nn.Dense(8, name="gate")(x), nn.Dense(8, name="value")(x)
        return nn.Dense(4, name="head")(nn.sigmoid(gate) * value)


class Gated(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.gate = nnx.Linear(8, 8, rngs=rngs)
        self.value = nnx.Linear(8, 8, rngs=rngs)
        self.head = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(nnx.sigmoid(self.gate(x)) * self.value(x))


GATED_INPUT = jax.random.normal(jax.random.key(3), (2, 8))


def gated(path: pathlib.Path, *, closed: bool = False, **changed: Any) -> Verification:
    """Returns what is found of a gate that is transposed; its value is zero where it is closed."""
    variables = LinenGated().init(jax.random.key(0), GATED_INPUT)
    if closed:
        variables["params"]["value"] = jax.tree.map(jnp.zeros_like, variables["params"]["value"])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "checkpoint", variables)
    given = {
        "target": nnx.eval_shape(lambda: Gated(nnx.Rngs(0))),
        "linen_apply": LinenGated().apply,
        "nnx_apply": lambda model, x: model(x),
        "inputs": (GATED_INPUT,),
        "renames": [Transpose("gate/kernel", (1, 0))],
    }
    return verify(path / "checkpoint", **given | changed)


def test_equal_outputs_do_not_hide_a_module_that_returns_something_else(tmp_path: pathlib.Path):
    found = gated(tmp_path, closed=True)

    assert found.equal
    assert [remark for remark in found.remarks if remark.startswith("gate: ")] or found.first is not None


def test_weights_that_the_programs_do_not_run_with_are_named(tmp_path: pathlib.Path):
    def only_value(variables: Any, x: jax.Array) -> jax.Array:
        return nn.Dense(8).apply({"params": variables["params"]["value"]}, x)

    found = gated(tmp_path, linen_apply=only_value, nnx_apply=lambda model, x: model.value(x))

    assert found.equal
    (remark,) = found.remarks
    assert remark.endswith("they do not depend on: gate/bias, gate/kernel, head/bias, head/kernel.")


class LinenAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        q, k, v = (nn.Dense(6, name=name)(x) for name in "qkv")
        return nn.relu(nn.softmax(q @ k.swapaxes(-1, -2)) @ v)


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.qkv = nnx.Linear(6, 18, rngs=rngs)

    def __call__(self, x):
        q, k, v = jnp.split(self.qkv(x), 3, -1)
        return nnx.relu(nnx.softmax(q @ k.swapaxes(-1, -2)) @ v)


def attended(
    path: pathlib.Path, tokens: int, order: str, *, alike: bool = False, **changed: Any
) -> Verification:
    x = jax.random.normal(jax.random.key(1), (2, tokens, 6))
    x = jnp.broadcast_to(x[:, :1], x.shape) if alike else x
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "checkpoint", LinenAttention().init(jax.random.key(0), x))
    given = {"linen_apply": LinenAttention().apply, "nnx_apply": lambda model, x: model(x)}
    return verify(
        path / "checkpoint",
        nnx.eval_shape(lambda: Attention(nnx.Rngs(0))),
        inputs=(x,),
        renames=[
            Fuse([f"{name}/kernel" for name in order], "qkv/kernel", axis=1),
            Fuse([f"{name}/bias" for name in order], "qkv/bias", axis=0),
        ],
        **given | changed,
    )


@pytest.mark.parametrize("tokens", [1, 5])
def test_what_a_single_token_does_not_tell_is_named(tmp_path: pathlib.Path, tokens: int):
    found = attended(tmp_path, tokens, "kqv", alike=True)

    assert found.equal
    (remark,) = found.remarks
    assert remark.startswith("the outputs depend on a part alone of qkv/bias, qkv/kernel. Choose inputs of")


def test_several_tokens_tell_the_whole(tmp_path: pathlib.Path):
    found = attended(tmp_path, 4, "qkv")

    assert found.equal
    assert found.remarks == ()


def test_outputs_without_a_float_are_said_to_tell_little(tmp_path: pathlib.Path):
    found = attended(
        tmp_path,
        4,
        "qkv",
        linen_apply=lambda variables, x: LinenAttention().apply(variables, x).argmax(-1),
        nnx_apply=lambda model, x: model(x).argmax(-1),
    )

    assert found.equal
    (remark,) = found.remarks
    assert remark.startswith("the outputs hold no floats")


def test_an_input_of_one_number_is_said_to_tell_little(tmp_path: pathlib.Path):
    found = gated(tmp_path, inputs=(jnp.zeros((2, 8)),))

    assert any("one number throughout" in remark for remark in found.remarks)


@pytest.mark.parametrize("size", [1e-8, 1e6])
def test_inputs_beside_which_weights_hardly_count_are_named(tmp_path: pathlib.Path, size: float):
    found = gated(tmp_path, inputs=(GATED_INPUT * size,), renames=())

    assert [remark for remark in found.remarks if remark.startswith("an input's numbers are about")]


@pytest.mark.parametrize("what", ["another model", "a constant"])
def test_a_program_that_does_not_use_the_restored_model_is_refused(tmp_path: pathlib.Path, what: str):
    other = Gated(nnx.Rngs(1))
    linen, ours = {
        "another model": (LinenGated().apply, lambda _, x: other(x)),
        "a constant": (lambda *_: jnp.ones(3), lambda *_: jnp.ones(3)),
    }[what]

    with pytest.raises(VerificationError, match="the same whatever the weights of the model are"):
        gated(tmp_path, linen_apply=linen, nnx_apply=ours)


@pytest.mark.parametrize("style", ["called", "split and merged", "without modules", "compiled"])
def test_a_program_that_uses_the_restored_model_in_any_way_is_compared(tmp_path: pathlib.Path, style: str):
    def merged(model: Gated, x: jax.Array) -> jax.Array:
        return nnx.merge(*nnx.split(model))(x)

    def plain(model: Gated, x: jax.Array) -> jax.Array:
        gate, value, head = (
            (part.kernel.get_value(), part.bias.get_value()) for part in (model.gate, model.value, model.head)
        )
        return (nnx.sigmoid(x @ gate[0] + gate[1]) * (x @ value[0] + value[1])) @ head[0] + head[1]

    styles = {
        "called": lambda model, x: model(x),
        "split and merged": merged,
        "without modules": plain,
        "compiled": nnx.jit(lambda model, x: model(x)),
    }

    assert gated(tmp_path, nnx_apply=styles[style], renames=()).equal


def test_of_a_small_checkpoint_each_leaf_is_read_once_for_both_programs_and_what_is_tried(
    saved: Save, monkeypatch: pytest.MonkeyPatch
):
    stored, original = list[Any](), fetch.fill_targets

    def counted(checkpoint: Any, targets: Any, *others: Any) -> None:
        stored.extend(path for path in targets if path not in (checkpoint.values or {}))
        original(checkpoint, targets, *others)

    for module in (fetch, read):
        monkeypatch.setattr(module, "fill_targets", counted)
    rules = GPT.wrong["the biases of two norms exchanged"]
    found = verify(saved(GPT), nnx.eval_shape(GPT.make), GPT.linen.apply, GPT.run, GPT.inputs, renames=rules)

    assert found.first is not None
    assert found.first.proved
    assert stored
    assert len(stored) == len({*stored})


def test_the_modules_of_a_model_are_looked_for_once_and_keep_no_mark(
    saved: Save, monkeypatch: pytest.MonkeyPatch
):
    seen, models, original = list[Any](), list[Any](), nnx.iter_graph
    target = nnx.eval_shape(GPT.make)
    monkeypatch.setattr(nnx, "iter_graph", lambda node: seen.append(node) or original(node))

    def run(model: Any, *inputs: Any) -> Any:
        models.append(model)
        return GPT.run(model, *inputs)

    found = verify(saved(GPT), target, GPT.linen.apply, run, GPT.inputs, renames=GPT.rules)

    assert found.equal
    assert len([node for node in seen if node is models[0]]) == 1
    assert not [node for _, node in original(models[0]) if hasattr(node, "path_in_target")]


def test_of_arrays_in_one_place_those_are_the_same_that_are_read_alike():
    array = jnp.arange(6.0).reshape(2, 3)
    one, other = np.asarray(array), np.asarray(array)
    assert are_the_same([one], [other])
    assert are_the_same([one], [one[:]])
    assert not are_the_same([one], [one[::-1]])
    assert not are_the_same([one], [one[:1]])
