"""`orbax-nnx convert`: a checkpoint under another layout, dtype or arrangement of layers.

An interrupt, from the keyboard or from a scheduler that ends a job, leaves nothing half written.
"""

import argparse
import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from types import FrameType
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from orbax_nnx_handler.commands.arguments import (
    add_item,
    add_json,
    add_memory,
    add_path,
    add_policy,
    add_target,
    asked_for,
    described,
    policies_of,
    whole,
)
from orbax_nnx_handler.commands.screen import Screen, count, size
from orbax_nnx_handler.commands.user_code import UsageError
from orbax_nnx_handler.planner import plan_restore
from orbax_nnx_handler.planning import layouts
from orbax_nnx_handler.planning.core.errors import RestoreError
from orbax_nnx_handler.planning.core.paths import Path, parse, render, spelled
from orbax_nnx_handler.planning.layouts.layout import Layout
from orbax_nnx_handler.planning.mapping.cells_and_wrappers import layers_inside
from orbax_nnx_handler.planning.rules import Rule
from orbax_nnx_handler.planning.verdict.leaf_verdicts import check_readable
from orbax_nnx_handler.storage.checkpoint.find import find_item
from orbax_nnx_handler.storage.checkpoint.metadata import Checkpoint, read_metadata
from orbax_nnx_handler.storage.converting import Conversion, check_free, write_converted
from orbax_nnx_handler.storage.converting.blocks import Written, check_paths_distinct
from orbax_nnx_handler.storage.converting.planned_leaves import (
    WITHOUT_COLLECTIONS,
    check_codes,
    check_linen_names,
    every_leaf,
    fit,
    in_layout,
    in_linen,
    in_nnx,
    owner_left_out,
    reading_of,
    rounded,
    weights_only,
    with_dtype,
)
from orbax_nnx_handler.storage.converting.regroup import Regrouping, in_order, regroup
from orbax_nnx_handler.storage.restoring import check_values
from orbax_nnx_handler.storage.stores.locations import absolute


@contextlib.contextmanager
def interrupts() -> Generator[Callable[[], None]]:
    """Turns SIGINT and SIGTERM into `KeyboardInterrupt`.

    Yields:
        To be called now and then: raises an interrupt that was lost. Python drops an
        exception where nobody can catch it, such as in a finaliser or a callback.
    """
    arrived = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        del number, frame
        arrived.set()
        raise KeyboardInterrupt

    def check() -> None:
        if arrived.is_set():
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield check
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_EMPTY: dict[str, Any] = {"Dict": {}, "List": []}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertRequest:
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


def request_of(arguments: argparse.Namespace) -> ConvertRequest:
    """Returns what the arguments ask for.

    Raises:
        UsageError: The arguments contradict each other.
        RestoreError: The source cannot become what is asked for.
    """
    _check(arguments)
    check_free(absolute(arguments.dst))
    checkpoint = read_metadata(find_item(arguments.src, arguments.item))
    find = _rearranged if arguments.target is None else _fitted
    request = find(checkpoint, arguments)
    check_paths_distinct(request.conversion.leaves)
    if arguments.dtype is not None:
        check_codes(request.conversion.leaves, checkpoint.leaves)
    return request


def _check(arguments: argparse.Namespace) -> None:
    grouped = arguments.scan or arguments.unscan
    if grouped and arguments.target is not None:
        raise UsageError("--scan and --unscan are for conversions without a factory, whose layers decide.")
    if grouped and arguments.axis is None:
        raise UsageError("--scan and --unscan need --axis, which counts the layers (MaxText: 1, else 0).")
    if arguments.axis is not None and not grouped:
        raise UsageError("--axis goes with --scan or --unscan, whose layers it counts.")
    if arguments.target is None and arguments.to == "nnx":
        raise UsageError("--to nnx needs the MODULE:FACTORY of the NNX model, which knows its names.")
    if arguments.target is None and (arguments.rename or arguments.rules or arguments.policy):
        raise UsageError("--rename, --rules and --policy need a MODULE:FACTORY.")


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


def _rearranged(checkpoint: Checkpoint, arguments: argparse.Namespace) -> ConvertRequest:
    """Returns the stored leaves, moved and regrouped; the model itself need not be known."""
    check_readable(checkpoint.broken)
    if arguments.to is None:
        layout = layouts.candidates(checkpoint.leaves, arguments.layout)[0]
    else:
        layout = reading_of(checkpoint.leaves, arguments.layout)
        _check_form(layout, checkpoint, arguments.layout)
    leaves = every_leaf(checkpoint.leaves, layout)
    empty = {p: _EMPTY.get(t) for p, t in checkpoint.nodes.items() if p not in checkpoint.leaves}
    left_out: dict[str, list[Path]] = {}
    if arguments.weights_only:
        kept = weights_only(leaves)
        weights = {leaf.path for leaf in kept}
        left_out["of optimizer, step and others"] = [leaf.path for leaf in leaves if leaf.path not in weights]
        leaves, empty = kept, {}
    leaves = _regrouped(leaves, checkpoint, layout, arguments)
    if arguments.to is not None:
        if layout.name == "params" and arguments.layout == "auto" and not checkpoint.is_of_flax_model:
            check_linen_names(leaves, arguments.to)
        # Only the optimizer's chain needs its empty states to keep its length.
        above = owner_left_out(leaves)
        empty = {
            path[len(above) :]: value
            for path, value in empty.items()
            if "opt_state" in path[len(above) :] and path[: len(above)] == above
        }
        leaves = in_layout(leaves, layout.name, arguments.to)
    if not leaves:
        raise RestoreError(f"{checkpoint.directory} holds nothing of that ({layout.title}).")
    return ConvertRequest(
        conversion=Conversion(
            source=checkpoint, leaves=with_dtype(leaves, _dtype(arguments.dtype)), given=empty
        ),
        title=layout.title,
        left_out=left_out,
    )


def _check_form(layout: Layout, checkpoint: Checkpoint, named: str) -> None:
    """Raises where the layout was named and the tree has not its form: nothing would be moved.

    Raises:
        RestoreError: Says what it looks like.
    """
    if named == "auto" or layout is layouts.UNNAMED or layout.fits(checkpoint.leaves):
        return
    looks = " or ".join(one.title for one in layouts.candidates(checkpoint.leaves, "auto")[:3])
    raise RestoreError(
        f"{checkpoint.directory} does not have the form of {layout.title}, as --layout {named} asks: it "
        f"looks like {looks}.",
        hints=["leave --layout out: it is found out from the metadata."],
    )


def _regrouped(
    leaves: Sequence[Written], checkpoint: Checkpoint, layout: Layout, arguments: argparse.Namespace
) -> list[Written]:
    ways: dict[Regrouping, list[str]] = {"unscan": arguments.unscan, "scan": arguments.scan}
    regrouped, axis, place = list(leaves), arguments.axis, str(checkpoint.directory)
    for way, groups in ways.items():
        for group in in_order(leaves, [parse(group) for group in groups]):
            regrouped = regroup(regrouped, checkpoint.leaves, layout, group, axis, way, place)
    return regrouped


def _has_names_of(target: Any, checkpoint: Checkpoint, arguments: argparse.Namespace) -> bool:
    """Tells whether a target's own names are stored, so that rules say what Linen is to read instead."""
    layout = layouts.candidates(checkpoint.leaves, arguments.layout)[0].name
    if layout != "params" or not (arguments.rename or arguments.rules):
        return layout in WITHOUT_COLLECTIONS
    # A pure dict of weights alone looks like a Linen program's bare params.
    return not plan_restore(checkpoint.directory, target, layout=arguments.layout).missing


def _fitted(checkpoint: Checkpoint, arguments: argparse.Namespace) -> ConvertRequest:
    """Returns the leaves of a target, under NNX names or those of a Linen program."""
    factory, options = asked_for(arguments)
    target = options["target"]
    renames: list[Rule] = options["renames"]
    flavour = arguments.to if arguments.to in ("linen", "maxtext") else None
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
    placed = in_nnx(fitted) if flavour is None else in_linen(fitted, target, flavour, undone)
    leaves, given = placed.leaves, placed.given
    return ConvertRequest(
        conversion=Conversion(source=checkpoint, leaves=leaves, given=given, lists=flavour is not None),
        title=plan.layout,
        left_out={
            "not wanted by the target": list(plan.unexpected),
            "of parts that the target does not have": list(plan.skipped),
            "without a counterpart in Linen": placed.without_variable,
        },
        note="" if flavour is None else layers_inside(leaf.path for leaf in leaves),
    )


_NAMED = 5


def add_to(commands: Any) -> None:
    """Declares the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "convert",
        help="write a checkpoint in another layout",
        **described(
            "Writes a checkpoint again in another layout, arrangement of layers or dtype, as an item "
            "that stock Orbax reads. Values are streamed; the destination appears only when it is complete "
            "and was read again. Nothing is overwritten.",
            "orbax-nnx convert run new/1200/items model.py:make --rules rules.py",
        ),
    )
    add_path(parser, "src")
    add_path(parser, "dst", "the item directory to create, such as new/1200/items")
    add_target(parser, optional=True)
    add_policy(parser)
    add_item(parser)
    _add_changes(parser)
    add_memory(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def _add_changes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--to",
        choices=["linen", "maxtext", "nnx"],
        help="the layout to write: a Flax TrainState, MaxText's, or a saved nnx.State "
        "(default: nnx with a factory, else that of the source)",
    )
    parser.add_argument(
        "--scan",
        metavar="GROUP",
        action="append",
        default=[],
        help="stack GROUP_0, GROUP_1, ... or GROUP/0, GROUP/1, ... to GROUP",
    )
    parser.add_argument(
        "--unscan",
        metavar="GROUP",
        action="append",
        default=[],
        help="take GROUP apart to GROUP_0, GROUP_1, ...; of one of several networks NETWORK/GROUP, "
        "of one collection COLLECTION/GROUP",
    )
    parser.add_argument(
        "--axis", metavar="N", type=whole(0), help="the axis that counts the layers of a stack"
    )
    parser.add_argument("--dtype", metavar="DTYPE", help="another dtype for floating-point weights")


def run(arguments: argparse.Namespace, screen: Screen) -> int:
    """Converts."""
    began = time.monotonic()
    with screen.waiting("planning"):
        request = request_of(arguments)
    conversion = request.conversion
    if not arguments.json:
        _announce(request, screen)
    with (
        interrupts() as check,
        screen.progress(conversion.nbytes, "writing", "reading again") as (writing, verifying),
    ):
        write_converted(
            conversion,
            epath.Path(arguments.dst),
            memory_bytes=arguments.memory,
            progress=_checking(check, writing),
            verifying=_checking(check, verifying),
        )
    seconds = time.monotonic() - began
    if arguments.json:
        screen.json(_to_dict(request, arguments.dst, seconds))
        return 0
    rate = size(int(conversion.nbytes / max(seconds, 1e-9)))
    screen.say(f"{arguments.dst}: written and read again in {seconds:.1f} s ({rate}/s).", "bold green")
    return 0


def _checking(check: Callable[[], None], progress: Callable[[int], None]) -> Callable[[int], None]:
    def step(done: int) -> None:
        check()
        progress(done)

    return step


def _to_dict(request: ConvertRequest, destination: str, seconds: float) -> dict[str, Any]:
    conversion = request.conversion
    return {
        "source": str(conversion.source.directory),
        "layout": request.title,
        "destination": destination,
        "leaves": len(conversion.leaves),
        "bytes": conversion.nbytes,
        "rounded": [spelled(path) for path in rounded(conversion.leaves, conversion.source.leaves)],
        "left_out": {why: list(map(spelled, paths)) for why, paths in request.left_out.items() if paths},
        "note": request.note,
        "seconds": round(seconds, 3),
    }


def _announce(request: ConvertRequest, screen: Screen) -> None:
    conversion = request.conversion
    narrow = rounded(conversion.leaves, conversion.source.leaves)
    screen.facts(
        [
            ("from", f"{conversion.source.directory} ({request.title})"),
            ("to write", f"{count(len(conversion.leaves), 'leaf', 'leaves')}, {size(conversion.nbytes)}"),
            *([("rounded", f"{count(len(narrow), 'leaf', 'leaves')}: {_some(narrow)}")] if narrow else []),
            *(
                ("left out", f"{count(len(paths), 'leaf', 'leaves')} {why}: {_some(paths)}")
                for why, paths in request.left_out.items()
                if paths
            ),
            *([("note", request.note)] if request.note else []),
        ]
    )


def _some(paths: Any) -> str:
    named = ", ".join(render(path) for path in paths[:_NAMED])
    return named + (", …" if len(paths) > _NAMED else "")
