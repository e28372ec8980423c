"""`orbax-nnx demo`: a Linen model trained, and carried on in NNX."""

import argparse
import logging
from typing import Any

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
    figures = main()
    if arguments.json:
        screen.json(figures)
    return 0


def main() -> dict[str, Any]:
    """Runs the demo on this terminal, in under two minutes on two cores; returns its figures."""
    # Orbax warns of every default that a script leaves it; the demo goes without.
    logging.getLogger("absl").setLevel(logging.ERROR)
    # Inside, so that `orbax-nnx` starts without the demo's own imports.
    from orbax_nnx_handler.commands.demo.programs import use_virtual_devices
    from orbax_nnx_handler.commands.demo.walkthrough import run

    use_virtual_devices()
    return run().to_dict()
