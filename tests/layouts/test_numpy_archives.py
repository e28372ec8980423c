"""`checkpoint.npz` of big_vision before 2023, and weights that are published as NumPy archives."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from orbax_nnx_handler import plan_restore, restore
from orbax_nnx_handler.planning.core.errors import NotACheckpointError
from tests.layouts import writers
from tests.layouts.programs import (
    STEP,
    Program,
    Trained,
    assert_goes_on,
    expected,
    goes_on,
    random_variables,
    restored,
    trained,
    vision_transformer,
)
from tests.layouts.writers import OPTIMIZERS


def adam() -> optax.GradientTransformation:
    """`flax.optim.Adam`, with numbers of the other programs' size."""
    return optax.adam(1e-2, eps=1e-4)


def state_tree(state: Trained) -> dict[str, Any]:
    return writers.big_vision_tree(state.params, state.opt_state)


def early_tree(state: Trained) -> dict[str, Any]:
    optimizer = writers.flax_optim_tree(state, writers.flax_optim_slots(state))
    return {"opt": optimizer, "extra": {"accum_train_time": 12.5, "accum_examples_seen": 4096}}


@pytest.mark.parametrize(("optimizer", "packed"), [("adam", False), ("adafactor", True)])
def test_a_train_state_goes_on_in_nnx(tmp_path: Path, optimizer: str, packed: bool) -> None:
    program = vision_transformer(OPTIMIZERS[optimizer])

    path = writers.write_big_vision_npz(tmp_path, state_tree(trained(program)), packed=packed)

    assert_goes_on(program, path)


def test_a_train_state_of_flax_optim_goes_on_in_nnx_and_its_step_is_every_count(tmp_path: Path) -> None:
    program = vision_transformer(adam)
    path = writers.write_big_vision_npz(tmp_path, early_tree(trained(program)))

    model, optimizer = restored(program, path)

    assert plan_restore(path, model).layout == "big_vision"
    counts = (optimizer.step, optimizer.opt_state[0].count)
    assert [int(count.get_value()) for count in counts] == [STEP, STEP]
    goes_on(program, model, optimizer)


FORMS: dict[str, Callable[[Any], Any]] = {
    "with params above": lambda params: {"params": params},
    "bare": lambda params: params,
    "of flax.optim": lambda params: {"opt": {"target": params}},
}


@pytest.mark.parametrize("form", FORMS)
def test_published_weights_compute_in_nnx_what_they_compute_in_linen(tmp_path: Path, form: str) -> None:
    program = vision_transformer(adam)
    tree = FORMS[form](trained(program).params)
    path = writers.write_big_vision_npz(tmp_path, tree, name="B_16.npz")

    model = restored_model(program, path)

    np.testing.assert_allclose(model(program.inputs, train=False), expected(program)[0], rtol=1e-5, atol=1e-5)


def test_the_weights_of_a_multi_optimizer_are_restored_without_it(tmp_path: Path) -> None:
    """`flax.optim.MultiOptimizer` kept a list of states, each with a step of its own."""
    program = vision_transformer(adam)
    tree = early_tree(trained(program))["opt"]
    path = writers.write_big_vision_npz(tmp_path, {"opt": {**tree, "state": [tree["state"], tree["state"]]}})

    model = restored_model(program, path, unexpected="ignore")

    np.testing.assert_allclose(model(program.inputs, train=False), expected(program)[0], rtol=1e-5, atol=1e-5)


def restored_model(program: Program, path: Path, **options: Any) -> Any:
    target = nnx.eval_shape(lambda: program.nnx(nnx.Rngs(0)))
    return restore(path, target, renames=program.renames, **{"unexpected": "error", **options})


def test_weights_in_bfloat16_are_those_of_linen_to_the_bit(tmp_path: Path) -> None:
    program = vision_transformer(adam)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), random_variables(program)["params"])
    path = writers.write_big_vision_npz(tmp_path, {"params": params})

    model = restored_model(program, path, dtype="stored")

    found = model.blocks[1].up.kernel.get_value()
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        found, params["Transformer"]["encoderblock"]["MlpBlock_0"]["Dense_0"]["kernel"][1]
    )
    logits = program.linen.apply({"params": params}, program.inputs, train=False)
    np.testing.assert_allclose(model(program.inputs, train=False), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True], ids=["stored", "deflated"])
def test_each_device_gets_its_own_shard(mesh: Mesh, tmp_path: Path, packed: bool) -> None:
    kernel = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    tree = {"params": {"kernel": kernel, "turned": np.asfortranarray(kernel.T)}}
    path = writers.write_big_vision_npz(tmp_path, tree, packed=packed)
    shardings = {"kernel": PartitionSpec("fsdp", "tensor"), "turned": PartitionSpec(("tensor"), "fsdp")}
    target = {
        name: jax.ShapeDtypeStruct(tree["params"][name].shape, np.float32, sharding=NamedSharding(mesh, spec))
        for name, spec in shardings.items()
    }

    found = restore(path, target, unexpected="error")

    for name, array in found.items():
        assert array.sharding == target[name].sharding
        np.testing.assert_array_equal(array, tree["params"][name])


def test_a_directory_means_the_file_without_a_number_which_is_the_newest(tmp_path: Path) -> None:
    program = vision_transformer(OPTIMIZERS["adam"])
    tree = state_tree(trained(program))
    writers.write_big_vision_npz(tmp_path, jax.tree.map(np.zeros_like, tree), copies=[1, 2])
    writers.write_big_vision_npz(tmp_path, tree)

    assert_goes_on(program, tmp_path)


def test_a_directory_of_copies_means_the_newest_of_them(tmp_path: Path) -> None:
    program = vision_transformer(OPTIMIZERS["adam"])
    tree = state_tree(trained(program))
    writers.write_big_vision_npz(tmp_path, jax.tree.map(np.zeros_like, tree), copies=[9])
    writers.write_big_vision_npz(tmp_path, tree, copies=[10]).unlink()

    assert_goes_on(program, tmp_path)


def test_a_directory_of_several_runs_is_asked_about(tmp_path: Path) -> None:
    for name in ("B_16.npz", "L_16.npz"):
        writers.write_big_vision_npz(tmp_path, {"kernel": np.zeros(2)}, name=name)

    with pytest.raises(NotACheckpointError) as caught:
        plan_restore(tmp_path, {"kernel": jax.ShapeDtypeStruct((2,), np.float32)})

    assert str(caught.value) == (
        f"{tmp_path} holds several NumPy archives: B_16.npz, L_16.npz.\nhint: pass the path of one of them."
    )


def test_a_part_of_a_published_model_is_restored_by_itself(tmp_path: Path) -> None:
    """SigLIP keeps the image tower under `img`; big_vision calls that part `file.npz:img`."""
    program = vision_transformer(adam)
    params = trained(program).params
    path = writers.write_big_vision_npz(tmp_path, {"params": {"img": params, "t": np.zeros(1)}})
    target = {"img": nnx.eval_shape(lambda: program.nnx(nnx.Rngs(0)))}

    model = restore(path, target, renames=program.renames, unexpected="ignore")["img"]

    np.testing.assert_allclose(model(program.inputs, train=False), expected(program)[0], rtol=1e-5, atol=1e-5)
