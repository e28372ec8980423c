"""What the suite's processes are started with, and one program in several of them, joined by JAX."""

import asyncio
import atexit
import contextlib
import functools
import gc
import importlib
import importlib.util
import json
import mmap
import os
import pathlib
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import typing
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
# A program of the suite runs a few times on tiny arrays: compiling it well takes longer than running it.
_HASTY = {
    "xla_backend_optimization_level": "0",
    "xla_cpu_parallel_codegen_split_count": "1",
    "xla_cpu_use_fusion_emitters": "false",
}


def hasty_flags() -> list[str]:
    """Returns XLA's flags for compiling in haste that this XLA has; it ends at one that it does not know."""
    library = pathlib.Path(importlib.util.find_spec("jaxlib").origin).with_name("libjax_common.so")
    if not library.exists():
        return []
    with library.open() as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        # A name that stands alone is a flag's; one within a longer run is a field's, which may be unused.
        return [
            f"--{name}={value}"
            for name, value in _HASTY.items()
            if content.find(b"\0" + name.encode() + b"\0") >= 0
        ]


def share_lowering_context() -> None:
    """Has JAX lower all programs of this process in one MLIR context.

    It makes one for each program, even for a single addition: 5 ms, and 1 MB until garbage is collected.
    """
    # Nothing public: where a version has it elsewhere, the suite only takes a tenth longer.
    with contextlib.suppress(ImportError, AttributeError):
        from jax._src.interpreters import mlir

        mlir.make_ir_context = functools.cache(mlir.make_ir_context)


def leave_origins_unsaid() -> None:
    """Has JAX say in no error which operations a traced value comes from.

    Flax asks each count of random numbers for its sharding and takes no notice of the error. What that would
    say is looked for in the whole program so far: a third of what it costs to make a model abstract.
    """
    with contextlib.suppress(ImportError, AttributeError):
        from jax._src.interpreters.partial_eval import DynamicJaxprTracer

        DynamicJaxprTracer._origin_msg = lambda _: ""


def remember_initial_shapes() -> None:
    """Has Linen trace an initializer once for each shape that it is asked for.

    `apply` traces the initializer of every parameter each time, to compare the shape that it would give with
    the one that is there: a fifth of what it costs to run a small model operation by operation.
    """
    import jax
    import numpy as np
    from flax.core import meta
    from flax.core.scope import Scope

    original, shapes = Scope.param, dict[Any, list[Any]]()

    def shapes_of(tree: Any) -> list[Any]:
        return [np.shape(leaf) for leaf in jax.tree.leaves(tree)]

    def param(self: Any, name: str, init_fn: Any, *args: Any, unbox: bool = True, **kwargs: Any) -> Any:
        if self.has_variable("params", name):
            value = self.get_variable("params", name)
            value = meta.unbox(value) if unbox else value
            with contextlib.suppress(TypeError):  # An argument that is no key of a dict.
                asked = (_meaning(init_fn), args, *sorted(kwargs.items()))
                if asked not in shapes:
                    initial = jax.eval_shape(lambda: init_fn(jax.random.key(0), *args, **kwargs))
                    shapes[asked] = shapes_of(initial)
                if shapes_of(value) == shapes[asked]:
                    self.reserve(name, "params")
                    return value
        return original(self, name, init_fn, *args, unbox=unbox, **kwargs)

    Scope.param = param


def _meaning(function: Any) -> Any:
    """Returns what tells initializers apart: `nn.initializers.normal(0.1)` makes a new one each time."""
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    return (function.__code__, function.__defaults__, *map(_meaning, cells)) if cells else function


def remember_traced_initializers() -> None:
    """Has JAX trace the initializer of a kernel once for each shape, and take over what it then knows.

    To make a model abstract, or a program that makes one, each layer's initializer is traced: a third of it.
    """
    import jax

    with contextlib.suppress(ImportError, AttributeError):
        from jax._src.nn import initializers

        original = initializers.variance_scaling

        def variance_scaling(*args: Any, **kwargs: Any) -> Any:
            init = original(*args, **kwargs)
            traced = jax.jit(init, static_argnums=(1, 2))

            def known(key: Any, shape: Any, *dtype: Any, **kwargs: Any) -> Any:
                alike = isinstance(key, jax.core.Tracer) and type(shape) is tuple and not kwargs
                return (traced if alike else init)(key, shape, *dtype, **kwargs)

            return functools.wraps(init)(known)

        initializers.variance_scaling = variance_scaling


def draw_keys_in_one_step() -> None:
    """Has a stream of NNX's draw a key and count it in one program that is traced once.

    It does so for each parameter of a model that is made, in four steps: a fifth of what that costs.
    """
    import jax
    from flax.nnx import rnglib

    step = jax.jit(lambda key, count: (jax.random.fold_in(key, count), count + 1), inline=True)

    def draw(self: Any) -> Any:
        self.count._check_can_update()
        key, count = step(self.key[...], self.count[...])
        self.count[...] = count
        return key

    # Where a version of NNX's asks otherwise, the suite only takes longer.
    if hasattr(rnglib.RngCount, "_check_can_update"):
        rnglib.RngStream.__call__ = draw


def remember_kinds_of_values() -> None:
    """Has NNX tell once for each type whether its values are references, leaves or Variables.

    It asks each value of each module several times, through classes whose own checks import and look into
    traces: a quarter of what it costs to build, split and merge a small model. Values that are traced, whose
    type does not tell, and NNX's own kinds of Variables in a trace are asked as ever.
    """
    import jax
    from flax.nnx import graphlib, variablelib

    hijax = getattr(variablelib, "HijaxVariable", None)
    asked = (jax.core.Tracer, hijax) if hijax else (jax.core.Tracer,)
    tells = functools.cache(lambda kind: not any(each in asked for each in kind.__mro__))

    def by_type(original: Any) -> Any:
        answers = dict[type[Any], bool]()

        def answer(value: Any) -> bool:
            kind = type(value)
            found = answers.get(kind)
            if found is None:
                found = original(value)
                if tells(kind):
                    answers[kind] = found
            return found

        return answer

    with contextlib.suppress(AttributeError):
        variablelib.is_array_ref = graphlib.is_array_ref = by_type(variablelib.is_array_ref)
        graphlib.is_node_leaf = by_type(graphlib.is_node_leaf)
    for meta in (type(variablelib.Variable), type(hijax)):
        original = meta.__dict__.get("__instancecheck__")
        if original is None:
            continue

        def check(cls: Any, value: Any, original: Any = original) -> bool:
            return type.__instancecheck__(cls, value) if tells(type(value)) else original(cls, value)

        meta.__instancecheck__ = check


def run_in_place() -> None:
    """Has what an event loop hands to threads run at once, and Python look at a protocol's names once.

    Each of Orbax's saves starts ten threads for it, which wait for each other's turn, and asks for protocols
    dozens of times: a quarter of what it costs to write or read a few small arrays.
    """

    async def to_thread(function: Any, /, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    asyncio.to_thread = to_thread
    with contextlib.suppress(AttributeError):
        typing._get_protocol_attrs = functools.cache(typing._get_protocol_attrs)


def spare_garbage_collector() -> None:
    """Takes what there is for what lives to the end, and has garbage looked for less often."""
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


def quick_directory() -> str:
    """Returns a directory in memory, if there is one with room for what the suite writes."""
    memory = "/dev/shm"
    roomy = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 4 << 30
    return memory if roomy else tempfile.gettempdir()


def run_processes(module: str, count: int, directory: pathlib.Path) -> list[dict[str, Any]]:
    """Runs `module.main(PORT, COUNT, NUMBER, DIRECTORY)` in each process; returns what each wrote as JSON.

    They have 8 devices in all.
    """
    server, said = _server(), directory / "said.txt"
    group = {"module": module, "port": _free_port(), "count": count, "directory": str(directory)}
    print(json.dumps(group), file=server.stdin, flush=True)
    if not select.select([server.stdout], [], [], 300)[0]:
        os.killpg(server.pid, signal.SIGKILL)
        _server.cache_clear()
    failed = server.stdout.readline() != "0\n"
    assert not failed, said.read_text()[-8000:] if said.exists() else f"{module} was not imported"
    return [json.loads((directory / f"{number}.json").read_text()) for number in range(count)]


class Forked:
    """A program in a process of its own, which has imported what it needs before it was there.

    As with `subprocess.Popen`, `wait` and `send_signal`; what it prints is in files, so that it never waits.

    Args:
        source: The program. What it runs has not touched JAX's devices, and nothing of JAX is changed.
        arguments: What follows in `sys.argv`.
    """

    def __init__(self, source: str, *arguments: str) -> None:
        self._said = tempfile.TemporaryDirectory()
        self._server = _server()
        asked = {"source": source, "words": ["-c", *arguments], "said": self._said.name}
        print(json.dumps(asked), file=self._server.stdin, flush=True)
        self.pid = int(self._server.stdout.readline())
        self.returncode: int | None = None

    @property
    def stdout(self) -> str:
        """What it has printed so far."""
        return pathlib.Path(self._said.name, "1").read_text()

    @property
    def stderr(self) -> str:
        """What it has said of errors so far."""
        return pathlib.Path(self._said.name, "2").read_text()

    def send_signal(self, number: int) -> None:
        """Sends it a signal, while it has not been waited for."""
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Waits for its end; returns its status, or minus the signal that ended it."""
        if self.returncode is None:
            print(self.pid, file=self._server.stdin, flush=True)
            self.returncode = int(self._server.stdout.readline())
        return self.returncode


COMMAND_LINE = "import runpy; runpy.run_module('orbax_nnx_handler', run_name='__main__', alter_sys=True)"
"""The source of `python -m orbax_nnx_handler`."""


@functools.cache
def _server() -> subprocess.Popen[str]:
    """Starts the process that imports once for all groups and programs, and ends when this one does."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        # JAX warns of it; nothing of JAX runs when `_serve` forks.
        "PYTHONWARNINGS": "ignore:os.fork:RuntimeWarning",
    }
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.processes"],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    atexit.register(server.communicate)
    return server


def _serve() -> None:
    """Forks what each line of the input asks for: a group or a program; a number waits for its program."""
    for module in ("orbax.checkpoint", "orbax_nnx_handler.cli", "orbax_nnx_handler.handler", "jax.numpy"):
        importlib.import_module(module)
    gc.freeze()
    for line in sys.stdin:
        asked = json.loads(line)
        if isinstance(asked, int):
            print(os.waitstatus_to_exitcode(os.waitpid(asked, 0)[1]), flush=True)
        elif "source" in asked:
            print(_fork(_run_program, **asked), flush=True)
        else:
            # What looks for a cause imports it late, and so would each process for itself.
            importlib.import_module("scipy.optimize")
            importlib.import_module(asked["module"])
            gc.freeze()
            group = [_fork(_run_member, number=number, **asked) for number in range(asked["count"])]
            print(sum(os.waitpid(process, 0)[1] != 0 for process in group), flush=True)


def _fork(run: Callable[..., None], **what: Any) -> int:
    process = os.fork()
    if not process:
        run(**what)
        sys.exit()
    return process


def _run_program(source: str, words: list[str], said: str) -> None:
    with pathlib.Path(os.devnull).open() as nothing:
        os.dup2(nothing.fileno(), 0)
    for number in (1, 2):
        _say_in(pathlib.Path(said, str(number)), number)
    sys.argv = words
    exec(source, {"__name__": "__main__"})


def _run_member(module: str, port: int, count: int, number: int, directory: str) -> None:
    _say_in(pathlib.Path(directory) / "said.txt", 1, 2)
    share_lowering_context()
    spare_garbage_collector()
    os.environ["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={8 // count}"
    importlib.import_module(module).main(str(port), str(count), str(number), directory)


def _say_in(path: pathlib.Path, *numbers: int) -> None:
    """Has what this process prints and says of errors appended to a file."""
    with path.open("ab") as file:
        for number in numbers:
            os.dup2(file.fileno(), number)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    _serve()
