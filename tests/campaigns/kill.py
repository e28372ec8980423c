"""kill -9 at random moments of saves and conversions: afterwards the old or the new is whole, every time.

Each process first looks at what the one before it left, then goes on writing until it is killed. They are
forked from one that has imported everything and has not started JAX.
"""

import collections
import contextlib
import logging
import os
import pathlib
import random
import select
import signal
import time
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from orbax_nnx_handler import NNXLinenHandler, NNXLinenSave, RestoreError, cli, restore, save
from tests.campaigns.watching import in_child

WHOLE, BROKEN = 0, 3
SHAPE = (64, 1024)


class Net(nnx.Module):
    """Two arrays that hold the same number everywhere."""

    def __init__(self, value: float):
        self.first = nnx.Param(jnp.full(SHAPE, value))
        self.second = nnx.Param(jnp.full(SHAPE, value))


def _value(path: pathlib.Path) -> float:
    """Returns the one number that an item holds; it must hold just one."""
    found = restore(path, nnx.eval_shape(lambda: Net(0.0)))
    numbers = np.unique(np.stack([np.asarray(found.first[...]), np.asarray(found.second[...])]))
    assert len(numbers) == 1, f"{path}: {numbers[:5]}"
    return float(numbers[0])


def _steps(folder: pathlib.Path) -> list[pathlib.Path]:
    return [child for child in folder.iterdir() if child.name.isdecimal()]


def _check_steps(folder: pathlib.Path) -> None:
    newest = _last(folder)
    for step in _steps(folder):
        # An older one may have been killed while the manager deleted it; that is said, then.
        with contextlib.suppress(RestoreError) if int(step.name) < newest else contextlib.nullcontext():
            assert _value(step) == int(step.name)
    if newest:
        assert _value(folder) == newest


def _manage(folder: pathlib.Path, last: int, *, is_async: bool) -> None:
    options = ocp.CheckpointManagerOptions(max_to_keep=3, enable_async_checkpointing=is_async)
    with ocp.CheckpointManager(folder, item_handlers=NNXLinenHandler(), options=options) as manager:
        for step in range(last + 1, last + 1000):
            manager.save(step, args=NNXLinenSave(Net(float(step))))


def _last(folder: pathlib.Path) -> int:
    return max((int(step.name) for step in _steps(folder)), default=0)


def _force(folder: pathlib.Path) -> None:
    for value in range(1, 1000):
        save(folder / "item", Net(float(value)), force=True)


def _check_forced(folder: pathlib.Path) -> None:
    if _started(folder):
        assert _value(folder / "item") >= 1
    _check_left(folder)


def _check_left(folder: pathlib.Path) -> None:
    """What the last process left may be there, and what the ones before it left at that place may not."""
    found = [str(path.relative_to(folder)) for path in folder.rglob("*.converting-*")]
    places = [name.partition(".converting-")[0] for name in found]
    assert len(places) == len(set(places)), found


def _check_converted(folder: pathlib.Path) -> None:
    _check_steps(folder)
    _check_left(folder)


def _started(folder: pathlib.Path) -> bool:
    return (folder / "started").exists()


def _convert(folder: pathlib.Path) -> None:
    for step in range(_last(folder) + 1, _last(folder) + 1000):
        source = folder / "sources" / str(step % 2)
        save(source, Net(float(step)), force=True)
        if cli.main(["convert", str(source), str(folder / str(step))]) != 0:
            raise RestoreError("a conversion failed")


MODES: dict[str, tuple[Callable[[pathlib.Path], None], Callable[[pathlib.Path], None]]] = {
    "manager": (lambda folder: _manage(folder, _last(folder), is_async=False), _check_steps),
    "async manager": (lambda folder: _manage(folder, _last(folder), is_async=True), _check_steps),
    "forced save": (_force, _check_forced),
    "convert": (_convert, _check_converted),
}


def _work(folder: pathlib.Path, mode: str, ready: int) -> int:
    logging.disable(logging.CRITICAL)
    write, check = MODES[mode]
    with pathlib.Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        try:
            check(folder)
            if mode == "forced save" and not _started(folder):
                save(folder / "item", Net(1.0))
                (folder / "started").touch()
        except BaseException as error:
            with contextlib.suppress(OSError):
                os.write(2, f"{mode}: {error!r}\n".encode())
            return BROKEN
        os.write(ready, b"x")
        write(folder)
    return WHOLE


def _one(folder: pathlib.Path, mode: str, chance: random.Random) -> int | None:
    """Lets a process check and write, and kills it; returns its status if it ended by itself."""
    ends = os.pipe()
    child = in_child(lambda: _work(folder, mode, ends[1]))
    os.close(ends[1])
    try:
        # The end of the pipe comes too where the process ends before it writes.
        select.select([ends[0]], [], [], 120)
        if os.read(ends[0], 1):
            time.sleep(chance.random() * 1.5)
        else:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        os.close(ends[0])
    os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return None if status == -signal.SIGKILL else status


def run(folder: pathlib.Path, *, seed: int, trials: int | None, seconds: float) -> tuple[list[str], bool]:
    """Kills processes round all modes; what the last ones left is checked too."""
    chance = random.Random(seed)
    start, killed = time.monotonic(), collections.Counter[str]()
    broken = collections.Counter[str]()
    while killed.total() < (trials or 500) and time.monotonic() - start < seconds and not broken:
        mode = [*MODES][killed.total() % len(MODES)]
        place = folder / mode.replace(" ", "_")
        place.mkdir(exist_ok=True)
        if _one(place, mode, chance) is not None:
            broken[mode] += 1
        killed[mode] += 1
    for mode in killed:
        place = folder / mode.replace(" ", "_")
        status = os.waitpid(in_child(lambda place=place, mode=mode: MODES[mode][1](place)), 0)[1]
        broken[mode] += status != 0
    lines = [f"{killed.total()} processes killed in {time.monotonic() - start:.0f} s: {dict(killed)}"]
    return [*lines, f"not whole: {dict(+broken)}"], not +broken
