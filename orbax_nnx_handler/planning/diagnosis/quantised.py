"""Weights that are stored as codes with scales beside them, found as the verdict finds them."""

from collections import defaultdict
from collections.abc import Iterable, Mapping

import jax.numpy as jnp

from orbax_nnx_handler.planning.core.codes import scales_of
from orbax_nnx_handler.planning.core.paths import Path, Tokens, segments
from orbax_nnx_handler.planning.core.recipes import reads
from orbax_nnx_handler.planning.diagnosis.evidence import Evidence

_Scales = Mapping[Path, tuple[Path, ...]]


def quantised_weights(evidence: Evidence) -> Mapping[str, Mapping[Path, tuple[str, ...]]]:
    """Returns the wanted leaves that codes stand for, by stored dtype, each with the names of its scales.

    A wanted leaf is either mapped to codes, or missing where codes lie in a dict of its
    name (`kernel/{qvalue, scale}`).
    """
    placements = evidence.sides.placements
    used = {path for item in evidence.verdict.restored.values() for path in reads(item.recipe)}
    scales = scales_of((item.leaf for item in placements.values()), used)
    found: dict[str, dict[Path, tuple[str, ...]]] = defaultdict(dict)
    for path, codes in _codes_of(evidence, scales):
        found[str(placements[codes].leaf.dtype)][path] = tuple(_name(scale) for scale in scales[codes])
    return found


def _codes_of(evidence: Evidence, scales: _Scales) -> Iterable[tuple[Path, Path]]:
    for path, item in evidence.mismatched.items():
        codes = next((source for source in reads(item.recipe) if source in scales), None)
        if codes is not None and jnp.issubdtype(item.wanted.dtype, jnp.floating):
            yield path, codes
    boxes: dict[Tokens, Path] = {}
    for codes in scales:
        if codes in evidence.stored_weights:
            tokens = evidence.stored_below(evidence.stored_weights[codes])
            boxes |= {tokens[:depth]: codes for depth in range(1, len(tokens))}
    for path in evidence.missing_weights:
        if evidence.below[path] in boxes:
            yield path, boxes[evidence.below[path]]


def _name(path: Path) -> str:
    names = [name for name in segments(path) if name != "value"]
    return names[-1] if names else "value"
