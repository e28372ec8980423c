"""A pre-norm decoder transformer: layers scanned or one by one, tied embeddings or not."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from tests.zoo.models.base import Flat, ModelPair
from tests.zoo.models.conversion import numbered, renamed, stacked, unstacked

# No other axis is as long as the layers are many.
VOCABULARY, LENGTH, WIDTH, HIDDEN, HEADS, DEPTH = 11, 6, 12, 10, 3, 2


class LinenBlock(nn.Module):
    """Attention and a feed-forward layer, each after its norm; returns a pair for `nn.scan`."""

    named: bool

    @nn.compact
    def __call__(self, x: Any, _: Any = None) -> tuple[Any, None]:
        def name(text: str) -> str | None:
            return text if self.named else None

        mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
        y = nn.LayerNorm(name=name("attention_norm"))(x)
        x = x + nn.MultiHeadDotProductAttention(HEADS, name=name("attention"))(y, mask=mask)
        y = nn.LayerNorm(name=name("mlp_norm"))(x)
        y = nn.gelu(nn.Dense(HIDDEN, name=name("up"))(y))
        return x + nn.Dense(WIDTH, name=name("down"))(y), None


class LinenDecoder(nn.Module):
    """The Linen program; `named` gives the modules NNX's names."""

    scanned: bool = False
    tied: bool = False
    named: bool = True

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        def name(text: str) -> str | None:
            return text if self.named else None

        embed = nn.Embed(VOCABULARY, WIDTH, name=name("embed"))
        positions = self.param("positions", nn.initializers.normal(), (LENGTH, WIDTH))
        x = embed(tokens) + positions
        if self.scanned:
            lifted = nn.scan(
                LinenBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=DEPTH
            )
            x, _ = lifted(self.named, name=name("layers"))(x, None)
        else:
            for index in range(DEPTH):
                x, _ = LinenBlock(self.named, name=name(f"layers_{index}"))(x)
        x = nn.LayerNorm(name=name("final_norm"))(x)
        return embed.attend(x) if self.tied else nn.Dense(VOCABULARY, name=name("head"))(x)


class NnxBlock(nnx.Module):
    """Attention and a feed-forward layer, each after its norm."""

    def __init__(self, rngs: nnx.Rngs):
        self.attention_norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, WIDTH, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        mask = nnx.make_causal_mask(jnp.ones(x.shape[:2]))
        x = x + self.attention(self.attention_norm(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class NnxDecoder(nnx.Module):
    """The NNX program."""

    def __init__(self, rngs: nnx.Rngs, *, scanned: bool = False, tied: bool = False):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.positions = nnx.Param(jnp.zeros((LENGTH, WIDTH)))
        self.layers = self._stack(rngs) if scanned else nnx.List([NnxBlock(rngs) for _ in range(DEPTH)])
        self.final_norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.data(None) if tied else nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, tokens: Any) -> Any:
        x = self.embed(tokens) + self.positions[...]
        if isinstance(self.layers, nnx.List):
            for block in self.layers:
                x = block(x)
        else:
            x = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
                x, self.layers
            )
        x = self.final_norm(x)
        return self.embed.attend(x) if self.head is None else self.head(x)

    @staticmethod
    @nnx.split_rngs(splits=DEPTH)
    @nnx.vmap
    def _stack(rngs: nnx.Rngs) -> NnxBlock:
        return NnxBlock(rngs)


BATCH = (np.arange(4 * LENGTH).reshape(4, LENGTH) * 7 % VOCABULARY,)
LABELS = np.roll(BATCH[0], -1, axis=1)
OPTIMIZER = optax.adamw(1e-2, eps=1e-4, weight_decay=1e-2)

BLOCK_NAMES = (
    ("LayerNorm_0", "attention_norm"),
    ("MultiHeadDotProductAttention_0", "attention"),
    ("LayerNorm_1", "mlp_norm"),
    ("Dense_0", "up"),
    ("Dense_1", "down"),
)
MODEL_NAMES = (("Embed_0", "embed"), ("LayerNorm_0", "final_norm"), ("Dense_0", "head"))


def converted(leaves: Flat, *, stored_scanned: bool, wanted_scanned: bool) -> Flat:
    """Returns a Linen decoder's leaves by NNX path, layers stacked or taken apart."""
    leaves = numbered(leaves)
    if stored_scanned == wanted_scanned:
        return leaves
    return stacked(leaves, "layers") if wanted_scanned else unstacked(leaves, "layers")


def unnamed(leaves: Flat, *, blocks: str, layers: str, scanned: bool) -> Flat:
    """Returns an automatically named decoder's leaves by NNX path."""
    whole = tuple((f"^{stored}", wanted) for stored, wanted in MODEL_NAMES)
    renamed_leaves = renamed(leaves, *whole, (blocks, layers), *BLOCK_NAMES)
    return unstacked(renamed_leaves, "layers") if scanned else renamed_leaves


def decoder(name: str, linen: LinenDecoder, **fields: Any) -> ModelPair:
    """A pair of decoders on the same batch."""
    return ModelPair(
        name=name,
        linen=linen,
        inputs=BATCH,
        labels=LABELS,
        optimizer=OPTIMIZER,
        optimizer_name="adamw",
        **fields,
    )


def named(stored_scanned: bool, wanted_scanned: bool) -> ModelPair:
    """One of the four ways from scanned or not to scanned or not."""
    words = {True: "scanned", False: "unscanned"}
    return decoder(
        f"decoder, {words[stored_scanned]} to {words[wanted_scanned]}",
        LinenDecoder(scanned=stored_scanned),
        rearranged=stored_scanned != wanted_scanned,
        nnx=lambda rngs: NnxDecoder(rngs, scanned=wanted_scanned),
        as_nnx=lambda leaves: converted(leaves, stored_scanned=stored_scanned, wanted_scanned=wanted_scanned),
    )


MODELS = (
    named(True, True),
    named(True, False),
    named(False, True),
    named(False, False),
    decoder(
        "decoder, tied embeddings",
        LinenDecoder(tied=True),
        nnx=lambda rngs: NnxDecoder(rngs, tied=True),
        as_nnx=numbered,
    ),
    decoder(
        "decoder, automatic names",
        LinenDecoder(named=False),
        nnx=NnxDecoder,
        as_nnx=lambda leaves: unnamed(leaves, blocks=r"^LinenBlock_(\d)", layers=r"layers/\1", scanned=False),
        renames=(
            *((f"LinenBlock_{{i}}/{stored}", f"layers/{{i}}/{wanted}") for stored, wanted in BLOCK_NAMES),
            *MODEL_NAMES,
        ),
        determined="shapes and order",
    ),
    decoder(
        "decoder, scanned, automatic names",
        LinenDecoder(scanned=True, named=False),
        nnx=NnxDecoder,
        as_nnx=lambda leaves: unnamed(leaves, blocks="^ScanLinenBlock_0", layers="layers", scanned=True),
        renames=(
            *((f"ScanLinenBlock_0/{stored}", f"layers/{wanted}") for stored, wanted in BLOCK_NAMES),
            *MODEL_NAMES,
        ),
        determined="shapes and order",
    ),
)
