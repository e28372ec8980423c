"""Every way an Orbax pipeline can hold the handler."""

import inspect
import logging
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from orbax_nnx_handler import (
    KeyMismatchError,
    MissingParamError,
    NNXLinenHandler,
    NNXLinenRestore,
    NNXLinenSave,
    NotACheckpointError,
    RestoreError,
    handler_registry,
    plan_restore,
    restore,
    save,
)
from tests.handler.programs import LinenNet, abstract_net, linen_state, make_net, save_stock, train_target

TX = optax.adamw(1e-2)


def _kernel(model: Any) -> Any:
    return np.asarray(model.up.kernel.get_value())


@pytest.fixture
def linen() -> Any:
    return linen_state(TX)


@pytest.fixture
def trained(linen, tmp_path_factory) -> Any:
    """Model and optimizer of the NNX program, with the Linen program's values."""
    return restore(save_stock(tmp_path_factory.mktemp("linen") / "item", linen), train_target(TX))


def _linen_manager(path: Any, linen: Any) -> None:
    """Writes step 3 as a Linen program with a stock manager does."""
    with ocp.CheckpointManager(path) as manager:
        manager.save(3, args=ocp.args.StandardSave(linen))


def test_a_manager_with_one_item_restores_and_saves(tmp_path, linen) -> None:
    _linen_manager(tmp_path, linen)

    with ocp.CheckpointManager(tmp_path, item_handlers=NNXLinenHandler(policy="error")) as manager:
        model, optimizer = manager.restore(3, args=NNXLinenRestore(train_target(TX)))
        manager.save(4, args=NNXLinenSave((model, optimizer)))
        manager.wait_until_finished()
        again, _ = manager.restore(4, args=NNXLinenRestore(train_target(TX)))

    np.testing.assert_array_equal(_kernel(model), linen.params["up"]["kernel"])
    np.testing.assert_array_equal(_kernel(again), linen.params["up"]["kernel"])


def test_a_restore_without_a_target_gives_the_stored_tree_as_stock_orbax_does(tmp_path, linen) -> None:
    _linen_manager(tmp_path, linen)
    with ocp.CheckpointManager(tmp_path, item_handlers=ocp.PyTreeCheckpointHandler()) as manager:
        stock = manager.restore(3)

    with ocp.CheckpointManager(tmp_path, item_handlers=NNXLinenHandler()) as manager:
        bare, explicit = manager.restore(3), manager.restore(3, args=NNXLinenRestore())

    for tree in (bare, explicit):
        assert jax.tree.structure(tree) == jax.tree.structure(stock)
        jax.tree.map(np.testing.assert_array_equal, tree, stock)


def test_several_items_each_have_their_own_handler(tmp_path, trained) -> None:
    handlers = {"items": NNXLinenHandler(), "iter": ocp.JsonCheckpointHandler()}

    with ocp.CheckpointManager(tmp_path, item_handlers=handlers) as manager:
        manager.save(
            1, args=ocp.args.Composite(items=NNXLinenSave(trained), iter=ocp.args.JsonSave({"position": 5}))
        )
        manager.wait_until_finished()
        found = manager.restore(
            1, args=ocp.args.Composite(items=NNXLinenRestore(train_target(TX)), iter=ocp.args.JsonRestore())
        )

    np.testing.assert_array_equal(_kernel(found["items"][0]), _kernel(trained[0]))
    assert found["iter"] == {"position": 5}


SAVES = {"PyTree": ocp.args.PyTreeSave, "Standard": ocp.args.StandardSave, "own": NNXLinenSave}
RESTORES = {"PyTree": ocp.args.PyTreeRestore, "Standard": ocp.args.StandardRestore, "own": NNXLinenRestore}


@pytest.mark.parametrize("kind", SAVES)
def test_a_pipeline_that_names_orbaxs_own_args_runs_unchanged(tmp_path, trained, kind: str) -> None:
    with ocp.CheckpointManager(tmp_path, handler_registry=handler_registry()) as manager:
        manager.save(1, args=SAVES[kind](nnx.state(trained[0])))
        manager.wait_until_finished()
        state = manager.restore(1, args=RESTORES[kind](nnx.state(abstract_net())))

    assert isinstance(state, nnx.State)
    np.testing.assert_array_equal(state["up"]["kernel"].get_value(), _kernel(trained[0]))


def test_a_manager_that_orbaxs_own_args_need_a_registry_for_says_so_when_it_is_made_and_when_it_refuses(
    tmp_path, linen, caplog
) -> None:
    _linen_manager(tmp_path, linen)
    way_out = "handler_registry=orbax_nnx_handler.handler_registry(handler)"

    with caplog.at_level(logging.INFO, logger="absl"):
        manager = ocp.CheckpointManager(tmp_path, item_handlers=NNXLinenHandler())

    assert any(way_out in record.getMessage() for record in caplog.records)
    with manager, pytest.raises(ValueError, match=re.escape(way_out)):
        manager.restore(3, args=ocp.args.PyTreeRestore())


def test_a_registry_serves_one_named_item_beside_others(tmp_path, trained) -> None:
    registry = handler_registry(NNXLinenHandler(), item="state")

    with ocp.CheckpointManager(tmp_path, handler_registry=registry) as manager:
        manager.save(1, args=ocp.args.Composite(state=ocp.args.StandardSave(nnx.state(trained[0]))))
        manager.wait_until_finished()
        found = manager.restore(
            1, args=ocp.args.Composite(state=ocp.args.StandardRestore(nnx.state(abstract_net())))
        )

    np.testing.assert_array_equal(found["state"]["up"]["kernel"].get_value(), _kernel(trained[0]))


def test_the_old_calling_form_still_works(tmp_path, trained) -> None:
    manager = ocp.CheckpointManager(tmp_path, ocp.AsyncCheckpointer(NNXLinenHandler()))

    manager.save(1, items=trained)
    manager.wait_until_finished()
    model, _ = manager.restore(1, items=train_target(TX))
    manager.close()

    np.testing.assert_array_equal(_kernel(model), _kernel(trained[0]))


def test_the_old_calling_form_works_with_item_handlers(tmp_path, trained) -> None:
    with ocp.CheckpointManager(tmp_path, item_handlers=NNXLinenHandler()) as manager:
        if "items" not in inspect.signature(manager.save).parameters:
            pytest.skip("this Orbax has no items=")
        manager.save(1, items=trained)
        manager.wait_until_finished()
        model, _ = manager.restore(1, items=train_target(TX))

    np.testing.assert_array_equal(_kernel(model), _kernel(trained[0]))


@pytest.mark.parametrize("make", [ocp.Checkpointer, ocp.AsyncCheckpointer])
def test_plain_checkpointers_take_both_calling_forms(tmp_path, trained, make: Any) -> None:
    with make(NNXLinenHandler()) as checkpointer:
        checkpointer.save(tmp_path / "new", args=NNXLinenSave(trained))
        checkpointer.save(tmp_path / "old", trained)
        if make is ocp.AsyncCheckpointer:
            checkpointer.wait_until_finished()
        models = [
            checkpointer.restore(tmp_path / "new", args=NNXLinenRestore(train_target(TX)))[0],
            checkpointer.restore(tmp_path / "old", train_target(TX))[0],
            checkpointer.restore(tmp_path / "old", item=train_target(TX))[0],
        ]

    for model in models:
        np.testing.assert_array_equal(_kernel(model), _kernel(trained[0]))


def test_item_metadata_tells_shapes_and_dtypes(tmp_path, linen) -> None:
    _linen_manager(tmp_path, linen)

    with ocp.CheckpointManager(tmp_path, item_handlers=NNXLinenHandler()) as manager:
        metadata = manager.item_metadata(3)

    leaf = metadata["params"]["up"]["kernel"]
    assert leaf.shape == linen.params["up"]["kernel"].shape
    assert leaf.dtype == np.float32


def test_what_it_saves_stock_orbax_reads_without_this_package(tmp_path, trained, linen) -> None:
    with ocp.CheckpointManager(tmp_path, item_handlers=NNXLinenHandler()) as manager:
        manager.save(1, args=NNXLinenSave(trained))

    with ocp.CheckpointManager(tmp_path) as manager:
        restored = manager.restore(1, args=ocp.args.StandardRestore(linen))

    assert "orbax_nnx_handler" not in (tmp_path / "1" / "_CHECKPOINT_METADATA").read_text()
    jax.tree.map(np.testing.assert_array_equal, restored.params, linen.params)
    jax.tree.map(np.testing.assert_array_equal, restored.opt_state, linen.opt_state)
    logits = LinenNet().apply(
        {"params": restored.params, "batch_stats": restored.batch_stats}, jnp.ones((1, 8))
    )
    assert np.isfinite(np.asarray(logits)).all()


def test_items_that_are_not_nnx_are_saved_as_the_parent_would(tmp_path) -> None:
    tree = {"a": np.arange(3), "b": [1.5, {"c": "text"}], "d": 7}
    for name, handler in (("own", NNXLinenHandler()), ("stock", ocp.PyTreeCheckpointHandler())):
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(tmp_path / name, tree)

    with ocp.PyTreeCheckpointer() as checkpointer:
        own, stock = checkpointer.restore(tmp_path / "own"), checkpointer.restore(tmp_path / "stock")

    assert jax.tree.structure(own) == jax.tree.structure(stock)
    assert (tmp_path / "own" / "_METADATA").read_text() == (tmp_path / "stock" / "_METADATA").read_text()


def test_every_keyword_of_the_parent_passes_through(tmp_path, trained) -> None:
    handler = NNXLinenHandler(use_ocdbt=False, use_zarr3=True, restore_concurrent_gb=1, save_concurrent_gb=1)

    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(tmp_path / "item", args=NNXLinenSave(trained))
        model, _ = checkpointer.restore(tmp_path / "item", args=NNXLinenRestore(train_target(TX)))

    assert not (tmp_path / "item" / "manifest.ocdbt").exists()
    assert list((tmp_path / "item").glob("params.up.kernel/zarr.json"))
    np.testing.assert_array_equal(_kernel(model), _kernel(trained[0]))


def test_own_type_handlers_read_an_item_that_was_saved_with_rich_types(tmp_path, linen) -> None:
    # Orbax documents the option, but exports no name for it.
    from orbax.checkpoint._src.metadata import tree

    types = ocp.type_handlers
    options = {
        "pytree_metadata_options": tree.PyTreeMetadataOptions(support_rich_types=True),
        "type_handler_registry": types.create_type_handler_registry(
            (int, types.ScalarHandler()),
            (np.ndarray, types.NumpyHandler()),
            (jax.Array, types.ArrayHandler()),
        ),
    }
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
        checkpointer.save(tmp_path / "item", args=ocp.args.PyTreeSave(linen))

    model, optimizer = NNXLinenHandler(**options).restore(
        tmp_path / "item", args=NNXLinenRestore(train_target(TX))
    )

    np.testing.assert_array_equal(_kernel(model), linen.params["up"]["kernel"])
    np.testing.assert_array_equal(
        optimizer.opt_state[0].mu["up"]["kernel"][...], linen.opt_state[0].mu["up"]["kernel"]
    )


def test_a_tree_of_arrays_is_restored_by_name_where_these_args_or_an_option_ask_for_it(
    tmp_path, linen
) -> None:
    item = save_stock(tmp_path / "item", linen)
    target = {"up": {"kernel": jax.ShapeDtypeStruct((8, 16), jnp.float32)}}
    as_numpy = {"up": {"kernel": np.zeros((8, 16), np.float32)}}

    pure = NNXLinenHandler().restore(item, args=NNXLinenRestore(target))
    asked = NNXLinenHandler().restore(item, args=NNXLinenRestore(as_numpy, policy="error"))

    for found in (pure, asked):
        np.testing.assert_array_equal(found["up"]["kernel"], linen.params["up"]["kernel"])
    with pytest.raises(ValueError, match="structures do not match"):
        NNXLinenHandler().restore(item, args=ocp.args.PyTreeRestore(target))


def test_settings_of_one_restore_win_over_the_handlers(tmp_path) -> None:
    state = linen_state(TX)
    item = save_stock(tmp_path / "item", {"params": {"up": state.params["up"], "norm": state.params["norm"]}})
    handler = NNXLinenHandler(policy="error", unexpected="error")

    with pytest.raises(MissingParamError):
        handler.restore(item, args=NNXLinenRestore(abstract_net()))
    model = handler.restore(item, args=NNXLinenRestore(abstract_net(), policy="warn"))

    assert not np.any(model.down.kernel.get_value())
    assert handler.report is not None
    assert ("down", "kernel") in handler.report.filled


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("shape", [(), (3,)])
def test_a_random_key_that_orbax_describes_by_its_bits_is_restored_as_stock_orbax_does(
    tmp_path, impl: str, shape: tuple[int, ...]
) -> None:
    key = jax.random.split(jax.random.key(7, impl=impl), shape) if shape else jax.random.key(7, impl=impl)
    item = {"params": {"w": jnp.ones(3)}, "key": key}
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, item)
    path = save_stock(tmp_path / "item", item)
    stock = ocp.PyTreeCheckpointer().restore(path, target)
    handler = NNXLinenHandler()

    found = {
        "older form": ocp.Checkpointer(handler).restore(path, target),
        "a handler alone": handler.restore(path, target),
        "args": handler.restore(path, args=NNXLinenRestore(target)),
        "PyTreeRestore": handler.restore(path, args=ocp.args.PyTreeRestore(target)),
        "restore": restore(path, target),
        "beside a state": restore(
            path, {"params": nnx.State({"w": nnx.Param(jnp.zeros(3))}), **_only_key(target)}
        ),
    }

    assert stock["key"].dtype == key.dtype
    for name, tree in found.items():
        assert (tree["key"].dtype, tree["key"].shape) == (key.dtype, shape), name
        np.testing.assert_array_equal(jax.random.key_data(tree["key"]), jax.random.key_data(key), name)


def _only_key(target: Any) -> Any:
    return {"key": target["key"]}


def test_numbers_that_are_wanted_where_a_random_key_is_stored_are_still_a_mismatch(tmp_path) -> None:
    path = save_stock(tmp_path / "item", {"w": jnp.ones(3), "key": jax.random.key(7)})
    w = jax.ShapeDtypeStruct((3,), jnp.float32)

    for wanted in (jnp.zeros(2, jnp.uint32), jax.ShapeDtypeStruct((2,), jnp.int32)):
        with pytest.raises(KeyMismatchError):
            restore(path, {"w": w, "key": wanted})


def test_partial_restore_says_that_a_target_leaves_out_what_is_stored(tmp_path, linen) -> None:
    item = save_stock(tmp_path / "item", linen)
    part = nnx.state(abstract_net(), nnx.PathContains("up"))
    handler = NNXLinenHandler(unexpected="error")

    with pytest.raises(RestoreError):
        handler.restore(item, args=ocp.args.PyTreeRestore(part))
    found = handler.restore(item, args=ocp.args.PyTreeRestore(part, partial_restore=True))

    np.testing.assert_array_equal(found["up"]["kernel"][...], linen.params["up"]["kernel"])


def test_none_is_the_default_everywhere(tmp_path, linen) -> None:
    item = save_stock(tmp_path / "item", linen)
    nothing: dict[str, Any] = dict.fromkeys(("policy", "layout", "renames", "init", "unexpected", "dtype"))

    plan_restore(item, abstract_net(), **nothing).check()
    results = [
        restore(item, abstract_net(), **nothing),
        NNXLinenHandler(**nothing).restore(item, args=NNXLinenRestore(abstract_net(), **nothing)),
    ]

    for model in results:
        np.testing.assert_array_equal(_kernel(model), linen.params["up"]["kernel"])


def test_a_linen_program_runs_unchanged_under_the_registry(tmp_path, linen) -> None:
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, linen)

    with ocp.CheckpointManager(tmp_path / "run", handler_registry=handler_registry()) as manager:
        manager.save(0, args=ocp.args.StandardSave(linen))
        again = manager.restore(0, args=ocp.args.StandardRestore(target))

    assert jax.tree.structure(again) == jax.tree.structure(target)
    jax.tree.map(np.testing.assert_array_equal, again, linen)


def test_the_report_gives_every_leaf_exactly_one_origin(tmp_path, linen) -> None:
    item = save_stock(tmp_path / "item", linen)
    handler = NNXLinenHandler()

    handler.restore(item, args=NNXLinenRestore(abstract_net()))

    report = handler.report
    assert report is not None
    wanted = {path for path, _ in nnx.to_flat_state(nnx.state(abstract_net()))}
    parts = [set(report.restored), set(report.filled), set(report.defaulted)]
    assert set.union(*parts) == wanted
    assert sum(map(len, parts)) == len(wanted)
    assert report.to_dict()["layout"] == "Flax TrainState"
    assert str(report)


def test_transforms_are_refused(tmp_path, linen) -> None:
    item = save_stock(tmp_path / "item", linen)

    with pytest.raises(ValueError, match="renames"):
        NNXLinenHandler().restore(item, args=ocp.args.PyTreeRestore(abstract_net(), transforms={}))


def test_a_failed_restore_leaves_the_last_report_and_the_checkpoint_alone(tmp_path, linen) -> None:
    item = save_stock(tmp_path / "item", linen)
    handler = NNXLinenHandler()
    handler.restore(item, args=NNXLinenRestore(abstract_net()))
    report, files = handler.report, sorted(tmp_path.rglob("*"))

    with pytest.raises(RestoreError):
        handler.restore(item, args=NNXLinenRestore({"nothing": jax.ShapeDtypeStruct((2,), jnp.float32)}))

    assert handler.report is report
    assert sorted(tmp_path.rglob("*")) == files


def test_save_and_restore_without_a_manager(tmp_path, trained) -> None:
    save(tmp_path / "item", trained)

    model, optimizer = restore(tmp_path / "item", train_target(TX), unexpected="error")

    np.testing.assert_array_equal(_kernel(model), _kernel(trained[0]))
    for left, right in zip(
        jax.tree.leaves(nnx.state(optimizer)), jax.tree.leaves(nnx.state(trained[1])), strict=True
    ):
        np.testing.assert_array_equal(left, right)


def test_save_refuses_to_overwrite_unless_forced(tmp_path, trained) -> None:
    save(tmp_path / "item", trained)

    with pytest.raises(ValueError, match="exists"):
        save(tmp_path / "item", make_net())
    save(tmp_path / "item", make_net(), force=True)

    assert restore(tmp_path / "item", abstract_net()).up is not None


@pytest.mark.parametrize(
    ("below", "said"),
    [
        ("", "the root of a CheckpointManager, not an item; it holds the steps 1, 2."),
        ("2", "a step, not an item; it holds: default."),
        ("notes", "no Orbax checkpoint; it holds: thesis.tex."),
        ("notes/thesis.tex", "a file."),
    ],
)
@pytest.mark.parametrize("force", [False, True])
def test_what_is_more_than_one_item_is_never_replaced(tmp_path, below, said, force):
    for step in (1, 2):
        save(tmp_path / "run" / str(step) / "default", make_net())
    (tmp_path / "run" / "notes").mkdir()
    (tmp_path / "run" / "notes" / "thesis.tex").write_text("all that there is")
    before = sorted(tmp_path.rglob("*"))

    with pytest.raises(NotACheckpointError) as error:
        save(tmp_path / "run" / below, make_net(), force=force)

    assert str(error.value) == (
        f"{tmp_path / 'run' / below} is {said} A save replaces one item and nothing else."
        "\nhint: pass the path of an item, or one at which there is nothing."
    )
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("parts", [[], ["_CHECKPOINT_METADATA", "array_metadatas", "ocdbt.process_0"]])
def test_an_item_that_was_only_begun_is_replaced(tmp_path, parts):
    (tmp_path / "item").mkdir()
    for part in parts:
        (tmp_path / "item" / part).mkdir()

    save(tmp_path / "item", make_net(), force=True)

    assert restore(tmp_path / "item", abstract_net()).up is not None


def test_a_manager_saves_asynchronously_and_the_caller_may_go_on(tmp_path, trained) -> None:
    expected = _kernel(trained[0]).copy()

    with ocp.CheckpointManager(tmp_path, item_handlers=NNXLinenHandler()) as manager:
        manager.save(1, args=NNXLinenSave(trained))
        trained[0].up.kernel.set_value(jnp.zeros_like(trained[0].up.kernel.get_value()))
        manager.wait_until_finished()
        model, _ = manager.restore(1, args=NNXLinenRestore(train_target(TX)))

    np.testing.assert_array_equal(_kernel(model), expected)
