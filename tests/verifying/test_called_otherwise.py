"""Modules that are called with the same numbers in another order, more often, or with dropout on."""

import pathlib
from typing import Any, cast

import flax.linen as nn
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from orbax_nnx_handler import Fuse, Reshape, Scale, Split, Transpose, Verification, suggest, verify
from orbax_nnx_handler.verifying import pairing, same_numbers
from orbax_nnx_handler.verifying.pairing import Use
from orbax_nnx_handler.verifying.runs import Compared


def save(path: pathlib.Path, variables: Any) -> pathlib.Path:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "checkpoint", variables)
    return path / "checkpoint"


IMAGES = np.random.default_rng(0).normal(size=(4, 6, 6, 3)).astype(np.float32)


class LinenImages(nn.Module):
    times: int = 1

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.relu(nn.Conv(4, (3, 3), name="conv")(x))
        again = nn.Conv(4, (3, 3), name="again")
        for _ in range(self.times):
            x = x + nn.tanh(again(x))
        return nn.Dense(5, name="fc")(nn.max_pool(x, (2, 2), (2, 2)).reshape(len(x), -1))


class Images(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, axes: tuple[int, ...] = (0, 1, 2, 3)):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.again = nnx.Conv(4, 4, (3, 3), rngs=rngs)
        self.fc = nnx.Linear(36, 5, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.axes = axes

    def __call__(self, x: Any) -> Any:
        x = nnx.relu(self.conv(x))
        x = x + nnx.tanh(self.again(x))
        x = nnx.max_pool(x, (2, 2), (2, 2)).transpose(self.axes).reshape(len(x), -1)
        return self.fc(self.drop(x))


def images(path: pathlib.Path, axes: tuple[int, ...] = (0, 1, 2, 3), **changed: Any) -> dict[str, Any]:
    linen = LinenImages(**changed)
    return {
        "path": save(path, linen.init(jax.random.key(1), IMAGES)),
        "target": nnx.eval_shape(lambda: Images(nnx.Rngs(0), axes)),
        "linen": linen.apply,
        "init": lambda: Images(nnx.Rngs(0), axes),
    }


def evaluated(model: Images, x: Any) -> Any:
    model.eval()
    return model(x)


def verified(given: dict[str, Any], inputs: Any = IMAGES, nnx_apply: Any = evaluated) -> Verification:
    renames = given.get("renames", ())
    return verify(
        given["path"],
        given["target"],
        given["linen"],
        nnx_apply,
        (inputs,),
        renames=renames,
        init=given["init"],
    )


@pytest.mark.parametrize("axes", [(0, 3, 1, 2), (0, 2, 1, 3), (0, 3, 2, 1)])
def test_features_flattened_in_another_order_are_proved_and_settled(tmp_path: pathlib.Path, axes: Any):
    given = images(tmp_path / "run", axes)
    first = verified(given).first
    assert first is not None
    assert first.path == "fc"
    assert first.proved.startswith(
        "fc is called with the same numbers as Linen's in another order, and kernel"
    )
    assert [*first.changes] == [("fc", "kernel")]
    pair = (given["linen"], evaluated, (IMAGES,))
    found = suggest(given["path"], given["target"], init=given["init"], verify=pair)
    assert found.is_proved
    assert verified(given | {"renames": found.renames}).equal


class LinenTwoHeads(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = x.reshape(len(x), -1)
        return nn.Dense(3, name="policy")(x), nn.Dense(2, name="value")(x)


class TwoHeads(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.policy, self.value = nnx.Linear(108, 3, rngs=rngs), nnx.Linear(108, 2, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
        return self.policy(x), self.value(x)


def test_what_several_modules_take_of_a_flattened_image_is_settled_for_each(tmp_path: pathlib.Path):
    linen = LinenTwoHeads()
    path = save(tmp_path, linen.init(jax.random.key(0), IMAGES))
    target = nnx.eval_shape(lambda: TwoHeads(nnx.Rngs(0)))

    found = suggest(path, target, verify=(linen.apply, lambda model, x: model(x), (IMAGES,)))

    assert found.is_proved
    assert {rule.pattern for rule in found.renames if isinstance(rule, Transpose)} == {
        "policy/kernel",
        "value/kernel",
    }


def test_features_that_rules_put_in_a_wrong_order_are_proved_too(tmp_path: pathlib.Path):
    linen = LinenTwoHeads()
    path = save(tmp_path, linen.init(jax.random.key(0), IMAGES))
    target = nnx.eval_shape(lambda: TwoHeads(nnx.Rngs(0)))
    wrong = [
        Reshape("kernel", (6, 6, 3, -1)),
        Transpose("kernel", (1, 0, 2, 3)),
        Reshape("kernel", (108, -1)),
    ]

    first = verify(path, target, linen.apply, lambda model, x: model(x), (IMAGES,), renames=wrong).first

    assert first is not None
    assert first.path == "policy"
    assert first.proved.startswith("policy is called with the same numbers as Linen's in another order")


def test_of_a_module_that_is_called_several_times_inputs_are_compared_once(monkeypatch):
    random, compared = np.random.default_rng(0), list[int]()
    calls = [[random.normal(size=(4, 50)).astype(np.float32)] for _ in range(3)]
    uses = [Use(call=cast(Any, None), inputs=inputs, outputs=()) for inputs in calls]
    original = pairing.compare_inputs
    monkeypatch.setattr(pairing, "compare_inputs", lambda *some: compared.append(1) or original(*some))

    found = [*pairing.call_by_call([uses[1], uses[0], uses[2]], uses)]

    assert [(at, one is other) for at, one, other, _ in found] == [(0, True), (1, True), (2, True)]
    assert len(compared) == 3 + 1  # The first is not what Linen calls it with first.


def test_of_several_orders_that_inputs_allow_none_is_told():
    def order(columns: int) -> Any:
        inputs = np.zeros((4, 36), np.float32)
        inputs[:, :columns] = np.random.default_rng(0).normal(size=(4, columns))
        turned = inputs.reshape(4, 9, 4).transpose(0, 2, 1).reshape(4, 36)
        nothing: Any = None
        uses = [Use(call=nothing, inputs=[array], outputs=()) for array in (inputs, turned)]
        return Compared(found=nothing, pair=nothing, linen=uses[0], nnx=uses[1]).order_of_features()

    assert order(36) == ((9, 4), (1, 0))
    assert order(2) is None  # (3, 3, 4) from behind is one too.


def test_numbers_are_the_same_in_another_order_where_all_outputs_are():
    one, two = np.arange(6.0), np.arange(3)
    assert same_numbers([one], [one[::-1]])
    assert same_numbers([one, two], [one[::-1], two])
    assert not same_numbers([one, two], [one * 2, two])
    assert not same_numbers([one, two], [one * 2, two[::-1]])
    assert not same_numbers([one], [one])


def test_how_often_a_module_is_called_is_said(tmp_path: pathlib.Path):
    found = verified(images(tmp_path / "run", times=3))
    assert "again: called 3 times in Linen and 1 time in NNX." in found.remarks
    assert not verified(images(tmp_path / "other")).remarks


def test_dropout_that_is_on_is_named(tmp_path: pathlib.Path):
    def half(model: Images, x: Any) -> Any:
        model.eval()
        model.drop.deterministic = False
        return model(x)

    found = verified(images(tmp_path / "run"), nnx_apply=half)
    assert "drop: dropout is on (deterministic is False), and in Linen none is." in found.remarks


class LinenFlat(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        for at in range(2):
            x = x + nn.tanh(nn.Dense(8, name=f"mix_{at}")(nn.LayerNorm(name=f"norm_{at}")(x)))
        return x


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.mix = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return x + nnx.tanh(self.mix(self.norm(x)))


class Flat(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([Layer(rngs) for _ in range(2)])

    def __call__(self, x: Any) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x


RULES = [("norm_{i}", "layers/{i}/norm"), ("mix_{i}", "layers/{i}/mix")]


def flat(path: pathlib.Path, *rules: Any, more: float = 0.0) -> Verification:
    x = np.random.default_rng(1).normal(size=(4, 5, 8)).astype(np.float32)
    variables = LinenFlat().init(jax.random.key(1), x)
    random = np.random.default_rng(2)

    def moved(leaf: Any) -> Any:
        return np.asarray(leaf + random.normal(size=leaf.shape), np.float32)

    def linen(variables: Any, x: Any) -> Any:
        return cast(Any, LinenFlat().apply(variables, x)) + more

    def ours(model: Flat, x: Any) -> Any:
        return model(x) + more

    variables = jax.tree.map(moved, variables)
    return verify(
        save(path, variables),
        nnx.eval_shape(lambda: Flat(nnx.Rngs(0))),
        linen,
        ours,
        (x,),
        renames=[*rules, *RULES],
    )


def test_weights_exchanged_in_all_layers_are_found(tmp_path: pathlib.Path):
    found = flat(
        tmp_path / "run", ("norm_{i}/bias", "layers/{i}/mix/bias"), ("mix_{i}/bias", "layers/{i}/norm/bias")
    )
    assert found.first is not None
    assert found.first.proved == "layers/{0..1}/mix/bias and layers/{0..1}/norm/bias are exchanged"
    assert str(found).splitlines()[2] == "first difference: layers/0"
    assert "(root)" not in str(found).splitlines()[2]


def test_programs_are_not_equal_where_weights_are_proved_wrong(tmp_path: pathlib.Path):
    wrong = Transpose("mix_1/kernel", (1, 0))
    found = flat(tmp_path / "run", wrong, more=1e6)
    assert not found.equal
    assert found.relative <= found.tolerance
    assert found.first is not None
    assert found.first.proved
    assert "the outputs are within the tolerance, and the weights of layers/1/mix are wrong." in found.remarks
    assert flat(tmp_path / "right", more=1e6).equal


class LinenBias(nn.Module):
    """A bias for each head and distance, the heads first or last."""

    is_turned: bool = False

    @nn.compact
    def __call__(self, places: Any) -> Any:
        found = self.param("embedding", nn.initializers.normal(1.0), (7, 4))[places]
        return found.transpose(1, 0) if self.is_turned else found.transpose(2, 0, 1)[None]


class LinenBiased(nn.Module):
    is_flat: bool = False

    @nn.compact
    def __call__(self, x: Any) -> Any:
        places = np.abs(np.arange(5)[:, None] - np.arange(5)[None]) % 7
        if self.is_flat:  # Nothing but the numbers tells that they are in another order.
            more = LinenBias(is_turned=True, name="bias")(places[0]).reshape(4, 5)
            x = x + more.sum(axis=0)[None, :, None]
        else:
            x = x + LinenBias(name="bias")(places)[0].sum(axis=(0, 1))[None, :, None]
        x = nn.tanh(nn.Dense(8, name="up")(x))
        return nn.Dense(8, name="down")(x)


class Biased(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, *, is_flat: bool):
        self.bias = nnx.Embed(7, 4, rngs=rngs)
        self.up = nnx.Linear(8, 8, rngs=rngs)
        self.down = nnx.Linear(8, 8, rngs=rngs)
        self.is_flat = is_flat

    def __call__(self, x: Any) -> Any:
        places = np.abs(np.arange(5)[:, None] - np.arange(5)[None]) % 7
        bias = self.bias(places[0]).sum(axis=-1) if self.is_flat else self.bias(places).sum(axis=(0, 2))
        return self.down(nnx.tanh(self.up(x + bias[None, :, None])))


@pytest.mark.parametrize("is_flat", [False, True], ids=["axes", "numbers"])
def test_numbers_in_another_order_that_what_follows_puts_right_are_no_difference(tmp_path, is_flat) -> None:
    x = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
    linen = LinenBiased(is_flat=is_flat)
    path = save(tmp_path, linen.init(jax.random.key(1), x))

    def found(*rules: Any) -> Verification:
        target = nnx.eval_shape(lambda: Biased(nnx.Rngs(0), is_flat=is_flat))
        return verify(path, target, linen.apply, lambda model, x: model(x), (x,), renames=rules)

    right, wrong = found(), found(Transpose("up/kernel", (1, 0)))

    assert right.equal
    assert right.first is None
    assert right.remarks == ()
    assert max(module.outputs.relative for module in right.modules if not module.differs) < 1e-5
    assert wrong.first is not None
    assert wrong.first.path == "up"
    assert wrong.first.proved
    exchanged = found(("up", "down"), ("down", "up")).first
    assert exchanged is not None
    assert exchanged.path != "bias"


class LinenTowers(nn.Module):
    times: int = 1

    @nn.compact
    def __call__(self, one: Any, other: Any) -> Any:
        encoder, norm = nn.Dense(8, name="encoder"), nn.LayerNorm(name="norm")
        first = norm(encoder(one))
        for _ in range(self.times - 1):
            first = norm(encoder(first))
        return nn.Dense(3, name="out")(first * norm(encoder(other)))


class Towers(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.encoder = nnx.Linear(8, 8, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.out = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, one: Any, other: Any) -> Any:
        second = self.norm(self.encoder(other))
        return self.out(self.norm(self.encoder(one)) * second)


def towers(path: pathlib.Path, *rules: Any, times: int = 1) -> Verification:
    one, other = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
    linen = LinenTowers(times=times)
    target = nnx.eval_shape(lambda: Towers(nnx.Rngs(0)))
    where = save(path, linen.init(jax.random.key(1), one, other))
    return verify(where, target, linen.apply, lambda m, a, b: m(a, b), (one, other), renames=rules)


def test_calls_of_a_module_are_paired_by_what_it_is_called_with(tmp_path: pathlib.Path):
    right = towers(tmp_path / "right")
    assert right.equal
    assert right.remarks == ()
    assert {module.inputs.relative for module in right.modules} == {0.0}

    wrong = towers(tmp_path / "wrong", Transpose("encoder/kernel", (1, 0))).first
    assert wrong is not None
    assert wrong.path == "encoder"
    assert wrong.proved


def test_of_a_module_that_one_program_calls_more_often_the_same_calls_are_compared(tmp_path: pathlib.Path):
    found = towers(tmp_path, times=2)
    assert not found.equal
    assert found.first is not None
    assert found.first.path == "(root)"
    same = [module.nnx.path for module in found.modules if not module.differs]
    assert same.count(("encoder",)) == 2
    lines = str(found).splitlines()
    called = next(at for at, line in enumerate(lines) if "called 3 times in Linen and 2 times in NNX" in line)
    assert called < next(at for at, line in enumerate(lines) if "hint:" in line)


class LinenGated(nn.Module):
    """Two matrices apart, or one array of both."""

    is_joined: bool = False

    @nn.compact
    def __call__(self, x: Any) -> Any:
        if self.is_joined:
            both = nn.DenseGeneral((2, 6), name="both")(x)
            gate, up = both[..., 0, :], both[..., 1, :]
        else:
            gate, up = (nn.Dense(6, name=name)(x) for name in ("gate", "up"))
        return nn.Dense(8, name="down")(nn.silu(gate) * up)


class Gated(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, *, is_joined: bool):
        if is_joined:
            self.both = nnx.LinearGeneral(8, (2, 6), rngs=rngs)
        else:
            self.gate, self.up = (nnx.Linear(8, 6, rngs=rngs) for _ in range(2))
        self.down = nnx.Linear(6, 8, rngs=rngs)
        self.is_joined = is_joined

    def __call__(self, x: Any) -> Any:
        both = self.both(x) if self.is_joined else None
        gate, up = (self.gate(x), self.up(x)) if both is None else (both[..., 0, :], both[..., 1, :])
        return self.down(nnx.silu(gate) * up)


@pytest.mark.parametrize("is_joined", [True, False], ids=["joined", "separated"])
def test_as_many_parts_as_examples_are_not_taken_for_layers(tmp_path: pathlib.Path, is_joined: bool):
    x = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
    linen = LinenGated(is_joined=not is_joined)
    target = nnx.eval_shape(lambda: Gated(nnx.Rngs(0), is_joined=is_joined))
    path = save(tmp_path, linen.init(jax.random.key(1), x))

    def found(*more: Any, order: tuple[str, str] = ("gate", "up")) -> Verification:
        rules = list[Any]()
        for leaf, axis in (("kernel", 1), ("bias", 0)):
            parts = [f"{name}/{leaf}" for name in order]
            if is_joined:
                rules.append(Fuse(parts, f"both/{leaf}", axis=axis, new_axis=True))
            else:
                rules.append(Split(f"both/{leaf}", parts, axis=axis, drop_axis=True))
        return verify(path, target, linen.apply, lambda m, x: m(x), (x,), renames=[*more, *rules])

    right, later = found(), found(Scale("down/kernel", 2.0)).first
    assert right.equal
    assert right.remarks == ()
    assert later is not None
    assert later.path == "down"
    assert later.proved
    wrong = found(order=("up", "gate")).first
    assert wrong is not None
    if is_joined:
        assert wrong.path == "both"
        assert "joined in another order" in wrong.proved


class LinenBranches(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        def branch(name: str, width: int) -> Any:
            y = nn.tanh(nn.Dense(8, name=f"{name}1")(x))
            return nn.Dense(width, name=f"{name}3")(nn.tanh(nn.Dense(8, name=f"{name}2")(y)))

        return branch("pi", 6), branch("v", 1)


class Branches(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.pi1, self.pi2, self.v1, self.v2 = (nnx.Linear(8, 8, rngs=rngs) for _ in range(4))
        self.pi3, self.v3 = nnx.Linear(8, 6, rngs=rngs), nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        pi, v = nnx.tanh(self.pi1(x)), nnx.tanh(self.v1(x))
        return self.pi3(nnx.tanh(self.pi2(pi))), self.v3(nnx.tanh(self.v2(v)))


@pytest.mark.parametrize("number", [1, 2])
def test_of_two_branches_the_modules_are_named_with_which_all_agrees(tmp_path: pathlib.Path, number: int):
    x = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    linen, target = LinenBranches(), nnx.eval_shape(lambda: Branches(nnx.Rngs(0)))
    path = save(tmp_path, linen.init(jax.random.key(1), x))
    rules = [(f"pi{number}", f"v{number}"), (f"v{number}", f"pi{number}")]

    first = verify(path, target, linen.apply, lambda m, x: m(x), (x,), renames=rules).first

    assert first is not None
    assert first.path == f"pi{number}"
    assert first.proved
    assert {leaf[0] for leaf in first.changes} <= {f"pi{number}", f"v{number}"}
