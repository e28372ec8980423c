"""A user's file: what a Linen and an NNX program compute, for `orbax-nnx verify`."""

import numpy as np

from tests.cli.conftest import AutoNamed

X = np.linspace(-1, 1, 32, dtype="f").reshape(2, 16)
RULES = [("Dense_0", "embed"), ("LayerNorm_0", "norm"), ("Dense_1", "head")]
EXCHANGED = [("LayerNorm_0/bias", "norm/scale"), ("LayerNorm_0/scale", "norm/bias"), RULES[0], RULES[2]]


def linen_apply(variables, x):
    return AutoNamed().apply({"params": variables["params"]}, x)


def nnx_apply(model, x):
    return model(x)


inputs = (X,)
PAIR = (linen_apply, nnx_apply, inputs)
WRONG = (linen_apply, lambda model, x: 2 * model(x), inputs)
NAMED = {"linen_apply": linen_apply, "nnx_apply": nnx_apply, "inputs": [X]}


def pair():
    return PAIR


def broken():
    raise OSError("no such weights")


def fails(model, x):
    raise ValueError("wants rngs")


FAILS = (linen_apply, fails, inputs)
NO_PAIR = (linen_apply, inputs)
