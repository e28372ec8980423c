"""What the handler writes, and that a Linen program reads it with stock Orbax, structure check on."""

import functools
import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from orbax_nnx_handler import (
    NNXLinenHandler,
    NNXLinenRestore,
    NNXLinenSave,
    NotACheckpointError,
    restore,
    save,
    to_linen,
)
from orbax_nnx_handler.storage.saving import atomic, linen_save, plan_save
from orbax_nnx_handler.storage.stores.kvstore import files_at
from orbax_nnx_handler.storage.stores.locations import is_url
from tests.cases import load_case
from tests.storage.stores.fake_store import files_of

FEATURES = 4


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(3, name="up")(x)
        return nn.Dense(2, name="layers_0")(x)


class NNXEncoder(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(FEATURES, 3, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(3, 2, rngs=rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.layers[0](self.up(x))


def is_matrix(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, tree)


def by_rank(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: "matrix" if leaf.ndim > 1 else "vector", tree)


ADAMW = optax.adamw(1e-2)
OPTIMIZERS: dict[str, optax.GradientTransformation] = {
    "adam": optax.adam(1e-2),
    "adamw": ADAMW,
    "adamw with a schedule": optax.adamw(optax.constant_schedule(1e-2)),
    "adamw with masked decay": optax.adamw(1e-2, mask=is_matrix),
    "sgd": optax.sgd(1e-2),
    "sgd with momentum": optax.sgd(1e-2, momentum=0.9),
    "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=2),
    "lion": optax.lion(1e-2),
    "clip then adamw": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)),
    "adamw then clip": optax.chain(optax.adamw(1e-2), optax.clip(1.0)),
    "MultiSteps": optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
    "inject_hyperparams": optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2),
    "masked": optax.masked(optax.adam(1e-2), is_matrix),
    "multi_transform": optax.multi_transform(
        {"matrix": optax.adam(1e-2), "vector": optax.sgd(1e-2)}, by_rank
    ),
    "unchained": optax.scale_by_adam(),
    "ema of weights": optax.chain(optax.ema(0.9), optax.scale(-1e-2)),
    "apply_if_finite": optax.apply_if_finite(optax.adam(1e-2), 3),
    "lookahead-free nesting": optax.chain(optax.chain(optax.chain(optax.trace(0.9)))),
}


@functools.cache
def trained(tx: optax.GradientTransformation) -> tuple[NNXEncoder, nnx.Optimizer]:
    model = NNXEncoder(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    x = jnp.arange(2 * FEATURES, dtype=jnp.float32).reshape(2, FEATURES)

    @nnx.jit
    def step(model: NNXEncoder, optimizer: nnx.Optimizer) -> None:
        optimizer.update(model, nnx.grad(lambda model: jnp.mean(model(x) ** 2))(model))

    step(model, optimizer)
    return model, optimizer


def linen_state(tx: optax.GradientTransformation) -> TrainState:
    encoder = Encoder()
    params = encoder.init(jax.random.key(0), jnp.ones((1, FEATURES)))["params"]
    return TrainState.create(apply_fn=encoder.apply, params=params, tx=tx).replace(step=jnp.int32(0))


def write(path: Path, item: Any, **options: Any) -> Path:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(path, args=linen_save(ocp.args.PyTreeSave(item), **options))
    return path


def described(path: Path) -> dict[tuple[tuple[str, int], ...], tuple[str, Any]]:
    """Returns Orbax's own record of a tree: each path with its kinds of keys, value type and shape."""
    content = json.loads((path / "_METADATA").read_text())
    return {
        tuple((key["key"], key["key_type"]) for key in entry["key_metadata"]): (
            entry["value_metadata"]["value_type"],
            entry["value_metadata"].get("write_shape"),
        )
        for entry in content["tree_metadata"].values()
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_linen_program_restores_any_optimizer_with_the_structure_check_on(
    name: str, tmp_path: Path
) -> None:
    tx = OPTIMIZERS[name]
    item = trained(tx)
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, linen_state(tx))

    write(tmp_path / "item", item)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "item", abstract)

    assert jax.tree.structure(restored) == jax.tree.structure(abstract)
    np.testing.assert_array_equal(restored.params["layers_0"]["kernel"], item[0].layers[0].kernel[...])
    assert (restored.step.dtype, int(restored.step)) == (jnp.int32, 1)
    # Leaves come sorted by name, and `layers` < `up` in NNX as `layers_0` < `up` in Linen.
    ours, theirs = jax.tree.leaves(item[1].opt_state), jax.tree.leaves(restored.opt_state)
    for leaf, other in zip(ours, theirs, strict=True):
        assert leaf.dtype == other.dtype
        np.testing.assert_array_equal(leaf, other)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_stored_tree_is_the_one_that_stock_orbax_writes_for_linen(name: str, tmp_path: Path) -> None:
    tx = OPTIMIZERS[name]
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "linen", linen_state(tx))

    write(tmp_path / "nnx", trained(tx))

    assert described(tmp_path / "nnx") == described(tmp_path / "linen")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_bare_state_with_its_transformation_is_written_as_the_module_is(name: str, tmp_path: Path) -> None:
    tx = OPTIMIZERS[name]
    item = trained(tx)
    write(tmp_path / "module", item)

    write(tmp_path / "state", nnx.state(item), tx=tx)

    assert described(tmp_path / "state") == described(tmp_path / "module")


class Regular(nnx.Module):
    """A model with everything that Linen keeps apart: weights, statistics, random streams, a cache."""

    def __init__(self, rngs: nnx.Rngs):
        self.dense = nnx.Linear(FEATURES, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.seen = nnx.Intermediate(jnp.ones(2))


class BatchNormTrainState(TrainState):
    batch_stats: Any


class LinenRegular(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(3, name="dense")(x)
        x = nn.BatchNorm(use_running_average=True, name="norm")(x)
        return nn.Dropout(0.5, name="drop")(x, deterministic=True)


def regular() -> tuple[Regular, nnx.Optimizer]:
    model = Regular(nnx.Rngs(0, dropout=jax.random.key(7, impl="rbg")))
    return model, nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)


def random_state(item: Any) -> list[Any]:
    leaves = jax.tree.leaves(nnx.split_state(nnx.state(item), nnx.RngState, ...)[0])
    return [
        np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
        for x in leaves
    ]


def test_random_streams_do_not_fail_a_linen_programs_structure_check(tmp_path: Path) -> None:
    variables = LinenRegular().init(jax.random.key(0), jnp.ones((1, FEATURES)))
    linen = BatchNormTrainState.create(
        apply_fn=None, params=variables["params"], batch_stats=variables["batch_stats"], tx=optax.adam(1e-2)
    )
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, linen)
    model, optimizer = regular()

    save(tmp_path / "item", (model, optimizer))
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "item", abstract)

    np.testing.assert_array_equal(restored.batch_stats["norm"]["var"], model.norm.var[...])
    np.testing.assert_array_equal(restored.params["dense"]["kernel"], model.dense.kernel[...])


@pytest.mark.parametrize("layout", ["linen", "maxtext"])
def test_restoring_what_was_saved_is_the_identity_random_state_included(layout: Any, tmp_path: Path) -> None:
    item = regular()
    item[0].drop.rngs()

    save(tmp_path / "item", item, layout=layout)
    restored = restore(tmp_path / "item", nnx.eval_shape(regular))

    assert jax.tree.structure(nnx.state(restored)) == jax.tree.structure(nnx.state(item))
    for ours, theirs in zip(random_state(restored), random_state(item), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert jax.random.key_impl(restored[0].drop.rngs.key[...]) == jax.random.key_impl(
        item[0].drop.rngs.key[...]
    )
    weights = nnx.Any(nnx.Param, nnx.BatchStat, nnx.OptState)
    for ours, theirs in zip(
        jax.tree.leaves(nnx.state(restored, weights)), jax.tree.leaves(nnx.state(item, weights)), strict=True
    ):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def test_random_state_comes_back_where_type_handlers_of_the_callers_own_read(tmp_path: Path) -> None:
    item = regular()
    read: list[str] = []

    class Noting(ocp.type_handlers.ArrayHandler):
        async def deserialize(self, infos: Any, args: Any = None) -> Any:
            read.extend(info.name for info in infos)
            return await super().deserialize(infos, args)

    own = ocp.type_handlers.create_type_handler_registry((jax.Array, Noting()))
    save(tmp_path / "item", item)

    with ocp.Checkpointer(NNXLinenHandler(type_handler_registry=own)) as checkpointer:
        restored = checkpointer.restore(tmp_path / "item", args=NNXLinenRestore(nnx.eval_shape(regular)))

    for ours, theirs in zip(random_state(restored), random_state(item), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(restored[0].dense.kernel[...], item[0].dense.kernel[...])
    assert "params.dense.kernel" in read


def test_a_copy_of_the_weights_beside_the_model_comes_back_to_its_place(tmp_path: Path) -> None:
    def build(seed: int) -> dict[str, Any]:
        model, copy = NNXEncoder(nnx.Rngs(seed)), NNXEncoder(nnx.Rngs(seed + 1))
        return {
            "model": model,
            "average": copy,
            "optimizer": nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param),
        }

    item = build(0)
    save(tmp_path / "item", item)

    restored = restore(tmp_path / "item", nnx.eval_shape(lambda: build(5)))

    for part in ("model", "average"):
        np.testing.assert_array_equal(restored[part].up.kernel[...], item[part].up.kernel[...])


def test_a_programs_own_custom_metadata_is_kept(tmp_path: Path) -> None:
    handler = NNXLinenHandler()
    with ocp.Checkpointer(handler) as checkpointer:
        arguments = NNXLinenSave(regular(), custom_metadata={"run": "a"})
        checkpointer.save(tmp_path / "item", args=arguments)

    metadata = ocp.PyTreeCheckpointHandler().metadata(tmp_path / "item").custom_metadata

    assert metadata["run"] == "a"
    assert {"/".join(entry["path"]) for entry in metadata["nnx_aux"]} == {
        "model/drop/rngs/count",
        "model/drop/rngs/key",
    }


def test_custom_metadata_that_has_no_room_for_random_state_is_refused() -> None:
    for metadata in ([1], {"nnx_aux": 1}):
        with pytest.raises(ValueError, match="random state is stored there"):
            linen_save(ocp.args.PyTreeSave(regular(), custom_metadata=metadata))


@pytest.mark.parametrize("step", [jnp.uint32(7), np.uint32(7), np.array(7, np.uint32)])
def test_the_step_is_stored_as_linen_counts_it(step: Any, tmp_path: Path) -> None:
    arguments = linen_save(
        ocp.args.PyTreeSave({"opt_state": nnx.OptState(jnp.ones(2)), "step": nnx.OptState(step)})
    )

    assert arguments.item["step"].dtype == np.int32
    assert int(arguments.item["step"]) == 7


def test_a_step_of_another_kind_is_left_alone() -> None:
    for step in (3, jnp.int32(3), jax.ShapeDtypeStruct((), jnp.int64)):
        item = {"opt_state": nnx.OptState(jnp.ones(2)), "step": nnx.OptState(step)}
        assert plan_save(item).tree()["step"] is step
    item = {
        "opt_state": nnx.OptState(jnp.ones(2)),
        "step": nnx.OptState(jax.ShapeDtypeStruct((), jnp.uint32)),
    }
    assert plan_save(item).tree()["step"] == jax.ShapeDtypeStruct((), jnp.int32)


def test_a_step_beyond_int32_is_refused_and_what_the_hint_says_works(tmp_path: Path) -> None:
    model, optimizer = trained(ADAMW)
    optimizer = nnx.Optimizer(model, ADAMW, wrt=nnx.Param)
    optimizer.step.set_value(jnp.uint32(3_000_000_000))

    with pytest.raises(
        ValueError, match=r"step 3000000000 cannot be saved: .* int32, up to 2147483647"
    ) as caught:
        save(tmp_path / "item", (model, optimizer))
    hint = str(caught.value).split("hint: count from a smaller number: ")[1].rstrip(".")
    eval(hint, {"optimizer": optimizer, "jnp": jnp})
    save(tmp_path / "item", (model, optimizer))

    with ocp.PyTreeCheckpointer() as checkpointer:
        assert int(checkpointer.restore(tmp_path / "item")["step"]) == 0


def test_items_without_nnx_state_are_saved_exactly_as_the_parent_saves_them(tmp_path: Path) -> None:
    item = {"params": {"w": jnp.ones(2)}, "opt_state": (optax.EmptyState(), [1, None]), "step": np.uint32(3)}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "stock", args=ocp.args.PyTreeSave(item))

    with ocp.Checkpointer(NNXLinenHandler()) as checkpointer:
        checkpointer.save(tmp_path / "ours", args=NNXLinenSave(item))

    assert described(tmp_path / "ours") == described(tmp_path / "stock")


def test_save_args_reach_the_leaves_that_they_mirror(tmp_path: Path) -> None:
    item = nnx.state(trained(ADAMW))
    save_args = jax.tree.map(
        lambda leaf: ocp.SaveArgs(dtype=np.dtype(jnp.bfloat16) if leaf.ndim == 2 else None), item
    )

    with ocp.Checkpointer(NNXLinenHandler()) as checkpointer:
        checkpointer.save(tmp_path / "item", args=NNXLinenSave(item, save_args, tx=ADAMW))
    with ocp.PyTreeCheckpointer() as checkpointer:
        stored = checkpointer.restore(tmp_path / "item")

    assert stored["params"]["up"]["kernel"].dtype == jnp.bfloat16
    assert stored["opt_state"][0]["mu"]["up"]["kernel"].dtype == jnp.bfloat16
    assert stored["params"]["up"]["bias"].dtype == jnp.float32


def test_sharded_arrays_are_handed_to_orbax_as_they_are(mesh: Mesh, tmp_path: Path) -> None:
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    state = nnx.from_flat_state(
        [(("dense", "kernel"), nnx.Param(jax.device_put(jnp.arange(16.0), sharding)))]
    )
    streams = jax.device_put(jax.random.split(jax.random.key(0), 8), sharding)
    state = nnx.merge_state(
        state, nnx.from_flat_state([(("drop", "rngs", "key"), nnx.RngKey(streams, tag="x"))])
    )

    arguments = linen_save(ocp.args.PyTreeSave(state))
    save(tmp_path / "item", state)
    restored = restore(tmp_path / "item", state)

    assert arguments.item["params"]["dense"]["kernel"] is state["dense"]["kernel"].get_raw_value()
    assert restored["dense"]["kernel"].get_value().sharding == sharding
    np.testing.assert_array_equal(
        jax.random.key_data(restored["drop"]["rngs"]["key"].get_value()), jax.random.key_data(streams)
    )


def test_a_bare_state_without_its_transformation_says_what_it_does_not_know(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    linen_save(ocp.args.PyTreeSave(trained(ADAMW)))
    linen_save(ocp.args.PyTreeSave(nnx.state(trained(ADAMW)), None), "maxtext")
    silent = caplog.text

    save(tmp_path / "item", nnx.state(trained(ADAMW)))

    assert "empty states" not in silent
    assert "pass tx=" in caplog.text
    assert len(jax.tree.leaves(described(tmp_path / "item"))) > 0


@pytest.mark.parametrize(
    "name",
    [
        "llama2_scanned_to_scanned",
        "llama2_unscanned_to_unscanned",
        "gemma3_scanned_to_scanned",
        "gemma3_unscanned_to_unscanned",
    ],
)
def test_maxtext_layout_has_the_paths_shapes_and_dtypes_of_maxtexts_own_file(
    name: str, tmp_path: Path
) -> None:
    case = load_case(name)
    state = jax.tree.map(zeros, case.target)

    save(tmp_path / "item", state, layout="maxtext")

    ours, theirs = described(tmp_path / "item"), described(case.path)
    leftovers = {path for path in ours if path[0][0] == "nnx_aux"}
    assert {path: entry for path, entry in ours.items() if path not in leftovers} == theirs
    assert {path[1][0] for path in leftovers} == {"model"}
    assert {path[-1][0] for path in leftovers} == {"key", "count"}
    own = dtypes(case.path)
    assert {path: dtype for path, dtype in dtypes(tmp_path / "item").items() if path in own} == own


def zeros(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(jnp.zeros((*leaf.shape, 2), jnp.uint32), impl="threefry2x32")
    return jnp.zeros(leaf.shape, leaf.dtype)


def dtypes(path: Path) -> dict[str, Any]:
    tree = ocp.PyTreeCheckpointHandler().metadata(path).tree
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(key): (leaf.shape, leaf.dtype) for key, leaf in flat}


@pytest.mark.parametrize("layout", ["max_text", "MaxText", "train_state", ""])
def test_a_layout_that_nothing_is_saved_in_is_refused_before_anything_is_written(tmp_path, layout):
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))

    with pytest.raises(ValueError, match="layout is one of 'linen', 'maxtext', not "):
        save(tmp_path / "item", state, layout=layout)
    with pytest.raises(ValueError, match="layout is one of 'linen', 'maxtext', not "):
        to_linen(state, layout=layout)
    assert not (tmp_path / "item").exists()


@pytest.mark.parametrize(
    ("nothing", "said"),
    [(None, "a NoneType"), ({}, "a dict"), (nnx.State({}), "a State"), (nnx.Linear, "the class Linear")],
)
def test_nothing_to_save_is_said_before_anything_is_written(tmp_path, nothing, said):
    with pytest.raises(ValueError, match=f"there is nothing to save: {said} holds no array.\nhint: pass the"):
        save(tmp_path / "item", nothing)

    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_taken_is_said_with_the_way_out_in_a_bucket_as_on_a_disk(tmp_path, monkeypatch):
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    save(tmp_path / "item", state)
    monkeypatch.setattr(
        atomic, "files_at", lambda path: files_of(tmp_path)[0] if is_url(path) else files_at(path)
    )

    for place in (tmp_path / "item", "gs://bucket/item"):
        with pytest.raises(ValueError, match=r"already exists\.\nhint: pass force=True to replace it\."):
            save(place, state)

    # What force=True would not replace either is not said to be replaced by it.
    (tmp_path / "7").mkdir()
    (tmp_path / "item").rename(tmp_path / "7" / "default")
    for place in (tmp_path / "7", "gs://bucket/7"):
        with pytest.raises(
            NotACheckpointError, match=r"is a step, not an item; .*\nhint: pass the path of an item"
        ):
            save(place, state)


@pytest.mark.parametrize("options", [{}, {"force": True}])
def test_what_a_store_refuses_where_a_save_looks_first_is_one_error(tmp_path, monkeypatch, options):
    monkeypatch.setattr(atomic, "files_at", lambda _: files_of(tmp_path, forbidden=("item",))[0])

    with pytest.raises(NotACheckpointError, match="gs://bucket/item cannot be read: 403"):
        save("gs://bucket/item", nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0))), **options)


def test_complex_weights_and_numbers_of_every_kind_come_back_as_they_were(tmp_path):
    class Rotations(nnx.Module):
        def __init__(self):
            self.turn = nnx.Param(jnp.array([1j, 2 - 1j, 0.5], jnp.complex64))
            self.phase = nnx.BatchStat(jnp.array(3j, jnp.complex64))

    beside = {"z": 1j, "set": np.bool_(True), "rate": ml_dtypes.bfloat16(0.5)}
    save(tmp_path / "item", {"model": Rotations(), **beside})
    found = restore(tmp_path / "item", {"model": nnx.eval_shape(Rotations), **beside, "z": 0j})
    (stored,) = ocp.PyTreeCheckpointer().restore(tmp_path / "item")["params"].values()

    assert found["model"].turn.get_value().tolist() == [1j, 2 - 1j, 0.5]
    assert found["model"].phase.get_value() == 3j
    assert (found["z"], found["set"], found["rate"]) == (1j, True, 0.5)
    assert stored.tolist() == [1j, 2 - 1j, 0.5]
