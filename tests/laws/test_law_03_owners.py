"""Law 3: an owner is a part of the name."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, traverse_util
from flax.training.train_state import TrainState

from orbax_nnx_handler import (
    Add,
    Copy,
    Drop,
    MissingParamError,
    NNXLinenHandler,
    NNXLinenRestore,
    Rename,
    RestoreError,
    Transpose,
    from_linen,
    plan_restore,
    restore,
    save,
    to_linen,
)
from tests.laws import worlds
from tests.laws.worlds import (
    FORMS,
    Branch,
    Numbers,
    Training,
    check,
    model_target,
    refused,
    right_or_refused,
    target_of,
    training_target,
    write,
)
from tests.sampled import sampled
from tests.written import put_at

ADAM = optax.adam(1e-3)


def _model(numbers):
    return {"hidden": numbers.dense(4, 8), "out": numbers.dense(8, 3)}


def _train_state(numbers, params, step, tx=ADAM, cls=TrainState, **fields):
    made = cls.create(apply_fn=None, params=params, tx=tx, **fields)
    return made.replace(opt_state=numbers.optimizer(tx, params), step=step)


def _expected(state, owner="", stats=None):
    model = worlds.below(f"{owner}model", state.params)
    if stats:
        model |= worlds.below(f"{owner}model", stats)
    moments = worlds.below(f"{owner}optimizer/opt_state", state.opt_state)
    step = {(*filter(None, owner.split("/")), "optimizer", "step"): np.uint32(state.step)}
    return model | moments | step


class _Owner(nnx.Module):
    def __init__(self, **parts):
        for name, part in parts.items():
            setattr(self, name, part)


@pytest.mark.parametrize("names", [("gen", "disc"), ("a", "b"), ("online", "target")])
def test_another_networks_optimizer_is_not_lent(tmp_path, names):
    numbers = Numbers()
    one, other = _model(numbers), _model(numbers)
    optimizer = {"opt_state": numbers.optimizer(ADAM, one), "step": np.uint32(7)}
    path = write(tmp_path, {names[0]: one, names[1]: other, f"{names[0]}_opt": optimizer})

    def make():
        model = Branch(other, {})
        return _Owner(**{names[1]: model, f"{names[1]}_opt": nnx.Optimizer(model, ADAM, wrt=nnx.Param)})

    refused(path, nnx.eval_shape(make), unexpected="ignore")


@pytest.mark.parametrize("layer", [{"gamma": (3, 3)}, {"gamma": (3, 3), "mu": {"scale": (3,)}}])
def test_an_optimizer_is_restored_beside_another_network_whose_last_names_are_its_own(tmp_path, layer):
    numbers = Numbers()
    shapes = jax.tree.map(
        lambda shape: np.zeros(shape, np.float32), layer, is_leaf=lambda node: isinstance(node, tuple)
    )
    models = {"gen": {"Dense_0": numbers.like(shapes)}}
    models["disc"] = {"blocks": {at: numbers.like(shapes) for at in range(2)}}
    optimizer = {"opt_state": numbers.optimizer(ADAM, models["disc"]), "step": np.uint32(7)}
    path = write(tmp_path, {**models, "disc_opt": optimizer})

    def make():
        trained = nnx.Optimizer(Branch(models["disc"], {}), ADAM, wrt=nnx.Param)
        return _Owner(gen=Branch(models["gen"], {}), disc_opt=trained)

    result = restore(path, nnx.eval_shape(make), unexpected="ignore")
    moments = worlds.below("disc_opt/opt_state", optimizer["opt_state"])
    check(result, worlds.below("gen", models["gen"]) | moments | {("disc_opt", "step"): np.uint32(7)})


@pytest.mark.parametrize("names", [("teacher", "student"), ("student", "teacher")])
def test_the_teachers_moments_are_not_the_students(tmp_path, names):
    numbers = Numbers()
    one, other = _model(numbers), _model(numbers)
    optimizer = {"opt_state": numbers.optimizer(ADAM, one), "step": np.uint32(7)}
    path = write(tmp_path, {names[0]: {"model": one, "optimizer": optimizer}, names[1]: {"model": other}})
    target = nnx.eval_shape(lambda: _Owner(**{names[1]: Training(other, ADAM, {})}))
    refused(path, target, unexpected="ignore")


def test_a_rule_for_the_weights_of_one_network_lends_no_optimizer_of_the_other(tmp_path):
    numbers = Numbers()
    one, other = _model(numbers), _model(numbers)
    path = write(tmp_path, {"gen": _train_state(numbers, one, 7), "disc": {"params": other}})
    target = training_target(other, ADAM)
    refused(path, target, renames=[("disc/params", "model")], unexpected="ignore")


def test_moments_of_one_of_two_networks_below_params_are_not_the_others(tmp_path):
    numbers = Numbers()
    params = {"gen": _model(numbers), "disc": _model(numbers)}
    stored = {
        "params": params,
        "opt_state": numbers.optimizer(ADAM, {"gen": params["gen"]}),
        "step": np.int32(7),
    }
    target = training_target(params["disc"], ADAM)
    refused(write(tmp_path, stored), target, renames=[("disc", "model")], unexpected="ignore")


@pytest.mark.parametrize("key", ["model", "state", "train_state", "agent", "a/b"])
@pytest.mark.parametrize("statistics", [False, True])
def test_a_train_state_below_a_key_is_restored(tmp_path, key, statistics):
    class WithStatistics(TrainState):
        batch_stats: dict

    numbers = Numbers()
    params, stats = _model(numbers), {"bn": {"mean": numbers(8), "var": numbers(8)}}
    if statistics:
        state = _train_state(numbers, params, 7, cls=WithStatistics, batch_stats=stats)
    else:
        state, stats = _train_state(numbers, params, 7), {}
    tree = {"config": {"dims": np.array([5, 3])}, "data": [np.ones(2)]}
    inner = state
    for name in reversed(key.split("/")):
        inner = {name: inner}
    path = write(tmp_path, tree | inner)
    result = restore(path, training_target(params | stats, ADAM), unexpected="ignore")
    check(result, _expected(state, stats=stats))


@pytest.mark.parametrize("names", [("gen", "disc"), ("actor", "critic")])
def test_two_train_states_are_restored_each_into_its_own(tmp_path, names):
    numbers = Numbers()
    states = {name: _train_state(numbers, _model(numbers), 7 + 2 * at) for at, name in enumerate(names)}
    path = write(tmp_path, states)
    target = nnx.eval_shape(
        lambda: _Owner(**{name: Training(state.params, ADAM, {}) for name, state in states.items()})
    )
    expected = [_expected(state, f"{name}/") for name, state in states.items()]
    check(restore(path, target), expected[0] | expected[1])


@pytest.mark.parametrize("name", ["gen", "disc"])
def test_one_of_two_train_states_is_restored_below_its_name(tmp_path, name):
    numbers = Numbers()
    states = {each: _train_state(numbers, _model(numbers), step) for each, step in (("gen", 7), ("disc", 9))}
    path = write(tmp_path, states)
    target = nnx.eval_shape(lambda: _Owner(**{name: Training(states[name].params, ADAM, {})}))
    check(restore(path, target, unexpected="ignore"), _expected(states[name], f"{name}/"))


@pytest.mark.parametrize("name", ["gen", "disc"])
def test_one_of_two_train_states_is_restored_by_rules(tmp_path, name):
    numbers = Numbers()
    states = {each: _train_state(numbers, _model(numbers), step) for each, step in (("gen", 7), ("disc", 9))}
    path = write(tmp_path, states)
    renames = [(f"{name}/params", "model"), (f"{name}/opt_state", "optimizer/opt_state")]
    target = training_target(states[name].params, ADAM)
    check(restore(path, target, renames=renames, unexpected="ignore"), _expected(states[name]))


def test_which_of_two_train_states_is_meant_is_asked(tmp_path):
    numbers = Numbers()
    states = {each: _train_state(numbers, _model(numbers), step) for each, step in (("gen", 7), ("disc", 9))}
    refused(write(tmp_path, states), training_target(states["gen"].params, ADAM), unexpected="ignore")


def test_the_one_stored_step_is_not_the_step_of_two_networks(tmp_path):
    numbers = Numbers()
    models = {"gen": _model(numbers), "disc": _model(numbers)}
    path = write(
        tmp_path,
        models | {"gen_opt": {"opt_state": numbers.optimizer(ADAM, models["gen"]), "step": np.uint32(7)}},
    )

    def make():
        parts = {name: Branch(tree, {}) for name, tree in models.items()}
        optimizers = {f"{name}_opt": nnx.Optimizer(part, ADAM, wrt=nnx.Param) for name, part in parts.items()}
        return _Owner(**parts, **optimizers)

    try:
        result = restore(path, nnx.eval_shape(make), policy="init", init=make, unexpected="ignore")
    except RestoreError:
        return
    assert int(result.disc_opt.step[...]) != 7
    assert not np.any(result.disc_opt.opt_state[0].mu.hidden.kernel[...])


def test_weights_and_optax_state_in_two_items_are_restored_each_into_its_part(tmp_path):
    numbers = Numbers()
    params = _model(numbers)
    opt_state = numbers.optimizer(ADAM, params)
    with ocp.CheckpointManager(tmp_path) as manager:
        save = ocp.args.StandardSave
        manager.save(7, args=ocp.args.Composite(params=save(params), opt_state=save(opt_state)))
    target = training_target(params, ADAM)
    policy = {nnx.PathContains("step"): "warn", ...: "error"}
    handlers = {"params": NNXLinenHandler(), "opt_state": NNXLinenHandler()}
    with ocp.CheckpointManager(tmp_path, item_handlers=handlers) as manager:
        args = ocp.args.Composite(
            params=NNXLinenRestore(target.model),
            opt_state=NNXLinenRestore(target.optimizer, policy=policy),
        )
        result = manager.restore(7, args=args)
    check(result["params"], params)
    check(result["opt_state"], worlds.below("opt_state", opt_state))


@pytest.mark.parametrize(
    ("both", "beside", "form"),
    sampled([False, True], ["ema_params", "old_params", "spectral", "memory"], FORMS),
)
def test_a_network_with_a_collection_of_its_own_beside_its_weights_is_one_of_two(
    tmp_path, both, beside, form
):
    numbers = Numbers()
    gen, disc = ({"a": numbers.dense(), "b": numbers.dense()} for _ in range(2))
    stored = {"gen": {"params": gen, beside: numbers.like(gen)}, "disc": {"params": disc}}
    if both:
        stored["disc"][beside] = numbers.like(disc)
    path = write(tmp_path, stored | {"step": np.int32(7)})
    refused(path, target_of(form, gen), unexpected="ignore")
    if not both:
        wanted = {"gen": gen, "disc": disc}
        right_or_refused(path, target_of(form, wanted), wanted, unexpected="ignore")


@pytest.mark.parametrize("key", ["opt_state", "step", "model", "mu", "0"])
def test_a_train_state_below_a_key_that_is_called_like_a_field_is_one(tmp_path, key):
    numbers = Numbers()
    states = {}
    for name in (key, "other"):
        params = {"up": numbers.dense(), "down": numbers.dense()}
        opt_state = numbers.optimizer(ADAM, params)
        states[name] = {"params": params, "opt_state": opt_state, "step": np.int32(len(states) + 3)}
    path = write(tmp_path, states)
    target = training_target(states["other"]["params"], ADAM)
    if key != "model":
        refused(path, target, unexpected="ignore")
    # A target's own key `opt_state` stands above an optimizer: that one is a question.
    wanted = {name: state for name, state in states.items() if name != "opt_state"}
    targets = {name: training_target(state["params"], ADAM) for name, state in wanted.items()}
    result = restore(path, targets, unexpected="ignore")
    for name, state in wanted.items():
        check(result[name].model, state["params"])
        check(result[name].optimizer.opt_state[0].mu, state["opt_state"][0].mu)
        assert int(result[name].optimizer.step[...]) == int(state["step"])
    alone = restore(path, {"other": target}, unexpected="ignore")
    check(alone["other"].model, states["other"]["params"])


@pytest.mark.parametrize("key", ["agent_{}", "agents/{}", "net_{}/net", "{}"])
@pytest.mark.parametrize("listed", [False, True])
def test_train_states_that_are_numbered_are_restored_each_into_its_own(tmp_path, key, listed):
    numbers = Numbers()
    states = [_train_state(numbers, _model(numbers), 7 + 2 * at) for at in range(3)]
    stored = traverse_util.unflatten_dict({key.format(at): state for at, state in enumerate(states)}, sep="/")
    path = write(tmp_path, stored)
    targets = [training_target(state.params, ADAM) for state in states]
    name = key.split("{")[0].strip("_/")
    is_list = listed and name.startswith("agent")
    if is_list:
        wanted = {name: targets}
    else:
        wanted = traverse_util.unflatten_dict(
            {key.format(at): target for at, target in enumerate(targets)}, sep="/"
        )
    result = restore(path, wanted)
    for at, state in enumerate(states):
        part = result
        for each in (name, at) if is_list else key.format(at).split("/"):
            part = part[each]
        check(part, _expected(state))


@pytest.mark.parametrize("have", [(0, 2), (1, 2), (1,)])
def test_a_numbered_train_state_is_not_that_of_another_number(tmp_path, have):
    numbers = Numbers()
    params = _model(numbers)
    path = write(tmp_path, {f"agent_{at}": _train_state(numbers, numbers.like(params), at) for at in have})
    for wanted in (
        {f"agent_{at}": training_target(params, ADAM) for at in range(len(have))},
        {"agent": [training_target(params, ADAM) for _ in have]},
    ):
        refused(path, wanted, unexpected="ignore")


SWAPS = {
    "whole": [("gen", "disc"), ("disc", "gen")],
    "regex": [
        Rename(left, right, regex=True)
        for left, right in (("^gen/", "x/"), ("^disc/", "gen/"), ("^x/", "disc/"))
    ],
    "parts": [
        (f"{left}/{part}", f"{right}/{part}")
        for left, right in (("gen", "disc"), ("disc", "gen"))
        for part in ("params", "opt_state", "step")
    ],
}


@pytest.mark.parametrize("rules", SWAPS.values(), ids=SWAPS)
def test_two_networks_that_rules_exchange_take_their_optimizers_along(tmp_path, rules):
    numbers = Numbers()
    params = _model(numbers)
    states = {
        name: _train_state(numbers, numbers.like(params), step) for name, step in (("gen", 7), ("disc", 9))
    }
    path = write(tmp_path, states)
    targets = {name: training_target(params, ADAM) for name in states}
    result = restore(path, targets, renames=rules)
    for name, other in (("gen", "disc"), ("disc", "gen")):
        check(result[name], _expected(states[other]))
    # Without the optimizers' own rules, nothing of one network is lent to the other.
    weights = [(f"{left}/params", f"{right}/params") for left, right in (("gen", "disc"), ("disc", "gen"))]
    refused(path, targets, renames=weights)


@pytest.mark.parametrize("name", ["gen", "disc"])
def test_a_network_that_a_rule_calls_as_another_takes_its_optimizer_along(tmp_path, name):
    numbers = Numbers()
    params = _model(numbers)
    states = {
        each: _train_state(numbers, numbers.like(params), step) for each, step in (("gen", 7), ("disc", 9))
    }
    other = next(each for each in states if each != name)
    rules = [Drop(other, "not wanted"), (name, other)]
    result = restore(write(tmp_path, states), {other: training_target(params, ADAM)}, renames=rules)
    check(result[other], _expected(states[name]))


@pytest.mark.parametrize("key", ["state", "train_state", "agent"])
@pytest.mark.parametrize("copy", ["ema", "teacher", "zz"])
def test_a_model_beside_a_train_state_of_the_same_names_leaves_it_its_optimizer(tmp_path, key, copy):
    numbers = Numbers()
    state = _train_state(numbers, _model(numbers), 7)
    average = numbers.like(state.params)
    path = write(tmp_path, {key: state, copy: average})
    target = {key: training_target(state.params, ADAM), copy: worlds.model_target(average)}
    result = restore(path, target)
    check(result[key], _expected(state))
    check(result[copy], average)


@pytest.mark.parametrize("keys", [None, ("gen", "disc"), ("agent_0", "agent_1")])
def test_pairs_of_a_model_and_its_optimizer_come_back_from_their_own_save(tmp_path, keys):
    numbers = Numbers()
    params = _model(numbers)

    def pair():
        model = Branch(params, {})
        return model, nnx.Optimizer(model, ADAM, wrt=nnx.Param)

    def make():
        pairs = [pair(), pair()]
        return pairs if keys is None else dict(zip(keys, pairs, strict=True))

    state = make()
    expected = []
    for part in state if keys is None else (state[key] for key in keys):
        for each in part:
            nnx.update(each, jax.tree.map(jnp.asarray, numbers.like(nnx.state(each))))
            expected.append(worlds.flat(each))
    save(tmp_path / "item", state)
    result = restore(tmp_path / "item", nnx.eval_shape(make))
    have = [each for part in (result if keys is None else (result[key] for key in keys)) for each in part]
    for each, values in zip(have, expected, strict=True):
        check(each, values)


def _actor_and_critic(numbers):
    return {
        name: _train_state(numbers, _model(numbers), step) for name, step in (("actor", 7), ("critic", 9))
    }


def _trained(state):
    return Training(state.params, ADAM, {})


def test_a_level_of_the_target_above_several_train_states_is_taken_away(tmp_path):
    states = _actor_and_critic(Numbers())
    path = write(tmp_path, states)
    target = nnx.eval_shape(
        lambda: _Owner(agent=_Owner(**{name: _trained(state) for name, state in states.items()}))
    )

    result = restore(path, target)

    check(result, _expected(states["actor"], "agent/actor/") | _expected(states["critic"], "agent/critic/"))


def test_a_stored_level_above_several_train_states_is_taken_away(tmp_path):
    states = _actor_and_critic(Numbers())
    path = write(tmp_path, {"agent": states, "config": {"size": np.int32(3)}})
    target = nnx.eval_shape(lambda: _Owner(**{name: _trained(state) for name, state in states.items()}))

    result = restore(path, target, unexpected="ignore")

    check(result, _expected(states["actor"], "actor/") | _expected(states["critic"], "critic/"))


def test_the_name_of_a_copy_above_several_train_states_stays(tmp_path):
    states = _actor_and_critic(Numbers())
    path = write(tmp_path, states)
    parts = {name: _trained(state) for name, state in states.items()}

    refused(path, nnx.eval_shape(lambda: {"ema": _Owner(**parts)}))


def test_a_level_above_networks_of_which_one_has_another_name_stays(tmp_path):
    states = _actor_and_critic(Numbers())
    path = write(tmp_path, states)
    parts = {"actor": _trained(states["actor"]), "value": _trained(states["critic"])}

    refused(path, nnx.eval_shape(lambda: {"agent": _Owner(**parts)}), unexpected="ignore")


@pytest.mark.parametrize("other", ["slow", "critic"])
def test_a_network_is_not_the_stored_one_while_another_one_lies_deeper(tmp_path, other):
    path = write(tmp_path, {"params": _model(Numbers()), "step": np.int32(3)})
    model = target_of("module", _model(Numbers()))
    target = {"agent": {"q": {"model": model}, other: nnx.clone(model)}}

    policy = {nnx.PathContains("q"): "init", ...: "error"}
    refused(path, target, policy=policy, init=lambda: target, unexpected="ignore")


def _below_a_level(numbers, names):
    params = {name: _model(numbers) for name in names}
    return params, {name: _train_state(numbers, params[name], at) for at, name in enumerate(names)}


LEVELS = {
    "one renamed": ([("disc", "critic")], {"gen": "gen", "disc": "critic"}),
    "both renamed": ([("disc", "critic"), ("gen", "actor")], {"gen": "actor", "disc": "critic"}),
    "exchanged": ([("gen", "disc"), ("disc", "gen")], {"gen": "disc", "disc": "gen"}),
}


@pytest.mark.parametrize("where", ["stored", "wanted"])
@pytest.mark.parametrize("case", LEVELS)
def test_a_level_that_one_side_has_goes_also_where_rules_rename_the_train_states_below_it(
    tmp_path, case, where
):
    rules, renamed = LEVELS[case]
    numbers = Numbers()
    params, states = _below_a_level(numbers, list(renamed))
    path = write(tmp_path, {"agent": states} if where == "stored" else states)

    def make():
        parts = {new: Training(params[old], ADAM, {}) for old, new in renamed.items()}
        return {"agent": _Owner(**parts)} if where == "wanted" else parts

    target = nnx.eval_shape(make)
    result = restore(path, target, renames=rules)
    parts = dict(vars(result["agent"])) if where == "wanted" else result
    for old, new in renamed.items():
        check(parts[new], _expected(states[old]))
    save(tmp_path / "again", result, renames=plan_restore(path, target, renames=rules))
    again = worlds.flat(_stock(tmp_path / "again"))
    assert again.keys() == worlds.flat(_stock(path)).keys()
    check(again, worlds.flat(_stock(path)))


def _stock(path):
    with ocp.PyTreeCheckpointer() as checkpointer:
        return jax.tree.map(np.asarray, checkpointer.restore(path))


BESIDE = {"several": ("actor", "critic"), "one": ("critic",)}


@pytest.mark.parametrize("where", ["stored", "wanted"])
@pytest.mark.parametrize("rename", [False, True])
@pytest.mark.parametrize("names", BESIDE.values(), ids=BESIDE)
def test_a_level_that_one_side_has_goes_also_above_what_lies_beside_the_train_states(
    tmp_path, names, rename, where
):
    numbers = Numbers()
    params = {name: _model(numbers) for name in names}
    states = {name: _train_state(numbers, params[name], at) for at, name in enumerate(names)}
    beside = {"target_critic": _model(numbers), "log_alpha": numbers()}
    tree = {**states, **beside}
    path = write(tmp_path, {"agent": tree, "epoch": 3} if where == "stored" else {**tree, "epoch": 3})
    new = "critic_target" if rename else "target_critic"
    rules = [("target_critic", new)] if rename else []

    def make():
        parts = {name: Training(params[name], ADAM, {}) for name in names}
        parts |= {new: Branch(beside["target_critic"], {}), "log_alpha": nnx.Param(jnp.zeros(()))}
        return {"agent": _Owner(**parts)} if where == "wanted" else parts

    target = nnx.eval_shape(make)
    options = {"renames": rules, "unexpected": "ignore"}
    result = restore(path, target, **options)

    parts = dict(vars(result["agent"])) if where == "wanted" else result
    for name, state in states.items():
        check(parts[name], _expected(state))
    check(parts[new], worlds.flat(beside["target_critic"]))
    assert parts["log_alpha"].get_value() == beside["log_alpha"]
    save(tmp_path / "again", result, renames=plan_restore(path, target, **options))
    stored = {at: value for at, value in worlds.flat(_stock(path)).items() if at != ("epoch",)}
    again = worlds.flat(_stock(tmp_path / "again"))
    assert again.keys() == stored.keys()
    check(again, stored)


def test_a_field_that_both_sides_have_at_the_root_stays_there_where_a_level_goes(tmp_path):
    states = _actor_and_critic(Numbers())
    path = write(tmp_path, {**states, "epoch": np.int32(3)})
    parts = {name: _trained(state) for name, state in states.items()}
    target = nnx.eval_shape(lambda: {"agent": _Owner(**parts), "epoch": jnp.int32(0)})

    result = restore(path, target)

    for name, state in states.items():
        check(getattr(result["agent"], name), _expected(state))
    assert result["epoch"] == 3


def test_a_level_stays_where_a_copy_beside_the_train_states_has_another_name(tmp_path):
    numbers = Numbers()
    states = _actor_and_critic(numbers)
    path = write(tmp_path, {**states, "target_critic": _model(numbers)})
    parts = {name: _trained(state) for name, state in states.items()}
    copy = Branch(states["critic"].params, {})

    refused(path, nnx.eval_shape(lambda: {"agent": _Owner(**parts, slow=copy)}), unexpected="ignore")


@pytest.mark.parametrize(
    ("tx", "other", "rule", "level"),
    sampled(
        [optax.sgd(0.1), optax.sgd(optax.constant_schedule(0.1)), ADAM],
        ["weights", "step"],
        [("z/params", "model"), ("z", "")],
        ["state", "train_state", "gen"],
    ),
)
def test_a_network_that_a_rule_makes_the_model_is_not_lent_anothers_step(tmp_path, tx, other, rule, level):
    numbers = Numbers()
    params = {name: _model(numbers) for name in (level, "z")}
    trained = {
        "params": params[level],
        "opt_state": numbers.optimizer(tx, params[level]),
        "step": np.int32(7),
    }
    beside = {"params": params["z"], **({"step": np.int32(9)} if other == "step" else {})}
    path = write(tmp_path, {level: trained, "z": beside})

    def make():
        model = Branch(params["z"], {})
        return {"model": model, "optimizer": nnx.Optimizer(model, tx, wrt=nnx.Param)}

    policy = {nnx.PathContains("optimizer"): "init", ...: "error"}
    options = {"renames": [rule], "unexpected": "ignore", "policy": policy, "init": make}
    result = restore(path, nnx.eval_shape(make), **options)
    check(nnx.state(result["model"]), params["z"])
    assert int(result["optimizer"].step[...]) in (0, 9)


@pytest.mark.parametrize("names", [("student", "teacher"), ("actor", "critic")])
@pytest.mark.parametrize("collections", [("params",), ("params", "batch_stats")])
def test_networks_in_front_of_their_fields_are_told_without_an_optimizer(tmp_path, collections, names):
    numbers = Numbers()
    keys = {"params": "w", "batch_stats": "mean"}
    fields = {f"{name}_{kind}": {"norm": {keys[kind]: numbers(3)}} for name in names for kind in collections}
    path = write(tmp_path, fields)

    def make():
        kinds = {"params": nnx.Param, "batch_stats": nnx.BatchStat}
        parts = ({keys[kind]: kinds[kind](jnp.zeros(3)) for kind in collections} for _ in names)
        return {name: nnx.Dict(norm=nnx.Dict(**part)) for name, part in zip(names, parts, strict=True)}

    result = restore(path, nnx.eval_shape(make))
    for name in names:
        for kind in collections:
            for key, value in fields[f"{name}_{kind}"]["norm"].items():
                np.testing.assert_array_equal(result[name]["norm"][key][...], value)
    alone = restore(path, nnx.eval_shape(lambda: {names[1]: make()[names[1]]}), unexpected="ignore")
    np.testing.assert_array_equal(
        alone[names[1]]["norm"]["w"][...], fields[f"{names[1]}_params"]["norm"]["w"]
    )
    with pytest.raises(RestoreError, match="no name tells which of them is wanted"):
        restore(path, nnx.eval_shape(lambda: {"model": make()[names[0]]}), unexpected="ignore")


def _get(item, path):
    for key in path:
        item = item[key]
    return item


def _apart(numbers, places, make_params=_model):
    """Returns NNX's own dict of networks and optimizers at places by name, and what makes its parts."""
    params, tree = {name: make_params(numbers) for name in places}, {}
    for step, (name, (network, optimizer)) in enumerate(places.items(), 11):
        put_at(tree, network, params[name])
        put_at(tree, optimizer, {"opt_state": numbers.optimizer(ADAM, params[name]), "step": np.int32(step)})

    def make(wanted=tuple(places)):
        item = {}
        for name in wanted:
            model = Branch(params[name], {})
            network, optimizer = places[name]
            put_at(item, network, model)
            put_at(item, optimizer, nnx.Optimizer(model, ADAM, wrt=nnx.Param))
        return item

    return tree, make


def _side_by_side(numbers, names):
    return _apart(numbers, {name: ((name,), (f"{name}_opt",)) for name in names})


def test_the_step_of_an_optimizer_that_a_rule_drops_is_not_read(tmp_path):
    tree, make = _side_by_side(Numbers(), ("a", "b"))
    path = write(tmp_path, tree)
    rules = [Drop("a", "x"), Drop("a_opt", "x"), ("b", "a"), ("b_opt", "a_opt")]

    def alone():
        parts = make()
        return {name: parts[name] for name in ("a", "a_opt")}

    result = restore(path, nnx.eval_shape(alone), renames=rules)
    check(nnx.state(result["a"]), tree["b"])
    assert result["a_opt"].step[...] == 12
    assert ("a_opt", "step") in refused(path, nnx.eval_shape(make), renames=[Drop("a_opt/step", "x")]).paths


@pytest.mark.parametrize("rules", [[("a", "b"), ("b", "a")], [("a/out", "b/out"), ("b/out", "a/out")]])
def test_weights_that_rules_exchange_leave_no_moments_behind(tmp_path, rules):
    tree, make = _side_by_side(Numbers(), ("a", "b"))
    path = write(tmp_path, tree)

    refused(path, nnx.eval_shape(make), renames=rules)
    whole = [("a", "b"), ("b", "a"), ("a_opt", "b_opt"), ("b_opt", "a_opt")]
    result = restore(path, nnx.eval_shape(make), renames=whole)
    for name, other in (("a", "b"), ("b", "a")):
        check(nnx.state(result[name]), tree[other])
        check(result[f"{name}_opt"].opt_state[0].mu, tree[f"{other}_opt"]["opt_state"][0].mu)
    assert (result["a_opt"].step[...], result["b_opt"].step[...]) == (12, 11)


def test_a_rule_for_one_of_two_networks_without_collections_leaves_the_others_moments_as_they_are(tmp_path):
    tree, make = _side_by_side(Numbers(), ("a", "b"))
    path = write(tmp_path, tree)

    result = restore(path, nnx.eval_shape(make), renames=[Add("a/out/kernel", 1.0)])
    np.testing.assert_array_equal(result["a"].out.kernel[...], tree["a"]["out"]["kernel"] + 1.0)
    for name in ("a", "b"):
        check(result[f"{name}_opt"].opt_state[0].mu, tree[f"{name}_opt"]["opt_state"][0].mu)


@pytest.mark.parametrize("names", [("a_opt",), ("b_opt",), ("a_opt", "b_opt")])
def test_optimizers_of_networks_without_collections_are_restored_alone(tmp_path, names):
    tree, make = _side_by_side(Numbers(), ("a", "b"))
    path = write(tmp_path, tree)

    target = nnx.eval_shape(lambda: {name: make()[name] for name in names})
    result = restore(path, target, unexpected="ignore")
    for name in names:
        check(result[name].opt_state[0].mu, tree[name]["opt_state"][0].mu)
        assert result[name].step[...] == tree[name]["step"]


GROUPED = {
    "groups": (("nets", "{}"), ("opts", "{}")),
    "a level between": (("nets", "{}", "core"), ("opts", "{}")),
    "a prefix": (("m", "{}"), ("{}_opt",)),
    "below params and opt": (("params", "{}"), ("opt", "{}")),
}


@pytest.mark.parametrize("case", GROUPED)
def test_networks_and_optimizers_in_groups_keep_their_moments(tmp_path, case):
    places = {name: [tuple(key.format(name) for key in part) for part in GROUPED[case]] for name in "ab"}
    tree, make = _apart(Numbers(), places)
    path = write(tmp_path, tree)
    (a, a_opt), (b, b_opt) = ("/".join(at) for at in places["a"]), ("/".join(at) for at in places["b"])
    other = [Drop(a, "x"), (b, a)]
    refused(path, nnx.eval_shape(lambda: make(("a",))), renames=other)
    refused(
        path, nnx.eval_shape(lambda: make(("a",))), renames=[Drop(f"{a}/out", "x"), (f"{b}/out", f"{a}/out")]
    )
    refused(path, nnx.eval_shape(make), renames=[(a, b), (b, a)])

    rules = [*other, Drop(a_opt, "x"), (b_opt, a_opt)]
    result = restore(path, nnx.eval_shape(lambda: make(("a",))), renames=rules)
    check(nnx.state(_get(result, places["a"][0])), _get(tree, places["b"][0]))
    optimizer, stored = _get(result, places["a"][1]), _get(tree, places["b"][1])
    check(optimizer.opt_state[0].mu, stored["opt_state"][0].mu)
    assert optimizer.step[...] == 12

    result = restore(path, nnx.eval_shape(make), renames=[Add(f"{a}/out/kernel", 1.0)])
    for name, (network, optimizer) in places.items():
        kernel = _get(tree, network)["out"]["kernel"]
        np.testing.assert_array_equal(_get(result, network).out.kernel[...], kernel + 1.0 * (name == "a"))
        check(_get(result, optimizer).opt_state[0].mu, _get(tree, optimizer)["opt_state"][0].mu)


LONE = {
    "groups of one": (("nets", "x"), ("opts", "x")),
    "lists of one": (("nets", "0"), ("opts", "0")),
    "a level between": (("nets", "x", "core"), ("opts", "x")),
    "a prefix": (("m", "x"), ("x_opt",)),
    "an optimizer below a level": (("net",), ("training", "opt")),
    "side by side": (("net",), ("opt",)),
}


@pytest.mark.parametrize("case", LONE)
@pytest.mark.parametrize("average", [False, True])
def test_the_moments_of_the_only_network_follow_rules_for_its_weights(tmp_path, case, average):
    numbers = Numbers()

    def square(numbers):
        return {"hidden": numbers.dense(4, 4), "out": numbers.dense(4, 4)}

    tree, make = _apart(numbers, {"x": LONE[case]}, square)
    network, optimizer = LONE[case]
    weights, moments = _get(tree, network), _get(tree, optimizer)["opt_state"][0].mu
    if average:
        tree["ema"] = square(numbers)

    def whole():
        return make() | ({"ema": Branch(tree["ema"], {})} if average else {})

    above = "/".join(network)
    swapped = [(f"{above}/hidden", f"{above}/out"), (f"{above}/out", f"{above}/hidden")]
    turned = Transpose(f"{above}/out/kernel", (1, 0))
    path = write(tmp_path, tree)
    for rules, turn in ((swapped, False), ([turned], True), ([Add(f"{above}/out/bias", 0.0)], False)):
        result = restore(path, nnx.eval_shape(whole), renames=rules)
        states = nnx.state(_get(result, network)), _get(result, optimizer).opt_state[0].mu
        for found, stored in zip(states, (weights, moments), strict=True):
            names = ("out", "hidden") if rules is swapped else ("hidden", "out")
            for name, source in zip(("hidden", "out"), names, strict=True):
                kernel = stored[source]["kernel"]
                kernel = kernel.T if turn and name == "out" else kernel
                np.testing.assert_array_equal(_get(found, (name, "kernel"))[...], kernel)
                np.testing.assert_array_equal(_get(found, (name, "bias"))[...], stored[source]["bias"])
        if average:
            check(nnx.state(result["ema"]), tree["ema"])


@pytest.mark.parametrize("policy", ["error", "warn"])
@pytest.mark.parametrize("wanted", ["enc", "dec"])
def test_the_one_step_beside_an_optimizer_for_each_network_is_not_that_of_one(tmp_path, wanted, policy):
    numbers = Numbers()
    params = {name: _model(numbers) for name in ("enc", "dec")}
    kinds = {"enc": optax.sgd(0.1), "dec": ADAM}
    states = {name: numbers.optimizer(kinds[name], part) for name, part in params.items()}
    path = write(tmp_path, {"params": params, "opt_state": states, "step": np.int32(777)})

    def make():
        model = Branch(params[wanted], {})
        return {wanted: model, f"{wanted}_opt": nnx.Optimizer(model, kinds[wanted], wrt=nnx.Param)}

    try:
        result = restore(path, nnx.eval_shape(make), policy=policy, unexpected="ignore")
    except RestoreError:
        assert policy == "error"
        return
    check(nnx.state(result[wanted]), params[wanted])
    assert int(result[f"{wanted}_opt"].step[...]) == 0


UNNAMED = {
    "by numbers": (("{}",), ("opt{}",)),
    "in a list": (("{}",), ("opts", "{}")),
    "networks in lists": (("nets", "{}"), ("opts", "{}")),
}


def _leaf(name):
    return f"{name}/hidden/kernel"


REPLACED = {
    "exchanged": lambda a, b: [(a, b), (b, a)],
    "another copied": lambda a, b: [Drop(b, "x"), Copy(a, b)],
    "a leaf exchanged": lambda a, b: [(_leaf(a), _leaf(b)), (_leaf(b), _leaf(a))],
    "a leaf copied": lambda a, b: [Drop(_leaf(b), "x"), Copy(_leaf(a), _leaf(b))],
}


@pytest.mark.parametrize(("case", "kind", "policy"), sampled(UNNAMED, REPLACED, ["error", "warn"]))
def test_where_no_name_tells_what_an_optimizer_trains_no_moments_of_replaced_weights_are_read(
    tmp_path, case, kind, policy
):
    network, optimizer = UNNAMED[case]
    keys = ("one", "two") if case == "by numbers" else ("0", "1")
    named = keys if case == "networks in lists" else ("one", "two")
    places = {
        name: (tuple(part.format(name) for part in network), tuple(part.format(at) for part in optimizer))
        for name, at in zip(named, ("1", "2") if case == "by numbers" else keys, strict=True)
    }
    tree, make = _apart(Numbers(), places)
    path = write(tmp_path, tree)
    check(nnx.split(restore(path, nnx.eval_shape(make)))[1], tree)

    a, b = ("/".join(places[name][0]) for name in named)
    try:
        result = restore(path, nnx.eval_shape(make), renames=REPLACED[kind](a, b), policy=policy)
    except RestoreError:
        return
    assert policy == "warn"
    stored, kept = _get(tree, places[named[1]][1]), _get(result, places[named[1]][1])
    for field in ("mu", "nu"):
        moment = getattr(kept.opt_state[0], field).hidden.kernel[...]
        assert not np.isin(moment, getattr(stored["opt_state"][0], field)["hidden"]["kernel"]).any()


@pytest.mark.parametrize("policy", ["error", "warn"])
@pytest.mark.parametrize("kind", REPLACED)
def test_an_optimizer_of_two_networks_that_names_them_otherwise_keeps_no_moments_of_replaced_weights(
    tmp_path, kind, policy
):
    numbers = Numbers()
    params = {name: _model(numbers) for name in "ab"}
    tree = {name: {"net": part} for name, part in params.items()}
    tree["opt"] = {"opt_state": numbers.optimizer(ADAM, params), "step": np.int32(3)}
    path = write(tmp_path, tree)

    def make():
        parts = {name: Branch(part, {}) for name, part in params.items()}
        optimizer = nnx.Optimizer(_Owner(**parts), ADAM, wrt=nnx.Param)
        return {name: {"net": part} for name, part in parts.items()} | {"opt": optimizer}

    check(nnx.split(restore(path, nnx.eval_shape(make)))[1], tree)
    refused(path, nnx.eval_shape(make), renames=REPLACED[kind]("a/net", "b/net"), policy=policy)


@pytest.mark.parametrize("policy", ["error", "warn"])
@pytest.mark.parametrize("optimizers", [("a_opt", "b_opt"), ("opt1", "opt2")])
def test_steps_of_optimizers_that_keep_nothing_else_are_not_read_where_networks_are_replaced(
    tmp_path, optimizers, policy
):
    numbers = Numbers()
    params = {name: _model(numbers) for name in "ab"}
    tree = params | {name: {"step": np.int32(at)} for at, name in enumerate(optimizers, 11)}
    path = write(tmp_path, tree)

    def make():
        parts = {name: Branch(part, {}) for name, part in params.items()}
        pairs = zip(optimizers, parts.values(), strict=True)
        return parts | {name: nnx.Optimizer(part, optax.sgd(0.1), wrt=nnx.Param) for name, part in pairs}

    check(nnx.split(restore(path, nnx.eval_shape(make)))[1], tree)
    networks = [("a", "b"), ("b", "a")]
    hint = refused(path, nnx.eval_shape(make), renames=networks, policy=policy).hints[0]
    result = restore(path, nnx.eval_shape(make), policy="warn", **hint.arguments)
    assert [int(result[name].step[...]) for name in optimizers] == [0, 0]
    rules = [*networks, optimizers, optimizers[::-1]]
    result = restore(path, nnx.eval_shape(make), renames=rules, policy=policy)
    assert [int(result[name].step[...]) for name in optimizers] == [12, 11]

    pure = jax.tree.map(np.zeros_like, tree)
    hint = refused(path, pure, renames=networks, policy=policy).hints[0]
    result = restore(path, pure, policy="warn", **hint.arguments)
    assert [int(result[name]["step"]) for name in optimizers] == [0, 0]
    result = restore(path, pure, renames=rules, policy=policy)
    assert [int(result[name]["step"]) for name in optimizers] == [12, 11]


@pytest.mark.parametrize("policy", ["error", "warn"])
@pytest.mark.parametrize("other", range(3))
def test_the_optimizers_of_three_networks_are_left_wherever_a_leaf_is_replaced(tmp_path, other, policy):
    numbers = Numbers()
    params = {name: _model(numbers) for name in ("aux", "disc", "gen")}
    optimizers = [{"opt_state": numbers.optimizer(ADAM, of), "step": np.int32(3)} for of in params.values()]
    tree = {"nets": params, "opts": {str(at): one for at, one in enumerate(optimizers)}}
    path, pure = write(tmp_path, tree), jax.tree.map(np.zeros_like, tree)
    check(restore(path, pure), tree)

    name, source = [*params][other], [*params][other - 1]
    rules = [Drop(_leaf(f"nets/{name}"), "x"), Copy(_leaf(f"nets/{source}"), _leaf(f"nets/{name}"))]
    hint = refused(path, pure, renames=rules, policy=policy).hints[0]
    result = restore(path, pure, policy="warn", **hint.arguments)
    np.testing.assert_array_equal(
        _get(result, ("nets", name, "hidden", "kernel")), params[source]["hidden"]["kernel"]
    )
    assert not result["opts"][str(other)]["opt_state"][0].mu["hidden"]["kernel"].any()


@pytest.mark.parametrize("policy", ["error", "warn"])
def test_statistics_are_left_where_a_rule_has_replaced_the_weights_beside_them(tmp_path, policy):
    numbers = Numbers()
    tree = {
        name: {
            "params": {"norm": {"scale": numbers(4), "bias": numbers(4)}},
            "batch_stats": {"norm": {"mean": numbers(4), "var": numbers(4)}},
        }
        for name in "ab"
    }
    path = write(tmp_path, tree)

    def make():
        return {name: _Owner(norm=nnx.BatchNorm(4, rngs=nnx.Rngs(0))) for name in "ab"}

    rules = [("a/params", "b/params"), ("b/params", "a/params")]
    hint = refused(path, nnx.eval_shape(make), renames=rules, policy=policy).hints[0]
    result = restore(path, nnx.eval_shape(make), policy="warn", **hint.arguments)
    np.testing.assert_array_equal(result["a"].norm.scale[...], tree["b"]["params"]["norm"]["scale"])
    assert not np.isin(result["a"].norm.mean[...], tree["a"]["batch_stats"]["norm"]["mean"]).any()
    rules += [("a/batch_stats", "b/batch_stats"), ("b/batch_stats", "a/batch_stats")]
    result = restore(path, nnx.eval_shape(make), renames=rules, policy=policy)
    np.testing.assert_array_equal(result["a"].norm.mean[...], tree["b"]["batch_stats"]["norm"]["mean"])


@pytest.mark.parametrize("policy", ["error", "warn"])
def test_an_optimizer_that_a_rule_calls_otherwise_is_not_read_under_its_old_name(tmp_path, policy):
    numbers = Numbers()
    params = {name: _model(numbers) for name in "ab"}
    optimizers = {
        k: {"opt_state": numbers.optimizer(ADAM, of), "step": np.int32(3)} for k, of in params.items()
    }
    path = write(tmp_path, {"nets": params, "opts": optimizers})
    pure = jax.tree.map(np.zeros_like, {"nets": {"b": params["b"]}, "opts": {"b": optimizers["b"]}})
    refused(path, pure, renames=[Drop("a", "x"), ("b", "a")], policy=policy, unexpected="ignore")


def test_a_train_state_whose_weights_a_rule_replaces_keeps_nothing_of_its_optimizer(tmp_path):
    numbers = Numbers()
    params = {name: _model(numbers) for name in ("net", "target")}
    tree = {name: _train_state(numbers, part, at) for at, (name, part) in enumerate(params.items(), 11)}
    path = write(tmp_path, tree)

    def make():
        parts = {name: Branch(part, {}) for name, part in params.items()}
        return {
            name: {"model": part, "optimizer": nnx.Optimizer(part, ADAM, wrt=nnx.Param)}
            for name, part in parts.items()
            if name == "target"
        }

    rules = [Drop("target/params", "x"), ("net/params", "target/params")]
    refused(path, nnx.eval_shape(make), renames=rules, unexpected="ignore")
    error = refused(path, nnx.eval_shape(make), renames=rules, unexpected="ignore", policy="warn")
    rules = error.hints[0].arguments["renames"]
    result = restore(path, nnx.eval_shape(make), renames=rules, unexpected="ignore", policy="warn")
    check(nnx.state(result["target"]["model"]), params["net"])
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(nnx.state(result["target"]["optimizer"])))


@pytest.mark.parametrize("case", GROUPED)
@pytest.mark.parametrize("plain", ["a", "b"])
def test_moments_follow_a_rule_beside_an_optimizer_that_keeps_a_step_alone(tmp_path, case, plain):
    places = {name: [tuple(key.format(name) for key in part) for part in GROUPED[case]] for name in "ab"}
    tree, make = _apart(Numbers(), places)
    _get(tree, places[plain][1]).pop("opt_state")
    path = write(tmp_path, tree)
    other = "b" if plain == "a" else "a"

    def one_plain():
        item = make()
        network, optimizer = places[plain]
        put_at(item, optimizer, nnx.Optimizer(_get(item, network), optax.sgd(0.1), wrt=nnx.Param))
        return item

    rule = Transpose("/".join([*places[other][0], "hidden/kernel"]), (1, 0))
    kernel = _get(tree, places[other][0])["hidden"]["kernel"]
    result = restore(
        path, nnx.eval_shape(lambda: _turned(one_plain(), places[other], kernel)), renames=[rule]
    )
    mu = _get(result, places[other][1]).opt_state[0].mu
    np.testing.assert_array_equal(_get(result, places[other][0]).hidden.kernel[...], kernel.T)
    stored = _get(tree, places[other][1])["opt_state"][0].mu["hidden"]["kernel"]
    np.testing.assert_array_equal(mu["hidden"]["kernel"][...], stored.T)
    for name, (_, optimizer) in places.items():
        assert _get(result, optimizer).step[...] == _get(tree, optimizer)["step"], name


def _turned(item, place, kernel):
    network = _get(item, place[0])
    network.hidden.kernel = nnx.Param(jnp.zeros(kernel.T.shape))
    put_at(item, place[1], nnx.Optimizer(network, ADAM, wrt=nnx.Param))
    return item


@pytest.mark.parametrize("turned", ["model", "model2"])
def test_numbers_tell_which_network_an_optimizer_trains(tmp_path, turned):
    places = {"a": (("model",), ("optimizer",)), "b": (("model2",), ("optimizer2",))}
    tree, make = _apart(Numbers(), places, lambda numbers: {"out": {"kernel": numbers(3, 3)}})
    path = write(tmp_path, tree)
    check(nnx.state(restore(path, nnx.eval_shape(make))["model2"]), tree["model2"])
    try:
        result = restore(path, nnx.eval_shape(make), renames=[Transpose(f"{turned}/out/kernel", (1, 0))])
    except RestoreError:
        return  # A question does no harm.
    for name, (network, optimizer) in places.items():
        stored = _get(tree, optimizer)["opt_state"][0].mu["out"]["kernel"]
        is_turned = network == (turned,)
        np.testing.assert_array_equal(
            _get(result, optimizer).opt_state[0].mu["out"]["kernel"][...],
            stored.T if is_turned else stored,
            name,
        )


def _scheduled():
    return optax.sgd(optax.constant_schedule(0.1))


def _two_states(numbers, statistics=False):
    def made(step):
        params = _model(numbers)
        state = {
            "params": params,
            "opt_state": numbers.optimizer(_scheduled(), params),
            "step": np.int32(step),
        }
        return state | ({"batch_stats": {"norm": {"mean": numbers(4)}}} if statistics else {})

    return {name: made(at) for at, name in enumerate("ab", 11)}


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("level", ["", "train"])
def test_a_count_stays_behind_beside_statistics_and_below_a_level_of_one_side(tmp_path, level, statistics):
    states = _two_states(Numbers(), statistics)
    path = write(tmp_path, {level: states} if level else states)

    def make():
        item = {}
        for name, state in states.items():
            model = Branch(state["params"] | state.get("batch_stats", {}), {})
            item[name] = {"model": model, "optimizer": nnx.Optimizer(model, _scheduled(), wrt=nnx.Param)}
        return item

    target, above = nnx.eval_shape(make), f"{level}/" if level else ""
    for name, part in restore(path, target).items():
        assert part["optimizer"].step[...] == states[name]["step"]
    refused(path, target, renames=[(f"{above}a/params", "b/params"), (f"{above}b/params", "a/params")])
    whole = restore(path, target, renames=[(f"{above}a", "b"), (f"{above}b", "a")])
    for name, other in (("a", "b"), ("b", "a")):
        check(whole[name]["model"].hidden, states[other]["params"]["hidden"])
        assert whole[name]["optimizer"].step[...] == states[other]["step"]


def test_no_hint_gives_an_optimizer_the_step_of_another_network(tmp_path):
    states = _two_states(Numbers())
    del states["b"]["opt_state"]
    path = write(tmp_path, states)

    def make():
        parts = {name: Branch(state["params"], {}) for name, state in states.items()}
        return parts | {"a_opt": nnx.Optimizer(parts["a"], _scheduled(), wrt=nnx.Param)}

    for hint in refused(path, nnx.eval_shape(make), unexpected="ignore").hints:
        assert "b/step" not in str(hint.arguments)


def test_a_rule_that_calls_a_step_as_a_network_is_refused(tmp_path):
    states = _two_states(Numbers())
    fields = ("params", "opt_state", "step")
    path = write(tmp_path, {key: {name: state[key] for name, state in states.items()} for key in fields})

    def make():
        model = Branch(states["a"]["params"], {})
        return {"a": {"model": model, "optimizer": nnx.Optimizer(model, _scheduled(), wrt=nnx.Param)}}

    for rules in (
        [("step/a", "a")],
        [Drop("a", "x"), ("b", "a")],
        [Drop("params/a", "x"), ("params/b", "a")],
    ):
        refused(path, nnx.eval_shape(make), renames=rules, unexpected="ignore")


def test_counts_by_label_stay_behind_where_networks_are_exchanged(tmp_path):
    numbers = Numbers()
    tx = optax.partition(
        {"a": _scheduled(), "b": _scheduled()},
        lambda params: jax.tree_util.tree_map_with_path(lambda path, _: path[0].key, params),
    )
    params = {name: _model(numbers) for name in "ab"}
    state = {"params": params, "opt_state": numbers.optimizer(tx, params), "step": np.int32(3)}
    path, target = write(tmp_path, state), training_target(params, tx)
    restore(path, target)
    refused(path, target, renames=[("params/a", "params/b"), ("params/b", "params/a")])


@pytest.mark.parametrize("kind", ["exchanged", "another copied"])
def test_moments_of_two_networks_stay_behind_in_maxtexts_layout(kind):
    numbers = Numbers()
    params = [_model(numbers) for _ in range(2)]

    def make():
        parts = [Branch({"net": part}, {}) for part in params]
        optimizer = nnx.Optimizer(_Owner(a=parts[0], b=parts[1]), ADAM, wrt=nnx.Param)
        return {"nets": nnx.List(parts), "opt": optimizer}

    item = make()
    tree = to_linen(item, "maxtext")
    check(nnx.state(from_linen(tree, nnx.eval_shape(make))["nets"]), nnx.state(item["nets"]))
    rules = REPLACED[kind]("params/params/nets_0", "params/params/nets_1")
    with pytest.raises(RestoreError):
        from_linen(tree, nnx.eval_shape(make), renames=rules)


@pytest.mark.parametrize("names", [("model", "optimizer"), ("a", "a_opt"), ("a/model", "a/optimizer")])
def test_the_step_of_an_optimizer_that_keeps_nothing_else_is_restored_from_its_own_path(tmp_path, names):
    params = _model(Numbers())
    network, optimizer = (tuple(name.split("/")) for name in names)
    tree = {}
    put_at(tree, network, params)
    put_at(tree, optimizer, {"step": np.int32(13)})
    path = write(tmp_path, tree)

    def make():
        item, model = {}, Branch(params, {})
        put_at(item, network, model)
        put_at(item, optimizer, nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param))
        return item

    result = restore(path, nnx.eval_shape(make))
    check(nnx.state(_get(result, network)), params)
    assert _get(result, optimizer).step[...] == 13


def test_a_network_is_not_read_below_the_name_of_another_stored_one(tmp_path):
    numbers = Numbers()
    params = {"net": _model(numbers), "target": _model(numbers)}
    path = write(tmp_path, {"params": params})
    inner = nnx.eval_shape(lambda: {"target": {"net": Branch(params["net"], {})}})
    refused(path, inner, unexpected="ignore")
    rules = [Drop("params/net", "x"), ("params/target", "target/net")]
    result = restore(path, inner, unexpected="ignore", renames=rules)
    check(nnx.state(result["target"]["net"]), params["target"])


@pytest.mark.parametrize("turned", ["critic", "models/actor"])
def test_a_rule_for_one_network_turns_its_moments_and_not_those_of_one_at_another_depth(tmp_path, turned):
    places = {
        "critic": (("critic",), ("critic_opt",)),
        "actor": (("models", "actor"), ("optimizers", "actor")),
    }
    tree, make = _apart(Numbers(), places, lambda numbers: {"out": {"kernel": numbers(3, 3)}})
    path = write(tmp_path, tree)
    check(nnx.state(restore(path, nnx.eval_shape(make))["critic"]), tree["critic"])

    result = restore(path, nnx.eval_shape(make), renames=[Transpose(f"{turned}/out/kernel", (1, 0))])
    for network, optimizer in places.values():
        is_turned = "/".join(network) == turned
        states = nnx.state(_get(result, network)), _get(result, optimizer).opt_state[0].mu
        stored = _get(tree, network), _get(tree, optimizer)["opt_state"][0].mu
        for found, of in zip(states, stored, strict=True):
            kernel = of["out"]["kernel"]
            np.testing.assert_array_equal(found["out"]["kernel"][...], kernel.T if is_turned else kernel)


def test_a_level_of_a_whole_name_tells_what_an_optimizer_trains_before_a_short_one(tmp_path):
    tree, make = _apart(
        Numbers(),
        {"x": (("nets", "x"), ("opts", "x", "o"))},
        lambda numbers: {"out": {"kernel": numbers(3, 3)}},
    )
    tree["other"] = {"out": {"kernel": Numbers(500)(3, 3)}}

    def whole():
        return make() | {"other": Branch(tree["other"], {})}

    path = write(tmp_path, tree)
    result = restore(path, nnx.eval_shape(whole), renames=[Transpose("other/out/kernel", (1, 0))])

    moments = result["opts"]["x"]["o"].opt_state[0].mu
    check(moments, tree["opts"]["x"]["o"]["opt_state"][0].mu)


@pytest.mark.parametrize("names", [("actor",), ("actor", "critic")])
def test_a_network_may_have_a_module_called_as_its_place_in_the_target(tmp_path, names):
    numbers = Numbers()
    tree, params = {}, {name: {part: _model(numbers) for part in ("model", "lm_head")} for name in names}
    for name, own in params.items():
        tree[name] = {"params": own, "opt_state": numbers.optimizer(ADAM, own), "step": np.int32(3)}
    path = write(tmp_path, tree)

    def make():
        models = {
            name: _Owner(**{part: Branch(of, {}) for part, of in own.items()}) for name, own in params.items()
        }
        return {
            name: {"model": model, "optimizer": nnx.Optimizer(model, ADAM, wrt=nnx.Param)}
            for name, model in models.items()
        }

    result = restore(path, nnx.eval_shape(make))
    for name, own in params.items():
        check(nnx.split(result[name]["model"])[1], own)
        moments = result[name]["optimizer"].opt_state[0].mu
        check(moments, tree[name]["opt_state"][0].mu)


@pytest.mark.parametrize(
    "beside", [{}, {"epoch": np.int32(3)}, {"batch_stats": {"norm": {"mean": np.ones(2)}}}]
)
@pytest.mark.parametrize("inner", [("best",), ("teacher", "model")])
def test_a_network_below_another_one_is_not_taken_for_it(tmp_path, inner, beside):
    numbers = Numbers()
    own, other = _model(numbers), {"params": _model(numbers)}
    for name in reversed(inner):
        other = {name: other}
    path = write(tmp_path, {"x": {"params": own} | other | beside})

    def make():
        return Branch(own, {})

    error = refused(path, nnx.eval_shape(make), unexpected="ignore")
    assert "batch_stats" in beside or "no name tells" in str(error)
    rules = [("x/params", "params")]
    check(nnx.split(restore(path, nnx.eval_shape(make), unexpected="ignore", renames=rules))[1], own)


@pytest.mark.parametrize("below", [("actor",), ("x", "actor"), ("x", "actor", "model")])
def test_the_network_at_the_root_is_not_given_to_the_name_of_another_stored_one(tmp_path, below):
    numbers = Numbers()
    own = _model(numbers)
    other = {"params": _model(numbers)}
    for name in reversed(below):
        other = {name: other}
    path = write(tmp_path, {"params": own, "step": np.int32(1)} | other)
    target = nnx.eval_shape(lambda: {"actor": Branch(own, {})})
    try:
        result = restore(path, target, unexpected="ignore")
    except RestoreError:
        return
    assert below == ("actor",)
    check(nnx.state(result["actor"]), other["actor"]["params"])


@pytest.mark.parametrize("names", [("student", "teacher"), ("model", "target"), ("net", "best")])
@pytest.mark.parametrize("above", [(), ("s",)])
def test_weights_without_a_collection_are_a_network_as_well(tmp_path, above, names):
    numbers = Numbers()
    bare, held = _model(numbers), _model(numbers)
    tree = {names[0]: bare, names[1]: {"params": held}}
    for name in above:
        tree = {name: tree}
    path = write(tmp_path, tree | {"step": np.int32(1)})
    target = nnx.eval_shape(lambda: Branch(bare, {}))
    refused(path, target, unexpected="ignore")
    for name, meant, own in ((names[0], "", bare), (f"{names[1]}/params", "params", held)):
        rules = [("/".join((*above, name)), meant)]
        check(nnx.state(restore(path, target, unexpected="ignore", renames=rules)), own)
    if not above:
        check(nnx.state(restore(path, {names[1]: target}, unexpected="ignore")[names[1]]), held)


@pytest.mark.parametrize("target_network", [lambda params: params, lambda params: {"params": params}])
def test_a_train_state_called_state_beside_a_target_network_is_not_a_flax_optim_optimizer(
    tmp_path, target_network
):
    numbers = Numbers()
    state = _train_state(numbers, _model(numbers), 7)
    other = _model(numbers)
    path = write(tmp_path, {"state": state, "target": target_network(other)})
    target = {"state": training_target(state.params, ADAM), "target": worlds.model_target(other)}
    result = restore(path, target)
    check(result["state"], _expected(state))
    check(result["target"], other)


def _boxed(tree):
    return jax.tree.map(lambda value: {"value": value}, tree)


SPELT = {
    "in a variables dict": lambda bare, held: {"student": bare, "teacher": {"params": {"params": held}}},
    "boxed": lambda bare, held: {"student": bare, "teacher": {"params": _boxed(held)}},
    "boxed without": lambda bare, held: {"student": _boxed(bare), "teacher": {"params": held}},
    "in a field": lambda bare, held: {"student_params": bare, "teacher": {"params": held}},
    "in a state": lambda bare, held: {"state": {"step": np.int32(1), "model": bare}, "target": held},
}


@pytest.mark.parametrize("called", [None, "model"])
@pytest.mark.parametrize("spelt", SPELT)
def test_however_two_networks_are_spelt_none_is_taken_unasked(tmp_path, spelt, called):
    numbers = Numbers()
    bare, held = _model(numbers), _model(numbers)
    path = write(tmp_path, SPELT[spelt](bare, held))
    network = nnx.eval_shape(lambda: Branch(bare, {}))
    try:
        result = restore(path, network if called is None else {called: network}, unexpected="ignore")
    except RestoreError:
        return
    # Bare params below levels of their own are the only ones with all names at that depth.
    assert (spelt, called) == ("in a state", None)
    check(nnx.state(result), bare)


@pytest.mark.parametrize("policy", ["error", "warn"])
@pytest.mark.parametrize("main", ["model_params", "net", "model"])
def test_the_optimizer_of_the_main_network_is_not_that_of_one_beside_it(tmp_path, main, policy):
    numbers = Numbers()
    own, best = _model(numbers), _model(numbers)
    stored = {"opt_state": numbers.optimizer(ADAM, own), "step": np.int32(3)}
    path = write(tmp_path, {main: own, "best": best} | stored)

    def make(name):
        model = Branch(own, {})
        return {name: {"model": model, "optimizer": nnx.Optimizer(model, ADAM, wrt=nnx.Param)}}

    refused(path, nnx.eval_shape(lambda: make("best")), policy=policy, unexpected="ignore")
    result = restore(path, nnx.eval_shape(lambda: make(main)), unexpected="ignore")
    check(nnx.state(result[main]["model"]), own)
    check(result[main]["optimizer"].opt_state[0].mu, stored["opt_state"][0].mu)


@pytest.mark.parametrize("is_new", [False, True], ids=["two of a kind", "one of them new"])
def test_no_network_of_several_is_filled_where_the_only_stored_one_may_be_it(is_new):
    """Under `warn`, the new network had been given the other one's layer of its name, and that zeros."""
    numbers = Numbers()
    params = {name: numbers.dense(3, 3) for name in ("value", "mu")}
    actor = {"net": params}
    other = {
        "value": numbers.dense(3, 3) | {"mean": numbers(3), "scale": numbers(3)},
        "a": numbers.dense(3, 3),
    }
    target = model_target({"actor": actor, "critic": other if is_new else actor}, {"mean": nnx.BatchStat})

    with pytest.raises(MissingParamError, match="actor/net/mu/kernel"):
        from_linen({"params": params}, target, policy="warn", unexpected="ignore")


def test_a_network_that_is_stored_by_name_is_not_filled_where_the_model_has_taken_it():
    numbers = Numbers()
    params = {"dense": numbers.dense()}
    target = model_target({"model": params, "avg": {"teacher": params}})

    with pytest.raises(MissingParamError, match="avg/teacher/dense/kernel"):
        from_linen({"teacher": {"params": params}, "step": np.int32(3)}, target, policy="warn")
