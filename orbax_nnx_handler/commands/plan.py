"""`orbax-nnx plan`: whether a checkpoint becomes a target, from metadata alone."""

import argparse
from typing import Any

from orbax_nnx_handler.commands.arguments import (
    add_item,
    add_json,
    add_path,
    add_policy,
    add_target,
    asked_for,
    described,
    policies_of,
    way_out,
)
from orbax_nnx_handler.commands.screen import Screen
from orbax_nnx_handler.planner import plan_restore
from orbax_nnx_handler.planning.restore_plan import RestorePlan
from orbax_nnx_handler.storage import paused_collection


def add_to(commands: Any) -> None:
    """Declares the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "plan",
        help="whether a checkpoint becomes a target",
        **described(
            "Says whether a checkpoint becomes a target, and what is wrong if it does not. "
            "Reads metadata only. Exit status: 0 it fits, 1 it does not.",
            "orbax-nnx plan run 'model.py:make(layers=12)' --rules rules.py",
        ),
    )
    add_path(parser)
    add_target(parser)
    add_policy(parser)
    add_item(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, screen: Screen) -> int:
    """Prints the verdict."""
    # Thousands of small objects, none of them garbage before the verdict: a fifth of the time.
    with paused_collection():
        with screen.waiting("planning"):
            plan = plan_for(arguments)
        return _show(plan, arguments, screen)


def _show(plan: RestorePlan, arguments: argparse.Namespace, screen: Screen) -> int:
    error = plan.error()
    if arguments.json:
        wrong = None if error is None else {"type": type(error).__name__, "message": str(error)}
        screen.json(plan.to_dict() | {"error": wrong})
        return 0 if error is None else 1
    screen.show(plan)
    words = "" if error is None else way_out(error.hints, arguments)
    if words:
        screen.say(f"on the command line: {words}")
    return 0 if error is None else 1


def plan_for(arguments: argparse.Namespace) -> RestorePlan:
    """Returns the plan that the arguments ask for.

    Raises:
        UsageError: The factory or an option is wrong.
    """
    factory, options = asked_for(arguments)
    policies = policies_of(arguments.policy)
    init = factory if "init" in str(policies) else None
    return plan_restore(arguments.path, policy=policies, init=init, **options)
