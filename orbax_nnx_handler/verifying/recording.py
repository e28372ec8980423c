"""What the modules of a program are called with and what they return, while the program runs.

A program is run with `jax.disable_jit`: then a scan is a loop in Python, each layer's call one of its own.
What stays traced (`jax.vmap`, `jax.checkpoint`) is observed by a callback that sees all of a batch.
"""

import contextlib
import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
from flax import linen as nn
from flax import nnx
from jax.core import Tracer
from jax.custom_batching import custom_vmap

from orbax_nnx_handler.planning.core.dtypes import is_key
from orbax_nnx_handler.planning.core.leaves import Shape
from orbax_nnx_handler.planning.core.paths import Path
from orbax_nnx_handler.verifying import Array


@dataclasses.dataclass(frozen=True)
class Held:
    """The place of an array among a call's arguments, which are recorded by number."""

    number: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """One call of one module.

    Attributes:
        path: Keys from the program's root to the module.
        order: Its place in the order in which calls returned.
        inputs: The arrays among its arguments.
        outputs: The arrays that it returned.
        places: Where each lies in what it returned: keys, numbers and names of attributes.
        settings: The module's own numbers, flags and functions, by name.
        shapes: The shapes of the module's own variables in this call: without the axis of a scan around it.
        arguments: Its arguments, with `Held` for each array.
        function: What the module is run with, where that is not the module itself: the caller's program.
        is_batched: Whether it is several calls in one, made by `jax.vmap`.
        within: The paths of the modules in whose calls it was made, the outermost first.
    """

    path: Path
    order: int
    inputs: Sequence[Array]
    outputs: Sequence[Array]
    places: Sequence[Path]
    settings: Mapping[str, Any]
    shapes: Mapping[str, Shape]
    arguments: tuple[Any, Mapping[str, Any]]
    function: Callable[..., Any] | None = None
    is_batched: bool = False
    within: tuple[Path, ...] = ()


@dataclasses.dataclass(kw_only=True)
class _Traced:
    """A call as the program makes it; under a cached trace it happens several times, or never."""

    path: Path
    settings: Mapping[str, Any]
    shapes: Mapping[str, Shape]
    arguments: Any
    inputs: list[list[Array]]
    outputs: list[list[Array]]
    places: list[Path] = dataclasses.field(default_factory=list[Path])
    orders: list[int] = dataclasses.field(default_factory=list[int])
    ranks: list[int] = dataclasses.field(default_factory=list[int])
    within: tuple[Path, ...] = ()
    function: Callable[..., Any] | None = None


@dataclasses.dataclass(kw_only=True)
class Recorder:
    """Collects the calls of one run."""

    traced: list[_Traced] = dataclasses.field(default_factory=list[_Traced])
    returned: int = 0
    running: list[tuple[Any, Path]] = dataclasses.field(default_factory=list[tuple[Any, Path]])
    outermost: set[Path] = dataclasses.field(default_factory=set[Path])
    is_model_used: bool = False
    is_other_used: bool = False

    def call(self, module: Any, path: Path, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Calls a module's function and records it."""
        leaves, structure = cast(Any, jax.tree.flatten((args, kwargs), is_leaf=_is_module))
        arrays = [leaf for leaf in leaves if _is_array(leaf)]
        numbers = iter(range(len(arrays)))
        held = [Held(next(numbers)) if _is_array(leaf) else leaf for leaf in leaves]
        made = _Traced(
            path=path,
            settings=settings_of(module),
            shapes=_shapes_of(module),
            arguments=jax.tree.unflatten(structure, held),
            inputs=[list[Array]() for _ in arrays],
            outputs=[],
            within=tuple(outer for _, outer in self.running),
        )
        self.traced.append(made)
        for place, array in zip(made.inputs, arrays, strict=True):
            _observe(place.append, array)
        if not self.running:
            self.outermost.add(path)
        self.running.append((module, path))
        try:
            result = function(*args, **kwargs)
        finally:
            self.running.pop()
        results = arrays_by_place(result)
        made.places, made.outputs = [*results], [list[Array]() for _ in results]
        made.ranks = [np.ndim(array) for array in results.values()]
        for number, (place, array) in enumerate(zip(made.outputs, results.values(), strict=True)):
            _observe(functools.partial(self._returned, made, place, first=number == 0), array)
        return result

    def program(self, function: Callable[..., Any], args: Any, result: Any) -> None:
        """Records a whole program as the call of its root, if the root's own call is not all of it."""
        if self.outermost == {()}:
            return
        self.traced = [made for made in self.traced if made.path != ()]
        self.call(None, (), lambda *_: result, args, {})
        self.traced[-1].function = function

    def _returned(self, made: _Traced, place: list[Array], array: Array, *, first: bool) -> None:
        place.append(array)
        if first:
            made.orders.append(self.returned)
            self.returned += 1

    def calls(self) -> list[Call]:
        """Returns every call that really happened, in the order in which they returned."""
        jax.effects_barrier()
        found = [
            Call(
                path=made.path,
                order=order,
                inputs=[place[at] for place in made.inputs if at < len(place)],
                outputs=[place[at] for place in made.outputs if at < len(place)],
                places=[key for key, place in zip(made.places, made.outputs, strict=True) if at < len(place)],
                settings=made.settings,
                shapes=made.shapes,
                arguments=made.arguments,
                function=made.function,
                within=made.within,
                is_batched=[place[at].ndim for place in made.outputs[:1] if at < len(place)] > made.ranks[:1],
            )
            for made in self.traced
            for at, order in enumerate(made.orders)
        ]
        return sorted(found, key=lambda call: call.order)


def arrays_by_place(result: Any) -> dict[Path, Any]:
    """Returns the arrays in what a module returns, by the keys, numbers and attributes to each."""
    flat = cast(Any, jax.tree_util.tree_flatten_with_path(result, is_leaf=_is_module))
    return {tuple(map(_name_of, keys)): leaf for keys, leaf in flat[0] if _is_array(leaf)}


def _name_of(key: Any) -> Any:
    """Returns one step as a person writes it: a field of a named tuple is what a key of a dict is."""
    return next(getattr(key, name) for name in ("key", "idx", "name") if hasattr(key, name))


def _is_module(leaf: Any) -> bool:
    return _are_modules(cast("type[Any]", type(leaf)))


@functools.lru_cache(maxsize=1024)  # Their metaclasses make each question expensive.
def _are_modules(cls: type[Any]) -> bool:
    return issubclass(cls, nnx.Pytree | nnx.Variable | nn.Module)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray) and not is_key(leaf.dtype)


def _shapes_of(module: Any) -> dict[str, Shape]:
    if isinstance(module, nn.Module):
        held = [item for collection in module.variables.values() for item in collection.items()]
        return {name: np.shape(value) for name, value in held if _is_array(value)}
    members = cast("Mapping[str, Any]", getattr(module, "__dict__", {}))
    own = {name: cast(Any, value) for name, value in members.items() if isinstance(value, nnx.Variable)}
    return {name: tuple(np.shape(value.get_raw_value())) for name, value in own.items()}


def _observe(keep: Callable[[Array], Any], array: Any) -> None:
    """Hands the value of an array on, now or when a traced program computes it."""

    def kept(value: Any) -> None:
        keep(np.asarray(value))

    if not isinstance(array, Tracer):
        kept(array)
        return
    if _is_checked_by_scan():
        return
    array = jax.lax.stop_gradient(cast(Any, array))  # What is observed may be differentiated around it.

    @custom_vmap
    def seen(value: Any) -> Any:
        jax.debug.callback(kept, value)
        return value

    @seen.def_vmap
    def batched(_: int, in_batched: Any, value: Any) -> Any:  # pyright: ignore[reportUnusedFunction]
        _observe(keep, value)
        return value, in_batched[0]

    seen(array)


def _is_checked_by_scan() -> bool:
    """Tells whether `nn.scan` traces its body only to check that what it broadcasts is the same each time.

    There Flax (0.12.12) takes a callback for a part of what is broadcast, and refuses the scan. No public
    name tells of this trace. Under another name of the frame it would be observed like any other.
    """
    frame = inspect.currentframe()
    while frame is not None:
        name = (frame.f_globals.get("__name__"), frame.f_code.co_name)
        if name == ("flax.core.axes_scan", "body_fn") and frame.f_locals.get("init_mode"):
            return True
        frame = frame.f_back
    return False


def settings_of(module: Any) -> dict[str, Any]:
    """Returns what a module and its configuration are set to, by name: numbers, flags, texts, functions."""
    found: dict[str, Any] = {}
    for name, value in cast("Mapping[str, Any]", getattr(module, "__dict__", {})).items():
        if name.startswith("_") or isinstance(value, nnx.Pytree | nnx.Variable | nn.Module):
            continue
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
            found |= {f"{name}.{inner}": setting for inner, setting in _plain(fields)}
        found |= dict(_plain({name: value}))
    return found


def _plain(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, bool | int | float | str):
            yield name, value
        elif isinstance(value, functools.partial):
            inner = cast("functools.partial[Any]", value)
            yield name, (getattr(inner.func, "__name__", ""), tuple(sorted(inner.keywords.items())))
        elif callable(value) and not isinstance(value, type) and hasattr(value, "__name__"):
            yield name, value.__name__


@contextlib.contextmanager
def exact() -> Generator[None]:
    """Lets programs run operation by operation, with exact products of matrices."""
    scan = jax.lax.scan
    jax.lax.scan = functools.partial(_scanned, scan)
    try:
        with jax.disable_jit(), jax.default_matmul_precision("highest"):
            yield
    finally:
        jax.lax.scan = scan


def _scanned(
    scan: Callable[..., Any],
    f: Callable[[Any, Any], Any],
    init: Any,
    xs: Any = None,
    length: int | None = None,
    reverse: bool = False,
    **options: Any,
) -> Any:
    """Scans as `jax.lax.scan` does, and takes each layer out of a stack by the same operation.

    Where nothing is compiled, JAX (0.10.2) takes it by an operation of its own for each layer of each shape:
    of fifty layers, to compile those takes longer than all the rest. On the host NumPy takes it.
    """
    counts = {(*np.shape(leaf), 0)[0] for leaf in jax.tree.leaves(xs)}
    count = min(counts, default=0)
    is_one = count > 0 and counts == {count} and length in (None, count)
    if not is_one or not cast(Any, jax.config).jax_disable_jit:
        return scan(f, init, xs, length, reverse, **options)
    numbers = iter(range(count)[:: -1 if reverse else 1])

    def layer(carry: Any, _: None) -> Any:
        return f(carry, jax.tree.map(functools.partial(_one_of, next(numbers)), xs))

    return scan(layer, init, None, count, reverse, **options)


def _one_of(number: int, stack: Any) -> Any:
    is_held = _is_array(stack) and not issubclass(type(stack), Tracer)
    devices = getattr(stack, "devices", set[Any])() if is_held else ()
    if [device.platform for device in devices] == ["cpu"]:
        return jax.device_put(np.asarray(stack)[number], stack.sharding if stack.committed else None)
    return cast(Any, jax.lax.dynamic_index_in_dim(stack, np.int32(number), keepdims=False))


def run_linen(
    function: Callable[..., Any], *args: Any, owner: Callable[[Any], Path | None]
) -> tuple[Any, list[Call]]:
    """Runs a Linen program.

    Args:
        function: Runs it.
        *args: What it is called with, the variables first.
        owner: The keys above the paths of a module that is bound by itself (a part of the model), if known.

    Returns:
        What it returns, and the calls of its modules.
    """
    recorder = Recorder()
    above: Path | None = ()

    def intercept(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        nonlocal above
        module = context.module
        if context.method_name != "__call__" or module.scope is None:
            return call(*args, **kwargs)
        if recorder.running and not _is_applied_within(module, recorder.running[-1][0]):
            return call(*args, **kwargs) if above is None else recorded(module, above, call, args, kwargs)
        outer, above = above, owner(module)
        if above is None and not recorder.running:
            above = ()
        try:
            return call(*args, **kwargs) if above is None else recorded(module, above, call, args, kwargs)
        finally:
            above = outer

    def recorded(module: Any, above: Path, call: Any, args: Any, kwargs: Any) -> Any:
        return recorder.call(module, (*above, *module.path), call, args, kwargs)

    with nn.intercept_methods(intercept), exact():
        result = function(*args)
        recorder.program(function, args[1:], result)
    return result, recorder.calls()


def _is_applied_within(module: Any, running: Any) -> bool:
    """Tells whether a module is the root of an `apply` within another: a head that borrows an embedding.

    The module that a transform such as `nn.scan` runs has the path of the one that it stands for.
    """
    return (
        module.path == () and not isinstance(running, type(module)) and not isinstance(module, type(running))
    )


_PATH = "path_in_target"


def run_nnx(
    function: Callable[..., Any], model: Any, *args: Any, locate: Callable[[Any, Path], Path | None]
) -> tuple[Any, list[Call], bool]:
    """Runs an NNX program.

    Args:
        function: Runs it.
        model: What it is called with first; its modules get an attribute that says where they lie, which
            goes with them through `nnx.split` and the transforms. It is taken away again.
        *args: The other things that it is called with.
        locate: Where a module lies that was made while the program ran, below the path of the caller.

    Returns:
        What it returns, the calls of its modules, and whether the first of them was one of the model's.
    """
    recorder, others = Recorder(), list[Any]()

    def path_of(module: Any) -> Path | None:
        path = getattr(module, _PATH, None)
        recorder.is_model_used |= path is not None and not recorder.is_other_used
        if path is None:
            recorder.is_other_used = True
            path = locate(module, recorder.running[-1][1] if recorder.running else ())
            if path is not None:
                _mark(module, path)
                others.append(module)
        return path

    def recorded(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            is_other = not recorder.running or recorder.running[-1][0] is not self
            path = path_of(self) if is_other else None  # `super().__call__` is no other call.
            if path is None:
                return original(self, *args, **kwargs)
            return recorder.call(self, path, functools.partial(original, self), args, kwargs)

        return call

    marked = _mark(model, ())
    try:
        with _replaced_calls(recorded), exact():
            result = function(model, *args)
            recorder.program(function, args, result)
        return result, recorder.calls(), recorder.is_model_used
    finally:
        for module in itertools.chain(marked, *map(_marked, others)):
            delattr(module, _PATH)


def _mark(model: Any, above: Path) -> Iterator[Any]:
    """Says in each module where it lies; returns those that say so still when they are asked for."""
    modules = [(path, node) for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Module)]
    for path, module in modules:
        with contextlib.suppress(AttributeError, TypeError, ValueError):  # A frozen class: it stays without.
            setattr(module, _PATH, (*above, *path))
    return (module for _, module in modules if hasattr(module, _PATH))


def _marked(model: Any) -> list[Any]:
    return [
        node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.Module) and hasattr(node, _PATH)
    ]


@contextlib.contextmanager
def _replaced_calls(replace: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Generator[None]:
    """Replaces `__call__` of every class of modules for the time of a run: NNX has no interceptors."""
    classes = list(_subclasses(nnx.Module))
    originals = {cls: vars(cls)["__call__"] for cls in classes if "__call__" in vars(cls)}
    try:
        for cls, original in originals.items():
            cls.__call__ = replace(original)
        yield
    finally:
        for cls, original in originals.items():
            cls.__call__ = original


def _subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    seen: set[type[Any]] = set()
    pending = [cls]
    while pending:
        for below in pending.pop().__subclasses__():
            if below not in seen:
                seen.add(below)
                pending.append(below)
                yield below
