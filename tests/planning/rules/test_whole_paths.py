"""A rule sees the whole stored path, owner and collection included, as `orbax-nnx tree` prints it."""

from typing import Any

import numpy as np
import optax
import pytest
from flax import nnx

from orbax_nnx_handler import Drop, RestorePlan, Transpose, UnusedRuleError
from tests.planning.plans import Numbers, plan_of, values_of

SHAPES = {"up": {"kernel": (2, 3), "bias": (3,)}, "down": {"kernel": (3, 2), "bias": (2,)}}


class Models(Numbers):
    """Trees of models and train states."""

    def model(self) -> dict[str, Any]:
        return {module: {k: self.array(*shape) for k, shape in own.items()} for module, own in SHAPES.items()}

    def train_state(self) -> dict[str, Any]:
        adam = {"count": np.int32(self.next), "mu": self.model(), "nu": self.model()}
        return {"params": self.model(), "opt_state": [adam, None], "step": np.int32(self.next + 1)}


class Model(nnx.Module):
    def __init__(self) -> None:
        self.up = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        self.down = nnx.Linear(3, 2, rngs=nnx.Rngs(0))


def optimizer(model: Model) -> nnx.Optimizer[Model]:
    return nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)


def planned(target: Any, stored: Any, *rules: Any) -> tuple[RestorePlan, dict[str, np.ndarray]]:
    plan = plan_of(nnx.eval_shape(target), stored, rules, unexpected="error")
    plan.check()
    return plan, values_of(plan, stored)


def assert_below(values: dict[str, np.ndarray], at: str, tree: dict[str, Any]) -> None:
    """Compares everything below a path with a stored tree, leaf by leaf."""
    expected = {f"{at}/{module}/{name}": leaf for module, own in tree.items() for name, leaf in own.items()}
    found = {path: value for path, value in values.items() if path.startswith(f"{at}/")}
    assert sorted(found) == sorted(expected)
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


def test_a_copy_beside_the_parameters_is_asked_for_by_its_collection() -> None:
    numbers = Models()
    stored = {"params": numbers.model(), "ema_params": numbers.model()}

    _, values = planned(lambda: {"model": Model(), "ema": Model()}, stored, ("ema_params", "ema"))

    assert_below(values, "model", stored["params"])
    assert_below(values, "ema", stored["ema_params"])


def test_two_collections_change_places() -> None:
    numbers = Models()
    stored = {"params": numbers.model(), "ema_params": numbers.model()}
    rules = [("ema_params", "model"), Drop("params", "the averaged weights are used")]

    _, values = planned(lambda: {"model": Model()}, stored, *rules)

    assert_below(values, "model", stored["ema_params"])


def test_an_owner_and_its_collection_become_one_level() -> None:
    numbers = Models()
    stored = {"model": {"params": numbers.model()}, "critic": {"params": numbers.model()}}
    rules = [("model/params", "actor"), ("critic/params", "value_net")]

    _, values = planned(lambda: {"actor": Model(), "value_net": Model()}, stored, *rules)

    assert_below(values, "actor", stored["model"]["params"])
    assert_below(values, "value_net", stored["critic"]["params"])


def test_a_train_state_within_another_level_is_named_with_it() -> None:
    numbers = Models()
    stored = {"model": {"params": numbers.model()}}

    _, values = planned(lambda: {"model": Model()}, stored, ("model/params", "model"))

    assert_below(values, "model", stored["model"]["params"])


def two_networks() -> Any:
    gen, disc = Model(), Model()
    return {"gen": gen, "disc": disc, "g_opt": optimizer(gen), "d_opt": optimizer(disc)}


def test_optimizers_go_where_rules_say_and_take_their_counts_and_steps_along() -> None:
    numbers = Models()
    stored = {"gen": numbers.train_state(), "disc": numbers.train_state()}
    rules = [
        ("gen/opt_state", "g_opt/opt_state"),
        ("disc/opt_state", "d_opt/opt_state"),
        ("gen/step", "g_opt/step"),
        ("disc/step", "d_opt/step"),
    ]

    _, values = planned(two_networks, stored, *rules)

    for name, own in (("gen", "g_opt"), ("disc", "d_opt")):
        state = stored[name]
        assert_below(values, name, state["params"])
        for slot in ("mu", "nu"):
            assert_below(values, f"{own}/opt_state/0/{slot}", state["opt_state"][0][slot])
        assert values[f"{own}/opt_state/0/count"] == state["opt_state"][0]["count"]
        assert values[f"{own}/step"] == state["step"]


@pytest.mark.parametrize("name", ["a_first", "z_last"])
@pytest.mark.parametrize("kept", ["gen", "disc"])
def test_a_renamed_network_takes_its_own_moments_wherever_its_new_name_sorts(name: str, kept: str) -> None:
    numbers = Models()
    stored = {"gen": numbers.train_state(), "disc": numbers.train_state()}
    (old,) = stored.keys() - {kept}

    def target() -> Any:
        models = {own: Model() for own in sorted([name, kept])}
        return {own: {"model": model, "optimizer": optimizer(model)} for own, model in models.items()}

    rules = [
        (f"{old}/params", f"{name}/params"),
        (f"{old}/opt_state", f"{name}/optimizer/opt_state"),
        (f"{old}/step", f"{name}/optimizer/step"),
    ]

    _, values = planned(target, stored, *rules)

    for own, state in ((name, stored[old]), (kept, stored[kept])):
        assert_below(values, f"{own}/model", state["params"])
        for slot in ("mu", "nu"):
            assert_below(values, f"{own}/optimizer/opt_state/0/{slot}", state["opt_state"][0][slot])
        assert values[f"{own}/optimizer/opt_state/0/count"] == state["opt_state"][0]["count"]
        assert values[f"{own}/optimizer/step"] == state["step"]


def test_a_rule_on_one_networks_weight_turns_its_moments_and_no_others() -> None:
    numbers = Models()
    stored = {"gen": numbers.train_state(), "disc": numbers.train_state()}
    for tree in (stored["gen"]["params"], *(stored["gen"]["opt_state"][0][s] for s in ("mu", "nu"))):
        tree["up"]["kernel"] = tree["up"]["kernel"].T
    rules = [
        Transpose("gen/params/up/kernel", (1, 0)),
        ("gen/opt_state", "g_opt/opt_state"),
        ("disc/opt_state", "d_opt/opt_state"),
        ("gen/step", "g_opt/step"),
        ("disc/step", "d_opt/step"),
    ]

    _, values = planned(two_networks, stored, *rules)

    for own, state, turned in (("g_opt", stored["gen"], True), ("d_opt", stored["disc"], False)):
        for slot in ("mu", "nu"):
            moment = state["opt_state"][0][slot]["up"]["kernel"]
            np.testing.assert_array_equal(
                values[f"{own}/opt_state/0/{slot}/up/kernel"], moment.T if turned else moment
            )


class Normed(nnx.Module):
    def __init__(self) -> None:
        self.up = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))


def test_statistics_below_a_field_of_their_own_are_brought_up() -> None:
    numbers = Models()
    stored = {
        "params": {
            "up": {"kernel": numbers.array(2, 3), "bias": numbers.array(3)},
            "norm": {"scale": numbers.array(3), "bias": numbers.array(3)},
        },
        "model_state": {"batch_stats": {"norm": {"mean": numbers.array(3), "var": numbers.array(3)}}},
    }

    _, values = planned(Normed, stored, ("model_state/batch_stats", "batch_stats"))

    statistics = stored["model_state"]["batch_stats"]["norm"]
    for name in ("mean", "var"):
        np.testing.assert_array_equal(values[f"norm/{name}"], statistics[name])


def test_a_network_that_is_dropped_takes_its_optimizer_and_its_step_along() -> None:
    numbers = Models()
    stored = {"gen": numbers.train_state(), "disc": numbers.train_state()}

    def target() -> Any:
        gen = Model()
        return {"gen": gen, "g_opt": optimizer(gen)}

    rules = [
        Drop("disc", "only the generator goes on"),
        ("gen/opt_state", "g_opt/opt_state"),
        ("gen/step", "g_opt/step"),
    ]

    plan, values = planned(target, stored, *rules)

    assert_below(values, "g_opt/opt_state/0/mu", stored["gen"]["opt_state"][0]["mu"])
    dropped = {"/".join(map(str, path)) for path in plan.dropped}
    assert {path.split("/")[0] for path in dropped} == {"disc"}
    assert {"disc/step", "disc/opt_state/0/count", "disc/opt_state/0/nu/down/bias"} <= dropped
    assert len(dropped) == 3 * 4 + 2


def test_a_pattern_is_no_part_of_a_segment() -> None:
    stored = {"params": Models().model()}

    with pytest.raises(UnusedRuleError):
        planned(lambda: {"model": Model()}, stored, ("param", "model"))


class Wrapped(nnx.Module):
    def __init__(self) -> None:
        self.online, self.other = Model(), Model()


RULES_AS_THE_TARGET_SPELLS_THEM = [
    [("params", "model/online")],
    [("params/up", "model/online/up"), ("params/down", "model/online/down")],
    [("params", "model/online/params")],
]


@pytest.mark.parametrize("rules", RULES_AS_THE_TARGET_SPELLS_THEM)
@pytest.mark.parametrize("trained", ["online", "model"])
def test_moments_follow_weights_that_a_rule_calls_as_the_target_spells_them(rules: Any, trained: str) -> None:
    numbers = Models()
    stored = numbers.train_state() | {"target_params": numbers.model()}

    def target() -> Any:
        model = Wrapped()
        if trained == "model":
            del model.other
            return {"model": model, "optimizer": nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)}
        return {"model": model, "optimizer": optimizer(model.online)}

    copy = ("target_params", "model/other") if trained == "online" else Drop("target_params", "not wanted")
    _, values = planned(target, stored, *rules, copy)

    assert_below(values, "model/online", stored["params"])
    if trained == "online":
        assert_below(values, "model/other", stored["target_params"])
    above = "optimizer/opt_state/0"
    for name in ("mu", "nu"):
        at = f"{above}/{name}" if trained == "online" else f"{above}/{name}/online"
        assert_below(values, at, stored["opt_state"][0][name])


@pytest.mark.parametrize("name", ["a_copy", "z_copy"])
def test_a_copy_that_a_rule_names_leaves_each_network_its_optimizer(name: str) -> None:
    numbers = Models()
    stored = {part: numbers.train_state() for part in ("actor", "critic")}
    stored["critic"]["target_params"] = numbers.model()

    def target() -> Any:
        states = {part: Model() for part in ("actor", "critic")}
        trained = {part: {"model": model, "optimizer": optimizer(model)} for part, model in states.items()}
        return trained | {name: Model()}

    _, values = planned(target, stored, ("critic/target_params", name))

    assert_below(values, name, stored["critic"]["target_params"])
    for part in ("actor", "critic"):
        assert_below(values, f"{part}/model", stored[part]["params"])
        assert_below(values, f"{part}/optimizer/opt_state/0/mu", stored[part]["opt_state"][0]["mu"])


@pytest.mark.parametrize("end", ["", "/params"])
def test_a_model_that_is_a_copy_now_is_not_lent_the_moments_of_the_weights(end: str) -> None:
    numbers = Models()
    stored = numbers.train_state() | {"ema_params": numbers.model()}

    def target() -> Any:
        model = Model()
        return {"ema": Model(), "model": model, "optimizer": optimizer(model)}

    plan = plan_of(nnx.eval_shape(target), stored, [("params", f"ema{end}"), ("ema_params", f"model{end}")])

    assert {path[0] for path in plan.missing} == {"optimizer"}


FIELDS_INTO_NETWORKS = {
    "as the fields of a train state": ("params", "opt_state", "step"),
    "as the target spells them": ("model", "optimizer/opt_state", "optimizer/step"),
}


@pytest.mark.parametrize("ends", FIELDS_INTO_NETWORKS.values(), ids=FIELDS_INTO_NETWORKS)
def test_fields_beside_a_train_state_below_a_key_become_the_network_that_rules_make_of_them(
    ends: Any,
) -> None:
    numbers = Models()
    outer = numbers.train_state()
    stored = {"inner": numbers.train_state()} | {f"outer_{field}": part for field, part in outer.items()}
    rules = [(f"outer_{field}", f"outer/{end}") for field, end in zip(outer, ends, strict=True)]

    def target() -> Any:
        models = {name: Model() for name in ("inner", "outer")}
        return {name: {"model": model, "optimizer": optimizer(model)} for name, model in models.items()}

    error = plan_of(nnx.eval_shape(target), stored, layout="train_state").error()
    _, values = planned(target, stored, *rules)

    hints = [hint.arguments["renames"] for hint in error.hints if "renames" in hint.arguments]
    assert hints == [[(f"outer_{field}", f"outer/{field}") for field in ("params", "opt_state", "step")]]
    assert '"init"' not in str(error)
    for name, state in (("inner", stored["inner"]), ("outer", outer)):
        assert_below(values, f"{name}/model", state["params"])
        for moment in ("mu", "nu"):
            assert_below(values, f"{name}/optimizer/opt_state/0/{moment}", state["opt_state"][0][moment])
        assert values[f"{name}/optimizer/step"] == state["step"]


PARTS_INTO_NETWORKS = ["opt_state", "optimizer/opt_state"]


@pytest.mark.parametrize("model", ["params", "model"])
@pytest.mark.parametrize("end", PARTS_INTO_NETWORKS)
def test_optimizers_of_parts_beside_one_params_go_where_rules_take_their_parts(model: str, end: str) -> None:
    numbers = Models()
    states = {name: numbers.train_state() for name in ("gen", "disc")}
    stored = {"params": {name: state["params"] for name, state in states.items()}, "step": np.int32(3)}
    stored |= {f"{name}_opt_state": state["opt_state"] for name, state in states.items()}
    rules: list[Any] = [(f"params/{name}", f"{name}/{model}") for name in states]
    rules += [(f"{name}_opt_state", f"{name}/{end}") for name in states]

    def target() -> Any:
        models = {name: Model() for name in states}
        chains = {name: optimizer(model).opt_state for name, model in models.items()}
        return {name: {"model": models[name], "optimizer": {"opt_state": chains[name]}} for name in states}

    _, values = planned(target, stored, *rules, Drop("step", "counted anew"))

    for name, state in states.items():
        assert_below(values, f"{name}/model", state["params"])
        for moment in ("mu", "nu"):
            assert_below(values, f"{name}/optimizer/opt_state/0/{moment}", state["opt_state"][0][moment])


def test_a_copy_that_rules_make_a_network_is_not_lent_the_moments_of_an_optimizer_beside_it() -> None:
    numbers = Models()
    stored = {"inner": numbers.train_state(), "outer_params": numbers.model(), "ema_params": numbers.model()}
    stored["outer_opt_state"] = numbers.train_state()["opt_state"]
    rules = [("outer_opt_state", "outer/opt_state"), ("ema_params", "outer/params")]

    def target() -> Any:
        models = {name: Model() for name in ("inner", "outer")}
        return {name: {"model": model, "optimizer": optimizer(model)} for name, model in models.items()}

    plan = plan_of(nnx.eval_shape(target), stored, rules)

    assert {path for path in plan.missing if "mu" in path} == {
        ("outer", "optimizer", "opt_state", 0, "mu", module, name)
        for module in SHAPES
        for name in SHAPES[module]
    }


WHOLE_PATHS: dict[str, list[tuple[str, str]]] = {
    "one module, below its collection": [("high", "model/up")],
    "one module, from its collection on": [("params/high", "model/up")],
    "every module, below its collection": [("high", "model/up"), ("down", "model/down")],
    "every module by itself": [("high", "model/up"), ("down", "down")],
}


@pytest.mark.parametrize("rules", WHOLE_PATHS.values(), ids=WHOLE_PATHS)
@pytest.mark.parametrize("level", ["", "state/"])
def test_the_targets_whole_path_may_be_written_in_front_of_a_modules_own_stored_one(
    rules: Any, level: str
) -> None:
    stored = Models().train_state()
    moments = [stored["opt_state"][0][slot] for slot in ("mu", "nu")]
    for tree in (stored["params"], *moments):
        tree["high"] = tree.pop("up")

    def target() -> Any:
        model = Model()
        state = {"model": model, "optimizer": optimizer(model)}
        return {"state": state} if level else state

    rules = [(old, f"{level}{new}" if new.startswith("model") else new) for old, new in rules]

    _, values = planned(target, stored, *rules)

    for tree in (stored["params"], *moments):
        tree["up"] = tree.pop("high")
    assert_below(values, f"{level}model", stored["params"])
    for slot, tree in zip(("mu", "nu"), moments, strict=True):
        assert_below(values, f"{level}optimizer/opt_state/0/{slot}", tree)


class WithStatistics(Model):
    """A model with statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nnx.BatchNorm(3, use_bias=False, use_scale=False, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("rule", [("params", "model"), ("params", "model/params")], ids=str)
@pytest.mark.parametrize("layout", ["linen", "maxtext"])
@pytest.mark.parametrize("beside", [(), ("ema",)], ids=["alone", "beside an average"])
def test_a_level_that_names_no_network_leaves_the_model_its_statistics_and_its_optimizer(
    rule: Any, layout: str, beside: tuple[str, ...]
) -> None:
    numbers = Models()
    model, statistics = numbers.train_state(), {"norm": {"mean": numbers.array(3), "var": numbers.array(3)}}
    adam = model["opt_state"][0]
    stored = model | {"batch_stats": statistics}
    if layout == "maxtext":
        moments = {slot: {"params": adam[slot]} for slot in ("mu", "nu")}
        stored = {
            "params": {"params": model["params"]},
            "opt_state": [adam | moments, None],
            "step": model["step"],
            "nnx_aux": {"model": statistics},
        }

    def target() -> Any:
        own = WithStatistics()
        return {"model": own, "optimizer": optimizer(own)} | {name: WithStatistics() for name in beside}

    policy: Any = {nnx.PathContains(name): "init" for name in beside} | {...: "error"}
    plan = plan_of(target(), stored, [rule], unexpected="error", policy=policy)

    plan.check()
    values = values_of(plan, stored)
    assert_below(values, "model", model["params"] | statistics)
    for slot in ("mu", "nu"):
        assert_below(values, f"optimizer/opt_state/0/{slot}", adam[slot])
    assert not any(path.startswith("ema") for path in values)


@pytest.mark.parametrize("names", [("model", "model_fine"), ("model_fine", "model")], ids="/".join)
@pytest.mark.parametrize("known", [1, 2])
def test_a_rule_may_call_a_network_model_beside_another_one(names: tuple[str, str], known: int) -> None:
    numbers = Models()
    stored = {"params": {f"MLP_{at}": numbers.train_state()["params"] for at in range(2)}}
    rules = [(f"MLP_{at}", name) for at, name in enumerate(names)][:known]

    plan = plan_of(nnx.eval_shape(lambda: {name: Model() for name in names}), stored, rules, policy="warn")

    values = values_of(plan, stored)
    for at, name in enumerate(names[:known]):
        assert_below(values, name, stored["params"][f"MLP_{at}"])
    assert {path[0] for path in plan.missing} == {*names[known:]}
