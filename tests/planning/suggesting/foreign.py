"""Linen models of known programs and NNX models by somebody else: both sides, and what is proposed."""

import functools
import math

import jax
import numpy as np
from flax import nnx, traverse_util

from orbax_nnx_handler.planning.core.leaves import StoredLeaf
from orbax_nnx_handler.planning.options import RestoreOptions
from orbax_nnx_handler.planning.suggesting import propose
from orbax_nnx_handler.planning.target import flatten_target
from tests.planning.suggesting.pairs import FOREIGN, keys

KINDS = {"params": nnx.Param, "batch_stats": nnx.BatchStat}


def target_of(pair):
    flat = [
        (keys(path), KINDS.get(kind, nnx.Variable)(jax.ShapeDtypeStruct(tuple(shape), "float32")))
        for path, (shape, kind) in pair["wanted"].items()
    ]
    return nnx.from_flat_state(flat)


def arrays_of(pair):
    """Returns the stored leaves; no element of a model is the same as another."""
    found, first = {}, 1
    for path, shape in pair["stored"].items():
        size = math.prod(shape)
        found[path] = np.arange(first, first + size, dtype="float32").reshape(shape)
        first += size
    assert first < 2**24
    return found


def nested(arrays):
    return traverse_util.unflatten_dict(arrays, sep="/")


@functools.cache
def proposed(name):
    pair = FOREIGN[name]
    stored = {
        tuple(path.split("/")): StoredLeaf(
            path=tuple(path.split("/")), shape=tuple(shape), dtype=np.dtype("float32")
        )
        for path, shape in pair["stored"].items()
    }
    return propose(flatten_target(target_of(pair)), stored, RestoreOptions.of(policy="warn"))
