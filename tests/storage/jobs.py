"""What a restore asks of the reader."""

import jax
from jax.sharding import SingleDeviceSharding

from orbax_nnx_handler.planning.core.recipes import Read
from orbax_nnx_handler.storage.reading import Job


def one_device():
    return SingleDeviceSharding(jax.devices()[0])


def plain_jobs(checkpoint, sharding=None):
    """One job per leaf, as stored."""
    return [
        Job(
            path=leaf.path,
            recipe=Read(leaf.path),
            shape=leaf.shape,
            dtype=leaf.dtype,
            sharding=sharding or one_device(),
        )
        for leaf in checkpoint.leaves.values()
        if leaf.dtype is not None
    ]
