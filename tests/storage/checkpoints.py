"""Small checkpoints as stock Orbax writes them, in each of its formats."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from tests.written import write_once


@dataclasses.dataclass(frozen=True)
class DiskFormat:
    """Settings of the writing handler."""

    ocdbt: bool
    zarr3: bool
    compressed: bool

    def __str__(self):
        packed = "zstd" if self.compressed else "raw"
        return f"{'ocdbt' if self.ocdbt else 'files'}-{'zarr3' if self.zarr3 else 'zarr2'}-{packed}"


FORMATS = [
    DiskFormat(ocdbt, zarr3, compressed)
    for ocdbt in (True, False)
    for zarr3 in (True, False)
    for compressed in (True, False)
]


def numbers(shape, dtype=np.float32, seed=0):
    """Distinct values that every dtype of the tests holds exactly."""
    values = np.random.default_rng(seed).integers(-100, 100, shape)
    return jnp.asarray(values).astype(dtype)


def save(path, tree, disk_format=FORMATS[0], save_args=None):
    """Writes a tree with stock Orbax."""
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=disk_format.ocdbt,
        use_zarr3=disk_format.zarr3,
        use_compression=disk_format.compressed,
    )

    def write(path):
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(path, args=ocp.args.PyTreeSave(tree, save_args=save_args))

    return write_once(path, tree, write, (disk_format, save_args))


def mixed_tree():
    """One leaf of each kind that training programs save."""
    return {
        "params": {
            "dense": {"kernel": numbers((6, 4)), "bias": numbers((4,), jnp.bfloat16)},
            "a/b": numbers((2, 3, 5), np.int8),
            "flag": jnp.asarray([True, False]),
        },
        "opt_state": [{"count": jnp.int32(7), "mu": numbers((6, 4), seed=1)}, None, {}],
        "step": 12,
        "rate": 0.5,
        "host": np.arange(6, dtype=np.float64).reshape(2, 3),
        "name": "a string",
        "key": jax.random.key(3),
        "keys": jax.random.split(jax.random.key(4, impl="rbg"), 3),
        "old_key": jax.random.PRNGKey(5),
    }


def as_remote(checkpoint, *, listed):
    """The same checkpoint as if its store were behind a network."""
    stores = {id(array.store): array.store for array in checkpoint.arrays.values()}
    remote = {
        number: dataclasses.replace(
            store, local=False, catalog=store.catalog if listed else None, seen={}, versions={}
        )
        for number, store in stores.items()
    }
    arrays = {
        path: dataclasses.replace(array, store=remote[id(array.store)])
        for path, array in checkpoint.arrays.items()
    }
    return dataclasses.replace(checkpoint, arrays=arrays)
