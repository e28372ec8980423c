"""Every disk format, every file, ten kinds of damage: the values, one clear error, or what else?

A wrong value that nobody can notice exists (a payload without a checksum), so each trial is also given to
stock Orbax, or to the reader that the format has, on the same bytes.
"""

import collections
import contextlib
import dataclasses
import faulthandler
import json
import os
import pathlib
import random
import struct
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import serialization, traverse_util

from orbax_nnx_handler import RestoreError, restore
from tests.campaigns.watching import HangError, alarm
from tests.storage.checkpoint import hugging_face
from tests.storage.checkpoints import FORMATS, save

LIMIT_S = 10.0
PARAMS = {
    "dense": {"kernel": np.random.default_rng(1).normal(size=(24, 16)).astype(np.float32)},
    "norm": {"scale": np.random.default_rng(2).normal(size=(16,)).astype(np.float32)},
    "head": np.arange(48, dtype=np.int32).reshape(6, 8),
}
FLAT = {
    "dense/kernel": PARAMS["dense"]["kernel"],
    "norm/scale": PARAMS["norm"]["scale"],
    "head": PARAMS["head"],
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base:
    """A whole checkpoint, what it holds and who else reads it."""

    name: str
    path: pathlib.Path
    expected: Any
    stock: Callable[[], Any]


def bases(folder: pathlib.Path) -> list[Base]:
    """Writes one checkpoint of each format."""
    found: list[Base] = []
    tree = {"params": PARAMS, "step": np.int32(7), "dropout": jax.random.key(3)}
    for disk_format in FORMATS:
        path = save(folder / str(disk_format), tree, disk_format)
        found.append(
            Base(name=str(disk_format), path=path, expected=tree, stock=lambda path=path: _stock(path))
        )
    for name, write in (("npz-stored", np.savez), ("npz-deflated", np.savez_compressed)):
        path = folder / f"{name}.npz"
        write(path, **FLAT)
        found.append(Base(name=name, path=path, expected=PARAMS, stock=lambda path=path: _from_npz(path)))
    path = folder / "checkpoint_7"
    path.write_bytes(serialization.msgpack_serialize({"params": PARAMS}))
    found.append(
        Base(
            name="msgpack",
            path=path,
            expected={"params": PARAMS},
            stock=lambda: serialization.msgpack_restore(path.read_bytes()),
        )
    )
    for name, parts, read in (
        ("safetensors in parts", hugging_face.safetensors_in_parts, _from_safetensors),
        ("msgpack in parts", hugging_face.msgpack_in_parts, _from_packed),
    ):
        folder_of = parts(folder / name.replace(" ", "_"), PARAMS)
        found.append(
            Base(
                name=name,
                path=folder_of,
                expected=PARAMS,
                stock=lambda path=folder_of, read=read: _from_parts(path, read),
            )
        )
    return found


def _from_parts(path: pathlib.Path, read: Callable[[bytes], dict[str, Any]]) -> Any:
    """Reads weights as transformers' loaders do: of each part what the index says lies there."""
    (index,) = path.glob("*.index.json")
    found: dict[str, Any] = {}
    for file in sorted(set(json.loads(index.read_text())["weight_map"].values())):
        found |= read((path / file).read_bytes())
    return traverse_util.unflatten_dict(found, sep="/")


def _from_safetensors(content: bytes) -> dict[str, Any]:
    (length,) = struct.unpack("<Q", content[:8])
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    dtypes = {short: long for long, short in hugging_face.NAMES.items()}
    found: dict[str, Any] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            values = np.frombuffer(body[start:end], dtypes[entry["dtype"]])
            found[name.replace(".", "/")] = values.reshape(entry["shape"])
    return found


def _from_packed(content: bytes) -> dict[str, Any]:
    return traverse_util.flatten_dict(serialization.msgpack_restore(content), sep="/")


def _stock(path: pathlib.Path) -> Any:
    tree = {"params": PARAMS, "step": np.int32(7), "dropout": jax.random.key(3)}
    arguments = jax.tree.map(lambda _: ocp.RestoreArgs(), tree)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(path, args=ocp.args.PyTreeRestore(tree, restore_args=arguments))


def _from_npz(path: pathlib.Path) -> Any:
    with np.load(path) as archive:
        flat = {name: archive[name] for name in archive.files}
    return {
        "dense": {"kernel": flat["dense/kernel"]},
        "norm": {"scale": flat["norm/scale"]},
        "head": flat["head"],
    }


def _flip(content: bytes, chance: random.Random) -> bytes:
    if not content:
        return b"\1"
    at = chance.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :]


def _zero(content: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(max(1, len(content) - 16))
    return content[:at] + bytes(min(16, len(content) - at)) + content[at + 16 :]


def _in_place(change: Callable[[bytes, random.Random], bytes]) -> Callable[..., None]:
    def damage(file: pathlib.Path, content: bytes, chance: random.Random, _: list[pathlib.Path]) -> None:
        file.write_bytes(change(content, chance))

    return damage


def _instead(make: Callable[[pathlib.Path], object]) -> Callable[..., None]:
    def damage(file: pathlib.Path, *_: object) -> None:
        file.unlink()
        make(file)

    return damage


def _swap(file: pathlib.Path, content: bytes, chance: random.Random, others: list[pathlib.Path]) -> None:
    alike = [other for other in others if other != file and other.stat().st_size == len(content)] or others
    file.write_bytes(chance.choice(alike).read_bytes())


DAMAGE: dict[str, Callable[..., None]] = {
    "flip a bit": _in_place(_flip),
    "zero 16 bytes": _in_place(_zero),
    "truncate": _in_place(lambda content, chance: content[: chance.randrange(max(1, len(content)))]),
    "extend": _in_place(lambda content, chance: content + chance.randbytes(1 + chance.randrange(64))),
    "delete": _instead(lambda _: None),
    "a directory": _instead(lambda file: file.mkdir()),
    "a link to itself": _instead(lambda file: file.symlink_to(file.name)),
    "a link to nothing": _instead(lambda file: file.symlink_to("nothing")),
    "a pipe": _instead(os.mkfifo),
    "another file": _swap,
}


def _restore(base: Base) -> tuple[str, str]:
    """Returns what became of a restore, and what was said."""
    wanted = jax.tree.map(lambda value: jax.ShapeDtypeStruct(value.shape, value.dtype), base.expected)
    try:
        with alarm(LIMIT_S):
            found = restore(base.path, wanted)
    except RestoreError as error:
        return "clear", str(error)
    except HangError:
        return "HANG", ""
    except BaseException as error:
        return "TRACEBACK", repr(error)
    return ("right" if _equal(found, base.expected) else "wrong"), ""


def _beside(base: Base) -> str:
    """Returns what stock makes of the same bytes."""
    if any(file.is_fifo() for file in [base.path, *base.path.rglob("*")]):
        return "not asked"  # It waits for ever.
    try:
        with alarm(LIMIT_S):
            found = base.stock()
    except HangError:
        return "HANG"
    except BaseException:
        return "error"
    return "right" if _equal(found, base.expected) else "wrong"


def _equal(found: Any, expected: Any) -> bool:
    try:
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
        return all(np.array_equal(_bits(one), _bits(other), equal_nan=True) for one, other in pairs)
    except (TypeError, ValueError):
        return False


def _bits(value: Any) -> Any:
    is_key = isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(value) if is_key else value)


@contextlib.contextmanager
def _damaged(
    file: pathlib.Path, damage: Callable[..., None], chance: random.Random, files: list[pathlib.Path]
):
    content = file.read_bytes()
    damage(file, content, chance, files)
    try:
        yield
    finally:
        if file.is_dir() and not file.is_symlink():
            file.rmdir()
        else:
            file.unlink(missing_ok=True)
        file.write_bytes(content)


def _names(text: str, files: list[pathlib.Path]) -> bool:
    """Tells whether an error names a file, which need not be the damaged one: that may name another."""
    leaves = ("params", "dense", "norm", "head", "step", "dropout")
    named = [f"{before}{leaf}" for leaf in leaves for before in " /"]
    return any(word in text for word in [*named, *(file.name for file in files)])


def run(
    folder: pathlib.Path, *, seed: int, trials: int | None, seconds: float, every_stock: int = 1
) -> tuple[list[str], bool]:
    """Runs trials round all formats, files and kinds of damage.

    Args:
        folder: An empty directory.
        seed: Of positions and choices.
        trials: How many, 10,000 by default.
        seconds: No trial begins later.
        every_stock: Of how many trials one is given to stock Orbax too.

    Returns:
        A table, and whether everything held.
    """
    warnings.simplefilter("ignore")
    faulthandler.dump_traceback_later(seconds + 120, exit=True)
    chance = random.Random(seed)
    start, done = time.monotonic(), 0
    counts: collections.Counter[tuple[str, str, str]] = collections.Counter()
    unnamed: list[str] = []
    bad: list[str] = []
    found = bases(folder)
    while done < (trials or 10_000) and time.monotonic() - start < seconds:
        base = found[done % len(found)]
        files = [base.path] if base.path.is_file() else sorted(f for f in base.path.rglob("*") if f.is_file())
        file, (kind, damage) = chance.choice(files), chance.choice(list(DAMAGE.items()))
        with _damaged(file, damage, chance, files):
            outcome, said = _restore(base)
            stock = _beside(base) if done % every_stock == 0 else "not asked"
        counts[base.name, outcome, stock] += 1
        what = f"trial {done}: {base.name}, {file.name}, {kind}: {outcome} (stock {stock}): {said[:300]}"
        if outcome in ("HANG", "TRACEBACK") or (outcome == "wrong" and stock in ("error", "right")):
            bad.append(what)
        if outcome == "clear" and not _names(said, files):
            unnamed.append(what)
        done += 1
    faulthandler.cancel_dump_traceback_later()
    return [*_table(counts, done, time.monotonic() - start), *bad[:20], *unnamed[:20]], not (bad or unnamed)


def _table(counts: collections.Counter[tuple[str, str, str]], done: int, seconds: float) -> list[str]:
    lines = [f"{done} trials in {seconds:.0f} s"]
    ours = ("right", "clear", "wrong", "TRACEBACK", "HANG")
    lines.append("format " + " ".join(ours) + " | stock right, error, wrong | wrong where stock erred")
    for name in [*dict.fromkeys(name for name, _, _ in counts), "all"]:
        rows = {key: number for key, number in counts.items() if name in (key[0], "all")}
        mine = [sum(number for key, number in rows.items() if key[1] == kind) for kind in ours]
        theirs = [
            sum(number for key, number in rows.items() if key[2] == kind)
            for kind in ("right", "error", "wrong")
        ]
        worse = sum(number for key, number in rows.items() if key[1:] == ("wrong", "error"))
        lines.append(f"{name} {mine} | {theirs} | {worse}")
    return lines
