"""A sequence-to-sequence model: one LSTM reads, another writes from its last state."""

from typing import Any

import flax.linen as nn
import numpy as np
import optax
from flax import nnx

from tests.zoo.models.base import ModelPair
from tests.zoo.models.conversion import fused, renamed

VOCABULARY, WIDTH, HIDDEN = 7, 4, 6
GATES = ("i", "f", "g", "o")


class LinenTranslator(nn.Module):
    """The Linen program, its modules under NNX's names."""

    def setup(self) -> None:
        self.source = nn.Embed(VOCABULARY, WIDTH)
        self.reader = nn.RNN(nn.OptimizedLSTMCell(HIDDEN), return_carry=True)
        self.prefix = nn.Embed(VOCABULARY, WIDTH)
        self.writer = nn.RNN(nn.OptimizedLSTMCell(HIDDEN))
        self.head = nn.Dense(VOCABULARY)

    def __call__(self, source: Any, prefix: Any) -> Any:
        carry, _ = self.reader(self.source(source))
        return self.head(self.writer(self.prefix(prefix), initial_carry=carry))


class LinenSummary(nn.Module):
    """A GRU whose last output is classified."""

    def setup(self) -> None:
        self.source = nn.Embed(VOCABULARY, WIDTH)
        self.reader = nn.RNN(nn.GRUCell(HIDDEN))
        self.head = nn.Dense(3)

    def __call__(self, source: Any) -> Any:
        return self.head(self.reader(self.source(source))[:, -1])


class NnxSummary(nnx.Module):
    """The same; its cell has no `hn/bias`."""

    def __init__(self, rngs: nnx.Rngs):
        self.source = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.reader = nnx.RNN(nnx.GRUCell(WIDTH, HIDDEN, rngs=rngs))
        self.head = nnx.Linear(HIDDEN, 3, rngs=rngs)

    def __call__(self, source: Any) -> Any:
        return self.head(self.reader(self.source(source))[:, -1])


class LinenAutoTranslator(nn.Module):
    """The same under Linen's own names."""

    @nn.compact
    def __call__(self, source: Any, prefix: Any) -> Any:
        read = nn.RNN(nn.OptimizedLSTMCell(HIDDEN), return_carry=True)
        carry, _ = read(nn.Embed(VOCABULARY, WIDTH)(source))
        write = nn.RNN(nn.OptimizedLSTMCell(HIDDEN))
        return nn.Dense(VOCABULARY)(write(nn.Embed(VOCABULARY, WIDTH)(prefix), initial_carry=carry))


class NnxTranslator(nnx.Module):
    """The NNX program. It creates the writer first: order tells nothing here."""

    def __init__(self, rngs: nnx.Rngs):
        self.writer = nnx.RNN(nnx.OptimizedLSTMCell(WIDTH, HIDDEN, rngs=rngs))
        self.prefix = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.reader = nnx.RNN(nnx.OptimizedLSTMCell(WIDTH, HIDDEN, rngs=rngs), return_carry=True)
        self.source = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.head = nnx.Linear(HIDDEN, VOCABULARY, rngs=rngs)

    def __call__(self, source: Any, prefix: Any) -> Any:
        carry, _ = self.reader(self.source(source))
        return self.head(self.writer(self.prefix(prefix), initial_carry=carry))


BATCH = (
    np.arange(20).reshape(4, 5) * 3 % VOCABULARY,
    np.arange(16).reshape(4, 4) * 5 % VOCABULARY,
)
LABELS = np.roll(BATCH[1], -1, axis=1)
OPTIMIZER = optax.MultiSteps(optax.adam(1e-2, eps=1e-4), every_k_schedule=2).gradient_transformation()

MODELS = (
    ModelPair(
        name="seq2seq LSTM",
        linen=LinenTranslator(),
        nnx=NnxTranslator,
        inputs=BATCH,
        labels=LABELS,
        optimizer=OPTIMIZER,
        optimizer_name="adam in MultiSteps",
        as_nnx=lambda leaves: fused(leaves, GATES),
    ),
    ModelPair(
        name="seq2seq LSTM, automatic names",
        linen=LinenAutoTranslator(),
        nnx=NnxTranslator,
        inputs=BATCH,
        labels=LABELS,
        optimizer=OPTIMIZER,
        optimizer_name="adam in MultiSteps",
        as_nnx=lambda leaves: fused(
            renamed(
                leaves,
                ("OptimizedLSTMCell_0", "reader/cell"),
                ("OptimizedLSTMCell_1", "writer/cell"),
                ("Embed_0", "source"),
                ("Embed_1", "prefix"),
                ("Dense_0", "head"),
            ),
            GATES,
        ),
        renames=(
            ("OptimizedLSTMCell_0", "reader/cell"),
            ("OptimizedLSTMCell_1", "writer/cell"),
            ("Embed_0", "source"),
            ("Embed_1", "prefix"),
            ("Dense_0", "head"),
        ),
        determined="nothing",
    ),
    ModelPair(
        name="GRU classifier, its one extra bias at zero",
        linen=LinenSummary(),
        nnx=NnxSummary,
        inputs=BATCH[:1],
        labels=np.arange(4) % 3,
        optimizer=optax.adamw(1e-2, eps=1e-4),
        optimizer_name="adamw",
        as_nnx=lambda leaves: fused(leaves, ("r", "z", "n")),
        without_variable=("reader/cell/hn/bias",),
    ),
)
