"""The arithmetic of recipes and the last cast, the same on restore, save and convert; on whole arrays too.

Values are computed in float32 or a wider dtype and cast at the end. A value that
the dtype at the end cannot hold is refused: one that was finite and would be
infinite, or one outside the range of an integer type.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.core import Tracer
from jax.sharding import (
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    Sharding,
    use_abstract_mesh,
)

from orbax_nnx_handler.planning.core import recipes
from orbax_nnx_handler.planning.core.dtypes import (
    held_dtype,
    holds,
    infinity_bits,
    integer_limits,
    is_integer,
    is_key,
    largest_value,
    wide_dtype,
)
from orbax_nnx_handler.planning.core.errors import DtypeMismatchError
from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.paths import Path, render
from orbax_nnx_handler.planning.core.recipes import Arithmetic, Recipe, computes, without_arithmetic

Values = npt.NDArray[Any]
Dtype = Any  # NumPy's own and those of `ml_dtypes`.

# Elements cast and looked at together: they stay in the processor's cache.
_BLOCK = 1 << 19


class LostValueError(Exception):
    """A value that the wanted dtype cannot hold; `of` names the leaf.

    Attributes:
        value: The value as it is stored.
        computed: What rules made of it; the same where no rule acts.
        stored: The stored dtype.
        wanted: The dtype that cannot hold it.
    """

    def __init__(self, value: Any, computed: Any, stored: Dtype, wanted: Dtype):
        super().__init__(value, computed, stored, wanted)
        self.value, self.computed, self.stored, self.wanted = value, computed, stored, wanted

    def of(self, path: Path) -> DtypeMismatchError:
        """Returns the error for a user."""
        by_rules = not np.array_equal(self.value, self.computed, equal_nan=True)
        made = f" ({self.computed} by the rules)" if by_rules else ""
        way = "change the rules, or choose a dtype that can" if by_rules else f"choose {self._holding}"
        return DtypeMismatchError(
            f"stored leaf {render(path)} ({self.stored}) holds {self.value}{made}, "
            f"which {self.wanted} cannot hold.",
            paths=[path],
            hints=[f"{way}, for the target's leaf or as --dtype of convert."],
        )

    @property
    def _holding(self) -> str:
        held = held_dtype(self.stored) == self.stored
        return f"{self.stored}" if held else f"{self.stored} under jax_enable_x64"


def put(view: Values, values: Values, steps: Sequence[Arithmetic] = ()) -> None:
    """Computes values and casts them into a place.

    Raises:
        LostValueError: A value does not fit the dtype of the place.
    """
    if not steps and holds(view.dtype, values.dtype):
        view[...] = values
        return
    # NumPy's own scalar, as a chunk of no axis gives it, would raise in the cast instead of being looked at.
    values = np.asarray(values)
    for part, block in _blocks(view, values):
        # NumPy would warn of just what is looked for here.
        with np.errstate(all="ignore"):
            computed = compute(block, steps, view.dtype)
            part[...] = computed
            if part.size and _may_be_lost(part, computed):
                refuse_lost(block, computed, view.dtype)


def _blocks(view: Values, values: Values) -> Iterator[tuple[Values, Values]]:
    if values.size <= _BLOCK:
        yield view, values
        return
    axis = next(axis for axis, length in enumerate(values.shape) if length > 1)
    step = max(1, _BLOCK * values.shape[axis] // values.size)
    for start in range(0, values.shape[axis], step):
        at = (slice(None),) * axis + (slice(start, start + step),)
        yield from _blocks(view[at], values[at])


def compute(values: Any, steps: Sequence[Arithmetic], wanted: Dtype) -> Any:
    """Returns what arithmetic makes of values, of NumPy or JAX, before the last cast."""
    if not steps:
        return values
    wide = wide_dtype(values.dtype, wanted)
    computed = values.astype(wide)
    for step in steps:
        if step.factor != 1.0:
            computed = computed * np.asarray(step.factor, wide)
        if step.constant != 0.0:
            computed = computed + np.asarray(step.constant, wide)
    return computed


def _may_be_lost(part: Values, computed: Values) -> bool:
    """Tells, fast, whether a value may not have fitted where it was put."""
    if is_integer(part.dtype):
        low, high = integer_limits(computed.dtype, part.dtype)
        # In this form, since a NaN is on neither side of anything.
        return not (low <= computed.min() and computed.max() <= high)
    bits = infinity_bits(part.dtype)
    if bits is None:
        return part.dtype != np.bool_
    infinity, magnitude = bits
    return bool((part.view(infinity.dtype) & magnitude).max() >= infinity)


def refuse_lost(values: Values, computed: Values, wanted: Dtype) -> None:
    """Raises where a dtype cannot hold a value.

    Raises:
        LostValueError: Holds the first of them.
    """
    lost = np.asarray(lost_values(values, computed, wanted))
    if lost.any():
        raise LostValueError(values[lost][0], computed[lost][0], values.dtype, wanted)


def lost_values(values: Any, computed: Any, wanted: Dtype) -> Any:
    """Returns which elements a dtype cannot hold, as an array of booleans.

    Args:
        values: The values as they are stored, of NumPy or JAX.
        computed: What `compute` made of them.
        wanted: The dtype that they are cast to.
    """
    if is_integer(wanted):
        low, high = integer_limits(computed.dtype, wanted)
        return ~((computed >= low) & (computed <= high))
    wide = wide_dtype(values.dtype, wanted)
    before, after = values.astype(wide), computed.astype(wanted).astype(wide)
    if infinity_bits(wanted) is not None or not jnp.issubdtype(wanted, jnp.floating):
        return (abs(before) < np.inf) & ~(abs(after) < np.inf)
    # Without an infinity, what is too large becomes NaN (float8_e4m3fn) or the largest value (float4_e2m1fn).
    too_large = abs(computed.astype(wide)) > largest_value(wanted)
    return too_large | ((before == before) != (after == after))


Loss = tuple[Any, Any]
"""Whether a value is lost in the last cast, and one that is: the largest, or the smallest below 0."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """One value to compute.

    Attributes:
        recipe: How it is made. A `Fill` in it is zeros.
        dtype: Its dtype. Arithmetic is done in the wider type and cast last.
        sharding: Where it goes; None leaves it to the compiler.
    """

    recipe: Recipe
    dtype: Any
    sharding: Sharding | None = None


def evaluate(recipe: Recipe, values: Mapping[Path, Any], dtype: Any, sharding: Sharding | None = None) -> Any:
    """Returns the value of a recipe in a dtype; NumPy arrays stay NumPy's where no sharding is asked for.

    Args:
        recipe: See `Asked`.
        values: The arrays that it reads, by path; traced ones are not looked at.
        dtype: See `Asked`.
        sharding: See `Asked`.

    Raises:
        DtypeMismatchError: A value does not fit the dtype; names a leaf that it is made from.
    """
    asked = Asked(recipe, dtype if is_key(dtype) else np.dtype(dtype), sharding)
    paths, (pattern,) = _numbered([asked])
    sources = [values[path] for path in paths]
    if sharding is None and all(isinstance(source, np.ndarray | np.generic) for source in sources):
        try:
            return _on_host(pattern.recipe, sources, pattern.dtype)
        except LostValueError as error:
            raise error.of(paths[0]) from None
    (value,), check = evaluate_together([asked], values)
    check()
    return value


def evaluate_together(
    asked: Sequence[Asked], values: Mapping[Path, Any]
) -> tuple[list[jax.Array], Callable[[], None]]:
    """Computes values where the arrays are, in one jitted function, and does not wait for them.

    The function is shared by all that differ in their paths only, such as the layers of a model.

    Args:
        asked: What to compute.
        values: The arrays that it is made from, by path: all on the same devices, or traced.

    Returns:
        The values, and a check to be called when they may be waited for. It raises
        DtypeMismatchError where a value did not fit its dtype; what is traced it does not see.
    """
    paths, patterns = _numbered(asked)
    with sharded_by_compiler([values[path] for path in paths]) as (sources, meshes):
        run = _on_explicit_axes(_compiled(patterns), [one.recipe for one in patterns], sources)
        computed, losses = run(*sources)
    computed = [_on_mesh(value, meshes) for value in computed]

    def check() -> None:
        for one, loss in zip(asked, losses, strict=True):
            if loss is not None and not isinstance(loss[0], Tracer) and bool(loss[0]):
                path = recipes.reads(one.recipe)[0]
                raise LostValueError(loss[1], loss[1], values[path].dtype, one.dtype).of(path)

    return computed, check


@contextlib.contextmanager
def sharded_by_compiler(values: Sequence[Any]) -> Generator[tuple[list[Any], Mapping[Mesh, Mesh]]]:
    """Yields arrays for a jitted function that cuts and joins them anywhere, whatever their shardings.

    Of arrays on a mesh with axes of `AxisType.Explicit`, JAX refuses every operation whose result has
    no sharding that follows from theirs. What is yielded are the same arrays on a mesh whose axes are
    the compiler's; nothing is copied.

    Args:
        values: Arrays on devices, traced ones, which are left as they are, or NumPy's.

    Yields:
        The arrays, and the mesh that each new mesh stands for.
    """
    meshes: dict[Mesh, Mesh] = {}
    for value in values:
        mesh = None if isinstance(value, Tracer) else getattr(getattr(value, "sharding", None), "mesh", None)
        if isinstance(mesh, Mesh) and AxisType.Explicit in mesh.axis_types:
            meshes[mesh] = Mesh(
                mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names)
            )
    new = next(iter(meshes.values()), None)
    # JAX also wants the mesh in force to have axes of the arrays' types.
    with contextlib.nullcontext() if new is None else use_abstract_mesh(new.abstract_mesh):
        yield [_on_mesh(value, meshes) for value in values], {new: mesh for mesh, new in meshes.items()}


def _on_mesh(value: Any, meshes: Mapping[Mesh, Mesh]) -> Any:
    """Returns an array with the mesh in its sharding that stands in the place of its own, if one does."""
    own = None if isinstance(value, Tracer) or not meshes else getattr(value, "sharding", None)
    mesh = meshes.get(own.mesh) if isinstance(own, NamedSharding) and isinstance(own.mesh, Mesh) else None
    if not isinstance(own, NamedSharding) or mesh is None:
        return cast(Any, value)
    return jax.device_put(value, NamedSharding(mesh, own.spec, memory_kind=own.memory_kind))


def explicit_mesh(values: Sequence[Any]) -> AbstractMesh | None:
    """Returns the mesh with axes of `AxisType.Explicit` that traced arrays lie on, if they lie on one."""
    meshes = [jax.typeof(value).sharding.mesh for value in values if isinstance(value, Tracer)]
    return next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)


def _on_explicit_axes(
    run: Callable[..., Any], asked: Sequence[Recipe], sources: Sequence[Any]
) -> Callable[..., Any]:
    """Returns what computes recipes of traced arrays whose types tell shardings; of others, what is given.

    JAX wants to be told the shardings of its results: each is divided as the first source is.

    Args:
        run: Returns the values of the recipes, and something else, of the sources.
        asked: The recipes. They read the sources by their numbers.
        sources: What it will be called with.
    """
    mesh = explicit_mesh(sources)
    if mesh is None:
        return run
    specs = [tuple(jax.typeof(source).sharding.spec) for source in sources]
    shapes: dict[Path, Shape] = {(number,): source.shape for number, source in enumerate(sources)}

    def spec(recipe: Recipe) -> PartitionSpec:
        pairs = zip(recipes.shape_of(recipe, shapes), _axes(recipe, specs, shapes), strict=True)
        # What is cut may have too few elements left.
        return PartitionSpec(*(part if length % _parts(part, mesh) == 0 else None for length, part in pairs))

    results = [NamedSharding(mesh, spec(recipe)) for recipe in asked]
    whole = NamedSharding(mesh, PartitionSpec())
    return cast(Any, jax.sharding).auto_axes(run, out_sharding=(results, whole))


def _parts(part: Any, mesh: AbstractMesh) -> int:
    return math.prod(mesh.shape[name] for name in axis_names(part))


def axis_names(part: Any) -> tuple[str, ...]:
    """Returns the axes of a mesh that one part of a spec names."""
    return (
        cast("tuple[str, ...]", part) if isinstance(part, tuple) else (part,) if isinstance(part, str) else ()
    )


def _axes(recipe: Recipe, specs: Sequence[Sequence[Any]], shapes: Mapping[Path, Shape]) -> list[Any]:
    """Returns the axes of a mesh that each dimension of a value is divided over, None for no axis."""
    match recipe:
        case recipes.Read(path):
            spec = specs[cast(int, path[0])]
            return [*spec, *[None] * (len(shapes[path]) - len(spec))]
        case recipes.Fill(shape):
            return [None] * len(shape)
        case recipes.Stack(parts, _) | recipes.Concat(parts, _):
            own = _axes(parts[0], specs, shapes)
        case _:
            own = _axes(recipe.source, specs, shapes)
    match recipe:
        case recipes.Stack(_, axis):
            return [*own[:axis], None, *own[axis:]]
        case recipes.Index(_, axis, _):
            return [*own[:axis], *own[axis + 1 :]]
        case recipes.Transpose(_, permutation):
            return [own[axis] for axis in permutation]
        case recipes.Reshape(source, shape):
            before = recipes.shape_of(source, shapes)
            same = next((at for at in range(len(shape)) if before[: at + 1] != shape[: at + 1]), len(shape))
            # The first dimension that differs is cut, or joined, at its end.
            return [*own[: same + 1], *[None] * len(shape)][: len(shape)]
        case _:
            return own


def _numbered(asked: Sequence[Asked]) -> tuple[list[Path], tuple[Asked, ...]]:
    """Returns the paths that are read, and what is asked with their numbers in their place."""
    paths = list(dict.fromkeys(path for one in asked for path in recipes.reads(one.recipe)))
    numbers = {path: recipes.Read((number,)) for number, path in enumerate(paths)}
    patterns = (
        dataclasses.replace(one, recipe=recipes.substitute(one.recipe, numbers.__getitem__)) for one in asked
    )
    return paths, tuple(patterns)


def _on_host(pattern: Recipe, sources: Sequence[Any], dtype: Any) -> Any:
    with np.errstate(all="ignore"):
        plain, computed = _values(np, pattern, sources, dtype)
        if _can_lose(pattern, plain, dtype):
            refuse_lost(plain, computed, dtype)
        return _cast(computed, dtype)


@functools.lru_cache(maxsize=512)
def _compiled(asked: tuple[Asked, ...]) -> Callable[..., tuple[list[jax.Array], list[Loss | None]]]:
    def run(*sources: jax.Array) -> tuple[list[jax.Array], list[Loss | None]]:
        computed = [_computed(one, sources) for one in asked]
        return [value for value, _ in computed], [loss for _, loss in computed]

    return cast("Callable[..., Any]", jax.jit(run, out_shardings=([one.sharding for one in asked], None)))


def _computed(asked: Asked, sources: Sequence[jax.Array]) -> tuple[jax.Array, Loss | None]:
    plain, computed = _values(jnp, asked.recipe, sources, asked.dtype)
    loss = _loss(plain, computed, asked.dtype) if _can_lose(asked.recipe, plain, asked.dtype) else None
    return _cast(computed, asked.dtype), loss


def _can_lose(recipe: Recipe, plain: Any, dtype: Any) -> bool:
    return not is_key(dtype) and (computes(recipe) or not holds(dtype, plain.dtype))


def _loss(plain: jax.Array, computed: jax.Array, dtype: Any) -> Loss:
    lost = lost_values(plain, computed, dtype)
    shown = abs(plain) if jnp.iscomplexobj(plain) else plain
    shown = jnp.where(lost, shown, jnp.zeros_like(shown))
    most, least = jnp.max(shown, initial=0), jnp.min(shown, initial=0)
    return lost.any(), jnp.where(most != 0, most, least)


def _cast(value: Any, dtype: Any) -> Any:
    return value if is_key(dtype) or value.dtype == dtype else value.astype(dtype)


def _values(xp: Any, recipe: Recipe, sources: Sequence[Any], dtype: Any) -> tuple[Any, Any]:
    """Returns a recipe's value without its arithmetic, and with it, both before the last cast."""
    plain = _value(xp, without_arithmetic(recipe), sources, dtype)
    if not computes(recipe):
        return plain, plain
    wide = wide_dtype(*(source.dtype for source in sources), dtype)
    return plain, _value(xp, recipe, [source.astype(wide) for source in sources], wide)


def _value(xp: Any, recipe: Recipe, sources: Sequence[Any], dtype: Any) -> Any:
    match recipe:
        case recipes.Read(path):
            return sources[cast(int, path[0])]
        case recipes.Fill(shape):
            return xp.zeros(shape, dtype)
        case recipes.Stack(parts, axis):
            return xp.stack([_value(xp, part, sources, dtype) for part in parts], axis)
        case recipes.Concat(parts, axis):
            return xp.concatenate([_value(xp, part, sources, dtype) for part in parts], axis)
        case _:
            return _applied(xp, recipe, _value(xp, recipe.source, sources, dtype), dtype)


def _applied(xp: Any, recipe: recipes.OneSource, value: Any, dtype: Any) -> Any:
    """Returns what the outermost step of a recipe makes of its source's value."""
    match recipe:
        case recipes.Index(_, axis, index):
            return value[(*[slice(None)] * axis, index)]
        case recipes.Slice(_, axis, start, size):
            return value[(*[slice(None)] * axis, slice(start, start + size))]
        case recipes.Transpose(_, permutation):
            return xp.transpose(value, permutation)
        case recipes.Reshape(_, shape):
            return xp.reshape(value, shape)
        case recipes.Repeat(_, axis, count):
            return xp.repeat(value, count, axis)
        case recipes.Scale(_, factor):
            return compute(value, [Arithmetic(factor=factor)], dtype)
        case recipes.Add(_, constant):
            return compute(value, [Arithmetic(constant=constant)], dtype)
