"""`orbax-nnx demo`: a Linen model trained, and carried on in NNX."""

import argparse
from typing import Any

from orbax_nnx_handler import demo
from orbax_nnx_handler.commands.arguments import add_json, described
from orbax_nnx_handler.commands.screen import Screen


def add_to(commands: Any) -> None:
    """Declares the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "demo",
        help="a Linen model trained, and carried on in NNX",
        **described(
            "Trains a small Linen model, restores it into NNX on eight pretended devices, goes on.",
            "orbax-nnx demo",
        ),
    )
    add_json(parser)
    parser.set_defaults(run=run, any_device=True)


def run(arguments: argparse.Namespace, screen: Screen) -> int:
    """Runs the demo."""
    figures = demo.main()
    if arguments.json:
        screen.json(figures)
    return 0
