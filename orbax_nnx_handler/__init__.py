"""Restores Orbax checkpoints that a Flax Linen program wrote into Flax NNX state."""

from orbax_nnx_handler.api import plan_restore, restore, save
from orbax_nnx_handler.handler import (
    MissingParamRestoreArgs,
    NNXLinenHandler,
    NNXLinenRestore,
    NNXLinenSave,
    handler_registry,
)
from orbax_nnx_handler.planning.errors import (
    AmbiguousMappingError,
    DtypeMismatchError,
    KeyMismatchError,
    MissingParamError,
    NotACheckpointError,
    RestoreError,
    RuleError,
    ShapeMismatchError,
    UnexpectedParamError,
    UnknownLayoutError,
    UnmappedValueError,
    UnusedRuleError,
)
from orbax_nnx_handler.planning.plan import RestorePlan
from orbax_nnx_handler.planning.report import RestoreReport
from orbax_nnx_handler.planning.rules import Rename

__all__ = [
    "AmbiguousMappingError",
    "DtypeMismatchError",
    "KeyMismatchError",
    "MissingParamError",
    "MissingParamRestoreArgs",
    "NNXLinenHandler",
    "NNXLinenRestore",
    "NNXLinenSave",
    "NotACheckpointError",
    "Rename",
    "RestoreError",
    "RestorePlan",
    "RestoreReport",
    "RuleError",
    "ShapeMismatchError",
    "UnexpectedParamError",
    "UnknownLayoutError",
    "UnmappedValueError",
    "UnusedRuleError",
    "handler_registry",
    "plan_restore",
    "restore",
    "save",
]
