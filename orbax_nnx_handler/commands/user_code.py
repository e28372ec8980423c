"""What the user's own modules hold, as an argument names it: the factory of a target, a pair of programs."""

import ast
import contextlib
import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import pathlib
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, cast

import jax
from flax import nnx

from orbax_nnx_handler.planning.target import flatten_target
from orbax_nnx_handler.planning.target.roles import roles_of

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
    found = _member(place, names, callable)
    if not callable(found) or isinstance(found, nnx.Module):  # A model is called with inputs.
        what = f"{text} is no function, but of type {type(found).__name__}"
        raise UsageError(f"{what}; a target is what a function returns: def make(): return ...")
    return Factory(text, found, args, kwargs)


def load_value(text: str, default: str = "", *, may_be: Callable[[Any], bool]) -> Any:
    """Returns what an argument names: `file.py:NAME` or `package.module:NAME`.

    Args:
        text: Module or file, a colon and a name.
        default: The name where the text has none.
        may_be: Tells what could have been meant where nothing has the name.

    Raises:
        UsageError: The text names nothing.
    """
    place, _, name = text.partition(":")
    name = name or default
    if not place or not all(part.isidentifier() for part in name.split(".")):
        raise UsageError(f"{text!r} is no FILE.py:NAME.")
    return _member(place, name.split("."), may_be)


def load_pair(text: str) -> tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]:
    """Returns the two programs that an argument names, and what both are called with.

    Raises:
        UsageError: It names no such thing, or the function that returns it fails.
    """
    value = load_value(
        text, "PAIR", may_be=lambda found: callable(found) or isinstance(found, tuple | list | dict)
    )
    if callable(value):
        try:
            value = value()
        # The user's code may raise anything.
        except (Exception, SystemExit) as error:
            raise UsageError(f"{text} fails: {told(error)}") from error
    parts = [_part(value, at, name) for at, name in enumerate(_PARTS)]
    if not (callable(parts[0]) and callable(parts[1]) and isinstance(parts[2], tuple | list)):
        what = "two functions, and a tuple of what both get"
        what += "; for one array, (x,)" if hasattr(parts[2], "shape") else ""
        raise UsageError(f"{text} is no (linen_apply, nnx_apply, inputs): {what}.")
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


_LISTED = 12


def _member(place: str, names: Sequence[str], may_be: Callable[[Any], bool]) -> Any:
    found: Any = _load_module(place)
    for name in names:
        if not hasattr(found, name):
            held = list(_own_names(found, may_be))
            # The likeliest first: a program may hold hundreds of functions.
            close = difflib.get_close_matches(name, held, n=_LISTED)
            first = [*close, *(other for other in held if other not in close)]
            more = f", ... and {len(held) - _LISTED} more" if len(held) > _LISTED else ""
            listed = ", ".join(first[:_LISTED]) + more
            raise UsageError(f"{place} has no {'.'.join(names)}; it has: {listed or 'nothing of the kind'}.")
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
    except SyntaxError as error:
        raise UsageError(f"{text!r} is no Python: {error.msg}.") from error
    except ValueError as error:
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
    if pathlib.Path(place).is_dir() and not all(map(str.isidentifier, place.split("."))):
        raise UsageError(f"{place} is a directory, and no Python file or module.")
    # As `python -m` would: what lies in the current directory can be imported.
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        # What it prints meanwhile is no part of what a command says, which may be JSON.
        with contextlib.redirect_stdout(sys.stderr):
            return _load_file(_existing(place)) if place.endswith(".py") else importlib.import_module(place)
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        raise UsageError(f"{place} cannot be imported: {told(error)}") from error


def _is_installed(file: str) -> bool:
    # `<string>`: what a dataclass writes for itself.
    return "site-packages" in file or file.startswith(("<", _OWN)) or "/importlib/" in file


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


def _own_names(place: Any, may_be: Callable[[Any], bool]) -> list[str]:
    """Returns the names of what a module or a class holds itself, and did not import."""
    own = getattr(place, "__module__", None) or getattr(place, "__name__", "")
    return [
        name
        for name, value in cast("dict[str, Any]", vars(place)).items()
        if not name.startswith("_") and may_be(value) and getattr(value, "__module__", own) == own
    ]


def _abstract(make: Callable[[], Any]) -> Any:
    """Returns what a factory builds, without a value; None where that is nothing.

    As it is where the factory has abstracted it itself.
    """
    states: list[Any] = []

    def traced() -> Any:
        made = make()
        _check_target(made)
        if not _is_abstract_state(made):
            return made
        # `nnx.eval_shape` would take its Variables apart and build them anew, one by one.
        states.append(made)
        return None

    target = nnx.eval_shape(traced)
    if states:
        return states[0]
    return target if jax.tree.leaves(target) else None


def _check_target(made: Any) -> None:
    """Raises where a factory returns what holds no arrays at all, which JAX would tell in its own words.

    Raises:
        TypeError: It is no module, state or tree.
    """
    if inspect.iscoroutine(made):
        made.close()  # Nobody will await it.
    leaves = jax.tree.leaves(made)
    if len(leaves) == 1 and leaves[0] is made and not hasattr(made, "shape"):
        raise TypeError(
            f"it returns a value of type {type(made).__name__}, no module, state or tree of arrays"
        )


def _is_abstract_state(made: Any) -> bool:
    leaves = jax.tree.leaves(made) if isinstance(made, nnx.State) else []
    return bool(leaves) and all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def _weights_of(target: Any) -> Any:
    parts = flatten_target(target)
    weights = {item.leaf.path for item in roles_of(parts.leaves) if item.role not in ("optimizer", "step")}
    flat = [(path, node) for path, node in parts.variables.items() if path in weights]
    return cast(Any, nnx.from_flat_state)(flat)
