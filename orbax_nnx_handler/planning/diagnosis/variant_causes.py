"""Causes that are variants of one model: without biases, with tied embeddings, quantised."""

import dataclasses
from typing import ClassVar

from orbax_nnx_handler.planning.diagnosis.causes import Cause, counted, listed
from orbax_nnx_handler.planning.leaves import Shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoBias(Cause):
    """The checkpoint's modules have no bias.

    Attributes:
        count: Missing biases.
        modules: The names of their modules; empty where no module at all has a stored bias.
    """

    count: int
    modules: tuple[str, ...]
    may_begin_anew: ClassVar[bool] = True

    def _cause(self) -> str:
        where = f"no {listed(self.modules)} has a stored bias" if self.modules else "no bias is stored at all"
        return (
            f"{where}, while the other weights of the same modules are there: the checkpoint's modules were "
            f"built without ({counted(self.count, 'bias', 'biases')} missing)."
        )

    def _way(self) -> str:
        return "build the target's with use_bias=False. A bias that begins at zero computes the same."


@dataclasses.dataclass(frozen=True, kw_only=True)
class TiedEmbedding(Cause):
    """An output layer is missing that has the shape of a stored embedding, turned.

    Attributes:
        output: The missing weight, as its path is written.
        shape: Its shape.
        embedding: The stored embedding.
    """

    output: str
    shape: Shape
    embedding: str
    may_begin_anew: ClassVar[bool] = True

    def _cause(self) -> str:
        return (
            f"nothing is stored for {self.output}, and its shape {self.shape} is that of {self.embedding} "
            "turned: the checkpoint's model may use its embedding as output layer (tied)."
        )

    def _way(self) -> str:
        return (
            "if so, build the target tied as well (nnx.Embed.attend); "
            "an output layer of its own begins untrained."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantised(Cause):
    """Integers stand where floats are wanted, with scales beside them.

    Attributes:
        dtype: The stored dtype.
        scales: The names of the leaves beside them.
        count: How many.
    """

    dtype: str
    scales: tuple[str, ...]
    count: int

    def _cause(self) -> str:
        weights = "1 weight is" if self.count == 1 else f"{self.count} weights are"
        scales = listed(self.scales)
        return f"{weights} stored as {self.dtype} with {scales} beside: the checkpoint is quantised."

    def _way(self) -> str:
        return (
            "restore the checkpoint from before, or dequantise in the program that wrote it: "
            "an integer never becomes a float here."
        )
