"""Causes that are a matter of names: another model, or the same one under other names."""

import dataclasses

from orbax_nnx_handler.planning.diagnosis.causes import Cause, counted


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnotherModel(Cause):
    """The checkpoint and the target have little in common.

    Attributes:
        weights: Weights of the target.
        named_alike: How many of them have a stored counterpart by name.
        shaped_alike: How many of them have a stored leaf of their shape.
    """

    weights: int
    named_alike: int
    shaped_alike: int

    def _cause(self) -> str:
        return (
            f"this looks like a checkpoint of another model: it shares {self.named_alike} of the target's "
            f"{self.weights} names and {self.shaped_alike} of its shapes."
        )

    def _way(self) -> str:
        return "look at what is stored with `orbax-nnx tree CHECKPOINT`, and check the path and the target."


@dataclasses.dataclass(frozen=True, kw_only=True)
class OtherNames(Cause):
    """Leaves that are missing and leaves that are unexpected have the same shapes.

    Attributes:
        count: How many.
        weights: Missing weights in all.
        automatic: Names among the stored ones that Linen gave (`Dense_0`).
        renames: The rules that explain all of them, if path and shape leave no choice.
    """

    count: int
    weights: int
    automatic: tuple[str, ...]
    renames: tuple[tuple[str, str], ...] = ()

    def _cause(self) -> str:
        found = f"{self._each} an unexpected stored leaf of the same shape and dtype"
        if self.automatic:
            names = ", ".join(self.automatic[:_NAMES]) + (", ..." if len(self.automatic) > _NAMES else "")
            return f"{found}; the stored ones carry names that Linen gave ({names})."
        return f"{found}: only names differ."

    @property
    def _each(self) -> str:
        if self.weights == 1:
            return "for the missing weight there is"
        if self.count == self.weights:
            return f"for each of the {self.weights} missing weights there is"
        return f"for {self.count} of the {self.weights} missing weights there is"

    def _way(self) -> str:
        if self.renames:
            return f"if they are the same, pass renames={list(self.renames)!r}."
        return "`orbax-nnx suggest CHECKPOINT MODULE:FACTORY` proposes renames to check and paste."


_NAMES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class OtherGroup(Cause):
    """A group of layers, or a module, is stored with the same contents under another name.

    Attributes:
        stored: Its name in the checkpoint.
        wanted: Its name in the target.
        count: The different weights that both hold.
        rename: The rule that leads from one to the other.
    """

    stored: str
    wanted: str
    count: int
    rename: tuple[str, str]

    def _cause(self) -> str:
        return (
            f"the stored {self.stored!r} holds the same {counted(self.count, 'weight')}, by name, as the "
            f"wanted {self.wanted!r}, which is not stored."
        )

    def _way(self) -> str:
        return f"if they are the same, pass renames=[{self.rename!r}]."


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayersShifted(Cause):
    """The layers of a group are numbered from another beginning.

    Attributes:
        group: The group, as its path is written.
        pattern: How the checkpoint writes one layer, with `{}` for its number.
        stored: The number of the first stored layer.
        wanted: The number of the first wanted layer.
        count: Layers on each side.
    """

    group: str
    pattern: str
    stored: int
    wanted: int
    count: int

    def _cause(self) -> str:
        stored, wanted = (f"{first} to {first + self.count - 1}" for first in (self.stored, self.wanted))
        return (
            f"the {counted(self.count, 'layer')} of {self.group!r} are numbered {stored} in the checkpoint "
            f"and {wanted} in the target."
        )

    def _way(self) -> str:
        old, new = (
            self.pattern.replace("{}", f"{{i + {first}}}" if first else "{i}")
            for first in (self.stored, self.wanted)
        )
        return (
            f'if they are the same layers, pass renames=[(f"{old}", f"{new}") for i in range({self.count})].'
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoWeights(Cause):
    """The checkpoint holds no weight at all.

    Attributes:
        stored: What it holds instead, folded.
    """

    stored: str

    def _cause(self) -> str:
        held = f"all it holds is {self.stored}" if self.stored else "it is empty"
        return f"the checkpoint holds no weights: {held}."

    def _way(self) -> str:
        return "look for another item or step: `orbax-nnx tree CHECKPOINT` lists them."


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayoutGiven(Cause):
    """The checkpoint was read under a layout that it does not have.

    Attributes:
        given: The layout that was asked for.
        found: Those that it looks like.
    """

    given: str
    found: tuple[str, ...]

    def _cause(self) -> str:
        return (
            f"the checkpoint was read as {self.given}, as layout=... asks, but has not the form of one: "
            f"it looks like {' or '.join(self.found)}."
        )

    def _way(self) -> str:
        return "leave layout=... out: it is found out from the metadata."
