"""How far the calls of two programs lie apart, and what their comparison found, as data that prints."""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console, ConsoleOptions, RenderableType
from rich.text import Text

from orbax_nnx_handler.planning.core.folding import FROM, Folded, Row, fold_paths
from orbax_nnx_handler.planning.core.lines import (
    Line,
    Sentence,
    align,
    aligned,
    as_html,
    counted,
    framed,
    joined,
)
from orbax_nnx_handler.planning.core.paths import Path, render
from orbax_nnx_handler.planning.core.recipes import Recipe, describe, reads
from orbax_nnx_handler.planning.rendering.display import line_on_console
from orbax_nnx_handler.planning.verdict.outcomes import Restored
from orbax_nnx_handler.verifying.pairing import Unit
from orbax_nnx_handler.verifying.recording import Array, Call
from orbax_nnx_handler.verifying.weights import mixed_sources

ROUNDING = 3e-6
"""What two ways of computing one module in float32 differ by, and no more, from equal inputs."""


TOLERANCE = 1e-5
"""How far apart two whole programs in float32 may be that compute the same."""


_MOST_ROUNDINGS = 5
"""How much more a whole program may differ by rounding than one module in it."""


_GROWTH = 16
"""How much a module may enlarge a difference that its inputs have already."""


_MOST_AXES = 5


MASK = 1e6
"""Values beyond it are a mask's, and say nothing about how large the others are."""
_LARGE = 1e3
"""From here on, a number that comes several times is a mask's too."""


_COARSE = {"bfloat16": 2e-2, "float16": 2e-3}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distance:
    """How far arrays lie apart.

    Attributes:
        relative: The largest difference of two elements, divided by the larger of the element and the mean
            magnitude of its array.
        absolute: The largest difference itself.
        compared: How many arrays met one of the same size.
        left: How many met none.
        coarse: What a difference may be because the arrays were computed in fewer digits; 0 for float32.
    """

    relative: float = 0.0
    absolute: float = 0.0
    compared: int = 0
    left: int = 0
    coarse: float = 0.0


def distance(reference: Array, other: Array) -> tuple[float, float]:
    """Returns the relative and the absolute difference of two arrays of one size, element by element."""
    a, b = _numbers(reference).reshape(-1), _numbers(other).reshape(-1)
    if not a.size:
        return 0.0, 0.0
    with np.errstate(all="ignore"):
        apart = np.abs(a - b)
        apart[(a == b) | (np.isnan(a) & np.isnan(b))] = 0
        if not np.isfinite(apart).all():
            return float("inf"), float("inf")
        if {reference.dtype.kind, other.dtype.kind} <= set("biu"):
            largest = float(apart.max())  # Of the words 200000 and 200001 none is nearly right.
            return largest, largest
        size = np.abs(a)
        usual = _usual(size)
        mean = float(usual.mean(dtype=np.float64)) if usual.size else 1.0
        relative = apart / np.maximum(size, max(mean, float(np.finfo(np.float32).tiny)))
        relative[apart == 0] = 0  # Where both are no number too.
    return float(relative.max()), float(apart.max())


def _usual(size: Array) -> Array:
    """Returns magnitudes without a mask's: beyond all numbers, or large and several times the same."""
    usual = size[size < MASK]
    while usual.size and (largest := usual.max()) >= _LARGE and 1 < (usual == largest).sum() < usual.size:
        usual = usual[usual < largest]
    return usual


def _numbers(array: Array) -> Array:
    if array.dtype == np.float64 or array.dtype.kind in "iu":
        return array.astype(np.float64)
    return array.astype(np.complex64 if array.dtype.kind == "c" else np.float32)


def compare(reference: Sequence[Array], others: Sequence[Array]) -> Distance:
    """Compares arrays, each with one of its size, whatever its shape: the nearest with each other."""
    pairs = [
        (*_nearest(array, other), one, at)
        for one, array in enumerate(reference)
        for at, other in enumerate(others)
        if _comparable(array, other)
    ]
    relative = absolute = coarse = 0.0
    met, taken = set[int](), set[int]()
    for apart, largest, one, at in sorted(pairs, key=lambda pair: max(ROUNDING, pair[0])):
        if one in met or at in taken:
            continue
        relative, absolute = max(relative, apart), max(absolute, largest)
        coarse = max(coarse, *(_COARSE.get(str(array.dtype), 0.0) for array in (reference[one], others[at])))
        met.add(one)
        taken.add(at)
    left = sum(array.dtype.kind != "b" for one, array in enumerate(reference) if one not in met)
    return Distance(relative=relative, absolute=absolute, compared=len(met), left=left, coarse=coarse)


def compare_inputs(reference: Sequence[Array], others: Sequence[Array]) -> Distance:
    """Compares what two modules are called with: floats alone where both have some.

    Masks and positions are a matter of taste: one side has them where the other works them out.
    """
    floats = [[array for array in arrays if array.dtype.kind not in "biu"] for arrays in (reference, others)]
    return compare(*floats) if all(floats) else compare(reference, others)


def _nearest(reference: Array, other: Array) -> tuple[float, float]:
    """Returns how far two arrays lie apart, with their axes in whichever order is nearest: NCHW is NHWC."""
    apart = distance(reference, other)
    if (
        apart[0] <= ROUNDING
        or other.shape == reference.shape
        or not 2 < other.ndim == reference.ndim <= _MOST_AXES
    ):
        return apart
    orders = itertools.permutations(range(other.ndim))
    turned = [order for order in orders if tuple(other.shape[axis] for axis in order) == reference.shape]
    return min([apart, *(distance(reference, other.transpose(order)) for order in turned)])


def _comparable(one: Array, other: Array) -> bool:
    return one.size == other.size and (one.dtype.kind in "biu") == (other.dtype.kind in "biu")


def exceeds(distance: Distance, limit: float) -> bool:
    """Tells whether a difference is more than a limit, where the arrays have the digits for it."""
    return distance.relative > max(limit, distance.coarse)


def changes_more_than_rounding(inputs: Distance, outputs: Distance, calls: int = 1) -> bool:
    """Tells whether outputs lie further apart than rounding explains.

    Args:
        inputs: How far the inputs lie apart.
        outputs: How far the outputs do.
        calls: Of how many modules, one after the other, the outputs come: each rounds.
    """
    rounding = ROUNDING * min(_MOST_ROUNDINGS, calls**0.5)
    return exceeds(outputs, max(rounding, _GROWTH * inputs.relative))


def same_numbers(reference: Sequence[Array], others: Sequence[Array]) -> bool:
    """Tells whether the arrays hold the same numbers in another order."""
    pairs = [(a, b) for a in reference for b in others if _comparable(a, b) and a.size > 1]
    return any(distance(np.sort(_flat(a)), np.sort(_flat(b)))[0] <= 10 * ROUNDING for a, b in pairs)


def _flat(array: Array) -> Array:
    return _numbers(array).reshape(-1)


def differing_settings(linen: Call, nnx: Call) -> dict[str, tuple[Any, Any]]:
    """Returns what both modules have under one name with different values: Linen's and NNX's."""
    return {
        name: (value, nnx.settings[name])
        for name, value in linen.settings.items()
        if name in nnx.settings and nnx.settings[name] != value
    }


_BEFORE, _BEHIND = 8, 3
_HTML_ROWS = 200


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModuleComparison:
    """One call of a module in both programs.

    Attributes:
        nnx: The module of the target.
        linen: The module of the checkpoint with the same weights.
        call: Which of the module's calls it is, counted from 0.
        inputs: How far apart the arrays were that it was called with.
        outputs: How far apart the arrays were that it returned.
        is_certain: Whether no other module can be meant.
        differs: Whether it returned something else, more than rounding explains, on inputs that agree.
    """

    nnx: Unit
    linen: Unit
    call: int
    inputs: Distance
    outputs: Distance
    is_certain: bool
    differs: bool

    def to_dict(self) -> dict[str, Any]:
        """Returns it as plain dicts, strings and numbers."""
        return {
            "nnx": render(self.nnx.path),
            "nnx_layer": self.nnx.layer,
            "linen": render(self.linen.path),
            "linen_layer": self.linen.layer,
            "call": self.call,
            "inputs": self.inputs.relative,
            "outputs": self.outputs.relative,
            "differs": self.differs,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstDifference:
    """The first module that gets the same and returns something else.

    Attributes:
        module: The module, in both programs, and how far its inputs and outputs are apart.
        place: Keys to the module that is named: the innermost one around where the difference arises.
        weights: The leaves in it that are compared in no module within it.
        after: The last module within it that still returns the same.
        before: The first module within it that is called with something else.
        proved: What has to be otherwise: with this change alone the module returns what Linen's does.
        changes: The recipes of that change, by wanted path; of one layer, where the module is scanned.
        tried: How many other ways of making its weights were tried.
        settings: What both modules call by one name and set to different values: Linen's and NNX's.
        reordered: Whether it returned the same numbers in another order.
    """

    module: ModuleComparison
    place: Path
    weights: tuple[Restored, ...]
    after: Unit | None = None
    before: Unit | None = None
    proved: str = ""
    changes: Mapping[Path, Recipe] = dataclasses.field(default_factory=dict[Path, Recipe])
    tried: int = 0
    settings: Mapping[str, tuple[Any, Any]] = dataclasses.field(default_factory=dict[str, tuple[Any, Any]])
    reordered: bool = False

    @property
    def path(self) -> str:
        """The path in the target of the module that is named."""
        return render(self.place)

    @property
    def sentences(self) -> list[Line]:
        """What follows from it."""
        if self.proved:
            words = f"{self.proved}. With this change alone it returns what Linen's module does."
            return [Sentence("proved by outputs", words)]
        said = list[Line]()
        if self.after is not None or self.before is not None:
            said.append(Sentence("note", self._place()))
        if self.settings:
            pairs = [f"{name} is {a!r} in Linen and {b!r} in NNX" for name, (a, b) in self.settings.items()]
            said.append(Sentence("cause", f"the modules are set up differently: {', '.join(pairs)}."))
        if self.reordered:
            said.append(Sentence("note", "it returns the same numbers in another order."))
        if self.tried:
            ways, are = ("one other way", "is") if self.tried == 1 else (f"{self.tried} other ways", "are")
            made = f"{ways} of making the weights in it (transposed, divided, joined, exchanged)"
            said.append(Sentence("note", f"{made} {are} wrong too."))
        if not self.settings:
            otherwise = _CODE if self.tried or not self.weights else _WEIGHTS
            said.append(Sentence("hint", mixed_sources(self.weights) or otherwise))
        return said

    def _place(self) -> str:
        agrees = f"{unit_name(self.after)} still returns the same" if self.after is not None else ""
        differs = f"{unit_name(self.before)} is called with something else" if self.before is not None else ""
        return f"{', and '.join(part for part in (agrees, differs) if part)}."


_CODE = (
    "if all its weights are right, the code differs: look for another epsilon, activation (gelu exact or by "
    "tanh), mask, scale, residual, dtype, dropout or base of rotary positions."
)
_WEIGHTS = "the module does not run by itself, so its weights were not tried: check how the plan makes them."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verification:
    """Whether a Linen program and an NNX program compute the same from one checkpoint.

    ```python
    found = verify(path, target, linen_model.apply, lambda model, x: model(x), (tokens,))
    print(found)  # if the outputs differ: the first module that does, and what is otherwise about its weights
    ```

    Attributes:
        equal: Whether the outputs differ by no more than the tolerance.
        relative: The largest difference of two output elements, divided by the larger of the element and the
            mean magnitude of its array.
        absolute: The largest difference itself.
        tolerance: What `relative` may be.
        directory: The item directory.
        modules: Every module that both programs called with the same weights, in the order of the run.
        first: The first module that gets the same and returns something else; None where there is none.
        remarks: What else a reader should know.
    """

    equal: bool
    relative: float
    absolute: float
    tolerance: float
    directory: str
    modules: tuple[ModuleComparison, ...]
    first: FirstDifference | None = None
    remarks: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns the whole result as plain dicts, lists, strings and numbers."""
        return {
            "equal": self.equal,
            "relative": self.relative,
            "absolute": self.absolute,
            "tolerance": self.tolerance,
            "directory": self.directory,
            "first": None if self.first is None else _first_to_dict(self.first),
            "remarks": list(self.remarks),
            "modules": [module.to_dict() for module in self.modules],
        }

    def _lines(self) -> list[Line]:
        around = [] if self.first is None else [*map(_row, self._around(self.first.module))]
        return [*self._found(), self._counted(), *align(around, indent="    ")]

    def _found(self) -> list[Line]:
        told = [] if self.first is None else _told(self.first)
        notes = (Sentence("note", remark) for remark in self.remarks)
        return [self._verdict(), f"checkpoint: {self.directory}", *told, *notes]

    def __str__(self) -> str:
        return joined(self._lines())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[RenderableType]:
        if not console.is_terminal:
            yield Text(str(self), overflow="fold")
            return
        verdict, *others = self._lines()
        yield Text(str(verdict), "bold green" if self.equal else "bold red")
        yield from (line_on_console(line, options.max_width) for line in others)

    def _repr_html_(self) -> str:
        """Every call, folded away, in the place of those around the first difference."""
        counts = self._counted().partition(";")[0].strip()
        calls = as_html(align([*map(_row, self.modules)], limit=_HTML_ROWS))
        return framed(f"{as_html(self._found())}<details><summary>{counts}</summary>{calls}</details>")

    def _verdict(self) -> Sentence:
        verdict, absolute = "equal" if self.equal else "not equal", _number(self.absolute)
        apart = f"outputs {_apart(self.relative)} apart (at most {absolute})"
        return Sentence("Verification", f"{verdict}: {apart}, tolerance {self.tolerance:g}")

    def _counted(self) -> str:
        modules = len({(module.nnx, module.linen) for module in self.modules})
        calls = f"{counted(len(self.modules), 'call')} of {counted(modules, 'module')} compared"
        alike = [module for module in self.modules if not exceeds(module.inputs, TOLERANCE)]
        outputs = [module.outputs.relative for module in alike]
        if self.first is None:
            return f"  {calls}: outputs at most {_apart(max(outputs, default=0.0))} apart"
        return f"  {calls}; around the first difference, in the order of the run:"

    def _around(self, module: ModuleComparison) -> Sequence[ModuleComparison]:
        at = self.modules.index(module)
        return self.modules[max(0, at - _BEFORE) : at + _BEHIND + 1]


def _first_to_dict(first: FirstDifference) -> dict[str, Any]:
    return {
        "path": first.path,
        **first.module.to_dict(),
        "weights": [
            {"path": render(item.wanted.path), "shape": list(item.wanted.shape), "transform": item.transform}
            for item in first.weights
        ],
        "proved": first.proved,
        "changes": [
            {"path": render(path), "stored": [*map(render, reads(recipe))], "transform": describe(recipe)}
            for path, recipe in first.changes.items()
        ],
        "tried": first.tried,
        "settings": {name: [repr(a), repr(b)] for name, (a, b) in first.settings.items()},
        "reordered": first.reordered,
    }


def _told(first: FirstDifference) -> list[Line]:
    module = first.module
    within = "" if first.place == module.nnx.path else f"{first.path} in "
    lines: list[Line] = [
        f"first difference: {within}{unit_name(module.nnx)}   <- {unit_name(module.linen)}",
        f"  inputs {_apart(module.inputs.relative)} apart, outputs {_apart(module.outputs.relative)}",
    ]
    if first.weights:
        title = "its weights" if first.before is first.after is None else "weights in it that no module shows"
        lines += [f"  {title}", *aligned(map(_weight, first.weights), limit=12, indent="    ").splitlines()]
    return [*lines, *first.sentences]


def _weight(item: Restored) -> Row:
    sources = fold_paths(list(dict.fromkeys(reads(item.recipe))))
    return Row(item.wanted.path, (str(item.wanted.shape),), sources, describe(item.recipe))


def unit_name(unit: Unit) -> str:
    """Returns a module as a person calls it: `blocks/attn, layer 3`."""
    path = render(unit.path)
    return path if unit.layer is None else f"{path}, layer {unit.layer}"


def _row(module: ModuleComparison) -> Folded:
    inputs = f"inputs {_apart(module.inputs.relative)}" if module.inputs.compared else "no inputs"
    outputs = f"outputs {_apart(module.outputs.relative)}" if module.outputs.compared else "not comparable"
    columns = (inputs, outputs, "differs" if module.differs else "", f"{FROM}{unit_name(module.linen)}")
    return Folded(text=unit_name(module.nnx), columns=columns, count=1)


def _apart(relative: float) -> str:
    return "0" if relative == 0 else f"{relative:.1e}"


def _number(value: float) -> str:
    return f"{value:.3g}"
