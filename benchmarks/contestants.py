"""Everyone who restores: this package, stock Orbax in three ways, TensorStore bare, safetensors.

A contestant prepares outside the clock and returns two functions: one that is
timed, and one that gives its result as arrays by NNX path, to be checked.
"""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from benchmarks.models import DTYPES, PROJECTIONS, Model, target

Arrays = Mapping[tuple[Any, ...], Any]
Trial = tuple[Callable[[], Any], Callable[[Any], Arrays | None]]
Contestant = Callable[[Model, pathlib.Path, Sharding], Trial]


def ours(model: Model, path: pathlib.Path, sharding: Sharding, *, single_replica: bool = False) -> Trial:
    """`orbax_nnx_handler.restore`: metadata, plan, check, read, assemble, report."""
    from orbax_nnx_handler import restore

    wanted = target(model, sharding)
    return lambda: restore(path, wanted, single_replica=single_replica), _of_state


def orbax(model: Model, path: pathlib.Path, sharding: Sharding) -> Trial:
    """Stock Orbax: `PyTreeCheckpointHandler` restores the disk's own tree."""
    import orbax.checkpoint as ocp

    item = disk_tree(model, sharding)
    args = jax.tree.map(
        lambda leaf: ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype),
        item,
    )
    handler = ocp.PyTreeCheckpointHandler()
    restore_args = ocp.args.PyTreeRestore(item=item, restore_args=args)
    return lambda: ocp.Checkpointer(handler).restore(path, args=restore_args), of_disk_tree


def orbax_single_replica(model: Model, path: pathlib.Path, sharding: Sharding) -> Trial:
    """Stock Orbax: one process reads what several hold alike and broadcasts it."""
    import orbax.checkpoint as ocp

    # It takes meshes of two axes or more.
    copies = Mesh(np.array(jax.devices()).reshape(-1, 1), ("x", "y"))
    sharding = NamedSharding(copies, PartitionSpec())
    item = disk_tree(model, sharding)
    # The step lies on one device, which is no copy of anything.
    item["step"] = jax.ShapeDtypeStruct((), np.int32, sharding=sharding)
    args = jax.tree.map(
        lambda leaf: ocp.type_handlers.SingleReplicaArrayRestoreArgs(
            sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype
        ),
        item,
    )
    single = ocp.type_handlers.SingleReplicaArrayHandler(replica_axis_index=0)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, single))
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    restore_args = ocp.args.PyTreeRestore(item=item, restore_args=args)
    return lambda: ocp.Checkpointer(handler).restore(path, args=restore_args), of_disk_tree


def orbax_v1(model: Model, path: pathlib.Path, sharding: Sharding) -> Trial:
    """Stock Orbax: `load` of the version 1 API."""
    from orbax.checkpoint import v1

    item = disk_tree(model, sharding)
    return lambda: v1.load(path, item), of_disk_tree


def orbax_then_reshape(model: Model, path: pathlib.Path, sharding: Sharding) -> Trial:
    """Stock Orbax, then the tree made an NNX state on the devices, as MaxText does."""
    restore, _ = orbax(model, path, sharding)

    def run() -> nnx.State:
        params = restore()["params"]
        return nnx.from_flat_state(
            [(key, nnx.Param(value)) for key, value in _reshaped(model, params, sharding)]
        )

    return run, _of_state


def tensorstore(model: Model, path: pathlib.Path, sharding: Sharding) -> Trial:
    """All arrays read at once with bare TensorStore into fresh NumPy arrays; no device, no tree."""
    import tensorstore as ts

    del sharding
    names = {key: ".".join(map(str, ("params", *key))) for key in _disk_keys(model)}
    driver = "zarr3" if model.zarr3 else "zarr"

    def run() -> dict[tuple[Any, ...], Any]:
        context = ts.Context({"file_io_concurrency": {"limit": 128}})
        base = {"driver": "ocdbt", "base": f"file://{path}/"}
        specs = {
            key: {"driver": driver, "kvstore": {**base, "path": f"{name}/"}} for key, name in names.items()
        }
        opened = {key: ts.open(spec, open=True, read=True, context=context) for key, spec in specs.items()}
        reads = {key: future.result().read() for key, future in opened.items()}
        return {key: future.result() for key, future in reads.items()}

    return run, lambda result: {_nnx_key(key): value for key, value in result.items()}


def safetensors(model: Model, path: pathlib.Path, sharding: Sharding) -> Trial:
    """The same values in one safetensors file: another world's figure."""
    from safetensors import flax as format_of_flax

    file = path.parent / f"{path.name}.safetensors"
    if not file.exists():
        flat = {
            f"layers.{n}.{name}": value
            for n in range(model.layers)
            for name, value in model.values(n).items()
        }
        format_of_flax.save_file({key: jnp.asarray(value) for key, value in flat.items()}, str(file))

    def run() -> dict[str, jax.Array]:
        loaded = format_of_flax.load_file(str(file))
        return jax.device_put(loaded, sharding)

    return run, lambda result: {
        ("layers", int(key.split(".")[1]), key.split(".")[2], "kernel"): value
        for key, value in result.items()
    }


CONTESTANTS: dict[str, Contestant] = {
    "ours": ours,
    "orbax": orbax,
    "orbax_v1": orbax_v1,
    "orbax_then_reshape": orbax_then_reshape,
    "tensorstore": tensorstore,
    "safetensors": safetensors,
}


def _disk_keys(model: Model) -> list[tuple[str, ...]]:
    layers = [f"layers_{n}" for n in range(model.layers)] if model.stored == "layers" else ["layers"]
    return [(layer, name, "kernel") for layer in layers for name in model.names]


def _nnx_key(key: tuple[str, ...]) -> tuple[Any, ...]:
    layer, *rest = key
    return ("layers", int(layer.removeprefix("layers_")), *rest) if layer != "layers" else key


def disk_tree(model: Model, sharding: Sharding) -> dict[str, Any]:
    square = (model.width, model.width)
    shape = square if model.stored == "layers" else (model.width, model.layers, model.width)
    leaf = jax.ShapeDtypeStruct(shape, DTYPES[model.dtype], sharding=sharding)
    params: dict[str, Any] = {}
    for layer, name, kernel in _disk_keys(model):
        params.setdefault(layer, {})[name] = {kernel: leaf}
    alone = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return {"params": params, "step": jax.ShapeDtypeStruct((), np.int32, sharding=alone)}


def _of_state(state: Any) -> Arrays:
    return {key: variable.get_value() for key, variable in nnx.to_flat_state(state)}


def of_disk_tree(tree: Any) -> Arrays:
    flat = jax.tree_util.tree_flatten_with_path(tree["params"])[0]
    return {_nnx_key(tuple(key.key for key in keys)): value for keys, value in flat}


def _reshaped(model: Model, params: Any, sharding: Sharding) -> list[tuple[tuple[Any, ...], jax.Array]]:
    if model.stored == model.wanted:
        return list(of_disk_tree({"params": params}).items())
    if model.stored == "stacked":
        take = jax.jit(
            lambda value, n: jax.lax.dynamic_index_in_dim(value, n, 1, False), out_shardings=sharding
        )
        return [
            (("layers", n, name, "kernel"), take(params["layers"][name]["kernel"], n))
            for n in range(model.layers)
            for name in PROJECTIONS
        ]
    stack = jax.jit(lambda values: jnp.stack(values, 1), out_shardings=sharding)
    return [
        (
            ("layers", name, "kernel"),
            stack([params[f"layers_{n}"][name]["kernel"] for n in range(model.layers)]),
        )
        for name in PROJECTIONS
    ]
