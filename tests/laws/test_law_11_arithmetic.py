"""Law 11: arithmetic in the wider type, cast last; a value that does not fit is never silent."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from orbax_nnx_handler import Cast, DtypeMismatchError, RestoreError, Scale, from_linen, restore, save
from orbax_nnx_handler.cli import main
from tests.laws.worlds import write


def _restored(path, shape, dtype, **options):
    target = {"dense": {"kernel": jnp.zeros(shape, dtype)}}
    return np.asarray(restore(path, target, **options)["dense"]["kernel"])


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.uint8])
def test_a_weight_is_scaled_before_it_is_rounded(tmp_path, dtype):
    weights = np.array([[0.3, 0.9], [0.5, 1.0]], np.float32)
    path = write(tmp_path, {"params": {"dense": {"kernel": weights}}})
    rules = [Scale("dense/kernel", 127.0), Cast("dense/kernel", np.dtype(dtype).name)]
    try:
        have = _restored(path, (2, 2), dtype, renames=rules)
    except RestoreError:
        return
    np.testing.assert_array_equal(have, (weights * 127).astype(dtype))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("factor", [1e-3, 0.25])
def test_a_weight_is_scaled_in_the_wider_of_two_types(tmp_path, dtype, factor):
    weights = np.array([[100_000.0, -200_000.0], [3.0, 70_001.0]], np.float32)
    path = write(tmp_path, {"params": {"dense": {"kernel": weights}}})
    want = (weights * np.float32(factor)).astype(dtype)
    have = _restored(path, (2, 2), dtype, renames=[Scale("dense/kernel", factor)])
    np.testing.assert_array_equal(have, want)


@pytest.mark.parametrize("value", [3_000_000_000, 2**31, 2**32 - 1])
@pytest.mark.parametrize("layout", ["linen", "maxtext"])
def test_a_step_beyond_int32_is_stored_as_it_is_or_refused(tmp_path, value, layout):
    class Train(nnx.Module):
        def __init__(self):
            self.model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
            self.optimizer = nnx.Optimizer(self.model, optax.adam(1e-3), wrt=nnx.Param)

    state = Train()
    state.optimizer.step[...] = jnp.uint32(value)
    try:
        save(tmp_path / "saved", state, layout=layout)
    except ValueError:
        return
    with ocp.PyTreeCheckpointer() as reader:
        assert int(reader.restore(tmp_path / "saved")["step"]) == value


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1, 2**40])
def test_an_integer_out_of_range_is_refused(tmp_path, value):
    path = write(tmp_path, {"params": {"dense": {"kernel": np.array([[value]], np.int64)}}})
    with pytest.raises(RestoreError):
        _restored(path, (1, 1), np.int32)


def test_an_int64_that_fits_is_restored(tmp_path):
    path = write(tmp_path, {"params": {"dense": {"kernel": np.array([[2**31 - 1, -(2**31)]], np.int64)}}})
    np.testing.assert_array_equal(_restored(path, (1, 2), np.int32), [[2**31 - 1, -(2**31)]])


def test_convert_does_not_write_infinities_in_silence(tmp_path, capsys):
    weights = np.array([[100_000.0, 1.0]], np.float32)
    path, out = write(tmp_path, {"params": {"dense": {"kernel": weights}}}), tmp_path / "out"
    if main(["convert", str(path), str(out), "--dtype", "float16"]) == 0:
        said = capsys.readouterr()
        assert "dense/kernel" in said.err + said.out


@pytest.mark.parametrize("options", [(), ("--dtype", "bfloat16"), ("--to", "maxtext")])
def test_convert_keeps_64_bit_integers_and_their_values(tmp_path, options):
    numbers = np.array([1, -2, 2**40, -(2**62)], np.int64)
    params = {"table": {"ids": numbers, "mask": np.array([True, False]), "kernel": np.ones(3, np.float32)}}
    path = write(tmp_path, {"params": params, "step": np.int64(2**40)})
    assert main(["convert", str(path), str(tmp_path / "out"), *(options or ("--to", "linen"))]) == 0
    with ocp.PyTreeCheckpointer() as checkpointer:
        stored = checkpointer.restore(tmp_path / "out", restore_args=_as_numpy(tmp_path / "out"))
    table = (stored["params"]["params"] if "maxtext" in options else stored["params"])["table"]
    np.testing.assert_array_equal(table["ids"], numbers)
    assert table["ids"].dtype == np.int64
    assert table["mask"].dtype == np.bool_
    assert table["kernel"].dtype == (jnp.bfloat16 if "bfloat16" in options else np.float32)
    assert int(stored["step"]) == 2**40


def _as_numpy(path):
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(path).item_metadata.tree
    return jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)


def test_64_bit_floats_that_come_back_in_32_are_named_in_one_warning(tmp_path, caplog):
    params = {"dense": {"kernel": np.full((2, 3), 1 / 3, np.float64), "bias": np.ones(3, np.float32)}}
    path = write(tmp_path, {"params": params, "rate": np.float64(0.1)})
    target = {"dense": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)}}
    with caplog.at_level(logging.WARNING, logger="absl"):
        result = restore(path, target, unexpected="ignore")
    np.testing.assert_array_equal(result["dense"]["kernel"], np.full((2, 3), 1 / 3, np.float32))
    (said,) = [record.getMessage() for record in caplog.records if "x64" in record.getMessage()]
    assert "1 leaf is stored in 64 bits and comes back in 32, set jax_enable_x64" in said
    assert said.endswith("dense/kernel")


@pytest.mark.parametrize(
    ("values", "dtype", "shown"),
    [
        (np.array([3, -5, 1], np.int32), "uint8", "-5"),
        (np.array([3, 300, 1], np.int32), "uint8", "300"),
        (np.array([1, -1e9, 2], np.float32), "float16", "-1000000000.0"),
        (np.array([1, np.nan, 2], np.float32), "int32", "nan"),
    ],
)
@pytest.mark.parametrize("on_host", [True, False])
def test_the_value_that_does_not_fit_is_the_one_that_is_shown(values, dtype, shown, on_host):
    tree = {"params": {"w": values if on_host else jnp.asarray(values)}}
    with pytest.raises(RestoreError, match=f"holds {shown}"):
        from_linen(tree, {"w": jax.ShapeDtypeStruct((3,), dtype)}, renames=[Cast("w", dtype)])


@pytest.mark.parametrize("reverse", [False, True])
def test_leaves_of_several_dtypes_are_not_joined_in_that_of_the_first(reverse):
    exact = np.array([100003.0, 3.14159274, 1 + 2**-9, 1e-7], np.float32)
    layers = [np.ones(4, jnp.bfloat16), exact]
    layers.reverse() if reverse else None
    stored = {"params": {f"layers_{at}": {"w": layer} for at, layer in enumerate(layers)}}
    target = nnx.State({"layers": {"w": nnx.Param(jax.ShapeDtypeStruct((2, 4), np.float32))}})

    with pytest.raises(DtypeMismatchError, match="bfloat16 and float32"):
        from_linen(stored, target, dtype="stored")
    result = from_linen(stored, target, dtype="target")

    assert result["layers"]["w"].dtype == np.float32
    np.testing.assert_array_equal(result["layers"]["w"][...], np.stack(layers).astype(np.float32))
