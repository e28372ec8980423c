"""Eight devices on any machine, and where each leaf of the target lives on them."""

from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from orbax_nnx_handler.demo.nnx_model import Training
from orbax_nnx_handler.demo.size import Size

DEVICES = 8


def claim_devices() -> None:
    """Makes the CPU look like eight devices.

    Raises:
        RuntimeError: JAX is running already, so that it is too late.
    """
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    # Two programs in flight share one pool of threads: on few cores each may hold what the other waits for.
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def make_mesh() -> Mesh:
    """Returns a mesh of four by two devices, axes `data` and `model`."""
    return Mesh(np.array(jax.devices()[:DEVICES]).reshape(4, 2), ("data", "model"))


def make_target(size: Size, optimizer: optax.GradientTransformation, mesh: Mesh) -> Training:
    """Returns what the restore must fill: shapes, dtypes and shardings, no values."""
    abstract = nnx.eval_shape(lambda: Training(size, optimizer, nnx.Rngs(1)))
    graphdef, state = nnx.split(abstract)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: _spread(leaf, mesh), state))


def _spread(leaf: jax.ShapeDtypeStruct, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Splits a kernel's last two axes over the mesh, where they divide; copies the rest."""
    axes: list[Any] = [None] * len(leaf.shape)
    if len(leaf.shape) >= 2:
        axes[-2] = "data" if leaf.shape[-2] % mesh.shape["data"] == 0 else None
        axes[-1] = "model" if leaf.shape[-1] % mesh.shape["model"] == 0 else None
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))
