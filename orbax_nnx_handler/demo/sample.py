"""Text that the model writes by itself."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from orbax_nnx_handler.demo.nnx_model import Decoder, Training
from orbax_nnx_handler.demo.size import Size
from orbax_nnx_handler.demo.text import ENCODED, decode

TEMPERATURE = 0.6


def write_on(training: Training, size: Size, letters: int) -> str:
    """Returns how the model continues the end of the text, drawing from its stream of chance."""
    ending = jnp.asarray(ENCODED[-size.time :])
    written = _write(training.model, ending, jax.random.split(training.sampling(), letters))
    return " ".join(decode(np.asarray(written)).split())


@nnx.jit
def _write(model: Decoder, window: jax.Array, keys: jax.Array) -> jax.Array:
    def write_one(window: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = model(window[None])[0, -1]
        letter = jax.random.categorical(key, logits / TEMPERATURE).astype(window.dtype)
        return jnp.append(window[1:], letter), letter

    return jax.lax.scan(write_one, window, keys)[1]
