"""What a user says about names and shapes that nobody else can know."""

from orbax_nnx_handler.planning.rules.applying import (
    Casts,
    RulesApplied,
    apply_rules,
    as_rules,
    cast_of,
    invert,
)
from orbax_nnx_handler.planning.rules.rename import Rename
from orbax_nnx_handler.planning.rules.rule import Rule
from orbax_nnx_handler.planning.rules.split_and_fuse import Fuse, Split
from orbax_nnx_handler.planning.rules.stacking import Copy, ScanAxis, StackLayers, UnstackLayers
from orbax_nnx_handler.planning.rules.values import (
    Add,
    Cast,
    Drop,
    Repeat,
    Reshape,
    Scale,
    Transpose,
)

__all__ = [
    "Add",
    "Cast",
    "Casts",
    "Copy",
    "Drop",
    "Fuse",
    "Rename",
    "Repeat",
    "Reshape",
    "Rule",
    "RulesApplied",
    "Scale",
    "ScanAxis",
    "Split",
    "StackLayers",
    "Transpose",
    "UnstackLayers",
    "apply_rules",
    "as_rules",
    "cast_of",
    "invert",
]
