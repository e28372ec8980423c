"""What becomes of each wanted leaf: restored, missing (zeros, initial, an error), mismatched, fresh keys."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, cast

import numpy as np

from orbax_nnx_handler.planning.core.dtypes import (
    CastKind,
    cast_between,
    changes_values,
    held_dtype,
    is_count_dtype,
    is_key,
    same_key,
    scales_of,
    worst,
)
from orbax_nnx_handler.planning.core.leaves import Shape, StoredLeaf
from orbax_nnx_handler.planning.core.lines import counted
from orbax_nnx_handler.planning.core.paths import Path, render
from orbax_nnx_handler.planning.core.recipes import Read, computes, reads
from orbax_nnx_handler.planning.layouts.layout import Stored
from orbax_nnx_handler.planning.mapping.mapping import LeafMapping
from orbax_nnx_handler.planning.mapping.matches import Found
from orbax_nnx_handler.planning.mapping.roots import strip
from orbax_nnx_handler.planning.options import DefaultSource, Policy, RestoreOptions
from orbax_nnx_handler.planning.rules import cast_of
from orbax_nnx_handler.planning.target.roles import Wanted
from orbax_nnx_handler.planning.verdict.claims import Unused
from orbax_nnx_handler.planning.verdict.outcomes import (
    Defaulted,
    Mismatched,
    Missing,
    Restored,
)

Outcome = Restored | Missing | Mismatched | Defaulted


@dataclasses.dataclass(frozen=True)
class LeafVerdicts:
    """Judges single leaves against one mapping."""

    mapping: LeafMapping
    stored: Stored
    options: RestoreOptions
    policies: Mapping[Path, Policy]

    def outcome(self, item: Wanted) -> Outcome:
        """Returns what becomes of a leaf, by what the mapping found for it and by its policy."""
        found = self.mapping.found.get(item.leaf.path)
        if found is not None and item.role == "random" and found.missing_layers:
            return self._default(item, "random state of which not all layers are stored")
        if found is not None:
            outcome = self._as_it_is(item, found) or self._compare(item, found)
            # A cache of another batch size is not a fault: the program recomputes it.
            if item.role != "transient" or isinstance(outcome, Restored):
                return outcome
        if item.role in ("random", "transient"):
            return self._default(item)
        source = self._initial(item)
        if item.is_bare and source is not None and not self._is_stored(item):
            return Defaulted(wanted=item.leaf, source=source, reason=_CONSTANT)
        return self._missing(item, None)

    def _is_stored(self, item: Wanted) -> bool:
        """Tells whether a leaf of that path lies unused in some collection: it may be the value."""
        return strip(item.tokens, self.mapping.roots.wanted) in self._unused.names

    @cached_property
    def _unused(self) -> Unused:
        used, root = self.mapping.used() | self.mapping.discarded.keys(), self.mapping.roots.stored
        models = (item for item in self.mapping.placements if item.section == "model")
        return Unused([(strip(item.tokens, root), item) for item in models if item.leaf.path not in used])

    def _missing(self, item: Wanted, found: Found | None) -> Missing:
        policy = self.policies[item.leaf.path]
        # No zeros for what is stored.
        if policy != "error" and item.role == "model":
            name = strip(item.tokens, self.mapping.roots.wanted)
            policy = "error" if self._unused.may_be(item, name) else policy
        return Missing(
            wanted=item.leaf,
            policy=policy,
            filled_by="zeros" if policy == "warn" else self._initial(item),
            layers=found.missing_layers if found else (),
            recipe=found.recipe if found else None,
        )

    def _initial(self, item: Wanted) -> DefaultSource | None:
        if item.leaf.value is not None:
            return "target"
        return "init" if self.options.init is not None else None

    def _default(self, item: Wanted, reason: str = "random state that is not stored") -> Defaulted:
        last: DefaultSource = "seed" if item.role == "random" else "zeros"
        if item.role != "random":
            reason = "recomputed by the program, never in a Linen checkpoint"
        return Defaulted(wanted=item.leaf, source=self._initial(item) or last, reason=reason)

    def _as_it_is(self, item: Wanted, found: Found) -> Restored | None:
        """Returns what becomes of a leaf that comes out as it is wanted: nearly every one."""
        leaf, recipe, mapping = item.leaf, found.recipe, self.mapping
        if found.surplus or found.missing_layers or mapping.applied.casts:
            return None
        if mapping.shapes[leaf.path] != leaf.shape:
            return None
        for path in (recipe.path,) if isinstance(recipe, Read) else reads(recipe):
            source = self.stored[path]
            is_alike = source.dtype is leaf.dtype or source.dtype == leaf.dtype
            if not is_alike or source.key_impl:
                return None
        return Restored(
            wanted=leaf,
            recipe=found.recipe,
            stored_dtype=leaf.dtype,
            dtype=leaf.dtype,
            cast="same",
            reason=found.reason,
            evidence=found.evidence,
        )

    def _compare(self, item: Wanted, found: Found) -> Restored | Missing | Mismatched:
        sources = [self.stored[path] for path in dict.fromkeys(reads(found.recipe))]
        shape = self.mapping.shapes[item.leaf.path]
        if shape is None:  # The recipe does not come out.
            return _mismatch(item, found, "shape", sources[0].shape, str(sources[0].dtype))
        if is_key(item.leaf.dtype) or any(leaf.key_impl for leaf in sources):
            return self._compare_key(item, found, shape)
        if shape != item.leaf.shape or found.surplus:
            return _mismatch(item, found, "shape", shape, str(sources[0].dtype), _surplus(found))
        outcome = self._compare_dtype(item, found, sources)
        if found.missing_layers and isinstance(outcome, Restored):
            return self._missing(item, found)
        return outcome

    def _compare_dtype(
        self, item: Wanted, found: Found, sources: Sequence[StoredLeaf]
    ) -> Restored | Mismatched:
        by_rule = cast_of(found.recipe, self.mapping.applied.casts)
        dtypes = [by_rule] if by_rule else [leaf.dtype for leaf in sources if leaf.dtype is not None]
        is_count = item.is_count
        casts: list[CastKind | None] = [cast_between(dtype, item.leaf.dtype, is_count) for dtype in dtypes]
        kept = self.options.dtype == "stored" and not item.leaf.dtype_is_chosen
        if (
            (len(casts) < len(sources) and not by_rule)
            or None in casts
            or (by_rule and not kept and casts != ["same"])
        ):
            strange = next((d for d, c in zip(dtypes, casts, strict=True) if c is None), None)
            held = str(strange or by_rule or "not an array")
            return _mismatch(item, found, "dtype", item.leaf.shape, held, found.reason if by_rule else "")
        scales = () if by_rule or kept or computes(found.recipe) else self._scales(item, sources)
        if scales:
            detail = f"quantised: {render(scales[0])} is a scale of it"
            return _mismatch(item, found, "dtype", item.leaf.shape, str(sources[0].dtype), detail)
        dtype = held_dtype(dtypes[0]) if kept else item.leaf.dtype
        shortened = kept and dtype != dtypes[0]
        if shortened and not is_count:
            return _mismatch(item, found, "dtype", item.leaf.shape, str(dtypes[0]), _NO_X64)
        done = "same" if kept and not shortened else worst(casts)
        return Restored(
            wanted=item.leaf,
            recipe=found.recipe,
            stored_dtype=cast("np.dtype[Any]", sources[0].dtype),
            dtype=dtype,
            cast=_cast_by_rule(sources, by_rule) if by_rule else done,
            reason=found.reason,
            evidence=found.evidence,
        )

    def _scales(self, item: Wanted, sources: Sequence[StoredLeaf]) -> tuple[Path, ...]:
        """Returns the scales without which stored codes are not the wanted floats; integers stay codes."""
        if is_count_dtype(item.leaf.dtype):
            return ()
        changed = [leaf.path for leaf in sources if leaf.dtype != item.leaf.dtype]
        return tuple(scale for path in changed for scale in self._codes.get(path, ()))

    @cached_property
    def _codes(self) -> Mapping[Path, tuple[Path, ...]]:
        return scales_of(self.stored.values(), self.stored.keys() - self.mapping.used())

    def _compare_key(self, item: Wanted, found: Found, shape: Shape) -> Restored | Mismatched:
        sources = [self.stored[path] for path in reads(found.recipe)]
        source, are_alike = sources[0], all(same_key(leaf.key_impl, item.leaf.dtype) for leaf in sources)
        if shape != item.leaf.shape or found.surplus or not are_alike or computes(found.recipe):
            impl = f"key<{source.key_impl}>" if source.key_impl else str(source.dtype)
            return _mismatch(item, found, "key", shape, impl, _surplus(found))
        dtype = item.leaf.dtype
        return Restored(
            wanted=item.leaf,
            recipe=found.recipe,
            stored_dtype=dtype,
            dtype=dtype,
            cast="same",
            reason=found.reason,
            evidence=found.evidence,
        )


_CONSTANT = "a constant of the model: no Linen collection holds a bare nnx.Variable"
_NO_X64 = 'JAX holds no 64 bits: set jax_enable_x64, or pass dtype="target"'


def _cast_by_rule(sources: Sequence[StoredLeaf], dtype: "np.dtype[Any]") -> CastKind:
    if all(leaf.dtype == dtype for leaf in sources):
        return "same"
    return "narrower" if any(changes_values(leaf.dtype, dtype) for leaf in sources) else "wider"


def _surplus(found: Found) -> str:
    return f"the stored group has {counted(found.surplus, 'more layer')}" if found.surplus else ""


def _mismatch(
    item: Wanted, found: Found, kind: str, shape: Shape, dtype: str, detail: str = ""
) -> Mismatched:
    return Mismatched(
        wanted=item.leaf,
        recipe=found.recipe,
        kind=kind,  # type: ignore[arg-type]
        stored_shape=shape,
        stored_dtype=dtype,
        detail=detail,
        surplus=found.surplus,
        reason=found.reason,
    )
