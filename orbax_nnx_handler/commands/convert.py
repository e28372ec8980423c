"""`orbax-nnx convert`: a checkpoint under another layout, dtype or arrangement of layers."""

import argparse
import time
from collections.abc import Callable
from typing import Any

from etils import epath

from orbax_nnx_handler.commands.arguments import (
    add_item,
    add_memory,
    add_path,
    add_policy,
    add_target,
    whole,
)
from orbax_nnx_handler.commands.conversions import Request, request_of
from orbax_nnx_handler.commands.interrupts import interrupts
from orbax_nnx_handler.commands.screen import Screen, count, size
from orbax_nnx_handler.planning.paths import render
from orbax_nnx_handler.transfer.converting import write_converted

_NAMED = 5


def add_to(commands: Any) -> None:
    """Declares the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "convert",
        help="write a checkpoint in another layout",
        description="Writes a checkpoint again in another layout, arrangement of layers or dtype, as an item "
        "that stock Orbax reads. Values are streamed; the destination appears only when it is complete and "
        "was read again. Nothing is overwritten.",
    )
    add_path(parser, "src")
    add_path(parser, "dst", "the item directory to create, such as new/1200/items")
    add_target(parser, optional=True)
    add_policy(parser)
    add_item(parser)
    _add_changes(parser)
    add_memory(parser)
    parser.set_defaults(run=run)


def _add_changes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--to",
        choices=["linen", "maxtext", "nnx"],
        help="the layout to write: a Flax TrainState, MaxText's, or a saved nnx.State "
        "(default: nnx with a factory, else that of the source)",
    )
    parser.add_argument(
        "--scan", metavar="GROUP", action="append", default=[], help="stack GROUP_0, GROUP_1, ... to GROUP"
    )
    parser.add_argument(
        "--unscan",
        metavar="GROUP",
        action="append",
        default=[],
        help="take GROUP apart to GROUP_0, GROUP_1, ...",
    )
    parser.add_argument(
        "--axis", metavar="N", type=whole(0), help="the axis that counts the layers of a stack"
    )
    parser.add_argument("--dtype", metavar="DTYPE", help="another dtype for floating-point weights")


def run(arguments: argparse.Namespace, screen: Screen) -> int:
    """Converts."""
    began = time.monotonic()
    request = request_of(arguments)
    conversion = request.conversion
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
    rate = size(int(conversion.nbytes / max(seconds, 1e-9)))
    screen.say(f"{arguments.dst}: written and read again in {seconds:.1f} s ({rate}/s).", "bold green")
    return 0


def _checking(check: Callable[[], None], progress: Callable[[int], None]) -> Callable[[int], None]:
    def step(done: int) -> None:
        check()
        progress(done)

    return step


def _announce(request: Request, screen: Screen) -> None:
    conversion = request.conversion
    screen.facts(
        [
            ("from", f"{conversion.source.directory} ({request.title})"),
            ("to write", f"{count(len(conversion.leaves), 'leaf', 'leaves')}, {size(conversion.nbytes)}"),
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
