"""Compares a mapping with the target: the pure function behind every verdict."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np

from orbax_nnx_handler.planning.core.dtypes import (
    CastKind,
    cast_between,
    changes_values,
    held_dtype,
    is_key,
    same_key,
    scales_of,
    worst,
)
from orbax_nnx_handler.planning.core.errors import RestoreError, RuleError, UnusedRuleError
from orbax_nnx_handler.planning.core.leaves import Shape, StoredLeaf
from orbax_nnx_handler.planning.core.paths import Path, render
from orbax_nnx_handler.planning.core.recipes import Read, Recipe, computes, reads
from orbax_nnx_handler.planning.layouts.layout import Stored
from orbax_nnx_handler.planning.mapping.choice import best_mappings, claims_of_shared, faults_of
from orbax_nnx_handler.planning.mapping.mapping import LeafMapping
from orbax_nnx_handler.planning.mapping.matches import Discarded, Dropped, Found
from orbax_nnx_handler.planning.mapping.roots import strip
from orbax_nnx_handler.planning.options import DefaultSource, Policy, RestoreOptions, resolve
from orbax_nnx_handler.planning.rules import Drop, ScanAxis, cast_of
from orbax_nnx_handler.planning.target.roles import Wanted, roles_of
from orbax_nnx_handler.planning.target.shardings import indivisible
from orbax_nnx_handler.planning.target.target import Target
from orbax_nnx_handler.planning.verdict.claims import Unused
from orbax_nnx_handler.planning.verdict.laws import Broken, Known, Source, certify, error_of
from orbax_nnx_handler.planning.verdict.outcomes import (
    Defaulted,
    Mismatched,
    Missing,
    Restored,
    Sides,
    Verdict,
)
from orbax_nnx_handler.planning.verdict.unreadable import (
    Unreadable,
    rules_for_readable,
    unreadable,
    unreadable_leaves,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leftover:
    """The stored leaves beside the ones that are used; each in exactly one place.

    Attributes:
        unexpected: Leaves of the parts that the target asks for.
        skipped: Leaves of parts it does not ask for, caches of another shape, and
            values that are no arrays.
        dropped: Leaves without a counterpart in NNX, and those that rules leave behind.
    """

    unexpected: Mapping[Path, StoredLeaf]
    skipped: Mapping[Path, StoredLeaf]
    dropped: Mapping[Path, Dropped | Discarded]


def left_over(wanted: Sequence[Wanted], mapping: LeafMapping, used: Iterable[Recipe]) -> Leftover:
    """Sorts the stored leaves that are not used."""
    taken = _paths_of(used)
    dropped = {path: item for path, item in _dropped(mapping).items() if path not in taken}
    left = (
        item for item in mapping.placements if item.leaf.path not in taken and item.leaf.path not in dropped
    )
    left = list(left) if len(taken) < len(mapping.placements) else []
    roles = {item.role for item in wanted}
    asked = {"model"} | (roles & {"optimizer", "step"})
    open_ends = [item.leaf for item in left if item.section in asked and item.leaf.dtype is not None]
    # A leaf that was found and is not used all the same is a cache that the program recomputes.
    passed_over = mapping.used() if open_ends else ()
    unexpected = {leaf.path: leaf for leaf in open_ends if leaf.path not in passed_over}
    skipped = {item.leaf.path: item.leaf for item in left if item.leaf.path not in unexpected}
    return Leftover(unexpected=unexpected, skipped=skipped, dropped=dropped)


def _paths_of(recipes: Iterable[Recipe]) -> set[Path]:
    """Returns the stored leaves that are read."""
    found: set[Path] = set()
    for recipe in recipes:
        if isinstance(recipe, Read):  # Nearly every one.
            found.add(recipe.path)
        else:
            found.update(reads(recipe))
    return found


def _dropped(mapping: LeafMapping) -> dict[Path, Dropped | Discarded]:
    items = mapping.without_variable
    dropped = {item.leaf.path: Dropped(leaf=item.leaf, reason=item.reason) for item in items}
    return {**dropped, **mapping.discarded}


class Chosen(NamedTuple):
    """How a checkpoint is read.

    Attributes:
        mapping: What each wanted leaf is made from.
        faults: What is wrong with the choice.
        broken: Where it breaks a law.
    """

    mapping: LeafMapping
    faults: Sequence[RestoreError]
    broken: Sequence[Broken]


def choose(wanted: Sequence[Wanted], stored: Stored, options: RestoreOptions) -> Chosen:
    """Returns the reading of a checkpoint that a verdict rests on, certified."""
    readings, faults = best_mappings(wanted, stored, options)
    first: Chosen | None = None
    for mapping in readings:
        chosen = Chosen(mapping, faults, _broken_laws(wanted, mapping))
        if not chosen.broken:
            return chosen
        first = first or chosen
    assert first is not None  # There is one reading at least.
    return first


def _broken_laws(wanted: Sequence[Wanted], mapping: LeafMapping) -> list[Broken]:
    """Returns where a mapping breaks a law, whatever found it."""
    sources: list[Source] = []
    unfit: list[tuple[Wanted, Recipe]] = []
    found, shapes = mapping.found, mapping.shapes
    for item in wanted:
        path = item.leaf.path
        source = found.get(path)
        if source is None:
            continue
        if shapes[path] == item.leaf.shape:
            sources.append((item, source.recipe, source.evidence))
        else:
            unfit.append((item, source.recipe))
    return certify(wanted, mapping.placed, sources, dataclasses.replace(known_of(mapping), unfit=unfit))


def judge(
    target: Target,
    stored: Stored,
    options: RestoreOptions,
    *,
    directory: str = "",
    overrides: Mapping[Path, Policy] | None = None,
    broken: Unreadable | None = None,
    chosen: Chosen | None = None,
) -> Verdict:
    """Decides what every leaf of a target will be.

    Args:
        target: What the caller wants.
        stored: What the checkpoint holds, from metadata.
        options: The caller's choices.
        directory: The item directory, for messages.
        overrides: Policies of single leaves.
        broken: Stored leaves that cannot be read.
        chosen: What `choose` returns for these arguments, where the caller has it.

    Raises:
        UnusedRuleError: A policy filter or a rule has no effect.
        UnreadableLeafError: A rule has none, or does not fit, because leaves are damaged.
        UnknownLayoutError: The tree is in no known layout.
    """
    broken = broken or Unreadable()
    options = dataclasses.replace(options, renames=rules_for_readable(options.renames, stored, broken))
    wanted = roles_of(target.leaves)
    policies = resolve(options.policy, target.variables, overrides or {})
    try:
        mapping, faults, broken_laws = chosen or choose(wanted, stored, options)
    except (RuleError, UnusedRuleError) as error:
        if broken.lost:  # It may be what the rule is for.
            raise unreadable(broken.lost) from error
        raise
    leaves = _Leaves(mapping, stored, options, policies)
    outcomes = {item.leaf.path: leaves.outcome(item) for item in wanted}
    restored = _of_kind(Restored, outcomes)
    others = outcomes if len(restored) < len(outcomes) else {}
    used = [v.recipe for v in outcomes.values() if not isinstance(v, Defaulted) and v.recipe is not None]
    left = left_over(wanted, mapping, used)
    missing, defaulted = _of_kind(Missing, others), _of_kind(Defaulted, others)
    sides = _sides(wanted, mapping)
    return Verdict(
        directory=directory,
        layout=mapping.layout.title,
        stored_count=len(stored),
        restored=restored,
        missing=missing,
        mismatched=_of_kind(Mismatched, others),
        defaulted=defaulted,
        unexpected=left.unexpected,
        skipped=left.skipped,
        dropped=left.dropped,
        unexpected_policy=options.unexpected,
        faults=(
            *faults,
            *mapping.faults,
            *faults_of(mapping),
            *claims_of_shared(wanted, mapping, target.aliases() if left.unexpected else {}, left.unexpected),
            *((error_of(broken_laws),) if broken_laws else ()),
            *indivisible(target.leaves.values()),
            *unreadable_leaves(
                broken,
                used=_read_by(used, left.dropped.values()),
                missing=missing,
                defaulted=[path for path in defaulted if sides.wanted[path].role == "random"],
                dropped=mapping.discarded,
                renamed=any(not isinstance(rule, Drop | ScanAxis) for rule in options.renames),
            ),
        ),
        sides=sides,
        renames=options.renames,
        read_as=options.layout,
    )


def known_of(mapping: LeafMapping) -> Known:
    """Returns what the laws may go by besides names and shapes."""
    made = (entry for _, entries in mapping.applied.made for entry in entries)
    by_rule = {path for entry in made for path in entry.sources}
    return Known(
        by_rule=frozenset(by_rule | mapping.discarded.keys()),
        copies=mapping.copied,
        said={rule.tokens: rule.axis for rule in mapping.applied.axes},
        scan_axis=mapping.layout.scan_axis,
        scans=mapping.layout.scans,
    )


def _read_by(recipes: Iterable[Recipe], dropped: Iterable[Dropped | Discarded]) -> Iterator[Path]:
    """Yields the stored leaves that are read: for a wanted leaf, or to see that they are zero."""
    for recipe in recipes:
        yield from reads(recipe)
    yield from (item.leaf.path for item in dropped if isinstance(item, Dropped))


_Outcome = Restored | Missing | Mismatched | Defaulted
_Kind = TypeVar("_Kind", bound=_Outcome)


def _of_kind(kind: type[_Kind], outcomes: Mapping[Path, _Outcome]) -> dict[Path, _Kind]:
    return {path: outcome for path, outcome in outcomes.items() if isinstance(outcome, kind)}


def _sides(wanted: Sequence[Wanted], mapping: LeafMapping) -> Sides:
    return Sides(
        wanted={item.leaf.path: item for item in wanted},
        placements=mapping.placed,
        roots=mapping.roots,
        stuck=mapping.stuck,
        copied=mapping.copied,
    )


@dataclasses.dataclass(frozen=True)
class _Leaves:
    """Judges single leaves against one mapping."""

    mapping: LeafMapping
    stored: Stored
    options: RestoreOptions
    policies: Mapping[Path, Policy]

    def outcome(self, item: Wanted) -> _Outcome:
        found = self.mapping.found.get(item.leaf.path)
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

    def _default(self, item: Wanted) -> Defaulted:
        last: DefaultSource = "seed" if item.role == "random" else "zeros"
        reason = "recomputed by the program, never in a Linen checkpoint"
        if item.role == "random":
            reason = "random state that is not stored"
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
        """Returns the scales without which stored codes are not the wanted floats."""
        changed = [leaf.path for leaf in sources if leaf.dtype != item.leaf.dtype]
        return tuple(scale for path in changed for scale in self._codes.get(path, ()))

    @cached_property
    def _codes(self) -> Mapping[Path, tuple[Path, ...]]:
        return scales_of(self.stored.values(), self.stored.keys() - self.mapping.used())

    def _compare_key(self, item: Wanted, found: Found, shape: Shape) -> Restored | Mismatched:
        source = self.stored[next(iter(reads(found.recipe)))]
        is_plain = isinstance(found.recipe, Read)
        if not is_plain or shape != item.leaf.shape or not same_key(source.key_impl, item.leaf.dtype):
            impl = f"key<{source.key_impl}>" if source.key_impl else str(source.dtype)
            return _mismatch(item, found, "key", shape, impl)
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
    return f"the stored group has {found.surplus} more layers" if found.surplus else ""


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
