"""Both programs, run on one input from one checkpoint, and every call of paired modules compared."""

import dataclasses
import functools
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from orbax_nnx_handler.planning.core.folding import fold_paths
from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.paths import Path, render, shared_levels
from orbax_nnx_handler.planning.core.recipes import Recipe, reads, shape_of
from orbax_nnx_handler.planning.suggesting.proved_recipes import orders_of_features
from orbax_nnx_handler.verifying import (
    ROUNDING,
    TOLERANCE,
    Array,
    Distance,
    Programs,
    agree,
    are_the_same,
    begin_alike,
    changes_more_than_rounding,
    distance,
    fewer,
    in_digits,
    is_float,
    rounding_of,
    same_numbers,
    without_counterpart,
)
from orbax_nnx_handler.verifying.pairing import (
    ModulePair,
    Use,
    by_path,
    call_by_call,
    calls_in,
    compare_outputs,
    uses_of,
)
from orbax_nnx_handler.verifying.recording import Call
from orbax_nnx_handler.verifying.single_module import Alternative, ModuleRunner
from orbax_nnx_handler.verifying.verification import (
    ModuleComparison,
    differing_settings,
    is_called_alone,
)
from orbax_nnx_handler.verifying.weights import LinenRun, whole_modules


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compared:
    """One call of a module in both programs.

    Attributes:
        found: How far apart they are.
        pair: The modules.
        linen: Linen's call.
        nnx: The target's.
        calls: How many calls of modules it is made of, itself among them.
    """

    found: ModuleComparison
    pair: ModulePair
    linen: Use
    nnx: Use
    calls: int = 1

    @property
    def path(self) -> Path:
        """Keys to the module in the target."""
        return self.pair.nnx.path

    @property
    def gets_the_same(self) -> bool:
        """Whether the inputs agree."""
        return agree(self.found.inputs)

    @property
    def agrees(self) -> bool:
        """Whether inputs and outputs agree."""
        return self.gets_the_same and bool(self.found.outputs.compared) and not self.found.differs

    @functools.cached_property
    def is_reordered_before(self) -> bool:
        """Whether it is called with the same numbers as Linen's module in another order."""
        return same_numbers(self.linen.inputs, self.nnx.inputs)

    @functools.cached_property
    def is_reordered(self) -> bool:
        """Whether it returns the same numbers as Linen's module in another order."""
        return same_numbers(self.linen.outputs, self.nnx.outputs)

    def order_of_features(self) -> tuple[Shape, tuple[int, ...]] | None:
        """Returns how the last axis of the input is divided in Linen, and where each part lies in the target.

        Features of several axes that were made one (rows, columns and channels of an image) come in an
        order of each program's own. None where that is not all that is otherwise.
        """
        pairs = [
            (a, b) for a, b in zip(self.linen.inputs, self.nnx.inputs, strict=False) if a.dtype.kind == "f"
        ]
        if not self.is_reordered_before or len(pairs) != 1 or pairs[0][0].shape != pairs[0][1].shape:
            return None
        one, other = (array.reshape(-1, *array.shape[-1:]) for array in pairs[0])
        found, places = dict[bytes, tuple[Shape, tuple[int, ...]]](), np.arange(one.shape[-1], dtype=np.int64)
        for lengths, order in orders_of_features(one.shape[-1]):
            turned = places.reshape(lengths).transpose(order).reshape(-1)
            if all(distance(one[:rows, turned], other[:rows])[0] <= TOLERANCE for rows in (1, len(one))):
                found.setdefault(turned.tobytes(), (lengths, order))
        return next(iter(found.values())) if len(found) == 1 else None  # Many zeros fit any order.

    @property
    def unlike(self) -> tuple[str, ...]:
        """Inputs of the one call that the other one has nothing like, in words."""
        pair = self.nnx.inputs, self.linen.inputs
        ours = [f"NNX's {array}" for array in without_counterpart(*pair)]
        return (*ours, *(f"Linen's {array}" for array in without_counterpart(*reversed(pair))))

    def has_another_constant(self, *, whatever: bool) -> bool:
        """Tells whether it has another epsilon, or whatever number, and another output, be it by rounding."""
        apart = self.gets_the_same and self.found.outputs.relative > 0
        settings = differing_settings(self.linen.call, self.nnx.call) if apart else {}
        numbers = [name for name, (value, _) in settings.items() if isinstance(value, float)]
        return any(whatever or name.startswith("eps") for name in numbers)

    def encloses(self, inner: "Compared") -> bool:
        """Tells whether the module holds another: of the same layer, where both are scanned."""
        if self.path == inner.path or inner.path[: len(self.path)] != self.path:
            return False
        return self.pair.nnx.layer in (None, inner.pair.nnx.layer)


def called_alike(one: Compared, compared: Sequence[Compared]) -> Iterator[Compared]:
    """Yields other modules whose Linen counterpart is called with what a module is called with.

    Modules that are called with what their own counterpart is are right where they are, as q is for k.
    """
    sizes = [array.size for array in one.nnx.outputs]
    for other in compared:
        is_right = (other.gets_the_same and not other.found.differs) or other.pair.linen == one.pair.linen
        if is_right or [array.size for array in other.linen.outputs] != sizes:
            continue
        wanted, found = other.linen.inputs, one.nnx.inputs
        if begin_alike(wanted, found) and are_the_same(wanted, found):
            yield other


def compare_modules(
    pairs: Iterable[ModulePair], linen_calls: Iterable[Call], nnx_calls: Iterable[Call]
) -> list[Compared]:
    """Compares every call of paired modules, in the order in which the NNX program returned from them."""
    linen, nnx = by_path(linen_calls), by_path(nnx_calls)
    made_of, compared = calls_in(nnx), list[Compared]()
    for pair in pairs:
        ours = uses_of(pair.nnx, nnx, _sizes(linen.get(pair.linen.path, ())))
        theirs = uses_of(pair.linen, linen, _sizes(nnx.get(pair.nnx.path, ())))
        calls = made_of.get(pair.nnx.path, 1)
        compared += [_compared(pair, calls, *found) for found in call_by_call(theirs, ours)]
    made = list[Compared]()
    for one in sorted(compared, key=lambda one: one.nnx.call.order):
        made.append(_by_what_is_within(one, made))
    return made


def _by_what_is_within(one: Compared, before: Sequence[Compared]) -> Compared:
    """Returns a call whose own inputs are arranged so that none can be compared with its first part's."""
    if one.found.inputs.compared or not one.found.inputs.left or not one.path:
        return one
    calls = itertools.takewhile(lambda other: other.pair.nnx != one.pair.nnx, reversed(before))
    parts = [other for other in calls if one.path in other.nnx.call.within and one.encloses(other)]
    inputs = parts[-1].found.inputs if parts else one.found.inputs
    differs = _differs(inputs, one.found.outputs, one.calls)
    return dataclasses.replace(one, found=dataclasses.replace(one.found, inputs=inputs, differs=differs))


def _sizes(calls: Sequence[Call]) -> set[int]:
    return {array.size for call in calls[:1] for array in call.inputs}


def _compared(pair: ModulePair, calls: int, number: int, linen: Use, nnx: Use, inputs: Distance) -> Compared:
    outputs = compare_outputs(linen, nnx)
    found = ModuleComparison(
        nnx=pair.nnx,
        linen=pair.linen,
        call=number,
        inputs=inputs,
        outputs=outputs,
        is_certain=pair.is_certain,
        differs=_differs(inputs, outputs, calls),
    )
    return Compared(found=found, pair=pair, linen=linen, nnx=nnx, calls=calls)


def _differs(inputs: Distance, outputs: Distance, calls: int) -> bool:
    if not outputs.compared or not agree(inputs):
        return False
    return changes_more_than_rounding(inputs, outputs, calls)


def weights_of(
    runner: ModuleRunner, source: Compared, onto: Compared, layer: int | None
) -> dict[Path, Recipe]:
    """Returns the recipes of one module with the weights of another; empty if they do not fit."""
    names = {leaf[len(onto.path) :] for leaf in onto.pair.leaves}
    if {leaf[len(source.path) :] for leaf in source.pair.leaves} != names:
        return {}
    theirs = runner.layer_at(source.path, source.nnx.call)
    made = {(*onto.path, *name): runner.recipe((*source.path, *name), theirs) for name in names}
    both = ((recipe, runner.recipe(leaf, layer)) for leaf, recipe in made.items())
    return made if all(len({shape_of(x, runner.shapes) for x in pair}) == 1 for pair in both) else {}


def is_padding(one: Compared, inside: Sequence[Compared]) -> bool:
    """Tells whether a step of a cell counts for nothing: others agree, and so does what is called later."""
    agreeing = [other for other in inside if other.agrees]
    later = (other for other in agreeing if other.nnx.call.order > one.nnx.call.order)
    return any(other.path == one.path for other in agreeing) and any(o.path != one.path for o in later)


def returned_by(
    runner: ModuleRunner, one: Compared, after: Compared, before: Compared | None
) -> tuple[Path, str]:
    """Returns the module around a call that returns what is otherwise than Linen's behind it.

    Where Linen writes its blocks inline, no module of its tells what a block returns: the next one is called
    with it. Of several modules that return it, it is the one whose residual is all that is otherwise, or the
    innermost.

    Args:
        runner: Knows every call.
        one: The module in which something is otherwise.
        after: The last call in it that is as Linen's.
        before: The first one that is called with something else; without it, what the module returns is.

    Returns:
        Where it lies, and which program alone adds what it is called with, in words; nothing where none does.
    """
    ours, theirs = one.nnx.outputs, one.linen.outputs
    if before is not None:
        ours, theirs = before.nnx.inputs, before.linen.inputs
    others = [array for array in ours if is_float(array) and not are_the_same([array], theirs)]
    around = list[Call]()
    for path in reversed(after.nnx.call.within if others else ()):
        call = next(call for call in runner.calls[path] if call.order > after.nnx.call.order)
        around += [call] if all(are_the_same([array], call.outputs) for array in others) else []
    if not around:
        return (), ""
    end = around[0].order
    earlier = [call for calls in runner.calls.values() for call in calls if call.order < end]
    for call in (*around, *sorted(earlier, key=lambda call: -call.order)):
        if name := _adding(others, theirs, call.inputs):
            place = call.path if call.order >= end else shared_levels([call.path, after.path])
            within = (path for path in after.nnx.call.within if len(path) <= len(place))
            return [*within][-1], f"{name} adds what {render(call.path)} is called with as a residual"
    return around[0].path, ""


def _adding(ours: Sequence[Array], theirs: Sequence[Array], added: Sequence[Array]) -> str:
    """Returns which program alone adds an array to what it returns; nothing where none does."""
    pairs = [(a.reshape(-1), b.reshape(-1)) for a in ours for b in theirs if is_float(b) and a.size == b.size]
    for (one, other), array in itertools.product(pairs, filter(is_float, added)):
        flat = array.reshape(-1)
        for name, both in (("Linen", (one, other)), ("NNX", (other, one))) if flat.size == one.size else ():
            if begin_alike([both[1]], [both[0] + flat]) and are_the_same([both[1]], [both[0] + flat]):
                return name
    return ""


def narrowed(
    runner: ModuleRunner, linen: Sequence[Call], one: Compared, place: Path, before: Compared
) -> Path:
    """Returns the innermost module around a call whose own inputs are numbers that Linen has too.

    Where Linen has modules around its call as well, they are what one of these is called with.

    Args:
        runner: Knows every call.
        linen: All calls of the Linen program.
        one: The module in which something is otherwise.
        place: Around what is known already to lie in it.
        before: The first call that gets something else.
    """
    around = {*before.linen.call.within} - {*one.linen.call.within, one.linen.call.path}
    known = [call for call in linen if call.path in around] or linen
    for depth in range(len(before.path) - 1, len(place), -1):
        calls = runner.calls.get(before.path[:depth], ())
        inputs = next((call.inputs for call in calls if call.order > before.nnx.call.order), ())
        if any(are_the_same(inputs, [*call.inputs, *call.outputs]) for call in known):
            return before.path[:depth]
    return place


_MOST_SIBLINGS = 4


def exchanges(runner: ModuleRunner, inside: Sequence[Compared], layer: int | None) -> Iterator[Alternative]:
    """Yields every exchange of the weights of two modules within one, siblings first, then of three or four.

    Modules that get what their counterparts do are right where they are, but for those called with the same.

    Args:
        runner: Knows the recipes.
        inside: The modules within it.
        layer: The layer of the module that holds them, where it is scanned.
    """
    unique = list({one.path: one for one in inside}.values())
    made = {
        one.path: {leaf[len(one.path) :]: runner.recipe(leaf, layer) for leaf in one.pair.leaves}
        for one in unique
    }
    shapes = {
        path: {name: shape_of(recipe, runner.shapes) for name, recipe in recipes.items()}
        for path, recipes in made.items()
    }
    siblings: dict[object, list[Path]] = defaultdict(list)
    for path, held in shapes.items():
        siblings[path[:-1], frozenset(held.items())].append(path)
    groups = [
        [one.path, other.path]
        for one, other in itertools.combinations(unique, 2)
        if shapes[one.path] == shapes[other.path]
        and not (one.encloses(other) or other.encloses(one))
        and not (one.agrees and other.agrees and not are_the_same(one.nnx.inputs, other.nnx.inputs))
    ]
    groups.sort(key=lambda pair: pair[0][:-1] != pair[1][:-1])
    groups += [group for group in siblings.values() if 2 < len(group) <= _MOST_SIBLINGS]
    for group in groups:
        for order in itertools.permutations(group):
            moved = [(one, other) for one, other in zip(group, order, strict=True) if one != other]
            if len(moved) > 2 or len(moved) == len(group):
                ones, others = ([render(pair[at]) for pair in moved] for at in (0, 1))
                words = f"{', '.join(ones)} have the weights of {', '.join(others)}"
                words = f"{' and '.join(ones)} have each other's weights" if len(group) == 2 else words
                pairs = ((one, name, recipe) for one, other in moved for name, recipe in made[other].items())
                yield Alternative(words=words, recipes={(*one, *name): recipe for one, name, recipe in pairs})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runs:
    """One run of each program.

    Attributes:
        outputs: How far apart each output is.
        compared: Every call of paired modules, in the order of the run.
        runner: Runs modules of the restored model by themselves.
        programs: Both programs.
        returned: What the NNX program returned.
        pairs: The modules that hold the same stored elements.
        hidden: Leaves that no call of a module shows.
        linen: What the Linen program did.
        digits: Where one of them computes in fewer digits than float32's.
    """

    outputs: Sequence[Distance]
    compared: Sequence[Compared]
    runner: ModuleRunner
    programs: Programs
    returned: Any
    pairs: Sequence[ModulePair]
    hidden: Sequence[Path]
    linen: LinenRun
    digits: "Digits"

    @property
    def inputs(self) -> Sequence[Any]:
        """What both were called with."""
        return self.programs.inputs

    @property
    def calling_others(self) -> str:
        """Which modules each program calls that the other one does not, where they hold the same leaves."""
        location, linen = self.linen.weights.location, {call.path for call in self.linen.calls}
        ours, theirs = set[Path](), set[Path]()
        for leaf, recipe in self.runner.recipes.items():
            is_called = leaf[:-1] in self.runner.calls
            if any(location[source][:-1] in linen for source in reads(recipe)) != is_called:
                (ours if is_called else theirs).add(leaf)
        pair = [whole_modules(some, self.runner.recipes) for some in (ours, theirs)]
        one, other = (
            {leaf[len(at) :] for at in each for leaf in (ours | theirs) if leaf[: len(at)] == at}
            for each in pair
        )
        if not any(one) or one != other:
            return ""
        mine, idle = map(fold_paths, pair)
        return (
            f"nnx_apply runs {mine}, whose weights linen_apply does not call, and linen_apply those of "
            f"{idle}, which nnx_apply does not run: let both run the same."
        )

    @property
    def shown(self) -> set[Path]:
        """The modules that return what Linen's do, which alone are called with that."""
        linen = self.linen.calls
        other = {one.path for one in self.compared if not one.agrees}
        alike = [one for one in self.compared if one.path not in other]
        others = {one.path for one in alike if not is_called_alone(one.linen, linen)}
        return {one.path for one in alike} - others


@dataclasses.dataclass(frozen=True, kw_only=True)
class Digits:
    """In how many digits two programs compute.

    Attributes:
        linen: The first call of the Linen program that returns fewer digits than float32's.
        nnx: The NNX program's.
        dtype: The dtype by whose digits all is compared, where the two do not round alike.
    """

    linen: Call | None
    nnx: Call | None
    dtype: str = ""

    @classmethod
    def of(cls, linen: Sequence[Call], nnx: Sequence[Call], compared: Sequence[Compared]) -> "Digits":
        """Returns in how many digits two programs compute, by what their modules return."""
        first = [next((call for call in calls if fewer(call.outputs)), None) for calls in (linen, nnx)]
        names = [fewer(call.outputs if call else ()) for call in first]
        pairs = [names, *([fewer(one.linen.outputs), fewer(one.nnx.outputs)] for one in compared)]
        found = [(one.found.inputs.relative, one.found.outputs) for one in compared]
        is_apart = any(one != other for one, other in pairs)
        is_apart = is_apart or any(before <= ROUNDING < one.relative <= one.coarse for before, one in found)
        return cls(linen=first[0], nnx=first[1], dtype=max(names, key=rounding_of) if is_apart else "")

    @property
    def are_fewer(self) -> bool:
        """Whether one of them computes in fewer digits than float32's."""
        return self.linen is not None or self.nnx is not None

    @property
    def coarse(self) -> float:
        """What modules of the two may be apart by rounding; 0 where they round alike."""
        return rounding_of(self.dtype)

    def given(self, call: Call) -> Call:
        """Returns a call of the Linen program with arrays that are compared by these digits.

        What it does before its own first call in fewer digits stays as it is.
        """
        if self.linen is not None and call.order < self.linen.order:
            return call
        both = ([in_digits(array, self.dtype) for array in x] for x in (call.inputs, call.outputs))
        return dataclasses.replace(call, **dict(zip(("inputs", "outputs"), both, strict=True)))
