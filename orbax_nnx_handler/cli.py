"""The command line `orbax-nnx`: the verdict on a restore before the job starts."""

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import metadata

import jax

from orbax_nnx_handler.commands.factories import UsageError
from orbax_nnx_handler.commands.screen import Screen
from orbax_nnx_handler.planning.errors import RestoreError

_COMMANDS = ("tree", "plan", "suggest", "diff", "convert", "demo")
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: The arguments after the program's name; None for the process's own.

    Returns:
        The exit status: 0 for yes or done, 1 for no, 2 for a mistake in the
        command itself, 130 for an interrupt.
    """
    screen = Screen.standard()
    words = sys.argv[1:] if argv is None else argv
    try:
        arguments = parser(*[word for word in words[:1] if word in _COMMANDS]).parse_args(words)
    except SystemExit as stop:
        return int(stop.code or 0)
    _stay_off_accelerators(arguments)
    try:
        return int(arguments.run(arguments, screen))
    except UsageError as error:
        screen.error("usage", str(error))
        return 2
    except RestoreError as error:
        screen.error(type(error).__name__, str(error))
        return 1
    except (OSError, ImportError) as error:
        return _outside(error, screen)
    except KeyboardInterrupt:
        screen.error("interrupted", "nothing was changed")
        _say_no_more()
        return _INTERRUPTED


def _say_no_more() -> None:
    """Silences what is left of an event loop that an interrupt cut off: what nobody awaited is no news."""
    sys.unraisablehook = lambda _: None
    warnings.simplefilter("ignore", RuntimeWarning)


def _outside(error: OSError | ImportError, screen: Screen) -> int:
    """Says what the system refused: a disk, a permission, or a package that a `gs://` path needs."""
    if isinstance(error, BrokenPipeError):
        # The reader (`| head`) has seen enough. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    screen.error(type(error).__name__, str(error))
    return 1


def parser(*chosen: str) -> argparse.ArgumentParser:
    """Returns the parser of the chosen commands, or of all: what a command needs is imported with it."""
    whole = argparse.ArgumentParser(
        prog="orbax-nnx",
        description="Linen checkpoints in NNX: what is in them, whether they fit, and how to convert them.",
        epilog="Exit status: 0 for yes or done, 1 for no, 2 for a mistake in the command.",
    )
    whole.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    commands = whole.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in chosen or _COMMANDS:
        importlib.import_module(f"orbax_nnx_handler.commands.{command}").add_to(commands)
    return whole


def _version() -> str:
    try:
        return metadata.version("orbax-nnx-handler")
    except metadata.PackageNotFoundError:
        # Run from a source tree.
        return "(not installed)"


def _stay_off_accelerators(arguments: argparse.Namespace) -> None:
    """Keeps JAX on the host: nothing here needs an accelerator, and a running job may hold it."""
    if getattr(arguments, "any_device", False) or "JAX_PLATFORMS" in os.environ:
        return
    jax.config.update("jax_platforms", "cpu")
