"""Metadata, databases and archives made by hand to do harm: refused or read, in bounded time and memory.

Every field of every small file that Orbax writes is set to every value of a list of bad ones; databases
and archives come from tables. Each case is listed, planned, shown, restored and converted; no file outside it
may be opened, and nothing but a `RestoreError` may come out.
"""

import contextlib
import io
import json
import pathlib
import random
import shutil
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from orbax_nnx_handler import RestoreError, cli, plan_restore, restore
from tests.campaigns import crafted
from tests.campaigns.watching import HangError, alarm, memory_bytes, opened_files, stopwatch
from tests.storage.checkpoints import DiskFormat, save
from tests.storage.stores import ocdbt_writer as made
from tests.storage.stores.hostile_databases import HOSTILE

LIMIT_S, LIMIT_BYTES = 2.0, 200_000_000
DEEP = "DEEP"
BAD: list[Any] = [
    *(None, True, -1, 0, 7, 1.5, float("nan"), 10**30, "", "x", "\x1b[2J\n# x", "\ud800", "../../secret"),
    *("/etc/passwd", "9" * 5000, "a" * 100_000, [], [[]], [1] * 1000, [10**15], [-1, 4], [1 << 62, 1 << 62]),
    *({}, {"a": 1}, {"name": "x"}, DEEP),
]
WANTED = {"w": jax.ShapeDtypeStruct((6, 4), jnp.float32)}
TREE = {"w": np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32), "key": jax.random.key(1)}

Make = Callable[[pathlib.Path], pathlib.Path]


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from _places(part, (*path, key))


def _changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[path[0]] = _changed(copied[path[0]], path[1:], new)
    return copied


def _as_json(value: Any) -> str:
    # No list that Python's own encoder would take is so deep.
    return json.dumps(value).replace(f'"{DEEP}"', "[" * 50_000 + "]" * 50_000)


def _of_json(base: pathlib.Path, file: pathlib.Path) -> Iterator[tuple[str, Make]]:
    name = file.relative_to(base)
    fields = json.loads(file.read_text())
    for place in _places(fields):
        for number, value in enumerate(BAD):

            def make(folder: pathlib.Path, place=place, value=value) -> pathlib.Path:
                shutil.copytree(base, folder / "item")
                (folder / "item" / name).write_text(_as_json(_changed(fields, place, value)))
                return folder / "item"

            yield f"{base.name}/{name} {'.'.join(map(str, place))} = {number}", make


def _of_databases() -> Iterator[tuple[str, Make]]:
    for name, (nodes, options, _) in HOSTILE.items():

        def make(folder: pathlib.Path, nodes=nodes, options=options) -> pathlib.Path:
            return made.write(folder / "item", *nodes, **options)

        yield f"database: {name}", make


def _of_bytes(base: pathlib.Path, seed: int) -> Iterator[tuple[str, Make]]:
    chance = random.Random(seed)
    for file in sorted(file for file in base.rglob("*") if file.is_file()):
        content = file.read_bytes()
        for number in range(4):
            cut = chance.randrange(len(content) + 1)
            wild = [chance.randbytes(64), content[:cut] + chance.randbytes(32), content * 3, b"\xff" * 4096][
                number
            ]

            def make(folder: pathlib.Path, file=file, wild=wild) -> pathlib.Path:
                shutil.copytree(base, folder / "item")
                (folder / "item" / file.relative_to(base)).write_bytes(wild)
                return folder / "item"

            yield f"{base.name}/{file.relative_to(base)}: bytes {number}", make


_HEADERS = [
    "{'descr': '|O', 'fortran_order': False, 'shape': (3,)}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (10**15,)}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (0, 1000000000000000)}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (-3,)}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': 3}",
    "{'descr': __import__('os').system('touch /tmp/owned'), 'fortran_order': False, 'shape': (3,)}",
    "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (3,)}",
    "{'descr': '<f4', 'fortran_order': 7, 'shape': (3,)}",
    "{'descr': '<f4'}",
    "(" * 5000,
    "[1]",
    "",
    "\0",
]


def _of_archives() -> Iterator[tuple[str, Make]]:
    names = [
        "w.npy",
        "../../secret.npy",
        "/etc/passwd.npy",
        "\x1b[2J.npy",
        "a\n# b.npy",
        ".npy",
        "a//b.npy",
        "w/../w.npy",
    ]
    for name in names:
        for number, header in enumerate(_HEADERS):

            def make(folder: pathlib.Path, name=name, header=header) -> pathlib.Path:
                content = header.encode() + b"\n"
                member = b"\x93NUMPY\x01\x00" + len(content).to_bytes(2, "little") + content + bytes(12)
                with zipfile.ZipFile(folder / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
                    archive.writestr(name, member)
                return folder / "a.npz"

            yield f"archive: {name!r} header {number}", make
    for size in (1 << 20, 1 << 30):

        def bomb(folder: pathlib.Path, size=size) -> pathlib.Path:
            with zipfile.ZipFile(folder / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("w.npy", bytes(size >> 4))
            return folder / "a.npz"

        yield f"archive: zeros {size}", bomb


def _of_msgpack() -> Iterator[tuple[str, Make]]:
    import msgpack

    packed = {
        "deep lists": b"\x91" * 100_000,
        "deep dicts": b"\x81\xa1a" * 100_000,
        "a list of 4 G": b"\xdd\xff\xff\xff\xff",
        "a text of 4 G": b"\xdb\xff\xff\xff\xff",
        "an array of 10^15": msgpack.packb(
            {"w": msgpack.ExtType(1, msgpack.packb([[10**15], "float32", b"x"]))}
        ),
        "an array of objects": msgpack.packb({"w": msgpack.ExtType(1, msgpack.packb([[1], "O", b"x" * 8]))}),
        "names": msgpack.packb({"\x1b[2J": {"a\n# b": 1}, "..": 2, "/": {"": 3}}),
        "keys": msgpack.packb({1: 2, None: 3, b"x": 4}),
        "a spec that leads out": msgpack.packb(
            {"w": {"driver": "zarr", "kvstore": {"driver": "file", "path": "/etc"}}}
        ),
        "a name that leads out": msgpack.packb({"w": "PLACEHOLDER://../../secret"}),
        "a store elsewhere": msgpack.packb(
            {"w": {"driver": "zarr", "kvstore": {"driver": "http", "base_url": "http://localhost:1"}}}
        ),
    }
    for name, content in packed.items():
        for file in ("checkpoint_3", "item/checkpoint"):

            def make(folder: pathlib.Path, file=file, content=content) -> pathlib.Path:
                (folder / file).parent.mkdir(exist_ok=True)
                (folder / file).write_bytes(content)
                return folder / "item" if file.startswith("item") else folder / file

            yield f"msgpack {file}: {name}", make


def cases(folder: pathlib.Path, seed: int) -> list[tuple[str, Make]]:
    """Returns all cases, each with what writes it."""
    found: list[tuple[str, Make]] = []
    for disk_format in (
        DiskFormat(False, False, False),
        DiskFormat(False, True, True),
        DiskFormat(True, True, True),
    ):
        base = save(folder / str(disk_format), TREE, disk_format)
        for file in sorted(file for file in base.rglob("*") if file.is_file()):
            with contextlib.suppress(ValueError, UnicodeDecodeError):
                json.loads(file.read_text())
                found += _of_json(base, file)
        found += _of_bytes(base, seed)
    return [*found, *_of_databases(), *_of_archives(), *_of_msgpack(), *crafted.cases()]


def _operations(path: pathlib.Path, folder: pathlib.Path) -> dict[str, Callable[[], object]]:
    return {
        "tree": lambda: _command("tree", str(path)),
        "plan": lambda: plan_restore(path, WANTED)._repr_html_(),
        "restore": lambda: restore(path, WANTED),
        "diff": lambda: _command("diff", str(path), str(path), "--values", "--json", "--memory", "2"),
        "convert": lambda: _command("convert", str(path), str(folder / "made" / "out"), "--memory", "2"),
    }


def _command(*words: str) -> None:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(list(words))
    said = out.getvalue() + err.getvalue()
    hidden = [letter for letter in said if not letter.isprintable() and letter != "\n"]
    if status not in (0, 1) or "Traceback" in said or hidden:
        raise AssertionError(f"status {status}: {hidden[:3]} {said[-300:]}")


def _fault(name: str, operation: Callable[[], object], folder: pathlib.Path) -> str:
    """Returns what is wrong with how one operation ends; empty where nothing is."""
    before = memory_bytes()
    with opened_files() as opened, stopwatch() as seconds:
        try:
            with alarm(20 * LIMIT_S):
                operation()
        except RestoreError as error:
            hidden = [letter for letter in str(error) if not letter.isprintable() and letter != "\n"]
            if hidden:
                return f"{name}: {hidden[:3]} in the error"
        except HangError:
            return f"{name}: hangs"
        except BaseException as error:
            return f"{name}: {error!r}"[:500]
    if "secret" in "".join(opened) or "/etc/passwd" in opened:
        return f"{name}: opened a file outside"
    took, grown = seconds(), memory_bytes() - before
    if grown > LIMIT_BYTES:
        return f"{name}: {grown} bytes"
    return f"{name}: {took:.1f} s" if took > LIMIT_S else ""


def run(folder: pathlib.Path, *, seed: int, trials: int | None, seconds: float) -> tuple[list[str], bool]:
    """Runs cases in random order; all of them where there is time."""
    warnings.simplefilter("ignore")
    every = cases(folder / "bases", seed)
    random.Random(seed).shuffle(every)
    start, done, operations = time.monotonic(), 0, 0
    faults: list[str] = []
    (folder / "secret").write_bytes(b"SECRET")
    for name, make in every[:trials]:
        if time.monotonic() - start > seconds:
            break
        work = folder / "case" / "work"
        work.mkdir(parents=True)
        path = make(work)
        for operation, act in _operations(path, work).items():
            fault = _fault(f"{name}: {operation}", act, work)
            faults += [fault] if fault else []
            operations += 1
        shutil.rmtree(folder / "case")
        done += 1
    took = time.monotonic() - start
    head = (
        f"{done} of {len(every)} cases, {operations} operations in {took:.0f} s: {len(faults)} did not hold"
    )
    return [head, *faults[:60]], not faults
