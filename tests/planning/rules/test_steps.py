"""Numbers that a rule calls the step, steps of another width, and a model's own number of that name."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from orbax_nnx_handler import RestoreError, plan_restore, restore, save
from tests.laws.worlds import Numbers, Training, below, check, refused, write

RULES = [("it", "step"), ("fc", "up")]


def params(numbers):
    return {"fc": {"kernel": numbers(4, 8)}, "down": {"kernel": numbers(8, 4)}}


def wanted(stored):
    return {"up": stored["fc"], "down": stored["down"]}


def zeros(tree):
    return {name: {"kernel": jnp.zeros(part["kernel"].shape)} for name, part in tree.items()}


def with_optimizer(tree):
    return nnx.eval_shape(lambda: Training(tree, optax.sgd(0.1), {}))


class Counted(nnx.Module):
    """A model beside a step of its own type."""

    def __init__(self, tree, kind=nnx.OptState):
        self.model = Training(tree, optax.sgd(0.1), {}).model
        self.step = kind(jnp.int32(0))


TARGETS = {
    "optimizer": (with_optimizer, "optimizer/step"),
    "variable": (lambda tree: nnx.eval_shape(lambda: Counted(tree)), "step"),
    "pure": (lambda tree: {"model": zeros(tree), "step": jnp.int32(0)}, "step"),
}


@pytest.mark.parametrize("form", TARGETS)
@pytest.mark.parametrize("collections", [True, False])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_a_number_that_a_rule_calls_the_step_is_it(tmp_path, form, collections, dtype):
    stored = params(Numbers())
    tree = {"params": stored} if collections else stored
    path = write(tmp_path, tree | {"it": dtype(777)})
    make, step = TARGETS[form]
    target = make(wanted(stored))

    result = restore(path, target, renames=RULES)

    at = tuple(step.split("/"))
    counted = np.asarray(777, np.uint32 if form == "optimizer" else np.int32)
    check(result, below("model", wanted(stored)) | {at: counted})


def test_a_number_is_brought_to_the_step_as_the_target_spells_it(tmp_path):
    stored = params(Numbers())
    path = write(tmp_path, {"params": stored, "it": np.int64(777)})

    result = restore(path, with_optimizer(wanted(stored)), renames=[("it", "optimizer/step"), ("fc", "up")])

    assert int(result.optimizer.step[...]) == 777


def test_a_rule_makes_no_second_step_of_a_train_state_that_has_one(tmp_path):
    stored = params(Numbers())
    path = write(tmp_path, {"params": stored, "step": np.int32(5), "it": np.int64(777)})

    with pytest.raises(RestoreError, match=r"1 rule leads to no wanted leaf:\n  \('it', 'step'\)"):
        restore(path, with_optimizer(wanted(stored)), renames=RULES)


def test_a_step_by_a_rule_is_saved_back_under_its_plan(tmp_path):
    stored = params(Numbers())
    path = write(tmp_path / "in", {"params": stored, "it": np.int64(777)})
    target = with_optimizer(wanted(stored))
    plan = plan_restore(path, target, renames=RULES)

    save(tmp_path / "back", restore(path, target, renames=RULES), renames=plan)

    assert plan_restore(tmp_path / "back", target, renames=RULES).fits
    again = restore(tmp_path / "back", target, renames=RULES)
    assert int(again.optimizer.step[...]) == 777


class Count(nnx.Variable):
    pass


@pytest.mark.parametrize("kind", [nnx.Variable, Count])
def test_a_models_own_number_called_step_is_told_from_the_stored_step(tmp_path, kind):
    stored = params(Numbers())
    path = write(tmp_path, {"params": stored, "step": np.int64(777)})
    tree = wanted(stored)

    error = refused(path, nnx.eval_shape(lambda: Counted(tree, kind)), renames=[("fc", "up")])

    assert [cause.kind for cause in error.causes] == ["OwnStep"]
    assert error.causes[0].text == (
        f"the wanted 'step' is a number of a model, by its type {kind.__name__}, and the stored 'step' is "
        "the train state's step."
    )
    assert error.hints[0].words == (
        "if they are the same, make 'step' an nnx.OptState in the target, or set it in the program."
    )
    # Which is true.
    result = restore(path, nnx.eval_shape(lambda: Counted(tree)), renames=[("fc", "up")])
    assert int(result.step[...]) == 777
