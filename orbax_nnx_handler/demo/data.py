"""What both programs of the demo share: the text that they learn, its batches, and the model's size.

The text is the first six chapters of Lewis Carroll, "Alice's Adventures in
Wonderland" (1865), in the public domain.
"""

import dataclasses
import importlib.resources

import numpy as np

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
