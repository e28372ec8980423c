"""Rules from a stock checkpoint to NNX and back: weights and moments, on disk and on devices."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from orbax_nnx_handler import (
    Cast,
    Drop,
    Fuse,
    MissingParamError,
    NNXLinenHandler,
    NNXLinenRestore,
    NNXLinenSave,
    RuleError,
    Scale,
    Split,
    StackLayers,
    Transpose,
    UnstackLayers,
    plan_restore,
    restore,
    save,
)
from orbax_nnx_handler.planning.core.recipes import reads
from tests.zoo.pairs import saved

RULES = (
    ("attn/qk", "qk"),
    Split("qk", ("query", "key"), axis=-1),
    UnstackLayers("Scan_0", "blocks/{i}", axis=1),
    StackLayers("expert_{i}", "experts", axis=0),
    Fuse(("gate", "up"), "wide", axis=1),
    Transpose("Dense_0/kernel", (1, 0)),
    ("Dense_0", "head"),
)


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype("float32")


def weights(seed: int) -> dict[str, Any]:
    """Returns parameters, or moments of them, as a Linen program has them."""
    rng = np.random.default_rng(seed)
    return {
        "attn": {"qk": {"kernel": normal(rng, 4, 6), "bias": normal(rng, 6)}},
        "Scan_0": {"kernel": normal(rng, 5, 3, 2)},
        "expert_0": {"kernel": normal(rng, 2, 2)},
        "expert_1": {"kernel": normal(rng, 2, 2)},
        "gate": {"kernel": normal(rng, 3, 4)},
        "up": {"kernel": normal(rng, 3, 4)},
        "Dense_0": {"kernel": normal(rng, 2, 5), "bias": normal(rng, 2)},
    }


def expected(tree: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns what the rules make of the weights, with NumPy's own operations."""
    query, key = np.split(tree["attn"]["qk"]["kernel"], 2, axis=1)
    query_bias, key_bias = np.split(tree["attn"]["qk"]["bias"], 2)
    blocks = {f"blocks/{i}/kernel": tree["Scan_0"]["kernel"][:, i] for i in range(3)}
    return blocks | {
        "query/kernel": query,
        "key/kernel": key,
        "query/bias": query_bias,
        "key/bias": key_bias,
        "experts/kernel": np.stack([tree["expert_0"]["kernel"], tree["expert_1"]["kernel"]]),
        "wide/kernel": np.concatenate([tree["gate"]["kernel"], tree["up"]["kernel"]], axis=1),
        "head/kernel": tree["Dense_0"]["kernel"].T,
        "head/bias": tree["Dense_0"]["bias"],
    }


class Model(nnx.Module):
    """Holds a parameter for every path, and computes nothing."""

    def __init__(self) -> None:
        leaves = expected(weights(0))
        for name in ("query", "key", "experts", "wide", "head"):
            own = {path.split("/")[1]: v for path, v in leaves.items() if path.startswith(f"{name}/")}
            setattr(
                self, name, nnx.Dict({leaf: nnx.Param(jax.numpy.zeros(v.shape)) for leaf, v in own.items()})
            )
        self.blocks = nnx.List([nnx.Dict(kernel=nnx.Param(jax.numpy.zeros((5, 2)))) for _ in range(3)])


def build() -> Any:
    model = Model()
    return model, nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)


def train_state() -> dict[str, Any]:
    moments = {"count": np.int32(7), "mu": weights(1), "nu": weights(2)}
    return {"params": weights(0), "opt_state": [moments, None], "step": np.int32(7)}


def values(state: Any) -> dict[str, np.ndarray]:
    return {"/".join(map(str, path)): np.asarray(leaf) for path, leaf in nnx.to_flat_state(nnx.state(state))}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rules") / "linen"
    ocp.PyTreeCheckpointer().save(path, train_state())
    return path


@pytest.fixture(scope="module")
def target() -> Any:
    return nnx.eval_shape(build)


def read(path: Path) -> dict[str, np.ndarray]:
    tree = ocp.PyTreeCheckpointer().restore(path)
    return {jax.tree_util.keystr(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def assert_equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert sorted(one) == sorted(other)
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_weights_and_both_moments_arrive_as_numpy_computes_them(checkpoint: Path, target: Any) -> None:
    model, optimizer = restore(checkpoint, target, renames=RULES, unexpected="error")

    assert_equal(values(model), expected(weights(0)))
    state = values(optimizer)
    for slot, seed in (("mu", 1), ("nu", 2)):
        own = {
            path.removeprefix(f"opt_state/0/{slot}/"): v for path, v in state.items() if f"/{slot}/" in path
        }
        assert_equal(own, expected(weights(seed)))


def test_the_same_rules_save_back_what_was_stored(checkpoint: Path, target: Any, tmp_path: Path) -> None:
    state = restore(checkpoint, target, renames=RULES)

    save(tmp_path / "back", state, renames=RULES)

    assert_equal(read(tmp_path / "back"), read(checkpoint))


def test_a_manager_restores_and_saves_under_the_same_rules(
    checkpoint: Path, target: Any, tmp_path: Path
) -> None:
    with ocp.CheckpointManager(tmp_path / "run", item_handlers=NNXLinenHandler(renames=RULES)) as manager:
        manager.save(1, args=NNXLinenSave(restore(checkpoint, target, renames=RULES), renames=RULES))
        manager.wait_until_finished()

        model, _ = manager.restore(1, args=NNXLinenRestore(target))

    assert_equal(values(model), expected(weights(0)))
    assert_equal(read(tmp_path / "run" / "1" / "default"), read(checkpoint))


class Matrix(nnx.Module):
    """One parameter."""

    def __init__(self) -> None:
        self.w = nnx.Param(jax.numpy.zeros((6, 4)))


def factored() -> Any:
    """Returns a model whose second moments are kept as rows and columns."""
    model = Matrix()
    return model, nnx.Optimizer(model, optax.scale_by_factored_rms(min_dim_size_to_factor=2), wrt=nnx.Param)


def test_factored_moments_follow_a_transpose(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    moments = {
        "v_row": {"w": normal(rng, 4)},
        "v_col": {"w": normal(rng, 6)},
        "v": {"w": normal(rng, 1)},
        "count": np.int32(1),
    }
    state = {"params": {"w": normal(rng, 4, 6)}, "opt_state": [moments], "step": np.int32(1)}
    path = saved(state, tmp_path / "checkpoint")

    plan = plan_restore(path, nnx.eval_shape(factored), renames=[Transpose("w", (1, 0))])

    # optax.factorized: v_row lacks the largest axis, v_col the second, whichever way the matrix lies.
    assert {tuple(reads(item.recipe)) for path, item in plan.restored.items() if "v_row" in path} == {
        (("opt_state", 0, "v_row", "w"),)
    }
    assert {tuple(reads(item.recipe)) for path, item in plan.restored.items() if "v_col" in path} == {
        (("opt_state", 0, "v_col", "w"),)
    }


def test_a_dropped_weight_takes_its_moments_along(checkpoint: Path, target: Any, tmp_path: Path) -> None:
    state = train_state()
    for part in (state["params"], state["opt_state"][0]["mu"], state["opt_state"][0]["nu"]):
        part["old_head"] = {"kernel": np.ones((3, 3), "float32")}
    path = saved(state, tmp_path / "checkpoint")
    rules = [*RULES, Drop("old_head", "the task is another one")]

    plan = plan_restore(path, target, renames=rules, unexpected="error")
    model, _ = restore(path, target, renames=rules, unexpected="error")

    assert {"/".join(map(str, p)): item.reason for p, item in plan.dropped.items()} == {
        "params/old_head/kernel": "the task is another one",
        "opt_state/0/mu/old_head/kernel": "the task is another one",
        "opt_state/0/nu/old_head/kernel": "the task is another one",
    }
    assert_equal(values(model), expected(weights(0)))


def test_a_scale_is_refused_where_moments_are_wanted_and_works_where_not(
    checkpoint: Path, target: Any
) -> None:
    rules = [Scale("Dense_0/bias", 0.5), *RULES]

    with pytest.raises(MissingParamError) as raised:
        restore(checkpoint, target, renames=rules)
    model = restore(checkpoint, nnx.eval_shape(Model), renames=rules)

    said = " ".join(str(raised.value).split())
    assert (
        "cause: 2 optimizer moments cannot follow what Scale(pattern='Dense_0/bias', factor=0.5); "
        "('Dense_0', 'head') does to their parameters: "
        "a moment of a scaled parameter is not the scaled moment." in said
    )
    assert said.count("cause:") == 1
    np.testing.assert_array_equal(values(model)["head/bias"], weights(0)["Dense_0"]["bias"] * np.float32(0.5))


def test_a_cast_of_stored_integers_reads_their_values(tmp_path: Path) -> None:
    table = np.arange(-3, 9, dtype="int8").reshape(3, 4)
    path = saved({"params": {"table": table}}, tmp_path / "checkpoint")
    wanted = {"table": jax.ShapeDtypeStruct((3, 4), "bfloat16")}

    found = restore(path, wanted, renames=[Cast("table", "bfloat16")])

    np.testing.assert_array_equal(np.asarray(found["table"]).astype("float32"), table.astype("float32"))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (lambda: [Drop("a", "why")], "cannot be undone"),
        (lambda: [("stored", "nowhere")], "matches no leaf of the state"),
        (lambda: [("query", "key")], "would both be stored at"),
    ],
)
def test_rules_that_cannot_save_are_refused_before_anything_is_written(
    rules: Callable[[], Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RuleError, match=message):
        save(tmp_path / "back", build(), renames=rules())

    assert not (tmp_path / "back").exists()


def test_a_scaled_weight_is_not_saved_beside_its_moments(tmp_path: Path) -> None:
    with pytest.raises(RuleError, match="its parameter is scaled"):
        save(tmp_path / "back", build(), renames=[Scale("head/bias", 0.5)])


def test_factored_moments_that_rules_do_not_speak_of_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(RuleError) as refused:
        save(tmp_path / "back", factored(), renames=[Transpose("w", (1, 0))])

    assert str(refused.value).startswith(
        "a moment of params/w cannot be saved under these rules (transpose (1, 0)): "
        "its shape is (4,), that of its parameter (6, 4); rules speak of the parameter's axes.\n"
        "hint: save the model without its optimizer"
    )
    assert not (tmp_path / "back").exists()
