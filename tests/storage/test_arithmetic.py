"""The last cast and what comes before it, element by element against NumPy in float64."""

from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from orbax_nnx_handler.planning.core.errors import DtypeMismatchError
from orbax_nnx_handler.planning.core.recipes import Add, Arithmetic, Read, Recipe, Scale, Stack
from orbax_nnx_handler.storage.arithmetic import LostValueError, evaluate, put
from tests.sampled import sampled

FLOATS = [
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "float8_e5m2",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float4_e2m1fn",
]
INTEGERS = ["int4", "uint4", "int8", "uint8", "int16", "int32", "uint32", "int64", "uint64"]


def dtype_of(name: str) -> Any:
    return jnp.dtype(name)


def edge(name: str) -> float:
    return float(ml_dtypes.finfo(dtype_of(name)).max)


def placed(values: np.ndarray, wanted: str, *steps: Arithmetic) -> np.ndarray:
    view = np.empty(values.shape, dtype_of(wanted))
    put(view, values, steps)
    return view


@pytest.mark.parametrize("wanted", FLOATS)
@pytest.mark.parametrize("stored", FLOATS)
def test_what_fits_is_rounded_as_numpy_rounds(stored: str, wanted: str) -> None:
    limit = min(edge(stored), edge(wanted))
    values = (np.random.default_rng(0).uniform(-1, 1, 500) * limit).astype(dtype_of(stored))
    values = values[np.abs(values.astype(np.float64)) <= limit]

    got = placed(values, wanted)

    np.testing.assert_array_equal(got.astype(np.float64), values.astype(dtype_of(wanted)).astype(np.float64))


@pytest.mark.parametrize("wanted", [name for name in FLOATS if name != "float64"])
@pytest.mark.parametrize("at", [0, 3, 700_000])
def test_a_finite_value_beyond_the_dtype_is_refused_wherever_it_is(wanted: str, at: int) -> None:
    values = np.zeros((7, 100_001), np.float64)
    values.reshape(-1)[at] = -3 * edge(wanted)

    with pytest.raises(LostValueError) as raised:
        placed(values, wanted)

    assert raised.value.value == -3 * edge(wanted)
    assert (raised.value.stored, raised.value.wanted) == (np.float64, dtype_of(wanted))


@pytest.mark.parametrize("wanted", ["float32", "float16", "bfloat16", "float8_e5m2"])
def test_a_stored_infinity_and_nan_stay_what_they_are(wanted: str) -> None:
    got = placed(np.array([np.inf, -np.inf, np.nan, 1.0]), wanted).astype(np.float64)

    np.testing.assert_array_equal(got, [np.inf, -np.inf, np.nan, 1.0])


@pytest.mark.parametrize("value", [np.inf, -np.inf])
@pytest.mark.parametrize("wanted", ["float8_e4m3fn", "float4_e2m1fn"])
def test_an_infinity_does_not_become_a_number_or_nan(wanted: str, value: float) -> None:
    with pytest.raises(LostValueError):
        placed(np.array([1.0, value], np.float32), wanted)


@pytest.mark.parametrize(
    ("wanted", "held", "lost"),
    [
        ("float16", 65519.0, 65520.0),
        ("bfloat16", 3.394e38, 3.4e38),
        ("float8_e4m3fn", 463.0, 481.0),
        ("float4_e2m1fn", 6.9, 7.1),
    ],
)
def test_what_rounds_to_the_largest_number_is_held(wanted: str, held: float, lost: float) -> None:
    got = placed(np.array([held, -held], np.float32), wanted)

    assert got[0] == dtype_of(wanted).type(edge(wanted)) == -got[1]
    with pytest.raises(LostValueError):
        placed(np.array([lost], np.float32), wanted)


@pytest.mark.parametrize("wanted", INTEGERS)
@pytest.mark.parametrize("stored", ["int8", "int32", "uint32", "int64", "uint64"])
def test_integers_that_fit_are_kept_and_others_refused(stored: str, wanted: str) -> None:
    own, limits = jnp.iinfo(dtype_of(stored)), jnp.iinfo(dtype_of(wanted))
    low, high = max(int(own.min), int(limits.min)), min(int(own.max), int(limits.max))
    values = np.array([low, high, 0], dtype_of(stored))

    assert [int(value) for value in placed(values, wanted)] == [low, high, 0]
    for outside in (low - 1, high + 1):
        if own.min <= outside <= own.max:
            with pytest.raises(LostValueError):
                placed(np.array([[0, outside]], dtype_of(stored)), wanted)


@pytest.mark.parametrize("stored", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize(("value", "kept"), [(127.0, 127), (-128.0, -128), (3.9, 3), (-3.9, -3)])
def test_floats_are_cut_off_to_integers_as_numpy_does(stored: str, value: float, kept: int) -> None:
    assert placed(np.array([value], dtype_of(stored)), "int8")[0] == kept


@pytest.mark.parametrize("value", [128.0, -129.0, 1e30, np.inf, np.nan])
@pytest.mark.parametrize("stored", ["float64", "float32", "bfloat16"])
def test_floats_outside_an_integer_type_are_refused(stored: str, value: float) -> None:
    with pytest.raises(LostValueError):
        placed(np.array([0.0, value], dtype_of(stored)), "int8")


def test_the_ends_of_64_bits_are_held() -> None:
    assert placed(np.array([-(2.0**63)], np.float32), "int64")[0] == -(2**63)
    with pytest.raises(LostValueError):
        placed(np.array([2.0**63], np.float32), "int64")


@pytest.mark.parametrize("stored", ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("wanted", ["float64", "float32", "float16", "bfloat16"])
def test_arithmetic_comes_before_the_cast(stored: str, wanted: str) -> None:
    values = np.random.default_rng(1).uniform(-4, 4, (5, 6)).astype(dtype_of(stored))
    exact = values.astype(np.float64) * 3.7 + 1.0

    got = placed(values, wanted, Arithmetic(factor=3.7), Arithmetic(constant=1.0))

    step = float(ml_dtypes.finfo(dtype_of(wanted)).eps)
    wide = max(step, 2.0**-23 if stored != "float64" and wanted != "float64" else 2.0**-52)
    np.testing.assert_allclose(got.astype(np.float64), exact, rtol=step, atol=8 * wide)


def test_a_scale_brings_values_into_the_range_of_the_dtype() -> None:
    got = placed(np.array([1e5, -3e7], np.float32), "float16", Arithmetic(factor=1e-3))

    np.testing.assert_array_equal(got, np.array([100, -30000], np.float16))


def test_what_a_rule_makes_infinite_is_refused() -> None:
    with pytest.raises(LostValueError) as raised:
        placed(np.array([1.0, 1e30], np.float32), "float32", Arithmetic(factor=1e30))

    assert (raised.value.value, raised.value.computed) == (np.float32(1e30), np.inf)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            LostValueError(np.float32(1e5), np.float32(1e5), np.dtype("float32"), np.dtype("float16")),
            (
                "stored leaf params/a (float32) holds 100000.0, which float16 cannot hold.\n"
                "hint: choose float32, for the target's leaf or as --dtype of convert."
            ),
        ),
        (
            LostValueError(np.int64(2**40), np.int64(2**40), np.dtype("int64"), np.dtype("int32")),
            (
                "stored leaf params/a (int64) holds 1099511627776, which int32 cannot hold.\n"
                "hint: choose int64 under jax_enable_x64, for the target's leaf or as --dtype of convert."
            ),
        ),
        (
            LostValueError(np.float32(1.5), np.float32(190.5), np.dtype("float32"), np.dtype("int8")),
            (
                "stored leaf params/a (float32) holds 1.5 (190.5 by the rules), which int8 cannot hold.\n"
                "hint: change the rules, or choose a dtype that can, for the target's leaf or as "
                "--dtype of convert."
            ),
        ),
    ],
)
def test_the_error_names_leaf_value_and_dtypes(error: LostValueError, message: str) -> None:
    assert str(error.of(("params", "a"))) == message


def test_complex_numbers_are_checked_as_well() -> None:
    np.testing.assert_array_equal(placed(np.array([1 + 2j]), "complex64"), np.array([1 + 2j], np.complex64))
    with pytest.raises(LostValueError):
        placed(np.array([1 + 1e300j]), "complex64")


def test_places_need_not_be_contiguous() -> None:
    whole = np.zeros((6, 4), np.float16)
    put(whole.T[1:3, ::2], np.full((2, 3), 1.5, np.float32))
    assert whole.sum() == 9.0
    with pytest.raises(LostValueError):
        put(whole.T[1:3, ::2], np.full((2, 3), 1e6, np.float32))


@pytest.mark.parametrize(
    ("array", "stored", "wanted", "recipe"),
    sampled(
        [np.asarray, jnp.asarray],
        ["float32", "bfloat16", "float16"],
        ["float32", "float16", "bfloat16"],
        [Scale(Add(Read(("a",)), 2.0), 0.5), Stack((Scale(Read(("a",)), 3.0),), 0)],
    ),
)
def test_whole_arrays_are_computed_alike(recipe: Recipe, stored: str, wanted: str, array: Any) -> None:
    values = np.random.default_rng(2).uniform(-4, 4, (5, 6)).astype(dtype_of(stored))
    wide = values.astype(np.float32)
    exact = (wide + 2) * 0.5 if isinstance(recipe, Scale) else (wide * 3)[None]

    got = evaluate(recipe, {("a",): array(values)}, dtype_of(wanted))

    np.testing.assert_array_equal(np.asarray(got), exact.astype(dtype_of(wanted)))


@pytest.mark.parametrize(
    ("recipe", "value", "stored", "wanted"),
    [
        (Read(("a",)), 1e5, "float32", "float16"),
        (Scale(Read(("a",)), 1e3), 60000.0, "float16", "float16"),
        (Read(("a",)), 1e5, "int32", "int8"),
        (Read(("a",)), 300.0, "float32", "int8"),
        (Read(("a",)), 500.0, "float32", "float8_e4m3fn"),
    ],
)
@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_whole_arrays_are_checked_alike(
    recipe: Recipe, value: float, stored: str, wanted: str, array: Any
) -> None:
    values = np.array([0, value], dtype_of(stored))

    with pytest.raises(DtypeMismatchError, match=rf"stored leaf a \({stored}\) holds"):
        evaluate(recipe, {("a",): array(values)}, dtype_of(wanted))
