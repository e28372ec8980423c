"""Recurrent models."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from tests.verifying.twins.twin import Twin

# A BiLSTM.


class LinenBiLstm(nn.Module):
    @nn.compact
    def __call__(self, x):
        forward = nn.RNN(nn.LSTMCell(8, name="forward_cell"), name="forward_lstm")
        backward = nn.RNN(
            nn.LSTMCell(8, name="backward_cell"), reverse=True, keep_order=True, name="backward_lstm"
        )
        return nn.Dense(3, name="output")(nn.Bidirectional(forward, backward)(x))


class BiLstm(nnx.Module):
    def __init__(self, rngs):
        self.fwd = nnx.RNN(nnx.LSTMCell(8, 8, rngs=rngs), rngs=rngs)
        self.bwd = nnx.RNN(nnx.LSTMCell(8, 8, rngs=rngs), reverse=True, keep_order=True, rngs=rngs)
        self.classifier = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        return self.classifier(jnp.concatenate([self.fwd(x), self.bwd(x)], -1))


BILSTM = Twin(
    name="bilstm",
    linen=LinenBiLstm(),
    make=lambda: BiLstm(nnx.Rngs(0)),
    inputs=(np.random.default_rng(2).normal(size=(2, 5, 8)).astype("f"),),
    rules=[("forward_cell", "fwd/cell"), ("backward_cell", "bwd/cell"), ("output", "classifier")],
)


# A classifier like flax's example on movie reviews: a cell of one matrix, sequences of several lengths.


class LinenLstm(nn.Module):
    @functools.partial(
        nn.transforms.scan, variable_broadcast="params", in_axes=1, out_axes=1, split_rngs={"params": False}
    )
    @nn.compact
    def __call__(self, carry, x):
        return nn.OptimizedLSTMCell(8)(carry, x)


def flipped(x: Any, lengths: Any) -> Any:
    """Returns sequences turned round, each within its length."""
    at = jnp.arange(x.shape[1])[None]
    turned = jnp.where(at < lengths[:, None], lengths[:, None] - 1 - at, at)
    return jnp.take_along_axis(x, turned[..., None], 1)


class LinenReviews(nn.Module):
    def setup(self):
        self.embedder = nn.Embed(17, 6)
        self.forward_lstm, self.backward_lstm = LinenLstm(), LinenLstm()
        self.keys, self.energy = nn.Dense(8, use_bias=False), nn.Dense(1, use_bias=False)
        self.intermediate_layer, self.output_layer = nn.Dense(8), nn.Dense(2, use_bias=False)

    def __call__(self, tokens, lengths):
        x = self.embedder(tokens)
        zeros = (jnp.zeros((len(x), 8)), jnp.zeros((len(x), 8)))
        _, forward = self.forward_lstm(zeros, x)
        _, backward = self.backward_lstm(zeros, flipped(x, lengths))
        x = jnp.concatenate([forward, flipped(backward, lengths)], -1)
        scores = self.energy(nn.tanh(self.keys(x)))[..., 0]
        scores = jnp.where(jnp.arange(x.shape[1]) < lengths[:, None], scores, -jnp.inf)
        x = jnp.einsum("bt,btd->bd", nn.softmax(scores), x)
        return self.output_layer(nn.tanh(self.intermediate_layer(x)))


class Reviews(nnx.Module):
    def __init__(self, rngs, activation=jnp.tanh, with_lengths=True):
        self.embed = nnx.Embed(17, 6, rngs=rngs)
        self.fwd = nnx.RNN(nnx.OptimizedLSTMCell(6, 8, rngs=rngs), rngs=rngs)
        self.bwd = nnx.RNN(nnx.OptimizedLSTMCell(6, 8, rngs=rngs), reverse=True, keep_order=True, rngs=rngs)
        self.att_hidden = nnx.Linear(16, 8, use_bias=False, rngs=rngs)
        self.att_score = nnx.Linear(8, 1, use_bias=False, rngs=rngs)
        self.fc1, self.fc2 = nnx.Linear(16, 8, rngs=rngs), nnx.Linear(8, 2, use_bias=False, rngs=rngs)
        self.activation, self.with_lengths = activation, with_lengths

    def __call__(self, tokens, lengths):
        x = self.embed(tokens)
        known = lengths if self.with_lengths else None
        x = jnp.concatenate([self.fwd(x, seq_lengths=known), self.bwd(x, seq_lengths=known)], -1)
        scores = self.att_score(jnp.tanh(self.att_hidden(x)))[..., 0]
        scores = jnp.where(jnp.arange(x.shape[1]) < lengths[:, None], scores, -jnp.inf)
        x = (nnx.softmax(scores)[..., None] * x).sum(1)
        return self.fc2(self.activation(self.fc1(x)))


REVIEWS = Twin(
    name="reviews",
    linen=LinenReviews(),
    make=lambda **changed: Reviews(nnx.Rngs(0), **changed),
    inputs=(np.arange(10).reshape(2, 5) % 17, np.array([5, 3])),
    rules=[
        ("embedder", "embed"),
        ("forward_lstm/OptimizedLSTMCell_0", "fwd/cell"),
        ("backward_lstm/OptimizedLSTMCell_0", "bwd/cell"),
        ("keys", "att_hidden"),
        ("energy", "att_score"),
        ("intermediate_layer", "fc1"),
        ("output_layer", "fc2"),
    ],
    faults={
        "another activation": ({"activation": nnx.relu}, "(root)"),
        "lengths left out": ({"with_lengths": False}, "(root)"),
    },
)
