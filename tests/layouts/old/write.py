"""Writes the checkpoints beside this file; needs an old Orbax, not the one of the suite.

    python -m venv old && old/bin/pip install jax==0.4.13 jaxlib==0.4.13 flax==0.7.0 \
        orbax-checkpoint==0.2.3 'numpy<1.26' 'tensorstore<0.1.46' 'scipy<1.12'
    old/bin/python write.py orbax_0.2.3

and the same with jax==0.4.20, flax==0.7.5, orbax-checkpoint==0.4.2 for `orbax_0.4.2`,
with jax==0.4.28, flax==0.8.3, orbax-checkpoint==0.5.3 for `orbax_0.5.3`.
The values are what `tree` says, so the tests compute them and read none of ours.
"""

import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp


def tree():
    """A train state as a Linen program of that time saved it."""
    params = {
        "dense": {
            "kernel": np.arange(12, dtype=np.float32).reshape(3, 4) / 7,
            "bias": np.arange(4, dtype=np.float32) - 1.5,
        },
        "embed": {"embedding": np.arange(10, dtype=np.float32).reshape(5, 2).astype(jnp.bfloat16)},
    }
    moments = jax.tree_util.tree_map(lambda leaf: leaf + 1, params)
    opt_state = ({"count": np.int32(3), "mu": moments}, None)
    return {"params": params, "opt_state": opt_state, "step": np.int32(3)}


def main(name):
    root = pathlib.Path(__file__).parent / name
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    arrays = jax.tree_util.tree_map(jnp.asarray, tree())
    aggregate = jax.tree_util.tree_map(lambda _: ocp.SaveArgs(aggregate=True), arrays)
    mixed = jax.tree_util.tree_map(lambda leaf: ocp.SaveArgs(aggregate=leaf.ndim < 2), arrays)
    plain = jax.tree_util.tree_map(lambda _: ocp.SaveArgs(), arrays)
    kinds = {
        "orbax_0.2.3": [("zarr", False, plain), ("msgpack", False, aggregate), ("mixed", False, mixed)],
        "orbax_0.4.2": [("ocdbt", True, plain)],
        "orbax_0.5.3": [("mixed", True, mixed)],
    }
    for kind, use_ocdbt, save_args in kinds[name]:
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=use_ocdbt)
        checkpointer = ocp.Checkpointer(handler)
        checkpointer.save(root / kind, arrays, save_args=save_args)


if __name__ == "__main__":
    main(sys.argv[1])
