"""The leaves of a conversion: what each is made from, and where it is written.

A plan tells it where there is a target. Where there is none, the stored layout alone tells parameters,
statistics, optimizers and steps apart, and a tree of bare weights is searched for what shows that an NNX
program saved it.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from orbax_nnx_handler.planning import layouts
from orbax_nnx_handler.planning.core.dtypes import cast_between, is_key, scales_of
from orbax_nnx_handler.planning.core.errors import (
    AmbiguousMappingError,
    DtypeMismatchError,
    Hint,
    RestoreError,
    RuleError,
)
from orbax_nnx_handler.planning.core.folding import Row
from orbax_nnx_handler.planning.core.leaves import StoredLeaf
from orbax_nnx_handler.planning.core.lines import aligned
from orbax_nnx_handler.planning.core.paths import Path, canonical, render, segments, shared_levels
from orbax_nnx_handler.planning.core.recipes import Read, fills, reads, render_reads, substitute
from orbax_nnx_handler.planning.layouts.layout import FLAX_COLLECTIONS, Layout, Placement, Section, Stored
from orbax_nnx_handler.planning.mapping.optimizer_states import parameter_paths, read_stored
from orbax_nnx_handler.planning.restore_plan import RestorePlan
from orbax_nnx_handler.planning.rules import Rule
from orbax_nnx_handler.planning.rules.entries import model_entries
from orbax_nnx_handler.planning.target.roles import roles_of
from orbax_nnx_handler.storage.converting.blocks import Written, refusal
from orbax_nnx_handler.storage.restoring.fill import fill_leaves
from orbax_nnx_handler.storage.saving import plan_save
from orbax_nnx_handler.storage.saving.arrange import Flavour
from orbax_nnx_handler.storage.saving.saved import SavedLeaf

# Layouts whose optimizer state has the shape that optax gives it.
_OPTAX = frozenset({"train_state", "maxtext", "variables", "params"})

WITHOUT_COLLECTIONS = frozenset({"nnx_state", "nnx_pure_dict"})
"""Layouts under NNX's names, which keep variables of all types together."""


def planned_leaves(plan: RestorePlan) -> list[Written]:
    """Returns the leaves that a plan restores, under their wanted paths."""
    sections: dict[str, Section] = {"optimizer": "optimizer", "step": "step"}
    roles = {item.leaf.path: item.role for item in roles_of({p: i.wanted for p, i in plan.restored.items()})}
    return [
        Written(
            path=path,
            recipe=item.recipe,
            shape=item.wanted.shape,
            dtype=item.dtype,
            section=sections.get(roles[path], "model"),
        )
        for path, item in plan.restored.items()
    ]


def weights_only(leaves: Iterable[Written]) -> list[Written]:
    """Returns the leaves of the model: no optimizer, no step."""
    return [leaf for leaf in leaves if leaf.section == "model"]


def with_dtype(leaves: Iterable[Written], dtype: np.dtype[Any] | None) -> list[Written]:
    """Returns the leaves with floating-point weights in another dtype; moments and counts keep theirs."""
    return [
        dataclasses.replace(leaf, dtype=dtype)
        if dtype is not None and takes_dtype(leaf.section, leaf.dtype)
        else leaf
        for leaf in leaves
    ]


def check_codes(leaves: Iterable[Written], stored: Stored) -> None:
    """Raises where codes of a quantised leaf would become floats of another type.

    Raises:
        DtypeMismatchError: Names the leaves.
    """
    scales = scales_of(stored.values())
    bad = [leaf for leaf in leaves if _changed(leaf, stored) & scales.keys()] if scales else []
    if bad:
        rows = aligned(Row(leaf.path, (str(leaf.shape), str(leaf.dtype))) for leaf in bad)
        beside = render(next(scales[path][0] for path in reads(bad[0].recipe) if path in scales))
        raise DtypeMismatchError(
            f"{len(bad)} leaves are quantised, with scales such as {beside} beside them:\n{rows}",
            paths=[leaf.path for leaf in bad],
            hints=["leave --dtype out: codes of another dtype are no weights either."],
        )


def rounded(leaves: Iterable[Written], stored: Stored) -> list[Path]:
    """Returns the leaves that are written in a narrower floating-point type than they are stored in."""
    return [
        leaf.path
        for leaf in leaves
        if any(
            not is_key(leaf.dtype) and cast_between(_dtype(stored[path]), leaf.dtype, False) == "narrower"
            for path in _changed(leaf, stored)
        )
    ]


def _changed(leaf: Written, stored: Stored) -> set[Path]:
    """Returns the stored leaves that a leaf is made from and that have another dtype."""
    return {path for path in reads(leaf.recipe) if stored[path].dtype not in (None, leaf.dtype)}


def _dtype(leaf: StoredLeaf) -> np.dtype[Any]:
    return cast("np.dtype[Any]", leaf.dtype)


def takes_dtype(section: Section, dtype: np.dtype[Any]) -> bool:
    """Tells a floating-point weight."""
    return section == "model" and not is_key(dtype) and jnp.issubdtype(dtype, jnp.floating)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placed:
    """What is written.

    Attributes:
        leaves: What comes from the checkpoint.
        given: What does not: values, and empty nodes.
        without_variable: Paths in the target of what is not written.
    """

    leaves: Sequence[Written]
    given: Mapping[Path, Any]
    without_variable: Sequence[Path] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fitted:
    """The leaves of a target, from a checkpoint or computed, by path in the target.

    Attributes:
        leaves: What comes from the checkpoint.
        filled: What does not: random state, and missing weights where the policy allows.
        variables: The paths that an `nnx.Variable` is at.
    """

    leaves: Mapping[Path, Written]
    filled: Mapping[Path, jax.Array]
    variables: frozenset[Path]


def fit(plan: RestorePlan, init: Any, dtype: np.dtype[Any] | None) -> Fitted:
    """Returns the leaves of a plan's target.

    Args:
        plan: A plan that fits.
        init: Builds the target, for what no checkpoint holds.
        dtype: Another dtype for floating-point weights, or None.

    Raises:
        RestoreError: A leaf would be stored layers and new ones together.
    """
    partly = [path for path, item in plan.missing.items() if item.recipe is not None]
    if partly:
        listed = ", ".join(map(render, partly))
        raise RestoreError(f"some layers are missing, and convert does not mix stored and new ones: {listed}")
    groups = (plan.restored, plan.missing, plan.defaulted)
    wanted = {path: item.wanted for group in groups for path, item in group.items()}
    filled = fill_leaves(plan, init)
    if dtype is not None:
        weights = {path for path in plan.missing if takes_dtype("model", filled[path].dtype)}
        filled = {path: value.astype(dtype) if path in weights else value for path, value in filled.items()}
    return Fitted(
        leaves={leaf.path: leaf for leaf in with_dtype(planned_leaves(plan), dtype)},
        filled=filled,
        variables=frozenset(path for path, leaf in wanted.items() if leaf.kind is not None),
    )


def in_nnx(fitted: Fitted) -> Placed:
    """Returns the leaves where a saved `nnx.State` keeps them: a Variable's value one level deeper."""

    def place(path: Path) -> Path:
        return (*path, "value") if path in fitted.variables else path

    return Placed(
        leaves=[dataclasses.replace(leaf, path=place(path)) for path, leaf in fitted.leaves.items()],
        given={place(path): value for path, value in fitted.filled.items()},
    )


def in_linen(fitted: Fitted, target: Any, flavour: Flavour, rules: Sequence[Rule]) -> Placed:
    """Returns the leaves where and as a Linen program keeps them, just as a save would.

    Args:
        fitted: The leaves.
        target: The target that they are of.
        flavour: The layout.
        rules: Rules from Linen's names to those of the target; they are undone.

    Raises:
        RuleError: A rule cannot be undone.
    """
    plan = plan_save(target, flavour, undone=rules)
    leaves, given = list[Written](), dict[Path, Any](plan.empty)
    for at, leaf in plan.leaves.items():
        stored = [path for path in leaf.sources if path in fitted.leaves]
        if not leaf.sources:
            like = fitted.leaves.get(leaf.like) or fitted.filled[leaf.like]
            given[at] = jnp.zeros(leaf.shape, like.dtype)
        elif not stored:
            given[at] = jnp.asarray(leaf.value({**plan.values, **fitted.filled}))
        elif len(stored) < len(leaf.sources) or fills(leaf.recipe):
            raise _not_joined(leaf, [path for path in leaf.sources if path not in stored])
        else:
            leaves.append(_written(at, leaf, fitted.leaves))
    kept = {path for leaf in plan.leaves.values() for path in leaf.sources}
    paths = (*fitted.filled, *fitted.leaves)
    return Placed(leaves=leaves, given=given, without_variable=[path for path in paths if path not in kept])


def _written(at: Path, leaf: SavedLeaf, fitted: Mapping[Path, Written]) -> Written:
    first = fitted[leaf.sources[0]]
    return dataclasses.replace(
        first,
        path=at,
        recipe=substitute(leaf.recipe, lambda path: fitted[path].recipe),
        shape=leaf.shape,
        dtype=leaf.dtype if first.section == "step" else first.dtype,
    )


def _not_joined(leaf: SavedLeaf, paths: list[Path]) -> RuleError:
    listed = ", ".join(map(render, paths))
    return RuleError(
        f"{render_reads(leaf.recipe)} cannot be joined: {listed} is not in the checkpoint.", paths=paths
    )


# Without a target.


def reading_of(stored: Stored, name: str = "auto") -> Layout:
    """Returns the layout whose names a conversion to another layout goes by.

    Args:
        stored: The stored leaves.
        name: `auto`, or the name of a layout.

    Raises:
        UnknownLayoutError: The tree is in no known layout.
        AmbiguousMappingError: What one layout takes for collections may be modules of a model.
    """
    first, *others = layouts.candidates(stored, name)
    if not others or first.is_certain is None or first.is_certain(stored):
        return first
    placements = first.place(stored)
    collections = {item.collection for item in placements if item.section == "model"}
    if len(collections) > 1 and collections <= set(FLAX_COLLECTIONS):
        return first
    rows = [
        f"  {render(one.leaf.path)}: {_in_words(one)}, or {_in_words(other)}"
        for one, other in zip(placements, others[0].place(stored), strict=True)
        if one.section == "model" and (one.collection, one.path) != (other.collection, other.path)
    ]
    raise AmbiguousMappingError(
        f"the checkpoint can be read as {first.title} or as {others[0].title}, "
        f"and {len(rows)} leaves would get other names:\n" + "\n".join(rows[:10]),
        hints=[f"--layout {first.name} or --layout {others[0].name} says which."],
    )


def _in_words(item: Placement) -> str:
    return f"{render(item.path)} in {item.collection}"


def every_leaf(stored: Stored, layout: Layout) -> list[Written]:
    """Returns the leaves of a checkpoint as they are.

    Raises:
        RestoreError: A leaf is no array.
    """
    odd = [leaf.path for leaf in stored.values() if leaf.dtype is None]
    if odd:
        raise refusal("leaf is a string, which", "leaves are strings, which", "cannot be converted", odd)
    placements = layout.place(stored)
    parameters = {item.leaf.path: item.path for item in placements if item.section == "model"}
    parameters |= dict(_parameters_of_moments(placements, parameters))
    return [
        Written(
            path=item.leaf.path,
            recipe=Read(item.leaf.path),
            shape=item.leaf.shape,
            dtype=cast("np.dtype[Any]", item.leaf.dtype),
            section=item.section,
            collection=item.collection,
            parameter=parameters.get(item.leaf.path),
            owner=item.owner,
            is_unused=item.is_unused,
        )
        for item in placements
    ]


def _parameters_of_moments(
    placements: Sequence[Placement], parameters: dict[Path, Path]
) -> Iterator[tuple[Path, Path]]:
    """Yields each moment with the path of its parameter, where optax arranged them."""
    weights = model_entries(placements)
    for owner in {item.owner for item in placements if item.section == "optimizer"}:
        own = [entry for entry in weights if entry.owner == canonical(owner)] or weights
        known = parameter_paths(own, shared_levels([entry.tokens for entry in own], own=1))
        states = read_stored([item for item in placements if item.owner == owner], known).states
        for moments in (field for state in states for field in state.moments.values()):
            for parameter, moment in moments.items():
                if parameter in parameters:
                    yield moment.path, parameters[parameter]


def in_layout(leaves: Iterable[Written], layout: str, flavour: Flavour) -> list[Written]:
    """Returns the leaves where another family of Linen programs keeps them.

    One train state becomes the whole checkpoint; several keep the keys that they are below.

    Args:
        leaves: What `every_leaf` returned.
        layout: Name of the layout that they are in.
        flavour: `linen` (Flax TrainState) or `maxtext`.

    Raises:
        RestoreError: The layout does not tell what Linen needs to know; see `_check_nothing_aside`.
    """
    leaves = list(leaves)
    if layout in WITHOUT_COLLECTIONS:
        raise RestoreError(
            "a saved NNX state does not tell parameters from statistics, so its layout cannot change alone.",
            hints=[
                Hint(
                    f"give the factory of the model too (SRC DST MODULE:FACTORY --to {flavour}); its "
                    "Variable types tell the collections, and its modules what Linen stores in another form."
                )
            ],
        )
    foreign = [leaf.path for leaf in leaves if leaf.section == "optimizer" and layout not in _OPTAX]
    if foreign:
        raise refusal(
            *("optimizer leaf is", "optimizer leaves are", "not arranged as optax arranges them", foreign),
            "pass --weights-only.",
        )
    if layout == "maxtext" and flavour == "linen":
        _check_nothing_aside(leaves)
    level = ("params",) if flavour == "maxtext" else ()
    above = owner_left_out(leaves)
    moved = [dataclasses.replace(leaf, path=_moved(leaf, level)) for leaf in leaves]
    return [
        dataclasses.replace(leaf, path=leaf.path[len(above) :]) if leaf.owner == above else leaf
        for leaf in moved
    ]


def _check_nothing_aside(leaves: Iterable[Written]) -> None:
    """Raises where a collection of the model is kept aside, as an NNX program saves it for MaxText.

    Random state has no other place in Linen, nor has a copy of the model or a number beside it.

    Raises:
        RestoreError: Names the leaves: their Variables' types alone tell the collection.
    """
    aside = {leaf.path[1:]: leaf for leaf in leaves if leaf.section == "aux" and len(leaf.path) > 2}
    random = {path[:-1] for path, leaf in aside.items() if is_key(leaf.dtype)}
    weights = {segments(leaf.parameter) for leaf in leaves if leaf.section == "model" and leaf.parameter}
    copies = {path[0] for path in aside if segments(path[1:]) in weights}
    lost = [leaf.path for path, leaf in aside.items() if path[:-1] not in random and path[0] not in copies]
    if lost:
        raise refusal(
            "leaf is kept aside, where a Linen program reads none, and does not tell its",
            "leaves are kept aside, where a Linen program reads none, and do not tell their",
            "collection",
            lost,
            "give the factory of the model too (SRC DST MODULE:FACTORY --to linen), whose Variable types do.",
        )


def owner_left_out(leaves: Iterable[Written]) -> Path:
    """Returns the keys above the only train state of a checkpoint; none where there are several."""
    owners = {leaf.owner for leaf in leaves if leaf.section != "other"}
    return owners.pop() if len(owners) == 1 else ()


def _moved(leaf: Written, level: Path) -> Path:
    """Returns the path of a leaf in another layout, the keys above its train state included."""
    if leaf.section == "other" or leaf.parameter is None:
        return leaf.path
    if leaf.section == "model":
        return (*leaf.owner, *level, leaf.collection or "params", *leaf.parameter)
    # The optimizer of MaxText runs on the whole variables dict: `mu/params/...`.
    slot = leaf.above[:-1] if leaf.above[-1:] == ("params",) else leaf.above
    return (*slot, *level, *leaf.parameter)


def check_linen_names(leaves: Iterable[Written], flavour: Flavour) -> None:
    """Raises where bare weights are under names that NNX gives.

    Raises:
        RestoreError: Names the leaves; the hint leads to the layout that is asked for.
    """
    marked = marks_of_nnx(leaf.parameter for leaf in leaves if leaf.parameter and leaf.section == "model")
    if marked:
        raise refusal(
            *("leaf is named as NNX names it, so", "leaves are named as NNX names them, so"),
            "parameters and statistics cannot be told apart",
            marked,
            f"give the factory of the model too (SRC DST MODULE:FACTORY --to {flavour}); "
            "--layout params where a Linen program wrote this all the same.",
        )


# What stands side by side in NNX and never among the parameters of a Linen program: the fused gates of
# a cell, the statistics of a normalisation.
_TOGETHER = (("dense_i", "dense_h"), ("mean", "var"))


def marks_of_nnx(paths: Iterable[Path]) -> list[Path]:
    """Returns the paths that only NNX gives; a Linen program has other names or other collections.

    Args:
        paths: The paths of a model's leaves below any collection.
    """
    listed = {path: segments(path) for path in paths}
    names: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for keys in listed.values():
        for depth, key in enumerate(keys):
            names[keys[:depth]].add(key)
    return [path for path, keys in listed.items() if _is_marked(keys, names)]


def _is_marked(keys: tuple[str, ...], names: dict[tuple[str, ...], set[str]]) -> bool:
    # Linen numbers modules in the name, NNX lists in the path.
    return any(
        key.isdecimal() or any(key in pair and names[keys[:depth]] >= set(pair) for pair in _TOGETHER)
        for depth, key in enumerate(keys)
    )
