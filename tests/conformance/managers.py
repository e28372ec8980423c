"""Programs with a `CheckpointManager`: one item, several items, a registry, saves in the background."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from tests.conformance.items import params, sharded, train_state
from tests.conformance.kits import Kit
from tests.conformance.programs import Program, abstract

Composite = ocp.args.Composite


def bundle(value: float = 1.0) -> dict[str, Any]:
    """Returns what a training loop keeps beside its model."""
    return {"epoch": 3, "rate": 0.1, "seen": np.arange(4) + value, "name": "run", "w": jnp.full(2, value)}


def _one_item(kit: Kit, path: Any) -> Any:
    with ocp.CheckpointManager(path, item_handlers=kit.handler()) as manager:
        manager.save(1, args=kit.save(bundle()))
        manager.wait_until_finished()
        return [manager.restore(1, args=kit.restore(bundle(0.0))), manager.restore(1)]


def _arrays_alone(kit: Kit, path: Any) -> Any:
    with ocp.CheckpointManager(path, item_handlers=kit.handler()) as manager:
        manager.save(1, args=kit.save(train_state()))
        manager.wait_until_finished()
        return manager.restore(1, args=kit.restore(abstract(train_state())))


def _arrays_of_several_devices(kit: Kit, path: Any) -> Any:
    with ocp.CheckpointManager(path, item_handlers=kit.handler()) as manager:
        manager.save(1, args=kit.save(sharded()))
        manager.wait_until_finished()
        return manager.restore(1, args=kit.restore(sharded()))


def _several_items(kit: Kit, path: Any) -> Any:
    handlers = {"state": kit.handler(), "note": ocp.JsonCheckpointHandler()}
    with ocp.CheckpointManager(path, item_handlers=handlers) as manager:
        manager.save(1, args=Composite(state=kit.save(bundle()), note=ocp.args.JsonSave({"a": 1})))
        manager.wait_until_finished()
        both = manager.restore(1, args=Composite(state=kit.restore(bundle(0.0)), note=ocp.args.JsonRestore()))
        return dict(both.items()), dict(manager.restore(1).items()), sorted(manager.item_metadata(1))


def _registry(save: Any, restore: Any) -> Program:
    def program(kit: Kit, path: Any) -> Any:
        with ocp.CheckpointManager(path, handler_registry=kit.registry()) as manager:
            manager.save(1, args=save(train_state()))
            manager.wait_until_finished()
            return manager.restore(1, args=restore(abstract(train_state())))

    return program


def _registry_with_several_items(kit: Kit, path: Any) -> Any:
    with ocp.CheckpointManager(path, handler_registry=kit.registry()) as manager:
        manager.save(
            1,
            args=Composite(
                state=ocp.args.StandardSave(params()),
                bundle=ocp.args.PyTreeSave(bundle()),
                note=ocp.args.JsonSave({"a": [1, 2]}),
            ),
        )
        manager.wait_until_finished()
        found = manager.restore(
            1,
            args=Composite(
                state=ocp.args.StandardRestore(abstract(params())),
                bundle=ocp.args.PyTreeRestore(bundle(0.0)),
                note=ocp.args.JsonRestore(),
            ),
        )
        return dict(found.items())


def _keeps_the_best(kit: Kit, path: Any) -> Any:
    options = ocp.CheckpointManagerOptions(max_to_keep=2, best_fn=lambda metrics: metrics["loss"])
    with ocp.CheckpointManager(path, item_handlers=kit.handler(), options=options) as manager:
        for step, loss in enumerate([0.5, 0.9, 0.1, 0.8]):
            manager.save(step, args=kit.save(bundle(float(step))), metrics={"loss": loss})
        manager.wait_until_finished()
        return manager.all_steps(), manager.best_step(), manager.restore(None, args=kit.restore(bundle(0.0)))


def _a_later_process(kit: Kit, path: Any) -> Any:
    with ocp.CheckpointManager(path, item_handlers=kit.handler(), metadata={"run": 7}) as manager:
        manager.save(5, args=kit.save(bundle()), custom_metadata={"by": "me"})
    options = ocp.CheckpointManagerOptions(read_only=True)
    with ocp.CheckpointManager(path, item_handlers=kit.handler(), options=options) as manager:
        metadata = manager.metadata(5)
        return [
            manager.latest_step(),
            manager.restore(5),
            metadata.custom_metadata,
            manager.metadata().custom_metadata,
            # What a checkpoint says of the handler that wrote it: Orbax's own, also where ours did.
            (path / "5" / "_CHECKPOINT_METADATA").read_text().partition('"metrics"')[0],
        ]


def _values_changed_after_a_save(kit: Kit, path: Any) -> Any:
    values = bundle()
    with ocp.CheckpointManager(path, item_handlers=kit.handler()) as manager:
        manager.save(1, args=kit.save(values))
        values["seen"][:] = -1
        manager.wait_until_finished()
        return manager.restore(1, args=kit.restore(bundle(0.0)))


def _a_step_that_is_not_there(kit: Kit, path: Any) -> Any:
    with ocp.CheckpointManager(path, item_handlers=kit.handler()) as manager:
        return manager.restore(3, args=kit.restore(bundle()))


def _older_managers(kit: Kit, path: Any) -> Any:
    manager = ocp.CheckpointManager(path, {"state": ocp.AsyncCheckpointer(kit.handler())})
    manager.save(1, {"state": bundle()}, save_kwargs={"state": {"save_args": None}})
    manager.wait_until_finished()
    found = manager.restore(1, {"state": bundle(0.0)})
    manager.close()
    return found


def _read_by_stock(kit: Kit, path: Any) -> Any:
    with ocp.CheckpointManager(path, item_handlers=kit.handler()) as manager:
        manager.save(1, args=kit.save(bundle()))
    with ocp.CheckpointManager(path) as manager:
        return manager.restore(1, args=ocp.args.PyTreeRestore(bundle(0.0)))


PROGRAMS: dict[str, Program] = {
    "one item": _one_item,
    "arrays alone": _arrays_alone,
    "arrays of several devices": _arrays_of_several_devices,
    "several items": _several_items,
    "registry, PyTree": _registry(ocp.args.PyTreeSave, ocp.args.PyTreeRestore),
    "registry, Standard": _registry(ocp.args.StandardSave, ocp.args.StandardRestore),
    "registry, both": _registry(ocp.args.StandardSave, ocp.args.PyTreeRestore),
    "registry with several items": _registry_with_several_items,
    "the best steps are kept": _keeps_the_best,
    "a later process": _a_later_process,
    "values changed after a save": _values_changed_after_a_save,
    "a step that is not there": _a_step_that_is_not_there,
    "older managers": _older_managers,
    "read by a manager without this package": _read_by_stock,
}
