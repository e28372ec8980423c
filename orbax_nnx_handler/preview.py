"""The verdict on a restore, from metadata alone.

Apart from `api`, so that the command line has it without what reads and writes arrays.
"""

from collections.abc import Callable, Iterable
from typing import Any

from etils import epath

from orbax_nnx_handler.planning.options import DtypeChoice, RestoreOptions
from orbax_nnx_handler.planning.plan import RestorePlan, UnexpectedPolicy
from orbax_nnx_handler.planning.policies import Policies
from orbax_nnx_handler.planning.rules import Rule
from orbax_nnx_handler.planning.target import flatten_like
from orbax_nnx_handler.transfer.deciding import decide
from orbax_nnx_handler.transfer.locating import find_item


def plan_restore(
    path: epath.PathLike,
    target: Any,
    restore_args: Any = None,
    *,
    policy: Policies = "error",
    layout: str = "auto",
    renames: Iterable[Rule | tuple[str, str]] = (),
    init: Callable[[], Any] | None = None,
    unexpected: UnexpectedPolicy = "warn",
    dtype: DtypeChoice = "target",
    item: str | None = None,
) -> RestorePlan:
    """Decides what every leaf of a target would be; reads metadata only.

    Args:
        path: A manager's root (its newest step), a step, an item directory, or one file
            of `flax.training.checkpoints` or `numpy.savez`.
        target: An abstract or concrete `nnx.State`, `nnx.Module`, `nnx.Optimizer`,
            a pure dict of arrays or `jax.ShapeDtypeStruct`, or a tuple or dict of these.
        restore_args: A tree like the target whose leaves override sharding, dtype and policy.
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
    plan, _, _ = decide(find_item(path, item), target, overrides, options)
    return plan
