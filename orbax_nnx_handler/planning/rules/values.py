"""Rules on the value of one leaf: its axes, its shape, its dtype, its size."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np

from orbax_nnx_handler.planning.core import recipes
from orbax_nnx_handler.planning.core.errors import RuleError, check_kinds
from orbax_nnx_handler.planning.core.leaves import Shape, with_fields
from orbax_nnx_handler.planning.core.paths import Path, segments
from orbax_nnx_handler.planning.core.recipes import Recipe, RecipeError, first_of_each
from orbax_nnx_handler.planning.rules.entries import Entry
from orbax_nnx_handler.planning.rules.rule import (
    Applied,
    Pattern,
    Rule,
    check_pattern,
    find,
    normal_axis,
    reason_of,
    replace_each,
)


@dataclasses.dataclass(frozen=True)
class _OnLeaves(Rule):
    """A rule on each leaf that its pattern matches."""

    pattern: str

    @cached_property
    def _left(self) -> Pattern:
        return Pattern(self.pattern)

    def apply(self, entries: Sequence[Entry]) -> Applied:
        """Returns all entries after the rule."""
        return replace_each(
            self,
            self._left,
            entries,
            lambda match: [self._change(match.entry, reason_of(self, match.entry))],
        )

    def _change(self, entry: Entry, reason: str) -> Entry:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Transpose(_OnLeaves):
    """The axes of every leaf that matches are put in another order.

    ```python
    renames = [Transpose("Dense_0/kernel", (1, 0))]  # stored (out, in), wanted (in, out)
    ```

    Attributes:
        pattern: Stored segments, as in `Rename`: `"Dense_0/kernel"`.
        permutation: The stored axis that each axis comes from, as `numpy.transpose` reads it.

    Raises:
        RuleError: The pattern is empty or the axes are no permutation.
    """

    permutation: tuple[int, ...]

    def __post_init__(self) -> None:
        check_kinds(self)
        check_pattern(self, self._left)
        if sorted(self.permutation) != list(range(len(self.permutation))):
            raise RuleError(f"{self} has no permutation of the axes 0..{len(self.permutation) - 1}.")

    def inverse(self) -> Rule:
        """Returns the transpose back."""
        return Transpose(self.pattern, tuple(int(axis) for axis in np.argsort(self.permutation)))

    def _change(self, entry: Entry, reason: str) -> Entry:
        return _through(entry, reason, lambda source: recipes.Transpose(source, self.permutation))


@dataclasses.dataclass(frozen=True)
class Reshape(_OnLeaves):
    """Every leaf that matches gets another shape; its elements stay in C order.

    ```python
    renames = [Reshape("query/kernel", (512, 8, 64), before=(512, 512))]  # features into 8 heads of 64
    ```

    Attributes:
        pattern: Stored segments, as in `Rename`.
        shape: The shape to come out. One axis may be -1: what follows from the stored leaf,
            so that one rule is for models of every depth.
        before: The stored shape, one axis of which may be -1. Needed to save with the same
            rules (a save that is given the plan of the restore needs none); checked if given.

    Raises:
        RuleError: The pattern is empty, a shape has several axes that are -1, or the shapes
            hold different numbers of elements.
    """

    shape: Shape
    before: Shape | None = None

    def __post_init__(self) -> None:
        check_kinds(self)
        check_pattern(self, self._left)
        both = (self.shape, *(() if self.before is None else (self.before,)))
        if any(min(shape, default=0) < -1 or shape.count(-1) > 1 for shape in both):
            raise RuleError(f"{self} has a negative size; one axis of a shape may be -1, no more.")
        if not any(-1 in shape for shape in both) and len(set(map(math.prod, both))) > 1:
            raise RuleError(f"{self} has two shapes with different numbers of elements.")

    def inverse(self) -> Rule:
        """Returns the reshape back."""
        return super().inverse() if self.before is None else Reshape(self.pattern, self.before, self.shape)

    @property
    def _loss(self) -> str:
        return (
            "the shape before it is not known; say it with before=(...), one axis of which may be -1, "
            "or save with the plan of the restore in the place of the rules"
        )

    def _change(self, entry: Entry, reason: str) -> Entry:
        if self.before is not None and _resolved(self.before, entry.shape) != entry.shape:
            raise RecipeError(f"the shape before is {self.before} in the rule")
        shape = _resolved(self.shape, entry.shape)
        return _through(entry, reason, lambda source: recipes.Reshape(source, shape))


def _resolved(shape: Shape, before: Shape) -> Shape:
    """Returns a shape whose -1 is what is left of the elements of another, as NumPy reads it.

    Raises:
        RecipeError: The elements do not come out.
    """
    known, size = math.prod(length for length in shape if length != -1), math.prod(before)
    if -1 not in shape:
        return shape
    if not known or size % known:
        raise RecipeError(f"{before} has {size} elements, which are no multiple of {known}")
    return tuple(size // known if length == -1 else length for length in shape)


@dataclasses.dataclass(frozen=True)
class Repeat(_OnLeaves):
    """Every element along an axis of the leaves that match is there several times in a row.

    For key and value heads that a program keeps once and a model wants once for each
    query of a group, or once for each device; what `numpy.repeat` does. Refused where the
    target wants optimizer moments of such a leaf: a gradient of the one element is the sum
    over its copies. Saved with the same rule, each run is stored as the one element that it
    was: its copies must be equal still, or the save is refused, since training has made
    different weights of them.

    ```python
    renames = [Repeat("key/kernel", axis=1, count=4)]  # 8 stored heads, 32 wanted ones
    ```

    Attributes:
        pattern: Stored segments, as in `Rename`.
        axis: The axis; negative ones count from the end.
        count: How often each element is there.

    Raises:
        RuleError: The pattern is empty, or the count is less than 2.
    """

    axis: int
    count: int

    def __post_init__(self) -> None:
        check_kinds(self)
        check_pattern(self, self._left)
        if self.count < 2:
            raise RuleError(f"{self} repeats nothing: count is 2 or more.")

    def inverse(self) -> Rule:
        """Returns the rule that keeps one of each run; a save compares the others with it first."""
        return _FirstOfEach(self.pattern, self.axis, self.count)

    def _change(self, entry: Entry, reason: str) -> Entry:
        axis = normal_axis(self.axis, len(entry.shape), entry.shape)
        return _through(entry, reason, lambda source: recipes.Repeat(source, axis, self.count))


@dataclasses.dataclass(frozen=True)
class _FirstOfEach(_OnLeaves):
    """Of each run of `count` elements along an axis, the first."""

    axis: int
    count: int

    def _change(self, entry: Entry, reason: str) -> Entry:
        axis = normal_axis(self.axis, len(entry.shape), entry.shape)
        if entry.shape[axis] % self.count:
            raise RecipeError(f"axis {axis} has {entry.shape[axis]} elements, no multiple of {self.count}")
        return _through(entry, reason, lambda source: first_of_each(source, entry.shape, axis, self.count))


@dataclasses.dataclass(frozen=True)
class Scale(_OnLeaves):
    """Every element of the leaves that match is multiplied with a constant.

    Computed in float32, or in the stored dtype if that is wider, and cast last.
    Refused where the target wants optimizer moments of such a leaf: a gradient
    scales the other way, its square twice, and an optimizer may scale neither.

    ```python
    renames = [Scale("query/kernel", 8.0)]  # the stored query was divided by sqrt(64) already
    ```

    Attributes:
        pattern: Stored segments, as in `Rename`.
        factor: The constant, in the units of the stored value.

    Raises:
        RuleError: The pattern is empty, or the factor is zero or not finite.
    """

    factor: float

    def __post_init__(self) -> None:
        check_kinds(self)
        check_pattern(self, self._left)
        if not math.isfinite(self.factor) or self.factor == 0:
            raise RuleError(f"{self} has a factor that is zero or not finite.")

    def inverse(self) -> Rule:
        """Returns the division, where it gives back every value exactly."""
        exact = abs(math.frexp(self.factor)[0]) == 0.5
        return Scale(self.pattern, 1 / self.factor) if exact else super().inverse()

    @property
    def _loss(self) -> str:
        return "dividing rounds, unless the factor is a power of two"

    def _change(self, entry: Entry, reason: str) -> Entry:
        _check_inexact(entry, "be scaled")
        return _through(entry, reason, lambda source: recipes.Scale(source, self.factor))


@dataclasses.dataclass(frozen=True)
class Add(_OnLeaves):
    """A constant is added to every element of the leaves that match.

    For a norm that multiplies with `1 + scale` on one side and with `scale` on the
    other: `Add("norm/scale", 1.0)`. Computed in float32 or wider and rounded last.
    Moments follow as they are: a gradient does not change with a constant; copies of
    the parameters that an optimizer keeps (`z` of `optax.contrib.schedule_free`) get
    the constant as well. Saved with the same rule, the constant is subtracted, which
    rounds values that are much smaller than it.

    ```python
    renames = [Add("norm/scale", 1.0)]
    ```

    Attributes:
        pattern: Stored segments, as in `Rename`.
        constant: The constant, in the units of the stored value.

    Raises:
        RuleError: The pattern is empty, or the constant is not finite.
    """

    constant: float

    def __post_init__(self) -> None:
        check_kinds(self)
        check_pattern(self, self._left)
        if not math.isfinite(self.constant):
            raise RuleError(f"{self} has a constant that is not finite.")

    def inverse(self) -> Rule:
        """Returns the subtraction."""
        return Add(self.pattern, -self.constant)

    def _change(self, entry: Entry, reason: str) -> Entry:
        _check_inexact(entry, "be added to")
        return _through(entry, reason, lambda source: recipes.Add(source, self.constant))


def _check_inexact(entry: Entry, what: str) -> None:
    dtype = entry.cast or entry.dtype
    if dtype is not None and not jnp.issubdtype(dtype, jnp.inexact):
        raise RecipeError(f"values of dtype {dtype} cannot {what}; cast them first")


@dataclasses.dataclass(frozen=True)
class Cast(_OnLeaves):
    """The leaves that match become another kind of number, as `numpy.astype` casts.

    Needed only where the restore would refuse: integers to floats, floats to
    integers (fractions are cut off), complex numbers to their real part. The target
    must want this dtype. Done after all arithmetic; a value out of its range is an error.

    ```python
    renames = [Cast("mask", "float32")]  # stored as integers
    ```

    Attributes:
        pattern: Stored segments, as in `Rename`.
        dtype: The name of the dtype (`"bfloat16"`); a dtype is taken by its name.

    Raises:
        RuleError: The pattern is empty or there is no such dtype.
    """

    dtype: str

    def __post_init__(self) -> None:
        try:
            named = _dtype_of(self.dtype)
        except TypeError as error:
            raise RuleError(f"Cast({self.pattern!r}, {self.dtype!r}) names no dtype: {error}") from error
        object.__setattr__(self, "dtype", named)
        check_kinds(self)
        check_pattern(self, self._left)

    @property
    def _loss(self) -> str:
        return "the dtype before it is not known"

    def _change(self, entry: Entry, reason: str) -> Entry:
        if entry.dtype is None:
            raise RecipeError("it is not an array")
        return dataclasses.replace(entry, cast=np.dtype(jnp.dtype(self.dtype)), reason=reason)


@dataclasses.dataclass(frozen=True)
class Drop(_OnLeaves):
    """The leaves that match, and their moments, are left behind on purpose.

    ```python
    renames = [Drop("pretraining_head", "the new task has a head of its own")]
    ```

    Attributes:
        pattern: Stored segments, as in `Rename`.
        reason: Why, for reports.

    Raises:
        RuleError: The pattern or the reason is empty.
    """

    reason: str

    def __post_init__(self) -> None:
        check_kinds(self)
        check_pattern(self, self._left)
        if not self.reason.strip():
            raise RuleError(f"{self} gives no reason.")

    def is_for(self, path: Path) -> bool:
        """Tells whether it leaves a stored leaf behind, whatever the rules before it do."""
        return next(self._left.spans(segments(path)), None) is not None

    def apply(self, entries: Sequence[Entry]) -> Applied:
        """Returns the entries that are left."""
        matches = find(self._left, entries, weights_only=False)
        after = [entry for at, entry in enumerate(entries) if at not in matches]
        gone = [path for match in matches.values() for path in match.entry.sources]
        return Applied(entries=after, matched=len(matches), discarded=gone)

    @property
    def _loss(self) -> str:
        return "the values that it drops are gone"


def _through(entry: Entry, reason: str, step: Callable[[Recipe], Recipe]) -> Entry:
    """Returns the entry with one more step, its shape checked."""
    here: Path = ("(before)",)
    shape = recipes.shape_of(step(recipes.Read(here)), {here: entry.shape})
    return with_fields(entry, recipe=step(entry.recipe), shape=shape, reason=reason)


def _dtype_of(dtype: Any) -> str:
    if dtype is None:
        raise TypeError("None is float64 to NumPy alone.")
    return jnp.dtype(dtype).name


_KINDS: Mapping[type, str] = {
    recipes.Transpose: "transpose",
    recipes.Reshape: "reshape",
    recipes.Repeat: "repeat",
    recipes.Add: "add",
}


def steps_in(recipe: recipes.Recipe) -> tuple[str, ...]:
    """Returns what a recipe does with the shape of one of the leaves that it reads, in order."""
    if isinstance(recipe, recipes.Read):
        return ()
    return (
        *steps_in(recipes.children(recipe)[0]),
        *([_KINDS[type(recipe)]] if type(recipe) in _KINDS else ()),
    )
