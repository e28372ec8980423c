"""Averages that are all that is stored, beside an optimizer; statistics that are stored once."""

import numpy as np
import optax
import pytest
from flax import nnx

from orbax_nnx_handler import Copy, RestoreError, plan_restore, restore, suggest
from tests.laws.worlds import Numbers, check, model_target, training_target, write

ADAM = optax.adam(1e-3)


def layers(numbers, first="up"):
    return {first: {"kernel": numbers(4, 8), "bias": numbers(8)}, "down": {"kernel": numbers(8, 4)}}


def averages(numbers, directory, first="up"):
    """Writes averages alone, with the optimizer that trained what was averaged."""
    stored = layers(numbers, first)
    tree = {"ema_params": stored, "opt_state": numbers.optimizer(ADAM, stored), "step": np.int32(7)}
    return stored, write(directory, tree)


def test_averages_alone_beside_an_optimizer_lead_to_the_weights_alone(tmp_path):
    stored, path = averages(Numbers(), tmp_path)

    with pytest.raises(RestoreError) as caught:
        restore(path, training_target(stored, ADAM))

    assert [cause.kind for cause in caught.value.causes] == ["OnlyACopy"]
    (hint,) = caught.value.hints
    assert hint.words == (
        "if that is what you want, pass renames=[('ema_params', 'params')]; the stored optimizer is of "
        "parameters that are not stored, and is left: to restore the weights alone, pass the target's "
        "'model' by itself as target."
    )
    check(restore(path, model_target(stored), renames=[("ema_params", "params")]), stored)


def test_of_averages_under_another_name_nothing_is_begun_anew(tmp_path):
    stored, path = averages(Numbers(), tmp_path, "fc")
    wanted = {"up": stored["fc"], "down": stored["down"]}

    with pytest.raises(RestoreError) as caught:
        restore(path, training_target(wanted, ADAM))

    assert "policy" not in str(caught.value)
    rules = [("ema_params", "params")]
    found = suggest(path, model_target(wanted), renames=rules)
    check(restore(path, model_target(wanted), renames=[*rules, *found.renames]), wanted)


class Both(nnx.Module):
    """A model and its averages, each with statistics."""

    def __init__(self, tree):
        kinds = {"mean": nnx.BatchStat, "var": nnx.BatchStat}
        self.model, self.ema = model_target(tree, kinds), model_target(tree, kinds)


@pytest.mark.parametrize("first", ["up", "fc"])
def test_suggest_asks_whether_averages_have_the_statistics_that_are_stored_once(tmp_path, first):
    numbers = Numbers()
    params = layers(numbers, first) | {"bn": {"scale": numbers(8)}}
    average, statistics = numbers.like(params), {"bn": {"mean": numbers(8), "var": numbers(8)}}
    path = write(tmp_path, {"params": params, "ema_params": average, "batch_stats": statistics})

    def whole(tree):
        norm = tree["bn"] | statistics["bn"]
        return {"up": tree[first], "down": tree["down"], "bn": norm}

    target = Both(whole(params))
    found = suggest(path, target)

    (question,) = found.questions
    assert question.choices == ("batch_stats -> ema too",)
    assert set(question.wanted) == {("ema", "bn", "mean"), ("ema", "bn", "var")}
    assert set(question.stored) == {("batch_stats", "bn", "mean"), ("batch_stats", "bn", "var")}
    rules = found.answered([0])
    assert rules == (*found.renames, Copy("batch_stats", "ema")) == question.alternatives[0]
    assert found.answered([None]) == found.renames
    result = restore(path, target, renames=rules)
    check(result.model, whole(params))
    check(result.ema, whole(average))


def test_averages_have_their_own_statistics_where_those_are_stored(tmp_path):
    numbers = Numbers()
    params, statistics = {"bn": {"scale": numbers(8)}}, {"bn": {"mean": numbers(8), "var": numbers(8)}}
    average = {"ema_params": numbers.like(params), "ema_batch_stats": numbers.like(statistics)}
    path = write(tmp_path, {"params": params, "batch_stats": statistics, **average})
    target = Both({"bn": params["bn"] | statistics["bn"]})

    found = suggest(path, target)

    (question,) = found.questions
    assert question.choices == ("ema_batch_stats -> ema too",)
    result = restore(path, target, renames=found.answered([0]))
    check(result.ema, {"bn": average["ema_params"]["bn"] | average["ema_batch_stats"]["bn"]})
    plan = plan_restore(path, target, renames=found.renames)
    assert [hint.arguments["renames"][-1] for hint in plan.error().hints] == [("ema_batch_stats", "ema")]
