"""Arguments that several commands take, what they ask for, and the options that do what hints propose."""

import argparse
import math
import re
import shlex
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import EllipsisType
from typing import Any, cast

import jax
from flax import nnx

from orbax_nnx_handler.commands.user_code import Factory, UsageError, load_factory, load_value, told
from orbax_nnx_handler.planning.core.errors import Hint
from orbax_nnx_handler.planning.core.paths import is_index
from orbax_nnx_handler.planning.layouts import LAYOUTS
from orbax_nnx_handler.planning.options import DEFAULT_BYTES, POLICIES, Policies, Policy
from orbax_nnx_handler.planning.rules import Rename, Rule, as_rules

# Between stored and wanted path; one within a name has a backslash in front.
_EQUALS = re.compile(r"(?<!\\)=")
_HELP_WIDTH = 78

TARGET_HELP = (
    "what builds the target: package.module:function or file.py:function, maybe with literal arguments, "
    "as in 'model.py:make(layers=12)'; called under nnx.eval_shape, so that no array is made"
)


# What shtab writes into a shell's script; as its own `shtab.FILE`, which need not be installed.
_FILES = {
    "bash": "_shtab_compgen_files",
    "zsh": "_files",
    "tcsh": "f",
    "fish": "(__fish_complete_path (commandline -ct))",
    "powershell": "_shtab_powershell_compgen_files",
}


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
    path: Any = parser.add_argument(
        name,
        metavar=name.upper(),
        help=help_text
        or "a manager's root (its newest step is taken), a step, an item, or weights in a file or in a "
        "directory of Hugging Face's (msgpack, npz, safetensors)",
    )
    path.complete = _FILES


def add_item(parser: argparse.ArgumentParser) -> None:
    """Adds the name of an item within a step."""
    parser.add_argument("--item", metavar="NAME", help="the item, where a step holds several")


def add_tolerance(parser: argparse.ArgumentParser) -> None:
    """Adds how far apart outputs may be."""
    parser.add_argument(
        "--tolerance",
        metavar="X",
        type=_positive,
        help="what the largest difference may be, relative to the outputs (default: 1e-5, or what their "
        "dtype allows)",
    )


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no tolerance, such as 1e-4")
    return value


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
        metavar="LAYOUT",
        choices=["auto", "linen", *(layout.name for layout in LAYOUTS)],
        default="auto",
        help="how the checkpoint is arranged (default: found out): %(choices)s",
    )
    parser.add_argument("--weights-only", action="store_true", help="leave optimizer and step out")
    parser.add_argument(
        "--devices",
        metavar="N",
        type=whole(1),
        help="pretend to have N devices, for factories that build a mesh",
    )


def asked_for(arguments: argparse.Namespace) -> tuple[Factory, dict[str, Any]]:
    """Returns what `add_target` and `add_item` were given: the factory, and options of `plan_restore`.

    Raises:
        UsageError: The factory or an option is wrong.
    """
    _pretend_devices(arguments.devices)
    factory = load_factory(arguments.target)
    target = factory.target(weights_only=arguments.weights_only)
    # Kept for the way out of an error, which says what to type in addition.
    arguments.settled = rules_of(arguments)
    return factory, {
        "target": target,
        "layout": arguments.layout,
        "renames": arguments.settled,
        "item": arguments.item,
    }


def _pretend_devices(number: int | None) -> None:
    """Makes as many host devices as `--devices` asks for.

    Raises:
        UsageError: JAX has started already.
    """
    if number is None:
        return
    try:
        jax.config.update("jax_num_cpu_devices", number)
    except RuntimeError as error:
        raise UsageError(f"--devices {number}: {error}") from error


def add_rules(parser: argparse.ArgumentParser) -> None:
    """Adds rules, as a list in a file or one rename at a time."""
    parser.add_argument(
        "--rules",
        metavar="FILE.py:NAME",
        action="append",
        default=[],
        help="a list of rules in a Python file (NAME: RULES if it is left out), such as `orbax-nnx suggest "
        "--write` writes, or a function without arguments that returns one; may be repeated",
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
        value: Any = load_value(text, "RULES", may_be=lambda found: isinstance(found, list | tuple))
        try:
            found += as_rules(cast(Any, value() if callable(value) else value))
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
        "with that key in their path, or all of several (layers/4=init); may be repeated",
    )


def policies_of(texts: list[str]) -> Policies:
    """Returns the policies of `--policy`.

    Raises:
        UsageError: One is no policy, or two of one key differ.
    """
    chosen: dict[Any, Policy] = {}
    for text in texts:
        key, _, policy = text.rpartition("=")
        if policy not in POLICIES:
            raise UsageError(f"--policy {text}: {policy!r} is none of {', '.join(POLICIES)}.")
        place: Any = (_place(key) if "/" in key else nnx.PathContains(key)) if key else ...
        if chosen.get(place, policy) != policy:
            raise UsageError(f"--policy is given twice for {key or 'all missing weights'}.")
        chosen[place] = policy
    rest = chosen.pop(..., "error")
    return cast("Mapping[Any, Policy]", chosen | {...: rest}) if chosen else rest


def _place(key: str) -> Any:
    names = ((name, int(name)) if is_index(name) else (name,) for name in key.split("/"))
    return nnx.All(*(nnx.Any(*map(nnx.PathContains, each)) for each in names))


def _renames(texts: list[str]) -> list[tuple[str, str]]:
    """Returns the rules of `--rename`; nothing may stand behind the equals sign.

    Raises:
        UsageError: One has no equals sign.
    """
    pairs: list[tuple[str, str]] = []
    for text in texts:
        stored, *wanted = _sides(text)
        if not (stored and wanted):
            raise UsageError(f"--rename {text} is no STORED=WANTED, such as Dense_0=up or model= (nothing).")
        pairs.append((stored, wanted[0]))
    return pairs


def rename_text(stored: str, wanted: str) -> str | None:
    """Returns a rule as `--rename` takes it; None for names that it cannot take."""
    text = stored.replace("=", "\\=") + "=" + wanted
    return text if stored and _sides(text) == [stored, wanted] else None


def _sides(text: str) -> list[str]:
    return [part.replace("\\=", "=") for part in _EQUALS.split(text, maxsplit=1)]


_MANY = 8
"""Options that fit at a prompt; more of them are a matter for a program."""


def way_out(hints: Sequence[Hint], arguments: argparse.Namespace) -> str:
    """Returns what hints propose as it is typed: options to add to a command, or another command.

    Args:
        hints: The hints.
        arguments: What was typed; its rules, where it has any, were read already.

    Returns:
        Empty where nothing can be said at a prompt.
    """
    typed = vars(arguments)
    passed = [option("policy", text) for text in typed.get("policy", ())]
    options = as_options(hints, typed.get("settled", ()), passed)
    path: str = typed.get("path") or typed.get("src") or ""
    if options or not path:
        return options
    commands = {hint.command for hint in hints}
    item = ["--item", typed["item"]] if typed.get("item") else []
    asked = next((command for command in ("suggest more", "suggest") if command in commands), None)
    if asked and typed.get("target"):
        rules = [f"--{name}={text}" for name in ("rules", "rename") for text in typed.get(name, ())]
        words = [*_as_typed(typed), *item, *(rules if asked == "suggest more" else ())]
        return shlex.join(["orbax-nnx", "suggest", path, typed["target"], *words])
    return shlex.join(["orbax-nnx", "tree", path, *item]) if "tree" in commands else ""


def _as_typed(typed: Mapping[str, Any]) -> list[str]:
    """Returns the options without which a target is not the same."""
    words = ["--weights-only"] if typed["weights_only"] else []
    words += ["--layout", typed["layout"]] if typed["layout"] != "auto" else []
    return words + (["--devices", str(typed["devices"])] if typed["devices"] else [])


def as_options(
    hints: Iterable[Hint], settled: Sequence[Rule] = (), passed: Collection[str | None] = ()
) -> str:
    """Returns the options that do what hints propose; empty where none can be said at a prompt.

    Args:
        hints: The hints.
        settled: The rules that were passed already, which hints repeat.
        passed: Other options that were passed already.
    """
    words = [word for hint in hints for word in _options(hint, settled)]
    return " ".join(word for word in dict.fromkeys(words) if word not in passed)


def _options(hint: Hint, settled: Sequence[Rule]) -> list[str]:
    words: list[str] = []
    for name, value in hint.arguments.items():
        if name == "renames" and settled:
            value = [rule for rule in as_rules(value) if rule not in settled]
        said = _SAID[name](value) if name in _SAID else None
        if said is None:
            return []
        words += said
    return words if len(words) <= _MANY else []


def option(name: str, value: str) -> str | None:
    """Returns an option as it can be pasted at a prompt; None where its value cannot be seen there."""
    if not value.isprintable():
        return None
    # `--rename -rf=hidden` would be an option of another name.
    between = "=" if value.startswith("-") else " "
    return f"--{name}{between}{shlex.quote(value)}"


def _option(name: str) -> Callable[[Any], list[str] | None]:
    return lambda value: _all_said([option(name, str(value))])


def _all_said(words: Iterable[str | None]) -> list[str] | None:
    """Returns the words; None where one of them cannot be said, for a part of a way out would mislead."""
    every = list(words)
    said = [word for word in every if word is not None]
    return said if len(said) == len(every) else None


def _policies(policy: Any) -> list[str] | None:
    if isinstance(policy, str):
        return [f"--policy {policy}"]
    words: list[str | None] = []
    for key, choice in cast("Mapping[Any, Policy]", policy).items():
        keys = _keys(key)
        if keys:
            words.append(option("policy", f"{'/'.join(keys)}={choice}"))
        elif not isinstance(key, EllipsisType):
            return None  # Types of Variables have no spelling at a prompt.
    return _all_said(words)


def _keys(chosen: Any) -> list[str]:
    """Returns the keys that a filter asks for, as `--policy` takes them; none for any other filter."""
    parts = cast("Sequence[Any]", chosen.predicates) if isinstance(chosen, nnx.All) else (chosen,)
    keys = [part.key for part in parts if isinstance(part, nnx.PathContains)]
    said = [str(key) for key in keys if isinstance(key, str | int) and "/" not in str(key)]
    return said if len(said) == len(parts) else []


def rename_options(renames: Iterable[Rule | tuple[str, str]]) -> list[str] | None:
    """Returns rules as options; None where one of them is more than another name."""
    rules = as_rules(renames)
    pairs = [(rule.pattern, rule.replacement) for rule in rules if isinstance(rule, Rename)]
    if len(pairs) < len(rules):
        return None
    texts = [rename_text(stored, wanted) for stored, wanted in pairs]
    return _all_said(None if text is None else option("rename", text) for text in texts)


_SAID: Mapping[str, Callable[[Any], list[str] | None]] = {
    "item": _option("item"),
    "layout": _option("layout"),
    "policy": _policies,
    "renames": rename_options,
}
