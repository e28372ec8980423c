"""Both programs of the demo: the text that they learn, and one decoder, in Flax Linen and in Flax NNX.

The text is the first six chapters of Lewis Carroll, "Alice's Adventures in
Wonderland" (1865), in the public domain.
"""

import dataclasses
import importlib.resources

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx

Batch = np.ndarray[tuple[int, int], np.dtype[np.int32]]
"""Letters as numbers, (batch, time + 1): the inputs, and one letter on, the targets."""


def read_text() -> str:
    """Returns the whole text, 71,000 letters."""
    return importlib.resources.files("orbax_nnx_handler.demo").joinpath("text.txt").read_text()


TEXT = read_text()
LETTERS = sorted(set(TEXT))


def encode(text: str) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    """Returns the number of each letter in `LETTERS`."""
    number = {letter: index for index, letter in enumerate(LETTERS)}
    return np.array([number[letter] for letter in text], np.int32)


def decode(numbers: np.ndarray[tuple[int], np.dtype[np.int32]]) -> str:
    """Returns the letters of such numbers."""
    return "".join(LETTERS[number] for number in numbers)


ENCODED = encode(TEXT)


def batch_at(step: int, *, size: int, time: int) -> Batch:
    """Returns the batch of one step, (size, time + 1); the same in every program and every run."""
    starts = np.random.default_rng(step).integers(0, len(ENCODED) - time - 1, size)
    return ENCODED[starts[:, None] + np.arange(time + 1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """A small decoder transformer.

    Attributes:
        layers: Blocks, one after the other.
        width: Features of each letter between the blocks.
        heads: Attention heads in each block.
        time: The longest text the model sees, in letters.
        letters: Different letters.
        batch: Excerpts in each training step.
    """

    layers: int = 3
    width: int = 96
    heads: int = 4
    time: int = 64
    letters: int = len(LETTERS)
    batch: int = 16


class LinenBlock(nn.Module):
    """Attention to earlier letters, then two dense layers."""

    size: Size

    def setup(self) -> None:
        """Names the parts, which become names on disk."""
        self.norm_attention = nn.LayerNorm()
        self.attention = nn.MultiHeadDotProductAttention(num_heads=self.size.heads)
        self.norm_mlp = nn.LayerNorm()
        self.wide = nn.Dense(4 * self.size.width)
        self.narrow = nn.Dense(self.size.width)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the block's output, (batch, time, width) as its input."""
        x = x + self.attention(self.norm_attention(x), mask=nn.make_causal_mask(x[..., 0]))
        return x + self.narrow(nn.gelu(self.wide(self.norm_mlp(x))))


class LinenDecoder(nn.Module):
    """Predicts each letter from those before it."""

    size: Size

    def setup(self) -> None:
        """Names the parts; those of a list become `blocks_0`, `blocks_1` and so on."""
        self.letters = nn.Embed(self.size.letters, self.size.width)
        self.positions = nn.Embed(self.size.time, self.size.width)
        self.blocks = [LinenBlock(self.size) for _ in range(self.size.layers)]
        self.norm = nn.LayerNorm()
        self.head = nn.Dense(self.size.letters)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns logits, (batch, time, letters), for tokens (batch, time)."""
        x = self.letters(tokens) + self.positions(jnp.arange(tokens.shape[-1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class NNXBlock(nnx.Module):
    """Attention to earlier letters, then two dense layers."""

    def __init__(self, size: Size, rngs: nnx.Rngs):
        width = size.width
        self.norm_attention = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(size.heads, width, decode=False, rngs=rngs)
        self.norm_mlp = nnx.LayerNorm(width, rngs=rngs)
        self.wide = nnx.Linear(width, 4 * width, rngs=rngs)
        self.narrow = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the block's output, (batch, time, width) as its input."""
        x = x + self.attention(self.norm_attention(x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.narrow(nnx.gelu(self.wide(self.norm_mlp(x))))


class NNXDecoder(nnx.Module):
    """Predicts each letter from those before it."""

    def __init__(self, size: Size, rngs: nnx.Rngs):
        self.letters = nnx.Embed(size.letters, size.width, rngs=rngs)
        self.positions = nnx.Embed(size.time, size.width, rngs=rngs)
        self.blocks = nnx.List([NNXBlock(size, rngs) for _ in range(size.layers)])
        self.norm = nnx.LayerNorm(size.width, rngs=rngs)
        self.head = nnx.Linear(size.width, size.letters, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns logits, (batch, time, letters), for tokens (batch, time)."""
        x = self.letters(tokens) + self.positions(jnp.arange(tokens.shape[-1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Training(nnx.Module):
    """All that training needs: the model, its optimizer, and a random stream to sample with."""

    def __init__(self, size: Size, optimizer: optax.GradientTransformation, rngs: nnx.Rngs):
        self.model = NNXDecoder(size, rngs)
        self.optimizer = nnx.Optimizer(self.model, optimizer, wrt=nnx.Param)
        self.sampling = rngs.fork()
