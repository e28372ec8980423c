"""What becomes of each leaf: restored, missing (zeros, initial, an error), mismatched, unreadable."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence, Set
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
from orbax_nnx_handler.planning.core.errors import UnreadableLeafError
from orbax_nnx_handler.planning.core.folding import Row
from orbax_nnx_handler.planning.core.leaves import Shape, StoredLeaf
from orbax_nnx_handler.planning.core.lines import aligned, counted
from orbax_nnx_handler.planning.core.paths import Path, Tokens, canonical, render, segments, without_box
from orbax_nnx_handler.planning.core.recipes import Read, computes, reads
from orbax_nnx_handler.planning.layouts.layout import Stored
from orbax_nnx_handler.planning.mapping.mapping import LeafMapping
from orbax_nnx_handler.planning.mapping.matches import Found
from orbax_nnx_handler.planning.mapping.roots import strip
from orbax_nnx_handler.planning.options import DefaultSource, Policy, RestoreOptions
from orbax_nnx_handler.planning.rules import Drop, Rule, cast_of
from orbax_nnx_handler.planning.target.roles import Wanted
from orbax_nnx_handler.planning.verdict.claims import Unused
from orbax_nnx_handler.planning.verdict.outcomes import (
    Defaulted,
    Mismatched,
    Missing,
    Restored,
    dtype_name,
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

    def _has_whole_name(self, item: Wanted) -> bool:
        """Tells whether a name ends in a stored weight's with its network's: another leaf has taken it."""
        ends = (item.tokens[at:] for at in range(1, len(item.tokens) - 1))
        return any(end in self._in_networks for end in ends)

    @cached_property
    def _in_networks(self) -> Set[Tokens]:
        models = (item for item in self.mapping.placements if item.section == "model" and item.owner)
        return {canonical(item.owner) + without_box(item.tokens) for item in models}

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
            is_stored = self._unused.may_be(item, name) or self._has_whole_name(item)
            policy = "error" if is_stored else policy
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
        source = self._initial(item) or ("seed" if item.role == "random" else "zeros")
        if item.role != "random":
            reason = "never in a Linen checkpoint"
        if source == "zeros":
            reason += ", and computed by init=... if that is passed"
        return Defaulted(wanted=item.leaf, source=source, reason=reason)

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
        if any(leaf.dtype is None for leaf in sources):  # Texts.
            return _mismatch(item, found, "dtype", sources[0].shape, dtype_name(None))
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
        if None in casts or (by_rule and not kept and casts != ["same"]):
            strange = next((d for d, c in zip(dtypes, casts, strict=True) if c is None), None)
            held = str(strange or by_rule)
            return _mismatch(item, found, "dtype", item.leaf.shape, held, found.reason if by_rule else "")
        scales = () if by_rule or kept or computes(found.recipe) else self._scales(item, sources)
        if scales:
            detail = f"quantised: {render(scales[0])} is a scale of it"
            return _mismatch(item, found, "dtype", item.leaf.shape, str(sources[0].dtype), detail)
        if kept and len({*dtypes}) > 1:
            held = " and ".join(sorted({str(dtype) for dtype in dtypes}))
            return _mismatch(item, found, "dtype", item.leaf.shape, held, _SEVERAL)
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
_SEVERAL = "one array of leaves of several dtypes cannot keep the disk's: pass dtype='target'"
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unreadable:
    """Stored leaves that cannot be read, each with the reason.

    Attributes:
        lost: Those whose metadata is damaged: not even their shapes are known.
        damaged: Those whose shapes are known and whose bytes are not all there.
        foreign: Those that hold no numbers, with what they hold.
        without_values: Those of a tree in memory that have a shape only, with what they are.
    """

    lost: Mapping[Path, str] = dataclasses.field(default_factory=dict[Path, str])
    damaged: Mapping[Path, str] = dataclasses.field(default_factory=dict[Path, str])
    foreign: Mapping[Path, str] = dataclasses.field(default_factory=dict[Path, str])
    without_values: Mapping[Path, str] = dataclasses.field(default_factory=dict[Path, str])


def rules_for_readable(rules: Iterable[Rule], stored: Iterable[Path], found: Unreadable) -> tuple[Rule, ...]:
    """Returns the rules without each `Drop` for nothing but leaves that cannot be found anyway."""
    paths = list(stored) if found.lost else []

    def is_idle(rule: Rule) -> bool:
        return (
            isinstance(rule, Drop) and any(map(rule.is_for, found.lost)) and not any(map(rule.is_for, paths))
        )

    return tuple(rule for rule in rules if not is_idle(rule))


def unreadable_leaves(
    found: Unreadable,
    *,
    used: Iterable[Path],
    missing: Iterable[Path],
    defaulted: Iterable[Path],
    dropped: Iterable[Path] = (),
    renamed: bool = False,
) -> Iterable[UnreadableLeafError]:
    """Yields the faults that a wanted leaf is, or may be, one that cannot be read; no policy fills that one.

    Args:
        found: The stored leaves that cannot be read.
        used: The stored leaves that the plan reads.
        missing: The wanted leaves for which no stored one can be read.
        defaulted: The wanted random state for which none can be read.
        dropped: The stored leaves that rules leave behind.
        renamed: Whether rules give stored leaves other names: a lost leaf may then be any
            missing one.
    """
    if found == Unreadable():
        return  # Nearly every checkpoint.
    wanted = [_plain(path) for path in missing]
    streams = [_plain(path) for path in defaulted]

    def may_be_wanted(path: Path) -> bool:
        plain = _plain(path)
        return any(_may_be(plain, other) for other in wanted) or _is_stream(plain, streams)

    # A rule that leaves a leaf behind does not make a wanted one missing.
    read = dict.fromkeys((*used, *filter(may_be_wanted, dropped)))
    damaged = {path: found.damaged[path] for path in read if path in found.damaged}
    damaged |= {path: why for path, why in found.lost.items() if may_be_wanted(path) or (renamed and wanted)}
    without_numbers = {path: what for path, what in found.foreign.items() if may_be_wanted(path)}
    if damaged:
        yield unreadable(damaged)
    if without_numbers:
        yield not_numbers(without_numbers)
    without_values = {path: found.without_values[path] for path in read if path in found.without_values}
    if without_values:
        yield _no_values(without_values)


def _may_be(stored: Tokens, wanted: Tokens) -> bool:
    """Tells whether a stored leaf may be a wanted one: by its last name, or by most of the other's names."""
    names = {name for name in wanted if not name.isdecimal()}
    return stored[-1:] == wanted[-1:] or 2 * len(names & set(stored)) >= len(names) > 0


def _is_stream(stored: Tokens, wanted: Iterable[Tokens]) -> bool:
    """Tells whether a stored leaf may be one of these random streams, in the layout of any Flax."""
    unnamed = (*stored[:-2], *stored[-1:])
    return any(
        _ends(stored, tokens) or _ends(stored, (*tokens[:-2], *tokens[-1:])) or _ends(unnamed, tokens)
        for tokens in wanted
    )


def _ends(stored: Tokens, wanted: Tokens) -> bool:
    """Tells whether two paths end alike: in two keys, or in all of the shorter one."""
    size = min(2, len(stored), len(wanted))
    return bool(size) and stored[-size:] == wanted[-size:]


def check_readable(found: Unreadable) -> None:
    """Raises if any leaf of a checkpoint cannot be read.

    Raises:
        UnreadableLeafError: Lists the damaged ones, or else those that hold no numbers.
    """
    if found.lost or found.damaged:
        raise unreadable({**found.lost, **found.damaged})
    if found.foreign:
        raise not_numbers(found.foreign)


class UnfitName(str):
    """Why a leaf cannot be read that is whole: it has a name that its store does not keep apart."""

    __slots__ = ()
    way = "save it where it was written, under other names or with use_ocdbt=True."


class SharedName(UnfitName):
    """Why a leaf cannot be read that had the name of another one when both were saved."""

    __slots__ = ()
    way = (
        "Orbax joins the keys of a path by dots, and kept one of these leaves alone: save them where they "
        "were written, under names that differ then too."
    )


def unreadable(lost: Mapping[Path, str]) -> UnreadableLeafError:
    """Returns the error that lists leaves whose arrays cannot be found."""
    hint = "a part of it is damaged, or was not copied: copy it again, or restore another step."
    ways = {reason.way if isinstance(reason, UnfitName) else hint for reason in lost.values()}
    hint = ways.pop() if len(ways) == 1 else hint
    what = counted(len(lost), "leaf whose array", "leaves whose arrays")
    return _listing(lost, f"names {what} cannot be read", hint)


def not_numbers(foreign: Mapping[Path, str]) -> UnreadableLeafError:
    """Returns the error that lists leaves which are whole and hold no numbers."""
    return _listing(
        foreign,
        f"has {counted(len(foreign), 'leaf that holds', 'leaves that hold')} no numbers of a known type",
        "load it where it was written, and save them again as arrays of float32 or of integers.",
    )


def _no_values(leaves: Mapping[Path, str]) -> UnreadableLeafError:
    """Returns the error that lists leaves of a tree in memory which have a shape and no values."""
    return _listing(
        leaves,
        f"has {counted(len(leaves), 'leaf', 'leaves')} without values",
        "give it arrays; what would come of their shapes, "
        "jax.eval_shape(lambda tree: from_linen(tree, target), tree) tells.",
        whose="tree",
    )


def _listing(
    leaves: Mapping[Path, str], what: str, hint: str, whose: str = "checkpoint"
) -> UnreadableLeafError:
    rows = aligned(Row(path, (reason,)) for path, reason in leaves.items())
    return UnreadableLeafError(f"the {whose} {what}:\n{rows}", paths=list(leaves), hints=[hint])


def _plain(path: Path) -> Tokens:
    return tuple(name for name in segments(path) if name != "value")
