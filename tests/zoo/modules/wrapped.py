"""Modules of one API inside a program of the other, by `nnx.bridge`."""

from typing import Any

import flax.linen as nn
from flax import nnx

from tests.zoo.modules.recurrent import INPUT, LSTM_CARRY
from tests.zoo.pairs import Pair, Training, values

X = values(6, 4)


class LinenBody(nn.Module):
    """A Linen module with weights, statistics and a key with slashes."""

    @nn.compact
    def __call__(self, x: Any, *, train: bool = False) -> Any:
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
        return nn.WeightNorm(nn.Dense(3))(nn.tanh(x))


class LinenWhole(nn.Module):
    """The body under a head, all Linen."""

    @nn.compact
    def __call__(self, x: Any, *, train: bool = False) -> Any:
        return nn.Dense(2, name="head")(LinenBody(name="body")(x, train=train))


class NnxAroundLinen(nnx.Module):
    """The same body, kept in Linen, under an NNX head."""

    def __init__(self, rngs: nnx.Rngs):
        self.body = nnx.bridge.ToNNX(LinenBody(), rngs=rngs).lazy_init(X)
        self.head = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x: Any, *, train: bool = False) -> Any:
        mutable = ["batch_stats"] if train else False
        return self.head(self.body(x, train=train, mutable=mutable))


class NnxBody(nnx.Module):
    """An NNX module with weights, statistics and random state."""

    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(4, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.drop = nnx.Dropout(0.5, deterministic=True, rngs=rngs)

    def __call__(self, x: Any, train: bool = False) -> Any:
        return self.drop(self.norm(self.up(x), use_running_average=not train))


class LinenAroundNnx(nn.Module):
    """A Linen program that already uses the NNX module."""

    @nn.compact
    def __call__(self, x: Any, *, train: bool = False) -> Any:
        body = nnx.bridge.to_linen(NnxBody, name="body")
        return nn.Dense(2, name="head")(body(x, train))


class NnxWhole(nnx.Module):
    """The same, all NNX."""

    def __init__(self, rngs: nnx.Rngs):
        self.body = NnxBody(rngs)
        self.head = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x: Any, *, train: bool = False) -> Any:
        return self.head(self.body(x, train))


def inside_nnx(linen_name: str, module: nn.Module, *inputs: Any, **fields: Any) -> Pair:
    """A Linen module without a counterpart in NNX, used from NNX as it is."""
    return Pair(
        linen_name=linen_name,
        nnx_name="bridge.ToNNX",
        variant=f"of {linen_name}",
        linen=module,
        nnx=lambda rngs: nnx.bridge.ToNNX(module, rngs=rngs).lazy_init(*inputs),
        inputs=inputs,
        **fields,
    )


IMAGE = values(2, 4, 4, 3)
IMAGE_CARRY = (values(2, 4, 4, 2, seed=1), values(2, 4, 4, 2, seed=2))
TRAINING = Training(linen={"train": True}, nnx={"train": True})
# They change through gradients only, so no step is made: what came back is compared as it is.
FLOAT8 = "_overwrite_with_gradient"
FLOAT8_STATISTICS = Training(
    linen={},
    nnx={},
    collections=(FLOAT8,),
    statistics=nnx.variable_type_from_name(FLOAT8, allow_register=True),
    steps=0,
)

PAIRS = (
    inside_nnx("Dense", nn.Dense(3), X),
    inside_nnx("OptimizedLSTMCell", nn.OptimizedLSTMCell(4), LSTM_CARRY, INPUT),
    inside_nnx("MGUCell", nn.MGUCell(4), LSTM_CARRY[0], INPUT),
    inside_nnx("ConvLSTMCell", nn.ConvLSTMCell(2, (3, 3)), IMAGE_CARRY, IMAGE),
    inside_nnx("ConvLocal", nn.ConvLocal(3, (2,)), values(2, 4, 3)),
    inside_nnx(
        "Fp8DirectDotGeneralOp",
        nn.Dense(3, dot_general_cls=nn.Fp8DirectDotGeneralOp),
        X,
        training=FLOAT8_STATISTICS,
    ),
    inside_nnx("Fp8DotGeneral", nn.Dense(3, dot_general_cls=nn.Fp8DotGeneral), X, training=FLOAT8_STATISTICS),
    inside_nnx(
        "Fp8Einsum",
        nn.MultiHeadAttention(
            2, qk_attn_weights_einsum_cls=nn.Fp8Einsum, attn_weights_value_einsum_cls=nn.Fp8Einsum
        ),
        values(2, 5, 8),
        training=FLOAT8_STATISTICS,
    ),
    inside_nnx(
        "Bidirectional",
        nn.Bidirectional(nn.RNN(nn.MGUCell(4)), nn.RNN(nn.MGUCell(4, reset_gate=False))),
        values(2, 5, 3),
    ),
    Pair(
        linen_name="several collections",
        nnx_name="bridge.ToNNX",
        variant="inside an NNX model",
        linen=LinenWhole(),
        nnx=NnxAroundLinen,
        inputs=(X,),
        training=TRAINING,
    ),
    Pair(
        linen_name="bridge.ToLinen",
        nnx_name="GRUCell",
        variant="of GRUCell",
        linen=nnx.bridge.ToLinen(nnx.GRUCell, args=(3, 4)),
        nnx=lambda rngs: nnx.GRUCell(3, 4, rngs=rngs),
        inputs=(LSTM_CARRY[0], INPUT),
    ),
    Pair(
        linen_name="bridge.ToLinen",
        nnx_name="several Variable types",
        variant="inside a Linen model",
        linen=LinenAroundNnx(),
        nnx=NnxWhole,
        inputs=(X,),
        training=TRAINING,
    ),
)
