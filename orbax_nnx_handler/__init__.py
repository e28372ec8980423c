"""Restores Orbax checkpoints that a Flax Linen program wrote into Flax NNX state.

Names are imported when they are first asked for: `orbax-nnx plan` needs none of
what reads and writes arrays, and importing that takes longer than many a plan.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orbax_nnx_handler.api import from_linen, restore, save, suggest, to_linen
    from orbax_nnx_handler.handler import (
        MissingParamRestoreArgs,
        NNXLinenHandler,
        NNXLinenRestore,
        NNXLinenSave,
        handler_registry,
    )
    from orbax_nnx_handler.planner import plan_restore
    from orbax_nnx_handler.planning.core.errors import (
        AmbiguousMappingError,
        DtypeMismatchError,
        KeyMismatchError,
        MissingParamError,
        NotACheckpointError,
        RestoreError,
        RuleError,
        ShapeMismatchError,
        ShardingMismatchError,
        UnexpectedParamError,
        UnknownLayoutError,
        UnmappedValueError,
        UnreadableLeafError,
        UnusedRuleError,
        VerificationError,
    )
    from orbax_nnx_handler.planning.options import SingleReplica
    from orbax_nnx_handler.planning.restore_plan import RestorePlan, RestoreReport
    from orbax_nnx_handler.planning.rules import (
        Add,
        Cast,
        Copy,
        Drop,
        Fuse,
        Rename,
        Repeat,
        Reshape,
        Scale,
        ScanAxis,
        Split,
        StackLayers,
        Transpose,
        UnstackLayers,
        invert,
    )
    from orbax_nnx_handler.planning.suggesting import Suggestion
    from orbax_nnx_handler.storage import DisagreementError, OtherProcessError
    from orbax_nnx_handler.verifying.comparison import verify
    from orbax_nnx_handler.verifying.verification import Verification

__all__ = [
    "Add",
    "AmbiguousMappingError",
    "Cast",
    "Copy",
    "DisagreementError",
    "Drop",
    "DtypeMismatchError",
    "Fuse",
    "KeyMismatchError",
    "MissingParamError",
    "MissingParamRestoreArgs",
    "NNXLinenHandler",
    "NNXLinenRestore",
    "NNXLinenSave",
    "NotACheckpointError",
    "OtherProcessError",
    "Rename",
    "Repeat",
    "Reshape",
    "RestoreError",
    "RestorePlan",
    "RestoreReport",
    "RuleError",
    "Scale",
    "ScanAxis",
    "ShapeMismatchError",
    "ShardingMismatchError",
    "SingleReplica",
    "Split",
    "StackLayers",
    "Suggestion",
    "Transpose",
    "UnexpectedParamError",
    "UnknownLayoutError",
    "UnmappedValueError",
    "UnreadableLeafError",
    "UnstackLayers",
    "UnusedRuleError",
    "Verification",
    "VerificationError",
    "from_linen",
    "handler_registry",
    "invert",
    "plan_restore",
    "restore",
    "save",
    "suggest",
    "to_linen",
    "verify",
]

_HOMES = {
    "api": (
        "from_linen",
        "restore",
        "save",
        "suggest",
        "to_linen",
    ),
    "handler": (
        "MissingParamRestoreArgs",
        "NNXLinenHandler",
        "NNXLinenRestore",
        "NNXLinenSave",
        "handler_registry",
    ),
    "planning.core.errors": (
        "AmbiguousMappingError",
        "DtypeMismatchError",
        "KeyMismatchError",
        "MissingParamError",
        "NotACheckpointError",
        "RestoreError",
        "RuleError",
        "ShapeMismatchError",
        "ShardingMismatchError",
        "UnexpectedParamError",
        "UnknownLayoutError",
        "UnmappedValueError",
        "UnreadableLeafError",
        "UnusedRuleError",
        "VerificationError",
    ),
    "planning.options": ("SingleReplica",),
    "planning.restore_plan": ("RestorePlan", "RestoreReport"),
    "planning.rules": (
        "Add",
        "Cast",
        "Copy",
        "Drop",
        "Fuse",
        "Rename",
        "Repeat",
        "Reshape",
        "Scale",
        "ScanAxis",
        "Split",
        "StackLayers",
        "Transpose",
        "UnstackLayers",
        "invert",
    ),
    "planning.suggesting": ("Suggestion",),
    "storage": (
        "DisagreementError",
        "OtherProcessError",
    ),
    "planner": ("plan_restore",),
    "verifying.verification": ("Verification",),
    "verifying.comparison": ("verify",),
}
"""The public names of each module."""

_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
