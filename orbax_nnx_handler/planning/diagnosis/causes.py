"""Why a plan does not fit: each cause a type, with its evidence and its way out.

A cause is only named where the plan holds the evidence; `cause` says what that
evidence is, in one sentence, and `hint` what to do about it.
"""

import dataclasses
from abc import ABC, abstractmethod

from orbax_nnx_handler.planning.paths import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cause(ABC):
    """One reason why a checkpoint does not become a target.

    Attributes:
        paths: The leaves that it explains, wanted ones before stored ones.
    """

    paths: tuple[Path, ...]

    @property
    def cause(self) -> str:
        """What differs, and how that shows: one sentence."""
        return self._cause()

    @property
    def hint(self) -> str:
        """The way out: what to change or to pass."""
        return self._hint()

    @abstractmethod
    def _cause(self) -> str: ...

    @abstractmethod
    def _hint(self) -> str: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoOptimizer(Cause):
    """The checkpoint holds no optimizer state.

    Attributes:
        moments: Optimizer leaves that the target wants.
        weights: Weights that the checkpoint gives, or None if not all of them.
    """

    moments: int
    weights: int | None

    def _cause(self) -> str:
        found = f"all {self.weights} weights are there" if self.weights is not None else "weights are there"
        return f"no optimizer was saved: {found}, and 0 of the optimizer's {self.moments} leaves."

    def _hint(self) -> str:
        return _FRESH_OPTIMIZER


@dataclasses.dataclass(frozen=True, kw_only=True)
class OtherOptimizer(Cause):
    """The stored optimizer keeps other moments than the target's.

    Attributes:
        stored: Names of the stored moments.
        wanted: Names of the wanted ones.
    """

    stored: tuple[str, ...]
    wanted: tuple[str, ...]

    def _cause(self) -> str:
        stored = " and ".join(self.stored) or "no moments"
        return (
            f"the checkpoint was written with another optimizer: it keeps {stored}, "
            f"the target's wants {' and '.join(self.wanted)}."
        )

    def _hint(self) -> str:
        return _FRESH_OPTIMIZER


_FRESH_OPTIMIZER = (
    "restore the weights alone: pass the model (or nnx.state of it) as target; "
    'or start the optimizer anew with policy={nnx.OptState: "init", ...: "error"}.'
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CollectionMissing(Cause):
    """A whole collection was not saved.

    Attributes:
        collection: Its name in Linen.
        filter: The NNX filter that selects its variables.
        count: Wanted leaves of it.
        stored: The collections that are there.
    """

    collection: str
    filter: str
    count: int
    stored: tuple[str, ...]

    def _cause(self) -> str:
        return (
            f"the collection {self.collection!r} was not saved: 0 of its {self.count} leaves are stored, "
            f"the checkpoint holds {' and '.join(map(repr, self.stored))}."
        )

    def _hint(self) -> str:
        return (
            f"save it from the Linen program too (a field {self.collection} of the train state); "
            f'to start it from its initial values, pass policy={{{self.filter}: "init", ...: "error"}}.'
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewPart(Cause):
    """A part of the target is new: LoRA weights or a head that a base checkpoint has not.

    Attributes:
        names: What is new, in a few words.
        filters: NNX filters that select it, as Python.
        complete: Weights outside the part, all of which are stored.
    """

    names: tuple[str, ...]
    filters: tuple[str, ...]
    complete: int

    def _cause(self) -> str:
        return (
            f"nothing is stored for {' and '.join(self.names)}, and everything for the other "
            f"{self.complete} weights: the checkpoint's model did not have this part."
        )

    def _hint(self) -> str:
        rules = ", ".join(f'{rule}: "init"' for rule in self.filters)
        return f'pass policy={{{rules}, ...: "error"}} to initialise it and nothing else.'


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyImplementation(Cause):
    """Random keys of two implementations.

    Attributes:
        stored: The stored implementation, or dtype.
        wanted: The wanted one.
    """

    stored: str
    wanted: str

    def _cause(self) -> str:
        return f"the checkpoint's random keys are {self.stored}, the target's {self.wanted}."

    def _hint(self) -> str:
        return (
            "build the target under the writer's jax_default_prng_impl, or with keys of that implementation; "
            "another one would draw other numbers."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomLayout(Cause):
    """Stored random streams that no wanted stream takes: another Flax names them otherwise.

    Attributes:
        stored: One stored stream, as its path is written.
        wanted: The wanted stream beside it.
    """

    stored: str
    wanted: str

    def _cause(self) -> str:
        return (
            f"the checkpoint holds random streams in the layout of another Flax ({self.stored}), and it is "
            f"open which of them is {self.wanted}: it starts anew."
        )

    def _hint(self) -> str:
        return f"pass renames=[({self.stored!r}, {self.wanted!r})] to go on with that stream."


@dataclasses.dataclass(frozen=True, kw_only=True)
class LostWeights(Cause):
    """Weights are not stored, though the optimizer's moments of them are.

    Attributes:
        names: The weights' paths, folded.
    """

    names: str

    def _cause(self) -> str:
        return (
            f"the optimizer's moments of {self.names} are stored and the weight itself is not: "
            "it is no new part of the model, it was left out of the checkpoint."
        )

    def _hint(self) -> str:
        return "restore another step, or find out why it was not saved."
