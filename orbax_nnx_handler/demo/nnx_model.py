"""The program that continues: the same decoder in Flax NNX, with its optimizer."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from orbax_nnx_handler.demo.data import Size


class Block(nnx.Module):
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


class Decoder(nnx.Module):
    """Predicts each letter from those before it."""

    def __init__(self, size: Size, rngs: nnx.Rngs):
        self.letters = nnx.Embed(size.letters, size.width, rngs=rngs)
        self.positions = nnx.Embed(size.time, size.width, rngs=rngs)
        self.blocks = nnx.List([Block(size, rngs) for _ in range(size.layers)])
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
        self.model = Decoder(size, rngs)
        self.optimizer = nnx.Optimizer(self.model, optimizer, wrt=nnx.Param)
        self.sampling = rngs.fork()
