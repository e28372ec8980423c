"""What can be wrong with a restore, as types that carry their paths."""

from collections.abc import Sequence

from orbax_nnx_handler.planning.core.paths import Path


class RestoreError(ValueError):
    """A checkpoint cannot become the target; nothing was read, nothing changed.

    Attributes:
        paths: Every path the error is about, wanted paths first.
        problems: The errors of each kind when several kinds occur at once; just
            this error otherwise.
    """

    def __init__(self, message: str, *, paths: Sequence[Path] = (), problems: Sequence["RestoreError"] = ()):
        super().__init__(message)
        self.paths = tuple(paths)
        self.problems = tuple(problems) or (self,)


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
