"""Arrays on a mesh with axes of `AxisType.Explicit`, whose shardings are part of their types.

Of such arrays, JAX refuses every operation whose result has no sharding that follows from theirs: to join
arrays of unlike shardings, to cut a dimension that is divided. So they are computed on the same mesh with
axes of the compiler's (`AxisType.Auto`), and what comes out lies on their own mesh again.
"""

import contextlib
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, cast

import jax
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
from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.planning.core.recipes import Recipe


@contextlib.contextmanager
def sharded_by_compiler(values: Sequence[Any]) -> Generator[tuple[list[Any], Mapping[Mesh, Mesh]]]:
    """Yields arrays for a jitted function that cuts and joins them anywhere, whatever their shardings.

    They are the same arrays on a mesh whose axes are the compiler's; nothing is copied.

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
        yield [on_mesh(value, meshes) for value in values], {new: mesh for mesh, new in meshes.items()}


def on_mesh(value: Any, meshes: Mapping[Mesh, Mesh]) -> Any:
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


def on_explicit_axes(
    run: Callable[..., Any], asked: Sequence[Recipe], sources: Sequence[Any]
) -> Callable[..., Any]:
    """Returns a function that computes recipes of traced arrays on such a mesh; of others, the one given.

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
    return math.prod(mesh.shape[name] for name in _names(part))


def _names(part: Any) -> tuple[str, ...]:
    """Returns the axes of a mesh that one part of a spec names."""
    return (
        cast("tuple[str, ...]", part) if isinstance(part, tuple) else (part,) if isinstance(part, str) else ()
    )


def is_explicit(sharding: Sharding | None) -> bool:
    """Tells a sharding over a mesh with axes of `AxisType.Explicit`."""
    return isinstance(sharding, NamedSharding) and AxisType.Explicit in sharding.mesh.axis_types


def placed(value: Any, sharding: Sharding) -> jax.Array:
    """Returns a traced array with a sharding."""
    if not isinstance(sharding, NamedSharding) or not is_explicit(sharding):
        return jax.lax.with_sharding_constraint(value, sharding)
    # A type tells how the array is divided over the explicit axes, a constraint how over the others.
    value = jax.device_put(value, _over(sharding, AxisType.Explicit))
    if AxisType.Auto not in sharding.mesh.axis_types:
        return value
    return jax.lax.with_sharding_constraint(value, _over(sharding, AxisType.Auto))


def _over(sharding: NamedSharding, kind: AxisType) -> NamedSharding:
    """Returns a sharding without the axes of other kinds."""
    kinds = dict(zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True))
    parts = [tuple(name for name in _names(part) if kinds[name] is kind) for part in sharding.spec]
    return NamedSharding(sharding.mesh, PartitionSpec(*parts), memory_kind=sharding.memory_kind)


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
