"""`orbax-nnx suggest`: rules for names that nobody but the user can know."""

import argparse
from typing import Any

from orbax_nnx_handler import api
from orbax_nnx_handler.commands.arguments import (
    add_item,
    add_json,
    add_path,
    add_target,
    pretend_devices,
    renames_of,
)
from orbax_nnx_handler.commands.factories import load_factory
from orbax_nnx_handler.commands.screen import Screen, rename_options
from orbax_nnx_handler.planning.core.paths import spelled
from orbax_nnx_handler.planning.suggesting import Suggestion


def add_to(commands: Any) -> None:
    """Declares the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "suggest",
        help="rules for names that differ",
        description="Proposes rules, as Python, where a target's names are not the checkpoint's. Reads "
        "metadata only and applies nothing. Exit status: 0 a proposal for everything, 1 something is open.",
    )
    add_path(parser)
    add_target(parser)
    add_item(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, screen: Screen) -> int:
    """Prints the proposal."""
    pretend_devices(arguments)
    factory = load_factory(arguments.target)
    suggestion = api.suggest(
        arguments.path,
        factory.target(weights_only=arguments.weights_only),
        init=factory,
        layout=arguments.layout,
        renames=renames_of(arguments.rename),
        item=arguments.item,
    )
    if arguments.json:
        screen.json(_to_dict(suggestion))
    else:
        screen.say(str(suggestion))
        options = _options(suggestion)
        if options:
            screen.say(f"# on the command line: {options}")
    return 1 if suggestion.confidence == "open" or suggestion.unmatched_wanted else 0


def _options(suggestion: Suggestion) -> str:
    """Returns the rules as options, where all of them can be."""
    return " ".join(rename_options(suggestion.renames) or ())


def _to_dict(suggestion: Suggestion) -> dict[str, Any]:
    return {
        "confidence": suggestion.confidence,
        "renames": [str(rule) for rule in suggestion.renames],
        "options": _options(suggestion),
        "questions": [str(question) for question in suggestion.questions],
        "unmatched_wanted": [spelled(path) for path in suggestion.unmatched_wanted],
        "unmatched_stored": [spelled(path) for path in suggestion.unmatched_stored],
        "problem": suggestion.problem,
    }
