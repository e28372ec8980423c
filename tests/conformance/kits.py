"""What a program needs of Orbax, once from Orbax itself and once from this package."""

import contextlib
import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import v1 as ocp_v1

from orbax_nnx_handler import NNXLinenHandler, NNXLinenRestore, NNXLinenSave, handler_registry, v1


@dataclasses.dataclass(frozen=True)
class Kit:
    """One handler and what belongs to it.

    Attributes:
        handler: Makes a handler from the keywords of `ocp.PyTreeCheckpointHandler`.
        standard: Makes the handler of `StandardSave` and `StandardRestore`.
        save: Its save args, for a manager's `item_handlers`.
        restore: Its restore args.
        registry: Makes a registry in which Orbax's own args lead to the handler.
        context: Makes a context of `orbax.checkpoint.v1`.
    """

    handler: Callable[..., Any]
    standard: Callable[..., Any]
    save: Any
    restore: Any
    registry: Callable[[], Any]
    context: Callable[..., Any]


def _stock_registry() -> Any:
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    pytree, standard = ocp.PyTreeCheckpointHandler(), ocp.StandardCheckpointHandler()
    for kind in (ocp.args.PyTreeSave, ocp.args.PyTreeRestore):
        registry.add(None, kind, pytree)
    for kind in (ocp.args.StandardSave, ocp.args.StandardRestore):
        registry.add(None, kind, standard)
    return registry


STOCK = Kit(
    handler=ocp.PyTreeCheckpointHandler,
    standard=ocp.StandardCheckpointHandler,
    save=ocp.args.PyTreeSave,
    restore=ocp.args.PyTreeRestore,
    registry=_stock_registry,
    context=ocp_v1.Context,
)
OURS = Kit(
    handler=NNXLinenHandler,
    standard=NNXLinenHandler,
    save=NNXLinenSave,
    restore=NNXLinenRestore,
    registry=handler_registry,
    context=lambda base=None: v1.context(base=base),
)


def outcome(program: Callable[[Kit, Any], Any], kit: Kit, path: Any) -> Any:
    """Runs a program and returns what it gave, or what it raised, in a form that compares."""
    try:
        return ("returned", _plain(described(program(kit, path)), path))
    except Exception as error:  # What is raised is a part of what is compared.
        return ("raised", type(error).__name__, _plain(str(error), path))


def described(value: Any) -> Any:
    """Returns a value with its types, dtypes, shardings and bits, as plain data."""
    leaves, structure = jax.tree.flatten(value, is_leaf=lambda node: node is None)
    return str(structure), [_leaf(leaf) for leaf in leaves]


def _leaf(leaf: Any) -> Any:
    kind = type(leaf).__name__
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return kind, str(leaf.dtype), np.asarray(jax.random.key_data(leaf)).tolist()
    if isinstance(leaf, jax.Array):
        # Of several processes, each tells of its own parts.
        parts = [np.asarray(shard.data).tobytes().hex() for shard in leaf.addressable_shards]
        return kind, str(leaf.dtype), leaf.shape, str(leaf.sharding), parts
    if isinstance(leaf, np.ndarray | np.generic):
        return kind, str(leaf.dtype), leaf.shape, leaf.tobytes().hex()
    if leaf is ocp.PLACEHOLDER:
        return "PLACEHOLDER"
    return kind, repr(leaf)


def _plain(value: Any, path: Any) -> Any:
    """Returns plain data without what differs from run to run: paths, addresses, seconds."""
    if isinstance(value, list | tuple):
        return [_plain(part, path) for part in value]
    if isinstance(value, str):
        return re.sub(r"0x[0-9a-f]+|\d+(\.\d+)? ?s(econds)?\b", "", value.replace(str(path), "PATH"))
    return value


@contextlib.contextmanager
def saved(kit: Kit, path: Any, tree: Any, **options: Any) -> Any:
    """Gives a handler of the kit, after it has saved a tree to a path."""
    handler = kit.handler(**options)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(tree))
        yield handler
