"""What can be wrong with a restore, why, and the way out: values from which every text is made."""

import dataclasses
import functools
import json
import operator
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from types import EllipsisType, NoneType, UnionType
from typing import Any, Literal, cast, get_args

from orbax_nnx_handler.planning.core.paths import Path, printable


@dataclasses.dataclass(frozen=True)
class Hint:
    """A way out, in words and as the arguments that it proposes.

    Attributes:
        words: What to do, in a sentence or two.
        arguments: What to pass to `restore` or `plan_restore` instead of what was passed:
            `policy`, `renames`, `layout`, `item`, `unexpected`, `path`; of several ways the
            first. Empty where only a person can do it.
        needs_init: Whether `init=...`, a function that builds the target, has to be passed.
        command: The command that helps to find the way out, on the same checkpoint and target; `more`: and
            with the same rules.
    """

    words: str = ""
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    needs_init: bool = False
    command: Literal["", "suggest", "suggest more", "tree"] = ""

    @property
    def fills(self) -> bool:
        """Whether it proposes initial values for what is missing."""
        policy: Any = self.arguments.get("policy")
        chosen = cast("Mapping[Any, Any]", policy).values() if isinstance(policy, Mapping) else (policy,)
        return "init" in chosen


Kind = Literal[
    "AnotherModel",
    "AxesMerged",
    "NamesExchanged",
    "AxesPermuted",
    "CollectionMissing",
    "CopyRenamed",
    "DimensionDiffers",
    "DroppedByRule",
    "FlatKeys",
    "Fused",
    "HeadsDivided",
    "LeadingAxis",
    "KeyImplementation",
    "LayerCount",
    "LayersAbsent",
    "LayersShifted",
    "LayoutGiven",
    "LostWeights",
    "MomentsStay",
    "NewPart",
    "NoBias",
    "NoOptimizer",
    "NoWeights",
    "OnlyACopy",
    "OpenFactoring",
    "OptimizerNested",
    "OtherCollection",
    "OtherGroup",
    "OtherNames",
    "OtherNetwork",
    "OtherOptimizer",
    "OtherOutput",
    "Quantised",
    "RandomLayout",
    "RuleOfLayers",
    "ScannedOnOneSide",
    "OwnStep",
    "SecondStep",
    "SizesOfRule",
    "NestedStacks",
    "OtherWrapper",
    "TiedEmbedding",
    "UnneededRule",
    "UnusedPart",
]
"""Every cause that the diagnosis knows; `planning.diagnosis` has the finder of each."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cause:
    """One reason why a checkpoint does not become a target, named only where there is evidence.

    Attributes:
        kind: Which cause it is.
        text: What differs, and how that shows: one sentence.
        paths: The leaves that it explains, wanted ones before stored ones.
        way: What to change or to pass, initial values left aside.
        filters: NNX filters that select the missing ones among the leaves and no other
            missing leaf; empty where initial values are no way out.
        may_be_initialised: Whether initial values are a way out for what is missing: it was
            never there, or is left behind.
        facts: What the sentence is made of, by name.
    """

    kind: Kind
    text: str
    paths: tuple[Path, ...]
    way: Hint = dataclasses.field(default_factory=Hint)
    filters: tuple[Any, ...] = ()
    may_be_initialised: bool = False
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])

    @property
    def hint(self) -> Hint:
        """The whole way out: what to change or to pass, or the policy that fills the rest."""
        if not self.filters:
            return self.way
        fill = fill_hint(self.filters)
        if not self.way.words:
            return fill
        words = f"{self.way.words.removesuffix('.')}; or {fill.words}"
        return Hint(words, self.way.arguments or fill.arguments)


def fill_hint(
    filters: Iterable[Any], count: int = 0, more: Mapping[Any, str] | None = None, *, alone: bool = True
) -> Hint:
    """Returns the way out that passes a policy for what filters select.

    Args:
        filters: The filters.
        count: How many leaves they are to initialise; 0 if that is not known.
        more: Policies of other leaves, which are kept.
        alone: Whether nothing else is filled.
    """
    leaves = "this leaf" if count == 1 else f"these {count} leaves" if count else "these leaves"
    policy = {**dict.fromkeys(filters, "init"), **(more or {}), ...: "error"}
    rest = "and nothing else" if alone else "as well as what was filled already"
    return Hint(f"pass policy={as_python(policy)} to initialise {leaves} {rest}.", {"policy": policy})


_IN_PYTHON = {
    "`orbax-nnx tree CHECKPOINT`": "jax.tree.map(jnp.shape, variables)",
    "`orbax-nnx suggest CHECKPOINT MODULE:FACTORY`": "suggest(variables, target)",
    "check the path and the target": "check it and the target",
    "look for another item or step": "look for the part of the program's state that holds the weights",
    "lists them": "shows all that is there",
}


def of_memory(hint: Hint) -> Hint:
    """Returns a hint as it is followed for a tree in memory, where no command reaches."""
    words = functools.reduce(lambda words, pair: words.replace(*pair), _IN_PYTHON.items(), hint.words)
    return dataclasses.replace(hint, words=words)


def as_python(value: Any) -> str:
    """Returns an argument as a program writes it: a policy, a filter, a rule, a list of rules."""
    if isinstance(value, EllipsisType):
        return "..."
    if isinstance(value, type):
        return f"nnx.{value.__name__}"
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value).items()
        return "{" + ", ".join(f"{as_python(key)}: {_quoted(choice)}" for key, choice in items) + "}"
    if type(value).__module__.startswith("flax.") and hasattr(value, "predicates"):
        return f"nnx.{type(value).__name__}({', '.join(map(as_python, value.predicates))})"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_python, cast("list[Any]", value))) + "]"
    return _call(value) if dataclasses.is_dataclass(value) else repr(value)


def _call(value: Any) -> str:
    """Returns the call that builds a rule or a filter: `Split('qkv', ('q', 'k', 'v'), axis=1)`."""
    is_filter = type(value).__module__.startswith("flax.")
    words: list[str] = []
    for field in dataclasses.fields(value):
        own = getattr(value, field.name)
        shown = _quoted(own) if is_filter and isinstance(own, str) else repr(own)
        if field.default is dataclasses.MISSING and field.name != "axis":
            words.append(shown)
        elif own != field.default:
            words.append(f"{field.name}={shown}")
    return f"{'nnx.' * is_filter}{type(value).__name__}({', '.join(words)})"


def _quoted(text: str) -> str:
    # JSON's escapes are Python's too; what it leaves as it is and cannot be seen follows.
    return printable(json.dumps(text, ensure_ascii=False))


class RestoreError(ValueError):
    """A checkpoint cannot become the target; nothing was read, nothing changed.

    Attributes:
        what: What is wrong, without causes and hints.
        paths: Every path the error is about, wanted paths first.
        hints: The ways out, in words and as the arguments that they propose.
        causes: Why it is wrong, as far as there is evidence.
        problems: The errors of each kind when several kinds occur at once; just
            this error otherwise.
    """

    def __init__(
        self,
        what: str,
        *,
        paths: Sequence[Path] = (),
        hints: Iterable[Hint | str] = (),
        causes: Sequence[Cause] = (),
        problems: Sequence["RestoreError"] = (),
        message: str = "",
    ):
        self.what = printable(what, keep="\n")
        self.paths = tuple(paths)
        self.hints = tuple(Hint(hint) if isinstance(hint, str) else hint for hint in hints)
        self.causes = tuple(causes)
        lines = [self.what, *(f"hint: {printable(hint.words)}" for hint in self.hints)]
        super().__init__(printable(message, keep="\n") or "\n".join(lines))
        self.problems = tuple(problems) or (self,)

    def __reduce__(self) -> tuple[Any, ...]:
        kinds = vars(type(self)).get("_kinds", (type(self),))
        return _rebuilt, (kinds, self.args), vars(self)


@functools.cache
def error_of_kinds(*kinds: type[RestoreError]) -> type[RestoreError]:
    """Returns the type of an error that is of all these kinds: the one, or a type below all of them."""
    if len(kinds) == 1:
        return kinds[0]
    return type(" + ".join(kind.__name__ for kind in kinds), kinds, {"_kinds": kinds})


def _rebuilt(kinds: tuple[type[RestoreError], ...], args: tuple[Any, ...]) -> RestoreError:
    """Makes an error of a pickle: a type of several kinds has no module to be found in."""
    kind = error_of_kinds(*kinds)
    return kind.__new__(kind, *args)


class MissingParamError(RestoreError):
    """The checkpoint lacks weights that the target wants."""


class UnexpectedParamError(RestoreError):
    """The checkpoint holds leaves that the target does not want."""


class ShapeMismatchError(RestoreError):
    """A stored leaf and the wanted leaf it maps to have different shapes."""


class DtypeMismatchError(RestoreError):
    """A stored value cannot become the wanted dtype without changing meaning."""


class KeyMismatchError(RestoreError):
    """A stored random key has another implementation or shape than the target's."""


class ShardingMismatchError(RestoreError):
    """A wanted leaf cannot be divided over its devices as its sharding says."""


class AmbiguousMappingError(RestoreError):
    """Two readings are possible; the message says which argument decides."""


class UnknownLayoutError(RestoreError):
    """`layout=` names no layout, or the checkpoint's tree is in none that this library knows."""


class UnusedRuleError(RestoreError):
    """A policy filter or a rename rule has no effect: a typo disarmed it.

    Attributes:
        rules: The rules that match no stored leaf, or whose results are no wanted ones.
        meant: What they were probably meant to be, each of them, where the hint says so.
    """

    rules: Sequence[Any] = ()
    meant: Sequence[Any] = ()


class RuleError(RestoreError):
    """A rule cannot be applied: its shapes do not come out, or its meaning would change."""


class UnmappedValueError(RestoreError):
    """A stored value has no counterpart in NNX and is not zero, so it cannot be dropped."""


class NotACheckpointError(RestoreError):
    """The path is no Orbax checkpoint; says what it is and which was probably meant."""


class UnreadableLeafError(RestoreError):
    """Stored bytes that the plan needs are absent or damaged; names leaf and file."""


class VerificationError(RestoreError):
    """Two programs cannot be compared: one of them fails, or they return different things."""


def check_kinds(rule: Any) -> None:
    """Makes each field of a rule the kind that its class declares: a tuple of what was written as a list.

    Raises:
        RuleError: Names the field, and what it takes.
    """
    for name, kind, is_optional in _fields_of(rule.__class__):
        value = getattr(rule, name)
        if type(value) is kind or (value is None and is_optional):
            continue
        words, made = _KINDS[kind]
        try:
            object.__setattr__(rule, name, made(value))
        except (TypeError, ValueError) as error:
            told = f"takes {words} as {name}, not {reprlib.repr(value)}"
            raise RuleError(f"{type(rule).__name__} {told}.") from error


@functools.cache
def _fields_of(made: type[Any]) -> Sequence[tuple[str, Any, bool]]:
    """Returns the fields of a rule, each with its kind and whether it may be None."""
    found: list[tuple[str, Any, bool]] = []
    for field in dataclasses.fields(made):
        kinds = get_args(field.type) if isinstance(field.type, UnionType) else (field.type,)
        kind = next(kind for kind in kinds if kind is not NoneType)
        found.append((field.name, kind, NoneType in kinds))
    return found


def _only(kind: type) -> Callable[[Any], Any]:
    def made(value: Any) -> Any:
        if not isinstance(value, kind):
            raise TypeError
        return value

    return made


def _several(one: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    def made(values: Any) -> tuple[Any, ...]:
        if isinstance(values, str | bytes | Mapping | Set):  # A set has no order.
            raise TypeError
        return tuple(map(one, values))

    return made


def _number(value: Any) -> float:
    if isinstance(value, str | bytes):
        raise TypeError
    return float(value)


_KINDS: Mapping[Any, tuple[str, Callable[[Any], Any]]] = {
    str: ("one string ('encoder/kernel' is a path)", _only(str)),
    bool: ("True or False", _only(bool)),
    int: ("one integer", operator.index),
    float: ("one number", _number),
    tuple[str, ...]: ("a tuple of strings", _several(_only(str))),
    tuple[int, ...]: ("a tuple of integers", _several(operator.index)),
}
"""What a field takes, in words, and what makes it of what was written."""
