"""What NNX saves is, leaf by leaf, what Linen would have stored."""

from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from orbax_nnx_handler import save
from orbax_nnx_handler.storage.saving import linen_save
from tests.zoo.modules import PAIRS
from tests.zoo.pairs import Pair, restored_module, saved, stored_variables


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if "Norm" in pair.linen_name], ids=str)
def test_wrappers_restore_from_what_nnx_saved(pair: Pair, tmp_path: Path) -> None:
    module = restored_module(pair, saved(stored_variables(pair), tmp_path / "linen"))
    save(tmp_path / "nnx", module, renames=pair.renames)

    again = restored_module(pair, tmp_path / "nnx")

    given, found = nnx.to_pure_dict(nnx.state(module)), nnx.to_pure_dict(nnx.state(again))
    assert jax.tree.all(jax.tree.map(np.array_equal, given, found))


def test_a_stacked_gru_comes_back_with_the_bias_that_nnx_lacks(tmp_path: Path) -> None:
    @nnx.split_rngs(splits=2)
    @nnx.vmap
    def build(rngs: nnx.Rngs) -> nnx.GRUCell:
        return nnx.GRUCell(3, 4, rngs=rngs)

    cells = build(nnx.Rngs(0))

    save(tmp_path / "checkpoint", cells)

    with ocp.PyTreeCheckpointer() as stock:
        params = stock.restore(tmp_path / "checkpoint")["params"]
    np.testing.assert_array_equal(params["hn"]["bias"], np.zeros((2, 4)))
    np.testing.assert_array_equal(params["hz"]["kernel"], cells.dense_h.kernel[..., 4:8])
    np.testing.assert_array_equal(params["in"]["bias"], cells.dense_i.bias[..., 8:])


def test_save_args_follow_the_gates() -> None:
    state = nnx.state(nnx.GRUCell(3, 4, rngs=nnx.Rngs(0)))
    half = ocp.SaveArgs(dtype=np.dtype("float16"))

    given = linen_save(ocp.args.PyTreeSave(state, save_args=jax.tree.map(lambda _: half, state)))

    assert jax.tree.structure(given.save_args) == jax.tree.structure(given.item)
    assert all(args is half for args in jax.tree.leaves(given.save_args))


def test_layers_of_other_widths_are_no_cell(tmp_path: Path) -> None:
    class Twin(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.dense_i = nnx.Linear(3, 8, rngs=rngs)
            self.dense_h = nnx.Linear(4, 8, use_bias=False, rngs=rngs)

    save(tmp_path / "checkpoint", Twin(nnx.Rngs(0)))

    with ocp.PyTreeCheckpointer() as stock:
        assert sorted(stock.restore(tmp_path / "checkpoint")["params"]) == ["dense_h", "dense_i"]
