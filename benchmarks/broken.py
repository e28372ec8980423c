"""The ways in which a target and a checkpoint can differ, each with the verdict that it must get.

The checkpoint stays as `benchmarks.models` writes it; the target is what is
broken. So one checkpoint serves them all.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx
from jax.sharding import Sharding

import orbax_nnx_handler as library
from benchmarks.contestants import Contestant, Trial
from benchmarks.models import DTYPES, PROJECTIONS, Model
from orbax_nnx_handler import restore

Leaf = tuple[tuple[Any, ...], type[Any], tuple[int, ...]]
"""Path, Variable type and shape of a wanted leaf."""

_AUTOMATIC = {name: f"Dense_{at}" for at, name in enumerate(PROJECTIONS)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Broken:
    """A target that does not fit, and what the error must say.

    Attributes:
        leaves: The target.
        error: The error's type.
        count: How many paths it lists.
        unexpected: What to do about stored leaves that the target does not want.
    """

    leaves: list[Leaf]
    error: type[library.RestoreError]
    count: int
    unexpected: str = "warn"


def _projections(layers: int) -> Iterator[tuple[int, str]]:
    return ((layer, name) for layer in range(layers) for name in PROJECTIONS)


def _fitting(model: Model) -> list[Leaf]:
    shape = (model.width, model.width)
    return [
        (("layers", layer, name, "kernel"), nnx.Param, shape) for layer, name in _projections(model.layers)
    ]


def _a_layer(model: Model) -> Broken:
    more = dataclasses.replace(model, layers=model.layers + 1)
    return Broken(leaves=_fitting(more), error=library.MissingParamError, count=len(PROJECTIONS))


def _a_leaf(model: Model) -> Broken:
    one = (("layers", 0, "gate", "kernel"), nnx.Param, (model.width, model.width))
    return Broken(leaves=[*_fitting(model), one], error=library.MissingParamError, count=1)


def _shapes(model: Model) -> Broken:
    leaves = _fitting(dataclasses.replace(model, width=model.width + 1))
    return Broken(leaves=leaves, error=library.ShapeMismatchError, count=len(leaves))


def _renamed(model: Model, path: Callable[[tuple[Any, ...]], tuple[Any, ...]]) -> Broken:
    leaves = [(path(key), kind, shape) for key, kind, shape in _fitting(model)]
    return Broken(leaves=leaves, error=library.MissingParamError, count=len(leaves))


def _layers_renamed(model: Model) -> Broken:
    return _renamed(model, lambda key: ("blocks", *key[1:]))


def _one_layer_renamed(model: Model) -> Broken:
    leaves = [
        (("first", *key[2:]) if key[1] == 0 else key, kind, shape) for key, kind, shape in _fitting(model)
    ]
    return Broken(leaves=leaves, error=library.MissingParamError, count=len(PROJECTIONS))


def _names(model: Model) -> Broken:
    return _renamed(model, lambda key: (f"Block_{key[1]}", _AUTOMATIC[key[2]], "weight"))


def _flat_names(model: Model) -> Broken:
    return _renamed(model, lambda key: (f"{key[2]}{key[1]}x",))


def _deep_names(model: Model) -> Broken:
    digits = "{:05d}".format
    return _renamed(model, lambda key: (*(f"level{d}" for d in digits(key[1])), *key[2:]))


def _another_model(model: Model) -> Broken:
    leaves = [
        ((f"stage{layer % 7}", layer // 7, f"unit_{name}", "scale"), nnx.Param, (3, 5 + layer % 11))
        for layer, name in _projections(model.layers)
    ]
    return Broken(leaves=leaves, error=library.MissingParamError, count=len(leaves))


def _optimizer(model: Model) -> Broken:
    weights = _fitting(model)
    moments = [
        (("optimizer", "opt_state", 0, slot, *path), nnx.optimizer.OptArray, shape)
        for slot in ("mu", "nu")
        for path, _, shape in weights
    ]
    leaves = [*(((("model", *path), kind, shape)) for path, kind, shape in weights), *moments]
    return Broken(leaves=leaves, error=library.MissingParamError, count=len(moments))


def _collection(model: Model) -> Broken:
    means = [
        (("layers", layer, "norm", "mean"), nnx.BatchStat, (model.width,)) for layer in range(model.layers)
    ]
    return Broken(leaves=[*_fitting(model), *means], error=library.MissingParamError, count=len(means))


def _layers_more(model: Model) -> Broken:
    fewer = dataclasses.replace(model, layers=max(1, model.layers // 2))
    left = (model.layers - fewer.layers) * len(PROJECTIONS)
    return Broken(leaves=_fitting(fewer), error=library.UnexpectedParamError, count=left, unexpected="error")


def _scanned(model: Model) -> Broken:
    shape = (model.width, model.layers, model.width + 1)
    leaves: list[Leaf] = [(("layers", name, "kernel"), nnx.Param, shape) for name in PROJECTIONS]
    return Broken(leaves=leaves, error=library.MissingParamError, count=len(leaves))


WAYS: dict[str, Callable[[Model], Broken]] = {
    "a layer is missing": _a_layer,
    "a leaf is missing": _a_leaf,
    "all shapes differ": _shapes,
    "the layers have another name": _layers_renamed,
    "one layer has another name": _one_layer_renamed,
    "all names differ": _names,
    "all names differ, one level": _flat_names,
    "all names differ, deep": _deep_names,
    "another model": _another_model,
    "no optimizer": _optimizer,
    "no batch_stats": _collection,
    "half of the layers unexpected": _layers_more,
    "scanned in the target only": _scanned,
}
"""Each way that a target can differ from a checkpoint of layers one by one."""


def target_of(broken: Broken, model: Model, sharding: Sharding | None = None) -> nnx.State:
    """Returns the abstract NNX state of a broken target."""
    dtype = DTYPES[model.dtype]
    return nnx.from_flat_state(
        [
            (path, kind(jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)))
            for path, kind, shape in broken.leaves
        ]
    )


def _contestant(way: str) -> Contestant:
    def prepare(model: Model, path: pathlib.Path, sharding: Sharding) -> Trial:
        broken = WAYS[way](model)
        wanted = target_of(broken, model, sharding)

        def run() -> library.RestoreError:
            try:
                restore(path, wanted, unexpected=broken.unexpected)  # type: ignore[arg-type]
            except library.RestoreError as error:
                return error
            raise AssertionError(f"a checkpoint was restored although {way}")

        def collect(error: library.RestoreError) -> None:
            assert isinstance(error, broken.error), error
            assert len(error.paths) == broken.count, f"{len(error.paths)} of {broken.count}: {error}"

        return run, collect

    return prepare


VERDICTS: dict[str, Contestant] = {way: _contestant(way) for way in WAYS}
"""From the call to the error, for each way."""
