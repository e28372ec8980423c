"""One process of several: restores the toy of `benchmarks.simulate` and writes which bytes it read."""

import json
import pathlib

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.simulate import TOY, target_of
from orbax_nnx_handler import restore
from orbax_nnx_handler.storage.reading.base_store import LocalData

SHAPES = {"2 by 4": (2, 4), "8 by 1": (8, 1)}


def main(port: str, count: str, number: str, directory: str) -> None:
    """Joins the others and restores on each mesh, layers stacked and one by one."""
    jax.distributed.initialize(f"127.0.0.1:{port}", int(count), int(number))
    found = {}
    read, before = list[tuple[str, int, int]](), LocalData.read_into

    def noting(self, file, start, buffers):
        read.append((file, start, sum(map(len, buffers))))
        before(self, file, start, buffers)

    LocalData.read_into = noting
    for name, shape in SHAPES.items():
        mesh = Mesh(np.array(jax.devices()).reshape(shape), ("fsdp", "tensor"))
        for stacked in (True, False):
            target, axes = target_of(TOY, stacked=stacked)
            placed = nnx.from_flat_state(
                [
                    (path, _placed(leaf, NamedSharding(mesh, PartitionSpec(*axes[path]))))
                    for path, leaf in nnx.to_flat_state(target)
                ]
            )
            read.clear()
            restore(pathlib.Path(directory) / "toy", placed)
            found[f"{name}, {stacked}"] = sorted(read)
    (pathlib.Path(directory) / f"{number}.json").write_text(json.dumps(found))


def _placed(leaf, sharding):
    value = leaf.get_value()
    return leaf.replace(jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding))
