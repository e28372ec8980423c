"""Models of any size and number of leaves: a Linen checkpoint and the NNX target it becomes."""

import dataclasses
import json
import math
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

PROJECTIONS = ("key", "out", "query", "value")
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

Arrangement = Literal["layers", "stacked"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A stack of layers with four square projections each.

    Attributes:
        layers: How many.
        width: Rows and columns of each projection.
        dtype: "float32" or "bfloat16".
        stored: Layers one by one (`layers_3`), or stacked on axis 1 as MaxText scans them.
        wanted: The same choice for the NNX target.
        compressed: Whether chunks are packed with zstd, Orbax's default.
        zarr3: Whether the arrays are Zarr 3.
        projections: How many of the four a layer has.
    """

    layers: int
    width: int
    dtype: str = "float32"
    stored: Arrangement = "layers"
    wanted: Arrangement = "layers"
    compressed: bool = False
    zarr3: bool = True
    projections: int = len(PROJECTIONS)

    @property
    def names(self) -> tuple[str, ...]:
        """The projections of a layer."""
        return PROJECTIONS[: self.projections]

    @property
    def leaves(self) -> int:
        """Number of stored arrays, the step included."""
        return 1 + self.projections * (self.layers if self.stored == "layers" else 1)

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters."""
        return self.layers * self.projections * self.width**2 * DTYPES[self.dtype].itemsize

    @property
    def name(self) -> str:
        """A directory name that tells the models on disk apart."""
        packed = "zstd" if self.compressed else "raw"
        version = "zarr3" if self.zarr3 else "zarr2"
        layers = f"{self.layers}x{self.width}" + ("" if self.names == PROJECTIONS else f"x{self.projections}")
        return f"{self.stored}-{layers}-{self.dtype}-{version}-{packed}"

    def values(self, layer: int) -> dict[str, np.ndarray]:
        """Returns one layer's projections; the same on every call and every machine."""
        random = np.random.default_rng(layer)
        shape = (self.width, self.width)
        dtype = DTYPES[self.dtype]
        return {name: random.standard_normal(shape, np.float32).astype(dtype) for name in self.names}

    def checksums(self) -> dict[str, int]:
        """Returns the checksum of every projection, made layer by layer."""
        return {
            f"{layer}/{name}": zlib.crc32(value.tobytes())
            for layer in range(self.layers)
            for name, value in self.values(layer).items()
        }


def sized(leaves: int, nbytes: int, **options: object) -> Model:
    """Returns the model with about so many leaves and bytes."""
    projections = int(str(options.get("projections", len(PROJECTIONS))))
    layers = max(1, round((leaves - 1) / projections))
    itemsize = DTYPES[str(options.get("dtype", "float32"))].itemsize
    width = max(4, int(math.sqrt(nbytes / (layers * projections * itemsize))) // 4 * 4)
    return Model(layers=layers, width=width, **options)  # type: ignore[arg-type]


def write(model: Model, root: pathlib.Path, shardings: Sharding | None = None) -> pathlib.Path:
    """Writes the model's checkpoint with stock Orbax, once; notes a checksum of every layer.

    Args:
        model: The model.
        root: The directory of all benchmark checkpoints.
        shardings: Where the parameters lie when saved, which decides the chunks.
    """
    path = root / model.name
    if (path / "checksums.json").exists():
        return path
    layers = [model.values(number) for number in range(model.layers)]
    tree = {"params": params(model, layers), "step": np.int32(7)}
    if shardings is not None:
        tree["params"] = jax.device_put(tree["params"], shardings)
    # Here, for a target of the command line is built without Orbax, as a user's is.
    import orbax.checkpoint as ocp

    handler = ocp.PyTreeCheckpointHandler(use_zarr3=model.zarr3, use_compression=model.compressed)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(tree), force=True)
    (path / "checksums.json").write_text(json.dumps(model.checksums()))
    return path


def params(model: Model, layers: list[dict[str, np.ndarray]]) -> dict[str, object]:
    """Returns the parameters as the Linen program has them, on the default device."""
    if model.stored == "layers":
        return {
            f"layers_{n}": {name: {"kernel": jnp.asarray(v)} for name, v in layer.items()}
            for n, layer in enumerate(layers)
        }
    stacked = {name: np.stack([layer[name] for layer in layers], 1) for name in model.names}
    return {"layers": {name: {"kernel": jnp.asarray(value)} for name, value in stacked.items()}}


def target(model: Model, sharding: Sharding) -> nnx.State:
    """Returns the abstract NNX state to restore into."""
    dtype = DTYPES[model.dtype]
    square = (model.width, model.width)
    if model.wanted == "layers":
        keys = [("layers", n, name, "kernel") for n in range(model.layers) for name in model.names]
        shape = square
    else:
        keys = [("layers", name, "kernel") for name in model.names]
        shape = (model.width, model.layers, model.width)
    leaf = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    return nnx.from_flat_state([(key, nnx.Param(leaf)) for key in keys])


def check(model: Model, path: pathlib.Path, arrays: dict[tuple[object, ...], jax.Array]) -> None:
    """Compares every value with what was saved.

    Args:
        model: The model.
        path: Its checkpoint.
        arrays: The restored arrays by NNX path.

    Raises:
        AssertionError: A value differs, or a leaf is absent.
    """
    found = found_checksums(model, arrays)
    differ = set(found.items()) ^ set(json.loads((path / "checksums.json").read_text()).items())
    assert not differ, f"{len(differ)} values differ in {path}"


def found_checksums(model: Model, arrays: Mapping[tuple[object, ...], Any]) -> dict[str, int]:
    """Returns the checksums of arrays by NNX path, of one layer each or of all layers stacked on axis 1."""
    found: dict[str, int] = {}
    for key, array in arrays.items():
        host = np.asarray(array)
        if len(key) == 4:
            found[f"{key[1]}/{key[2]}"] = zlib.crc32(np.ascontiguousarray(host).tobytes())
            continue
        for layer in range(model.layers):
            found[f"{layer}/{key[1]}"] = zlib.crc32(np.ascontiguousarray(host[:, layer]).tobytes())
    return found


def placement(kind: str) -> Sharding:
    """Returns where parameters live: on `one` device, or `sharded` (rows), `columns`, `replicated` on all."""
    if kind == "one":
        return NamedSharding(Mesh(np.array(jax.devices()[:1]), ("x",)), PartitionSpec())
    mesh = Mesh(np.array(jax.devices()), ("x",))
    specs = {"sharded": PartitionSpec("x"), "columns": PartitionSpec(None, "x")}
    return NamedSharding(mesh, specs.get(kind, PartitionSpec()))
