"""What can be wrong with a restore, as types that carry their paths, causes and ways out."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

from orbax_nnx_handler.planning.core.causes import Cause, Hint
from orbax_nnx_handler.planning.core.paths import Path


class RestoreError(ValueError):
    """A checkpoint cannot become the target; nothing was read, nothing changed.

    Attributes:
        what: What is wrong, without causes and hints.
        paths: Every path the error is about, wanted paths first.
        hints: The ways out, in words and as the arguments that they propose.
        causes: Why it is wrong, as far as there is evidence.
        problems: The errors of each kind when several kinds occur at once; just
            this error otherwise.
    """

    def __init__(
        self,
        what: str,
        *,
        paths: Sequence[Path] = (),
        hints: Iterable[Hint | str] = (),
        causes: Sequence[Cause] = (),
        problems: Sequence["RestoreError"] = (),
        message: str = "",
    ):
        self.what = what
        self.paths = tuple(paths)
        self.hints = tuple(Hint(hint) if isinstance(hint, str) else hint for hint in hints)
        self.causes = tuple(causes)
        super().__init__(message or "\n".join([what, *(f"hint: {hint.words}" for hint in self.hints)]))
        self.problems = tuple(problems) or (self,)

    def __reduce__(self) -> tuple[Any, ...]:
        kinds = vars(type(self)).get("_kinds", (type(self),))
        return _rebuilt, (kinds, self.args), vars(self)


@functools.cache
def error_of_kinds(*kinds: type[RestoreError]) -> type[RestoreError]:
    """Returns the type of an error that is of all these kinds: the one, or a type below all of them."""
    if len(kinds) == 1:
        return kinds[0]
    return type(" + ".join(kind.__name__ for kind in kinds), kinds, {"_kinds": kinds})


def _rebuilt(kinds: tuple[type[RestoreError], ...], args: tuple[Any, ...]) -> RestoreError:
    """Makes an error of a pickle: a type of several kinds has no module to be found in."""
    kind = error_of_kinds(*kinds)
    return kind.__new__(kind, *args)


class MissingParamError(RestoreError):
    """The checkpoint lacks weights that the target wants."""


class UnexpectedParamError(RestoreError):
    """The checkpoint holds leaves that the target does not want."""


class ShapeMismatchError(RestoreError):
    """A stored leaf and the wanted leaf it maps to have different shapes."""


class DtypeMismatchError(RestoreError):
    """A stored value cannot become the wanted dtype without changing meaning."""


class KeyMismatchError(RestoreError):
    """A stored random key has another implementation or shape than the target's."""


class ShardingMismatchError(RestoreError):
    """A wanted leaf cannot be divided over its devices as its sharding says."""


class AmbiguousMappingError(RestoreError):
    """Two readings are possible; the message says which argument decides."""


class UnknownLayoutError(RestoreError):
    """The checkpoint's tree is none that this library knows."""


class UnusedRuleError(RestoreError):
    """A policy filter or a rename rule has no effect: a typo disarmed it."""


class RuleError(RestoreError):
    """A rule cannot be applied: its shapes do not come out, or its meaning would change."""


class UnmappedValueError(RestoreError):
    """A stored value has no home in NNX and is not zero, so it cannot be dropped."""


class NotACheckpointError(RestoreError):
    """The path is no Orbax checkpoint; says what it is and which was probably meant."""


class UnreadableLeafError(RestoreError):
    """Stored bytes that the plan needs are absent or damaged; names leaf and file."""
