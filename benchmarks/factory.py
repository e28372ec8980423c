"""A target for the command line, in a module that imports what a user's would: JAX and Flax, no Orbax."""

import dataclasses

import jax
from flax import nnx

from benchmarks.models import sized, target


def wanted(leaves: int, layers_more: int = 0) -> nnx.State:
    """Returns an abstract state of so many leaves: the factory of `plan`."""
    model = sized(leaves, 50_000_000, compressed=True)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return target(dataclasses.replace(model, layers=model.layers + layers_more), place)
