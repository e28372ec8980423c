"""Every kind of target, every source of sharding, every rule about dtypes."""

import collections
from typing import Any, cast

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx, struct
from flax.training import train_state
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from orbax_nnx_handler import (
    DtypeMismatchError,
    NNXLinenHandler,
    NNXLinenRestore,
    RestoreError,
    ShardingMismatchError,
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


@pytest.mark.parametrize("abstract", [True, False])
@pytest.mark.parametrize("boxed", [True, False])
def test_a_linen_train_state_comes_back_as_it_was_written(tmp_path, abstract: bool, boxed: bool) -> None:
    model = nn.Dense(
        4,
        kernel_init=nn.with_partitioning(nn.initializers.ones, ("x", None))
        if boxed
        else nn.initializers.ones,
    )
    params = model.init(jax.random.key(0), X)["params"]
    state = train_state.TrainState.create(apply_fn=model.apply, params=params, tx=optax.adamw(1e-2))
    state = state.apply_gradients(grads=jax.tree.map(jnp.ones_like, params))
    item = save_stock(tmp_path / "item", state)
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state) if abstract else state

    again = restore(item, target)

    assert jax.tree.structure(again) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, again, state)


@struct.dataclass
class Both:
    """A program's own container: what JAX knows as a pytree is a target."""

    model: Any
    optimizer: Any
    name: str = struct.field(pytree_node=False, default="both")


@pytest.mark.parametrize("part", [lambda part: part, nnx.state], ids=["modules", "states"])
def test_a_programs_own_container_comes_back_with_its_parts_filled(item, part: Any) -> None:
    target = Both(*map(part, train_target(optax.adamw(1e-2))))

    both = restore(item, target)

    assert (type(both), both.name) == (Both, "both")
    assert type(both.model) is type(target.model)
    np.testing.assert_array_equal(
        both.model["up"]["kernel"] if part is nnx.state else both.model.up.kernel,
        linen_state().params["up"]["kernel"],
    )


@pytest.mark.parametrize("kind", [flax.core.freeze, collections.OrderedDict])
def test_a_mapping_comes_back_as_the_mapping_it_was(item, kind: Any) -> None:
    target = kind({"step": jax.ShapeDtypeStruct((), jnp.int32), "params": {}})

    result = restore(item, target)

    assert type(result) is type(target)
    assert int(result["step"]) == 7


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


_SHARDED = PartitionSpec("fsdp")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (_SHARDED, repr(_SHARDED)),
        ("fsdp", "'fsdp'"),
        (ocp.ArrayRestoreArgs(sharding=cast(Any, _SHARDED)), f"sharding={_SHARDED!r}"),
        (ocp.ArrayRestoreArgs(mesh_axes=_SHARDED), f"mesh_axes={_SHARDED!r} without a mesh"),
        (ocp.RestoreArgs(dtype=cast(Any, "bf16")), "dtype='bf16'"),
        (ocp.ArrayRestoreArgs(global_shape=(3,)), "shape (3,) for (2,)"),
        (jax.ShapeDtypeStruct((3,), jnp.float32), "shape (3,) for (2,)"),
    ],
)
def test_restore_args_that_nobody_would_keep_to_are_refused(tmp_path, asked: Any, said: str) -> None:
    item = save_stock(tmp_path / "item", {"params": {"w": np.zeros(2, np.float32)}})

    with pytest.raises(RestoreError) as error:
        plan_restore(item, {"w": jax.ShapeDtypeStruct((2,), jnp.float32)}, {"w": asked})

    assert str(error.value) == (
        f"restore_args asks of 1 leaf what is unknown:\n  w   {said}\n"
        "hint: a leaf's sharding is a jax.sharding.Sharding, such as NamedSharding(mesh, PartitionSpec()): "
        "pass that, ocp.ArrayRestoreArgs(sharding=..., dtype=...) or jax.ShapeDtypeStruct, with the "
        "target's shape or none."
    )


def test_a_sharding_alone_is_a_leafs_restore_args(tmp_path, mesh: Mesh) -> None:
    item = save_stock(tmp_path / "item", {"params": {"w": np.zeros(8, np.float32)}})
    sharding = NamedSharding(mesh, _SHARDED)

    restored = restore(item, {"w": jax.ShapeDtypeStruct((8,), jnp.float32)}, {"w": sharding})

    assert restored["w"].sharding == sharding


@pytest.mark.parametrize(
    ("asked", "spec"),
    [
        ("target", PartitionSpec("fsdp")),
        ("restore_args", PartitionSpec("fsdp")),
        ("restore_args", PartitionSpec(None, "fsdp")),
    ],
)
def test_a_sharding_that_does_not_divide_a_leaf_is_an_error_before_any_read(
    tmp_path, mesh: Mesh, asked: str, spec: PartitionSpec
) -> None:
    item = save_stock(
        tmp_path / "item", {"params": {"w": np.zeros(6, np.float32), "v": np.zeros(8, np.float32)}}
    )
    sharding = NamedSharding(mesh, spec)
    own = sharding if asked == "target" else None
    target = {name: jax.ShapeDtypeStruct((size,), jnp.float32) for name, size in (("w", 6), ("v", 8))}
    target["w"] = jax.ShapeDtypeStruct((6,), jnp.float32, sharding=own)
    args = None if own else {"w": ocp.ArrayRestoreArgs(sharding=sharding)}

    plan = plan_restore(item, target, args)

    with pytest.raises(ShardingMismatchError) as error:
        plan.check()
    entries = ", ".join(map(repr, spec))
    assert str(error.value) == (
        "1 leaf cannot be divided over the devices as asked:\n"
        f"  w   (6,) float32   PartitionSpec({entries}) over {dict(mesh.shape)}\n"
        "hint: shard a dimension that the number of devices divides, or none: PartitionSpec().\n"
        f"checkpoint: {item} (layout: Linen variables, 2 stored leaves)"
    )
    assert error.value.paths == (("w",),)


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
        (jnp.float8_e4m3fn, "float32", "wider"),
        (jnp.float8_e5m2, jnp.bfloat16, "wider"),
        ("float32", jnp.float8_e4m3fn, "narrower"),
        (jnp.float8_e4m3fn, jnp.float8_e5m2, "narrower"),
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


def test_the_dtype_of_restore_args_wins_over_the_stored_one(tmp_path) -> None:
    item, target = _pair(tmp_path, "float32", "float32")
    args = {"w": ocp.ArrayRestoreArgs(dtype=jnp.bfloat16)}

    state = restore(item, target, args, dtype="stored")

    assert state["w"].dtype == jnp.bfloat16


def test_64_bits_that_jax_cannot_hold_are_an_error_where_the_stored_dtype_is_asked_for(tmp_path) -> None:
    item, target = _pair(tmp_path, np.float64, "float32")

    with pytest.raises(DtypeMismatchError) as error:
        restore(item, target, dtype="stored")

    assert str(error.value) == (
        "1 leaf has another kind of dtype in the checkpoint:\n"
        "  w   stored (3,) float64   wanted (3,) float32   "
        'JAX holds no 64 bits: set jax_enable_x64, or pass dtype="target"\n'
        "      <- params/w\n"
        f"checkpoint: {item} (layout: Linen variables, 1 stored leaf)"
    )


def test_a_target_of_64_bits_is_what_jax_makes_of_it_and_the_plan_says_so(tmp_path) -> None:
    item, target = _pair(tmp_path, np.float64, np.float64)

    plan = plan_restore(item, target)

    assert (plan.restored[("w",)].dtype, plan.restored[("w",)].cast) == (jnp.float32, "narrower")
    assert restore(item, target)["w"].dtype == jnp.float32


def test_a_stored_step_of_64_bits_is_checked_where_the_stored_dtype_is_asked_for(tmp_path) -> None:
    items = [save_stock(tmp_path / str(step), {"params": {}, "step": np.int64(step)}) for step in (7, 2**40)]
    target = {"step": jax.ShapeDtypeStruct((), jnp.int32)}

    step = restore(items[0], target, dtype="stored")["step"]

    assert (int(step), step.dtype) == (7, jnp.int32)
    with pytest.raises(DtypeMismatchError, match=str(2**40)):
        restore(items[1], target, dtype="stored")


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


@pytest.mark.parametrize("tx", [optax.adam(1e-3), optax.sgd(1e-3, momentum=0.9)], ids=["adam", "momentum"])
def test_moments_in_a_train_state_around_an_nnx_state_are_the_optimizers(tmp_path, tx) -> None:
    linen = linen_state(tx)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(
            tmp_path / "item", {"params": linen.params, "opt_state": linen.opt_state, "step": 7}
        )

    def make() -> train_state.TrainState:
        graph, params, _ = nnx.split(make_net(), nnx.Param, ...)
        return train_state.TrainState.create(apply_fn=graph.apply, params=params, tx=tx)

    state = restore(tmp_path / "item", nnx.eval_shape(make))

    moments = [leaf for leaf in jax.tree.leaves(linen.opt_state) if leaf.ndim]
    found = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sorted(map(_sum, found)) == pytest.approx(sorted(map(_sum, moments)))
    assert int(state.step) == 7


def _sum(leaf: Any) -> float:
    return float(np.sum(np.asarray(leaf)))


def test_a_module_that_is_called_opt_state_is_a_models(tmp_path) -> None:
    class Odd(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.opt_state = nnx.Linear(2, 3, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(
            tmp_path / "item", {"params": {"opt_state": {"kernel": np.ones((2, 3)), "bias": np.ones(3)}}}
        )

    model = restore(tmp_path / "item", nnx.eval_shape(lambda: Odd(nnx.Rngs(0))))

    np.testing.assert_array_equal(model.opt_state.kernel[...], np.ones((2, 3)))


def test_a_single_integer_that_does_not_fit_is_an_error_with_its_value(tmp_path) -> None:
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "item", {"batch_stats": {"seen": 2**40}})
    target = nnx.State({"seen": nnx.BatchStat(jax.ShapeDtypeStruct((), jnp.int32))})

    with pytest.raises(DtypeMismatchError, match=f"{2**40}, which int32 cannot hold"):
        restore(tmp_path / "item", target)
