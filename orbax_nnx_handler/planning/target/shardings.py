"""Where each wanted leaf must live.

Order of decision, first that says something wins: the leaf's restore args, the
target's own leaf, the Variable's `out_sharding` metadata with the mesh in force,
the default. The default keeps a target in one place: replicated over the mesh
that the target's other leaves (or `jax.set_mesh`) use; with no mesh at all, the
first local device, or replicated over all devices when there are several hosts.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from orbax_nnx_handler.planning.core.dtypes import is_key
from orbax_nnx_handler.planning.core.errors import RestoreError, ShardingMismatchError
from orbax_nnx_handler.planning.core.folding import Row
from orbax_nnx_handler.planning.core.leaves import Shape, WantedLeaf
from orbax_nnx_handler.planning.core.lines import aligned, counted
from orbax_nnx_handler.planning.core.paths import Path, render

_KNOWN = (
    "a leaf's sharding is a jax.sharding.Sharding, such as NamedSharding(mesh, PartitionSpec()): pass that, "
    "ocp.ArrayRestoreArgs(sharding=..., dtype=...) or jax.ShapeDtypeStruct, with the target's shape or none."
)
# What restore args say of a leaf: those of Orbax, `MissingParamRestoreArgs` and jax.ShapeDtypeStruct.
_ASKED = ("sharding", "mesh_axes", "dtype", "policy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardingRule:
    """Decides the sharding of each leaf of one target.

    Attributes:
        mesh: The mesh in force or the one the target's leaves use, or None.
    """

    mesh: Mesh | None

    @classmethod
    def of(cls, values: Iterable[Any]) -> "ShardingRule":
        """Returns the placer of a target, given the values of its leaves, under the mesh in force."""
        current = mesh_in_force()
        if current is not None:
            return cls(mesh=current)
        meshes = (getattr(_own_sharding(value), "mesh", None) for value in values)
        return cls(mesh=next((mesh for mesh in meshes if isinstance(mesh, Mesh)), None))

    def place(self, node: Any, value: Any, override: Any) -> tuple[Sharding, bool]:
        """Returns the sharding of one leaf, and whether it is the default: nothing says where it lives.

        Args:
            node: The target's Variable or bare leaf.
            value: The value in it.
            override: The leaf's restore args, or None.

        Raises:
            RestoreError: The sharding names an abstract mesh and none is in force.
        """
        said = _override_sharding(override) if override is not None else None
        if said is None:
            said = _own_sharding(value)
        if said is None:
            said = self._annotated(node)
        if not isinstance(said, NamedSharding) or not isinstance(said.mesh, AbstractMesh):
            return (self._default, True) if said is None else (said, False)
        return (self._default, True) if said.mesh.empty else (self._concrete(said, said.mesh), False)

    def _annotated(self, node: Any) -> Sharding | None:
        if not isinstance(node, nnx.Variable) or not node.has_metadata("out_sharding"):
            return None
        if not node.get_metadata().get("out_sharding"):
            return None
        mesh = node.get_metadata().get("mesh") or self.mesh
        annotated: Any = nnx.get_partition_spec({"leaf": cast(Any, node)})
        spec: PartitionSpec | None = annotated["leaf"].get_value()
        return NamedSharding(mesh, spec) if mesh is not None and spec is not None else None

    def _concrete(self, sharding: NamedSharding, mesh: AbstractMesh) -> Sharding:
        if is_traced():  # There, the mesh of the values that will come is the abstract one.
            return sharding
        if self.mesh is None or tuple(self.mesh.shape.items()) != tuple(mesh.shape.items()):
            raise RestoreError(
                f"the target is sharded over the abstract mesh {dict(mesh.shape)}, "
                f"but the mesh in force is {dict(self.mesh.shape) if self.mesh else 'none'}.",
                hints=["restore under `with jax.set_mesh(mesh):`, with the mesh the target was built for."],
            )
        return NamedSharding(self.mesh, sharding.spec)

    @functools.cached_property
    def _default(self) -> Sharding:
        if self.mesh is not None:
            return NamedSharding(self.mesh, PartitionSpec())
        if jax.process_count() == 1:
            return SingleDeviceSharding(cast(Any, jax.local_devices())[0])
        return NamedSharding(Mesh(np.array(cast(Any, jax.devices())), ("hosts",)), PartitionSpec())


def mesh_in_force() -> Mesh | None:
    """Returns the mesh that `jax.set_mesh` has set; under `jax.jit` nobody knows it."""
    if is_traced():
        return None
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty else mesh


def is_abstract(sharding: Sharding | None) -> bool:
    """Tells whether a sharding names no devices: that of a mesh in force while `jax.jit` traces."""
    return isinstance(getattr(sharding, "mesh", None), AbstractMesh)


def is_traced() -> bool:
    """Tells whether JAX traces a program right now."""
    try:
        jax.sharding.get_mesh()
    except ValueError:  # "can only be used outside of `jax.jit`"
        return True
    return False


def indivisible(leaves: Iterable[WantedLeaf]) -> Iterator[ShardingMismatchError]:
    """Yields one error for all leaves that their shardings do not divide; nothing if all are divided.

    JAX finds it out when it makes the array: after the bytes were read, and without the leaf's name.
    """
    leaves = list(leaves)
    # By the sharding itself: to compare two takes longer, and a model has few of them.
    kinds = {(id(leaf.sharding), leaf.shape): leaf for leaf in leaves}
    bad_kinds = {kind for kind, leaf in kinds.items() if not _divides(leaf.sharding, leaf.shape)}
    if not bad_kinds:
        return
    bad = [leaf for leaf in leaves if (id(leaf.sharding), leaf.shape) in bad_kinds]
    rows = [Row(leaf.path, (f"{leaf.shape} {leaf.dtype}", _in_words(leaf.sharding))) for leaf in bad]
    count = "1 leaf" if len(bad) == 1 else f"{len(bad)} leaves"
    yield ShardingMismatchError(
        f"{count} cannot be divided over the devices as asked:\n{aligned(rows)}",
        paths=[leaf.path for leaf in bad],
        hints=["shard a dimension that the number of devices divides, or none: PartitionSpec()."],
    )


def _divides(sharding: Sharding | None, shape: Shape) -> bool:
    if sharding is None:
        return True
    try:
        sharding.shard_shape(shape)
    # A spec with more entries than the shape has dimensions is an IndexError.
    except (ValueError, IndexError):
        return False
    return not isinstance(sharding, NamedSharding) or len(sharding.spec) <= len(shape)


def _in_words(sharding: Any) -> str:
    if not isinstance(sharding, NamedSharding):
        return str(sharding)
    spec = ", ".join(map(repr, sharding.spec))
    return f"PartitionSpec({spec}) over {dict(sharding.mesh.shape)}"


def _own_sharding(value: Any) -> Sharding | None:
    sharding = getattr(value, "sharding", None)
    return sharding if isinstance(sharding, Sharding) else None


def check_overrides(overrides: Mapping[Path, Any], values: Mapping[Path, Any]) -> None:
    """Raises where restore args would not be kept to: nothing that they ask for is passed over.

    Raises:
        RestoreError: Some are for leaves that the target lacks, say nothing that is known, or ask for
            another shape.
    """
    strange = [path for path in overrides if path not in values]
    if strange:
        listed = "\n".join(f"  {render(path)}" for path in strange)
        raise RestoreError(
            f"restore_args has {counted(len(strange), 'leaf', 'leaves')} that the target lacks:\n{listed}",
            paths=strange,
            hints=["restore_args must mirror the target, for example jax.tree.map(make_args, target)."],
        )
    wrong = {path: said for path, args in overrides.items() if (said := _unknown(args, values[path]))}
    if wrong:
        rows = aligned([Row(path, (said,)) for path, said in wrong.items()])
        raise RestoreError(
            f"restore_args asks of {counted(len(wrong), 'leaf', 'leaves')} what is unknown:\n{rows}",
            paths=list(wrong),
            hints=[_KNOWN],
        )


def _unknown(args: Any, value: Any) -> str:
    """Returns what one leaf's restore args say that nobody would keep to; empty if there is nothing."""
    if not isinstance(args, Sharding) and not any(hasattr(args, name) for name in _ASKED):
        return repr(args)
    sharding, dtype = getattr(args, "sharding", None), getattr(args, "dtype", None)
    if sharding is not None and not isinstance(sharding, Sharding):
        return f"sharding={sharding!r}"
    axes: Any = getattr(args, "mesh_axes", None)
    if axes is not None and _override_sharding(args) is None:
        return f"mesh_axes={axes!r} without a mesh"
    try:
        np.dtype(None if is_key(dtype) else dtype)
    except TypeError:
        return f"dtype={dtype!r}"
    wanted: Any = getattr(value, "shape", None)
    for name in ("shape", "global_shape"):
        shape: Any = getattr(args, name, None)
        if None not in (shape, wanted) and tuple(shape) != tuple(wanted):
            return f"shape {tuple(shape)} for {tuple(wanted)}"
    return ""


def _override_sharding(override: Any) -> Sharding | None:
    sharding = override if isinstance(override, Sharding) else getattr(override, "sharding", None)
    if isinstance(sharding, Sharding):
        return sharding
    mesh, axes = getattr(override, "mesh", None), getattr(override, "mesh_axes", None)
    return NamedSharding(mesh, axes) if mesh is not None and axes is not None else None
