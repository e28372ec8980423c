"""What a caller gets wrong at the first try: one error that names it and what to write instead."""

import functools
import shutil

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from orbax_nnx_handler import (
    MissingParamError,
    NNXLinenHandler,
    NNXLinenRestore,
    NNXLinenSave,
    NotACheckpointError,
    Rename,
    RestoreError,
    RuleError,
    UnusedRuleError,
    plan_restore,
    restore,
    save,
    suggest,
    v1,
)


class Net(nnx.Module):
    def __init__(self) -> None:
        self.dense = nnx.Linear(2, 3, rngs=nnx.Rngs(0))


class WithHead(Net):
    def __init__(self) -> None:
        super().__init__()
        self.head = nnx.Linear(3, 2, rngs=nnx.Rngs(0))


TARGET = nnx.eval_shape(Net)


@pytest.fixture(scope="module")
def item(tmp_path_factory):
    path = tmp_path_factory.mktemp("mistakes") / "1" / "default"
    save(path, Net())
    return path


@pytest.mark.parametrize("wrong", [None, 3, b"/run", TARGET])
def test_what_is_no_path_is_told_where_the_path_stands(item, wrong):
    for call in (functools.partial(restore, wrong, item), functools.partial(save, wrong, Net())):
        with pytest.raises(TypeError, match=f"path is a {type(wrong).__name__}: .*restore\\(path, target\\)"):
            call()


def test_an_empty_path_is_not_the_working_directory(item, monkeypatch):
    monkeypatch.chdir(item)

    with pytest.raises(NotACheckpointError, match=r"the path is empty.\nhint: pass '.' for"):
        restore("", TARGET)
    assert plan_restore(".", TARGET).fits


def test_another_item_than_the_path_s_own_is_not_given_silently(item, tmp_path):
    step = tmp_path / "1"
    own = shutil.copytree(item, step / "default")
    assert plan_restore(own, TARGET, item="default").fits
    with pytest.raises(NotACheckpointError, match=r"'ema' is another.\nhint: leave the item's name out;"):
        restore(own, TARGET, item="ema")

    shutil.copytree(item, step / "ema")

    with pytest.raises(NotACheckpointError, match=f"'ema' is another.\nhint: pass the step {step} for"):
        restore(own, TARGET, item="ema")
    assert plan_restore(step, TARGET, item="ema").fits


@pytest.mark.parametrize("wrong", [{"a": "b"}, "a=b", ("a", "b"), Rename("a", "b")])
def test_one_rule_in_the_place_of_a_list_is_told_so(item, wrong):
    with pytest.raises(RuleError, match=r"is no list of rules.\nhint: renames lists \(pattern, "):
        restore(item, TARGET, renames=wrong)


def test_a_name_as_a_policy_s_key_is_answered_with_the_filter_of_that_name(item):
    target = nnx.eval_shape(WithHead)

    with pytest.raises(UnusedRuleError, match=r"a name in the path is nnx.PathContains\('head'\)"):
        restore(item, target, policy={"head": "warn", ...: "error"})
    filled = restore(item, target, policy={nnx.PathContains("head"): "warn", ...: "error"})
    assert filled.head.kernel.shape == (3, 2)


def test_what_is_no_filter_is_told_so(item):
    with pytest.raises(ValueError, match=r"the policy's key 3 is no NNX filter.\nhint: a filter is a type"):
        restore(item, TARGET, policy={3: "init"})


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"single_replica": "yes"}, "single_replica is True, False or a SingleReplica, not 'yes'"),
        ({"concurrent_gb": 0}, "concurrent_gb is a positive number of gigabytes, not 0"),
        ({"concurrent_gb": "1"}, "concurrent_gb is a positive number of gigabytes, not '1'"),
        ({"concurrent_gb": float("nan")}, "concurrent_gb is a positive number of gigabytes, not nan"),
    ],
)
def test_an_option_of_another_kind_is_named(item, option, said):
    with pytest.raises(ValueError, match=said):
        restore(item, TARGET, **option)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (Net, r"is the class Net: .*\nhint: pass what it builds: nnx.eval_shape\(lambda: Net\(...\)\)"),
        (
            lambda: Net(),
            r"is the function <lambda>: .*\nhint: pass what it builds: nnx.eval_shape\(fun",
        ),
    ],
)
def test_a_class_in_the_place_of_what_it_builds_is_named_on_restore_and_save(item, wrong, said, tmp_path):
    with pytest.raises(RestoreError, match=said):
        restore(item, wrong)
    with pytest.raises(RestoreError, match=said):
        NNXLinenHandler().restore(item, args=NNXLinenRestore(wrong))
    for store in (functools.partial(save, tmp_path / "x"), NNXLinenSave):
        with pytest.raises(ValueError, match=r"there is nothing to save: the (class Net|function <la)"):
            store(wrong)


@pytest.mark.parametrize("make", [NNXLinenHandler, v1.configured])
@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"layout": "maxtxt"}, "there is no layout 'maxtxt'.\nhint: pass layout='maxtext'."),
        ({"policy": "zeros"}, "policy is one of"),
        ({"unexpected": "raise"}, "unexpected is one of"),
        ({"dtype": "bfloat16"}, "dtype is one of"),
        ({"single_replica": 1}, "single_replica is True, False or a SingleReplica"),
        ({"renames": "a=b"}, "is no list of rules"),
    ],
)
def test_a_handler_is_not_made_with_an_option_that_every_restore_would_refuse(make, option, said):
    with pytest.raises(ValueError, match=said):
        make(**option)


def test_a_handler_class_that_could_save_nothing_is_not_made():
    with pytest.raises(ValueError, match="save_layout is one of 'linen', 'maxtext', not 'flax'"):
        v1.configured(save_layout="flax")


@pytest.mark.parametrize(
    "target", [3, 2.5, jnp.ones(3), jax.ShapeDtypeStruct((3,), jnp.float32), nnx.Param(jnp.ones(3))]
)
def test_a_leaf_alone_has_no_name_that_leads_to_a_stored_one(item, target):
    for ask in (restore, plan_restore, suggest):
        with pytest.raises(RestoreError, match=r"the target is a .* by itself, without a name"):
            ask(item, target)


@pytest.mark.parametrize("name", [3, b"default", "../1/default", "default/"])
def test_what_is_no_item_s_name_is_told_so(item, name):
    with pytest.raises(NotACheckpointError, match="item is the name of a step's item, not "):
        restore(item.parent, TARGET, item=name)


def test_a_module_as_init_is_not_called(item):
    class Callable(Net):
        def __call__(self, x):
            return self.dense(x)

    with pytest.raises(
        RestoreError, match=r"init is a Callable, not a function.\nhint: .*init=make_model, not"
    ):
        restore(item, nnx.eval_shape(WithHead), policy="init", init=Callable())


def test_an_optimizer_whose_variables_hold_lists_is_left_out_as_the_hint_says(item, tmp_path):
    def make():
        model = Net()
        return {"dense": model.dense, "optimizer": nnx.Optimizer(model, optax.sm3(0.1), wrt=nnx.Param)}

    with pytest.raises(
        RestoreError, match=r"is a list: .*\nhint: .* pass the parts of the target without such"
    ):
        restore(item, nnx.eval_shape(make))
    with pytest.raises(RestoreError, match=r"optimizer/opt_state/0/mu/dense/kernel is a list of arrays"):
        save(tmp_path / "all", make())
    saved = {"dense": make()["dense"]}
    save(tmp_path / "model", saved)
    assert (
        restore(tmp_path / "model", nnx.eval_shape(lambda: saved))["dense"].kernel == saved["dense"].kernel
    ).all()


def test_a_path_with_a_null_character_is_told_so():
    with pytest.raises(NotACheckpointError, match=r"^run\\x00x is no path: it holds a null character"):
        restore("run\0x", TARGET)


def test_a_plan_is_checked_by_no_other_word_than_a_policy(item):
    plan = plan_restore(item, {"other": nnx.Param(jnp.ones(3))})

    with pytest.raises(ValueError, match="policy is one of 'error', 'warn', 'init', not 'raise'"):
        plan.check("raise")
    with pytest.raises(MissingParamError):
        plan.check("error")


def test_the_registry_s_error_is_orbaxs_where_args_are_forgotten(item):
    with ocp.CheckpointManager(item.parents[1], item_handlers=NNXLinenHandler()) as manager:
        with pytest.raises(ValueError, match="args=args"):
            manager.restore(1, NNXLinenRestore(TARGET))
        assert manager.restore(1, args=NNXLinenRestore(TARGET)).dense.kernel.shape == (2, 3)
