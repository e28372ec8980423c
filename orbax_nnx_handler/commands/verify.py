"""`orbax-nnx verify`: whether a Linen and an NNX program compute the same from one checkpoint."""

import argparse
from typing import Any

from orbax_nnx_handler.commands.arguments import (
    add_item,
    add_json,
    add_path,
    add_policy,
    add_target,
    add_tolerance,
    asked_for,
    described,
    policies_of,
)
from orbax_nnx_handler.commands.screen import Screen
from orbax_nnx_handler.commands.user_code import PAIR_HELP, load_pair
from orbax_nnx_handler.verifying.comparison import verify


def add_to(commands: Any) -> None:
    """Declares the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "verify",
        help="whether both programs compute the same",
        **described(
            "Runs a Linen program and an NNX program from one checkpoint on one input, compares outputs and "
            "modules, and names the first module that differs. Runs on the host unless JAX_PLATFORMS says "
            "otherwise. Exit status: 0 they are equal, 1 they are not, or some weights are proved wrong.",
            "orbax-nnx verify run model.py:make programs.py:PAIR --rules rules.py",
        ),
    )
    add_path(parser)
    add_target(parser)
    parser.add_argument("pair", metavar="FILE.py:PAIR", help=PAIR_HELP)
    add_tolerance(parser)
    add_policy(parser)
    add_item(parser)
    add_json(parser)
    parser.set_defaults(run=run, runs_programs=True)


def run(arguments: argparse.Namespace, screen: Screen) -> int:
    """Prints what was found."""
    factory, options = asked_for(arguments)
    linen_apply, nnx_apply, inputs = load_pair(arguments.pair)
    with screen.waiting("running both programs"):
        found = verify(
            arguments.path,
            linen_apply=linen_apply,
            nnx_apply=nnx_apply,
            inputs=inputs,
            tolerance=arguments.tolerance,
            policy=policies_of(arguments.policy),
            init=factory,
            **options,
        )
    if arguments.json:
        screen.json(found.to_dict())
    else:
        screen.show(found)
    return 0 if found.equal else 1
