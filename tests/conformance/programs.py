"""Programs with one item and a handler by itself; each returns all that its caller can see."""

import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers as th

from tests.conformance.items import ITEMS, Box, params, sharded, train_state
from tests.conformance.kits import Kit, saved

Program = Callable[[Kit, Any], Any]
PyTreeRestore, PyTreeSave = ocp.args.PyTreeRestore, ocp.args.PyTreeSave
StandardRestore, StandardSave = ocp.args.StandardRestore, ocp.args.StandardSave


def abstract(tree: Any) -> Any:
    """Returns the target that Orbax's guides make of a tree; what has no shape stays."""
    return jax.tree.map(
        lambda leaf: leaf if isinstance(leaf, str) else ocp.utils.to_shape_dtype_struct(leaf), tree
    )


def comes_back(make: Callable[[], Any]) -> Program:
    """Saves an item and restores it in each way that needs no more than the item."""

    def program(kit: Kit, path: Any) -> Any:
        with saved(kit, path, make()) as handler:
            return {
                "whole": handler.restore(path),
                "like": handler.restore(path, args=PyTreeRestore(make())),
                "abstract": handler.restore(path, args=PyTreeRestore(abstract(make()))),
                "files": sorted(str(file.relative_to(path)) for file in path.glob("*")),
                "metadata": repr(handler.metadata(path).tree),
            }

    return program


def standard_comes_back(make: Callable[[], Any]) -> Program:
    """The same with `StandardSave` and `StandardRestore`, which take fewer kinds of leaves."""

    def program(kit: Kit, path: Any) -> Any:
        with ocp.Checkpointer(kit.standard()) as checkpointer:
            checkpointer.save(path, args=StandardSave(make()))
            return [
                checkpointer.restore(path, args=StandardRestore()),
                checkpointer.restore(path, args=StandardRestore(make())),
                checkpointer.restore(path, args=StandardRestore(abstract(make()))),
            ]

    return program


def restored(args: Callable[[], Any], tree: Callable[[], Any] = params, **options: Any) -> Program:
    """Saves a tree and restores it with args."""

    def program(kit: Kit, path: Any) -> Any:
        with saved(kit, path, tree(), **options) as handler:
            return handler.restore(path, args=args())

    return program


def _array_args(**changed: Any) -> Any:
    return jax.tree.map(lambda _: ocp.ArrayRestoreArgs(**changed), params())


def _other(**leaves: Any) -> dict[str, Any]:
    return {"dense": {**params(0.0)["dense"], **leaves}}


def _on_two_devices() -> Any:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("x",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))


PARTS: dict[str, Program] = {
    "placeholder": restored(lambda: PyTreeRestore(_other(bias=ocp.PLACEHOLDER))),
    "all placeholders": restored(lambda: PyTreeRestore(_other(kernel=ocp.PLACEHOLDER, bias=ocp.PLACEHOLDER))),
    "placeholder for a leaf that is not stored": restored(
        lambda: PyTreeRestore(_other(extra=ocp.PLACEHOLDER))
    ),
    "partial restore": restored(
        lambda: PyTreeRestore({"dense": {"bias": jnp.zeros(2)}}, partial_restore=True)
    ),
    "partial restore with args of the whole": restored(
        lambda: PyTreeRestore({"dense": {"bias": jnp.zeros(2)}}, _array_args(), partial_restore=True)
    ),
    "partial restore of a leaf that is not stored": restored(
        lambda: PyTreeRestore({"dense": {"extra": jnp.zeros(2)}}, partial_restore=True)
    ),
    "a part without partial restore": restored(lambda: PyTreeRestore({"dense": {"bias": jnp.zeros(2)}})),
    "more than is stored": restored(lambda: PyTreeRestore(_other(extra=jnp.zeros(2)))),
}
ARGS: dict[str, Program] = {
    "object leaves": restored(lambda: PyTreeRestore(_other(kernel=object()), _array_args())),
    "string leaves": restored(lambda: PyTreeRestore(_other(kernel="kernel"), _array_args())),
    "none leaves": restored(lambda: PyTreeRestore(_other(kernel=None), None)),
    "args without an item": restored(lambda: PyTreeRestore(restore_args=_array_args(dtype=jnp.bfloat16))),
    "args of another structure": restored(lambda: PyTreeRestore(params(), {"dense": ocp.ArrayRestoreArgs()})),
    "as numpy": restored(
        lambda: PyTreeRestore(
            params(), jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), params())
        )
    ),
    "numpy as jax": restored(
        lambda: PyTreeRestore(
            {"w": np.zeros(4)},
            {"w": ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=_on_two_devices())},
        ),
        lambda: {"w": np.arange(4.0)},
    ),
    "a number as int": restored(
        lambda: PyTreeRestore({"n": 0}, {"n": ocp.RestoreArgs(restore_type=int)}), lambda: {"n": 3.0}
    ),
    "cast": restored(lambda: PyTreeRestore(params(), _array_args(dtype=np.int32))),
    "sharded": restored(
        lambda: PyTreeRestore(
            {"w": jnp.zeros(4)}, {"w": ocp.ArrayRestoreArgs(sharding=_on_two_devices(), global_shape=(4,))}
        ),
        lambda: {"w": jnp.arange(4.0)},
    ),
    "another shape": restored(
        lambda: PyTreeRestore({"w": jnp.zeros(5)}, {"w": ocp.ArrayRestoreArgs(global_shape=(5,))}),
        lambda: {"w": jnp.arange(4.0)},
    ),
    "another shape, not strict": restored(
        lambda: PyTreeRestore(
            {"w": jnp.zeros(5)}, {"w": ocp.ArrayRestoreArgs(global_shape=(5,), strict=False)}
        ),
        lambda: {"w": jnp.arange(4.0)},
    ),
    "another type of node": restored(
        lambda: PyTreeRestore(Box(weight=jnp.zeros(2), bias=jnp.zeros(1))),
        lambda: {"weight": jnp.ones(2), "bias": jnp.ones(1)},
    ),
    "metadata for an item": lambda kit, path: _metadata_for_an_item(kit, path),
}
TRANSFORMS: dict[str, Program] = {
    "none": restored(lambda: PyTreeRestore(params(), _array_args(), transforms={})),
    "a new name": restored(
        lambda: PyTreeRestore(
            {"up": params()["dense"]},
            {"up": _array_args()["dense"]},
            transforms={r"up/(.*)": ocp.Transform(original_key=r"dense/\1")},
            transforms_default_to_original=True,
        )
    ),
    "a value by a function": restored(
        lambda: PyTreeRestore(
            params(),
            _array_args(),
            transforms={"dense": {"kernel": ocp.RestoreTransform(value_fn=lambda value: value * 2)}},
        )
    ),
    "what is not stored": restored(
        lambda: PyTreeRestore(
            _other(extra=jnp.full(1, 9.0)),
            {"dense": {**_array_args()["dense"], "extra": ocp.ArrayRestoreArgs()}},
            transforms={"dense": {"extra": ocp.Transform(use_fallback=True)}},
        )
    ),
    "without an item": restored(lambda: PyTreeRestore(transforms={})),
}


def _metadata_for_an_item(kit: Kit, path: Any) -> Any:
    with saved(kit, path, params()) as handler:
        return handler.restore(path, args=PyTreeRestore(handler.metadata(path)))


def _options(**options: Any) -> Program:
    return comes_back_with(train_state, **options)


def comes_back_with(make: Callable[[], Any], **options: Any) -> Program:
    """Saves and restores with keywords of the handler."""

    def program(kit: Kit, path: Any) -> Any:
        with saved(kit, path, make(), **options) as handler:
            names = sorted(file.name for file in path.glob("*"))
            return names, handler.restore(path), handler.restore(path, args=PyTreeRestore(abstract(make())))

    return program


def own_type_handlers() -> Any:
    """Returns a registry with Orbax's type handlers, as a user of it writes one."""
    return th.create_type_handler_registry(
        (int, th.ScalarHandler()), (np.ndarray, th.NumpyHandler()), (jax.Array, th.ArrayHandler())
    )


def _rich() -> Any:
    from orbax.checkpoint._src.metadata import tree  # Orbax documents the option, but exports no name for it.

    return tree.PyTreeMetadataOptions(support_rich_types=True)


OPTIONS: dict[str, Program] = {
    "zarr 2, file by file": _options(use_ocdbt=False),
    "zarr 3": _options(use_zarr3=True),
    "no compression": _options(use_compression=False),
    "narrow windows": _options(save_concurrent_gb=1, restore_concurrent_gb=1),
    "own type handlers": _options(type_handler_registry=own_type_handlers()),
    "rich types": _options(pytree_metadata_options=_rich()),
    "rich types and own type handlers": _options(
        pytree_metadata_options=_rich(), type_handler_registry=own_type_handlers()
    ),
    "a leaf without a type handler": lambda kit, path: _unknown_leaf(kit, path),
}


def _unknown_leaf(kit: Kit, path: Any) -> Any:
    with saved(kit, path, {"a": object()}):
        return None


def _older_forms(kit: Kit, path: Any) -> Any:
    with ocp.Checkpointer(kit.handler()) as checkpointer:
        checkpointer.save(path, {"n": np.arange(3), "s": "text", "f": 0.5})
        return [
            checkpointer.restore(path),
            checkpointer.restore(path, {"n": np.zeros(3), "s": "", "f": 0.0}),
            checkpointer.restore(
                path,
                item={"n": np.zeros(3), "s": "", "f": 0.0},
                restore_args={name: ocp.RestoreArgs() for name in "nsf"},
                transforms={},
            ),
        ]


def _saves_in_the_background(kit: Kit, path: Any) -> Any:
    values = np.arange(4.0)
    with ocp.AsyncCheckpointer(kit.handler()) as checkpointer:
        checkpointer.save(path, args=PyTreeSave({"w": values, "n": 3}))
        values[:] = -1
        checkpointer.wait_until_finished()
        return checkpointer.restore(path, args=PyTreeRestore({"w": np.zeros(4), "n": 0}))


def _fails_in_the_foreground(kit: Kit, path: Any) -> Any:
    with ocp.AsyncCheckpointer(kit.handler()) as checkpointer:
        checkpointer.save(path, args=PyTreeSave({"w": object()}))
        return checkpointer.wait_until_finished()


def _save_args(kit: Kit, path: Any) -> Any:
    args = jax.tree.map(lambda _: ocp.SaveArgs(dtype=np.dtype(np.float16)), params())
    with ocp.Checkpointer(kit.handler()) as checkpointer:
        checkpointer.save(path, args=PyTreeSave(params(), args, custom_metadata={"by": "me"}))
        stored = json.loads((path / "_METADATA").read_text())
        return checkpointer.restore(path), stored["custom_metadata"]


def _nothing_there(kit: Kit, path: Any) -> Any:
    return kit.handler().restore(path / "nowhere", args=PyTreeRestore(params()))


CALLS: dict[str, Program] = {
    "older calling forms": _older_forms,
    "a save in the background": _saves_in_the_background,
    "a save that cannot begin": _fails_in_the_foreground,
    "save args and metadata of the user": _save_args,
    "nothing there": _nothing_there,
    "arrays of several devices": comes_back(sharded),
    "the name in the checkpoint": lambda kit, _: kit.handler().typestr(),
}
PROGRAMS: dict[str, Program] = {
    **{f"item: {name}": comes_back(make) for name, make in ITEMS.items()},
    **{f"standard: {name}": standard_comes_back(make) for name, make in ITEMS.items()},
    **{f"part: {name}": program for name, program in PARTS.items()},
    **{f"args: {name}": program for name, program in ARGS.items()},
    **{f"transforms: {name}": program for name, program in TRANSFORMS.items()},
    **{f"options: {name}": program for name, program in OPTIONS.items()},
    **{f"calls: {name}": program for name, program in CALLS.items()},
}
