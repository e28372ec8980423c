"""One module of the target by itself, on recorded inputs; and other ways to make its weights."""

import contextlib
import dataclasses
import functools
import itertools
import operator
from collections import defaultdict
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
from flax import nnx

from orbax_nnx_handler.planning.core.folding import fold_paths
from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.lines import told_apart
from orbax_nnx_handler.planning.core.paths import Path, render
from orbax_nnx_handler.planning.core.recipes import (
    Concat,
    Recipe,
    Shapes,
    Stack,
    describe,
    reads,
    render_reads,
    shape_of,
    simplify,
)
from orbax_nnx_handler.planning.core.regions import layer_of
from orbax_nnx_handler.planning.suggesting.proved_recipes import (
    again,
    by_groups,
    by_one,
    divided,
    joint_of,
    otherwise,
    turned,
    undone,
    with_parts,
)
from orbax_nnx_handler.storage.arithmetic import evaluate
from orbax_nnx_handler.storage.checkpoint.metadata import Checkpoint
from orbax_nnx_handler.storage.reading import read_values
from orbax_nnx_handler.verifying import Array
from orbax_nnx_handler.verifying.pairing import nearest_modules
from orbax_nnx_handler.verifying.recording import Call, Held, arrays_by_place
from orbax_nnx_handler.verifying.weights import flat_state, one_device

_MOST_PARTS, _MOST_GROUPS, _MOST_OTHERS = 4, 32, 48


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alternative:
    """Another way of making some leaves of a module.

    Attributes:
        words: What is otherwise.
        recipes: The leaves that change, with their recipes.
    """

    words: str
    recipes: Mapping[Path, Recipe]


def alternatives(
    all_: Mapping[Path, Recipe],
    others: Mapping[Path, Mapping[Path, Recipe]],
    shapes: Shapes,
    late: Collection[Path] = (),
) -> Iterator[Alternative]:
    """Yields what could be otherwise, the likeliest first.

    Args:
        all_: The recipe of each leaf of the module that is not known to be right.
        others: Recipes of other modules by path, nearest first, by the doubtful leaf that each would be.
        shapes: The stored shapes.
        late: Leaves that a run does not show, but for those that others are exchanged with.
    """
    doubtful = {leaf: recipe for leaf, recipe in all_.items() if leaf not in late}
    strangers = _strangers(all_)
    exchanged = list(_exchanged(all_, shapes, late))
    likely = [pairs for pairs in exchanged if strangers.issuperset(itertools.chain(*pairs))]
    yield from (_exchange(pairs, all_) for pairs in likely)
    plain = {leaf: way for leaf, recipe in doubtful.items() for _, way in undone(recipe)}
    if len(plain) > 1:
        yield Alternative(words=f"{_names(plain)} are neither scaled nor shifted", recipes=plain)
    yield from itertools.islice(joined := orders(doubtful, shapes), 5)  # Three parts have as many others.
    # One rule makes a leaf of all layers and experts, so that a mistake in it is in all of them.
    yield from (_exchange(pairs, all_) for pairs in exchanged if len(pairs) > 1 and pairs not in likely)
    yield from _alike(doubtful, shapes)
    # The likeliest way of each leaf comes before all ways of one of them: a square matrix is transposed.
    each = [(leaf, doubtful[leaf], shapes, name) for leaf, name in told_apart(doubtful).items()]
    parts = itertools.chain(*itertools.starmap(_parts_of, each))
    rounds = itertools.zip_longest(*itertools.starmap(_axes, each), *parts)
    yield from filter(None, next(rounds, ()))
    yield from joined
    yield from filter(None, itertools.chain.from_iterable(rounds))
    yield from itertools.starmap(_from_other, others.items())
    yield from (_exchange(pairs, all_) for pairs in exchanged if not pairs[1:] and pairs not in likely)


def _alike(doubtful: Mapping[Path, Recipe], shapes: Shapes) -> Iterator[Alternative]:
    """Yields leaves that one name writes, but for a number: all otherwise in one way, or in another order."""
    groups: dict[object, list[Path]] = defaultdict(list)
    for leaf, recipe in doubtful.items():
        groups[tuple(key for key in leaf if not isinstance(key, int)), shape_of(recipe, shapes)].append(leaf)
    several = [group for group in groups.values() if len(group) > 1]
    for group in several:
        for ways in zip(
            *(_axes(leaf, doubtful[leaf], shapes, str(leaf[-1])) for leaf in group), strict=False
        ):
            made = {leaf: recipe for way in ways for leaf, recipe in way.recipes.items()}
            yield Alternative(words=f"{fold_paths(group)}: {ways[0].words}, and so in all", recipes=made)
    rows: dict[object, list[Path]] = defaultdict(list)
    for leaf in doubtful:
        for at in [at for at, key in enumerate(leaf) if isinstance(key, int)]:
            rows[leaf[:at], leaf[at + 1 :], shape_of(doubtful[leaf], shapes)].append(leaf)
    for count in sorted({len(row) for row in rows.values()} - {1, 2}):
        alike = [row for row in rows.values() if len(row) == count]
        for some, order in itertools.product([alike, *([x] for x in alike)], otherwise(count)):
            made = {row[to]: doubtful[row[at]] for row in some for to, at in enumerate(order)}
            words = f"{fold_paths(made)} are in another order: {', '.join(map(str, order))}"
            yield Alternative(words=words, recipes=made)


def _exchanged(
    doubtful: Mapping[Path, Recipe], shapes: Shapes, late: Collection[Path]
) -> Iterator[list[tuple[Path, Path]]]:
    """Yields leaves that may be each other's: of two names in all layers, one by one, of two modules.

    Of two names are those that differ in the same keys, be it a number: a weight of two layers' experts. Of
    two modules those come first that are read from one: the statistics of two norms without their weights.
    """
    alike, modules, halves = (defaultdict[object, list[tuple[Path, Path]]](list) for _ in range(3))
    made = {leaf: shape_of(recipe, shapes) for leaf, recipe in doubtful.items()}
    shown, others = ([leaf for leaf in doubtful if (leaf in late) == is_late] for is_late in (False, True))
    each = itertools.chain(itertools.combinations(shown, 2), itertools.product(shown, others))
    pairs = [(one, other) for one, other in each if made[one] == made[other]]
    for one, other in pairs:
        if one[-1:] == other[-1:]:
            modules[one[:-1], other[:-1]].append((one, other))
            read = frozenset(path[1:-1] for path in reads(doubtful[one]))
            halves[one[:-1], other[:-1], read].append((one, other))
        if len(one) == len(other):
            keys = zip(one, other, strict=True)
            place = ((a, b) if a != b else None if isinstance(a, int) else a for a, b in keys)
            alike[tuple(place)].append((one, other))
    yield from (x for x in halves.values() if 1 < len(x) < len(modules[x[0][0][:-1], x[0][1][:-1]]))
    yield from sorted((x for x in alike.values() if len(x) > 1), key=lambda x: sum(map(operator.ne, *x[0])))
    yield from itertools.chain(([pair] for pair in pairs), (x for x in modules.values() if len(x) > 1))


def _exchange(pairs: Sequence[tuple[Path, Path]], doubtful: Mapping[Path, Recipe]) -> Alternative:
    ones, others = zip(*pairs, strict=True)
    words = f"{fold_paths(ones)} and {fold_paths(others)} are exchanged"
    back = {other: doubtful[one] for one, other in pairs}
    return Alternative(words=words, recipes={one: doubtful[other] for one, other in pairs} | back)


def _strangers(doubtful: Mapping[Path, Recipe]) -> set[Path]:
    """Returns leaves that come from another stored module than the leaves beside them."""
    beside: dict[Path, list[tuple[Path, set[Path]]]] = defaultdict(list)
    for leaf, recipe in doubtful.items():
        beside[leaf[:-1]].append((leaf, {path[:-1] for path in reads(recipe)}))
    return {
        leaf
        for leaves in beside.values()
        for leaf, sources in leaves
        if any(others.isdisjoint(sources) for _, others in leaves)
    }


def _from_other(module: Path, recipes: Mapping[Path, Recipe]) -> Alternative:
    sources = ", ".join(dict.fromkeys(map(render_reads, recipes.values())))
    words = f"it has the weights that {render(module)} was given: {sources}"
    return Alternative(words=words, recipes=recipes)


def _axes(leaf: Path, recipe: Recipe, shapes: Shapes, name: str) -> Iterator[Alternative]:
    """Yields the leaf with its axes in another order, and divided in another way."""
    seen, shape = {recipe}, shape_of(recipe, shapes)
    for words, changed in itertools.chain(_ways(recipe, shapes), by_one(recipe, shape)):
        plain = simplify(changed, shapes)
        if plain not in seen:
            seen.add(plain)
            said = f"{name} is {words}: {describe(plain) or 'as it is stored'}"
            yield Alternative(words=said, recipes={leaf: plain})


def _parts_of(leaf: Path, recipe: Recipe, shapes: Shapes, name: str) -> Iterator[Iterator[Alternative]]:
    """Yields the other ways to turn or divide each part of a fused leaf, last those of all parts alike."""
    if (joint := joint_of(recipe)) is None:
        return
    parts = joint.sources
    ways = [[(words, simplify(way, shapes)) for words, way in _ways(part, shapes)] for part in parts]

    def made(words: str, *sources: Recipe) -> Alternative:
        return Alternative(words=words, recipes={leaf: with_parts(recipe, joint, sources)})

    def of(at: int, words: str, way: Recipe) -> Alternative:
        return made(f"{render_reads(way)} in {name} is {words}", *parts[:at], way, *parts[at + 1 :])

    yield from (itertools.starmap(functools.partial(of, at), each) for at, each in enumerate(ways))
    alike = zip(*ways, strict=True) if len(set(map(len, ways))) == 1 else ()
    yield (made(f"every part of {name} is {each[0][0]}", *(way for _, way in each)) for each in alike)


def _ways(recipe: Recipe, shapes: Shapes) -> Iterator[tuple[str, Recipe]]:
    return itertools.chain(undone(recipe), turned(recipe, shape_of(recipe, shapes)), divided(recipe, shapes))


def orders(doubtful: Mapping[Path, Recipe], shapes: Shapes) -> Iterator[Alternative]:
    """Yields fused leaves with their parts in another order, or group by group, kernel and bias alike."""
    fused = {leaf: found for leaf, recipe in doubtful.items() if (found := joint_of(recipe)) is not None}
    for count in sorted({len(joint.sources) for joint in fused.values()}):
        if count > _MOST_PARTS:
            continue
        together = {leaf: joint for leaf, joint in fused.items() if len(joint.sources) == count}
        groups = [[*together], *([leaf] for leaf in together if len(together) > 1)]
        for group, order in itertools.product(groups, otherwise(count)):
            some = {leaf: [together[leaf].sources[at] for at in order] for leaf in group}
            recipes = {leaf: with_parts(doubtful[leaf], together[leaf], x) for leaf, x in some.items()}
            parts = some[group[0]]
            told = len({*map(render_reads, parts)}) == count  # Else they are parts of one array.
            said = (f"{render_reads(x)} {'' if told else describe(x)}".strip() for x in parts)
            words = f"{_names(group)} joined in another order: {', '.join(said)}"
            yield Alternative(words=words, recipes=recipes)
        yield from _interleaved(together, doubtful, shapes)


def _interleaved(
    fused: Mapping[Path, Concat | Stack], doubtful: Mapping[Path, Recipe], shapes: Shapes
) -> Iterator[Alternative]:
    """Yields leaves whose parts lie group by group: the query, key and value of each head side by side."""
    joints = {leaf: joint for leaf, joint in fused.items() if isinstance(joint, Concat)}
    lengths = {shape_of(part, shapes)[joint.axis] for joint in joints.values() for part in joint.sources}
    length = lengths.pop() if len(lengths) == 1 else 1
    for groups in [number for number in range(2, length + 1) if length % number == 0][:_MOST_GROUPS]:
        made = {
            leaf: again(doubtful[leaf], one, by_groups(one, groups, shapes)) for leaf, one in joints.items()
        }
        words = f"{_names(joints)} joined group by group, {groups} in all, each with all parts"
        yield Alternative(words=words, recipes=made)


def _names(leaves: Iterable[Path]) -> str:
    return " and ".join(dict.fromkeys(str(leaf[-1]) for leaf in leaves))


class Reached(Exception):
    """A run came to the call at which it ends; the argument is what that was made with."""


@contextlib.contextmanager
def _ending_at(module: Any, number: int) -> Generator[None]:
    """Ends a run at one of the calls of a module, counted from 0."""
    calls, cls = itertools.count(), next(x for x in type(module).__mro__ if "__call__" in vars(x))
    original: Callable[..., Any] = vars(cls)["__call__"]

    def ending(self: Any, *args: Any, **kwargs: Any) -> Any:
        if hasattr(self, "ends_a_run") and next(calls) == number:
            raise Reached([np.asarray(leaf) for leaf in arrays_by_place((args, kwargs)).values()])
        return original(self, *args, **kwargs)

    module.ends_a_run = True  # It goes with the module through `nnx.split` and the transforms.
    cls.__call__ = ending
    try:
        yield
    finally:
        cls.__call__ = original


@dataclasses.dataclass(kw_only=True)
class ModuleRunner:
    """Runs modules of a restored model by themselves.

    Attributes:
        model: The restored target.
        checkpoint: Where other weights are read from.
        recipes: How each leaf of the model is made.
        axes: The scanned axis of each leaf that has one.
        calls: The calls of the NNX program, by module.
        values: The stored arrays that were read so far.
        taken_apart: The modules that were run so far, as `nnx.split` takes them apart.
    """

    model: Any
    checkpoint: Checkpoint
    recipes: Mapping[Path, Recipe]
    axes: Mapping[Path, int]
    calls: Mapping[Path, Sequence[Call]]
    values: dict[Path, Array] = dataclasses.field(default_factory=dict[Path, Array])
    taken_apart: dict[Path, tuple[Any, Any]] = dataclasses.field(default_factory=dict[Path, Any])

    @functools.cached_property
    def variables(self) -> Mapping[Path, Any]:
        """The model's own Variables by path."""
        return dict(flat_state(self.model))

    @functools.cached_property
    def shapes(self) -> dict[Path, Shape]:
        """The shapes of the stored leaves."""
        return {path: leaf.shape for path, leaf in self.checkpoint.leaves.items()}

    def recipe(self, leaf: Path, layer: int | None) -> Recipe:
        """Returns how one layer of a leaf is made, or the whole leaf where it is not scanned."""
        return self.layered(leaf, self.recipes[leaf], layer)

    def layered(self, leaf: Path, recipe: Recipe, layer: int | None) -> Recipe:
        """Returns how one layer of a leaf is made, by another recipe than the model's."""
        axis = self.axes.get(leaf)
        if layer is None or axis is None:
            return recipe
        return simplify(layer_of(recipe, axis, layer, self.shapes), self.shapes)

    def layer_at(self, module: Path, call: Call) -> int | None:
        """Returns the layer that a call of a module belongs to; None where it is not scanned.

        Raises:
            LookupError: The calls do not come out.
        """
        if (count := self._count(module)) is None:
            return None
        calls = self.calls[module]
        if len(calls) % count:
            raise LookupError(f"{len(calls)} calls of {count} layers")
        return [one is call for one in calls].index(True) // (len(calls) // count)

    def start(self, module: Path, call: Call) -> int:
        """Returns the last call before those that were made in a call: when the module returned last."""
        return max((one.order for one in self.calls[module] if one.order < call.order), default=-1)

    def end_at(self, until: Path, end: Call, module: Path, call: Call) -> tuple[tuple[Path, int], int]:
        """Returns which call of which module in another one is, and how many calls are made before it."""
        start = self.start(module, call)
        calls = [each for path, each in self.calls.items() if path[: len(module)] == module]
        calls = [each for each in itertools.chain(*calls) if start < each.order < end.order]
        before = [each for each in calls if until not in each.within]
        return (until[len(module) :], sum(each.path == until for each in before)), len(before)

    def likes(
        self, module: Path, layer: int | None, leaves: Mapping[Path, Recipe]
    ) -> dict[Path, Mapping[Path, Recipe]]:
        """Returns the weights of other modules, and of other layers, that fit leaves of a module."""
        names = {leaf[len(module) :]: shape_of(recipe, self.shapes) for leaf, recipe in leaves.items()}
        found: dict[Path, Mapping[Path, Recipe]] = {}
        for path in nearest_modules(module, self._holding(set(names))):
            count = self._count(path)
            for at in sorted(range(count), key=lambda at: abs(at - (layer or 0))) if count else [None]:
                if len(found) >= _MOST_OTHERS or (path, at) == (module, layer):
                    continue
                recipes = {name: self.recipe((*path, *name), at) for name in names}
                if all(shape_of(recipe, self.shapes) == names[name] for name, recipe in recipes.items()):
                    label = path if at is None else (*path, f"[{at}]")
                    found[label] = {(*module, *name): recipe for name, recipe in recipes.items()}
        return found

    def _holding(self, names: set[Path]) -> list[Path]:
        if not names:
            return []
        end = next(iter(names))
        above = [leaf[: -len(end)] for leaf in self.recipes if leaf[-len(end) :] == end]
        return [path for path in above if all((*path, *name) in self.recipes for name in names)]

    def _count(self, module: Path) -> int | None:
        """Returns how many layers a scan around a module has."""
        leaf = next((leaf for leaf in self.axes if leaf[: len(module)] == module), None)
        if leaf is None or any(
            self.axes.get(other) is None for other in self.recipes if other[: len(module)] == module
        ):
            return None
        return shape_of(self.recipes[leaf], self.shapes)[self.axes[leaf]]

    def value(self, recipe: Recipe) -> jax.Array:
        """Returns what a recipe gives, in float32."""
        return self._placed([recipe])[0]

    def _placed(self, made: Sequence[Recipe | Array]) -> list[jax.Array]:
        """Returns what recipes give, in float32, all put in place together; of an array, itself."""
        self._read(each for each in made if not isinstance(each, np.ndarray))
        arrays = (x if isinstance(x, np.ndarray) else evaluate(x, self.values, np.float32) for x in made)
        return jax.device_put([*arrays], one_device())

    def _read(self, recipes: Iterable[Recipe]) -> None:
        if missing := [path for recipe in recipes for path in reads(recipe) if path not in self.values]:
            self.values |= read_values(self.checkpoint, dict.fromkeys(missing))

    def run(
        self,
        module: Path,
        layer: int | None,
        call: Call,
        inputs: Sequence[Any],
        changed: Mapping[Path, Recipe | Array],
        until: tuple[Path, int] | None = None,
    ) -> list[Array]:
        """Calls a module by itself.

        Args:
            module: Keys to the module.
            layer: The layer, where it is scanned.
            call: The recorded call, whose other arguments are taken.
            inputs: The arrays among its arguments.
            changed: Leaves that are made in another way, with the recipe of the layer, or what they hold.
            until: Keys from it to the module within it at whose call to end, and which call that is.

        Returns:
            The arrays that it returns.

        Raises:
            Reached: The module at which to end was called.
        """
        made = self._module(module, layer, dict(zip(changed, self._placed([*changed.values()]), strict=True)))
        # As the model's own: what both programs compiled is not compiled again.
        held = jax.device_put([*inputs], one_device())

        def put_back(leaf: Any) -> Any:
            return held[leaf.number] if isinstance(leaf, Held) else leaf

        is_leaf: Callable[[Any], bool] = lambda leaf: isinstance(leaf, Held | nnx.Pytree)  # noqa: E731
        args, kwargs = jax.tree.map(put_back, call.arguments, is_leaf=is_leaf)
        ending = _ending_at(_at(made, until[0]), until[1]) if until else contextlib.nullcontext()
        with ending, jax.disable_jit(), jax.default_matmul_precision("highest"):
            result = made(*args, **kwargs) if call.function is None else call.function(made, *args)
        return [np.asarray(leaf) for leaf in arrays_by_place(result).values()]

    def _module(self, path: Path, layer: int | None, values: Mapping[Path, jax.Array]) -> Any:
        if path not in self.taken_apart:
            graphdef, state = cast("tuple[Any, Any]", nnx.split(_at(self.model, path)))
            self.taken_apart[path] = graphdef, [*cast(Any, nnx.to_flat_state(state))]
        (graphdef, state), flat = self.taken_apart[path], list[tuple[Any, Any]]()
        for keys, variable in state:
            leaf = (*path, *keys)
            value: Any = values.get(leaf)
            if value is None:
                value = variable.get_raw_value() if hasattr(variable, "get_raw_value") else variable
                axis = self.axes.get(leaf, None if leaf in self.recipes else 0)
                if layer is not None and axis is not None and np.ndim(value) > axis:
                    value = value[(*[slice(None)] * axis, layer)]
            flat.append((keys, variable.replace(value) if hasattr(variable, "replace") else value))
        return nnx.merge(graphdef, nnx.from_flat_state(flat))


def _at(model: Any, path: Path) -> Any:
    """Returns the module at a path."""
    for key in path:
        model = getattr(model, key) if isinstance(key, str) and hasattr(model, key) else model[key]
    return model
