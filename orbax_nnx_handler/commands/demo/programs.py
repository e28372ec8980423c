"""Both programs of the demo: a decoder and its training loop, in Flax Linen and in Flax NNX.

The text is the first six chapters of Lewis Carroll, "Alice's Adventures in
Wonderland" (1865), in the public domain.
"""

import dataclasses
import importlib.resources
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Letters = np.ndarray[tuple[int, int], np.dtype[np.int32]]
"""Letters as numbers, (batch, time + 1): the inputs, and one letter on, the targets."""


def read_text() -> str:
    """Returns the whole text, 71,000 letters."""
    return importlib.resources.files("orbax_nnx_handler.commands.demo").joinpath("text.txt").read_text()


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


def batch_at(step: int, *, size: int, time: int) -> Letters:
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


DEVICES = 8
TEMPERATURE = 0.6
"""Of the text that is sampled."""


def use_virtual_devices() -> None:
    """Makes the CPU look like eight devices.

    Raises:
        RuntimeError: JAX has been initialised already.
    """
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    # Two programs in flight share one pool of threads: on few cores each may hold what the other waits for.
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def make_mesh() -> Mesh:
    """Returns a mesh of four by two devices, axes `data` and `model`."""
    return Mesh(np.array(jax.devices()[:DEVICES]).reshape(4, 2), ("data", "model"))


def make_target(size: Size, optimizer: optax.GradientTransformation, mesh: Mesh) -> Training:
    """Returns what the restore must fill: shapes, dtypes and shardings, no values."""
    abstract = nnx.eval_shape(lambda: Training(size, optimizer, nnx.Rngs(1)))
    graphdef, state = nnx.split(abstract)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: _sharded(leaf, mesh), state))


def _sharded(leaf: jax.ShapeDtypeStruct, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Shards a leaf's last two axes over the mesh where it divides them; replicates the rest."""
    axes: list[Any] = [None] * len(leaf.shape)
    if len(leaf.shape) >= 2:
        axes[-2] = "data" if leaf.shape[-2] % mesh.shape["data"] == 0 else None
        axes[-1] = "model" if leaf.shape[-1] % mesh.shape["model"] == 0 else None
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))


def make_optimizer() -> optax.GradientTransformation:
    """Returns AdamW with clipping, under a rate that warms up and decays."""
    rate = optax.warmup_cosine_decay_schedule(0.0, 3e-3, warmup_steps=20, decay_steps=1000)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98))


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the mean loss of a letter, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def start_linen(size: Size, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state of a Linen program before its first step."""
    model = LinenDecoder(size)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, size.time), jnp.int32))["params"]
    return TrainState.create(apply_fn=model.apply, params=params, tx=optimizer)


@jax.jit
def linen_step(state: TrainState, batch: jax.Array) -> tuple[TrainState, jax.Array]:
    """Returns the state after one step, and the loss before it."""

    def loss(params: Any) -> jax.Array:
        return cross_entropy(state.apply_fn({"params": params}, batch[:, :-1]), batch[:, 1:])

    value, gradients = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=gradients), value


def train_linen(state: TrainState, steps: range, size: Size) -> tuple[TrainState, list[float]]:
    """Returns the state after these steps, and the loss of each."""
    losses: list[jax.Array] = []
    for step in steps:
        state, loss = linen_step(state, jnp.asarray(batch_at(step, size=size.batch, time=size.time)))
        losses.append(loss)
    return state, [float(loss) for loss in losses]


@nnx.jit
def nnx_step(training: Training, batch: jax.Array) -> jax.Array:
    """Takes one step in place; returns the loss before it."""
    value, gradients = nnx.value_and_grad(
        lambda model: cross_entropy(model(batch[:, :-1]), batch[:, 1:]),
    )(training.model)
    training.optimizer.update(training.model, gradients)
    return value


def train_nnx(training: Training, steps: range, size: Size, mesh: Mesh) -> list[float]:
    """Takes these steps in place, each batch sharded over the mesh; returns the loss of each."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    batches = (batch_at(step, size=size.batch, time=size.time) for step in steps)
    return [float(nnx_step(training, jax.device_put(batch, sharding))) for batch in batches]


def sample(training: Training, size: Size, letters: int) -> str:
    """Returns how the model continues the end of the text, sampled with its own random stream."""
    ending = jnp.asarray(ENCODED[-size.time :])
    letters_drawn = _sample(training.model, ending, jax.random.split(training.sampling(), letters))
    return " ".join(decode(np.asarray(letters_drawn)).split())


@nnx.jit
def _sample(model: NNXDecoder, window: jax.Array, keys: jax.Array) -> jax.Array:
    def sample_one(window: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = model(window[None])[0, -1]
        letter = jax.random.categorical(key, logits / TEMPERATURE).astype(window.dtype)
        return jnp.append(window[1:], letter), letter

    return jax.lax.scan(sample_one, window, keys)[1]
