"""A save under rules of which several lead to one name: which of them stands in the way is said."""

import pytest
from flax import nnx

from orbax_nnx_handler import Copy, RuleError, plan_restore, restore, save
from tests.laws.worlds import Numbers, check, model_target, write

STATISTICS = {"mean": nnx.BatchStat, "var": nnx.BatchStat}


class Averaged(nnx.Module):
    """A model and its averages, with the statistics of both."""

    def __init__(self, tree):
        self.model, self.ema = model_target(tree, STATISTICS), model_target(tree, STATISTICS)


def test_the_rule_that_takes_what_another_one_is_for_is_named(tmp_path):
    numbers = Numbers()
    params, statistics = {"bn": {"scale": numbers(8)}}, {"bn": {"mean": numbers(8), "var": numbers(8)}}
    tree = {"params": params, "ema_params": numbers.like(params), "batch_stats": statistics}
    path = write(tmp_path, tree)
    target = Averaged({"bn": params["bn"] | statistics["bn"]})
    rules = [("ema_params", "ema"), Copy("batch_stats", "ema")]
    state = restore(path, target, renames=rules)

    with pytest.raises(RuleError) as caught:
        save(tmp_path / "back", state, renames=rules)

    said = str(caught.value)
    assert said.startswith(
        "the rule that saves, ('ema', 'ema_params'), matches no leaf of the state: "
        "Drop(pattern='ema', reason='a copy of batch_stats'), which undoes a rule behind it, takes all that "
        "it is for."
    )
    assert "save with the plan" in said
    plan = plan_restore(path, target, renames=rules)
    save(tmp_path / "back", state, renames=plan)
    check(
        restore(tmp_path / "back", target, renames=rules).ema,
        {"bn": tree["ema_params"]["bn"] | statistics["bn"]},
    )


def test_what_ends_elsewhere_is_listed_once_and_its_way_out_is_true(tmp_path):
    numbers = Numbers()
    params = {"fc": numbers.dense()}
    path, target = write(tmp_path, {"ema_params": params}), model_target({"up": params["fc"]})
    rules = [("ema_params", "params"), ("fc", "up")]
    state = restore(path, target, renames=rules)

    with pytest.raises(RuleError) as caught:
        save(tmp_path / "back", state, renames=rules)

    said = str(caught.value)
    assert "2 leaves end elsewhere:\n  up/bias\n  up/kernel\nhint: " in said
    assert "or save with the plan or the report of the restore" in said
    save(tmp_path / "back", state, renames=plan_restore(path, target, renames=rules))
    check(restore(tmp_path / "back", target, renames=rules), {"up": params["fc"]})


@pytest.mark.parametrize(
    ("rule", "hint"),
    [
        (("fc", "upp"), "each from a stored name to one that the state has."),
        (("up", "fc"), "each from a stored name to one that the state has: write ('fc', 'up')."),
    ],
)
def test_a_rule_for_no_name_of_the_state_is_told_which_way_rules_go(tmp_path, rule, hint):
    with pytest.raises(RuleError) as caught:
        save(tmp_path / "out", model_target({"up": Numbers().dense()}), renames=[rule])

    assert str(caught.value).endswith(
        f"matches no leaf of the state.\nhint: rules are those of the restore, {hint}"
    )
