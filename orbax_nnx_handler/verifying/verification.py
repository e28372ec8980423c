"""How far the calls of two programs lie apart, and what their comparison found, as data that prints."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
from rich.console import Console, ConsoleOptions, RenderableType
from rich.text import Text

from orbax_nnx_handler.planning.core.errors import VerificationError
from orbax_nnx_handler.planning.core.folding import FROM, Folded, Row, fold_paths
from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.lines import (
    Line,
    Sentence,
    align,
    aligned,
    as_html,
    counted,
    framed,
    joined,
    listed,
)
from orbax_nnx_handler.planning.core.paths import Path, render
from orbax_nnx_handler.planning.core.recipes import Recipe, describe, reads
from orbax_nnx_handler.planning.rendering import line_on_console
from orbax_nnx_handler.planning.verdict.outcomes import Restored
from orbax_nnx_handler.verifying import (
    TOLERANCE,
    Distance,
    are_the_same,
    compare,
    exceeds,
    mixed_sources,
    opened_up,
)
from orbax_nnx_handler.verifying.pairing import Unit, Use
from orbax_nnx_handler.verifying.recording import Call


def outputs_apart(expected: Any, found: Any) -> list[Distance]:
    """Compares what both programs return.

    Raises:
        VerificationError: It is no arrays, of different structure or shapes, or holds no finite number.
    """
    expected, found = opened_up(expected), opened_up(found)
    one, other = _structure(expected), _structure(found)
    if one != other:
        raise VerificationError(
            f"the programs return different things:\n  linen_apply  {one}\n  nnx_apply    {other}",
            hints=[_first_alone(expected, found) or _SAME],
        )
    pairs = list(zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True))
    shapes = [(np.shape(a), np.shape(b)) for a, b in pairs]
    if not pairs or any(a != b for a, b in shapes):
        rows = "\n".join(f"  linen_apply  {a}\n  nnx_apply    {b}" for a, b in shapes if a != b)
        raise VerificationError(
            f"the programs return arrays of different shapes:\n{rows}"
            if pairs
            else "the programs return no array.",
            hints=["let both functions return arrays that mean the same."],
        )
    if not any(np.isfinite(np.asarray(a, np.complex128)).any() for a, _ in pairs):
        raise VerificationError(
            "linen_apply returns no finite number, which says nothing about the weights.",
            hints=["choose inputs from which the Linen program computes finite numbers."],
        )
    return [compare([np.asarray(a)], [np.asarray(b)]) for a, b in pairs]


_structure = cast(Any, jax.tree).structure
_SAME = "let both functions return the same: an array, or the same arrays in one structure."


def _first_alone(expected: Any, found: Any) -> str:
    """Returns the way out where one program returns more than the other: logits and what else it computes."""
    for name, more, less in (("linen_apply", expected, found), ("nnx_apply", found, expected)):
        if isinstance(more, tuple) and more and _structure(more[0]) == _structure(less):
            return f"let {name} return the first of its {len(cast(Any, more))} parts alone, [0]."
    return ""


def is_called_alone(one: Use, calls: Sequence[Call]) -> bool:
    """Tells whether Linen calls no other module that holds the same shapes with what it calls one with.

    Otherwise outputs do not tell which of them it is: of two, each is right there by itself.
    """
    path = one.call.path
    apart = (call for call in calls if any(a != b for a, b in zip(path, call.path, strict=False)))
    alike = {call.path for call in apart if are_the_same(one.inputs, call.inputs)}
    return all(_held(other, calls) != _held(path, calls) for other in alike)


def _held(module: Path, calls: Iterable[Call]) -> list[Shape]:
    """Returns the shapes of all variables in a module."""
    within = {call.path: call.shapes for call in calls if call.path[: len(module)] == module}
    return sorted(shape for shapes in within.values() for shape in shapes.values())


def differing_settings(linen: Call, nnx: Call) -> dict[str, tuple[Any, Any]]:
    """Returns what both modules have under one name with different values: Linen's and NNX's."""
    ours = nnx.settings
    return {name: (x, ours[name]) for name, x in linen.settings.items() if name in ours and ours[name] != x}


_BEFORE, _BEHIND, _HTML_ROWS = 8, 3, 200


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
        is_partial: Whether something in it is in no module that was compared.
        rest: Modules around the last one that returns the same whose own outputs nothing of Linen's shows.
        after: The last module within it that still returns the same.
        before: The first module within it that is called with something else.
        is_reordered_before: Whether that are the same numbers in another order.
        proved: What has to be otherwise: with this change alone the module returns what Linen's does.
        until: The module within it that is called with what Linen's is then, where that is what shows it.
        changes: The recipes of that change, by wanted path; of one layer, where the module is scanned.
        elsewhere: Those of modules like it in which the same is wrong, each shown by a run of its own.
        also: Which these are, in words.
        layer: Which layer that is.
        tried: How many other ways of making its weights were tried.
        is_cut: Whether there are more, which would take several times as long as both programs do.
        settings: What both modules call by one name and set to different values: Linen's and NNX's.
        reordered: Whether it returned the same numbers in another order.
        cast: Which program alone computes something in fewer digits, in words.
        unlike: Inputs of the one module that the other one is called with nothing like, in words.
        residual: Which program alone adds what a module is called with to what it returns, in words.
    """

    module: ModuleComparison
    place: Path
    weights: tuple[Restored, ...]
    is_partial: bool = False
    rest: tuple[Path, ...] = ()
    after: Unit | None = None
    before: Unit | None = None
    is_reordered_before: bool = False
    proved: str = ""
    until: Unit | None = None
    changes: Mapping[Path, Recipe] = dataclasses.field(default_factory=dict[Path, Recipe])
    elsewhere: Mapping[Path, Recipe] = dataclasses.field(default_factory=dict[Path, Recipe])
    also: str = ""
    layer: int | None = None
    tried: int = 0
    is_cut: bool = False
    settings: Mapping[str, tuple[Any, Any]] = dataclasses.field(default_factory=dict[str, tuple[Any, Any]])
    reordered: bool = False
    cast: str = ""
    unlike: tuple[str, ...] = ()
    residual: str = ""

    @property
    def path(self) -> str:
        """The path in the target of the module that is named."""
        return render(self.place)

    @property
    def sentences(self) -> list[Line]:
        """What follows from it."""
        if self.proved:
            it, does = (
                (f"{unit_name(self.until)} is called with", "is") if self.until else ("it returns", "does")
            )
            words = f"{self.proved}. With this change alone {it} what Linen's module {does}.{self.also}"
            return [Sentence("proved by outputs", words)]
        said = list[Line]()
        if self.after is not None or self.before is not None:
            said.append(Sentence("note", self._place()))
        if not self.place:
            rest = f"the rest of {' or of '.join(map(render, self.rest))}" if self.rest else "another part"
            is_other = self.is_partial or self.rest
            parts = ("that are compared", f"{rest}, or ") if is_other else ("in it", "")
            far = "as far as was tried, " if self.is_cut else ""
            said.append(Sentence("note", far + _BETWEEN.format(*parts)))
        if self.settings:
            pairs = [f"{name} is {a!r} in Linen and {b!r} in NNX" for name, (a, b) in self.settings.items()]
            said.append(Sentence("cause", f"the modules are set up differently: {', '.join(pairs)}."))
        for code in filter(None, (self.cast, self.residual)):
            said.append(Sentence("cause", f"the code differs: {code}, and the other program does not."))
        if self.unlike and not self.settings:
            more = f"{listed(self.unlike)} {'has' if len(self.unlike) == 1 else 'have'} no counterpart"
            said.append(Sentence("note", f"of the inputs {more}: the difference may come in with that."))
        if self.reordered:
            said.append(Sentence("note", "it returns the same numbers in another order."))
        if self.tried:
            ways, are = ("one other way", "is") if self.tried == 1 else (f"{self.tried} other ways", "are")
            made = f"{ways} of making the weights in it (transposed, divided, joined, exchanged)"
            said.append(Sentence("note", f"{made} {are} wrong too{_CUT if self.is_cut else ''}."))
        if not (self.settings or self.cast or self.residual):
            otherwise = _CODE if self.tried or not self.weights else _WEIGHTS
            said.append(Sentence("hint", mixed_sources(self.weights) or otherwise))
        return said

    def made_otherwise(self, restored: Mapping[Path, Restored]) -> Mapping[Path, Recipe]:
        """Returns the recipes of the change, with those of leaves whose weights it takes elsewhere.

        Such a leaf gets those of the one that takes its own: two modules were exchanged.
        """
        made = {**self.changes, **self.elsewhere}
        takers = {recipe: path for path, recipe in made.items()} if self.layer is None else {}
        for leaf, item in restored.items():
            taker = takers.get(item.recipe)
            if taker and leaf not in made and item.wanted.shape == restored[taker].wanted.shape:
                made[leaf] = restored[taker].recipe
        return made

    def _place(self) -> str:
        same = "the same, but for rounding" if self.module.outputs.coarse else "the same"
        agrees = f"{unit_name(self.after)} still returns {same}" if self.after is not None else ""
        called = CALLED_IN_ANOTHER_ORDER if self.is_reordered_before else "is called with something else"
        differs = f"{unit_name(self.before)} {called}" if self.before is not None else ""
        return f"{', and '.join(part for part in (agrees, differs) if part)}."


_CUT = ". There are more, which were not tried: they would take longer than both programs did"
CALLED_IN_ANOTHER_ORDER = "is called with the same numbers as Linen's in another order"
_CODE = (
    "if all its weights are right, the code differs: look for another epsilon, activation (gelu exact or by "
    "tanh), mask, scale, residual, dtype, dropout or base of rotary positions."
)
_BETWEEN = (
    "it is none of the modules {}, but {}what is computed between them: in the model's own __call__, where "
    "a head tied to an embedding is one, or in linen_apply or nnx_apply."
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
        equal: Whether the outputs differ by no more than the tolerance, and no module is proved to have
            other weights than Linen's: outputs may hardly depend on them.
        relative: The largest difference of two output elements, divided by the larger of the element and the
            mean magnitude of its array.
        absolute: The largest difference itself.
        tolerance: What `relative` may be.
        directory: The item directory.
        modules: Every module that both programs called with the same weights, in the order of the run.
        first: The first module that gets the same and returns something else; None where there is none.
        remarks: What else a reader should know.
        without_effect: Weights on which the outputs do not depend, whatever they are, in words.
        unused: What is stored that the model is filled from, and that the Linen program does not use.
    """

    equal: bool
    relative: float
    absolute: float
    tolerance: float
    directory: str
    modules: tuple[ModuleComparison, ...]
    first: FirstDifference | None = None
    remarks: tuple[str, ...] = ()
    without_effect: tuple[str, ...] = ()
    unused: tuple[Path, ...] = ()

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
            "without_effect": list(self.without_effect),
            "unused": [*map(render, self.unused)],
            "modules": [module.to_dict() for module in self.modules],
        }

    def _lines(self) -> list[Line]:
        around = [] if self.first is None else [*map(_row, self._around(self.first.module))]
        return [*self._found(), self._counted(), *align(around, indent="    ")]

    def _found(self) -> list[Line]:
        told = [] if self.first is None else _told(self.first)
        notes = [Sentence("note", remark) for remark in (*self.remarks, *self.without_effect)]
        is_between = self.first is not None and not (self.first.place or self.first.proved)
        # Where no module is to blame, what a reader should know comes first: one that is called more often.
        is_first = is_between or self.unused or any(one.outputs.coarse for one in self.modules)
        found = [*notes, *told] if is_first else [*told, *notes]
        return [self._verdict(), f"checkpoint: {self.directory}", *found]

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
        equal = "equal, as far as these outputs tell" if self.remarks else "equal"
        verdict, absolute = equal if self.equal else "not equal", f"{self.absolute:.3g}"
        apart = f"relative difference {_apart(self.relative)}, tolerance {self.tolerance:g}"
        return Sentence("Verification", f"{verdict}: {apart} (absolute difference {absolute})")

    def _counted(self) -> str:
        modules = len({(module.nnx, module.linen) for module in self.modules})
        calls = f"{counted(len(self.modules), 'call')} of {counted(modules, 'module')} compared"
        alike = [module for module in self.modules if not exceeds(module.inputs, TOLERANCE)]
        outputs = [module.outputs.relative for module in alike if not module.differs]
        if self.first is None:
            others = sum(module.differs for module in alike)
            but = f", but for {counted(others, 'call')} from which the same comes" if others else ""
            return f"  {calls}: outputs at most {_apart(max(outputs, default=0.0))} apart{but}"
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
        "changes": _recipes_to_list(first.changes),
        "elsewhere": _recipes_to_list(first.elsewhere),
        "tried": first.tried,
        "settings": {name: [repr(a), repr(b)] for name, (a, b) in first.settings.items()},
        "reordered": first.reordered,
        "cast": first.cast,
        "residual": first.residual,
    }


def _recipes_to_list(recipes: Mapping[Path, Recipe]) -> list[dict[str, Any]]:
    return [
        {"path": render(path), "stored": [*map(render, reads(recipe))], "transform": describe(recipe)}
        for path, recipe in recipes.items()
    ]


def _told(first: FirstDifference) -> list[Line]:
    module = first.module
    apart = ", ".join(
        f"{name} {'the same' if one.relative == 0 else f'{_apart(one.relative)} apart'}"
        for name, one in (("inputs", module.inputs), ("outputs", module.outputs))
    )
    within = "" if first.place == module.nnx.path else f"{first.path} in "
    is_whole = bool(within and not module.nnx.path)
    head = first.path if is_whole else f"{within}{unit_name(module.nnx)}   <- {unit_name(module.linen)}"
    lines: list[Line] = [f"first difference: {head}", f"  {'of the whole programs: ' * is_whole}{apart}"]
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


def called_like(one: ModuleComparison, other: ModuleComparison) -> str:
    """Returns what it means that a module is called like another one."""
    nnx, linen, other_nnx, other_linen = map(unit_name, (one.nnx, one.linen, other.nnx, other.linen))
    return (
        f"{nnx} is called with what Linen calls {other_linen} with, and has the weights of {linen}. "
        f"It needs those that {other_nnx} was given"
    )


def _row(module: ModuleComparison) -> Folded:
    inputs = f"inputs {_apart(module.inputs.relative)}" if module.inputs.compared else "no inputs"
    outputs = f"outputs {_apart(module.outputs.relative)}" if module.outputs.compared else "not comparable"
    columns = (inputs, outputs, "differs" if module.differs else "", f"{FROM}{unit_name(module.linen)}")
    return Folded(text=unit_name(module.nnx), columns=columns, count=1)


def _apart(relative: float) -> str:
    return "0" if relative == 0 else f"{relative:.1e}"
