"""The command line `orbax-nnx`: the verdict on a restore before the job starts."""

import argparse
import contextlib
import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import metadata
from typing import Any, NoReturn

import jax

from orbax_nnx_handler.commands.screen import Screen
from orbax_nnx_handler.commands.user_code import UsageError
from orbax_nnx_handler.planning.core.errors import RestoreError

_COMMANDS = ("tree", "plan", "suggest", "diff", "convert", "verify", "demo")
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: The arguments after the program's name; None for the process's own.

    Returns:
        The exit status: 0 for yes or done, 1 for no, 2 for a mistake in the
        command itself, 130 for an interrupt.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    screen = Screen.standard(as_json=_wants_json(words))
    try:
        return _run(words, screen)
    except SystemExit as stop:
        # Of `--help` and `--version`.
        return int(stop.code or 0)
    except CommandError as error:
        screen.error("UsageError", str(error), word="usage", text=error.usage)
        return 2
    except UsageError as error:
        screen.error("UsageError", str(error), word="usage")
        return 2
    except (OSError, ImportError) as error:
        return _outside(error, screen)
    except RuntimeError as error:
        if "initialize backend" not in str(error):
            raise
        # JAX's own words: JAX_PLATFORMS names what this machine does not have.
        screen.error("RuntimeError", str(error))
        return 1
    except KeyboardInterrupt:
        screen.error("KeyboardInterrupt", "nothing was changed", word="interrupted")
        _say_no_more()
        return _INTERRUPTED


def _run(words: Sequence[str], screen: Screen) -> int:
    arguments = parser(*[word for word in words[:1] if word in _COMMANDS]).parse_args(words)
    _stay_off_accelerators(arguments)
    # What the user's own module prints is no part of the JSON.
    aside = contextlib.redirect_stdout(sys.stderr) if screen.as_json else contextlib.nullcontext()
    with aside:
        try:
            return int(arguments.run(arguments, screen))
        except RestoreError as error:
            screen.refusal(error, arguments)
            return 1


def _wants_json(words: Sequence[str]) -> bool:
    """Tells it before the words are parsed, since they may be what is wrong; argparse takes `--js` too."""
    return any(len(word) > 2 and "--json".startswith(word) for word in words)


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


class CommandError(ValueError):
    """The words of a command are none that the parser takes.

    Attributes:
        usage: The usage of the command and the message below it, as argparse writes them.
    """

    def __init__(self, message: str, usage: str):
        super().__init__(message)
        self.usage = usage


class _Parser(argparse.ArgumentParser):
    """Raises what argparse would print, since under `--json` it has another form."""

    def error(self, message: str) -> NoReturn:
        usage = self.format_usage().removeprefix("usage: ")
        raise CommandError(message, f"{usage}{self.prog}: error: {message}")


class _Completion(argparse.Action):
    """Prints a completion script, which then knows all words without running this program."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: object,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        del namespace, option_string
        try:
            shtab = importlib.import_module("shtab")
        except ImportError:
            parser.error("--completion needs shtab: pip install 'orbax-nnx-handler[completion]'")
        if values not in shtab.SUPPORTED_SHELLS:
            parser.error(f"--completion {values}: the shells are {', '.join(shtab.SUPPORTED_SHELLS)}")
        print(shtab.complete(parser, values))
        parser.exit()


def parser(*chosen: str) -> argparse.ArgumentParser:
    """Returns the parser of the chosen commands, or of all: what a command needs is imported with it."""
    whole = _Parser(
        prog="orbax-nnx",
        description="Linen checkpoints in NNX: what is in them, whether they fit, and how to convert them.",
        epilog="Exit status: 0 for yes or done, 1 for no, 2 for a mistake in the command, 130 interrupted.",
    )
    whole.add_argument(
        "--completion",
        metavar="SHELL",
        action=_Completion,
        help="print what completes this program's words in a shell: bash, zsh, fish, tcsh, powershell",
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
    """Keeps JAX on the host: a verdict needs no accelerator, and a job whose environment this is may hold it.

    Where the user's programs run, `JAX_PLATFORMS` says on what.
    """
    runs_programs = getattr(arguments, "runs_programs", False) or getattr(arguments, "verify", None)
    if getattr(arguments, "any_device", False) or (runs_programs and "JAX_PLATFORMS" in os.environ):
        return
    jax.config.update("jax_platforms", "cpu")
