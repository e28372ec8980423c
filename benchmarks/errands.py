"""What is timed besides restores: verdicts on broken checkpoints, and saves.

As with contestants: prepared outside the clock, timed, then checked.
"""

import dataclasses
import functools
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding

from benchmarks.contestants import Trial, orbax, ours
from benchmarks.models import PROJECTIONS, Model, check, params, target


def verdict(model: Model, path: pathlib.Path, sharding: Sharding) -> Trial:
    """From the call to the error, for a checkpoint that lacks the last layer."""
    from orbax_nnx_handler import MissingParamError, restore

    wanted = target(dataclasses.replace(model, layers=model.layers + 1), sharding)

    def run() -> Any:
        try:
            restore(path, wanted)
        except MissingParamError as error:
            return error
        raise AssertionError("a checkpoint that lacks a layer was restored")

    def collect(error: Any) -> None:
        assert set(error.paths) == {("layers", model.layers, name, "kernel") for name in PROJECTIONS}, error

    return run, collect


def read_then_check(model: Model, path: pathlib.Path, sharding: Sharding) -> Trial:
    """The same verdict without a plan: stock Orbax reads everything, then the paths are compared."""
    restore, collect_tree = orbax(model, path, sharding)
    wanted = {
        key
        for key, _ in nnx.to_flat_state(target(dataclasses.replace(model, layers=model.layers + 1), sharding))
    }

    def run() -> Any:
        tree = jax.block_until_ready(restore())
        return wanted - set(collect_tree(tree) or ())

    def collect(missing: Any) -> None:
        assert len(missing) == len(PROJECTIONS), missing

    return run, collect


def _state_and_tree(model: Model, path: pathlib.Path, sharding: Sharding) -> tuple[Any, Any]:
    """Returns the values as an NNX state and as the Linen tree, each by its own reader.

    Every save has both made before and keeps both: either reader loads what its own save would have to load
    otherwise, and memory that is given back is there for the save to use.
    """
    return ours(model, path, sharding)[0](), orbax(model, path, sharding)[0]()


def _new(path: pathlib.Path, by: str) -> pathlib.Path:
    out = path.with_name(f"{path.name}-saved-by-{by}")
    shutil.rmtree(out, ignore_errors=True)
    return out


def save_ours(model: Model, path: pathlib.Path, sharding: Sharding) -> Trial:
    """`orbax_nnx_handler.save` of an NNX state in the Linen layout."""
    from orbax_nnx_handler import save

    both = _state_and_tree(model, path, sharding)
    out = _new(path, "us")
    return lambda: save(out, both[0]), lambda _: _compare(model, path, out)


def save_orbax(model: Model, path: pathlib.Path, sharding: Sharding) -> Trial:
    """The parent handler saves the same values as the Linen tree they came from."""
    import orbax.checkpoint as ocp

    both = _state_and_tree(model, path, sharding)
    out = _new(path, "orbax")

    def run() -> None:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            checkpointer.save(out, args=ocp.args.PyTreeSave(both[1]))

    return run, lambda _: _compare(model, path, out)


def begin_ours(model: Model, path: pathlib.Path, sharding: Sharding) -> Trial:
    """How long `CheckpointManager.save` keeps a training loop: until it writes in the background."""
    from orbax_nnx_handler import NNXLinenHandler, NNXLinenSave

    both = _state_and_tree(model, path, sharding)
    return _begin(model, path, _new(path, "us"), NNXLinenHandler(), lambda: NNXLinenSave(both[0]))


def begin_orbax(model: Model, path: pathlib.Path, sharding: Sharding) -> Trial:
    """The same with the parent handler, of the Linen tree."""
    import orbax.checkpoint as ocp

    both = _state_and_tree(model, path, sharding)
    handler = ocp.PyTreeCheckpointHandler()
    return _begin(model, path, _new(path, "orbax"), handler, lambda: ocp.args.PyTreeSave(both[1]))


def _begin(
    model: Model, path: pathlib.Path, out: pathlib.Path, handler: Any, args: Callable[[], Any]
) -> Trial:
    import orbax.checkpoint as ocp

    manager = ocp.CheckpointManager(out, item_handlers=handler)

    def collect(_: Any) -> None:
        manager.close()  # Waits for what is written.
        _compare(model, path, out / "0" / "default")
        shutil.rmtree(out)

    return lambda: manager.save(0, args=args()), collect


def _compare(model: Model, path: pathlib.Path, out: pathlib.Path) -> None:
    """Reads a save back with stock Orbax and compares every value with the original."""
    import orbax.checkpoint as ocp

    metadata = ocp.PyTreeCheckpointHandler().metadata(out).tree
    args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata)
    tree = ocp.PyTreeCheckpointer().restore(out, restore_args=args)
    flat = jax.tree_util.tree_flatten_with_path(tree["params"])[0]
    arrays = {_numbered(tuple(key.key for key in keys)): value for keys, value in flat}
    check(model, path, arrays)
    shutil.rmtree(out)


def _numbered(key: tuple[str, ...]) -> tuple[Any, ...]:
    layer, *rest = key
    return ("layers", int(layer.removeprefix("layers_")), *rest)


def from_linen(
    model: Model, _: pathlib.Path, sharding: Sharding, *, warm: bool = True, on_host: bool = False
) -> Trial:
    """`orbax_nnx_handler.from_linen` of the parameters in memory; once before, so that all is compiled."""
    from orbax_nnx_handler import from_linen

    tree, wanted = _in_memory(model, on_host=on_host), target(model, sharding)

    def run() -> Any:
        return from_linen(tree, wanted)

    kept = jax.block_until_ready(run()) if warm else None
    return _fresh(run, kept), lambda state: {key: leaf.get_value() for key, leaf in nnx.to_flat_state(state)}


def device_copy(model: Model, _: pathlib.Path, __: Sharding, *, on_host: bool = False) -> Trial:
    """A copy of every parameter in memory, on the device or to it."""
    tree = _in_memory(model, on_host=on_host)

    def run() -> Any:
        # A plain `device_put` of NumPy's memory may share it, which is no copy.
        return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)

    return _fresh(run, jax.block_until_ready(run())), lambda _: None


def _fresh(run: Callable[[], Any], _: Any) -> Callable[[], Any]:
    """Returns what runs while the result of the run before is kept: else its memory would be used again."""
    return lambda _kept=_: run()


def _in_memory(model: Model, *, on_host: bool) -> dict[str, Any]:
    tree = {"params": params(model, [model.values(number) for number in range(model.layers)])}
    return jax.block_until_ready(jax.tree.map(np.array, tree) if on_host else tree)


ERRANDS: dict[str, Callable[[Model, pathlib.Path, Sharding], Trial]] = {
    "verdict": verdict,
    "read_then_check": read_then_check,
    "save_ours": save_ours,
    "save_orbax": save_orbax,
    "begin_ours": begin_ours,
    "begin_orbax": begin_orbax,
    "from_linen": from_linen,
    "from_linen, first call": functools.partial(from_linen, warm=False),
    "from_linen, NumPy": functools.partial(from_linen, on_host=True),
    "copy": device_copy,
    "copy, NumPy": functools.partial(device_copy, on_host=True),
}
