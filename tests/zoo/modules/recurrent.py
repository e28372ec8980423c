"""Recurrent cells, alone and over sequences."""

from typing import Any

import flax.linen as nn
from flax import nnx

from tests.zoo.pairs import Pair, values

INPUT = values(2, 3)
CARRY = values(2, 4, seed=1)
LSTM_CARRY = (CARRY, values(2, 4, seed=2))
SEQUENCE = values(2, 5, 3)


class LinenTagger(nn.Module):
    """Cells under Linen's own names: they belong to the model, not to their RNN."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.RNN(nn.OptimizedLSTMCell(4))(x)
        x = nn.Bidirectional(nn.RNN(nn.GRUCell(4)), nn.RNN(nn.SimpleCell(4)))(x)
        return nn.Dense(2, name="tags")(x)


class NnxTagger(nnx.Module):
    """The same; each RNN owns its cell."""

    def __init__(self, rngs: nnx.Rngs):
        self.reader = nnx.RNN(nnx.OptimizedLSTMCell(3, 4, rngs=rngs))
        self.both_ways = nnx.Bidirectional(
            nnx.RNN(nnx.GRUCell(4, 4, rngs=rngs)), nnx.RNN(nnx.SimpleCell(4, 4, rngs=rngs))
        )
        self.tags = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.tags(self.both_ways(self.reader(x)))


PAIRS = (
    Pair(
        linen_name="LSTMCell",
        nnx_name="LSTMCell",
        linen=nn.LSTMCell(4),
        nnx=lambda rngs: nnx.LSTMCell(3, 4, rngs=rngs),
        inputs=(LSTM_CARRY, INPUT),
    ),
    Pair(
        linen_name="LSTMCell",
        nnx_name="OptimizedLSTMCell",
        linen=nn.LSTMCell(4),
        nnx=lambda rngs: nnx.OptimizedLSTMCell(3, 4, rngs=rngs),
        inputs=(LSTM_CARRY, INPUT),
    ),
    Pair(
        linen_name="OptimizedLSTMCell",
        nnx_name="OptimizedLSTMCell",
        linen=nn.OptimizedLSTMCell(4),
        nnx=lambda rngs: nnx.OptimizedLSTMCell(3, 4, rngs=rngs),
        inputs=(LSTM_CARRY, INPUT),
    ),
    Pair(
        linen_name="OptimizedLSTMCell",
        nnx_name="LSTMCell",
        linen=nn.OptimizedLSTMCell(4),
        nnx=lambda rngs: nnx.LSTMCell(3, 4, rngs=rngs),
        inputs=(LSTM_CARRY, INPUT),
    ),
    Pair(
        linen_name="GRUCell",
        nnx_name="GRUCell",
        linen=nn.GRUCell(4),
        nnx=lambda rngs: nnx.GRUCell(3, 4, rngs=rngs),
        inputs=(CARRY, INPUT),
        without_variable=("params/hn/bias",),
    ),
    Pair(
        linen_name="SimpleCell",
        nnx_name="SimpleCell",
        linen=nn.SimpleCell(4),
        nnx=lambda rngs: nnx.SimpleCell(3, 4, rngs=rngs),
        inputs=(CARRY, INPUT),
    ),
    Pair(
        linen_name="SimpleCell",
        nnx_name="SimpleCell",
        variant="residual",
        linen=nn.SimpleCell(4, residual=True),
        nnx=lambda rngs: nnx.SimpleCell(3, 4, residual=True, rngs=rngs),
        inputs=(CARRY, INPUT),
    ),
    Pair(
        linen_name="RNN",
        nnx_name="RNN",
        variant="reversed",
        linen=nn.RNN(nn.LSTMCell(4), reverse=True, keep_order=True),
        nnx=lambda rngs: nnx.RNN(nnx.LSTMCell(3, 4, rngs=rngs), reverse=True, keep_order=True),
        inputs=(SEQUENCE,),
    ),
    Pair(
        linen_name="Bidirectional",
        nnx_name="Bidirectional",
        linen=nn.Bidirectional(nn.RNN(nn.OptimizedLSTMCell(4)), nn.RNN(nn.GRUCell(4))),
        nnx=lambda rngs: nnx.Bidirectional(
            nnx.RNN(nnx.OptimizedLSTMCell(3, 4, rngs=rngs)), nnx.RNN(nnx.GRUCell(3, 4, rngs=rngs))
        ),
        inputs=(SEQUENCE,),
        without_variable=("params/backward_rnn/cell/hn/bias",),
    ),
    Pair(
        linen_name="RNN, Bidirectional",
        nnx_name="RNN, Bidirectional",
        variant="automatic names",
        linen=LinenTagger(),
        nnx=NnxTagger,
        inputs=(SEQUENCE,),
        renames=(
            ("OptimizedLSTMCell_0", "reader/cell"),
            ("GRUCell_0", "both_ways/forward_rnn/cell"),
            ("SimpleCell_0", "both_ways/backward_rnn/cell"),
        ),
        without_variable=("params/GRUCell_0/hn/bias",),
    ),
)
