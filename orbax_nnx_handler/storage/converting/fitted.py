"""Where the leaves of a target are written: under NNX's names, or as a Linen program stores them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from orbax_nnx_handler.planning.core.containers import is_empty, nodes_of, tree_of
from orbax_nnx_handler.planning.core.errors import RestoreError
from orbax_nnx_handler.planning.core.paths import Path, render
from orbax_nnx_handler.planning.plan import RestorePlan
from orbax_nnx_handler.planning.rules import Rule
from orbax_nnx_handler.planning.target.target import flatten_like
from orbax_nnx_handler.storage.converting.leaves import planned_leaves, takes_dtype, with_dtype
from orbax_nnx_handler.storage.restoring.fill import fill_leaves
from orbax_nnx_handler.storage.saving.linen_tree import Flavour
from orbax_nnx_handler.storage.saving.save import arrange_certain, in_linen_form
from orbax_nnx_handler.storage.saving.written import Written


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
    by_identity = {id(value): path for path, value in flatten_like(target).items()}
    values: Mapping[Path, Any] = {**fitted.filled, **fitted.leaves}
    nodes = dict(nodes_of(arrange_certain(target, flavour).tree))
    paths = {at: by_identity[id(node)] for at, node in nodes.items() if not is_empty(node)}
    empty = {at: node for at, node in nodes.items() if is_empty(node)}
    tree = tree_of(empty | {at: values[path] for at, path in paths.items()}, lists=True)
    written = dict(nodes_of(in_linen_form(tree, flavour, rules)))
    kept = set(paths.values())
    return Placed(
        leaves=[
            dataclasses.replace(node, path=at) for at, node in written.items() if isinstance(node, Written)
        ],
        given={
            at: node if is_empty(node) else jnp.asarray(node)
            for at, node in written.items()
            if not isinstance(node, Written)
        },
        homeless=[path for path in values if path not in kept],
    )
