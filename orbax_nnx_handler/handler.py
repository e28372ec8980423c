"""The Orbax handler: restores Linen checkpoints into NNX, saves NNX in the Linen layout."""

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Generic, cast, overload

import jax
from etils import epath
from typing_extensions import TypeVar

from orbax_nnx_handler.api import restore_item
from orbax_nnx_handler.orbax_interfaces import v0 as ocp
from orbax_nnx_handler.planning.layouts import LayoutChoice
from orbax_nnx_handler.planning.options import (
    DtypeChoice,
    Policies,
    Policy,
    RestoreOptions,
    SingleReplica,
    UnexpectedPolicy,
    check_policy,
)
from orbax_nnx_handler.planning.restore_plan import RestoreReport
from orbax_nnx_handler.planning.rules import Rule
from orbax_nnx_handler.planning.target import is_unbuilt
from orbax_nnx_handler.storage.reading.single_replica import single_replica_of
from orbax_nnx_handler.storage.saving import RulesOrRestore, as_save_item, linen_save
from orbax_nnx_handler.storage.saving.arrange import Flavour, Transformation, is_nnx
from orbax_nnx_handler.storage.stores.locations import check_writable, is_url

ItemT = TypeVar("ItemT", default=Any)

Renames = Iterable[Rule | tuple[str, str]]


@dataclasses.dataclass
class MissingParamRestoreArgs(ocp.ArrayRestoreArgs):
    """Restore args of one leaf that also say what it becomes when it is missing.

    ```python
    restore_args = jax.tree.map(lambda leaf: MissingParamRestoreArgs(dtype=leaf.dtype, policy="warn"), target)
    state = restore(path, target, restore_args)
    ```

    Attributes:
        policy: `error`, `warn` or `init`; None leaves it to the restore's policy.
    """

    policy: Policy | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.policy is not None:
            check_policy(self.policy)


class NNXLinenHandler(ocp.PyTreeCheckpointHandler):
    """Reads Linen checkpoints into NNX state and writes NNX state as Linen would.

    A drop-in for `ocp.PyTreeCheckpointHandler`: what is on disk is a plain PyTree
    checkpoint that stock Orbax reads without this package, and an item without an NNX
    object is saved and restored by Orbax, its args untouched (docs/drop_in.md).

    ```python
    handler = NNXLinenHandler(policy="error")
    with ocp.CheckpointManager(path, item_handlers=handler) as manager:
        state = manager.restore(1200, args=NNXLinenRestore(target))
        manager.save(1300, args=NNXLinenSave(state))
    print(handler.report)
    ```

    Attributes:
        report: What the last restore did, or None.
    """

    report: RestoreReport | None

    def __init__(
        self,
        policy: Policies = "error",
        *,
        layout: LayoutChoice = "auto",
        renames: Renames = (),
        init: Callable[[], Any] | None = None,
        unexpected: UnexpectedPolicy = "warn",
        dtype: DtypeChoice = "target",
        single_replica: bool | SingleReplica = False,
        **pytree_handler_options: Any,
    ):
        """Creates a handler.

        Args:
            policy: What a missing weight becomes, or NNX filters that choose it.
            layout: How checkpoints are arranged; `auto` finds out.
            renames: Rules from stored to wanted names.
            init: Builds the target with real values, for `policy="init"`.
            unexpected: What to do about stored leaves that the target does not want.
            dtype: `target` casts to the target's dtypes, `stored` keeps the disk's.
            single_replica: Whether one process reads replicated data and copies it to the
                others over the mesh. Orbax's own ways of asking for it
                (`SingleReplicaArrayHandler`, `SingleReplicaArrayRestoreArgs`) work as well.
            **pytree_handler_options: Keywords of `ocp.PyTreeCheckpointHandler`.

        Raises:
            ValueError: A value is none of the choices.
        """
        super().__init__(**pytree_handler_options)
        self._standard = _Standard(self, pytree_handler_options)
        limit = pytree_handler_options.get("restore_concurrent_gb")
        own: Any = pytree_handler_options.get("type_handler_registry")
        asked = None if own is None else single_replica_of(own)
        self._reader = _reader(pytree_handler_options) if own is not None and asked is None else None
        self._in_folders = not pytree_handler_options.get("use_ocdbt", True)
        self._concurrent_bytes = None if limit is None else int(limit * 10**9)
        self._options = RestoreOptions(single_replica=single_replica or asked or False).override(
            policy=policy, layout=layout, renames=renames, init=init, unexpected=unexpected, dtype=dtype
        )
        self.report = None
        # Written into the checkpoint: the parent's name, so that any Orbax can read it. On the instance,
        # since Orbax's registry of handler classes refuses two classes of one name.
        self.typestr = ocp.PyTreeCheckpointHandler.typestr

    @overload
    def restore(self, directory: epath.Path, *, args: "NNXLinenRestore[ItemT]") -> ItemT: ...

    @overload
    def restore(self, directory: epath.Path, *args: Any, **kwargs: Any) -> Any: ...

    def restore(self, directory: epath.Path, *args: Any, **kwargs: Any) -> Any:
        """Restores an item; see `NNXLinenRestore` for what it takes.

        Args:
            directory: The item directory.
            *args: `item` and `restore_args`, in Orbax's older calling form.
            **kwargs: `args=NNXLinenRestore(...)` (or Orbax's own restore args), or
                `item` and `restore_args`.

        Returns:
            The item's own type; without an item, the stored tree as Orbax gives it.

        Raises:
            RestoreError: The checkpoint cannot become the item; nothing was read.
        """
        given = kwargs.get("args")
        wanted = _restore_args(given, args, kwargs)
        if not _is_ours(wanted, given):
            if isinstance(given, ocp.args.StandardRestore):
                return self._standard.restore(directory, given)
            return super().restore(directory, *args, **kwargs)
        _refuse_transforms(wanted)
        result, self.report = restore_item(
            epath.Path(directory),
            wanted.item,
            wanted.restore_args,
            wanted.options(self._options),
            concurrent_bytes=self._concurrent_bytes,
            orbax=self._reader,
        )
        return result

    async def async_save(self, directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Saves an item in the background; see `NNXLinenSave` for what it takes."""
        given = self._save_args(directory, args, kwargs)
        if isinstance(given, ocp.args.StandardSave):
            return await self._standard.async_save(directory, given)
        return await super().async_save(directory, args=given)

    def save(self, directory: epath.Path, *args: Any, **kwargs: Any) -> None:
        """Saves an item; see `NNXLinenSave` for what it takes."""
        given = self._save_args(directory, args, kwargs)
        if isinstance(given, ocp.args.StandardSave):
            self._standard.save(directory, given)
            return
        super().save(directory, args=given)

    def _save_args(self, directory: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns what stock Orbax is to save; undoes the handler's own rules where the save names none."""
        given = kwargs.get("args")
        if given is None:
            older = dict(zip(("item", "save_args"), args, strict=False)) | kwargs
            given = NNXLinenSave(older.get("item"), older.get("save_args"))
        own = isinstance(given, NNXLinenSave)
        undone = given.renames if own else None
        since = self.report if undone is None else None
        if undone is None:
            undone = self._options.renames if is_nnx(given.item) or (own and _are_arrays(given.item)) else ()
        if not is_nnx(given.item) and not undone:
            return given
        check_writable(epath.Path(directory))
        stock, in_folders = _as_pytree_save(given), self._in_folders and not is_url(directory)
        flavour, tx = (given.layout, given.tx) if own else ("linen", None)
        return linen_save(stock, flavour, tx, undone, in_folders=in_folders, since=since)

    def close(self) -> None:
        """Closes the handler; Orbax's checkpointers call it."""
        self._standard.close()
        if self._reader is not None:
            self._reader.close()
        super().close()

    def __repr__(self) -> str:
        # A manager that is given args of another class prints its handlers: the place to say what helps.
        return (
            "<NNXLinenHandler: in item_handlers= it takes NNXLinenSave and NNXLinenRestore; "
            "for PyTreeSave, PyTreeRestore, StandardSave and StandardRestore as well, give the manager "
            "handler_registry=orbax_nnx_handler.handler_registry(handler) instead>"
        )


@ocp.args.register_with_handler(NNXLinenHandler, for_restore=True)
@dataclasses.dataclass
class NNXLinenRestore(ocp.args.PyTreeRestore, Generic[ItemT]):
    """What to restore; None means the handler's own setting.

    ```python
    arguments = NNXLinenRestore(target, policy="init", init=make_train_state, renames=[("decoder", "model")])
    ```

    Attributes:
        item: The target. Without one, the stored tree comes back as Orbax gives it. An item
            without an NNX object is Orbax's own, unless all its leaves are JAX arrays or
            `jax.ShapeDtypeStruct`s, or an option is set here.
        restore_args: A tree like the item; `sharding`, `dtype` and, on
            `MissingParamRestoreArgs`, `policy` of a leaf override everything else.
        policy: What a missing weight becomes, or NNX filters that choose it.
        layout: How the checkpoint is arranged.
        renames: Rules from stored to wanted names.
        init: Builds the target with real values, for `policy="init"`.
        unexpected: What to do about stored leaves that the target does not want.
        dtype: `target` or `stored`.
        single_replica: Whether one process reads replicated data and copies it to the others.
    """

    item: ItemT | None = None
    _: dataclasses.KW_ONLY
    policy: Policies | None = None
    layout: LayoutChoice | None = None
    renames: Renames | None = None
    init: Callable[[], Any] | None = None
    unexpected: UnexpectedPolicy | None = None
    dtype: DtypeChoice | None = None
    single_replica: bool | SingleReplica | None = None

    if TYPE_CHECKING:
        # For mypy, to which a dataclass on top of an untyped one, as Orbax's are, does not tell its item.
        def __init__(
            self,
            item: ItemT | None = None,
            restore_args: Any = None,
            transforms: Any = None,
            transforms_default_to_original: bool = True,
            legacy_transform_fn: Any = None,
            partial_restore: bool = False,
            *,
            policy: Policies | None = None,
            layout: LayoutChoice | None = None,
            renames: Renames | None = None,
            init: Callable[[], Any] | None = None,
            unexpected: UnexpectedPolicy | None = None,
            dtype: DtypeChoice | None = None,
            single_replica: bool | SingleReplica | None = None,
        ) -> None: ...

    def options(self, defaults: RestoreOptions) -> RestoreOptions:
        """Returns the handler's options with this restore's own in front."""
        # In Orbax's words, that the item leaves something out is meant.
        partial: dict[str, Any] = {"unexpected": "ignore"} if self.partial_restore else {}
        return defaults.override(**partial).override(**self._own())

    @property
    def has_options(self) -> bool:
        """Whether any option of this package is set."""
        return any(value is not None for value in self._own().values())

    def _own(self) -> dict[str, Any]:
        stock = {field.name for field in dataclasses.fields(cast(Any, ocp.args.PyTreeRestore))}
        return {name: value for name, value in vars(self).items() if name not in stock}


@ocp.args.register_with_handler(NNXLinenHandler, for_save=True)
@dataclasses.dataclass
class NNXLinenSave(ocp.args.PyTreeSave):
    """What to save.

    ```python
    arguments = NNXLinenSave(make_train_state(), layout="maxtext")
    ```

    Attributes:
        item: An `nnx.State`, `nnx.Module`, `nnx.Optimizer`, or a tuple or dict of
            these, written in the Linen layout. Anything else is saved as it is, but
            for `renames`; those of the handler undo what its restores of JAX arrays did.
        save_args: A tree like the item with `ocp.SaveArgs` leaves.
        layout: `linen` (Flax TrainState) or `maxtext`.
        tx: The optimizer's optax transformation, where the item is a bare `nnx.State`:
            a State does not tell which empty states end a chain, and a Linen program
            refuses a list of another length. Modules carry theirs.
        renames: The rules of the restore; they are undone, so that the same rules
            restore what is saved. A rule that cannot be undone is a `RuleError`. Or the
            report of the restore (`handler.report`), which is undone leaf by leaf. None for
            the rules that the handler itself was given; `()` for none.
    """

    item: Any = None
    _: dataclasses.KW_ONLY
    layout: Flavour = "linen"
    tx: Transformation | None = None
    renames: RulesOrRestore | None = None

    def __post_init__(self) -> None:
        self.item = as_save_item(self.item)
        super().__post_init__()


def handler_registry(handler: NNXLinenHandler | None = None, item: str | None = None) -> Any:
    """Returns a registry under which pipelines that name Orbax's own args run unchanged.

    `PyTreeSave`, `PyTreeRestore`, `StandardSave` and `StandardRestore` are all
    handled by this handler, as well as `NNXLinenSave` and `NNXLinenRestore`.

    ```python
    with ocp.CheckpointManager(path, handler_registry=handler_registry()) as manager:
        state = manager.restore(1200, args=ocp.args.StandardRestore(target))
    ```

    Args:
        handler: The handler; one with default settings if None.
        item: The item's name; None for any item.
    """
    handler = handler or NNXLinenHandler()
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    kinds: list[Any] = [
        NNXLinenSave,
        NNXLinenRestore,
        ocp.args.PyTreeSave,
        ocp.args.PyTreeRestore,
        ocp.args.StandardSave,
        ocp.args.StandardRestore,
    ]
    for kind in kinds:
        registry.add(item, kind, handler)
    return registry


def _reader(options: dict[str, Any]) -> ocp.PyTreeCheckpointHandler:
    """Returns Orbax's handler with the same type handlers, which reads planned leaves of any item."""
    return ocp.PyTreeCheckpointHandler(
        **{name: value for name, value in options.items() if name != "pytree_metadata_options"}
    )


class _Standard:
    """Stock Orbax's handler for `StandardSave` and `StandardRestore` of an item without an NNX object.

    Orbax's `StandardCheckpointHandler` has fewer options than its `PyTreeCheckpointHandler`. Under options
    that it does not have, the item is saved and restored by the latter.
    """

    def __init__(self, pytree: NNXLinenHandler, options: dict[str, Any]):
        known = inspect.signature(ocp.StandardCheckpointHandler).parameters
        self._pytree, self._options, self._has_options = pytree, options, options.keys() <= known.keys()
        self._made: Any = None

    def save(self, directory: Any, given: Any) -> None:
        if self._has_options:
            self._handler().save(directory, args=given)
        else:
            ocp.PyTreeCheckpointHandler.save(self._pytree, directory, args=_as_pytree_save(given))

    async def async_save(self, directory: Any, given: Any) -> Any:
        if self._has_options:
            return await self._handler().async_save(directory, args=given)
        return await ocp.PyTreeCheckpointHandler.async_save(
            self._pytree, directory, args=_as_pytree_save(given)
        )

    def restore(self, directory: Any, given: Any) -> Any:
        if self._has_options:
            return self._handler().restore(directory, args=given)
        args = None if given.item is None else ocp.checkpoint_utils.construct_restore_args(given.item)
        stock = ocp.args.PyTreeRestore(given.item, args)
        return ocp.PyTreeCheckpointHandler.restore(self._pytree, directory, args=stock)

    def close(self) -> None:
        if self._made is not None:
            self._made.close()

    def _handler(self) -> Any:
        if self._made is None:
            self._made = ocp.StandardCheckpointHandler(**self._options)
        return self._made


def _is_ours(wanted: NNXLinenRestore, given: Any) -> bool:
    """Tells whether a restore is this package's; whatever else is asked for is stock Orbax's."""
    # Of a class or a function in the place of what it builds, the planner says what to pass.
    if is_nnx(wanted.item) or (isinstance(given, NNXLinenRestore) and is_unbuilt(wanted.item)):
        return True
    if wanted.item is None:
        return False
    if wanted.has_options or any(
        isinstance(leaf, MissingParamRestoreArgs) for leaf in jax.tree.leaves(wanted.restore_args)
    ):
        return True
    # Orbax makes these args of a call in its older form as well, so they alone do not tell. What only Orbax
    # knows, and what is no array of a device, is for Orbax; a tree of arrays may be a model's pure dict.
    is_own = isinstance(given, NNXLinenRestore) and not (wanted.partial_restore or _has_transforms(wanted))
    return is_own and _are_arrays(wanted.item)


def _are_arrays(item: Any) -> bool:
    leaves = jax.tree.leaves(item)
    return bool(leaves) and all(isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) for leaf in leaves)


def _restore_args(given: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NNXLinenRestore:
    if isinstance(given, NNXLinenRestore):
        return cast("NNXLinenRestore[Any]", given)
    names = _names(ocp.args.PyTreeRestore)
    older = dict(zip(names, args, strict=False)) | kwargs
    source = older if given is None else _fields(given)
    return NNXLinenRestore(**{name: source[name] for name in names if name in source})


def _refuse_transforms(wanted: NNXLinenRestore) -> None:
    if _has_transforms(wanted):
        raise ValueError(
            "transforms are not supported: they pass absent leaves through silently.\n"
            "hint: use renames=[(stored, wanted), ...]."
        )


def _has_transforms(wanted: NNXLinenRestore) -> bool:
    return wanted.transforms is not None or wanted.legacy_transform_fn is not None


def _as_pytree_save(given: Any) -> Any:
    names = _names(ocp.args.PyTreeSave)
    return ocp.args.PyTreeSave(**{name: value for name, value in _fields(given).items() if name in names})


def _names(kind: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _fields(given: Any) -> dict[str, Any]:
    return cast("dict[str, Any]", vars(given))
