"""Causes that are a matter of names: another model, or the same one under other names."""

import dataclasses

from orbax_nnx_handler.planning.diagnosis.causes import Cause


def _share(count: int, total: int) -> str:
    if total == 1:
        return "the missing weight has"
    return (
        f"all {total} missing weights have"
        if count == total
        else f"{count} of the {total} missing weights have"
    )


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
            f"{self.weights} names and {self.shaped_alike} of its {self.weights} shapes."
        )

    def _hint(self) -> str:
        return "look at what is stored with `orbax-nnx tree CHECKPOINT`, and check the path and the target."


@dataclasses.dataclass(frozen=True, kw_only=True)
class OtherNames(Cause):
    """Leaves that are missing and leaves that are unexpected have the same shapes.

    Attributes:
        count: How many.
        weights: Missing weights in all.
        automatic: Names among the stored ones that Linen gave (`Dense_0`).
        rename: The one rule that explains all of them, if there is one.
    """

    count: int
    weights: int
    automatic: tuple[str, ...]
    rename: tuple[str, str] | None

    def _cause(self) -> str:
        found = f"{_share(self.count, self.weights)} an unexpected stored leaf of the same shape and dtype"
        if self.automatic:
            return f"{found}; the stored ones carry names that Linen gave ({', '.join(self.automatic)})."
        return f"{found}: the modules have other names."

    def _hint(self) -> str:
        if self.rename is not None:
            return f"if they are the same, pass renames=[{self.rename!r}]."
        return "`orbax-nnx suggest CHECKPOINT MODULE:FACTORY` proposes renames=[...] to check and paste."


@dataclasses.dataclass(frozen=True, kw_only=True)
class OtherGroup(Cause):
    """A group of layers, or a module, is stored with the same contents under another name.

    Attributes:
        stored: Its name in the checkpoint.
        wanted: Its name in the target.
        count: The different weights that both hold.
    """

    stored: str
    wanted: str
    count: int

    def _cause(self) -> str:
        return (
            f"the stored {self.stored!r} holds the same {self.count} weights, by name, as the wanted "
            f"{self.wanted!r}, which is not stored."
        )

    def _hint(self) -> str:
        return f"if they are the same, pass renames=[({self.stored!r}, {self.wanted!r})]."
