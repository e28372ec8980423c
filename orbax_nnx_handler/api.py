"""Restore, suggest and save without a manager; the plan alone is in `planner`."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
from absl import logging
from etils import epath

from orbax_nnx_handler.orbax_interfaces import v0 as ocp
from orbax_nnx_handler.planner import flatten_wanted, look_at, plan_of, with_stored_keys
from orbax_nnx_handler.planning.core.errors import RestoreError
from orbax_nnx_handler.planning.core.paths import Path, render
from orbax_nnx_handler.planning.layouts import LayoutChoice
from orbax_nnx_handler.planning.options import (
    DtypeChoice,
    Policies,
    RestoreOptions,
    SingleReplica,
    UnexpectedPolicy,
    check_init,
)
from orbax_nnx_handler.planning.restore_plan import RestorePlan, RestoreReport
from orbax_nnx_handler.planning.rules import Rule
from orbax_nnx_handler.planning.suggesting import Suggestion, order_of, propose
from orbax_nnx_handler.planning.target import (
    Target,
    flatten_like,
)
from orbax_nnx_handler.storage import agree, agree_on, naming_shortage, paused_collection
from orbax_nnx_handler.storage.checkpoint.find import find_item, hold
from orbax_nnx_handler.storage.checkpoint.metadata import Checkpoint, read_metadata
from orbax_nnx_handler.storage.reading.memory import Memory
from orbax_nnx_handler.storage.reading.single_replica import single_replica_leaves
from orbax_nnx_handler.storage.restoring import carry_out
from orbax_nnx_handler.storage.saving import (
    RulesOrRestore,
    as_save_item,
    linen_save,
    nothing_to_save,
    plan_save,
)
from orbax_nnx_handler.storage.saving.arrange import Flavour, Transformation, is_nnx
from orbax_nnx_handler.storage.saving.atomic import save_item
from orbax_nnx_handler.storage.stores.files import Files
from orbax_nnx_handler.storage.stores.kvstore import files_at
from orbax_nnx_handler.storage.stores.locations import absolute, as_path, check_writable
from orbax_nnx_handler.verifying import check_tolerance, programs_of
from orbax_nnx_handler.verifying.settling import Settling

_LESS_AT_ONCE = "bound what is under way at once: NNXLinenHandler(restore_concurrent_gb=1)."

TargetT = TypeVar("TargetT")
"""The type of a target, which is that of the result."""


@paused_collection()
def restore(
    path: epath.PathLike,
    target: TargetT,
    restore_args: Any = None,
    *,
    policy: Policies = "error",
    layout: LayoutChoice = "auto",
    renames: Iterable[Rule | tuple[str, str]] = (),
    init: Callable[[], Any] | None = None,
    unexpected: UnexpectedPolicy = "warn",
    dtype: DtypeChoice = "target",
    item: str | None = None,
    concurrent_gb: float | None = None,
    single_replica: bool | SingleReplica = False,
    progress: Callable[[int], None] | None = None,
) -> TargetT:
    """Restores a Linen checkpoint into a target; takes what `plan_restore` takes.

    ```python
    target = nnx.eval_shape(make_train_state)
    policy = {nnx.PathContains("head"): "init", ...: "error"}
    state = restore(path, target, policy=policy, init=make_train_state)
    ```

    Args:
        path: A manager's root (its newest step), a step, an item directory, or one file
            of `flax.training.checkpoints` or `numpy.savez`.
        target: See `plan_restore`.
        restore_args: See `plan_restore`.
        policy: See `plan_restore`.
        layout: See `plan_restore`.
        renames: See `plan_restore`.
        init: See `plan_restore`.
        unexpected: See `plan_restore`.
        dtype: See `plan_restore`.
        item: See `plan_restore`.
        concurrent_gb: Upper bound in GB (1e9 bytes) of what is read but not yet in place.
        single_replica: Whether one process reads replicated data and copies it to the others
            over the mesh.
        progress: Called with the bytes put in place since the last call.

    Returns:
        A new value of the target's own type, every leaf an array on its devices.

    Raises:
        RestoreError: The checkpoint cannot become the target; raised before any
            array is read, and lists every problem.
    """
    options = RestoreOptions(single_replica=single_replica or False).override(
        policy=policy, layout=layout, renames=renames, init=init, unexpected=unexpected, dtype=dtype
    )
    limit = _bytes_of(concurrent_gb)
    given = as_path(path)
    files = files_at(given)
    directory = agree_on("checkpoint", lambda: find_item(given, item, files))
    result, _ = restore_item(
        directory, target, restore_args, options, concurrent_bytes=limit, progress=progress, files=files
    )
    return result


def _bytes_of(gigabytes: Any) -> int | None:
    if gigabytes is None:
        return None
    if not isinstance(gigabytes, int | float) or not 0 < gigabytes < float("inf"):
        raise ValueError(f"concurrent_gb is a positive number of gigabytes, not {gigabytes!r}")
    return int(gigabytes * 1e9)


def suggest(
    path: epath.PathLike | Mapping[str, Any],
    target: Any,
    *,
    init: Callable[[], Any] | None = None,
    layout: LayoutChoice = "auto",
    renames: Iterable[Rule | tuple[str, str]] = (),
    item: str | None = None,
    verify: tuple[Callable[..., Any], Callable[..., Any], Sequence[Any]] | None = None,
    tolerance: float | None = None,
) -> Suggestion:
    """Proposes `renames` for a target whose names are not the checkpoint's; reads metadata only.

    ```python
    print(suggest(path, target, init=make_train_state))  # renames=[...], to be read and pasted
    ```

    Args:
        path: See `plan_restore`.
        target: See `plan_restore`.
        init: Builds the target. It tells in which order modules are created, which
            an abstract target has forgotten; traced, nothing is computed.
        layout: See `plan_restore`.
        renames: Rules that are settled; they are not proposed again.
        item: See `plan_restore`.
        verify: `(linen_apply, nnx_apply, inputs)` as for `verify`: both programs are run to settle
            what is open, each question at the smallest module that tells, and once more to prove the
            whole. Reads the weights.
        tolerance: How far apart outputs may be that are the same, as `verify` takes it.

    Returns:
        The proposal. Nothing is applied: print it, check it, paste it.

    Raises:
        RestoreError: The path is no checkpoint, its layout is unknown, the target has no leaf,
            or `renames` do not fit.
        VerificationError: One of the programs fails, or their outputs cannot be compared.
        ValueError: `tolerance` is no number from 0 on.
    """
    check_tolerance(tolerance)
    options = RestoreOptions.of(layout=layout, renames=renames, policy="warn")
    check_init(init)
    programs = None if verify is None else programs_of(verify)
    checkpoint = look_at(path, item)
    parts = flatten_wanted(target, {})
    found = propose(parts, checkpoint.leaves, options, order_of(target, init))
    if programs is None:
        return found
    return Settling(
        checkpoint=checkpoint,
        target=target,
        options=options,
        suggestion=found,
        programs=programs,
        init=init,
        tolerance=tolerance,
    ).settled()


def save(
    path: epath.PathLike,
    state: Any,
    *,
    layout: Flavour = "linen",
    tx: Transformation | None = None,
    renames: RulesOrRestore = (),
    force: bool = False,
) -> None:
    """Saves an NNX state as one item in the Linen layout.

    ```python
    state = restore(path, target)
    save("run_linen", state)  # stock Orbax and the Linen program read it
    ```

    Args:
        path: The item directory to create.
        state: An `nnx.State`, `nnx.Module`, `nnx.Optimizer`, or a tuple or dict of these.
        layout: `linen` (Flax TrainState) or `maxtext`.
        tx: The optimizer's transformation, where `state` is a bare `nnx.State`; see
            `NNXLinenSave`.
        renames: The rules of the restore; they are undone, so that they restore what is saved.
            Or the plan or report of the restore: each leaf goes back to the path, shape and count
            type that it came from, also where rules alone do not tell (a level taken away).
        force: Replace the item at `path`; a manager's root, a step or what is no checkpoint's is
            refused, since all in it would go. On this machine's file systems the old item stays until the
            new one is whole and takes its name; in a bucket, and where several processes save,
            Orbax deletes it first.

    Raises:
        RuleError: A rule or a step of the plan cannot be undone.
        DtypeMismatchError: The step is beyond int32, in which a Linen program counts.
        RestoreError: It cannot be written there (`s3://`, a path with `[` or a backslash, a full disk);
            on this machine's file systems nothing is left behind.
        ValueError: `state` holds no array, two leaves would be stored at one path, the plan is of another
            item, or something is at `path` already and `force` is not set.
        NotACheckpointError: What is at `path` is not one item.
    """
    destination = absolute(path)
    check_writable(destination)
    item = as_save_item(state)
    if not jax.tree.leaves(item):
        raise nothing_to_save(item)
    arguments = linen_save(ocp.args.PyTreeSave(item), layout, tx, renames)
    save_item(destination, arguments, force=force)


@paused_collection()
def from_linen(
    variables: Any,
    target: TargetT,
    restore_args: Any = None,
    *,
    policy: Policies = "error",
    layout: LayoutChoice = "auto",
    renames: Iterable[Rule | tuple[str, str]] = (),
    init: Callable[[], Any] | None = None,
    unexpected: UnexpectedPolicy = "warn",
    dtype: DtypeChoice = "target",
) -> TargetT:
    """Restores a Linen tree that is in memory already, by the plan, the laws and the errors of `restore`.

    ```python
    variables = linen_model.init(key, tokens)
    model = from_linen(variables, nnx.eval_shape(make_model))
    ```

    Arrays on devices stay there: one that is wanted as it is, is the tree's own in the result (donate
    one of the two and both are gone); from the others the wanted ones are computed under `jax.jit`, into
    the target's shardings. Where the target says nothing of a sharding, an array keeps its own. NumPy
    arrays and numbers are copied to where they are wanted, once.

    It works inside a `jax.jit` too. The plan follows from shapes, so it is made and checked while JAX
    traces; what only values tell is not looked at there (a count that does not fit its integer type, a
    leftover that must be zero, a cast that overflows).

    Args:
        variables: What `restore` reads, as containers that JAX knows: variables, a `TrainState`, a dict of
            these, boxed parameters, an optimizer's state, an `nnx.State`; or a flat dict of arrays, whose
            names are paths: tuples of keys, or strings with slashes (`flax.traverse_util.flatten_dict`).
        target: See `plan_restore`.
        restore_args: See `plan_restore`.
        policy: See `plan_restore`.
        layout: See `plan_restore`.
        renames: See `plan_restore`.
        init: See `plan_restore`.
        unexpected: See `plan_restore`.
        dtype: See `plan_restore`.

    Returns:
        A new value of the target's own type, every leaf an array on its devices.

    Raises:
        NotACheckpointError: The tree has no leaf.
        UnreadableLeafError: A leaf that is needed is a `jax.ShapeDtypeStruct` or was donated.
        RestoreError: The tree cannot become the target; lists every problem.
    """
    options = RestoreOptions().override(
        policy=policy, layout=layout, renames=renames, init=init, unexpected=unexpected, dtype=dtype
    )
    result, _ = _restore_checkpoint(lambda: hold(variables), target, restore_args, options, in_memory=True)
    return result


def to_linen(
    state: Any,
    layout: Flavour = "linen",
    tx: Transformation | None = None,
    renames: RulesOrRestore = (),
) -> dict[str, Any]:
    """Returns the tree that `save` would write, in memory.

    ```python
    variables = to_linen(model)
    logits = linen_model.apply({"params": variables["params"]}, tokens)
    ```

    Args:
        state: What `save` takes. `jax.ShapeDtypeStruct` leaves give a tree of these.
        layout: See `save`.
        tx: See `save`.
        renames: See `save`.

    Returns:
        Nested dicts as a Linen program has them (`params/...`, `batch_stats/...`), optax's tuples as
        lists with None for empty states. An array that is stored as it is, is the state's own. Random
        streams that a Linen program does not store are left out; `save` writes them to the item's
        metadata. Inside a `jax.jit` the step's size and the equality of copies are not looked at.

    Raises:
        RuleError: See `save`.
        ValueError: `state` holds no NNX object; see `save` for the rest.
    """
    if not is_nnx(state):
        raise ValueError(
            f"a {type(state).__name__} without an NNX object has no Linen layout: save stores it as it is."
        )
    return plan_save(state, layout, tx, renames).tree()


@paused_collection()
def restore_item(
    directory: epath.Path,
    target: Any,
    restore_args: Any,
    options: RestoreOptions,
    *,
    concurrent_bytes: int | None = None,
    progress: Callable[[int], None] | None = None,
    orbax: ocp.PyTreeCheckpointHandler | None = None,
    files: Files | None = None,
) -> tuple[Any, RestoreReport]:
    """Restores one item directory and reports what was done.

    With `orbax`, a handler with type handlers of its own reads the arrays.

    Raises:
        RestoreError: See `restore`.
    """
    return _restore_checkpoint(
        lambda: read_metadata(directory, files),
        target,
        restore_args,
        options,
        concurrent_bytes=concurrent_bytes,
        progress=progress,
        orbax=orbax,
    )


def _restore_checkpoint(
    read: Callable[[], Checkpoint],
    target: Any,
    restore_args: Any,
    options: RestoreOptions,
    *,
    in_memory: bool = False,
    **reading: Any,
) -> tuple[Any, RestoreReport]:
    """Restores what `read` finds; every process does, or none."""
    start = time.monotonic()
    overrides = flatten_like(restore_args) if restore_args is not None else {}

    def decided() -> tuple[Checkpoint, RestorePlan, Target]:
        # What is in memory tells the mesh of a target without one.
        held = read() if in_memory else None
        parts = flatten_wanted(target, overrides, beside=held.on_devices.values() if held else ())
        # Before the metadata is read: memory is made ready meanwhile.
        memory.expect(parts.leaves.values())
        checkpoint = held or read()
        parts = with_stored_keys(checkpoint, parts)
        return checkpoint, plan_of(checkpoint, parts, overrides, options, check=True), parts

    single_replica = single_replica_leaves(options.single_replica, overrides)
    with Memory() as memory:
        checkpoint, plan, parts = agree(decided)
        reading |= {"single_replica": single_replica, "memory": memory}
        wanted = ((item.wanted.path, item.wanted.nbytes) for item in plan.restored.values())
        failed = f"{checkpoint.directory} cannot be restored"
        with naming_shortage(failed, wanted, less=_LESS_AT_ONCE):
            arrays = carry_out(checkpoint, plan, init=options.init, **reading)
    _check_materialised(arrays)
    result = parts.assemble(arrays)
    report = RestoreReport.of(plan, time.monotonic() - start)
    _log(report)
    return result, report


def _check_materialised(arrays: Mapping[Path, Any]) -> None:
    bare = [path for path, value in arrays.items() if not isinstance(value, jax.Array)]
    if bare:
        listed = ", ".join(render(path) for path in bare)
        raise RestoreError(f"internal error: leaves were left without a value: {listed}", paths=bare)


def _log(report: RestoreReport) -> None:
    """Writes what was done as INFO, and one WARNING for what a reader should know; primary host only."""
    if jax.process_index() != 0:
        return
    # A step may hold several items, so each line says which one it is about.
    logging.info("%s", report.summary)
    if report.initialised:
        logging.info("restored from %s: %s", report.plan.directory, report.initialised)
    if report.warning:
        logging.warning("restored from %s: %s", report.plan.directory, report.warning)
