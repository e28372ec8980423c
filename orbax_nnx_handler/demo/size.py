"""How large the demo's model is, the same in both programs."""

import dataclasses

from orbax_nnx_handler.demo.text import LETTERS


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
