"""A save or a conversion that fails or is interrupted leaves the old item, and nothing beside it."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from flax import nnx

from orbax_nnx_handler import NNXLinenHandler, NNXLinenSave, RestoreError, cli, restore, save
from orbax_nnx_handler.storage.saving import atomic
from tests.storage.checkpoints import DiskFormat
from tests.storage.checkpoints import save as save_stock


class Net(nnx.Module):
    def __init__(self, value):
        self.w = nnx.Param(jnp.full((64, 64), value))


ABSTRACT = nnx.eval_shape(lambda: Net(0.0))


def names_in(path):
    return sorted(child.name for child in path.iterdir())


def value_at(path):
    return float(restore(path, ABSTRACT).w[3, 3])


def test_a_forced_save_that_fails_leaves_the_old_item_and_nothing_beside_it(tmp_path, monkeypatch):
    save(tmp_path / "item", Net(1.0))

    def fail(*_, **__):
        raise ValueError("NO_SPACE: the disk is full [source locations='x']")

    monkeypatch.setattr(ocp.Checkpointer, "save", fail)
    with pytest.raises(RestoreError, match="item cannot be written: NO_SPACE: the disk is full\nhint"):
        save(tmp_path / "item", Net(2.0), force=True)

    assert value_at(tmp_path / "item") == 1.0
    assert names_in(tmp_path) == ["item"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_forced_save_replaces_the_item(tmp_path, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    save(tmp_path / "new" / "item", Net(1.0), force=True)
    save(tmp_path / "new" / "item", Net(2.0), force=True)

    assert value_at(tmp_path / "new" / "item") == 2.0
    assert names_in(tmp_path / "new") == ["item"]


def test_a_save_under_a_limit_of_file_size_leaves_nothing(tmp_path):
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    handled = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, kept[1]))
    try:
        with pytest.raises(RestoreError, match="cannot be written"):
            save(
                tmp_path / "a" / "item",
                {"w": np.random.default_rng(0).normal(size=(300, 300)), "k": jax.random.key(3)},
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)
        signal.signal(signal.SIGXFSZ, handled)

    assert names_in(tmp_path) == []


@pytest.mark.parametrize("number", range(4))
def test_a_conversion_that_fails_beside_a_random_key_is_one_error_and_leaves_nothing(
    tmp_path, capfd, caplog, number
):
    layers = {f"l_{at}": np.full((64, 64), float(at)) for at in range(4)}
    tree = {"params": layers, "dropout": jax.random.key(3)}
    path = save_stock(tmp_path / "s", tree, DiskFormat(False, False, False))
    os.truncate(next((path / f"params.l_{number}").glob("0*")), 5)

    assert cli.main(["convert", str(path), str(tmp_path / "made" / "out")]) == 1

    said = capfd.readouterr()
    assert f"stored leaf params/l_{number} cannot be read" in said.err
    assert "Traceback" not in said.err + caplog.text
    assert names_in(tmp_path) == ["s"]


def test_the_handler_refuses_a_directory_that_orbax_would_leave_empty(tmp_path):
    handler = NNXLinenHandler()
    with (
        ocp.CheckpointManager(tmp_path / "run[1]", item_handlers=handler) as manager,
        pytest.raises(RestoreError, match=r"with '\[' in its name"),
    ):
        manager.save(1, args=NNXLinenSave(Net(1.0)))


WRITES = """
import os, signal, sys
from etils import epath
from orbax_nnx_handler.storage.saving.atomic import appearing
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    if not os.fork():
        with appearing(epath.Path(line.strip())) as unfinished:
            unfinished.mkdir()
            (unfinished / "half").write_text("half")
            print(os.getpid(), flush=True)
            signal.pause()
"""


@pytest.fixture(scope="module")
def begun():
    """Has a process write what will have a name; returns its number. All are forked from one that imports."""
    words = [sys.executable, "-W", "ignore", "-c", WRITES]
    importer = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )

    def begin(path):
        print(path, file=importer.stdin, flush=True)
        return int(importer.stdout.readline())

    yield begin
    os.killpg(importer.pid, signal.SIGKILL)
    importer.wait()


def kill(process):
    os.kill(process, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        while True:
            os.kill(process, 0)
            time.sleep(0.01)


def test_what_a_killed_process_was_writing_goes_with_the_next_one_of_the_same_name(tmp_path, begun):
    save(tmp_path / "src", Net(1.0))
    killed, living, another = begun(tmp_path / "3"), begun(tmp_path / "3"), begun(tmp_path / "33")
    for process in (killed, another):
        kill(process)
    elsewhere = tmp_path / f"3.converting-{killed}0"
    elsewhere.mkdir()
    (elsewhere / ".owner").write_text("another machine")
    unknown = tmp_path / f"3.converting-{killed}1"
    unknown.mkdir()
    (unknown / "somebody's").touch()
    # As where the process died before it had said whose it is, or while that was being removed.
    for at, name in enumerate(("2", "3")):
        left = tmp_path / f"3.converting-{killed}{name}"
        left.mkdir()
        if at:
            (left / ".owner").touch()

    assert cli.main(["convert", str(tmp_path / "src"), str(tmp_path / "3")]) == 0

    left = [f"3.converting-{living}", f"33.converting-{another}", elsewhere.name, unknown.name]
    assert names_in(tmp_path) == sorted([*left, "3", "src"])
    assert value_at(tmp_path / "3") == 1.0


def test_whose_a_directory_is_is_known_until_all_else_in_it_is_removed(tmp_path, monkeypatch):
    work = tmp_path / "item.converting-9"
    (work / "item" / "d").mkdir(parents=True)
    (work / ".owner").touch()
    order = []
    monkeypatch.setattr(atomic.shutil, "rmtree", lambda path, **_: order.append(path.name))

    atomic._remove(atomic.epath.Path(work))

    assert order == ["item", "item.converting-9"]


def test_a_second_save_of_one_process_to_one_place_is_refused_while_the_first_is_under_way(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(atomic, "_CLEARINGS", 3)
    with atomic.appearing(atomic.epath.Path(tmp_path / "item")) as unfinished:
        unfinished.mkdir()
        with pytest.raises(RestoreError, match="another save to it is under way"):
            save(tmp_path / "item", Net(1.0))

    assert names_in(tmp_path) == ["item"]


def test_a_directory_that_was_removed_before_it_was_locked_is_made_again(tmp_path, monkeypatch):
    lock, removed = atomic._lock, []

    def late(descriptor):
        if not removed:
            removed.append(True)
            (tmp_path / "work" / ".owner").unlink()
            (tmp_path / "work").rmdir()
        return lock(descriptor)

    monkeypatch.setattr(atomic, "_lock", late)
    with atomic._held(atomic.epath.Path(tmp_path / "work")):
        assert (tmp_path / "work" / ".owner").exists()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "memory (RLIMIT_AS is "),
        (RuntimeError("can't start new thread"), "threads (RLIMIT_NPROC is "),
        (OSError(24, "Too many open files"), "file descriptors (RLIMIT_NOFILE is "),
    ],
)
def test_what_a_save_has_too_little_of_is_named_with_the_largest_leaf(tmp_path, monkeypatch, error, said):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(ocp.Checkpointer, "save", fail)
    with pytest.raises(RestoreError) as raised:
        save(tmp_path / "item", Net(1.0))

    start = f"{tmp_path / 'item'} cannot be written: this process may have no more {said}"
    assert str(raised.value).startswith(start)
    assert "\nlargest leaf: params/w 16.38 kB\nhint: " in str(raised.value)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    ("most_bytes", "said"), [(-1, ")."), (1 << 45, ", or memory: RLIMIT_AS is 35.18 TB).")]
)
def test_a_save_begins_only_where_threads_may_be_started(tmp_path, monkeypatch, most_bytes, said):
    def refuse(*_):
        raise RuntimeError("can't start new thread")

    kept = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (most_bytes, kept[1]))
    monkeypatch.setattr(threading.Thread, "start", refuse)
    try:
        with pytest.raises(RestoreError) as raised:
            save(tmp_path / "item", Net(1.0))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, kept)

    number = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    limit = "unlimited" if number < 0 else number
    first = f"cannot be written: this process may have no more threads (RLIMIT_NPROC is {limit}{said}"
    assert str(raised.value).splitlines()[0] == f"{tmp_path / 'item'} {first}"
    assert names_in(tmp_path) == []


def test_an_item_that_was_being_replaced_stays_until_there_is_another(tmp_path, monkeypatch, begun):
    save(tmp_path / "item", Net(1.0))
    killed = begun(tmp_path / "item")
    kill(killed)
    # As where names cannot be exchanged, and the process dies between two renames.
    left = tmp_path / f"item.converting-{killed}"
    (tmp_path / "item").rename(left / "item.replaced")

    def fail(*_, **__):
        raise ValueError("NO_SPACE")

    with monkeypatch.context() as patched:
        patched.setattr(ocp.Checkpointer, "save", fail)
        with pytest.raises(RestoreError):
            save(tmp_path / "item", Net(2.0))
    assert (left / "item.replaced" / "_METADATA").exists()

    save(tmp_path / "item", Net(3.0))
    save(tmp_path / "item", Net(4.0), force=True)
    assert names_in(tmp_path) == ["item"]


@pytest.mark.parametrize("shape", [[0, 10**15], [10**15, 0], [10**15], [1 << 62]])
def test_an_absurd_shape_is_refused_or_done_at_once(tmp_path, shape):
    path = save_stock(tmp_path / "s", {"params": {"w": np.ones((6, 4))}}, DiskFormat(False, False, False))
    file = path / "params.w" / ".zarray"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps({**fields, "shape": shape, "chunks": [1] * (len(shape) - 1) + [10**6]}))

    start = time.monotonic()
    for words in (
        ["tree", str(path)],
        ["diff", "--values", str(path), str(path)],
        ["convert", str(path), str(tmp_path / "o")],
    ):
        assert cli.main(words) in (0, 1)
    assert time.monotonic() - start < 10


INTERRUPTED = """
import os, runpy, signal, sys

class Interrupts:
    def find_spec(self, name, *_):
        if name == module:
            os.kill(os.getpid(), signal.SIGINT)

module, *sys.argv[1:] = sys.argv[1:]
sys.meta_path.insert(0, Interrupts())
runpy.run_module("orbax_nnx_handler", run_name="__main__", alter_sys=True)
"""


# The first one of all, two that others import, and one of the last.
@pytest.mark.parametrize(
    "module", ["orbax_nnx_handler.cli", "numpy", "flax", "orbax_nnx_handler.planning.diagnosis"]
)
def test_an_interrupt_while_the_command_line_imports_is_one_line(tmp_path, module):
    words = [sys.executable, "-c", INTERRUPTED, module, "tree", str(tmp_path / "nothing")]

    ended = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)

    assert (ended.returncode, ended.stdout) == (130, "")
    assert ended.stderr == "interrupted: nothing was changed\n"


def test_an_interrupt_while_the_working_directory_is_made_leaves_none(tmp_path, monkeypatch):
    def interrupt(_descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic, "_lock", interrupt)
    with pytest.raises(KeyboardInterrupt), atomic.appearing(epath.Path(tmp_path / "item")):
        pass

    assert not list(tmp_path.iterdir())
