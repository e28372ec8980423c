"""Whether a restore was asked to read what several processes hold alike on one of them only.

It can be asked for here (`single_replica=True`) and in each of Orbax's own ways: restore args
of a leaf, a `SingleReplicaArrayHandler` among a handler's type handlers, and one that is
registered for all handlers.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from orbax_nnx_handler.planning.paths import Path


def is_single_replica(type_handlers: Any = None) -> bool:
    """Tells whether arrays are read by Orbax's own single-replica handler.

    Args:
        type_handlers: A registry of type handlers; None for the one of all handlers.
    """
    look_up = ocp.type_handlers.get_type_handler if type_handlers is None else type_handlers.get
    try:
        handler: Any = look_up(jax.Array)
    except ValueError:  # Nothing is registered for arrays.
        return False
    # A subclass may read in its own way, which only Orbax's reader honours.
    return type(handler) is ocp.type_handlers.SingleReplicaArrayHandler


def single_replica_leaves(everywhere: bool, restore_args: Mapping[Path, Any]) -> Callable[[Path], bool]:
    """Returns what tells whether a wanted leaf is to be read by one process of several.

    Args:
        everywhere: Whether it was asked for all leaves.
        restore_args: Restore args by wanted path.
    """
    if everywhere or is_single_replica():
        return lambda _: True
    asked = {
        path
        for path, args in restore_args.items()
        if isinstance(args, ocp.type_handlers.SingleReplicaArrayRestoreArgs)
    }
    return asked.__contains__
