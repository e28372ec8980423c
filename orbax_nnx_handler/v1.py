"""The handler for `orbax.checkpoint.v1`: Linen checkpoints into NNX state, and back.

    from orbax.checkpoint import v1 as ocp
    from orbax_nnx_handler import v1

    with v1.context(policy="error"):
        state = ocp.load(path, nnx.eval_shape(make_train_state))
        ocp.save(path, state)

Orbax 1.0 will put this interface at the top level of `orbax.checkpoint`; until then it lies
under `orbax.checkpoint.v1`, which is whole since Orbax 0.12.

Orbax builds a handler of its own accord, from its class alone, so the options
belong to the class: `configured` returns one that carries them.
"""

import dataclasses
import json
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar, get_args

from etils import epath

from orbax_nnx_handler.api import restore_item
from orbax_nnx_handler.handler import Renames
from orbax_nnx_handler.orbax_interfaces import get_context
from orbax_nnx_handler.orbax_interfaces import v0 as ocp_v0
from orbax_nnx_handler.orbax_interfaces import v1 as ocp
from orbax_nnx_handler.planning.layouts import LayoutChoice
from orbax_nnx_handler.planning.options import (
    DtypeChoice,
    Policies,
    RestoreOptions,
    SingleReplica,
    UnexpectedPolicy,
    check_choice,
)
from orbax_nnx_handler.planning.restore_plan import RestoreReport
from orbax_nnx_handler.storage.saving import as_save_item, linen_save
from orbax_nnx_handler.storage.saving.arrange import Flavour, Transformation, is_nnx
from orbax_nnx_handler.storage.stores.locations import check_writable, is_url

_TREE_FILE = "_METADATA"


class NNXLinenHandler:
    """Reads Linen checkpoints into NNX state and writes NNX state as Linen would.

    An `ocp.handlers.CheckpointableHandler` in the place of `ocp.handlers.PyTreeHandler`,
    which still does everything that holds no NNX object.

    ```python
    with v1.context(policy="error"):
        state = ocp_v1.load(path / "1200", target, checkpointable_name="default")
    ```

    Attributes:
        options: How checkpoints are read.
        save_layout: The layout in which NNX state is written.
        tx: The optimizer's transformation, for bare `nnx.State`s; see `NNXLinenSave`.
        primary_host: The process that writes an item's metadata, or None for each.
        report: What the last restore of this class did, or None.
    """

    options: ClassVar[RestoreOptions] = RestoreOptions.of()
    save_layout: ClassVar[Flavour] = "linen"
    tx: ClassVar[Transformation | None] = None
    primary_host: ClassVar[int | None] = 0
    report: ClassVar[RestoreReport | None] = None

    def __init__(self, **pytree_handler_options: Any):
        """Creates a handler, as Orbax does for each call.

        Args:
            **pytree_handler_options: Keywords of `ocp.handlers.PyTreeHandler`.
        """
        self._stock_options = pytree_handler_options
        self._context: ocp.Context = pytree_handler_options.get("context") or get_context()

    def is_handleable(self, checkpointable: Any) -> bool:
        """Tells whether a value can be saved."""
        return is_nnx(checkpointable) or self._stock().is_handleable(checkpointable)

    def is_abstract_handleable(self, abstract_checkpointable: Any) -> bool:
        """Tells whether a target can be restored into."""
        return is_nnx(abstract_checkpointable) or self._stock().is_abstract_handleable(
            abstract_checkpointable
        )

    async def save(self, directory: Any, checkpointable: Any) -> Awaitable[None]:
        """Takes the values to be saved; the returned awaitable writes them.

        Args:
            directory: The item directory, which Orbax is about to create.
            checkpointable: NNX state, written in the layout of a Linen program, or a
                pytree, written as it is.
        """
        in_folders = not self._context.array_options.saving.use_ocdbt and not is_url(directory.path)
        renames = self.options.renames
        if is_nnx(checkpointable):
            check_writable(epath.Path(directory.path))
        else:
            renames = ()  # Of what Orbax restores, they change nothing.
        arguments = linen_save(
            ocp_v0.args.PyTreeSave(as_save_item(checkpointable)),
            self.save_layout,
            self.tx,
            renames,
            in_folders=in_folders,
        )
        writing = await self._stock().save(directory, arguments.item)
        return self._finish(directory, writing, arguments.custom_metadata)

    async def load(self, directory: Any, abstract_checkpointable: Any = None) -> Awaitable[Any]:
        """Restores an item.

        Args:
            directory: The item directory.
            abstract_checkpointable: The NNX target. Anything else is restored as
                Orbax does it.

        Returns:
            An awaitable of the target's own type.
        """
        if not is_nnx(abstract_checkpointable):
            return await self._stock().load(directory, abstract_checkpointable)
        return self._restore(epath.Path(directory), abstract_checkpointable)

    async def metadata(self, directory: Any) -> Any:
        """Returns the stored tree, as Orbax describes it."""
        return await self._stock().metadata(directory)

    async def _restore(self, directory: epath.Path, target: Any) -> Any:
        options, loading = self.options, self._context.array_options.loading
        if loading.use_load_and_broadcast and not isinstance(options.single_replica, SingleReplica):
            asked = loading.load_and_broadcast_options
            chosen = SingleReplica(
                replica_axis_index=asked.replica_axis_index,
                broadcast_memory_limit_bytes=asked.broadcast_memory_limit_bytes,
            )
            options = dataclasses.replace(options, single_replica=chosen)
        limit = self._context.memory_options.read_concurrent_bytes
        result, report = restore_item(directory, target, None, options, concurrent_bytes=limit)
        type(self).report = report
        return result

    def _stock(self) -> Any:
        # Made anew for each call: it takes its settings from the context in force.
        return ocp.handlers.PyTreeHandler(**self._stock_options)

    async def _finish(self, directory: Any, writing: Awaitable[None], custom_metadata: Any) -> None:
        """Waits until the tree is written, then adds what Orbax v1 gives a handler no way to pass."""
        await writing
        if custom_metadata is None or not ocp.multihost.is_primary_host(self.primary_host):
            return
        file = epath.Path(await directory.await_creation()) / _TREE_FILE
        content = json.loads(file.read_text())
        file.write_text(json.dumps(content | {"custom_metadata": custom_metadata}))


def configured(
    policy: Policies = "error",
    *,
    layout: LayoutChoice = "auto",
    renames: Renames = (),
    init: Callable[[], Any] | None = None,
    unexpected: UnexpectedPolicy = "warn",
    dtype: DtypeChoice = "target",
    single_replica: bool | SingleReplica = False,
    save_layout: Flavour = "linen",
    tx: Transformation | None = None,
    primary_host: int | None = 0,
) -> type[NNXLinenHandler]:
    """Returns a handler class with options of its own.

    ```python
    handler = v1.configured(policy="warn")
    settings = ocp_v1.Context()
    settings.checkpointables.registry = v1.registry(handler)
    with settings:
        state = ocp_v1.load(path / "1200", target, checkpointable_name="default")
    print(handler.report)
    ```

    Args:
        policy: What a missing weight becomes, or NNX filters that choose it.
        layout: How checkpoints are arranged; `auto` finds out.
        renames: Rules from stored to wanted names.
        init: Builds the target with real values, for `policy="init"`.
        unexpected: What to do about stored leaves that the target does not want.
        dtype: `target` casts to the target's dtypes, `stored` keeps the disk's.
        single_replica: Whether one process reads replicated data and copies it to the others over the mesh.
        save_layout: `linen` (Flax TrainState) or `maxtext`.
        tx: The optimizer's transformation, for bare `nnx.State`s.
        primary_host: As in the context's `multiprocessing_options`.

    Raises:
        ValueError: A value is none of the choices.
    """
    check_choice("save_layout", save_layout, get_args(Flavour))
    options = RestoreOptions(single_replica=single_replica or False).override(
        policy=policy, layout=layout, renames=renames, init=init, unexpected=unexpected, dtype=dtype
    )
    attributes = {"options": options, "save_layout": save_layout, "tx": tx, "primary_host": primary_host}
    # Orbax writes a handler's full name into the checkpoint. What is on disk is a plain PyTree checkpoint,
    # so the class goes by the stock handler's name there; another one makes every stock reader warn.
    stock = ocp.handlers.PyTreeHandler
    name = {"__module__": stock.__module__, "__qualname__": stock.__qualname__}
    return type(stock.__name__, (NNXLinenHandler,), attributes | name)


def registry(handler: type[NNXLinenHandler] | None = None) -> Any:
    """Returns Orbax's own registry with this handler in the place of `PyTreeHandler`.

    Args:
        handler: What `configured` returns; by default without options.

    Returns:
        An `ocp.handlers.CheckpointableHandlerRegistry`, for
        `ocp.Context().checkpointables.registry`.
    """
    replaced = ocp.handlers.PyTreeHandler
    ours = handler or configured()
    known: Any = ocp.handlers.global_registry()
    result = ocp.handlers.local_registry(include_global_registry=False)
    for kind, name in known.get_all_entries():
        result.add(
            ours if kind is replaced else kind,
            checkpointable_name=name,
            # The names of Orbax's older handlers, whose checkpoints are read as well.
            secondary_typestrs=known.get_secondary_typestrs(kind),
        )
    return result


def context(policy: Policies = "error", *, base: ocp.Context | None = None, **options: Any) -> ocp.Context:
    """Returns a context in which Orbax saves and loads NNX state in Linen's layout.

    ```python
    with v1.context(policy="warn", renames=[("decoder", "model")], base=ocp_v1.Context()):
        pass  # ocp_v1.load and ocp_v1.save
    ```

    Args:
        policy: What a missing weight becomes.
        base: A context whose other settings are kept. In the context in force,
            `memory.read_concurrent_bytes` bounds a restore's bytes under way, and
            `array.loading.use_load_and_broadcast` asks for `single_replica`.
        **options: The other options of `configured`.
    """
    made = ocp.Context(base)
    options.setdefault("primary_host", made.multiprocessing_options.primary_host)
    options.setdefault("single_replica", made.array_options.loading.use_load_and_broadcast)
    made.checkpointables.registry = registry(configured(policy, **options))
    return made
