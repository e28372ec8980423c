"""The structure rules, on stored trees as Linen names them."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx, traverse_util

from orbax_nnx_handler import Drop, ShapeMismatchError, from_linen
from orbax_nnx_handler.planning.core.leaves import StoredLeaf
from orbax_nnx_handler.planning.core.paths import Path, canonical
from orbax_nnx_handler.planning.core.recipes import Concat, Read
from orbax_nnx_handler.planning.mapping.cells_and_wrappers import Derived, derive
from tests.planning.plans import params, plan_of

Model = dict[tuple[str, ...], StoredLeaf]


def stored(module: nn.Module, *inputs: Any, **kwargs: Any) -> Model:
    """Returns what a checkpoint of the module holds, by canonical path."""
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs, **kwargs))
    model: Model = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(variables)[0]:
        path: Path = tuple(key.key for key in keys)
        model[canonical(path[1:])] = StoredLeaf(path=path, shape=leaf.shape, dtype=np.dtype(leaf.dtype))
    return model


def by_path(derived: list[Derived]) -> Mapping[str, Derived]:
    return {"/".join(item.path): item for item in derived}


CARRY = np.zeros((2, 4), np.float32)
X = np.zeros((2, 3), np.float32)


def test_lstm_gates_are_fused_in_the_order_in_which_nnx_splits_them() -> None:
    derived, without_variable = derive(stored(nn.LSTMCell(4), (CARRY, CARRY), X))

    gates = [Read(("params", f"h{gate}", "bias")) for gate in "ifgo"]
    assert by_path(derived)["dense_h/bias"].recipe == Concat(tuple(gates), axis=0)
    assert sorted(by_path(derived)) == ["dense_h/bias", "dense_h/kernel", "dense_i/kernel"]
    assert without_variable == []


def test_gru_gates_are_fused_and_the_bias_that_nnx_lacks_is_named() -> None:
    derived, without_variable = derive(stored(nn.GRUCell(4), CARRY, X))

    gates = [Read(("params", f"i{gate}", "kernel")) for gate in "rzn"]
    assert by_path(derived)["dense_i/kernel"].recipe == Concat(tuple(gates), axis=1)
    assert sorted(by_path(derived)) == ["dense_h/kernel", "dense_i/bias", "dense_i/kernel"]
    assert [item.leaf.path for item in without_variable] == [("params", "hn", "bias")]


def test_a_bias_that_nnx_lacks_in_another_shape_than_the_cell_s_is_an_error() -> None:
    cell = {
        name: {"kernel": np.ones((3, 4), np.float32), "bias": np.ones(4, np.float32)}
        for name in ("ir", "iz", "in")
    }
    cell |= {name: {"kernel": np.ones((4, 4), np.float32)} for name in ("hr", "hz", "hn")}
    cell["hn"]["bias"] = np.zeros(5, np.float32)
    target = nnx.eval_shape(lambda: nnx.GRUCell(3, 4, rngs=nnx.Rngs(0)))

    with pytest.raises(ShapeMismatchError) as caught:
        from_linen({"params": cell}, target)
    left = from_linen({"params": cell}, target, renames=[Drop("params/hn/bias", "why")])

    assert str(caught.value) == (
        "1 stored leaf of a module that NNX keeps otherwise has another shape than that module has:\n"
        "  params/hn/bias (5,): (4,) there\n"
        "hint: renames=[Drop('params/hn/bias', 'why')] leaves it behind.\n"
        "checkpoint: a tree in memory (layout: Linen variables, 10 stored leaves)"
    )
    np.testing.assert_array_equal(left.dense_h.kernel[...], np.ones((4, 12)))


def test_a_bias_that_nnx_lacks_is_left_over_like_any_other_where_the_target_has_a_cell_of_its_own() -> None:
    cell = nn.unbox(nn.GRUCell(4).init(jax.random.key(0), CARRY, X))["params"]
    cell["hn"]["bias"] = np.ones(4, np.float32)
    head = {"kernel": np.ones((4, 2), np.float32)}
    wanted = {"head": head, "recurrent": {f"gate_{name}": leaves for name, leaves in cell.items()}}
    target = nnx.from_flat_state(
        [(path, nnx.Param(leaf)) for path, leaf in traverse_util.flatten_dict(wanted).items()]
    )
    stored = {"params": {"GRUCell_0": cell, "head": head}}

    without = from_linen(stored, target, policy="warn", unexpected="ignore")
    found = from_linen(stored, target, renames=[("GRUCell_0/{gate}", "recurrent/gate_{gate}")])

    np.testing.assert_array_equal(without["head"]["kernel"][...], head["kernel"])
    np.testing.assert_array_equal(found["recurrent"]["gate_hn"]["bias"][...], np.ones(4))


@pytest.mark.parametrize("gate", ["if", "hg"])
def test_a_cell_that_lacks_a_gate_is_no_cell(gate: str) -> None:
    model = stored(nn.LSTMCell(4), (CARRY, CARRY), X)
    del model[gate, "kernel"]

    derived, _ = derive(model)

    assert derived == []


def test_gates_of_different_widths_are_not_fused() -> None:
    model = stored(nn.LSTMCell(4), (CARRY, CARRY), X)
    model["ig", "kernel"] = StoredLeaf(path=("params", "ig", "kernel"), shape=(7, 4), dtype=np.dtype("f4"))

    derived, _ = derive(model)

    assert sorted(by_path(derived)) == ["dense_h/bias", "dense_h/kernel"]


@pytest.mark.parametrize("list_name", ["layers", "cells"])
def test_cells_in_a_list_that_take_inputs_of_different_widths_are_each_their_own(list_name: str) -> None:
    def held(inputs: int, first: float) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
        kernels = {f"i{gate}": np.full((inputs, 4), first + at, "f4") for at, gate in enumerate("ifgo")}
        kernels |= {f"h{gate}": np.full((4, 4), first + at, "f4") for at, gate in enumerate("ifgo")}
        cell = {name: {"kernel": kernel} for name, kernel in kernels.items()}
        for at, gate in enumerate("ifgo"):
            cell[f"h{gate}"]["bias"] = np.full(4, first + at, "f4")
        return cell

    widths = (3, 4, 4)
    cells = {str(at): {"cell": held(inputs, 10.0 * at)} for at, inputs in enumerate(widths)}
    target = nnx.from_flat_state(
        [
            (("enc", list_name, at, "cell", *path), nnx.Param(jax.ShapeDtypeStruct(shape, "float32")))
            for at, inputs in enumerate(widths)
            for path, shape in {
                ("dense_i", "kernel"): (inputs, 16),
                ("dense_h", "kernel"): (4, 16),
                ("dense_h", "bias"): (16,),
            }.items()
        ]
    )

    found = from_linen({"params": {"enc": {list_name: cells}}}, target)

    for at, inputs in enumerate(widths):
        row = np.repeat(10.0 * at + np.arange(4), 4)
        cell = found["enc"][list_name][at]["cell"]
        np.testing.assert_array_equal(cell["dense_i"]["kernel"][...], np.tile(row, (inputs, 1)))
        np.testing.assert_array_equal(cell["dense_h"]["bias"][...], row)


def test_a_minimal_gated_unit_is_taken_for_no_other_cell() -> None:
    assert derive(stored(nn.MGUCell(4), CARRY, X)) == ([], [])


def test_a_simple_cells_layers_are_renamed() -> None:
    derived, _ = derive(stored(nn.SimpleCell(4), CARRY, X))

    assert {path: item.recipe for path, item in by_path(derived).items()} == {
        "dense_i/bias": Read(("params", "i", "bias")),
        "dense_i/kernel": Read(("params", "i", "kernel")),
        "dense_h/kernel": Read(("params", "h", "kernel")),
    }


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Dense(3)(x)
        x = nn.WeightNorm(nn.Dense(3))(x)
        return nn.SpectralNorm(nn.Dense(2))(x, update_stats=True)


def test_a_layer_beside_its_normalising_wrapper_moves_inside() -> None:
    derived, _ = derive(stored(Normalised(), X))

    assert {path: item.recipe for path, item in by_path(derived).items()} == {
        "WeightNorm/#0/scales/kernel": Read(("params", "WeightNorm_0", "Dense_1/kernel/scale")),
        "WeightNorm/#0/layer_instance/bias": Read(("params", "Dense_1", "bias")),
        "WeightNorm/#0/layer_instance/kernel": Read(("params", "Dense_1", "kernel")),
        "SpectralNorm/#0/batch_stats/kernel/u": Read(("batch_stats", "SpectralNorm_0", "Dense_2/kernel/u")),
        "SpectralNorm/#0/batch_stats/kernel/sigma": Read(
            ("batch_stats", "SpectralNorm_0", "Dense_2/kernel/sigma")
        ),
        "SpectralNorm/#0/layer_instance/bias": Read(("params", "Dense_2", "bias")),
        "SpectralNorm/#0/layer_instance/kernel": Read(("params", "Dense_2", "kernel")),
    }


def test_a_wrapper_is_found_under_a_new_name_of_its_layer_too() -> None:
    model = stored(nn.WeightNorm(nn.Dense(3)), X)
    path = ("params", "norm", "Dense_0/kernel/scale")
    leaf = StoredLeaf(path=path, shape=(3,), dtype=np.dtype("f4"))
    renamed = {("up", *tokens[1:]): leaf for tokens, leaf in model.items() if tokens[-1] != "scale"}
    renamed["norm", "up", "kernel", "scale"] = leaf

    derived, _ = derive(renamed)

    assert by_path(derived)["norm/scales/kernel"].recipe == Read(path)
    assert "norm/layer_instance/bias" in by_path(derived)


def test_slashes_in_keys_alone_make_no_wrapper() -> None:
    path = ("transformer/layer_0/pre_attention_norm", "scale")
    gemma = {canonical(path): StoredLeaf(path=path, shape=(3,), dtype=np.dtype("f4"))}

    assert derive(gemma) == ([], [])


def test_a_simple_cell_in_boxes_is_certified_as_one_without() -> None:
    shapes = {("i", "kernel"): (3, 4), ("i", "bias"): (4,), ("h", "kernel"): (4, 4)}
    cell: dict[str, dict[str, Any]] = {name: {} for name, _ in shapes}
    for (name, leaf), shape in shapes.items():
        cell[name][leaf] = {"value": np.zeros(shape, np.float32)}
    wanted = {f"dense_{name}": {leaf: s for (n, leaf), s in shapes.items() if n == name} for name in cell}

    plan_of(nnx.State(params({"rnn": wanted})), {"params": {"rnn": cell}}).check()
