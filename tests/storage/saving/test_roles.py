"""What is called as a field of a train state and is none: it is saved and restored as a part of the model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from orbax_nnx_handler import restore, save
from tests.sampled import sampled


class Own(nnx.Variable[Any]):
    pass


class Part(nnx.Module):
    def __init__(self, kind: type[nnx.Variable[Any]]):
        self.w = kind(jnp.arange(1.0, 4.0))


class Net(nnx.Module):
    def __init__(self, name: str, part: Any):
        self.linear = nnx.Linear(2, 2, rngs=nnx.Rngs(1))
        setattr(self, name, part)


def used(*names: str) -> nnx.Rngs:
    """Returns streams of which each has given a key."""
    rngs = nnx.Rngs(**{name: seed for seed, name in enumerate(names, 3)})
    for name in names:
        rngs[name]()
    return rngs


def elements(item: Any) -> dict[str, Any]:
    found = jax.tree.leaves_with_path(item)
    is_key = jax.dtypes.prng_key
    return {
        jax.tree_util.keystr(path): np.asarray(
            jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, is_key) else leaf
        )
        for path, leaf in found
    }


def assert_comes_back(make: Callable[[], Any], path: Path) -> None:
    item = make()
    save(path, item)

    found = restore(path, nnx.eval_shape(make))

    np.testing.assert_equal(elements(nnx.state(found)), elements(nnx.state(item)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: used("params", "dropout"),
        lambda: {"rngs": used("params", "dropout")},
        lambda: nnx.state(Net("rngs", used("params", "dropout")), nnx.RngState),
        lambda: {"model": {"params": nnx.Dropout(0.5, rngs=used("params", "dropout"))}},
    ],
    ids=["streams", "below a key", "of a model", "of a module"],
)
def test_random_state_alone_comes_back_where_a_stream_is_called_params(make: Any, tmp_path: Path) -> None:
    assert_comes_back(make, tmp_path / "saved")


FORMS: dict[str, Callable[[Any], Any]] = {
    "module": lambda net: net,
    "state": nnx.state,
    "trained": lambda net: {"model": net, "optimizer": nnx.Optimizer(net, optax.adam(0.1), wrt=nnx.Param)},
    "trained state": lambda net: nnx.state(FORMS["trained"](net)),
}


PARTS: dict[str, Callable[[], Any]] = {
    "stream": lambda: used("default").default,
    "streams": lambda: used("opt_state", "params"),
    "dropout": lambda: nnx.Dropout(0.5, rngs=used("dropout")),
    "nothing": lambda: nnx.Dropout(0.5),
    "own kind": lambda: Part(Own),
    "no kind": lambda: Part(nnx.Variable),
    "list": lambda: nnx.List([Part(Own), Part(nnx.Param)]),
    "tuple": lambda: nnx.data((Part(Own), Part(nnx.Param))),
}


@pytest.mark.parametrize(("part", "name", "form"), sampled(PARTS, ["opt_state", "optimizer", "step"], FORMS))
def test_a_part_of_the_model_is_no_optimizer_whatever_it_is_called(
    part: str, name: str, form: str, tmp_path: Path
) -> None:
    assert_comes_back(lambda: FORMS[form](Net(name, PARTS[part]())), tmp_path / "saved")
