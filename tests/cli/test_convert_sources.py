"""`orbax-nnx convert` of what is rarer: random keys, msgpack files, statistics, boxed parameters, strings."""

import flax.serialization
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from tests.cli import nnx_program
from tests.cli.conftest import MODEL, stock


def test_random_keys_keep_their_implementation_and_their_bits(cli, tmp_path) -> None:
    tree = {"params": {"w": np.ones((2, 2), np.float32)}, "rng": jax.random.key(7, impl="rbg")}
    ocp.PyTreeCheckpointer().save(tmp_path / "in", tree)

    said = cli("convert", tmp_path / "in", tmp_path / "out")

    assert said.status == 0, said.err
    key = stock(tmp_path / "out")["rng"]
    assert str(jax.random.key_impl(key)) == "rbg"
    np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(tree["rng"]))
    assert cli("diff", tmp_path / "in", tmp_path / "out", "--values").status == 0


def test_a_msgpack_file_becomes_a_checkpoint_of_arrays(cli, tmp_path) -> None:
    params = {"Dense_0": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}}
    file = tmp_path / "checkpoint_3"
    file.write_bytes(flax.serialization.msgpack_serialize({"params": params, "step": 3}))

    said = cli("convert", file, tmp_path / "out", "--to", "maxtext")

    assert said.status == 0, said.err
    found = stock(tmp_path / "out")
    np.testing.assert_array_equal(found["params"]["params"]["Dense_0"]["kernel"], params["Dense_0"]["kernel"])
    assert int(found["step"]) == 3


def test_statistics_go_below_params_for_maxtext_and_come_back(cli, root, tmp_path) -> None:
    there = cli("convert", root, tmp_path / "there", "--to", "maxtext")
    back = cli("convert", tmp_path / "there", tmp_path / "back", "--to", "linen")

    assert (there.status, back.status) == (0, 0)
    source, found = stock(root / "200" / "default"), stock(tmp_path / "there")
    np.testing.assert_array_equal(
        found["params"]["batch_stats"]["norm"]["var"], source["batch_stats"]["norm"]["var"]
    )
    assert cli("diff", root, tmp_path / "back", "--values").status == 0


def test_boxed_parameters_scan_with_their_moments(cli, tmp_path) -> None:
    layers = {f"layers_{n}": {"kernel": {"value": np.full((2, 3), n, np.float32)}} for n in range(12)}
    tree = {"params": layers, "opt_state": [{"mu": layers}, None], "step": np.int32(1)}
    ocp.PyTreeCheckpointer().save(tmp_path / "in", tree)

    said = cli("convert", tmp_path / "in", tmp_path / "out", "--scan", "layers", "--axis", 1)

    assert said.status == 0, said.err
    expected = np.stack([np.full((2, 3), n, np.float32) for n in range(12)], 1)
    found = stock(tmp_path / "out")
    for made in (found["params"], found["opt_state"][0]["mu"]):
        assert list(made) == ["layers"]
        np.testing.assert_array_equal(made["layers"]["kernel"]["value"], expected)


def test_a_missing_layer_is_named_and_never_skipped(cli, tmp_path) -> None:
    layers = {f"layers_{n}": {"kernel": np.ones((2, 3), np.float32)} for n in (0, 1, 3)}
    ocp.PyTreeCheckpointer().save(tmp_path / "in", {"params": layers})

    said = cli("convert", tmp_path / "in", tmp_path / "out", "--scan", "layers", "--axis", 0)

    assert said.status == 1
    assert said.err == "RestoreError: params/layers/kernel is stored for the layers {0..1,3} only.\n"


@pytest.mark.parametrize("absent", ["layers_0", "layers_2"])
def test_a_leaf_that_some_layers_lack_is_named_with_them(absent, cli, tmp_path) -> None:
    layers = {f"layers_{n}": {"kernel": np.ones((2, 3), np.float32)} for n in range(3)}
    layers |= {
        name: leaf | {"bias": np.ones(3, np.float32)} for name, leaf in layers.items() if name != absent
    }
    ocp.PyTreeCheckpointer().save(tmp_path / "in", {"params": {"dec": layers}})

    said = cli("convert", tmp_path / "in", tmp_path / "out", "--scan", "dec/layers", "--axis", 0)

    assert said.status == 1
    there = "{1..2}" if absent == "layers_0" else "{0..1}"
    assert f"params/dec/layers/bias is stored for the layers {there}, not for {absent[-1]}" in said.err
    assert not (tmp_path / "out").exists()


def test_new_weights_come_from_the_factory_where_the_policy_allows(cli, root, tmp_path) -> None:
    target = f"{MODEL}:make(layers=4)"

    strict = cli("convert", root, tmp_path / "strict", target)
    allowed = cli("convert", root, tmp_path / "out", target, "--policy", "hidden=init")

    assert strict.status == 1
    assert strict.err.startswith("MissingParamError: ")
    assert allowed.status == 0, allowed.err
    found, fresh = stock(tmp_path / "out"), nnx.state(nnx_program.make(layers=4))
    np.testing.assert_array_equal(
        found["hidden"]["3"]["kernel"]["value"], fresh["hidden"][3]["kernel"].get_value()
    )


def test_strings_cannot_be_converted_and_are_named(cli, tmp_path) -> None:
    ocp.PyTreeCheckpointer().save(tmp_path / "in", {"params": {"w": np.ones(2)}, "name": "a model"})

    said = cli("convert", tmp_path / "in", tmp_path / "out")

    assert said.status == 1
    assert said.err == "RestoreError: 1 leaf is a string, which cannot be converted:\n  name\n"
