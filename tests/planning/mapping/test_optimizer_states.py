"""Whatever modules are called and chains become: a moment is its parameter's, a count its state's."""

from typing import Any

import numpy as np
import optax
import pytest
from flax import nnx, traverse_util

from orbax_nnx_handler import AmbiguousMappingError, MissingParamError, Transpose
from orbax_nnx_handler.planning.restore_plan import RestorePlan
from tests.planning.mapping.chains import on_disk
from tests.planning.plans import plan_of, values_of


def numbered(*shape: int, first: int) -> np.ndarray:
    return first * 1000 + np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def weights(names: list[str], first: int, *, square: bool = False) -> dict[str, Any]:
    shape = (4, 4) if square else (3, 4)
    kernels = {f"{name}/kernel": numbered(*shape, first=first + at) for at, name in enumerate(names)}
    return traverse_util.unflatten_dict(kernels, sep="/")


def adam(first: dict[str, Any], second: dict[str, Any], count: int) -> Any:
    return {"count": np.int32(count), "mu": first, "nu": second}


def variables(tree: Any, kind: type[nnx.Variable[Any]]) -> Any:
    if isinstance(tree, dict):
        return {key: variables(part, kind) for key, part in tree.items()}
    if isinstance(tree, list | tuple):
        return {at: variables(part, kind) for at, part in enumerate(tree) if part is not None}
    return kind(np.zeros_like(tree))


def train_state(model: Any, opt_state: Any) -> nnx.State[Any, Any]:
    optimizer = {"opt_state": variables(opt_state, nnx.OptState), "step": nnx.OptState(np.uint32(0))}
    return nnx.State({"model": variables(model, nnx.Param), "optimizer": optimizer})


@pytest.mark.parametrize("name", ["mu", "nu", "count", "trace", "inner_state", "step"])
def test_a_module_called_like_a_part_of_an_optimizer_keeps_its_own_moments(name: str) -> None:
    names = ["dense", f"{name}/dense"]
    model, mu, nu = (weights(names, first, square=True) for first in (1, 3, 5))
    stored = {"params": model, "opt_state": [adam(mu, nu, 7), None], "step": np.int32(7)}
    target = train_state(model, [adam(mu, nu, 7)])

    plan = plan_of(target, stored, [Transpose(f"{name}/dense/kernel", (1, 0))])
    plan.check()

    got = values_of(plan, stored)
    for field, tree in (("mu", mu), ("nu", nu)):
        place = f"optimizer/opt_state/0/{field}"
        np.testing.assert_array_equal(got[f"{place}/dense/kernel"], tree["dense"]["kernel"])
        np.testing.assert_array_equal(got[f"{place}/{name}/dense/kernel"], tree[name]["dense"]["kernel"].T)
    assert got["optimizer/opt_state/0/count"] == 7


@pytest.mark.parametrize("copy", ["ema_params", "grads", "masks", "old_params", "target_params"])
def test_a_copy_beside_the_parameters_owns_no_moments(copy: str) -> None:
    model, other, mu, nu = (weights(["hidden", "out"], first) for first in (1, 3, 5, 7))
    stored = {copy: other, "opt_state": [adam(mu, nu, 7), None], "params": model, "step": np.int32(7)}

    plan = plan_of(train_state(model, [adam(mu, nu, 7)]), stored, unexpected="ignore")
    plan.check()

    got = values_of(plan, stored)
    for name in ("hidden", "out"):
        np.testing.assert_array_equal(got[f"model/{name}/kernel"], model[name]["kernel"])
        np.testing.assert_array_equal(got[f"optimizer/opt_state/0/mu/{name}/kernel"], mu[name]["kernel"])


def counts(tx: optax.GradientTransformation) -> Any:
    """Returns a state of which every count is another number."""
    numbers = iter(range(2, 100))

    def numbered_counts(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {key: numbered_counts(part) for key, part in tree.items()}
        if isinstance(tree, list):
            return [numbered_counts(part) for part in tree]
        return tree if tree is None else np.full_like(np.asarray(tree), next(numbers))

    return numbered_counts(on_disk(tx.init({"w": np.zeros(3, np.float32)})))


def restored(old: optax.GradientTransformation, new: optax.GradientTransformation) -> tuple[RestorePlan, Any]:
    model = {"w": np.zeros(3, np.float32)}
    stored = {"params": model, "opt_state": counts(old), "step": np.int32(7)}
    wanted = counts(new)
    wanted = wanted if isinstance(wanted, list) else [wanted]
    return plan_of(train_state(model, wanted), stored, unexpected="ignore"), stored


SCHEDULE = optax.scale_by_schedule(lambda count: 1.0 / (1.0 + count))
PLATEAU = optax.contrib.reduce_on_plateau(accumulation_size=10)
ADAM = optax.scale_by_adam()
NOISE = optax.add_noise(0.1, 0.5, 0)
CLIP = optax.clip(1.0)


def test_a_schedule_and_a_plateau_keep_their_counts_when_the_chain_grows() -> None:
    plan, stored = restored(optax.chain(ADAM, SCHEDULE, PLATEAU), optax.chain(CLIP, ADAM, SCHEDULE, PLATEAU))
    plan.check()

    got, (adam_state, schedule, plateau) = values_of(plan, stored), stored["opt_state"]
    assert got["optimizer/opt_state/1/count"] == adam_state["count"]
    assert got["optimizer/opt_state/2/count"] == schedule["count"]
    for name, value in plateau.items():
        assert got[f"optimizer/opt_state/3/{name}"] == value


def test_two_plateaus_stay_apart() -> None:
    plan, stored = restored(optax.chain(CLIP, PLATEAU, PLATEAU), optax.chain(PLATEAU, ADAM, PLATEAU))

    got = values_of(plan, stored)
    for here, there in ((0, 1), (2, 2)):
        for name, value in stored["opt_state"][there].items():
            assert got[f"optimizer/opt_state/{here}/{name}"] == value
    assert {path[3] for path in plan.missing} == {"count", "mu", "nu"}


def test_where_a_part_is_gone_and_two_may_be_it_the_error_names_both() -> None:
    plan, _ = restored(optax.chain(SCHEDULE, SCHEDULE, ADAM), optax.chain(SCHEDULE, ADAM))

    with pytest.raises(AmbiguousMappingError) as raised:
        plan.check()

    (fault,) = plan.faults
    assert str(fault) == (
        "1 state of the optimizer can be stored ones in several ways, and no field tells which:\n"
        "  0 {count}  <-  0 {count} or 1 {count}\n"
        "hint: restore into the optimizer that was saved, and carry its values over in the program; "
        "or restore the weights alone: pass the model by itself as target."
    )
    assert ("optimizer", "opt_state", 0, "count") in raised.value.paths


def test_the_ways_out_of_the_hint_lead_out() -> None:
    model = {"w": np.zeros(3, np.float32)}
    old = counts(optax.chain(SCHEDULE, SCHEDULE, ADAM))
    stored = {"params": model, "opt_state": old, "step": np.int32(7)}

    plan_of(train_state(model, old), stored).check()
    plan_of(nnx.State(variables(model, nnx.Param)), stored).check()


def test_a_state_whose_fields_changed_is_missing_whole() -> None:
    plan, _ = restored(optax.chain(optax.scale_by_lion(), SCHEDULE), optax.chain(ADAM, SCHEDULE))

    assert {path[2:] for path in plan.missing} == {(0, "count"), (0, "mu", "w"), (0, "nu", "w")}
    assert {path[1:] for path in plan.unexpected} == {(0, "count"), (0, "mu", "w")}
    with pytest.raises(MissingParamError):
        plan.check()


def test_masked_moments_that_two_modules_may_own_are_a_question() -> None:
    model = weights(["dense", "trace/dense"], 1, square=True)
    mu = weights(["dense"], 3, square=True)
    stored = {"params": model, "opt_state": [{"trace": mu}], "step": np.int32(7)}

    with pytest.raises(
        AmbiguousMappingError, match="a module of the model is called like one of their fields"
    ):
        plan_of(train_state(model, [{"trace": mu}]), stored).check()


@pytest.mark.parametrize("with_weights", [True, False])
def test_an_optimizer_alone_is_restored_from_what_is_stored_of_it(with_weights: bool) -> None:
    names = ["dense", "mu/dense"]
    model, mu, nu = (weights(names, first) for first in (1, 3, 5))
    stored = {"opt_state": [adam(mu, nu, 7), None], **({"params": model} if with_weights else {})}
    opt_state = variables([adam(mu, nu, 7)], nnx.OptState)

    plan = plan_of(nnx.State({"opt_state": opt_state}), stored, unexpected="ignore")
    plan.check()

    got = values_of(plan, stored)
    for field, tree in (("mu", mu), ("nu", nu)):
        np.testing.assert_array_equal(got[f"opt_state/0/{field}/dense/kernel"], tree["dense"]["kernel"])
        np.testing.assert_array_equal(
            got[f"opt_state/0/{field}/mu/dense/kernel"], tree["mu"]["dense"]["kernel"]
        )
