"""Which dtypes hold which: also the small ones, for which JAX knows no promotion."""

import jax.numpy as jnp
import numpy as np
import pytest

from orbax_nnx_handler.planning.core.dtypes import cast_between, changes_values, wide_dtype

SMALL_FLOATS = ("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float4_e2m1fn")


@pytest.mark.parametrize("small", SMALL_FLOATS)
@pytest.mark.parametrize("large", ["float32", "float64", "bfloat16"])
def test_a_small_float_is_wider_in_a_large_one_and_a_large_one_narrower_in_it(small: str, large: str) -> None:
    to_large = cast_between(jnp.dtype(small), jnp.dtype(large), is_count=False)
    to_small = cast_between(jnp.dtype(large), jnp.dtype(small), is_count=False)

    assert (to_large, to_small) == ("wider", "narrower")


@pytest.mark.parametrize("one", SMALL_FLOATS)
@pytest.mark.parametrize("other", SMALL_FLOATS)
def test_wider_between_small_floats_means_that_every_value_survives(one: str, other: str) -> None:
    every = np.arange(256, dtype=np.uint8).view(jnp.dtype(one)) if "4_" not in one else _every_float4()
    values = every[np.isfinite(every.astype(np.float32))]
    exact = values.astype(np.float32)
    survives = np.array_equal(exact.astype(jnp.dtype(other)).astype(np.float32), exact)

    cast = cast_between(jnp.dtype(one), jnp.dtype(other), is_count=False)

    assert cast == ("same" if one == other else "wider" if survives else "narrower")


def _every_float4() -> np.ndarray:
    sizes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    return np.array([*sizes, *(-size for size in sizes)], jnp.dtype("float4_e2m1fn"))


@pytest.mark.parametrize(
    ("stored", "wanted", "changes"),
    [
        ("int4", "int8", False),
        ("int8", "int4", True),
        ("int8", "uint8", True),
        ("uint32", "int32", True),
        ("int4", "float8_e4m3fn", False),
        ("int32", "float32", False),
        ("int32", "float16", True),
        ("float8_e4m3fn", "int4", True),
        ("float32", "complex64", False),
        ("complex64", "float32", True),
        ("bool", "int4", False),
    ],
)
def test_a_cast_that_leaves_the_range_changes_values(stored: str, wanted: str, changes: bool) -> None:
    assert changes_values(jnp.dtype(stored), jnp.dtype(wanted)) is changes


@pytest.mark.parametrize(
    ("stored", "wanted", "cast"),
    [
        ("int64", "int32", "integer"),
        ("uint64", "uint32", "integer"),
        ("int32", "int64", None),
        ("int32", "uint32", None),
        ("int64", "int16", None),
        ("int8", "int32", None),
    ],
)
def test_integers_become_others_only_where_jax_holds_no_64_bits(
    stored: str, wanted: str, cast: str | None
) -> None:
    assert cast_between(jnp.dtype(stored), jnp.dtype(wanted), is_count=False) == cast


@pytest.mark.parametrize(
    ("dtypes", "wide"),
    [
        (("bfloat16", "float16"), "float32"),
        (("int8", "float32"), "float32"),
        (("float64", "bfloat16"), "float64"),
        (("float32", "float64"), "float64"),
        (("float8_e4m3fn", "int4"), "float32"),
        (("float32", "complex64"), "complex64"),
    ],
)
def test_arithmetic_is_done_in_float32_or_wider(dtypes: tuple[str, str], wide: str) -> None:
    assert wide_dtype(*map(jnp.dtype, dtypes)) == jnp.dtype(wide)
