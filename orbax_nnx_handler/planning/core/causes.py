"""Why a checkpoint does not become a target, and the way out, as values from which texts are made."""

import dataclasses
from collections.abc import Iterable, Mapping
from types import EllipsisType
from typing import Any, Literal, cast

from orbax_nnx_handler.planning.core.paths import Path


@dataclasses.dataclass(frozen=True)
class Hint:
    """A way out, in words and as the arguments that it proposes.

    Attributes:
        words: What to do, in a sentence or two.
        arguments: What to pass to `restore` or `plan_restore` instead of what was passed:
            `policy`, `renames`, `layout`, `item`, `unexpected`, `path`; of several ways the
            first. Empty where only a person can do it.
        needs_init: Whether `init=...`, a function that builds the target, has to be passed.
    """

    words: str = ""
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    needs_init: bool = False

    @property
    def fills(self) -> bool:
        """Whether it proposes initial values for what is missing."""
        policy: Any = self.arguments.get("policy")
        chosen = cast("Mapping[Any, Any]", policy).values() if isinstance(policy, Mapping) else (policy,)
        return "init" in chosen


Kind = Literal[
    "AnotherModel",
    "AxesMerged",
    "AxesPermuted",
    "CollectionMissing",
    "DimensionDiffers",
    "DroppedByRule",
    "Fused",
    "HeadsDivided",
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
    "OpenFactoring",
    "OptimizerNested",
    "OtherGroup",
    "OtherNames",
    "OtherOptimizer",
    "OtherOutput",
    "Quantised",
    "RandomLayout",
    "ScannedOnOneSide",
    "TiedEmbedding",
    "UnneededRule",
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


def fill_hint(filters: Iterable[Any], count: int = 0) -> Hint:
    """Returns the way out that passes a policy for what these filters select, so many leaves if known."""
    leaves = "this leaf" if count == 1 else f"these {count} leaves" if count else "these leaves"
    policy = {**dict.fromkeys(filters, "init"), ...: "error"}
    return Hint(
        f"pass policy={as_python(policy)} to initialise {leaves} and nothing else.", {"policy": policy}
    )


def as_python(value: Any) -> str:
    """Returns an argument as a program writes it: a policy, a filter, a rule, a list of rules."""
    if isinstance(value, EllipsisType):
        return "..."
    if isinstance(value, type):
        return f"nnx.{value.__name__}"
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value).items()
        return "{" + ", ".join(f"{as_python(key)}: {_quoted(choice)}" for key, choice in items) + "}"
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
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
