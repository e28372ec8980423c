"""What looks for causes, in which order: each from the verdict's own evidence; without evidence, no guess."""

from collections.abc import Callable, Iterable

from orbax_nnx_handler.planning.core.causes import Cause
from orbax_nnx_handler.planning.core.errors import RuleError
from orbax_nnx_handler.planning.diagnosis.axes import find_fused, find_merged, find_permuted
from orbax_nnx_handler.planning.diagnosis.evidence import Evidence
from orbax_nnx_handler.planning.diagnosis.layers import find_layer_counts, find_scanned, find_shifted
from orbax_nnx_handler.planning.diagnosis.names import find_another_model, find_other_groups, find_other_names
from orbax_nnx_handler.planning.diagnosis.optimizers import (
    find_open_factoring,
    find_optimizers,
    find_stuck_moments,
)
from orbax_nnx_handler.planning.diagnosis.parts import (
    find_biases,
    find_collections,
    find_given_layout,
    find_lost_weights,
    find_new_parts,
    find_no_weights,
    find_quantised,
    find_tied,
)
from orbax_nnx_handler.planning.diagnosis.random_state import find_keys, find_random_layouts
from orbax_nnx_handler.planning.diagnosis.rules import find_dropped, find_unneeded
from orbax_nnx_handler.planning.diagnosis.sizes import find_dimensions, find_heads
from orbax_nnx_handler.planning.verdict.outcomes import Verdict

_Finder = Callable[[Evidence], Iterable[Cause]]

_FINDERS: tuple[_Finder, ...] = (
    find_given_layout,
    find_no_weights,
    find_quantised,
    find_fused,
    find_another_model,
    find_open_factoring,
    find_stuck_moments,
    find_dropped,
    find_unneeded,
    find_layer_counts,
    find_scanned,
    find_shifted,
    find_collections,
    find_optimizers,
    find_other_groups,
    find_other_names,
    find_lost_weights,
    find_biases,
    find_tied,
    find_new_parts,
    find_permuted,
    find_merged,
    find_heads,
    find_dimensions,
    find_keys,
    find_random_layouts,
)
"""In this order: what one finder explains, the later ones do not look at again."""

_OF_DEFAULTS = (find_random_layouts,)
"""Finders that look at more than what is missing, mismatched or unexpected."""


def diagnose(verdict: Verdict) -> tuple[Cause, ...]:
    """Returns the causes that a verdict holds evidence for.

    Args:
        verdict: A verdict, fitting or not.

    Returns:
        The causes, those that explain everything first; none where nothing is
        wrong or nothing tells why.
    """
    evidence = Evidence(verdict=verdict)
    causes: list[Cause] = []
    is_whole = not (evidence.missing or evidence.mismatched or evidence.unexpected)
    for find in _OF_DEFAULTS if is_whole else _FINDERS:
        found = _found(find, evidence)
        causes += found
        evidence = evidence.without(path for cause in found for path in cause.paths)
    return tuple(causes)


def _found(find: _Finder, evidence: Evidence) -> list[Cause]:
    try:
        return list(find(evidence))
    except RuleError:
        # The rule that would help cannot be written: a stored name is no pattern (`{x}`).
        return []
