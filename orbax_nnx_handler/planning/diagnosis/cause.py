"""Why a plan does not fit: each cause a type, with its evidence and its way out.

A cause is only named where the plan holds the evidence; `cause` says what that
evidence is, in one sentence, and `hint` what to do about it.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar

from orbax_nnx_handler.planning.core.paths import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cause(ABC):
    """One reason why a checkpoint does not become a target.

    Attributes:
        paths: The leaves that it explains, wanted ones before stored ones.
        filters: NNX filters, as Python, that select the missing ones among them and no
            other missing leaf; empty where initial values are no way out.
    """

    paths: tuple[Path, ...]
    filters: tuple[str, ...] = ()
    may_begin_anew: ClassVar[bool] = False
    """Whether initial values are a way out for what is missing: it was never there, or is left behind."""

    @property
    def cause(self) -> str:
        """What differs, and how that shows: one sentence."""
        return self._cause()

    @property
    def way(self) -> str:
        """What to change or to pass, initial values left aside; may be empty."""
        return self._way()

    @property
    def hint(self) -> str:
        """The whole way out: what to change or to pass, and the policy that fills the rest."""
        if not self.filters:
            return self.way
        fill = fill_hint(self.filters)
        return f"{self.way.removesuffix('.')}; or {fill}" if self.way else fill

    @abstractmethod
    def _cause(self) -> str: ...

    @abstractmethod
    def _way(self) -> str: ...


def fill_hint(filters: Iterable[str], count: int = 0) -> str:
    """Returns the sentence that passes a policy for what these filters select, so many leaves if known."""
    leaves = "this leaf" if count == 1 else f"these {count} leaves" if count else "these leaves"
    rules = ", ".join(f'{rule}: "init"' for rule in dict.fromkeys(filters))
    return f'pass policy={{{rules}, ...: "error"}} to initialise {leaves} and nothing else.'


def counted(count: int, one: str, many: str = "") -> str:
    """Returns a count with its noun: `1 layer`, `4 layers`."""
    return f"{count} {one if count == 1 else many or one + 's'}"


def listed(names: Iterable[str]) -> str:
    """Returns names as a sentence lists them: `mu`, `mu and nu`, `a, b and c`."""
    every = list(names)
    return " and ".join([", ".join(every[:-1]), every[-1]] if len(every) > 1 else every)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CollectionMissing(Cause):
    """A whole collection was not saved.

    Attributes:
        collection: Its name in Linen.
        count: Wanted leaves of it.
        stored: The collections that are there.
    """

    collection: str
    count: int
    stored: tuple[str, ...]
    may_begin_anew: ClassVar[bool] = True

    def _cause(self) -> str:
        there = listed(map(repr, self.stored)) if self.stored else "bare parameters"
        return (
            f"the collection {self.collection!r} was not saved: 0 of its {self.count} leaves are stored, "
            f"the checkpoint holds {there}."
        )

    def _way(self) -> str:
        return f"save it from the Linen program too (a field {self.collection} of the train state)."


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewPart(Cause):
    """A part of the target is new: LoRA weights or a head that a base checkpoint has not.

    Attributes:
        names: What is new, in a few words.
        complete: Weights outside the part, all of which are stored.
    """

    names: tuple[str, ...]
    complete: int
    may_begin_anew: ClassVar[bool] = True

    def _cause(self) -> str:
        rest = f"{self.complete} weights" if self.complete != 1 else "weight"
        return (
            f"nothing is stored for {listed(self.names)}, and everything for the other {rest}: "
            f"the checkpoint's model did not have {'this part' if len(self.names) == 1 else 'these parts'}."
        )

    def _way(self) -> str:
        return ""


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

    def _way(self) -> str:
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

    def _way(self) -> str:
        return f"pass renames=[({self.stored!r}, {self.wanted!r})] to go on with that stream."


@dataclasses.dataclass(frozen=True, kw_only=True)
class LostWeights(Cause):
    """Weights are not stored, though the optimizer's moments of them are.

    Attributes:
        names: The weights' paths, folded.
        count: How many they are.
    """

    names: str
    count: int = 1

    def _cause(self) -> str:
        itself = "the weight itself is" if self.count == 1 else "the weights themselves are"
        return (
            f"the optimizer's moments of {self.names} are stored and {itself} not: "
            f"{'it is' if self.count == 1 else 'they are'} no new part of the model, "
            "but left out of the checkpoint."
        )

    def _way(self) -> str:
        return (
            f"restore another step, or find out why {'it was' if self.count == 1 else 'they were'} not saved."
        )
