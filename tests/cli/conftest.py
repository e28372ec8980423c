"""A Linen program's checkpoints, an NNX program's file, and the command line called in this process."""

import contextlib
import dataclasses
import io
import json
import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from flax.training.train_state import TrainState

from orbax_nnx_handler.cli import main

MODEL = pathlib.Path(__file__).parent / "nnx_program.py"
PROGRAMS = MODEL.with_name("both_programs.py")
WIDTH = 8


class Mlp(nn.Module):
    """The Linen side of `nnx_program.make`."""

    layers: int = 3

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(WIDTH, name="up")(x)
        for number in range(self.layers):
            x = nn.relu(nn.Dense(WIDTH, name=f"hidden_{number}")(x))
        x = nn.BatchNorm(use_running_average=True, name="norm")(x)
        return nn.Dense(4, name="down")(x)


class AutoNamed(nn.Module):
    """The Linen side of `nnx_program.make_named`, its modules named by Linen."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Dense(WIDTH)(x))
        x = nn.LayerNorm()(x)
        return nn.Dense(4)(x)


class WithStatistics(TrainState):
    batch_stats: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Said:
    """What a command said and its exit status."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def cli() -> Callable[..., Said]:
    """Runs one command in this process, its output as in a pipe."""

    def run(*argv: object) -> Said:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main([str(argument) for argument in argv])
        return Said(status=status, out=out.getvalue(), err=err.getvalue())

    return run


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A manager's root with the steps 100 and 200 of a Linen `TrainState`."""
    path = tmp_path_factory.mktemp("linen")
    variables = Mlp().init(jax.random.key(0), jnp.ones((1, 16)))
    state = WithStatistics.create(
        apply_fn=None,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        tx=optax.adam(1e-3),
    )
    with ocp.CheckpointManager(path) as manager:
        for step in (100, 200):
            manager.save(step, args=ocp.args.PyTreeSave(state.replace(step=jnp.int32(step))))
    return path


@pytest.fixture(scope="session")
def auto_named(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """An item that holds the variables of `AutoNamed`."""
    path = tmp_path_factory.mktemp("auto_named") / "item"
    variables = AutoNamed().init(jax.random.key(1), jnp.ones((1, 16)))
    ocp.PyTreeCheckpointer().save(path, variables)
    return path


def stock(path: pathlib.Path) -> Any:
    """Returns an item as Orbax alone restores it."""
    return ocp.PyTreeCheckpointer().restore(path)
