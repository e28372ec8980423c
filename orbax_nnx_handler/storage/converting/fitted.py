"""Where the leaves of a target are written: under NNX's names, or as a Linen program stores them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from orbax_nnx_handler.planning.core.errors import RestoreError, RuleError
from orbax_nnx_handler.planning.core.paths import Path, render
from orbax_nnx_handler.planning.core.recipes import fills, render_reads, substitute
from orbax_nnx_handler.planning.plan import RestorePlan
from orbax_nnx_handler.planning.rules import Rule
from orbax_nnx_handler.storage.converting.blocks import Written
from orbax_nnx_handler.storage.converting.leaves import planned_leaves, takes_dtype, with_dtype
from orbax_nnx_handler.storage.restoring.fill import fill_leaves
from orbax_nnx_handler.storage.saving.arrange import Flavour
from orbax_nnx_handler.storage.saving.save import plan_save
from orbax_nnx_handler.storage.saving.saved import SavedLeaf


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placed:
    """What is written.

    Attributes:
        leaves: What comes from the checkpoint.
        given: What does not: values, and empty nodes.
        homeless: Paths in the target of what is not written.
    """

    leaves: Sequence[Written]
    given: Mapping[Path, Any]
    homeless: Sequence[Path] = ()


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
    return Placed(leaves=leaves, given=given, homeless=[path for path in paths if path not in kept])


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
