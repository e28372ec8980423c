"""The API reference, from the docstrings of the public names."""

import dataclasses
import enum
import inspect
import pathlib
from typing import Any

import orbax_nnx_handler
from orbax_nnx_handler import v1

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "reference.md"
_HEAD = """# API reference

Written by `python -m tests.docs` from the docstrings; a test compares. The command line describes itself:
`orbax-nnx --help`.
"""
_GROUPS = ("Functions", "Classes", "Errors")
# What the package returns; nobody calls their constructors.
_RESULTS = ("RestorePlan", "RestoreReport", "Suggestion", "Verification")


def reference() -> str:
    """Returns the whole page."""
    parts: dict[str, list[str]] = {group: [] for group in _GROUPS}
    for name in orbax_nnx_handler.__all__:
        value = getattr(orbax_nnx_handler, name)
        parts[_group(value)].append(_entry(name, value))
    sections = [f"## {group}\n\n" + "\n".join(entries) for group, entries in parts.items()]
    later = "\n".join(
        _entry(f"v1.{name}", getattr(v1, name)) for name in ("NNXLinenHandler", "configured", "context")
    )
    return "\n".join([_HEAD, *sections, f"## `orbax_nnx_handler.v1`\n\n{later}"]).rstrip() + "\n"


def _group(value: Any) -> str:
    if not inspect.isclass(value):
        return "Functions"
    return "Errors" if issubclass(value, Exception) else "Classes"


def _entry(name: str, value: Any) -> str:
    if not inspect.isclass(value):
        return f"### `{name}`\n\n`{name}({_arguments(value)})`\n\n{_prose(value)}"
    own = f"{_call(name, value)}{_prose(value)}{_inherited_attributes(value)}{_options(value)}"
    text = f"### `{name}`\n\n{own}"
    if not issubclass(value, Exception | enum.Enum):
        text += "".join(
            _member(f"{name}.{member_name}", member) for member_name, member in _own_members(value)
        )
    return text


def _call(name: str, kind: type) -> str:
    """Returns how a class is called that a user calls."""
    if issubclass(kind, Exception | enum.Enum) or name in _RESULTS or not inspect.signature(kind).parameters:
        return ""
    return f"`{name}({_arguments(kind)})`\n\n"


def _options(kind: type) -> str:
    """Returns what a constructor takes, where it has a docstring of its own."""
    described = inspect.getdoc(vars(kind).get("__init__")) or ""
    return "\n*Args:*" + _prose(kind.__init__).partition("*Args:*")[2] if "\nArgs:" in described else ""


def _member(name: str, member: Any) -> str:
    arguments = "" if isinstance(member, property) else _arguments(member).removeprefix("self").lstrip(", ")
    call = f"`{name}({arguments})`\n\n" if arguments else ""
    return f"\n#### `{name}`\n\n{call}{_prose(member)}"


def _arguments(value: Any) -> str:
    """Returns names and defaults; types are in the docstring's own words."""
    shown: list[str] = []
    keyword_only = False
    for parameter in inspect.signature(value).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            shown.append("*")
        default = "" if parameter.default is parameter.empty else f"={_default(parameter.default)}"
        prefix = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        shown.append(f"{prefix}{parameter.name}{default}")
    return ", ".join(shown)


def _default(value: Any) -> str:
    """Returns a default as a user writes it: which module of a package a class lies in is of its version."""
    if not inspect.isclass(value):
        return repr(value)
    return f"{value.__module__.partition('.')[0]}.{value.__name__.rpartition('.')[2]}"


def _own_members(kind: type) -> list[tuple[str, Any]]:
    owners = [*_dataclasses_below(kind), kind]
    found = [(name, m) for owner in owners for name, m in vars(owner).items() if not name.startswith("_")]
    documented = [
        (name, member) for name, member in found if callable(member) or isinstance(member, property)
    ]
    return [(name, member) for name, member in documented if inspect.getdoc(member)]


def _dataclasses_below(kind: type) -> list[type]:
    """Returns the dataclasses whose fields a class has, where it adds none of its own."""
    bases = [] if "__dataclass_fields__" in vars(kind) else kind.__mro__[1:]
    return [base for base in bases if dataclasses.is_dataclass(base)]


def _inherited_attributes(kind: Any) -> str:
    bases = _dataclasses_below(kind) if inspect.isclass(kind) else []
    return "".join("\n*Attributes:*" + _prose(base).partition("*Attributes:*")[2] for base in bases)


def _prose(value: Any) -> str:
    """Returns a docstring as Markdown: each section of arguments as a list."""
    lines: list[str] = []
    inside, named = False, False
    for line in (inspect.getdoc(value) or "").splitlines():
        if line.rstrip(":") in ("Args", "Attributes", "Returns", "Raises", "Yields") and line.endswith(":"):
            lines += [f"*{line}*", ""]
            inside, named = True, line not in ("Returns:", "Yields:")
        elif named and line.startswith("    ") and not line.startswith("     ") and ":" in line:
            name, _, rest = line.strip().partition(":")
            lines.append(f"- `{name}`:{rest}" if " " not in name.strip("*") else f"- {line.strip()}")
        elif inside and line.startswith("    "):
            lines.append(f"  {line.strip()}" if named else line.strip())
        else:
            lines.append(line)
    return "\n".join(lines).rstrip() + "\n"
