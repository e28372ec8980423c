"""One of several processes that run the same programs with both handlers; see `test_processes`."""

import json
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from tests.conformance.items import sharded
from tests.conformance.kits import OURS, STOCK, Kit, outcome
from tests.conformance.programs import Program, abstract

PyTreeRestore, PyTreeSave = ocp.args.PyTreeRestore, ocp.args.PyTreeSave


def item() -> dict[str, Any]:
    """Returns what every process has its part of."""
    return {**sharded(), "epoch": 3, "seen": np.arange(3), "name": "run"}


def _in_the_foreground(kit: Kit, path: Any) -> Any:
    with ocp.Checkpointer(kit.handler()) as checkpointer:
        checkpointer.save(path, args=PyTreeSave(item()))
        return [
            checkpointer.restore(
                path, args=PyTreeRestore(item(), ocp.checkpoint_utils.construct_restore_args(item()))
            ),
            checkpointer.restore(path, args=PyTreeRestore({**item(), "rows": ocp.PLACEHOLDER})),
        ]


def _in_the_background(kit: Kit, path: Any) -> Any:
    tree = item()
    with ocp.AsyncCheckpointer(kit.handler()) as checkpointer:
        checkpointer.save(path, args=PyTreeSave(tree))
        tree["seen"][:] = -1
        checkpointer.wait_until_finished()
        return checkpointer.restore(path, args=PyTreeRestore(item()))


def _manager(kit: Kit, path: Any) -> Any:
    with ocp.CheckpointManager(path, handler_registry=kit.registry()) as manager:
        for step in range(2):
            manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(sharded()),
                    bundle=PyTreeSave({"epoch": step}),
                    note=ocp.args.JsonSave({"step": step}),
                ),
            )
        manager.wait_until_finished()
        found = manager.restore(
            1,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract(sharded())),
                bundle=PyTreeRestore({"epoch": 0}),
                note=ocp.args.JsonRestore(),
            ),
        )
        return manager.all_steps(), dict(found.items())


def _a_later_manager(kit: Kit, path: Any) -> Any:
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(path, item_handlers=kit.handler(), options=options) as manager:
        for step in range(4):
            manager.save(step, args=kit.save(item()), custom_metadata={"by": step})
        manager.wait_until_finished()
        left = manager.all_steps()
    with ocp.CheckpointManager(path, item_handlers=kit.handler()) as manager:
        args = ocp.checkpoint_utils.construct_restore_args(item())
        found = manager.restore(3, args=kit.restore(item(), args))
        described = manager.item_metadata(3)
        return left, manager.metadata(3).custom_metadata, sorted(described.tree), found, manager.restore(2)


def _a_registry_without_args(kit: Kit, path: Any) -> Any:
    with ocp.CheckpointManager(path, handler_registry=kit.registry()) as manager:
        manager.save(1, args=PyTreeSave(item()))
        manager.wait_until_finished()
        return manager.restore(1)


def _held_by_all() -> dict[str, Any]:
    return {"kernel": np.ones((4, 2)), "bias": np.arange(2.0)}


def _each_saves(kit: Kit, path: Any) -> Any:
    """Gives a handler that has saved an item on every process, without a checkpointer's barriers."""
    if jax.process_index() == 0:
        path.mkdir()
    multihost_utils.sync_global_devices("made")
    handler = kit.handler(use_ocdbt=False)
    handler.save(path, args=PyTreeSave(_held_by_all()))
    multihost_utils.sync_global_devices("saved")
    return handler


def _another_target_on_one(kit: Kit, path: Any) -> Any:
    handler = _each_saves(kit, path)
    target = _held_by_all() if jax.process_index() == 0 else {"bias": np.zeros(2)}
    return handler.restore(path, args=PyTreeRestore(target))


def _nothing_there_on_one(kit: Kit, path: Any) -> Any:
    handler = _each_saves(kit, path)
    return handler.restore(
        path if jax.process_index() == 0 else path / "nowhere", args=PyTreeRestore(_held_by_all())
    )


def _a_save_that_one_refuses(kit: Kit, path: Any) -> Any:
    if jax.process_index() == 0:
        path.mkdir()
    multihost_utils.sync_global_devices("made")
    handler = kit.handler(use_ocdbt=False)
    handler.save(path, args=PyTreeSave({"w": np.ones(2) if jax.process_index() == 0 else object()}))
    return sorted(file.name for file in path.glob("w*"))


PROGRAMS: dict[str, Program] = {
    "in the foreground": _in_the_foreground,
    "in the background": _in_the_background,
    "a manager with several items": _manager,
    "a later manager": _a_later_manager,
    "a registry without args": _a_registry_without_args,
    "another target on the others": _another_target_on_one,
    "nothing there on the others": _nothing_there_on_one,
    "a save that the others refuse": _a_save_that_one_refuses,
}


def main(port: str, processes: str, process: str, directory: str) -> None:
    """Joins the others, runs every program with both handlers and writes `PROCESS.json`."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", int(processes), int(process))
    seen: dict[str, Any] = {}
    for number, (name, program) in enumerate(PROGRAMS.items()):
        for kind, kit in (("stock", STOCK), ("ours", OURS)):
            seen.setdefault(name, {})[kind] = outcome(
                program, kit, pathlib.Path(directory) / f"{kind}_{number}"
            )
            multihost_utils.sync_global_devices(f"{name} {kind}")
    (pathlib.Path(directory) / f"{process}.json").write_text(json.dumps(seen))
