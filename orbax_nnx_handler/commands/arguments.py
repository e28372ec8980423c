"""Arguments that several commands take; targets and rules from a user's own module among them."""

import argparse
import ast
import dataclasses
import importlib
import importlib.util
import math
import pathlib
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, cast

import jax
from flax import nnx

from orbax_nnx_handler.planning.layouts import LAYOUTS
from orbax_nnx_handler.planning.options import DEFAULT_BYTES, POLICIES, Policies, Policy
from orbax_nnx_handler.planning.rules import Rule, as_rules
from orbax_nnx_handler.planning.target.roles import roles_of
from orbax_nnx_handler.planning.target.target import flatten_target

_OWN = str(pathlib.Path(__file__).parents[1])


_PARTS = ("linen_apply", "nnx_apply", "inputs")
PAIR_HELP = (
    "(linen_apply, nnx_apply, inputs), or a function without arguments that returns them: "
    "linen_apply(variables, *inputs) and nnx_apply(model, *inputs) run the two programs and return the same"
)


class UsageError(ValueError):
    """The command itself is wrong; exit status 2."""


@dataclasses.dataclass(frozen=True)
class Factory:
    """A call that builds a target."""

    text: str
    make: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __call__(self) -> Any:
        """Builds the target with real values."""
        return self.make(*self.args, **self.kwargs)

    def target(self, *, weights_only: bool = False) -> Any:
        """Returns the abstract target: no array is made.

        Raises:
            UsageError: The call fails; says where and why.
        """
        try:
            target = _abstract(self)
        # The user's code may raise anything; what it is and where tells them more than our own traceback.
        except (Exception, SystemExit) as error:
            raise UsageError(f"{self.text} fails under nnx.eval_shape: {told(error)}") from error
        if target is None:
            raise UsageError(f"{self.text} builds nothing; it must return the module or the train state.")
        return _weights_of(target) if weights_only else target


def load_factory(text: str) -> Factory:
    """Returns the factory that an argument names.

    Args:
        text: Module or file, a colon, a function, and maybe a call with literal
            arguments. Nothing of the arguments is evaluated as code.

    Raises:
        UsageError: The text names no function, or its arguments are no literals.
    """
    place, colon, call = text.partition(":")
    if not colon or not place or not call:
        raise UsageError(f"{text!r} is no MODULE:FACTORY, such as model.py:make or 'model:make(layers=12)'.")
    names, args, kwargs = _parse_call(text, call)
    found = _member(place, names)
    if not callable(found):
        raise UsageError(f"{text} is a {type(found).__name__}, not a function.")
    return Factory(text, found, args, kwargs)


def load_value(text: str, default: str = "") -> Any:
    """Returns what an argument names: `file.py:NAME` or `package.module:NAME`.

    Args:
        text: Module or file, a colon and a name.
        default: The name where the text has none.

    Raises:
        UsageError: The text names nothing.
    """
    place, _, name = text.partition(":")
    name = name or default
    if not place or not all(part.isidentifier() for part in name.split(".")):
        raise UsageError(f"{text!r} is no FILE.py:NAME.")
    return _member(place, name.split("."))


def load_pair(text: str) -> tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]:
    """Returns the two programs that an argument names, and what both are called with.

    Raises:
        UsageError: It names no such thing, or the function that returns it fails.
    """
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


def told(error: BaseException) -> str:
    """Returns what an error of the user's code is, and where in that code it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    place = next((frame for frame in reversed(frames) if not _is_installed(frame.filename)), None)
    where = f"\nat {place.filename}:{place.lineno}" if place is not None else ""
    if isinstance(error, SyntaxError):
        where = f"\nat {error.filename}:{error.lineno}"
    kind = "" if isinstance(error, ModuleNotFoundError) else f"{type(error).__name__}: "
    return f"{kind}{error}{where}"


def _member(place: str, names: Sequence[str]) -> Any:
    found: Any = _load_module(place)
    for name in names:
        if not hasattr(found, name):
            raise UsageError(f"{place} has no {'.'.join(names)}; it has: {_functions(found)}.")
        found = getattr(found, name)
    return found


def _parse_call(text: str, call: str) -> tuple[list[str], tuple[Any, ...], dict[str, Any]]:
    try:
        parsed = ast.parse(call, mode="eval").body
        function = parsed.func if isinstance(parsed, ast.Call) else parsed
        args = tuple(map(ast.literal_eval, parsed.args)) if isinstance(parsed, ast.Call) else ()
        keywords = parsed.keywords if isinstance(parsed, ast.Call) else []
        kwargs = {str(word.arg): ast.literal_eval(word.value) for word in keywords if word.arg}
        unpacked = any(word.arg is None for word in keywords)
    except (SyntaxError, ValueError) as error:
        raise UsageError(
            f"the arguments in {text!r} are not all literals: numbers, strings, True, None, tuples, lists."
        ) from error
    names = ast.unparse(function).split(".")
    if unpacked or not all(name.isidentifier() for name in names):
        raise UsageError(f"{call!r} is no function, nor a call with literal arguments.")
    return names, args, kwargs


def _existing(place: str) -> pathlib.Path:
    file = pathlib.Path(place)
    if not file.exists():
        raise UsageError(f"there is no file {file}.")
    return file


def _load_module(place: str) -> ModuleType:
    # As `python -m` would: what lies in the current directory can be imported.
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return _load_file(_existing(place)) if place.endswith(".py") else importlib.import_module(place)
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        raise UsageError(f"{place} cannot be imported: {told(error)}") from error


def _is_installed(file: str) -> bool:
    return "site-packages" in file or file.startswith(("<frozen", _OWN)) or "/importlib/" in file


def _load_file(file: pathlib.Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise UsageError(f"{file} is no Python file.")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickles look their module up by name.
    sys.modules[file.stem] = module
    # The file's neighbours, as Python itself does for a script.
    folder = str(file.parent.resolve())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec.loader.exec_module(module)
    return module


def _functions(place: Any) -> str:
    own = [
        name
        for name, value in cast("dict[str, Any]", vars(place)).items()
        if callable(value) and not name.startswith("_") and getattr(value, "__module__", "") == place.__name__
    ]
    return ", ".join(own) or "no function"


def _abstract(make: Callable[[], Any]) -> Any:
    """Returns what a factory builds, without a value; None where that is nothing.

    As it is where the factory has abstracted it itself.
    """
    states: list[Any] = []

    def traced() -> Any:
        made = make()
        if not _is_abstract_state(made):
            return made
        # `nnx.eval_shape` would take its Variables apart and build them anew, one by one.
        states.append(made)
        return None

    target = nnx.eval_shape(traced)
    if states:
        return states[0]
    return target if jax.tree.leaves(target) else None


def _is_abstract_state(made: Any) -> bool:
    leaves = jax.tree.leaves(made) if isinstance(made, nnx.State) else []
    return bool(leaves) and all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def _weights_of(target: Any) -> Any:
    parts = flatten_target(target)
    weights = {item.leaf.path for item in roles_of(parts.leaves) if item.role not in ("optimizer", "step")}
    flat = [(path, node) for path, node in parts.variables.items() if path in weights]
    return cast(Any, nnx.from_flat_state)(flat)


# Between stored and wanted path; one within a name has a backslash in front.
_EQUALS = re.compile(r"(?<!\\)=")
_HELP_WIDTH = 78

TARGET_HELP = (
    "what builds the target: package.module:function or file.py:function, maybe with literal arguments, "
    "as in 'model.py:make(layers=12)'; called under nnx.eval_shape, so that no array is made"
)


def described(description: str, *examples: str) -> dict[str, Any]:
    """Returns what a command's help says above its arguments, and the examples below them."""
    shown = "\n".join(f"  {line}" for line in examples)
    return {
        "description": textwrap.fill(description, width=_HELP_WIDTH),
        "epilog": f"{'example' if len(examples) == 1 else 'examples'}:\n{shown}",
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }


def add_path(parser: argparse.ArgumentParser, name: str = "path", help_text: str = "") -> None:
    """Adds a checkpoint's path."""
    parser.add_argument(
        name,
        metavar=name.upper(),
        help=help_text or "a manager's root (its newest step is taken), a step, an item, or a msgpack file",
    )


def add_item(parser: argparse.ArgumentParser) -> None:
    """Adds the name of an item within a step."""
    parser.add_argument("--item", metavar="NAME", help="the item, where a step holds several")


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds the choice of JSON."""
    parser.add_argument("--json", action="store_true", help="print JSON for programs")


def add_memory(parser: argparse.ArgumentParser) -> None:
    """Adds the bound of the memory, in bytes; None where it is not given."""
    parser.add_argument(
        "--memory",
        metavar="GB",
        type=_gigabytes,
        help="upper bound of this process's memory in GB (default: "
        f"{DEFAULT_BYTES / 1e9:.0f} more than it holds when it starts to read)",
    )


def whole(least: int) -> Callable[[str], int]:
    """Returns what reads a whole number from a lower bound on."""

    def read(text: str) -> int:
        if not text.lstrip("-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} on")
        return int(text)

    return read


def _gigabytes(text: str) -> int:
    try:
        amount = float(text)
    except ValueError:
        amount = 0.0
    if not (amount > 0 and math.isfinite(amount)):
        raise argparse.ArgumentTypeError(f"{text!r} is no amount of memory in GB")
    return int(amount * 1e9)


def add_target(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """Adds the factory of a target and what the mapping to it needs to know."""
    parser.add_argument("target", metavar="MODULE:FACTORY", help=TARGET_HELP, nargs="?" if optional else None)
    add_rules(parser)
    parser.add_argument(
        "--layout",
        choices=["auto", "linen", *(layout.name for layout in LAYOUTS)],
        default="auto",
        help="how the checkpoint is arranged (default: found out)",
    )
    parser.add_argument("--weights-only", action="store_true", help="leave optimizer and step out")
    parser.add_argument(
        "--devices",
        metavar="N",
        type=whole(1),
        help="pretend to have N devices, for factories that build a mesh",
    )


def add_rules(parser: argparse.ArgumentParser) -> None:
    """Adds rules, as a list in a file or one rename at a time."""
    parser.add_argument(
        "--rules",
        metavar="FILE.py:NAME",
        action="append",
        default=[],
        help="a list of rules in a Python file (NAME: RULES if it is left out), such as `orbax-nnx suggest "
        "--write` writes; may be repeated",
    )
    parser.add_argument(
        "--rename",
        metavar="STORED=WANTED",
        action="append",
        default=[],
        help="rename whole path segments of stored paths (`model=` takes a level away); may be repeated, "
        "applied in order, after --rules; in a name that holds an equals sign, write \\=",
    )


def rules_of(arguments: argparse.Namespace) -> list[Rule]:
    """Returns the rules of `--rules`, then those of `--rename`.

    Raises:
        UsageError: One has no equals sign, or a name is no list of rules.
    """
    found = list[Rule]()
    for text in arguments.rules:
        value = load_value(text, "RULES")
        try:
            found += as_rules(value)
        # What the file holds may be anything.
        except Exception as error:
            raise UsageError(f"--rules {text} is no list of rules: {told(error)}") from error
    return [*found, *as_rules(_renames(arguments.rename))]


def add_policy(parser: argparse.ArgumentParser) -> None:
    """Adds the policies for missing weights."""
    parser.add_argument(
        "--policy",
        metavar="[KEY=]POLICY",
        action="append",
        default=[],
        help=f"what a missing weight becomes: {', '.join(POLICIES)} (default: error); with KEY=, only those "
        "with that key in their path; may be repeated",
    )


def policies_of(texts: list[str]) -> Policies:
    """Returns the policies of `--policy`.

    Raises:
        UsageError: One is no policy, or two are for the rest.
    """
    chosen: dict[Any, Policy] = {}
    for text in texts:
        key, _, policy = text.rpartition("=")
        if policy not in POLICIES:
            raise UsageError(f"--policy {text}: {policy!r} is none of {', '.join(POLICIES)}.")
        place: Any = nnx.PathContains(key) if key else ...
        if place in chosen:
            raise UsageError(f"--policy is given twice for {key or 'all missing weights'}.")
        chosen[place] = policy
    rest = chosen.pop(..., "error")
    return cast("Mapping[Any, Policy]", chosen | {...: rest}) if chosen else rest


def _renames(texts: list[str]) -> list[tuple[str, str]]:
    """Returns the rules of `--rename`; nothing may stand behind the equals sign.

    Raises:
        UsageError: One has no equals sign.
    """
    pairs: list[tuple[str, str]] = []
    for text in texts:
        stored, *wanted = (part.replace("\\=", "=") for part in _EQUALS.split(text, maxsplit=1))
        if not (stored and wanted):
            raise UsageError(f"--rename {text} is no STORED=WANTED, such as Dense_0=up or model= (nothing).")
        pairs.append((stored, wanted[0]))
    return pairs


def rename_text(stored: str, wanted: str) -> str | None:
    """Returns a rule as `--rename` takes it; None for names that it cannot take."""
    text = stored.replace("=", "\\=") + "=" + wanted
    return text if stored and _renames([text]) == [(stored, wanted)] else None


def pretend_devices(arguments: argparse.Namespace) -> None:
    """Makes as many host devices as `--devices` asks for.

    Raises:
        UsageError: JAX has started already.
    """
    if arguments.devices is None:
        return
    try:
        jax.config.update("jax_num_cpu_devices", arguments.devices)
    except RuntimeError as error:
        raise UsageError(f"--devices {arguments.devices}: {error}") from error
