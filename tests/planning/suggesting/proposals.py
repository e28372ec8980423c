"""What is proposed for two trees of shapes, and the values that come under it."""

import jax
import numpy as np
from flax import nnx, traverse_util

from orbax_nnx_handler import from_linen, suggest
from orbax_nnx_handler.planning.options import RestoreOptions
from orbax_nnx_handler.planning.suggesting import propose
from orbax_nnx_handler.planning.target import flatten_target
from tests.planning.plans import leaves_of, params, stored_of

DENSE = {"kernel": (2, 3), "bias": (3,)}
OTHER = {"kernel": (3, 2), "bias": (2,)}


def arrays(tree):
    """Returns a nested tree of shapes as one of zeros."""
    if isinstance(tree, dict):
        return {key: arrays(part) for key, part in tree.items()}
    return np.zeros(tree, "float32")


def proposal(wanted, stored, order=None):
    """Returns what is proposed for two nested trees of shapes."""
    target = flatten_target(nnx.State(params(wanted)))
    return propose(target, stored_of(leaves_of({"params": arrays(stored)})), RestoreOptions.of(), order)


class Model(nnx.Module):
    """A module with parameters of the shapes in a nested tree; what numbers name is a list."""

    def __init__(self, tree):
        for name, held in tree.items():
            if isinstance(held, tuple):
                setattr(self, name, nnx.Param(np.zeros(held, "f")))
            elif 0 in held:
                setattr(self, name, nnx.List([Model(held[at]) for at in sorted(held)]))
            else:
                setattr(self, name, Model(held))


def filled(shapes):
    """Returns a nested tree with every element another number."""
    found, first = {}, 0.0
    for path, shape in shapes.items():
        size = int(np.prod(shape))
        found[path] = first + np.arange(size, dtype="float32").reshape(shape)
        first += size
    return found


def proposed(stored, wanted):
    """Returns what is proposed, and the wanted values under its rules; without those left open."""
    found = suggest(variables_of(stored), abstract(wanted))
    values = restored(stored, wanted, found.renames)
    unmatched = {"/".join(map(str, path)) for path in found.unmatched_wanted}
    return found, {path: value for path, value in values.items() if path not in unmatched}


def restored(stored, wanted, rules):
    """Returns the wanted values under some rules; zeros for what none is stored of."""
    state = from_linen(
        variables_of(stored), abstract(wanted), renames=rules, policy="warn", unexpected="ignore"
    )
    return {"/".join(map(str, path)): np.asarray(leaf.get_value()) for path, leaf in nnx.to_flat_state(state)}


def variables_of(stored):
    """Returns the variables of a Linen program whose params are given by their paths."""
    return {"params": traverse_util.unflatten_dict(stored, sep="/")}


def abstract(wanted):
    """Returns a target with leaves of the given shapes."""
    return nnx.from_flat_state(
        [
            (
                tuple(int(key) if key.isdecimal() else key for key in path.split("/")),
                nnx.Param(jax.ShapeDtypeStruct(shape, "float32")),
            )
            for path, shape in wanted.items()
        ]
    )


def check(values, expected):
    assert values.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(values[path], value, err_msg=path)
