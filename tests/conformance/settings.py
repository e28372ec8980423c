"""Managers under their settings, steps that come and go, metadata, errors of every day."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from tests.conformance.items import params, train_state
from tests.conformance.kits import Kit
from tests.conformance.managers import bundle
from tests.conformance.programs import Program, abstract

Composite = ocp.args.Composite


def _steps(**options: Any) -> Program:
    """Saves seven steps under settings; tells which were taken, which are left and how they are called."""

    def program(kit: Kit, path: Any) -> Any:
        settings = ocp.CheckpointManagerOptions(**options)
        with ocp.CheckpointManager(path, item_handlers=kit.handler(), options=settings) as manager:
            taken = [
                manager.save(step, args=kit.save(bundle(float(step))), metrics={"loss": (step * 3) % 7 / 10})
                for step in range(7)
            ]
            manager.wait_until_finished()
            left = manager.all_steps()
            found = manager.restore(max(left), args=kit.restore(bundle(0.0)))
            best = manager.best_step()
        # Steps deleted in the background are gone once the manager is closed.
        return taken, left, best, sorted(file.name for file in path.iterdir()), found

    return program


def _item_metadata(kit: Kit, path: Any) -> Any:
    with ocp.CheckpointManager(path, item_handlers=kit.handler()) as manager:
        manager.save(1, args=kit.save({**bundle(), "p": params()}))
        manager.wait_until_finished()
        found, step = manager.item_metadata(1), manager.metadata(1)
        return repr(found.tree), repr(found.custom_metadata), repr(step.item_handlers), step.metrics


def _item_metadata_of_a_later_manager(kit: Kit, path: Any) -> Any:
    with ocp.CheckpointManager(path, item_handlers=kit.handler()) as manager:
        manager.save(1, args=kit.save(params()))
    with ocp.CheckpointManager(path, item_handlers=kit.handler()) as manager:
        target = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), manager.item_metadata(1).tree)
        return manager.restore(1, args=kit.restore(target))


def _metadata_by_a_manager_that_knows_no_handler(kit: Kit, path: Any) -> Any:
    with ocp.CheckpointManager(path, item_handlers=kit.handler()) as manager:
        manager.save(1, args=kit.save(bundle()))
    with ocp.CheckpointManager(path) as manager:
        found = manager.item_metadata(1)
        return repr(getattr(found, "tree", found)), manager.restore(1)


def _a_step_again(kit: Kit, path: Any) -> Any:
    with ocp.CheckpointManager(path, item_handlers=kit.handler()) as manager:
        manager.save(1, args=kit.save(bundle()))
        manager.wait_until_finished()
        skipped = manager.save(1, args=kit.save(bundle(2.0)))
        return skipped, manager.save(1, args=kit.save(bundle(3.0)), force=True)


def _a_step_deleted(kit: Kit, path: Any) -> Any:
    with ocp.CheckpointManager(path, item_handlers=kit.handler()) as manager:
        for step in range(3):
            manager.save(step, args=kit.save(bundle(float(step))))
        manager.wait_until_finished()
        manager.delete(1)
        assert manager.all_steps() == [0, 2]
        return manager.restore(1, args=kit.restore(bundle()))


def _steps_of_another_manager(kit: Kit, path: Any) -> Any:
    with ocp.CheckpointManager(path, item_handlers=kit.handler()) as reader:
        with ocp.CheckpointManager(path, item_handlers=kit.handler()) as writer:
            writer.save(4, args=kit.save(bundle()))
        before = reader.latest_step()
        reader.reload()
        return before, reader.latest_step(), reader.restore(None, args=kit.restore(bundle(0.0)))


def _another_directory(kit: Kit, path: Any) -> Any:
    for name in ("one", "other"):
        with ocp.CheckpointManager(path / name, item_handlers=kit.handler()) as manager:
            manager.save(1, args=kit.save(bundle(float(len(name)))))
    with ocp.CheckpointManager(path / "one", item_handlers=kit.handler()) as manager:
        return manager.restore(1, args=kit.restore(bundle(0.0)), directory=path / "other")


def _no_step_at_all(kit: Kit, path: Any) -> Any:
    with ocp.CheckpointManager(path, item_handlers=kit.handler()) as manager:
        assert manager.latest_step() is None
        return manager.restore(None, args=kit.restore(bundle()))


def _one_item_of_two(kit: Kit, path: Any) -> Any:
    with ocp.CheckpointManager(path, handler_registry=kit.registry()) as manager:
        manager.save(
            1, args=Composite(a=ocp.args.StandardSave(params(1.0)), b=ocp.args.PyTreeSave(bundle(2.0)))
        )
        manager.save(2, args=Composite(b=ocp.args.PyTreeSave(bundle(3.0))))
        manager.wait_until_finished()
        both = manager.restore(1, args=Composite(b=ocp.args.PyTreeRestore(bundle(0.0))))
        later = manager.restore(2, args=Composite(b=ocp.args.PyTreeRestore()))
        return dict(both.items()), dict(later.items()), dict(manager.restore(1, args=Composite()).items())


def _an_item_that_is_not_there(kit: Kit, path: Any) -> Any:
    with ocp.CheckpointManager(path, handler_registry=kit.registry()) as manager:
        manager.save(1, args=Composite(a=ocp.args.PyTreeSave(params())))
        manager.wait_until_finished()
        return manager.restore(1, args=Composite(z=ocp.args.PyTreeRestore(params())))


def _a_registry_that_is_asked_without_args(kit: Kit, path: Any) -> Any:
    with ocp.CheckpointManager(path, handler_registry=kit.registry()) as manager:
        manager.save(1, args=ocp.args.PyTreeSave(bundle()))
        manager.wait_until_finished()
        here = manager.restore(1)
    with ocp.CheckpointManager(path, handler_registry=kit.registry()) as manager:
        return here, manager.restore(1)


def _item_names(kit: Kit, path: Any) -> Any:
    handlers = {"state": kit.handler()}
    with ocp.CheckpointManager(path, item_names=("state", "extra"), item_handlers=handlers) as manager:
        manager.save(1, args=Composite(state=kit.save(params()), extra=ocp.args.JsonSave({"a": 1})))
        manager.wait_until_finished()
        found = manager.restore(1, args=Composite(state=kit.restore(abstract(params()))))
        return dict(found.items()), sorted(manager.item_metadata(1).keys())


def _by_other_checkpointers(kit: Kit, path: Any) -> Any:
    with ocp.Checkpointer(kit.handler()) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(train_state()))
    with ocp.StandardCheckpointer() as standard:
        found = standard.restore(path, abstract(train_state()))
    with ocp.PyTreeCheckpointer() as pytree:
        return found, pytree.restore(path)


def _what_others_wrote(kit: Kit, path: Any) -> Any:
    with ocp.StandardCheckpointer() as standard:
        standard.save(path, train_state())
    with ocp.Checkpointer(kit.handler()) as checkpointer:
        return checkpointer.restore(path, args=ocp.args.PyTreeRestore(abstract(train_state())))


def _a_place_that_is_taken(kit: Kit, path: Any) -> Any:
    with ocp.Checkpointer(kit.handler()) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(bundle()))
        checkpointer.save(path, args=ocp.args.PyTreeSave(bundle(2.0)), force=True)
        assert float(checkpointer.restore(path)["w"][0]) == 2.0
        return checkpointer.save(path, args=ocp.args.PyTreeSave(bundle(3.0)))


def _nothing_to_save(kit: Kit, path: Any) -> Any:
    with ocp.CheckpointManager(path, item_handlers=kit.handler()) as manager:
        manager.save(1, args=kit.save(None))
        manager.wait_until_finished()
        return manager.restore(1)


def _complex_numbers(kit: Kit, path: Any) -> Any:
    with ocp.Checkpointer(kit.handler()) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave({"w": np.ones(2, np.complex64)}))
        return checkpointer.restore(path)


def _a_file_by_save_args(kit: Kit, path: Any) -> Any:
    args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=8), params())
    with ocp.CheckpointManager(path, item_handlers=kit.handler(use_zarr3=True)) as manager:
        manager.save(1, args=kit.save(params(), args))
        manager.wait_until_finished()
        return manager.restore(1, args=kit.restore(abstract(params())))


def _checkpoints_as_they_come(kit: Kit, path: Any) -> Any:
    with ocp.CheckpointManager(path, item_handlers=kit.handler()) as manager:
        for step in range(2):
            manager.save(step, args=kit.save(params(float(step))))
        manager.wait_until_finished()
        steps = ocp.checkpoint_utils.checkpoints_iterator(path, timeout=0)
        return [manager.restore(step) for step in steps]


PROGRAMS: dict[str, Program] = {
    "the newest three": _steps(max_to_keep=3),
    "the newest and every fourth": _steps(max_to_keep=2, keep_period=4),
    "the best by the lowest loss": _steps(
        max_to_keep=2, best_fn=lambda found: found["loss"], best_mode="min"
    ),
    "every third step": _steps(save_interval_steps=3),
    "saved in the foreground": _steps(enable_async_checkpointing=False, max_to_keep=1),
    "names of steps": _steps(step_prefix="ckpt", step_format_fixed_length=6, max_to_keep=2),
    "deleted aside": _steps(max_to_keep=1, todelete_subdir="old"),
    "deleted in the background": _steps(max_to_keep=1, enable_background_delete=True),
    "named steps alone": _steps(save_on_steps=[2, 5], save_interval_steps=100),
    "item metadata": _item_metadata,
    "a target of item metadata": _item_metadata_of_a_later_manager,
    "metadata without a handler": _metadata_by_a_manager_that_knows_no_handler,
    "a step again": _a_step_again,
    "a step deleted": _a_step_deleted,
    "steps of another manager": _steps_of_another_manager,
    "another directory": _another_directory,
    "no step at all": _no_step_at_all,
    "one item of two": _one_item_of_two,
    "an item that is not there": _an_item_that_is_not_there,
    "a registry without args": _a_registry_that_is_asked_without_args,
    "item names and a handler": _item_names,
    "read by Orbax's other checkpointers": _by_other_checkpointers,
    "written by Orbax's other checkpointers": _what_others_wrote,
    "a place that is taken": _a_place_that_is_taken,
    "nothing to save": _nothing_to_save,
    "complex numbers": _complex_numbers,
    "small chunks": _a_file_by_save_args,
    "checkpoints as they come": _checkpoints_as_they_come,
}
