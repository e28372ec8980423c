"""Cells of an encoder and a decoder that run over sequences of different lengths."""

import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from orbax_nnx_handler import Verification, verify

SIZE, CELLS = 6, {"gru": (nn.GRUCell, nnx.GRUCell), "lstm": (nn.LSTMCell, nnx.LSTMCell)}


def zeros(kind: str, x: Any) -> Any:
    state = jnp.zeros((len(x), SIZE))
    return state if kind == "gru" else (state, state)


class LinenRnn(nn.Module):
    """Has both in `nn.RNN`."""

    kind: str

    @nn.compact
    def __call__(self, x, y):
        cell = CELLS[self.kind][0]
        carry, _ = nn.RNN(cell(SIZE, name="enc"), return_carry=True, name="over_x")(
            nn.Dense(SIZE, name="x")(x)
        )
        y = nn.RNN(cell(SIZE, name="dec"), name="over_y")(nn.Dense(SIZE, name="y")(y), initial_carry=carry)
        return nn.Dense(3, name="head")(y)


class LinenLoop(nn.Module):
    """Calls both in a loop, or scans them over time."""

    kind: str
    is_scanned: bool = False

    @nn.compact
    def __call__(self, x, y):
        cell, both = CELLS[self.kind][0], []
        if self.is_scanned:
            cell = nn.scan(
                cell, variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1
            )
        carry = zeros(self.kind, x)
        for module, steps in (
            (cell(SIZE, name="enc"), self.wide("x", x)),
            (cell(SIZE, name="dec"), self.wide("y", y)),
        ):
            if self.is_scanned:
                carry, returned = module(carry, steps)
            else:
                carry, returned = stepped(module, carry, steps)
            both.append(returned)
        return nn.Dense(3, name="head")(both[1])

    def wide(self, name, x):
        return nn.Dense(SIZE, name=name)(x)


def stepped(cell: Any, carry: Any, x: Any) -> Any:
    returned = []
    for at in range(x.shape[1]):
        carry, found = cell(carry, x[:, at])
        returned.append(found)
    return carry, jnp.stack(returned, 1)


class LinenBoth(nn.Module):
    """Has an encoder and a decoder of two directions."""

    kind: str

    @nn.compact
    def __call__(self, x, y):
        x, y = nn.Dense(SIZE, name="x")(x), nn.Dense(SIZE, name="y")(y)
        seen = self.both("enc", x).mean(1, keepdims=True)
        y = nn.Dense(SIZE, name="mix")(y + nn.Dense(SIZE, name="seen")(seen))
        return nn.Dense(3, name="head")(self.both("dec", y))

    def both(self, name, x):
        cells = [CELLS[self.kind][0](SIZE, name=f"{name}_{way}") for way in ("f", "b")]
        forward = nn.RNN(cells[0], name=f"{name}_forward")
        backward = nn.RNN(cells[1], reverse=True, keep_order=True, name=f"{name}_backward")
        return nn.Bidirectional(forward, backward)(x)


class LinenStack(nn.Module):
    """Has two cells on each side."""

    kind: str

    @nn.compact
    def __call__(self, x, y):
        x, y = nn.Dense(SIZE, name="x")(x), nn.Dense(SIZE, name="y")(y)
        carries = []
        for layer in range(2):
            carry, x = stepped(CELLS[self.kind][0](SIZE, name=f"enc_{layer}"), zeros(self.kind, x), x)
            carries.append(carry)
        for layer in range(2):
            _, y = stepped(CELLS[self.kind][0](SIZE, name=f"dec_{layer}"), carries[layer], y)
        return nn.Dense(3, name="head")(y)


class Port(nnx.Module):
    """Has the same: `how` the cells run."""

    def __init__(self, rngs, kind, how):
        def cell() -> Any:
            return CELLS[kind][1](SIZE, SIZE, rngs=rngs)

        def over(**options: Any) -> Any:
            return nnx.RNN(cell(), rngs=rngs, **options)

        self.kind, self.how = kind, how
        self.x, self.y = nnx.Linear(3, SIZE, rngs=rngs), nnx.Linear(3, SIZE, rngs=rngs)
        self.head = nnx.Linear(2 * SIZE if how == "both" else SIZE, 3, rngs=rngs)
        if how == "both":
            self.mix, self.seen = nnx.Linear(SIZE, SIZE, rngs=rngs), nnx.Linear(2 * SIZE, SIZE, rngs=rngs)
            self.enc, self.dec = (nnx.Dict(f=over(), b=over(reverse=True, keep_order=True)) for _ in range(2))
        elif how == "stack":
            self.enc, self.dec = (nnx.List([cell(), cell()]) for _ in range(2))
        elif how == "rnn":
            self.enc, self.dec = over(return_carry=True), over()
        else:
            self.enc, self.dec = cell(), cell()

    def __call__(self, x, y):
        return self.head(getattr(self, f"by_{self.how}")(self.x(x), self.y(y)))

    def by_rnn(self, x, y):
        return self.dec(y, initial_carry=self.enc(x)[0])

    def by_loop(self, x, y):
        return stepped(self.dec, stepped(self.enc, zeros(self.kind, x), x)[0], y)[1]

    def by_scan(self, x, y):
        axes = {"in_axes": (None, nnx.Carry, 1), "out_axes": (nnx.Carry, 1)}
        run = nnx.scan(lambda cell, carry, x: cell(carry, x), **axes)
        return run(self.dec, run(self.enc, zeros(self.kind, x), x)[0], y)[1]

    def by_both(self, x, y):
        seen = jnp.concatenate([self.enc["f"](x), self.enc["b"](x)], -1).mean(1, keepdims=True)
        y = self.mix(y + self.seen(seen))
        return jnp.concatenate([self.dec["f"](y), self.dec["b"](y)], -1)

    def by_stack(self, x, y):
        carries = []
        for cell in self.enc:
            carry, x = stepped(cell, zeros(self.kind, x), x)
            carries.append(carry)
        for cell, carry in zip(self.dec, carries, strict=True):
            _, y = stepped(cell, carry, y)
        return y


ONE, TWO = {"enc": "enc", "dec": "dec"}, {"enc_{i}": "enc/{i}", "dec_{i}": "dec/{i}"}
IN_RNN = {"enc": "enc/cell", "dec": "dec/cell"}
WAYS = {f"{side}_{way}": f"{side}/{way}/cell" for side in ("enc", "dec") for way in "fb"}
PROGRAMS: dict[str, tuple[Any, str, Mapping[str, str], str]] = {
    "nn.RNN": (LinenRnn, "rnn", IN_RNN, "enc/cell"),
    "loops": (LinenLoop, "loop", ONE, "enc"),
    "scans": (lambda kind: LinenLoop(kind, True), "scan", ONE, "enc"),
    "nn.RNN and a loop": (LinenRnn, "loop", ONE, "enc"),
    "a loop and nnx.RNN": (LinenLoop, "rnn", IN_RNN, "enc/cell"),
    "two directions": (LinenBoth, "both", WAYS, "enc/f/cell"),
    "a stack": (LinenStack, "stack", TWO, "enc/0"),
}


def told(
    path: pathlib.Path, kind: str, program: str, lengths: tuple[int, int], exchanged: bool
) -> Verification:
    make, how, names, _ = PROGRAMS[program]
    random = np.random.default_rng(1)
    inputs = tuple(random.normal(size=(2, length, 3)).astype("f") for length in lengths)

    def moved(keys: Any, leaf: Any) -> Any:  # What NNX has no place for stays zero.
        is_left_out = kind == "gru" and [key.key for key in keys][-2:] == ["hn", "bias"]
        return leaf if is_left_out else leaf + 0.3 * random.normal(size=leaf.shape).astype("f")

    variables = jax.tree_util.tree_map_with_path(moved, make(kind).init(jax.random.key(0), *inputs))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "c", variables)
    target, other = nnx.eval_shape(lambda: Port(nnx.Rngs(0), kind, how)), {"enc": "dec", "dec": "enc"}
    wanted = {one: name if not exchanged else other[name[:3]] + name[3:] for one, name in names.items()}
    run = lambda model, *arrays: model(*arrays)  # noqa: E731
    return verify(path / "c", target, make(kind).apply, run, inputs, renames=[*wanted.items()])


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("kind", CELLS)
def test_cells_that_are_exchanged_are_named_though_they_run_over_other_lengths(
    kind: str, program: str, tmp_path: pathlib.Path
):
    right = told(tmp_path / "right", kind, program, (4, 3), exchanged=False)
    first = told(tmp_path / "wrong", kind, program, (4, 3), exchanged=True).first

    assert right.equal
    assert first is not None
    assert first.path == PROGRAMS[program][3]
    assert "It needs those that dec" in first.proved


def test_of_sequences_too_long_to_compare_each_call_with_each_the_first_calls_tell(tmp_path: pathlib.Path):
    first = told(tmp_path, "lstm", "loops", (18, 20), exchanged=True).first

    assert first is not None
    assert first.path == "enc"
    assert "It needs those that dec was given" in first.proved
