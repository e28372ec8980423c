"""The decision on one item directory, from metadata alone.

Apart from `api`, so that the command line has it without what reads and writes arrays.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from etils import epath
from flax import nnx

from orbax_nnx_handler.planning.core.errors import RestoreError
from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.layouts import LayoutChoice
from orbax_nnx_handler.planning.mapping.matches import Discarded, SavedAs
from orbax_nnx_handler.planning.options import DtypeChoice, Policies, Policy, RestoreOptions, UnexpectedPolicy
from orbax_nnx_handler.planning.restore_plan import RestorePlan, make_plan
from orbax_nnx_handler.planning.rules import Rule
from orbax_nnx_handler.planning.target import (
    Target,
    flatten_like,
    flatten_target,
)
from orbax_nnx_handler.planning.verdict.leaf_verdicts import Unreadable, check_readable
from orbax_nnx_handler.storage import paused_collection
from orbax_nnx_handler.storage.checkpoint.find import find_item, hold
from orbax_nnx_handler.storage.checkpoint.metadata import Checkpoint, read_metadata
from orbax_nnx_handler.storage.checkpoint.stored_random import with_keys
from orbax_nnx_handler.storage.stores.kvstore import files_at
from orbax_nnx_handler.storage.stores.locations import as_path


@paused_collection()
def decide(
    checkpoint: Checkpoint,
    target: Any,
    overrides: Mapping[Path, Any],
    options: RestoreOptions,
    *,
    check: bool = False,
) -> tuple[RestorePlan, Target]:
    """Returns the plan, and the target taken apart.

    Args:
        checkpoint: What is stored.
        target: What the caller wants.
        overrides: Restore args by wanted path.
        options: The caller's choices.
        check: Whether to raise where the restore must fail.

    Raises:
        UnreadableLeafError: Nothing of the checkpoint can be read.
        RestoreError: The target has no leaf; under `check`, lists every problem.
    """
    parts = flatten_wanted(target, overrides, beside=checkpoint.on_devices.values())
    parts = with_stored_keys(checkpoint, parts)
    return plan_of(checkpoint, parts, overrides, options, check=check), parts


def flatten_wanted(target: Any, overrides: Mapping[Path, Any], *, beside: Iterable[Any] = ()) -> Target:
    """Returns the target taken apart, the first step of `decide`.

    Raises:
        RestoreError: Nothing is wanted, or a value by itself; see `flatten_target`.
    """
    parts = flatten_target(target, overrides, beside=beside)
    _refuse_empty(target, parts)
    return dataclasses.replace(parts, saved=functools.partial(_saved_places, target))


def _saved_places(target: Any, stored: Collection[Path]) -> Iterable[Mapping[Path, SavedAs]]:
    # Here, for nearly no plan needs what writes checkpoints, Orbax with it.
    from orbax_nnx_handler.storage.saving import saved_places

    return saved_places(target, stored)


_WAYS_OUT = (
    "pass the module, optimizer or state that is to be filled, such as nnx.eval_shape(make_model).",
    "to read the stored tree as it is, use Orbax alone: ocp.PyTreeCheckpointer().restore(ITEM).",
)
_FILTERED = "a State that nnx.state(model, FILTER) made is empty where the filter matches nothing."


def _refuse_empty(item: Any, target: Target) -> None:
    """Raises where a target has no leaf that has a name."""
    if () in target.leaves:
        raise RestoreError(
            f"the target is a {type(item).__name__} by itself, without a name.", hints=_WAYS_OUT
        )
    if target.leaves:
        return
    what = "None" if item is None else f"a {type(item).__name__} without a leaf"
    hints = (*_WAYS_OUT, _FILTERED) if isinstance(item, nnx.State) else _WAYS_OUT
    raise RestoreError(f"the target is {what}: there is nothing to restore into.", hints=hints)


def with_stored_keys(checkpoint: Checkpoint, parts: Target) -> Target:
    """Returns a target with keys where random keys are stored, the second step of `decide`.

    Raises:
        UnreadableLeafError: Nothing of the checkpoint can be read.
    """
    if not checkpoint.leaves:
        check_readable(checkpoint.broken)
    return with_keys(parts, checkpoint.leaves)


@paused_collection()
def plan_of(
    checkpoint: Checkpoint,
    parts: Target,
    overrides: Mapping[Path, Any],
    options: RestoreOptions,
    *,
    check: bool = False,
) -> RestorePlan:
    """Returns the plan, the second half of `decide`.

    Raises:
        RestoreError: Under `check`, lists every problem.
    """

    def made(broken: Unreadable) -> RestorePlan:
        return make_plan(
            parts,
            checkpoint.leaves,
            options,
            directory=str(checkpoint.directory),
            overrides=_policies_of(overrides),
            broken=broken,
        )

    plan, broken = made(checkpoint.broken), checkpoint.broken
    left = (
        [path for path, item in plan.dropped.items() if isinstance(item, Discarded)] if plan.missing else []
    )
    # Nothing reads what a rule leaves behind; a leaf of which bytes are gone is not missing for that.
    if left and (gone := checkpoint.incomplete(left, files_at(checkpoint.directory))):
        plan = made(dataclasses.replace(broken, damaged={**gone, **broken.damaged}))
    if check:
        plan.check()
    return plan


def _policies_of(overrides: Mapping[Path, Any]) -> dict[Path, Policy]:
    found = {path: getattr(args, "policy", None) for path, args in overrides.items()}
    return {path: policy for path, policy in found.items() if policy is not None}


def look_at(path: epath.PathLike | Mapping[str, Any], item: str | None) -> Checkpoint:
    """Returns what is known of a checkpoint, or of a tree in memory, without reading any array."""
    if not isinstance(path, str | os.PathLike):
        return hold(path)
    given = as_path(path)
    files = files_at(given)
    return read_metadata(find_item(given, item, files), files)


@paused_collection()
def plan_restore(
    path: epath.PathLike | Mapping[str, Any],
    target: Any,
    restore_args: Any = None,
    *,
    policy: Policies = "error",
    layout: LayoutChoice = "auto",
    renames: Iterable[Rule | tuple[str, str]] = (),
    init: Callable[[], Any] | None = None,
    unexpected: UnexpectedPolicy = "warn",
    dtype: DtypeChoice = "target",
    item: str | None = None,
) -> RestorePlan:
    """Decides what every leaf of a target would be; reads metadata only.

    ```python
    target = nnx.eval_shape(make_train_state)  # your NNX program; nothing is allocated
    plan = plan_restore(path, target)
    print(plan)  # each leaf: where it comes from, or why it does not
    plan.check()  # raises what `restore` would raise
    ```

    Args:
        path: A manager's root (its newest step), a step, an item directory, or one file
            of `flax.training.checkpoints` or `numpy.savez`; or a tree in memory, as
            `from_linen` takes it.
        target: An abstract or concrete `nnx.State`, `nnx.Module`, `nnx.Optimizer`,
            a pure dict of arrays or `jax.ShapeDtypeStruct`, or a tuple or dict of these.
        restore_args: A tree like the target whose leaves (Orbax's restore args, `jax.ShapeDtypeStruct`, a
            sharding alone) override sharding, dtype and policy.
        policy: What a missing weight becomes, or NNX filters that choose it.
        layout: How the checkpoint is arranged; `auto` finds out.
        renames: Rules from stored to wanted names.
        init: Builds the target with real values, for `policy="init"`.
        unexpected: What to do about stored leaves that the target does not want.
        dtype: `target` or `stored`.
        item: The item's name, where a step holds several.

    Returns:
        The plan. It is not checked: `plan.check()` raises what `restore` would.

    Raises:
        NotACheckpointError: The path is no checkpoint.
        UnusedRuleError: A rule or a policy filter has no effect.
        RestoreError: The target has no leaf.
    """
    options = RestoreOptions().override(
        policy=policy, layout=layout, renames=renames, init=init, unexpected=unexpected, dtype=dtype
    )
    overrides = flatten_like(restore_args) if restore_args is not None else {}
    plan, _ = decide(look_at(path, item), target, overrides, options)
    return plan
