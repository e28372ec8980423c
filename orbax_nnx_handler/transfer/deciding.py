"""The decision on one item directory: metadata read, target taken apart, plan made."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from etils import epath

from orbax_nnx_handler.planning.emptiness import refuse_empty
from orbax_nnx_handler.planning.lost import check_readable, lost_leaves
from orbax_nnx_handler.planning.options import RestoreOptions
from orbax_nnx_handler.planning.paths import Path
from orbax_nnx_handler.planning.plan import RestorePlan
from orbax_nnx_handler.planning.planner import make_plan
from orbax_nnx_handler.planning.policies import Policy
from orbax_nnx_handler.planning.target import Target, flatten_target
from orbax_nnx_handler.transfer.collection import paused_collection
from orbax_nnx_handler.transfer.metadata import Checkpoint, read_metadata


def decide_and_check(
    directory: epath.Path, target: Any, overrides: Mapping[Path, Any], options: RestoreOptions
) -> tuple[RestorePlan, Target, Checkpoint]:
    """Decides, and raises where the restore must fail.

    Raises:
        RestoreError: Lists every problem.
    """
    decided = decide(directory, target, overrides, options)
    decided[0].check()
    return decided


@paused_collection()
def decide(
    directory: epath.Path, target: Any, overrides: Mapping[Path, Any], options: RestoreOptions
) -> tuple[RestorePlan, Target, Checkpoint]:
    """Returns plan, target and checkpoint; the plan is not checked.

    Args:
        directory: The item directory.
        target: What the caller wants.
        overrides: Restore args by wanted path.
        options: The caller's choices.

    Raises:
        UnreadableLeafError: Nothing of the checkpoint can be read.
        RestoreError: The target has no leaf.
    """
    checkpoint = read_metadata(directory)
    if not checkpoint.leaves:
        check_readable(checkpoint.lost, checkpoint.foreign)
    parts = flatten_target(target, overrides)
    refuse_empty(target, parts)
    plan = make_plan(
        parts, checkpoint.leaves, options, directory=str(directory), overrides=_policies_of(overrides)
    )
    faults = (*plan.faults, *lost_leaves(plan, checkpoint.lost, checkpoint.foreign))
    return dataclasses.replace(plan, faults=faults), parts, checkpoint


def _policies_of(overrides: Mapping[Path, Any]) -> dict[Path, Policy]:
    found = {path: getattr(args, "policy", None) for path, args in overrides.items()}
    return {path: policy for path, policy in found.items() if policy is not None}
