"""The program that wrote the checkpoint: a pre-norm decoder in Flax Linen."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from orbax_nnx_handler.demo.data import Size


class Block(nn.Module):
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


class Decoder(nn.Module):
    """Predicts each letter from those before it."""

    size: Size

    def setup(self) -> None:
        """Names the parts; those of a list become `blocks_0`, `blocks_1` and so on."""
        self.letters = nn.Embed(self.size.letters, self.size.width)
        self.positions = nn.Embed(self.size.time, self.size.width)
        self.blocks = [Block(self.size) for _ in range(self.size.layers)]
        self.norm = nn.LayerNorm()
        self.head = nn.Dense(self.size.letters)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns logits, (batch, time, letters), for tokens (batch, time)."""
        x = self.letters(tokens) + self.positions(jnp.arange(tokens.shape[-1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
