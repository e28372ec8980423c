"""Numbers that stand beside an NNX object are leaves like any other: stored, restored, missed."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from orbax_nnx_handler import (
    MissingParamError,
    NNXLinenHandler,
    NNXLinenRestore,
    NNXLinenSave,
    RestoreError,
    UnreadableLeafError,
    from_linen,
    plan_restore,
    restore,
    save,
    to_linen,
)
from tests.sampled import sampled


def _model() -> nnx.Linear:
    return nnx.Linear(4, 3, rngs=nnx.Rngs(0))


def _abstract() -> nnx.Linear:
    return nnx.eval_shape(_model)


class _Run(NamedTuple):
    model: Any
    epoch: Any


@pytest.fixture
def linen(tmp_path) -> Any:
    params = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}
    beside = {"step": jnp.int32(1200), "epoch": 7, "rate": 0.5, "done": True}
    ocp.PyTreeCheckpointer().save(tmp_path / "linen", {"params": params, **beside})
    return tmp_path / "linen"


@pytest.mark.parametrize(
    ("name", "zero", "stored"),
    [
        ("step", 0, 1200),
        ("step", np.int32(0), 1200),
        ("epoch", np.int32(0), 7),
        ("rate", 0.0, 0.5),
        ("rate", np.float32(0), 0.5),
        ("done", False, True),
    ],
)
def test_a_number_beside_a_module_comes_back_as_it_is_stored(
    linen, name: str, zero: Any, stored: Any
) -> None:
    restored = restore(linen, {"model": _abstract(), name: zero}, unexpected="ignore")

    assert restored[name] == stored
    np.testing.assert_array_equal(restored["model"].kernel[...], np.ones((4, 3)))


def test_a_number_in_any_container_has_one_origin(linen) -> None:
    target = _Run(model=_abstract(), epoch=0)
    plan = plan_restore(linen, target, unexpected="ignore")

    restored = restore(linen, target, unexpected="ignore")

    assert isinstance(restored, _Run)
    assert restored.epoch == 7
    assert ("epoch",) in plan.restored


def test_a_number_that_is_not_stored_is_missing(linen) -> None:
    with pytest.raises(MissingParamError, match="rounds"):
        restore(linen, {"model": _abstract(), "rounds": 5}, unexpected="ignore")


def test_the_settings_of_a_module_stay_settings(linen) -> None:
    restored = restore(linen, {"model": _abstract(), "step": 0}, unexpected="ignore")

    assert restored["model"].in_features == 4


def test_what_is_saved_beside_a_module_comes_back(tmp_path) -> None:
    item = {"model": _model(), "epoch": 3, "rate": np.float32(0.5), "done": True}
    target = {"model": _abstract(), "epoch": 0, "rate": np.float32(0), "done": False}

    save(tmp_path / "item", item)
    with ocp.CheckpointManager(tmp_path / "managed", item_handlers=NNXLinenHandler()) as manager:
        manager.save(1, args=NNXLinenSave(item))
        manager.wait_until_finished()
        managed = manager.restore(1, args=NNXLinenRestore(target))

    for restored in (restore(tmp_path / "item", target), managed, from_linen(to_linen(item), target)):
        assert (restored["epoch"], restored["rate"], restored["done"]) == (3, 0.5, True)
        assert restored["epoch"].dtype == jnp.int32


def test_numpy_weights_are_taken_over_while_a_program_is_traced() -> None:
    weights = np.arange(6, dtype=np.float32)

    made = jax.jit(
        lambda: from_linen({"params": {"w": weights}}, {"w": jax.ShapeDtypeStruct((6,), jnp.float32)})
    )

    np.testing.assert_array_equal(made()["w"], np.arange(6))
    assert jax.eval_shape(made)["w"].shape == (6,)


def _trained() -> tuple[nnx.Linear, nnx.Optimizer[Any]]:
    model = _model()
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    optimizer.step.set_value(jnp.uint32(5))
    return model, optimizer


def _as_states(item: Any) -> Any:
    def is_module(part: Any) -> bool:
        return isinstance(part, nnx.Module)

    return jax.tree.map(lambda part: nnx.state(part) if is_module(part) else part, item, is_leaf=is_module)


def _wholes(model: Any, optimizer: Any, other: Any, its_own: Any) -> dict[str, Any]:
    both = {"model": model, "optimizer": optimizer}
    return {
        "a step beside a model": {"model": model, "step": 3},
        "beside a model of another name": {"net": model, "step": 3},
        "beside parameters": {"params": model, "step": 3},
        "beside two models": {"encoder": model, "decoder": other, "step": 3},
        "beside an optimizer": {**both, "step": 3},
        "a count beside an optimizer": {**both, "count": 3},
        "both": {**both, "count": 3, "step": 4},
        "below a key": {"run": both, "step": 3},
        "at two levels": {"run": {**both, "step": 4}, "step": 3},
        "beside two train states": {
            "gen": both,
            "disc": {"model": other, "optimizer": its_own},
            "step": 3,
        },
        "beside models and optimizers": {
            "gen": model,
            "disc": other,
            "gen_opt": optimizer,
            "disc_opt": its_own,
            "step": 3,
        },
    }


@pytest.mark.parametrize("name", _wholes(*[None] * 4))
@pytest.mark.parametrize("form", [_as_states, lambda item: item], ids=["states", "modules"])
def test_an_item_with_numbers_of_its_own_comes_back_as_it_was_saved(tmp_path, name: str, form: Any) -> None:
    def build() -> Any:
        return _wholes(*_trained(), *_trained())[name]

    item = build()
    zeros = jax.tree.map(lambda leaf: 0 * leaf, _as_states(item))
    target = zeros if form is _as_states else _with_state(build(), zeros)

    save(tmp_path / "item", form(item))
    restored = restore(tmp_path / "item", target)

    here, there = (jax.tree.leaves_with_path(_as_states(part)) for part in (item, restored))
    assert [path for path, _ in here] == [path for path, _ in there]
    for (path, saved), (_, found) in zip(here, there, strict=True):
        np.testing.assert_array_equal(saved, found, err_msg=str(path))


def _with_state(item: Any, state: Any) -> Any:
    """Returns the item with the numbers of a state, and its modules with that state's values."""
    if isinstance(item, nnx.Module):
        nnx.update(item, state)
        return item
    return (
        {key: _with_state(part, state[key]) for key, part in item.items()}
        if isinstance(item, dict)
        else state
    )


def test_collections_named_by_a_program_are_those_of_linen(tmp_path) -> None:
    norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    norm.mean.set_value(jnp.arange(4.0))
    params, statistics = nnx.state(norm, nnx.Param), nnx.state(norm, nnx.BatchStat)
    optimizer = optax.adam(1e-3).init(params)
    alone = {"params": params, "batch_stats": statistics}

    for name, item in (("a", alone), ("b", {**alone, "opt_state": optimizer, "step": 3})):
        save(tmp_path / name, item)
        linen = ocp.PyTreeCheckpointer().restore(tmp_path / name)
        restored = restore(tmp_path / name, item)

        assert set(linen["params"]) == {"bias", "scale"}
        np.testing.assert_array_equal(linen["batch_stats"]["mean"], np.arange(4.0))
        np.testing.assert_array_equal(restored["batch_stats"]["mean"], np.arange(4.0))


OWN = {
    "one": {"m": jnp.arange(3.0)},
    "mirrored": {"m": {"kernel": jnp.ones((4, 3)), "bias": jnp.arange(3.0)}},
    "bare": {"kernel": jnp.ones((4, 3)), "bias": jnp.arange(3.0)},
    "other": {"mu": {"kernel": jnp.ones((4, 3))}, "other": {"deep": {"w": jnp.arange(3.0)}}},
    "numbered": {"0": {"m": jnp.arange(3.0)}, "1": {"m": jnp.arange(2.0)}},
    "numbers": {"m": jnp.arange(3.0), "count": jnp.int32(4), "rate": 0.5},
    "list": [jnp.arange(3.0), {"m": jnp.arange(2.0)}],
    "optax": optax.adam(1e-2).init({"kernel": jnp.ones((4, 3)), "bias": jnp.arange(3.0)}),
}
FORMS = {"state": nnx.state, "module": lambda part: part}


@pytest.mark.parametrize(("kind", "name", "own"), sampled(FORMS, ["opt_state", "grads"], OWN))
def test_a_programs_own_arrays_beside_a_model_come_back_whatever_they_are_called(
    tmp_path, kind: str, name: str, own: str
) -> None:
    form, beside = FORMS[kind], OWN[own]
    item = {"model": form(_model()), name: beside}
    zeros = jax.tree.map(lambda leaf: 0 * leaf, beside)

    save(tmp_path / "item", item)
    restored = restore(tmp_path / "item", {"model": form(_abstract()), name: zeros})

    assert jax.tree.structure(restored[name]) == jax.tree.structure(beside)
    jax.tree.map(np.testing.assert_array_equal, restored[name], beside)
    np.testing.assert_array_equal(
        restored["model"]["kernel"] if form is nnx.state else restored["model"].kernel, _model().kernel
    )


@pytest.mark.parametrize(
    ("kind", "model", "above", "own"), sampled(FORMS, ["params", "model"], [None, "nnx_aux"], OWN)
)
def test_what_other_programs_store_beside_a_model_comes_back(
    tmp_path, kind: str, model: str, above: str | None, own: str
) -> None:
    form, beside = FORMS[kind], OWN[own]
    # Below `nnx_aux` lies what an earlier release saved of a module with a dict beside it.
    own: dict[str, Any] = {"opt_state": beside}
    if above is not None and (model == "model" or not isinstance(beside, dict)):
        pytest.skip("no release has saved that")
    stored = {model: nnx.to_pure_dict(nnx.state(_model())), **({above: own} if above else own)}
    ocp.PyTreeCheckpointer().save(tmp_path / "item", stored)
    zeros = jax.tree.map(lambda leaf: 0 * leaf, beside)

    restored = restore(tmp_path / "item", {"model": form(_abstract()), "opt_state": zeros})

    jax.tree.map(np.testing.assert_array_equal, restored["opt_state"], beside)
    np.testing.assert_array_equal(nnx.state(restored["model"])["bias"], _model().bias)


def test_a_module_beside_a_tuple_of_abstract_arrays_is_a_target(tmp_path) -> None:
    item = {"model": _model(), "pair": (jnp.arange(3), _Run(model=jnp.ones(2), epoch=jnp.int32(4)))}
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), item["pair"])

    save(tmp_path / "item", item)
    restored = restore(tmp_path / "item", {"model": _abstract(), "pair": abstract})

    np.testing.assert_array_equal(restored["pair"][0], np.arange(3))
    assert restored["pair"][1].epoch == 4


def test_restore_args_that_orbax_makes_of_a_state_with_random_keys_are_taken(tmp_path) -> None:
    dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(7))
    model = nnx.Dict(linear=_model(), dropout=dropout)
    target = nnx.state(nnx.eval_shape(lambda: nnx.clone(model)))

    save(tmp_path / "item", model)
    restored = restore(tmp_path / "item", target, ocp.checkpoint_utils.construct_restore_args(target))

    key = jax.random.key_data(dropout.rngs.key.get_value())
    np.testing.assert_array_equal(jax.random.key_data(restored["dropout"]["rngs"]["key"].get_value()), key)


def test_text_beside_a_state_is_one_clear_error_with_a_way_out(tmp_path) -> None:
    save(tmp_path / "item", nnx.state(_model()))

    with pytest.raises(RestoreError, match="target leaf name is a str") as caught:
        restore(tmp_path / "item", {"model": nnx.state(_abstract()), "name": "run"})

    assert [hint.words for hint in caught.value.hints] == [
        "leave text out of the target: keep it in an item of its own, such as ocp.args.JsonSave."
    ]


def test_a_mask_is_not_ignored(tmp_path) -> None:
    masked = np.ma.masked_array(np.arange(3.0, dtype=np.float32), mask=[True, False, False])
    save(tmp_path / "item", _model())

    with pytest.raises(UnreadableLeafError, match=r"params/bias\s+a masked array"):
        from_linen({"params": {"kernel": np.ones((4, 3), np.float32), "bias": masked}}, _abstract())
    for write in (lambda state: save(tmp_path / "masked", state), to_linen):
        with pytest.raises(RestoreError, match="a masked array, and no array of JAX's has a mask: bias"):
            write({"model": _model(), "bias": masked})
    assert not (tmp_path / "masked").exists()
    with pytest.raises(RestoreError, match="target leaf bias is a masked array"):
        restore(tmp_path / "item", {"kernel": np.ones((4, 3), np.float32), "bias": masked})
