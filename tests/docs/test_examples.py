"""Each public name shows an example in its docstring, and the example runs."""

import inspect
import pathlib
import re

import jax
import orbax.checkpoint as ocp
import pytest
from flax import linen, nnx
from orbax.checkpoint import v1 as ocp_v1

import orbax_nnx_handler
from orbax_nnx_handler import v1
from tests.docs import worlds

PUBLIC = {name: getattr(orbax_nnx_handler, name) for name in orbax_nnx_handler.__all__}
SHOWN = {name: value for name, value in PUBLIC.items() if not name.endswith("Error")}
SHOWN |= {f"v1.{name}": getattr(v1, name) for name in ("NNXLinenHandler", "configured", "context")}
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """A checkpoint `run`, the programs around it, and the names that a user would have imported."""
    where = tmp_path_factory.mktemp("examples")
    world = worlds.tiny(where)
    dense = linen.Dense(16)
    tokens = jax.numpy.zeros((1, 16))
    programs = {
        "linen_model": dense,
        "model": nnx.Linear(16, 16, rngs=nnx.Rngs(0)),
        "make_model": lambda: nnx.Linear(16, 16, rngs=nnx.Rngs(0)),
        "key": jax.random.key(0),
        "tokens": tokens,
        "target": nnx.eval_shape(world["make_train_state"]),
    }
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(where / "dense", dense.init(jax.random.key(0), tokens))
    modules = {"jax": jax, "nnx": nnx, "ocp": ocp, "ocp_v1": ocp_v1, "v1": v1, "pathlib": pathlib}
    return where, PUBLIC | world | programs | modules


def own(name, where, names):
    """What some examples mean by other names: two programs are compared on a checkpoint of that model."""
    if name not in ("Verification", "verify"):
        return {}
    return {"path": where / "dense", "target": nnx.eval_shape(names["make_model"])}


@pytest.mark.parametrize("name", SHOWN)
def test_the_example_of_a_public_name_runs(name, names, monkeypatch):
    where, namespace = names
    monkeypatch.chdir(where)
    examples = _BLOCK.findall(inspect.getdoc(SHOWN[name]) or "")

    assert examples
    for example in examples:
        exec(compile(example, name, "exec"), namespace | own(name, where, namespace))
