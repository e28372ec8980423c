"""One process of several: plays every scene and writes what it saw."""

import contextlib
import dataclasses
import json
import pathlib
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from orbax_nnx_handler import (
    NNXLinenHandler,
    NNXLinenRestore,
    NNXLinenSave,
    RestoreError,
    SingleReplica,
    restore,
)
from orbax_nnx_handler.storage.reading import read as everywhere
from orbax_nnx_handler.storage.reading import single_replica
from orbax_nnx_handler.storage.reading.single_replica import Copied
from tests.cases import digest, load_case
from tests.hosts.bits import bits_in

EXTRA = ("model", "decoder", "extra", "kernel")
SHAPE = (16, 8)


@dataclasses.dataclass(frozen=True)
class Stage:
    """What every scene needs."""

    directory: pathlib.Path
    mesh: Mesh


def _place(leaf: jax.ShapeDtypeStruct, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Shards the first axis that all devices divide, over both axes of the mesh."""
    axes: list[Any] = [None] * len(leaf.shape)
    for at, length in enumerate(leaf.shape):
        if length % mesh.size == 0:
            axes[at] = ("hosts", "local")
            break
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))


def _target(name: str, mesh: Mesh) -> nnx.State:
    return jax.tree.map(lambda leaf: _place(leaf, mesh), load_case(name).target)


def _with_extra(target: nnx.State, mesh: Mesh) -> nnx.State:
    leaf = nnx.Param(_place(jax.ShapeDtypeStruct(SHAPE, np.float32), mesh))
    return nnx.merge_state(target, nnx.from_flat_state([(EXTRA, leaf)]))


def _wrong(name: str, state: nnx.State) -> list[str]:
    """Returns the leaves whose values, gathered from all processes, are not the stored ones."""
    expected = {path: value for path, value in load_case(name).digests.items() if value is not None}
    values = {path: leaf.get_value() for path, leaf in nnx.to_flat_state(state) if path in expected}
    everywhere = NamedSharding(next(iter(values.values())).sharding.mesh, PartitionSpec())
    # In one program: each leaf gathered by itself would be compiled by itself.
    whole = jax.jit(lambda leaves: leaves, out_shardings=everywhere)(list(values.values()))
    return [
        "/".join(map(str, path))
        for path, array in zip(values, whole, strict=True)
        if digest(array.addressable_data(0)) != expected[path]
    ]


def _restores(name: str) -> Callable[[Stage], Any]:
    def scene(stage: Stage) -> Any:
        state = restore(load_case(name).path, _target(name, stage.mesh))
        return {"wrong": _wrong(name, state)}

    return scene


def missing_weight(stage: Stage) -> Any:
    name = "llama2_scanned_to_scanned"
    try:
        restore(load_case(name).path, _with_extra(_target(name, stage.mesh), stage.mesh))
    except RestoreError as error:
        return {"kind": type(error).__name__, "message": str(error)}
    return {"kind": "none"}


def _zeros(target: nnx.State) -> nnx.State:
    def leaf(value: jax.ShapeDtypeStruct) -> jax.Array:
        if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
            return jax.random.split(jax.random.key(0), value.shape)
        return jax.numpy.zeros(value.shape, value.dtype)

    return jax.tree.map(leaf, target)


def filled_by_filter(stage: Stage) -> Any:
    name = "llama2_scanned_to_scanned"
    target = _with_extra(_target(name, stage.mesh), stage.mesh)

    def init() -> nnx.State:
        extra = nnx.Param(jax.random.normal(jax.random.key(4), SHAPE))
        values = {path: leaf for path, leaf in nnx.to_flat_state(_zeros(target)) if path != EXTRA}
        return nnx.from_flat_state([*values.items(), (EXTRA, extra)])

    policy = {nnx.PathContains("extra"): "init", ...: "error"}
    state = restore(load_case(name).path, target, policy=policy, init=init)
    value = dict(nnx.to_flat_state(state))[EXTRA].get_value()
    whole = multihost_utils.process_allgather(value, tiled=True)
    expected = np.asarray(jax.random.normal(jax.random.key(4), SHAPE))
    return {"wrong": _wrong(name, state), "filled": bool(np.allclose(whole, expected, atol=1e-6))}


def _unreadable_on_one(reader: str, **options: Any) -> Callable[[Stage], Any]:
    def scene(stage: Stage) -> Any:
        read = getattr(everywhere, reader)

        def fail(*args: Any, **kwargs: Any) -> Any:
            if jax.process_index() == 1:
                raise OSError("the disk of process 1 is gone")
            return read(*args, **kwargs)

        setattr(everywhere, reader, fail)
        try:
            restore(stage.directory / "bits", _copies(stage), **options)
        except Exception as error:  # Whatever a process raises is what the test looks at.
            return {"kind": type(error).__name__, "message": str(error)}
        finally:
            setattr(everywhere, reader, read)
        return {"kind": "none"}

    return scene


def same_random_state(stage: Stage) -> Any:
    name = "llama2_scanned_to_unscanned"
    state = restore(load_case(name).path, _target(name, stage.mesh))
    keys = [
        np.asarray(jax.random.key_data(leaf).addressable_shards[0].data).tolist()
        for leaf in jax.tree.leaves(nnx.filter_state(state, nnx.RngKey))
    ]
    return {"keys": keys}


def saves_and_restores(stage: Stage) -> Any:
    name = "llama2_scanned_to_scanned"
    target = _target(name, stage.mesh)
    state = restore(load_case(name).path, target)
    with ocp.CheckpointManager(stage.directory / "saved", item_handlers=NNXLinenHandler()) as manager:
        manager.save(1, args=NNXLinenSave(state, layout="maxtext"))
        manager.wait_until_finished()
        again = manager.restore(1, args=NNXLinenRestore(target))
    return {"wrong": _wrong(name, again)}


def divided_random_state(stage: Stage) -> Any:
    """Saves streams that no process holds whole, in the layout that keeps them beside the tree."""
    divided = NamedSharding(stage.mesh, PartitionSpec(("hosts", "local")))

    def build() -> nnx.State:
        keys = nnx.RngKey(jax.random.split(jax.random.key(3), stage.mesh.size), tag="dropout")
        return nnx.from_flat_state([(("drop", "rngs", "key"), keys), (("w",), nnx.Param(jax.numpy.ones(8)))])

    state = jax.jit(build, out_shardings=divided)()
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=divided), state)
    with ocp.CheckpointManager(stage.directory / "divided", item_handlers=NNXLinenHandler()) as manager:
        manager.save(1, args=NNXLinenSave(state))
        manager.wait_until_finished()
        again = manager.restore(1, args=NNXLinenRestore(target))
    bits = jax.random.key_data(again["drop"]["rngs"]["key"].get_value())
    expected = np.asarray(jax.random.key_data(jax.random.split(jax.random.key(3), stage.mesh.size)))
    return {"wrong": not np.array_equal(multihost_utils.process_allgather(bits, tiled=True), expected)}


def _from_other_roots(*names: str) -> Callable[[Stage], Any]:
    """Gives each process a root of its own: what one sees, another may not see yet."""

    def scene(stage: Stage) -> Any:
        root = stage.directory / names[jax.process_index() % len(names)]
        try:
            restore(root, _copies(stage))
        except RestoreError as error:
            return {"kind": type(error).__name__, "message": str(error)}
        return {"kind": "none"}

    return scene


def _copies(stage: Stage, *spec: str | None) -> nnx.State:
    """Returns the target for the values of every kind of bits, in copies on all hosts."""

    def leaf(value: np.ndarray) -> nnx.Param:
        sharding = NamedSharding(stage.mesh, PartitionSpec(*spec[: value.ndim]))
        return nnx.Param(jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding))

    return nnx.State({name: leaf(value) for name, value in bits_in(stage.directory).items()})


def _wrong_bits(stage: Stage, state: nnx.State, target: nnx.State) -> list[str]:
    """Returns the leaves of which a shard is not what was stored, to the bit, or not where it was wanted."""
    wrong = []
    for name, value in bits_in(stage.directory).items():
        array = state[name].get_value()
        same = [
            np.asarray(shard.data).tobytes() == np.ascontiguousarray(value[shard.index]).tobytes()
            for shard in array.addressable_shards
        ]
        if not all(same) or array.sharding != target[name].get_value().sharding:
            wrong.append(name)
    return wrong


def _copied(*spec: str | None, explicit: bool = False, **options: Any) -> Callable[[Stage], Any]:
    def scene(stage: Stage) -> Any:
        if explicit:
            devices = stage.mesh.devices
            mesh = Mesh(devices, stage.mesh.axis_names, axis_types=(AxisType.Explicit,) * 2)
            stage = dataclasses.replace(stage, mesh=mesh)
        target = _copies(stage, *spec)
        read: list[int] = []
        with jax.set_mesh(stage.mesh):
            state = restore(stage.directory / "bits", target, progress=read.append, **options)
        return {"wrong": _wrong_bits(stage, state, target), "read": sum(read)}

    return scene


def _over_devices(scene: Callable[[Stage], Any]) -> Callable[[Stage], Any]:
    """Has processors copy as devices with memory of their own do."""

    def over_devices(stage: Stage) -> Any:
        before = Copied.on_cpu
        Copied.on_cpu = property(lambda _: False)
        try:
            return scene(stage)
        finally:
            Copied.on_cpu = before

    return over_devices


def _noting_blocks(scene: Callable[[Stage], Any]) -> Callable[[Stage], Any]:
    """Notes the bytes that a device holds for the copying: the block it sends and one of each copy."""

    def noting(stage: Stage) -> Any:
        before, held = single_replica._gathering, list[int]()

        def gathering(sharding: Any) -> Any:
            def run(sent: jax.Array) -> jax.Array:
                held.append((sent.shape[0] + 1) * sent.shape[2])
                return before(sharding)(sent)

            return run

        single_replica._gathering = gathering
        try:
            return scene(stage) | {"held": max(held)}
        finally:
            single_replica._gathering = before

    return noting


def asked_with_restore_args(stage: Stage) -> Any:
    """Asks leaf by leaf, as Orbax's own pipelines do."""
    target = _copies(stage)
    args = jax.tree.map(
        lambda leaf: ocp.type_handlers.SingleReplicaArrayRestoreArgs(sharding=leaf.sharding), target
    )
    read: list[int] = []
    state = restore(stage.directory / "bits", target, args, progress=read.append)
    return {"wrong": _wrong_bits(stage, state, target), "read": sum(read)}


def asked_with_a_type_handler(stage: Stage) -> Any:
    """Asks with Orbax's type handler, for one handler."""
    target = _copies(stage)
    single = ocp.type_handlers.SingleReplicaArrayHandler(replica_axis_index=0)
    types = ocp.type_handlers.create_type_handler_registry((jax.Array, single))
    with _bytes_read() as read:
        handler = NNXLinenHandler(type_handler_registry=types)
        state = handler.restore(stage.directory / "bits", args=NNXLinenRestore(target))
    return {"wrong": _wrong_bits(stage, state, target), "read": sum(read)}


def asked_for_all_handlers(stage: Stage) -> Any:
    """Asks with Orbax's type handler, registered for every handler of the program."""
    before = ocp.type_handlers.get_type_handler(jax.Array)
    single = ocp.type_handlers.SingleReplicaArrayHandler(replica_axis_index=0)
    ocp.type_handlers.register_type_handler(jax.Array, single, override=True)
    target = _copies(stage)
    try:
        with _bytes_read() as read:
            state = NNXLinenHandler().restore(stage.directory / "bits", args=NNXLinenRestore(target))
    finally:
        ocp.type_handlers.register_type_handler(jax.Array, before, override=True)
    return {"wrong": _wrong_bits(stage, state, target), "read": sum(read)}


@contextlib.contextmanager
def _bytes_read() -> Iterator[list[int]]:
    """Gives the sizes of what the readers put in place; a handler has no `progress` of its own."""
    read: list[int] = []
    originals = {name: getattr(everywhere, name) for name in ("read_arrays", "read_shards")}

    def noting_arrays(*args: Any, **kwargs: Any) -> Any:
        return originals["read_arrays"](*args, **kwargs | {"progress": read.append})

    def noting_shards(checkpoint: Any, group: Any, limit: Any, *_: Any) -> Any:
        return originals["read_shards"](checkpoint, group, limit, read.append)

    everywhere.read_arrays, everywhere.read_shards = noting_arrays, noting_shards
    try:
        yield read
    finally:
        for name, function in originals.items():
            setattr(everywhere, name, function)


SCENES: dict[str, Callable[[Stage], Any]] = {
    "restore": _restores("llama2_scanned_to_scanned"),
    "unstack": _restores("llama2_scanned_to_unscanned"),
    "stack": _restores("llama2_unscanned_to_scanned"),
    "missing_weight": missing_weight,
    "filled_by_filter": filled_by_filter,
    "unreadable_on_one": _unreadable_on_one("read_arrays"),
    "unreadable_on_the_reader": _unreadable_on_one("read_shards", single_replica=True),
    "absent_on_one": _from_other_roots("bits", "nowhere"),
    "another_on_one": _from_other_roots("bits", "bits_again"),
    "read_by_each": _copied(),
    "copied": _copied(single_replica=True),
    "copied_rows": _copied("local", single_replica=True),
    "copied_columns_explicit": _copied(None, "local", single_replica=True, explicit=True),
    "copied_in_small_groups": _copied(single_replica=True, concurrent_gb=1e-6),
    "copied_over_devices": _over_devices(_copied(single_replica=True, concurrent_gb=1e-6)),
    "copied_rows_over_devices": _over_devices(_copied("local", single_replica=True)),
    "copied_columns_over_devices": _over_devices(_copied(None, "local", single_replica=True, explicit=True)),
    "copied_along_one_axis": _copied(single_replica=SingleReplica(replica_axis_index=0)),
    "copied_along_an_axis_without_copies": _copied(single_replica=SingleReplica(replica_axis_index=1)),
    "copied_in_little_memory": _noting_blocks(
        _copied(single_replica=SingleReplica(broadcast_memory_limit_bytes=10_000))
    ),
    "copied_in_little_memory_over_devices": _over_devices(
        _copied(single_replica=SingleReplica(broadcast_memory_limit_bytes=10_000))
    ),
    "nothing_to_copy": _copied("hosts", "local", single_replica=True),
    "asked_with_restore_args": asked_with_restore_args,
    "asked_with_a_type_handler": asked_with_a_type_handler,
    "asked_for_all_handlers": asked_for_all_handlers,
    "same_random_state": same_random_state,
    "saves_and_restores": saves_and_restores,
    "divided_random_state": divided_random_state,
}


def main(port: str, processes: str, process: str, directory: str) -> None:
    """Joins the others, plays every scene and writes `PROCESS.json`."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", int(processes), int(process))
    devices = np.array(jax.devices()).reshape(int(processes), -1)
    stage = Stage(pathlib.Path(directory), Mesh(devices, ("hosts", "local")))
    seen: dict[str, Any] = {}
    for name, scene in SCENES.items():
        try:
            seen[name] = scene(stage)
        except Exception:  # One scene's failure must not leave the others waiting.
            seen[name] = {"crashed": traceback.format_exc()}
        multihost_utils.sync_global_devices(name)
    (stage.directory / f"{process}.json").write_text(json.dumps(seen))
