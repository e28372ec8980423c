"""`orbax-nnx verify`: whether a Linen and an NNX program compute the same from one checkpoint."""

import argparse
from collections.abc import Callable, Mapping
from typing import Any, cast

from orbax_nnx_handler.commands.arguments import (
    UsageError,
    add_item,
    add_json,
    add_path,
    add_policy,
    add_target,
    described,
    load_factory,
    load_value,
    policies_of,
    pretend_devices,
    rules_of,
    told,
)
from orbax_nnx_handler.commands.screen import Screen
from orbax_nnx_handler.verifying.verify import verify

_PARTS = ("linen_apply", "nnx_apply", "inputs")
_PAIR_HELP = (
    "(linen_apply, nnx_apply, inputs), or a function without arguments that returns them: "
    "linen_apply(variables, *inputs) and nnx_apply(model, *inputs) run the two programs and return the same"
)


def add_to(commands: Any) -> None:
    """Declares the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "verify",
        help="whether both programs compute the same",
        **described(
            "Runs a Linen program and an NNX program from one checkpoint on one input, compares outputs and "
            "modules, and names the first module that differs. Runs on the host unless JAX_PLATFORMS says "
            "otherwise. Exit status: 0 they are equal, 1 they are not.",
            "orbax-nnx verify run model.py:make programs.py:PAIR --rules rules.py",
        ),
    )
    add_path(parser)
    add_target(parser)
    parser.add_argument("pair", metavar="FILE.py:PAIR", help=_PAIR_HELP)
    parser.add_argument(
        "--tolerance",
        metavar="X",
        type=_positive,
        help="what the largest difference may be, relative to the outputs (default: 1e-5, or what their "
        "dtype allows)",
    )
    add_policy(parser)
    add_item(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no tolerance, such as 1e-4")
    return value


def run(arguments: argparse.Namespace, screen: Screen) -> int:
    """Prints what was found."""
    pretend_devices(arguments)
    factory = load_factory(arguments.target)
    linen_apply, nnx_apply, inputs = _pair(arguments.pair)
    policies = policies_of(arguments.policy)
    found = verify(
        arguments.path,
        factory.target(weights_only=arguments.weights_only),
        linen_apply,
        nnx_apply,
        inputs,
        renames=rules_of(arguments),
        tolerance=arguments.tolerance,
        policy=policies,
        layout=arguments.layout,
        init=factory,
        item=arguments.item,
    )
    if arguments.json:
        screen.json(found.to_dict())
    else:
        screen.say(str(found))
    return 0 if found.equal else 1


def _pair(text: str) -> tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]:
    value = load_value(text, "PAIR")
    if callable(value):
        try:
            value = value()
        # The user's code may raise anything.
        except (Exception, SystemExit) as error:
            raise UsageError(f"{text} fails: {told(error)}") from error
    parts = [_part(value, at, name) for at, name in enumerate(_PARTS)]
    if not (callable(parts[0]) and callable(parts[1]) and isinstance(parts[2], tuple | list)):
        raise UsageError(
            f"{text} is no (linen_apply, nnx_apply, inputs): two functions, and a tuple of what both get."
        )
    return parts[0], parts[1], tuple(cast("list[Any]", parts[2]))


def _part(value: Any, at: int, name: str) -> Any:
    if isinstance(value, Mapping):
        return cast("Mapping[str, Any]", value).get(name)
    if isinstance(value, tuple | list):
        found = cast("list[Any]", value)
        return found[at] if len(found) == len(_PARTS) else None
    return getattr(value, name, None)
