"""The same handler under `orbax.checkpoint.v1`."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp_v0
import pytest
from flax import nnx
from orbax.checkpoint import v1 as ocp

from orbax_nnx_handler import MissingParamError, RestoreError, SingleReplica, restore, v1
from orbax_nnx_handler.api import restore_item
from tests.cases import load_case, problems

if not hasattr(ocp, "load_checkpointables") or not hasattr(ocp, "save"):
    pytest.skip("this version of orbax-checkpoint has another v1", allow_module_level=True)

TX = optax.adamw(1e-2)


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(3, 2, rngs=rngs)])
        self.norm = nnx.BatchNorm(2, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)


def build(seed: int = 0) -> tuple[Net, nnx.Optimizer]:
    model = Net(nnx.Rngs(seed))
    return model, nnx.Optimizer(model, TX, wrt=nnx.Param)


def assert_equal(ours: Any, theirs: Any) -> None:
    assert jax.tree.structure(nnx.state(ours)) == jax.tree.structure(nnx.state(theirs))
    for leaf, other in zip(jax.tree.leaves(nnx.state(ours)), jax.tree.leaves(nnx.state(theirs)), strict=True):
        assert leaf.dtype == other.dtype
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf, other = jax.random.key_data(leaf), jax.random.key_data(other)
        np.testing.assert_array_equal(leaf, other)


@pytest.mark.parametrize("save_layout", ["linen", "maxtext"])
def test_what_v1_saves_comes_back_the_same(save_layout: Any, tmp_path: Path) -> None:
    item = build()

    with v1.context(save_layout=save_layout):
        ocp.save(tmp_path / "item", item)
        restored = ocp.load(tmp_path / "item", nnx.eval_shape(build))

    assert_equal(restored, item)


def test_an_asynchronous_save_writes_the_same(tmp_path: Path) -> None:
    item = build()

    with v1.context():
        response = ocp.save_async(tmp_path / "item", item)
        response.result()
        restored = ocp.load(tmp_path / "item", nnx.eval_shape(build))

    assert_equal(restored, item)


def test_a_program_without_this_package_reads_it_with_stock_v1(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = item = build()
    with v1.context():
        ocp.save(tmp_path / "item", item)
    caplog.clear()

    stored = ocp.load(tmp_path / "item")

    assert "No handler found" not in caplog.text
    assert set(stored) == {"params", "batch_stats", "opt_state", "step"}
    np.testing.assert_array_equal(stored["params"]["layers_0"]["kernel"], model.layers[0].kernel[...])
    assert [entry is None for entry in stored["opt_state"]] == [False, True, True]


def test_a_linen_checkpoint_of_stock_v1_comes_up_in_nnx(tmp_path: Path) -> None:
    model, _ = build(1)
    linen = {
        "params": {
            "layers_0": {"kernel": jnp.full((3, 2), 2.0), "bias": jnp.ones(2)},
            "norm": {"scale": jnp.full(2, 3.0), "bias": jnp.zeros(2)},
        },
        "batch_stats": {"norm": {"mean": jnp.ones(2), "var": jnp.full(2, 4.0)}},
    }
    ocp.save(tmp_path / "item", linen)

    with v1.context():
        restored = ocp.load(tmp_path / "item", model)

    np.testing.assert_array_equal(restored.layers[0].kernel[...], np.full((3, 2), 2.0))
    np.testing.assert_array_equal(restored.norm.var[...], np.full(2, 4.0))
    # A concrete target keeps its random state, and is itself left alone.
    assert (
        jax.random.key_data(restored.drop.rngs.key[...]).tolist()
        == jax.random.key_data(model.drop.rngs.key[...]).tolist()
    )
    assert float(model.norm.var[0]) == 1.0


def test_a_maxtext_checkpoint_of_orbax_v0_comes_up_exactly() -> None:
    case = load_case("llama2_scanned_to_unscanned")
    handler = v1.configured()
    setting = ocp.Context()
    setting.checkpointables.registry = v1.registry(handler)

    with setting:
        restored = ocp.load(case.step_path, case.target, checkpointable_name=case.path.name)

    assert not problems(case, restored)
    assert handler.report is not None
    assert v1.NNXLinenHandler.report is None


def test_what_is_missing_is_an_error_unless_the_policy_says_otherwise(tmp_path: Path) -> None:
    model, _ = build()
    ocp.save(tmp_path / "item", {"params": {"layers_0": {"kernel": jnp.ones((3, 2))}}})

    with v1.context(), pytest.raises(MissingParamError, match="layers/0/bias"):
        ocp.load(tmp_path / "item", nnx.eval_shape(lambda: build()[0]))
    with v1.context(policy="init", init=lambda: build()[0]):
        restored = ocp.load(tmp_path / "item", nnx.eval_shape(lambda: build()[0]))

    np.testing.assert_array_equal(restored.layers[0].kernel[...], np.ones((3, 2)))
    np.testing.assert_array_equal(restored.norm.scale[...], model.norm.scale[...])


def test_items_without_nnx_state_are_orbax_own_business(tmp_path: Path) -> None:
    tree = {"a": jnp.arange(3), "b": [jnp.ones(2), None]}

    with v1.context():
        ocp.save_checkpointables(tmp_path / "item", {"state": build(), "tree": tree, "note": {"text": "x"}})
        loaded = ocp.load_checkpointables(
            tmp_path / "item", {"state": nnx.eval_shape(build), "tree": jax.eval_shape(lambda: tree)}
        )
        described = ocp.metadata(tmp_path / "item")

    assert_equal(loaded["state"], build())
    np.testing.assert_array_equal(loaded["tree"]["a"], np.arange(3))
    assert loaded["tree"]["b"][1] is None
    assert set(described.metadata) == {"params", "batch_stats", "opt_state", "step"}


def test_a_context_keeps_the_settings_of_the_one_it_is_made_from() -> None:
    base = ocp.Context()
    base.array.saving.use_ocdbt = False
    before = base.checkpointables.registry

    made = v1.context(base=base)

    assert made.array_options.saving.use_ocdbt is False
    assert base.checkpointables.registry is before


def test_a_context_without_a_database_refuses_a_name_with_a_backslash(tmp_path: Path) -> None:
    base = ocp.Context()
    base.array.saving.use_ocdbt = False
    item = nnx.State({"a\\b": nnx.Param(jnp.ones(2))})

    with v1.context(base=base), pytest.raises(RestoreError, match="takes a backslash in a path"):
        ocp.save(tmp_path / "refused", item)
    with v1.context():
        ocp.save(tmp_path / "kept", item)
    assert not (tmp_path / "refused").exists()
    np.testing.assert_array_equal(restore(tmp_path / "kept" / "state", item)["a\\b"].get_value(), np.ones(2))


def test_both_generations_of_orbax_write_the_same_item(tmp_path: Path) -> None:
    item = build()
    with v1.context():
        ocp.save(tmp_path / "v1", item)

    restored = restore(tmp_path / "v1" / "state", nnx.eval_shape(build))
    metadata = ocp_v0.PyTreeCheckpointHandler().metadata(tmp_path / "v1" / "state")

    assert_equal(restored, item)
    assert [entry["path"][-1] for entry in metadata.custom_metadata["nnx_aux"]] == ["count", "key"]


def test_a_context_that_loads_and_broadcasts_asks_for_single_replica() -> None:
    base = ocp.Context()
    base.array_options.loading.use_load_and_broadcast = True

    asked = [v1.context(base=base), v1.context(single_replica=True), v1.context()]

    assert [_handler_of(context).options.single_replica for context in asked] == [True, True, False]


def test_a_read_limit_of_the_context_in_force_holds_for_an_nnx_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def noting(*args: Any, concurrent_bytes: int | None = None, **kwargs: Any) -> Any:
        seen.append((concurrent_bytes, args[3].single_replica))
        return restore_item(*args, concurrent_bytes=concurrent_bytes, **kwargs)

    monkeypatch.setattr(v1, "restore_item", noting)
    with v1.context():
        ocp.save(tmp_path / "item", build())
    setting = v1.context()
    setting.memory.read_concurrent_bytes = 1 << 20
    setting.array.loading.use_load_and_broadcast = True
    setting.array.loading.load_and_broadcast_options.broadcast_memory_limit_bytes = 7

    with v1.context():
        ocp.load(tmp_path / "item", nnx.eval_shape(build))
    with setting:
        ocp.load(tmp_path / "item", nnx.eval_shape(build))

    chosen = SingleReplica(replica_axis_index=0, broadcast_memory_limit_bytes=7)
    assert seen == [(None, False), (1 << 20, chosen)]


@pytest.mark.skipif(not hasattr(ocp, "load_async"), reason="this Orbax loads in the foreground only")
def test_an_asynchronous_load_gives_the_same(tmp_path: Path) -> None:
    item = build()

    with v1.context():
        ocp.save(tmp_path / "item", item)
        try:
            restored = ocp.load_async(tmp_path / "item", nnx.eval_shape(build)).result()
        except NotImplementedError:
            pytest.skip("this Orbax loads only SafeTensors in the background")

    assert_equal(restored, item)


def test_a_handler_takes_the_keywords_of_orbaxs_own(tmp_path: Path) -> None:
    setting = ocp.Context()
    setting.array.saving.use_ocdbt = False
    handler = v1.configured()(context=setting)

    assert handler.is_handleable({"a": 1, "b": "text"})
    assert handler.is_abstract_handleable({"a": jax.ShapeDtypeStruct((2,), jnp.float32)})
    with pytest.raises(TypeError, match="surprise"):
        v1.configured()(surprise=True).is_handleable({})


def _handler_of(context: ocp.Context) -> Any:
    kinds = [kind for kind, _ in context.checkpointables.registry.get_all_entries()]
    return next(kind for kind in kinds if issubclass(kind, v1.NNXLinenHandler))
