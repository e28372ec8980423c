"""Every kind of target, every source of sharding, every rule about dtypes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from orbax_nnx_handler import (
    DtypeMismatchError,
    NNXLinenHandler,
    NNXLinenRestore,
    RestoreError,
    plan_restore,
    restore,
)
from tests.handler.programs import (
    FEATURES,
    Net,
    abstract_net,
    linen_logits,
    linen_state,
    logits,
    make_net,
    save_stock,
    train_target,
)


@pytest.fixture
def item(tmp_path):
    return save_stock(tmp_path / "item", linen_state())


X = jax.random.normal(jax.random.key(3), (5, FEATURES))


class TrainState(nnx.Module):
    """A module that holds model and optimizer, as MaxText has it."""

    def __init__(self) -> None:
        self.model = make_net()
        self.optimizer = nnx.Optimizer(self.model, optax.adamw(1e-2), wrt=nnx.Param)


TARGETS = {
    "abstract module": abstract_net,
    "concrete module": make_net,
    "abstract state": lambda: nnx.state(abstract_net()),
    "concrete state": lambda: nnx.state(make_net()),
    "train state module": lambda: nnx.eval_shape(TrainState),
    "train state's state": lambda: nnx.state(nnx.eval_shape(TrainState)),
    "tuple": lambda: train_target(optax.adamw(1e-2)),
    "list": lambda: list(train_target(optax.adamw(1e-2))),
    "dict": lambda: dict(zip(("model", "optimizer"), train_target(optax.adamw(1e-2)), strict=True)),
    "tuple of states": lambda: tuple(map(nnx.state, train_target(optax.adamw(1e-2)))),
    "pure dict": lambda: nnx.to_pure_dict(nnx.state(abstract_net(), nnx.Not(nnx.RngState))),
    "pure dict of a train state": lambda: nnx.to_pure_dict(nnx.state(nnx.eval_shape(TrainState))),
    "only the parameters": lambda: nnx.state(abstract_net(), nnx.Param),
}


def _model_params(result: Any) -> Any:
    """Returns kernel of `up` wherever the result holds it."""
    leaves = jax.tree_util.tree_flatten_with_path(result)[0]
    named = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    return next(
        leaf
        for name, leaf in named.items()
        if "'up'" in name and "kernel" in name and "opt_state" not in name
    )


def _result_state(result: Any) -> Any:
    if isinstance(result, nnx.Module):
        return nnx.state(result)
    if isinstance(result, tuple | list):
        return [_result_state(part) for part in result]
    if isinstance(result, dict):
        return {key: _result_state(part) for key, part in result.items()}
    return result


@pytest.mark.parametrize("name", TARGETS)
def test_the_result_has_the_targets_type_and_the_stored_values(name: str, item) -> None:
    target = TARGETS[name]()

    result = restore(item, target, unexpected="ignore")

    assert type(result) is type(target)
    state = _result_state(result)
    assert jax.tree.structure(state) == jax.tree.structure(_result_state(target))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    np.testing.assert_array_equal(_model_params(state), linen_state().params["up"]["kernel"])


@pytest.mark.parametrize("name", ["abstract module", "concrete module"])
def test_the_restored_model_gives_the_linen_programs_logits(name: str, item) -> None:
    model = restore(item, TARGETS[name]())

    np.testing.assert_allclose(logits(model, X), linen_logits(linen_state(), X), rtol=1e-6, atol=1e-6)


def test_a_shared_parameter_stays_shared(tmp_path) -> None:
    class Tied(nnx.Module):
        def __init__(self) -> None:
            self.embed = nnx.Embed(4, 3, rngs=nnx.Rngs(0))
            self.out = self.embed

    item = save_stock(tmp_path / "item", {"params": {"embed": {"embedding": jnp.arange(12.0).reshape(4, 3)}}})

    model = restore(item, nnx.eval_shape(Tied))

    assert model.out is model.embed


def test_a_concrete_target_is_never_modified(item) -> None:
    target = make_net()
    kernel = target.up.kernel
    before = np.array(kernel.get_value())

    restored = restore(item, target)

    assert target.up.kernel is kernel
    np.testing.assert_array_equal(kernel.get_value(), before)
    assert restored.up.kernel is not kernel


def test_a_target_leaf_without_shape_is_refused_by_its_path(item) -> None:
    with pytest.raises(RestoreError, match="a/b is a str"):
        restore(item, {"a": {"b": "text"}})


def _annotated(*, axes: tuple[AxisType, ...] | None = None) -> Any:
    del axes

    def make() -> nnx.Module:
        return nnx.Linear(FEATURES, 16, rngs=nnx.Rngs(0), kernel_metadata={"out_sharding": (None, "x")})

    return make


@pytest.mark.parametrize("axis", [AxisType.Auto, AxisType.Explicit])
def test_out_sharding_metadata_and_the_mesh_in_force_place_a_leaf(axis: AxisType, tmp_path) -> None:
    kernel = np.arange(FEATURES * 16.0, dtype=np.float32).reshape(FEATURES, 16)
    item = save_stock(tmp_path / "item", {"params": {"kernel": kernel, "bias": np.ones(16, np.float32)}})
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis,))

    with jax.set_mesh(mesh):
        model = restore(item, nnx.eval_shape(_annotated()))

    value = model.kernel.get_value()
    assert value.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(None, "x")), 2)
    np.testing.assert_array_equal(value, kernel)


def test_an_abstract_mesh_without_a_mesh_in_force_is_an_error_that_says_so(tmp_path) -> None:
    item = save_stock(tmp_path / "item", {"params": {"kernel": np.ones((FEATURES, 16)), "bias": np.ones(16)}})
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        target = nnx.eval_shape(_annotated())

    with pytest.raises(RestoreError, match="set_mesh"):
        restore(item, target)


def test_restore_args_win_over_the_targets_sharding_and_dtype(item, mesh: Mesh) -> None:
    own = NamedSharding(mesh, PartitionSpec())
    other = NamedSharding(mesh, PartitionSpec("fsdp"))
    target = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own),
        nnx.state(abstract_net(), nnx.Param),
    )
    args = jax.tree.map(lambda _: ocp.ArrayRestoreArgs(sharding=own), target)
    args["up"]["kernel"] = args["up"]["kernel"].replace(
        ocp.ArrayRestoreArgs(sharding=other, dtype=jnp.bfloat16)
    )

    state = restore(item, target, args, unexpected="ignore")

    kernel, bias = state["up"]["kernel"].get_value(), state["up"]["bias"].get_value()
    assert kernel.sharding.is_equivalent_to(other, 2)
    assert kernel.dtype == jnp.bfloat16
    assert bias.sharding.is_equivalent_to(own, 1)
    assert bias.dtype == jnp.float32


def test_restore_args_that_do_not_mirror_the_target_are_refused(item) -> None:
    with pytest.raises(RestoreError, match="up/kernl"):
        restore(item, abstract_net(), {"up": {"kernl": ocp.ArrayRestoreArgs()}})


def test_a_target_without_any_sharding_goes_to_the_first_device(item) -> None:
    model = restore(item, abstract_net())

    assert model.up.kernel.get_value().sharding == SingleDeviceSharding(jax.devices()[0])


def test_leaves_without_sharding_join_the_mesh_of_the_others(item, mesh: Mesh) -> None:
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    target = nnx.state(abstract_net())
    kernel = target["up"]["kernel"]
    target["up"]["kernel"] = kernel.replace(
        jax.ShapeDtypeStruct(kernel.shape, kernel.dtype, sharding=sharding)
    )

    state = restore(item, target)

    for leaf in jax.tree.leaves(state):
        assert leaf.sharding.device_set == set(mesh.devices.flat)


def _pair(tmp_path, stored: Any, wanted: Any) -> tuple[Any, nnx.State]:
    item = save_stock(tmp_path / "item", {"params": {"w": np.asarray([1, 2, 3], stored)}})
    return item, nnx.State({"w": nnx.Param(jax.ShapeDtypeStruct((3,), wanted))})


@pytest.mark.parametrize(
    ("stored", "wanted", "kind"),
    [
        ("float32", "float32", "same"),
        (jnp.bfloat16, "float32", "wider"),
        ("float16", "float32", "wider"),
        ("float32", jnp.bfloat16, "narrower"),
        (jnp.bfloat16, "float16", "narrower"),
        ("int32", "int32", "same"),
    ],
)
def test_floats_are_cast_to_the_target_and_a_narrower_one_is_listed(
    tmp_path, stored, wanted, kind: str
) -> None:
    item, target = _pair(tmp_path, stored, wanted)
    handler = NNXLinenHandler()

    state = handler.restore(item, args=NNXLinenRestore(target))

    value = state["w"].get_value()
    assert value.dtype == wanted
    np.testing.assert_array_equal(np.asarray(value, np.float32), [1, 2, 3])
    assert handler.report is not None
    assert handler.report.restored[("w",)].cast == kind
    assert set(handler.report.narrowed) == ({("w",)} if kind == "narrower" else set())


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        ("int32", "float32"),
        ("float32", "int32"),
        ("bool", "float32"),
        ("float32", "bool"),
        ("int32", "uint32"),
        ("int8", "int32"),
        ("bool", "int32"),
        ("complex64", "float32"),
    ],
)
@pytest.mark.parametrize("dtype", ["target", "stored"])
def test_kinds_never_turn_into_each_other(tmp_path, stored: str, wanted: str, dtype: Any) -> None:
    item, target = _pair(tmp_path, stored, wanted)

    with pytest.raises(DtypeMismatchError) as caught:
        restore(item, target, dtype=dtype)

    assert caught.value.paths == (("w",),)
    assert stored in str(caught.value)
    assert wanted in str(caught.value)


def test_dtype_stored_keeps_the_disks(tmp_path) -> None:
    item, target = _pair(tmp_path, jnp.bfloat16, "float32")

    state = restore(item, target, dtype="stored")

    assert state["w"].get_value().dtype == jnp.bfloat16


@pytest.mark.parametrize("stored", [np.int32(7), np.int64(7), 7, np.uint32(7)])
def test_a_step_fits_any_integer_width(tmp_path, stored: Any) -> None:
    state = linen_state(optax.sgd(0.1))
    tree = {"params": state.params, "opt_state": {}, "step": stored}
    item = tmp_path / "item"
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(item, tree)
    optimizer = nnx.eval_shape(lambda: nnx.Optimizer(make_net(), optax.sgd(0.1), wrt=nnx.Param))

    restored = restore(item, optimizer, unexpected="ignore")

    assert restored.step.get_value() == 7
    assert restored.step.get_value().dtype == jnp.uint32


@pytest.mark.parametrize("stored", [np.int64(2**40), np.int32(-1)])
def test_a_step_that_does_not_fit_is_an_error_with_its_value(tmp_path, stored: Any) -> None:
    item = tmp_path / "item"
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(item, {"params": {"w": np.ones(2)}, "step": stored})
    optimizer = nnx.eval_shape(lambda: nnx.Optimizer(make_net(), optax.sgd(0.1), wrt=nnx.Param))

    with pytest.raises(DtypeMismatchError, match=str(stored)) as caught:
        restore(item, optimizer, unexpected="ignore")

    assert caught.value.paths == (("step",),)


def test_a_plan_says_where_every_leaf_comes_from(item) -> None:
    plan = plan_restore(item, train_target(optax.adamw(1e-2)))

    assert plan.fits
    assert set(plan.restored) | set(plan.defaulted) == set(_paths(train_target(optax.adamw(1e-2))))
    assert plan.to_dict()["fits"] is True
    assert "RestorePlan" in str(plan)
    assert isinstance(restore(item, abstract_net()), Net)


def _paths(target: tuple[Any, Any]) -> list[tuple[Any, ...]]:
    return [(at, *path) for at, part in enumerate(target) for path, _ in nnx.to_flat_state(nnx.state(part))]


@pytest.mark.parametrize("form", [nnx.state, lambda tree: nnx.to_pure_dict(nnx.state(tree))])
def test_each_of_two_train_states_gets_its_own_step(tmp_path, form):
    def build():
        def part(width):
            model = nnx.Linear(2, width, rngs=nnx.Rngs(0))
            return {"model": model, "optimizer": nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)}

        return {"generator": part(4), "discriminator": part(3)}

    steps = {"generator": 3, "discriminator": 15}
    trained = build()
    for name, count in steps.items():
        trained[name]["optimizer"].step.set_value(jnp.uint32(count))
    ocp.PyTreeCheckpointer().save(tmp_path / "item", form(trained))

    found = restore(tmp_path / "item", nnx.eval_shape(build))

    assert {name: int(found[name]["optimizer"].step.get_value()) for name in steps} == steps
