"""What `orbax-nnx convert` is to write, from its arguments."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from orbax_nnx_handler.api import plan_restore
from orbax_nnx_handler.commands.arguments import policies_of, pretend_devices, renames_of
from orbax_nnx_handler.commands.factories import UsageError, load_factory
from orbax_nnx_handler.planning import layouts
from orbax_nnx_handler.planning.conversion import (
    Written,
    check_distinct,
    every_leaf,
    in_layout,
    is_empty,
    nodes_of,
    planned_leaves,
    weights_only,
    with_dtype,
)
from orbax_nnx_handler.planning.errors import RestoreError
from orbax_nnx_handler.planning.linen_tree import Flavour, arrange
from orbax_nnx_handler.planning.paths import Path, parse, render
from orbax_nnx_handler.planning.plan import RestorePlan
from orbax_nnx_handler.planning.regrouping import scan, unscan
from orbax_nnx_handler.planning.target import flatten_like
from orbax_nnx_handler.transfer.converting import Conversion, check_free
from orbax_nnx_handler.transfer.filling import fill_leaves
from orbax_nnx_handler.transfer.locating import find_item
from orbax_nnx_handler.transfer.metadata import Checkpoint, read_metadata
from orbax_nnx_handler.transfer.prechecks import check_values

_EMPTY: dict[str, Any] = {"Dict": {}, "List": []}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What to write, and what a person should know about it.

    Attributes:
        conversion: What to write.
        title: The layout of the source, in words.
        left_out: Stored leaves that are not written, by why.
    """

    conversion: Conversion
    title: str
    left_out: Mapping[str, Sequence[Path]]


def request_of(arguments: argparse.Namespace) -> Request:
    """Returns what the arguments ask for.

    Raises:
        UsageError: The arguments contradict each other.
        RestoreError: The source cannot become what is asked for.
    """
    _check(arguments)
    check_free(epath.Path(arguments.dst))
    checkpoint = read_metadata(find_item(arguments.src, arguments.item))
    find = _rearranged if arguments.target is None else _fitted
    request = find(checkpoint, arguments)
    leaves = request.conversion.leaves
    if arguments.dtype is not None:
        leaves = with_dtype(leaves, _dtype(arguments.dtype))
    check_distinct(leaves)
    return dataclasses.replace(request, conversion=dataclasses.replace(request.conversion, leaves=leaves))


def _check(arguments: argparse.Namespace) -> None:
    grouped = arguments.scan or arguments.unscan
    if grouped and arguments.target is not None:
        raise UsageError("--scan and --unscan are for conversions without a factory, whose layers decide.")
    if grouped and arguments.axis is None:
        raise UsageError("--scan and --unscan need --axis, which counts the layers (MaxText: 1, else 0).")
    if arguments.target is None and arguments.to == "nnx":
        raise UsageError("--to nnx needs the MODULE:FACTORY of the NNX model, which knows its names.")
    if arguments.target is None and (arguments.rename or arguments.policy):
        raise UsageError("--rename and --policy need a MODULE:FACTORY.")


def _dtype(name: str) -> np.dtype[Any]:
    try:
        dtype = jnp.dtype(name)
    except TypeError as error:
        raise UsageError(f"--dtype {name}: there is no such dtype.") from error
    if not jnp.issubdtype(dtype, jnp.floating):
        raise UsageError(f"--dtype {name}: weights are floating-point numbers.")
    return dtype


def _rearranged(checkpoint: Checkpoint, arguments: argparse.Namespace) -> Request:
    """Returns the stored leaves, moved and regrouped; the model itself need not be known."""
    layout = layouts.candidates(checkpoint.leaves, arguments.layout)[0]
    leaves = every_leaf(checkpoint.leaves, layout.name)
    empty = {p: _EMPTY.get(t) for p, t in checkpoint.nodes.items() if p not in checkpoint.leaves}
    left_out: dict[str, list[Path]] = {}
    if arguments.weights_only:
        kept = weights_only(leaves)
        weights = {leaf.path for leaf in kept}
        left_out["of optimizer, step and others"] = [leaf.path for leaf in leaves if leaf.path not in weights]
        leaves, empty = kept, {}
    if arguments.to is not None:
        leaves = in_layout(leaves, layout.name, arguments.to)
        # Only the optimizer's chain needs its empty states to keep its length.
        empty = {path: value for path, value in empty.items() if path[0] == "opt_state"}
    leaves = _regrouped(leaves, arguments)
    if not leaves:
        raise RestoreError(f"{checkpoint.directory} holds nothing of that ({layout.title}).")
    return Request(
        conversion=Conversion(source=checkpoint, leaves=leaves, given=empty),
        title=layout.title,
        left_out=left_out,
    )


def _regrouped(leaves: Sequence[Written], arguments: argparse.Namespace) -> list[Written]:
    regrouped = list(leaves)
    for group in arguments.unscan:
        regrouped = unscan(regrouped, parse(group), arguments.axis)
    for group in arguments.scan:
        regrouped = scan(regrouped, parse(group), arguments.axis)
    return regrouped


def _fitted(checkpoint: Checkpoint, arguments: argparse.Namespace) -> Request:
    """Returns the leaves of a target, under NNX names or those of a Linen program."""
    pretend_devices(arguments)
    factory = load_factory(arguments.target)
    target = factory.target(weights_only=arguments.weights_only)
    plan = plan_restore(
        checkpoint.directory,
        target,
        policy=policies_of(arguments.policy),
        layout=arguments.layout,
        renames=renames_of(arguments.rename),
        init=factory,
    )
    plan.check()
    check_values(checkpoint, plan)
    return _placed(checkpoint, plan, target, factory, arguments.to)


def _placed(checkpoint: Checkpoint, plan: RestorePlan, target: Any, init: Any, to: str | None) -> Request:
    in_linen = to in ("linen", "maxtext")
    planned = _nnx_places(plan)
    places, empty = _linen_places(target, to) if in_linen else (planned, {})
    leaves = [leaf for leaf in planned_leaves(plan) if leaf.path in places]
    filled = {path: value for path, value in _filled(plan, init).items() if path in places}
    return Request(
        conversion=Conversion(
            source=checkpoint,
            leaves=[dataclasses.replace(leaf, path=places[leaf.path]) for leaf in leaves],
            given=empty | {places[path]: value for path, value in filled.items()},
            lists=in_linen,
        ),
        title=plan.layout,
        left_out={
            "not wanted by the target": list(plan.unexpected),
            "of parts that the target does not have": list(plan.skipped),
            "without a home in Linen": [path for path in planned if path not in places],
        },
    )


def _nnx_places(plan: RestorePlan) -> dict[Path, Path]:
    """Returns where a saved `nnx.State` keeps each leaf: a Variable's value one level deeper."""
    groups = (plan.restored, plan.missing, plan.defaulted)
    kinds = {path: item.wanted.kind for group in groups for path, item in group.items()}
    return {path: (*path, "value") if kind is not None else path for path, kind in kinds.items()}


def _filled(plan: RestorePlan, init: Any) -> Mapping[Path, jax.Array]:
    """Computes what no checkpoint holds: random state, and missing weights where the policy allows."""
    partly = [path for path, item in plan.missing.items() if item.recipe is not None]
    if partly:
        listed = ", ".join(map(render, partly))
        raise RestoreError(f"some layers are missing, and convert does not mix stored and new ones: {listed}")
    return fill_leaves(plan, init)


def _linen_places(target: Any, flavour: Flavour) -> tuple[dict[Path, Path], dict[Path, Any]]:
    """Returns where a Linen program keeps each leaf of a target, and its empty nodes."""
    by_identity = {id(value): path for path, value in flatten_like(target).items()}
    places: dict[Path, Path] = {}
    empty: dict[Path, Any] = {}
    for path, value in nodes_of(arrange(target, flavour).tree):
        if is_empty(value):
            empty[path] = value
        else:
            places[by_identity[id(value)]] = path
    return places, empty
