"""Deliberate mistakes in right rules, and faults of ports: which module `verify` names.

`python -m tests.verifying.mistakes` makes every mistake with every twin and rewrites the table of
`docs/proving.md`; with names of twins it prints one line a mistake for these alone. Which leaves a mistake
changes is told by the values that `restore` returns.
"""

import dataclasses
import functools
import itertools
import logging
import pathlib
import random
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from orbax_nnx_handler import (
    Add,
    Fuse,
    Reshape,
    RestoreError,
    RestorePlan,
    Split,
    StackLayers,
    Transpose,
    UnstackLayers,
    Verification,
    plan_restore,
    restore,
    verify,
)
from orbax_nnx_handler.planning.core.paths import Path, render, segments
from orbax_nnx_handler.planning.core.recipes import reads
from orbax_nnx_handler.storage.arithmetic import evaluate
from orbax_nnx_handler.storage.checkpoint.find import find_item
from orbax_nnx_handler.storage.checkpoint.metadata import Checkpoint, read_metadata
from orbax_nnx_handler.storage.reading import read_values
from orbax_nnx_handler.verifying.verification import FirstDifference
from tests.verifying.twins import TWINS, Twin

Told = Literal["proved", "named", "misproved", "around", "wrong", "nothing", "equal"]
"""The module and the way out; the module; a way out that is none; one around it; another one; none; equal."""

MOST = 6
"""How many mistakes of a kind are made with one twin."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mistake:
    """Rules with a mistake, or a port with a fault.

    Attributes:
        kind: What sort of mistake.
        name: What is wrong.
        rules: The rules.
        port: Arguments of the twin's `make`.
        module: The module that a fault of the port lies in; that of rules is told by the values.
    """

    kind: str
    name: str
    rules: Sequence[Any]
    port: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    module: str = ""


@dataclasses.dataclass(kw_only=True)
class Bench:
    """A twin with its checkpoint.

    Attributes:
        twin: The twin.
        path: Where its weights are saved.
    """

    twin: Twin
    path: pathlib.Path

    @functools.cached_property
    def right(self) -> dict[Path, np.ndarray]:
        """What the right rules restore."""
        return self._values(self.twin.rules)

    @functools.cached_property
    def checkpoint(self) -> Checkpoint:
        """What is stored."""
        return read_metadata(find_item(self.path))

    def plan(self, rules: Sequence[Any]) -> RestorePlan:
        """Returns the plan under some rules."""
        return plan_restore(self.path, nnx.eval_shape(self.twin.make), renames=rules, **self._options)

    def changed(self, mistake: Mistake) -> set[Path]:
        """Returns the leaves that a mistake gives another value; none where it does not fit."""
        try:
            if not self.plan(mistake.rules).fits:
                return set()
            values = self._values(mistake.rules)
        except (RestoreError, ValueError):
            return set()
        return {path for path, value in values.items() if not np.array_equal(value, self.right[path])}

    def is_way_out(self, first: FirstDifference) -> bool:
        """Tells whether the change that is said to be needed gives the right values."""
        read = {source for recipe in first.changes.values() for source in reads(recipe)}
        values = read_values(self.checkpoint, dict.fromkeys(read))
        made = {leaf: evaluate(recipe, values, np.float32) for leaf, recipe in first.changes.items()}
        layer = first.layer
        return all(self._is_right(leaf, np.asarray(value), layer) for leaf, value in made.items())

    def _is_right(self, leaf: Path, value: np.ndarray, layer: int | None) -> bool:
        right = self.right[leaf]
        candidates = (
            [right] if right.shape == value.shape else list(right) if layer is None else [right[layer]]
        )
        return any(np.array_equal(one, value) for one in candidates)

    def verified(self, mistake: Mistake) -> Verification:
        """Returns what `verify` says."""
        target = nnx.eval_shape(functools.partial(self.twin.make, **mistake.port))
        run, inputs = self.twin.run, self.twin.inputs
        options = self.twin.options
        return verify(self.path, target, self.twin.apply, run, inputs, renames=mistake.rules, **options)

    @property
    def _options(self) -> dict[str, Any]:
        return {"policy": "error", **self.twin.options}

    def _values(self, rules: Sequence[Any]) -> dict[Path, np.ndarray]:
        model = restore(self.path, nnx.eval_shape(self.twin.make), renames=rules, **self._options)
        flat = nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.RngState)))
        return {tuple(path): np.asarray(variable.get_value()) for path, variable in flat}


def mistakes_of(bench: Bench) -> Iterator[Mistake]:
    """Yields what may be wrong in a twin's rules, some of which fits, and the faults of its port."""
    rules = list(bench.twin.rules)
    for kind, ways in KINDS.items():
        found = [Mistake(kind=kind, name=name, rules=made) for name, made in ways(bench, rules)]
        yield from random.Random(0).sample(found, len(found))
    for name, made in bench.twin.wrong.items():
        yield Mistake(kind="other", name=name, rules=made)
    for name, (port, module) in bench.twin.faults.items():
        yield Mistake(kind=CODE, name=name, rules=rules, port=port, module=module)


CODE = "the code of the port"
Ways = Iterator[tuple[str, list[Any]]]


def _exchanged(_: Bench, rules: list[Any]) -> Ways:
    places = [at for at, rule in enumerate(rules) if isinstance(rule, tuple | UnstackLayers)]
    for one, other in itertools.combinations(places, 2):
        into, others = _into(rules[one]), _into(rules[other])
        if set(re.findall(r"{\w+}", into)) == set(re.findall(r"{\w+}", others)):
            changed = {one: _writing(rules[one], others), other: _writing(rules[other], into)}
            yield f"{into} and {others}", [changed.get(at, rule) for at, rule in enumerate(rules)]


def _into(rule: Any) -> str:
    return rule[1] if isinstance(rule, tuple) else rule.into


def _writing(rule: Any, into: str) -> Any:
    return (rule[0], into) if isinstance(rule, tuple) else dataclasses.replace(rule, into=into)


def _orders(_: Bench, rules: list[Any]) -> Ways:
    """Yields parts joined or cut in another order, those of one size alike: kernel and bias."""
    fields = {Fuse: "patterns", Split: "into"}
    for kind, field in fields.items():
        counts = {len(getattr(rule, field)) for rule in rules if isinstance(rule, kind)}
        for count in sorted(counts):
            for order in itertools.islice(itertools.permutations(range(count)), 1, None):
                yield f"{kind.__name__} {order}", [_in_order(rule, kind, field, order) for rule in rules]


def _in_order(rule: Any, kind: type, field: str, order: Sequence[int]) -> Any:
    if not isinstance(rule, kind) or len(getattr(rule, field)) != len(order):
        return rule
    return dataclasses.replace(rule, **{field: tuple(getattr(rule, field)[at] for at in order)})


def _left_out(_: Bench, rules: list[Any]) -> Ways:
    for at, rule in enumerate(rules):
        if isinstance(rule, Transpose | Add):
            yield str(rule), rules[:at] + rules[at + 1 :]


def _shifted(_: Bench, rules: list[Any]) -> Ways:
    for count in (2, 3):
        made = [part for rule in rules for part in _one_further(rule, count)]
        if made != rules:
            yield f"{count} layers", made


def _one_further(rule: Any, count: int) -> list[Any]:
    further = [(str(at), str((at + 1) % count)) for at in range(count)]
    match rule:
        case (stored, wanted) if "{i}" in stored:
            return [(stored.replace("{i}", one), wanted.replace("{i}", other)) for one, other in further]
        case StackLayers(stored, wanted, axis):
            parts = [stored.replace("{i}", one) for one, _ in further]
            return [Fuse((*parts[1:], parts[0]), wanted, axis=axis, new_axis=True)]
        case UnstackLayers(stored, wanted, axis):
            parts = [re.sub(r"{\w+}", other, wanted) for _, other in further]
            return [Split(stored, tuple(parts), axis=axis, drop_axis=True)]
        case _:
            return [rule]


def _divided(_: Bench, rules: list[Any]) -> Ways:
    """Yields two neighbouring axes read in the other order: heads before features, or after them."""
    for at, rule in enumerate(rules):
        for axis in range(len(rule.shape) - 1) if isinstance(rule, Reshape) else ():
            order = [*range(len(rule.shape))]
            order[axis], order[axis + 1] = axis + 1, axis
            other = dataclasses.replace(rule, shape=tuple(rule.shape[at] for at in order))
            yield (
                f"{rule.pattern}, axis {axis}",
                [*rules[:at], other, Transpose(rule.pattern, order), *rules[at + 1 :]],
            )


def _turned(bench: Bench, rules: list[Any]) -> Ways:
    """Yields square kernels the other way round."""
    patterns = dict[str, tuple[int, ...]]()
    for path, shape in {path: leaf.shape for path, leaf in bench.checkpoint.leaves.items()}.items():
        for one, other in itertools.combinations(range(len(shape)), 2):
            if shape[one] == shape[other] and len(shape) - one <= 3:
                order = [*range(len(shape))]
                order[one], order[other] = other, one
                pattern = re.sub(r"_\d+(?=/)", "_{n}", "/".join(segments(path[1:])))
                patterns[pattern] = tuple(order)
    for pattern, order in patterns.items():
        yield pattern, [Transpose(pattern, order), *rules]


def _neighbours(bench: Bench, rules: list[Any]) -> Ways:
    """Yields vectors exchanged with a neighbour's: biases, scales, statistics."""
    found: dict[tuple[int, ...], list[tuple[Path, Path]]] = defaultdict(list)
    for path, item in bench.plan(rules).restored.items():
        sources = reads(item.recipe)
        if len(sources) == 1 and len(item.wanted.shape) == 1 and not item.transform.startswith("unstack"):
            found[item.wanted.shape].append((sources[0], path))
    for leaves in found.values():
        for (stored, one), (other_stored, other) in itertools.pairwise(leaves):
            crossed = [_rename(stored, other), _rename(other_stored, one)]
            yield f"{render(one)} and {render(other)}", [*crossed, *rules]


def _rename(stored: Path, wanted: Path) -> tuple[str, str]:
    return render(stored), f"{stored[0]}/{render(wanted)}"


KINDS: dict[str, Callable[[Bench, list[Any]], Ways]] = {
    "two modules exchanged": _exchanged,
    "parts in another order": _orders,
    "layers shifted": _shifted,
    "a transpose or constant left out": _left_out,
    "a square kernel transposed": _turned,
    "heads divided otherwise": _divided,
    "a vector of a neighbour": _neighbours,
}


def told(bench: Bench, found: Verification, mistake: Mistake, changed: set[Path]) -> Told:
    """Returns how good what `verify` says is."""
    if found.first is None:
        # Of fewer digits a remark tells, with the module that has them.
        is_said = bool(mistake.module) and any(mistake.module in remark for remark in found.remarks)
        return "named" if is_said else "equal" if found.equal else "nothing"
    module = segments_of(found.first.path)
    if mistake.module:
        expected = segments_of(mistake.module)
        if module == expected:
            return "named"
        return "around" if expected[: len(module)] == module else "wrong"
    first = _of_first_layer(changed)
    holders = {leaf[:-1] for leaf in first}
    common = _common(holders)
    inside = {leaf for leaf in first if leaf[: len(module)] == module}
    if module in holders or module == common or (inside and module[: len(common)] == common):
        if not found.first.proved:
            return "named"
        return "proved" if bench.is_way_out(found.first) else "misproved"
    return "around" if inside else "wrong"


def segments_of(path: str) -> tuple[str, ...]:
    """Returns a module's path by segments; none for the root."""
    return () if path == "(root)" else tuple(path.split("/"))


def _of_first_layer(leaves: Iterable[Path]) -> set[tuple[str, ...]]:
    """Returns leaves of the first layer, where all that stand below layers are changed in several."""
    paths = {tuple(map(str, leaf)) for leaf in leaves}
    groups: dict[Any, list[tuple[str, ...]]] = defaultdict(list)
    for path in paths:
        groups[tuple("#" if part.isdigit() else part for part in path)].append(path)
    key = lambda path: [int(part) for part in path if part.isdigit()]  # noqa: E731
    return {min(group, key=key) for group in groups.values()}


def _common(paths: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    columns = zip(*paths, strict=False)
    same = itertools.takewhile(lambda column: len(set(column)) == 1, columns)
    return tuple(column[0] for column in same)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one mistake."""

    twin: str
    mistake: Mistake
    told: Told
    found: Verification


def outcomes(bench: Bench, most: int = MOST) -> Iterator[Outcome]:
    """Makes every mistake that fits with a twin, at most so many of a kind."""
    made: dict[str, int] = defaultdict(int)
    for mistake in mistakes_of(bench):
        if made[mistake.kind] == most:
            continue
        changed = bench.changed(mistake)
        if changed or mistake.port:
            made[mistake.kind] += 1
            found = bench.verified(mistake)
            yield Outcome(
                twin=bench.twin.name, mistake=mistake, told=told(bench, found, mistake, changed), found=found
            )


def saved(twin: Twin, folder: pathlib.Path) -> Bench:
    """Saves a twin's weights with stock Orbax."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / twin.name, twin.variables())
    return Bench(twin=twin, path=folder / twin.name)


PAGE = pathlib.Path(__file__).parents[2] / "docs" / "proving.md"
BEGIN, END = "<!-- mistakes: begin (written by tests/verifying/mistakes.py) -->", "<!-- mistakes: end -->"
RIGHT: tuple[Told, ...] = ("proved", "named")


def table(found: Sequence[Outcome]) -> str:
    """Returns how many mistakes of each kind were told right, by twin: `5/6`."""
    kinds = [*KINDS, "other", CODE]
    rows = [["", *kinds], ["---"] * (len(kinds) + 1)]
    for twin in dict.fromkeys(one.twin for one in found):
        mine = [one for one in found if one.twin == twin]
        rows.append([twin, *(_counted([one for one in mine if one.mistake.kind == kind]) for kind in kinds)])
    rows.append(
        ["**all**", *(_counted([one for one in found if one.mistake.kind == kind]) for kind in kinds)]
    )
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _counted(found: Sequence[Outcome]) -> str:
    return f"{sum(one.told in RIGHT for one in found)}/{len(found)}" if found else ""


def section(found: Sequence[Outcome]) -> str:
    """Returns the part of the page that the mistakes know."""
    others = [one for one in found if one.told not in RIGHT]
    lines = [f"- {one.twin}, {one.mistake.kind}: {one.mistake.name}: {WORDS[one.told]}\n" for one in others]
    proved = sum(one.told == "proved" for one in found)
    summary = (
        f"Of {len(found)} mistakes the right module is named for {len(found) - len(others)}, and for "
        f"{proved} of them what has to be otherwise is proved by outputs.\n\n"
    )
    return f"{BEGIN}\n{table(found)}\n{summary}{''.join(lines)}{END}"


WORDS: dict[Told, str] = {
    "around": "a module around it is named",
    "misproved": "what is said to have to be otherwise is not the right way",
    "wrong": "another module is named",
    "nothing": "the outputs differ, and no module is named",
    "equal": "the outputs are equal, and no module is named",
}


def main(names: Sequence[str]) -> None:
    """Prints what becomes of each mistake, and writes the table where all were made."""
    logging.disable(logging.WARNING)
    found: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        for twin in TWINS:
            for one in outcomes(saved(twin, pathlib.Path(folder))) if twin.name in names or not names else ():
                found.append(one)
                first = one.found.first
                where = "" if first is None else f"{first.path}: {first.proved[:110]}"
                print(
                    f"{one.told:9} {one.twin:11} {one.mistake.kind:26} {one.mistake.name:50} -> {where}",
                    flush=True,
                )
    if not names:
        before, rest = PAGE.read_text().split(BEGIN, 1)
        PAGE.write_text(before + section(found) + rest.split(END, 1)[1])


if __name__ == "__main__":
    main(sys.argv[1:])
