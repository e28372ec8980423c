"""What `orbax-nnx convert` is to write, from its arguments."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from orbax_nnx_handler.commands.arguments import policies_of, pretend_devices, renames_of
from orbax_nnx_handler.commands.factories import UsageError, load_factory
from orbax_nnx_handler.commands.placing import fit, in_linen, in_nnx
from orbax_nnx_handler.planning import layouts
from orbax_nnx_handler.planning.conversion import (
    WITHOUT_COLLECTIONS,
    Written,
    check_distinct,
    check_linen_names,
    every_leaf,
    in_layout,
    weights_only,
    with_dtype,
)
from orbax_nnx_handler.planning.errors import RestoreError
from orbax_nnx_handler.planning.lost import check_readable
from orbax_nnx_handler.planning.paths import Path, parse
from orbax_nnx_handler.planning.regrouping import scan, unscan
from orbax_nnx_handler.planning.rules import as_rules
from orbax_nnx_handler.planning.wrappers import layers_inside
from orbax_nnx_handler.preview import plan_restore
from orbax_nnx_handler.transfer.converting import Conversion, check_free
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
        note: What to know before a program reads the result; empty for nothing.
    """

    conversion: Conversion
    title: str
    left_out: Mapping[str, Sequence[Path]]
    note: str = ""


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
    check_distinct(request.conversion.leaves)
    return request


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


def _dtype(name: str | None) -> np.dtype[Any] | None:
    if name is None:
        return None
    try:
        dtype = jnp.dtype(name)
    except TypeError as error:
        raise UsageError(f"--dtype {name}: there is no such dtype.") from error
    if not jnp.issubdtype(dtype, jnp.floating):
        raise UsageError(f"--dtype {name}: weights are floating-point numbers.")
    return dtype


def _rearranged(checkpoint: Checkpoint, arguments: argparse.Namespace) -> Request:
    """Returns the stored leaves, moved and regrouped; the model itself need not be known."""
    check_readable(checkpoint.lost, checkpoint.foreign)
    layout = layouts.candidates(checkpoint.leaves, arguments.layout)[0]
    leaves = with_dtype(every_leaf(checkpoint.leaves, layout.name), _dtype(arguments.dtype))
    empty = {p: _EMPTY.get(t) for p, t in checkpoint.nodes.items() if p not in checkpoint.leaves}
    left_out: dict[str, list[Path]] = {}
    if arguments.weights_only:
        kept = weights_only(leaves)
        weights = {leaf.path for leaf in kept}
        left_out["of optimizer, step and others"] = [leaf.path for leaf in leaves if leaf.path not in weights]
        leaves, empty = kept, {}
    if arguments.to is not None:
        if layout.name == "params" and arguments.layout == "auto":
            check_linen_names(leaves)
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


def _has_names_of(target: Any, checkpoint: Checkpoint, arguments: argparse.Namespace) -> bool:
    """Tells whether a target's own names are stored, so that rules say what Linen is to read instead."""
    layout = layouts.candidates(checkpoint.leaves, arguments.layout)[0].name
    if layout != "params" or not arguments.rename:
        return layout in WITHOUT_COLLECTIONS
    # A pure dict of weights alone looks like a Linen program's bare params.
    return not plan_restore(checkpoint.directory, target, layout=arguments.layout).missing


def _fitted(checkpoint: Checkpoint, arguments: argparse.Namespace) -> Request:
    """Returns the leaves of a target, under NNX names or those of a Linen program."""
    pretend_devices(arguments)
    factory = load_factory(arguments.target)
    target = factory.target(weights_only=arguments.weights_only)
    flavour = arguments.to if arguments.to in ("linen", "maxtext") else None
    renames = renames_of(arguments.rename)
    undone = renames if flavour is not None and _has_names_of(target, checkpoint, arguments) else []
    plan = plan_restore(
        checkpoint.directory,
        target,
        policy=policies_of(arguments.policy),
        layout=arguments.layout,
        renames=[] if undone else renames,
        init=factory,
    )
    plan.check()
    check_values(checkpoint, plan)
    fitted = fit(plan, factory, _dtype(arguments.dtype))
    placed = in_nnx(fitted) if flavour is None else in_linen(fitted, target, flavour, as_rules(undone))
    leaves, given = placed.leaves, placed.given
    return Request(
        conversion=Conversion(source=checkpoint, leaves=leaves, given=given, lists=flavour is not None),
        title=plan.layout,
        left_out={
            "not wanted by the target": list(plan.unexpected),
            "of parts that the target does not have": list(plan.skipped),
            "without a home in Linen": placed.homeless,
        },
        note="" if flavour is None else layers_inside(leaf.path for leaf in leaves),
    )
