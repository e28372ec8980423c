"""What a converted checkpoint holds: every leaf, what it is made from, and where it is written."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from orbax_nnx_handler.planning.core.dtypes import cast_between, is_key, scales_of
from orbax_nnx_handler.planning.core.errors import DtypeMismatchError, RestoreError, RuleError
from orbax_nnx_handler.planning.core.folding import Row
from orbax_nnx_handler.planning.core.leaves import StoredLeaf
from orbax_nnx_handler.planning.core.lines import aligned
from orbax_nnx_handler.planning.core.paths import Path, render
from orbax_nnx_handler.planning.core.recipes import fills, reads, render_reads, substitute
from orbax_nnx_handler.planning.layouts.layout import Section, Stored
from orbax_nnx_handler.planning.restore_plan import RestorePlan
from orbax_nnx_handler.planning.rules import Rule
from orbax_nnx_handler.planning.target.roles import roles_of
from orbax_nnx_handler.storage.converting.blocks import Written
from orbax_nnx_handler.storage.restoring.fill import fill_leaves
from orbax_nnx_handler.storage.saving.arrange import Flavour
from orbax_nnx_handler.storage.saving.save import plan_save
from orbax_nnx_handler.storage.saving.saved import SavedLeaf


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


def check_paths_distinct(leaves: Iterable[Written]) -> None:
    """Raises where two leaves would be written to one path.

    Raises:
        RestoreError: Names the paths.
    """
    seen: set[Path] = set()
    twice: list[Path] = []
    for leaf in leaves:
        (twice.append if leaf.path in seen else seen.add)(leaf.path)
    if twice:
        raise refusal("leaves would be written to a path that another leaf has", twice)


def refusal(what: str, paths: list[Path], hint: str = "") -> RestoreError:
    """Returns the error for a conversion that some leaves stand in the way of."""
    shown = "\n".join(f"  {render(path)}" for path in paths[:20])
    rest = f"\n  ... and {len(paths) - 20} more" if len(paths) > 20 else ""
    return RestoreError(f"{len(paths)} {what}:\n{shown}{rest}", paths=paths, hints=[hint] if hint else [])


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
