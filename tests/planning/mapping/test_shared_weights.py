"""One stored weight never becomes two wanted ones."""

from functools import partial
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from orbax_nnx_handler import AmbiguousMappingError, Drop, MissingParamError, ShapeMismatchError
from tests.planning.plans import params, plan_of, values_of


def test_a_stored_weight_that_two_wanted_leaves_spell_alike_is_ambiguous() -> None:
    wanted = nnx.State(params({"layers_0": {"kernel": (2, 3)}, "layers": {"0": {"kernel": (2, 3)}}}))

    plan = plan_of(wanted, {"params": {"layers_0": {"kernel": np.ones((2, 3), np.float32)}}})

    with pytest.raises(AmbiguousMappingError, match="params/layers_0/kernel  ->") as caught:
        plan.check()
    assert set(caught.value.paths) == {("layers_0", "kernel"), ("layers", "0", "kernel")}


def test_a_tied_weight_is_one_leaf_and_no_fault() -> None:
    class Tied(nnx.Module):
        def __init__(self) -> None:
            self.embed = nnx.Param(jax.numpy.ones((2, 3)))
            self.out = self.embed

    plan = plan_of(nnx.eval_shape(Tied), {"params": {"embed": np.ones((2, 3), np.float32)}})

    plan.check()


class _TiedTwice(nnx.Module):
    """One embedding under two names, of which the first is not the one that Linen gave it."""

    def __init__(self) -> None:
        self.first = nnx.Embed(3, 2, rngs=nnx.Rngs(0))
        self.head = self.first
        self.norm = nnx.Linear(2, 2, rngs=nnx.Rngs(0))


def _tied(name: str, **beside: Any) -> dict[str, Any]:
    table = np.arange(6, dtype=np.float32).reshape(3, 2)
    norm = {"kernel": np.ones((2, 2), np.float32), "bias": np.ones(2, np.float32)}
    return {name: {"embedding": table}, "norm": norm, **beside}


def test_a_shared_variable_is_found_under_any_of_its_names() -> None:
    stored = {"params": _tied("head")}

    plan = plan_of(nnx.eval_shape(_TiedTwice), stored)

    plan.check()
    np.testing.assert_array_equal(values_of(plan, stored)["first/embedding"], [[0, 1], [2, 3], [4, 5]])
    assert not plan.unexpected
    assert "first/embedding   as head/embedding, the same Variable" in plan.evidence()


def test_a_shared_variable_below_a_level_of_the_target_is_found_with_its_moments() -> None:
    def make() -> Any:
        model = _TiedTwice()
        return {"model": model, "optimizer": nnx.Optimizer(model, optax.trace(0.9), wrt=nnx.Param)}

    moments = jax.tree.map(partial(np.add, 10), _tied("head"))
    stored = {"params": _tied("head"), "opt_state": {"trace": moments}, "step": np.int32(3)}

    plan = plan_of(nnx.eval_shape(make), stored)

    plan.check()
    found = values_of(plan, stored)
    np.testing.assert_array_equal(found["model/first/embedding"], [[0, 1], [2, 3], [4, 5]])
    moment = next(value for path, value in found.items() if path.endswith("trace/first/embedding"))
    np.testing.assert_array_equal(moment, [[10, 11], [12, 13], [14, 15]])


def test_the_error_names_every_path_of_a_shared_variable_that_is_stored_under_none() -> None:
    plan = plan_of(nnx.eval_shape(_TiedTwice), {"params": _tied("table")})

    with pytest.raises(MissingParamError, match=r"first/embedding +\(3, 2\) float32 +also head/embedding"):
        plan.check()


def test_a_shared_variable_that_is_stored_under_two_other_names_is_a_question() -> None:
    class Thrice(_TiedTwice):
        def __init__(self) -> None:
            super().__init__()
            self.other = self.first

    other = {"embedding": np.zeros((3, 2), np.float32)}

    with pytest.raises(AmbiguousMappingError, match="first/embedding\n    <- params/head/embedding"):
        plan_of(nnx.eval_shape(Thrice), {"params": _tied("head", other=other)}).check()


def test_a_shared_variable_of_one_network_is_not_taken_from_another() -> None:
    def make() -> Any:
        return {"gen": _TiedTwice(), "disc": _TiedTwice()}

    stored: dict[str, Any] = {
        "gen": {"params": _tied("first"), "step": np.int32(1)},
        "disc": {"params": _tied("head"), "step": np.int32(1)},
    }
    stored["disc"]["params"]["head"]["embedding"] = np.full((3, 2), 7, np.float32)

    plan = plan_of(nnx.eval_shape(make), stored)

    plan.check()
    found = values_of(plan, stored)
    np.testing.assert_array_equal(found["gen/first/embedding"], [[0, 1], [2, 3], [4, 5]])
    np.testing.assert_array_equal(found["disc/first/embedding"], np.full((3, 2), 7))


def test_a_shared_variable_of_another_shape_under_its_other_name_is_not_missing() -> None:
    stored = {"params": _tied("head")}
    stored["params"]["head"]["embedding"] = np.ones((4, 2), np.float32)

    plan = plan_of(nnx.eval_shape(_TiedTwice), stored)

    with pytest.raises(ShapeMismatchError, match=r"stored \(4, 2\) float32 +wanted \(3, 2\).*head/embedding"):
        plan.check()


class _Model(nnx.Module):
    """A model with statistics, which MaxText's layout keeps aside."""

    def __init__(self) -> None:
        self.up = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(3, use_bias=False, use_scale=False, rngs=nnx.Rngs(0))


def _weights(value: float) -> Any:
    return {"up": {"kernel": np.full((2, 3), value, np.float32), "bias": np.full(3, value, np.float32)}}


def _statistics(value: float) -> Any:
    return {"norm": {"mean": np.full(3, value, np.float32), "var": np.full(3, value, np.float32)}}


_BESIDE = {
    "Flax": {"params": _weights(1), "batch_stats": _statistics(2)},
    "MaxText": {"params": {"params": _weights(1)}, "nnx_aux": {"model": _statistics(2)}},
}


@pytest.mark.parametrize("layout", _BESIDE)
@pytest.mark.parametrize("value", [1, 3], ids=["equal", "another"])
def test_what_is_kept_aside_under_the_other_name_of_a_shared_module_is_not_left_behind_unsaid(
    layout: str, value: int
) -> None:
    def make() -> Any:
        model = _Model()
        return {"ema": model, "model": model}

    stored = _BESIDE[layout]
    aside = {"ema": _weights(value) | _statistics(value), **stored.get("nnx_aux", {})}
    stored = stored | {"nnx_aux": aside}

    with pytest.raises(AmbiguousMappingError, match="4 wanted leaves are claimed by several") as caught:
        plan_of(make(), stored).check()
    (hint,) = caught.value.hints
    level = "nnx_aux/ema" if "nnx_aux" in _BESIDE[layout] else "nnx_aux"
    assert hint.words == f"pass renames=[Drop({level!r}, 'why')] to leave behind what is not meant."
    plan = plan_of(make(), stored, [Drop(level, "the model's own is meant")], unexpected="error")
    plan.check()
    found = {path.split("/", 1)[1]: value for path, value in values_of(plan, stored).items()}
    np.testing.assert_array_equal(found["up/kernel"], np.full((2, 3), 1))
    np.testing.assert_array_equal(found["norm/mean"], np.full(3, 2))


@pytest.mark.parametrize("layout", _BESIDE)
def test_a_shared_module_that_is_stored_once_is_restored_beside_what_others_keep_aside(layout: str) -> None:
    def make() -> Any:
        model = _Model()
        return {"ema": model, "model": model}

    stored = _BESIDE[layout]
    stored = stored | {"nnx_aux": {"up": _weights(5)["up"], **stored.get("nnx_aux", {})}}

    plan = plan_of(make(), stored)

    plan.check()
    found = {path.split("/", 1)[1]: value for path, value in values_of(plan, stored).items()}
    np.testing.assert_array_equal(found["up/kernel"], np.full((2, 3), 1))
